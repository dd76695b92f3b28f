//! Documents that load, and what they load as.

use std::collections::HashSet;

use serde_json::Value;

use super::super::keys::{Disposition, check, size_of};
use super::super::{
    Activation, MixerKind, ModelConfig, Overrides, ParamKind, PhaseKind, Scale, Stage, TABLE, claims, from_text, json,
    load, parameter_count, parameters, parts, preset, schema, state_memory,
};
use super::{example, example_text, from, with_sets};

fn scaled(scale: Scale) -> Overrides {
    Overrides { scale: Some(scale), ..Overrides::default() }
}

fn size(model: &ModelConfig) -> u64 {
    let total = parameters(model).iter().map(|p| p.len()).sum();
    assert_eq!(parameter_count(model), total, "counts by formula and by list");
    let ternary = parameters(model).iter().filter(|p| p.kind == ParamKind::Ternary).map(|p| p.len()).sum::<u64>();
    assert_eq!(parts(model).iter().map(|p| p.ternary).sum::<u64>(), ternary);
    total
}

/// Paths of all leaves below `value`; a leaf is what is not an object, or a list without objects.
fn leaves(value: &Value, path: &str, out: &mut Vec<String>) {
    let join = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| leaves(value, &join(key), out)),
        Value::Array(list) if list.iter().any(Value::is_object) => {
            list.iter().enumerate().for_each(|(i, value)| leaves(value, &join(&i.to_string()), out));
        }
        _ => out.push(path.to_owned()),
    }
}

#[test]
fn real_files_load_with_every_leaf_claimed_by_one_row() {
    for name in ["chimera-5.1.json", "chimera-5.3.json"] {
        let text = example_text(name);
        let mut sources = json::Sources::default();
        let source = sources.add(name, text.clone());
        let document = sources.parse(source, 0).unwrap();
        let entries = check(&sources, &document).unwrap();
        let mut all = Vec::new();
        leaves(&serde_json::from_str(&text).unwrap(), "", &mut all);
        for leaf in &all {
            let covers = |path: &str| leaf == path || leaf.starts_with(&format!("{path}."));
            let rows = entries.iter().filter(|e| covers(&e.path)).count();
            assert_eq!(rows, 1, "{name}: {leaf} is claimed by {rows} rows");
        }
        let loaded = load(example(name), &Overrides::default()).unwrap();
        let listed: HashSet<&str> = loaded.not_yet.iter().map(|n| n.path.as_str()).collect();
        for entry in entries.iter().filter(|e| e.row.disposition == Disposition::NotYet) {
            assert!(listed.contains(entry.path.as_str()), "{name}: {} is not listed", entry.path);
        }
        assert!(listed.contains("span_inference.enabled") && !listed.contains("training.phases.0.optimizer"));
        let [pretrain, context, sft, dpo] = &loaded.phases[..] else { panic!("four phases: {:?}", loaded.phases) };
        assert_eq!((pretrain.seq_len, pretrain.batch_tokens, pretrain.tokens), (Some(4096), Some(4e6), Some(2e12)));
        assert_eq!(
            (pretrain.optimizer.as_deref(), pretrain.schedule.as_deref()),
            (Some("AdamW"), Some("cosine_warmup"))
        );
        assert_eq!(context.stages.len(), 3, "the main stage is that of pretraining");
        assert_eq!(context.stages[0], Stage { tokens: 16384, steps: 10_000, lr: Some(1e-5) });
        assert_eq!((sft.kind, sft.epochs, sft.data.len()), (PhaseKind::Sft, Some(3.0), 2));
        assert_eq!((dpo.kind, dpo.beta, dpo.lr), (PhaseKind::Dpo, Some(0.1), Some(5e-7)));
        assert_eq!(size(&loaded.model), 4_178_694_163);
        assert_eq!(loaded.model.count(MixerKind::GatedDelta), 14);
        assert_eq!(loaded.model.gated_delta.chunk_size, 256);
        assert_eq!((loaded.model.eos, loaded.model.pad), (199_999, 200_058));
        let features: HashSet<&str> = loaded.not_yet.iter().filter(|n| !n.off).map(|n| n.path.as_str()).collect();
        assert!(!features.contains("byte_level.encoder_depth") && features.contains("grammar.enabled"));
    }
}

fn draws_depths(model: &ModelConfig) -> bool {
    model.looping.as_ref().is_some_and(|l| l.stochastic)
}

#[test]
fn the_empty_document_is_the_full_model() {
    let full = load(example("chimera-5.3.json"), &scaled(Scale::Full)).unwrap().model;
    let mut empty = from("{}").unwrap().model;
    assert_eq!(empty.gated_delta.chunk_size, 64);
    empty.gated_delta.chunk_size = 256;
    assert!(draws_depths(&full) && !draws_depths(&empty));
    empty.looping.as_mut().unwrap().stochastic = true;
    assert_eq!(empty, full);
    assert_eq!(from("\u{feff}{}").unwrap(), from("{}").unwrap(), "a byte order mark is skipped");
}

#[test]
fn recorded_headers_load_as_they_are() {
    let text = include_str!("../testdata/golden_header.json");
    let model = from(text).unwrap().model;
    assert_eq!(size(&model), 1_122_827);
    assert_eq!(model.quantization.activation, Activation::Float);
    assert!(!model.knot.enabled);
    assert_eq!(model.looping.as_ref().unwrap().body, [2, 5]);
    assert_eq!(model.moe.as_ref().unwrap().layers, [3, 7]);
    let odd = ["hidden_size=72", "num_heads=3", "head_dim=16", "intermediate_size=160", "titans.core=persistent_only"];
    let odd = with_sets(text, &odd).unwrap().model;
    assert_eq!((odd.hidden_size, odd.inner_width(), odd.intermediate_size), (72, 48, 160));
    assert_eq!(odd.sketch_width(), 128);
    with_sets(text, &["hidden_size=100", "semantic_memory.vector_bits=512"]).unwrap();
}

#[test]
fn presets_have_their_sizes() {
    let expected = [
        (Scale::Test, 1_122_827, 512),
        (Scale::Nano, 3_143_917, 8192),
        (Scale::Tiny, 31_286_607, 8192),
        (Scale::Small, 126_017_115, 8192),
        (Scale::Full, 4_178_694_163, 200_073),
    ];
    for (scale, total, vocab) in expected {
        let alone = preset(scale, &Overrides::default()).unwrap().model;
        assert_eq!((size(&alone), alone.vocab_size), (total, vocab), "{scale}");
        let mut on_file = load(example("chimera-5.3.json"), &scaled(scale)).unwrap().model;
        on_file.gated_delta.chunk_size = alone.gated_delta.chunk_size;
        on_file.looping.as_mut().unwrap().stochastic = draws_depths(&alone);
        assert_eq!(on_file, alone, "{scale} over the full file");
    }
    let medium = preset(Scale::Medium, &Overrides::default()).unwrap().model;
    assert_eq!((medium.hidden_size, medium.layers.len(), medium.n_heads, medium.head_dim), (1024, 28, 16, 64));
    assert_eq!(medium.moe.as_ref().map(|m| (m.n_routed, m.width)), Some((16, 768)));
    size(&medium);
    let pico = preset(Scale::Pico, &Overrides::default()).unwrap().model;
    let words: Vec<&str> = pico.layers.iter().map(|k| k.word()).collect();
    assert_eq!(words.join(" "), "GD XM GD TM");
    assert_eq!((pico.hidden_size, pico.n_heads, pico.head_dim, pico.intermediate_size), (64, 2, 32, 192));
    assert!(pico.moe.is_none() && pico.looping.is_none());
    size(&pico);
}

#[test]
fn parameters_have_the_specified_order_names_and_shapes() {
    let model = preset(Scale::Test, &Overrides { sets: vec!["looping.C=true".into()], ..Overrides::default() });
    let list = parameters(&model.unwrap().model);
    let text: String = list.iter().map(|p| format!("{} {:?} {:?}\n", p.name, p.dims, p.kind)).collect();
    assert_eq!(text, include_str!("../testdata/parameters_test.txt"));
}

#[test]
fn examples_load() {
    for (name, layers) in [("pico.json", 4), ("nano.json", 8), ("tiny.json", 28)] {
        let loaded = load(example(name), &Overrides::default()).unwrap();
        assert_eq!(loaded.model.layers.len(), layers);
        assert!(loaded.not_yet.is_empty() && loaded.warnings.is_empty());
        size(&loaded.model);
    }
    let file = load(example("pico.json"), &Overrides::default()).unwrap().model;
    assert_eq!(file, preset(Scale::Pico, &Overrides::default()).unwrap().model);
    let tiny = load(example("tiny.json"), &Overrides::default()).unwrap().model;
    assert_eq!(tiny, preset(Scale::Tiny, &Overrides::default()).unwrap().model);
}

#[test]
fn canonical_json_loads_back() {
    let sets = [
        "quantization.weight_scale=absmean_per_row",
        "quantization.activation_method=none",
        "titans.step_rule=plain",
        "titans.core=persistent_only",
        "looping.zoh_input=exact",
        "looping.C=true",
        "looping.backward_truncation=none",
        "efla.enabled=true",
        "generation.do_sample=false",
        "model_seed=18446744073709551615",
        "rms_norm_eps=1e-5",
    ];
    for scale in Scale::ALL {
        for count in 0..=sets.len() {
            let sets = sets[..count].iter().map(|s| (*s).to_owned()).collect();
            let overrides = Overrides { sets, vocab_size: Some(300 + count), scale: None };
            let model = preset(scale, &overrides).unwrap().model;
            let back = from(&model.to_json().to_string()).unwrap();
            assert_eq!(back.model, model);
            assert!(back.not_yet.is_empty() && back.warnings.is_empty());
            assert_eq!(back.model.to_json().to_string(), model.to_json().to_string());
        }
    }
}

#[test]
fn overrides_apply_in_order() {
    let text = example_text("chimera-5.3.json");
    let model = with_sets(&text, &["titans.core=swa", "titans.core=persistent_only"]).unwrap().model;
    assert_eq!(model.titans.core, super::super::TitansCore::PersistentOnly);
    let model = with_sets(&text, &["titans={\"inner_chunk\": 8}", "looping.loop_range.1=9"]).unwrap().model;
    assert_eq!((model.titans.inner_chunk, model.titans.window), (8, 1024));
    assert_eq!(model.looping.unwrap().range, [1, 9]);
    let loaded =
        with_sets(&text, &["training.distillation_init.method=other", "titans.persistent_memory_slots=null"]).unwrap();
    assert!(loaded.not_yet.iter().any(|n| n.path == "training.distillation_init.method" && n.value == "other"));
    let bytes = Overrides { scale: Some(Scale::Nano), vocab_size: Some(257), sets: vec!["hidden_size=96".into()] };
    let loaded = from_text("f", &text, &bytes).unwrap();
    assert_eq!((loaded.model.vocab_size, loaded.model.eos, loaded.model.hidden_size), (257, 256, 96));
    assert!(loaded.warnings[0].contains("params.base"), "{:?}", loaded.warnings);
}

#[test]
fn ranges_derive_from_the_layer_count() {
    for (n, prelude, body, moe) in [(28, [0, 3], [4, 23], 7), (8, [0, 1], [2, 5], 2), (3, [0, 0], [1, 1], 0)] {
        let model = from(&format!("{{\"num_hidden_layers\": {n}}}")).unwrap().model;
        let looping = model.looping.unwrap();
        assert_eq!((looping.prelude, looping.body), (prelude, body));
        assert_eq!(model.moe.map_or(0, |m| m.layers.len()), moe);
    }
    for n in 3..200 {
        from(&format!("{{\"num_hidden_layers\": {n}}}")).unwrap();
    }
}

#[test]
fn claims_are_set_against_computed_sizes() {
    let loaded = load(example("chimera-5.3.json"), &Overrides::default()).unwrap();
    let claims = claims(&loaded);
    let claim = |path: &str| claims.iter().find(|c| c.path == path).unwrap();
    assert_eq!(claim("backbone.moe.total_params").computed, 7.0 * 17.0 * 3.0 * 2560.0 * 1728.0);
    assert_eq!(claim("backbone.moe.active_params_per_tok").computed, 7.0 * 3.0 * 3.0 * 2560.0 * 1728.0);
    assert_eq!(claim("params.physical").computed, 4_178_694_163.0);
    assert_eq!(claim("params.physical").declared, 2.65e9);
    let unused = 7.0 * 14.0 * 3.0 * 2560.0 * 1728.0;
    let rest = 4_178_694_163.0 - 512_186_880.0 - unused;
    assert!((claim("params.active_per_token").computed / rest - 1.0).abs() < 0.001);
    assert!(!claim("params.moe_total").agrees());
    assert!(
        loaded
            .warnings
            .iter()
            .any(|w| { w.starts_with("params.physical declares 2,650,000,000, the shapes give 4,178,694,163") })
    );
    let counts = [("2.3B", 2.3e9), ("350M", 350e6), ("4K", 4e3), ("2T", 2e12), ("12", 12.0)];
    assert!(counts.iter().all(|(text, n)| size_of(&Value::from(*text)) == Some(*n)));
    assert!(["", "B", "-1B", "1e3M", "inf", "2.3b"].iter().all(|text| size_of(&Value::from(*text)).is_none()));
}

#[test]
fn state_memory_counts_one_state_a_layer_and_iteration() {
    let model = load(example("chimera-5.3.json"), &Overrides::default()).unwrap().model;
    let once = state_memory(&model, 1);
    let mib: Vec<f64> = once.iter().map(|r| r.bytes_each as f64 / f64::from(1 << 20)).collect();
    let near = |got: f64, want: f64| (got - want).abs() < 0.01;
    assert!(near(mib[0], 0.71) && near(mib[1], 0.635) && near(mib[2], 3.75 + 20.0) && near(mib[3], 0.73), "{mib:?}");
    assert_eq!(once.iter().map(|r| r.states).collect::<Vec<_>>(), [14, 7, 4, 3]);
    let twice = state_memory(&model, 2);
    assert_eq!(twice.iter().map(|r| r.states).collect::<Vec<_>>(), [14 + 10, 7 + 5, 4 + 2, 3 + 3]);
}

#[test]
fn table_is_sound() {
    let mut seen = HashSet::new();
    for row in TABLE {
        assert!(seen.insert(row.path), "{} occurs twice", row.path);
        assert!(!row.text.is_empty() && !row.path.is_empty());
        // What stands in a list stands there or means nothing.
        let needs_default = row.disposition == Disposition::Consumed && !row.path.contains("[]");
        assert!(!needs_default || !row.default.is_empty(), "{} is consumed and has no default", row.path);
        let needs_none = matches!(row.disposition, Disposition::Note | Disposition::NotYet);
        assert!(!needs_none || row.default.is_empty(), "{} has a default and no use", row.path);
    }
    let defaults = super::super::load::defaults_text();
    assert_eq!(from(&defaults).unwrap().model, from("{}").unwrap().model, "defaults satisfy their own rows");
}

#[test]
fn schema_follows_the_table() {
    let schema = schema();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    assert_eq!(schema["additionalProperties"], false);
    assert_eq!(schema["properties"]["hidden_size"]["maximum"], 65_536);
    assert_eq!(schema["properties"]["titans"]["properties"]["core"]["enum"][1], "persistent_only");
    assert_eq!(schema["properties"]["modes"]["additionalProperties"]["properties"]["tps"]["type"], "number");
    assert_eq!(schema["properties"]["training"]["properties"]["phases"]["type"], "array");
    assert_eq!(schema["properties"]["looping"]["properties"]["loop_default"]["default"], 2);
}
