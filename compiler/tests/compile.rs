//! Plans of small models: every entry point compiles, kernels verify, and compilation is a function of its input.

use std::collections::HashSet;

use chimera_compiler::{EntryKind, EntrySpec, Mode, Options, PerSequence, Scheme, Shared, UpdateRule, compile};
use chimera_frontends::config::{Activation, Overrides, ParamKind, Parameter, Scale, expert_stack, parameters, preset};
use chimera_ir::loops;
use chimera_ir::plan::{CODES, Plan, SCALES, WeightKind, from_bytes, to_bytes};

fn all_entries(rows: usize, tokens: usize, scheme: &Scheme) -> Options {
    let spec = |kind, rows, tokens| EntrySpec { kind, rows, tokens, depth: None };
    Options {
        entries: vec![
            spec(EntryKind::Loss, rows, tokens),
            spec(EntryKind::Logits, 1, tokens),
            spec(EntryKind::Prefill, 1, tokens),
            spec(EntryKind::Decode, 1, 1),
            spec(EntryKind::DualLoss(scheme.clone()), rows, tokens),
            spec(EntryKind::Update(scheme.clone(), UpdateRule::default()), rows, tokens),
        ],
        ..Options::default()
    }
}

fn schemes() -> Vec<Scheme> {
    let mezo = |mode, directions| Scheme::Shared(Shared { mode, directions, eps_rel: Some(0.1), ..Shared::default() });
    vec![
        Scheme::PerSequence(PerSequence { rank: 2, kappa: 0.1, sigma_vec: 0.01, group: 1 }),
        mezo(Mode::Requantise, 1),
        mezo(Mode::Additive, 2),
    ]
}

fn plan(scale: Scale, scheme: &Scheme) -> Plan {
    let loaded = preset(scale, &Overrides::default()).expect("a preset loads");
    compile(&loaded.model, &all_entries(2, 24, scheme)).unwrap_or_else(|e| panic!("{scale}: {e}"))
}

#[test]
fn every_entry_point_of_every_scheme_compiles_and_its_kernels_verify() {
    for scale in [Scale::Pico, Scale::Test] {
        for scheme in schemes() {
            let plan = plan(scale, &scheme);
            let names: Vec<&str> = plan.entries.iter().map(|e| e.name.as_str()).collect();
            assert_eq!(names, ["prepare", "loss", "logits", "prefill", "decode", "dual_loss", "update"]);
            for kernel in &plan.kernels {
                loops::verify(kernel).unwrap_or_else(|e| panic!("{scale} {}: {e}", kernel.name));
            }
            for entry in &plan.entries {
                assert!(entry.arena_bound <= entry.arena, "{}", entry.name);
            }
        }
    }
}

#[test]
fn compiling_twice_gives_the_same_plan() {
    let scheme = &schemes()[0];
    assert_eq!(plan(Scale::Test, scheme), plan(Scale::Test, scheme));
}

#[test]
fn plans_for_packed_weights_have_no_latents_and_prepare_no_codes() {
    let model = preset(Scale::Test, &Overrides::default()).expect("a preset loads").model;
    let ternary: Vec<Parameter> = parameters(&model).into_iter().filter(|p| p.kind == ParamKind::Ternary).collect();
    let packed: HashSet<String> =
        ternary.iter().map(|p| expert_stack(&p.name).map_or(p.name.clone(), |(stack, _)| stack)).collect();
    assert!(packed.iter().any(|n| n.contains(".experts.*.")) && packed.len() < ternary.len());
    let mut options = all_entries(2, 24, &schemes()[0]);
    let error = compile(&model, &Options { packed: packed.clone(), ..options.clone() }).expect_err("no latents");
    assert!(error.to_string().contains("dual_loss changes latents"), "{error}");
    options.entries.truncate(4);
    let plan = compile(&model, &Options { packed: packed.clone(), ..options }).expect("forward passes compile");
    let of = |kind| plan.weights.iter().filter(move |w| w.kind == kind);
    assert_eq!(of(WeightKind::Ternary).count(), 0);
    assert_eq!(of(WeightKind::Optimizer).count(), 0);
    let names: HashSet<&str> =
        of(WeightKind::Packed).filter_map(|w| w.name.strip_suffix(CODES).or(w.name.strip_suffix(SCALES))).collect();
    assert_eq!(
        (names, of(WeightKind::Packed).count()),
        (packed.iter().map(String::as_str).collect(), 2 * packed.len())
    );
    for part in ["pack_ternary", "group_scale", "stack"] {
        assert!(plan.kernels.iter().all(|k| !k.name.contains(part)), "{part}");
    }
    assert_eq!(from_bytes(&to_bytes(&plan)).expect("a plan that was written can be read"), plan);
}

#[test]
fn float_activations_refuse_packed_weights() {
    let mut model = preset(Scale::Pico, &Overrides::default()).expect("a preset loads").model;
    model.quantization.activation = Activation::Float;
    let mut options = all_entries(1, 8, &schemes()[0]);
    options.entries.truncate(1);
    options.packed = ["layers.0.mlp.up_proj.weight".to_owned()].into();
    let error = compile(&model, &options).expect_err("floats need latents").to_string();
    assert!(error.contains("`layers.0.mlp.up_proj.weight` is packed, float activations want its latent"), "{error}");
}
