//! What phases of training rest on: positions without a label have no part in loss and gradient, segments continue one another, and
//! gradients end where a segment begins.

use std::collections::BTreeMap;

use chimera_codegen::host;
use chimera_compiler::{EntryKind, EntrySpec, Options, compile};
use chimera_frontends::config::{self, ModelConfig, Overrides, Scale};
use chimera_runtime::exec::{ExecOptions, Executable};
use chimera_runtime::train::init;

const ROWS: usize = 2;
const TOKENS: usize = 8;
const SEED: u64 = 5;

/// A small model of all mixers with float activations, whose loss is smooth in its vectors.
fn model(looped: bool, truncated: bool) -> ModelConfig {
    let sets = [
        "hidden_size=32",
        "intermediate_size=32",
        "num_hidden_layers=3",
        "num_heads=2",
        "head_dim=16",
        "vocab_size=40",
        "quantization.activation_method=none",
        "backbone.moe.enabled=false",
        "tsp_knot.relaxation_phase2_max_iters=0",
        "titans.local_window_size=12",
        "backbone.layer_pattern=GD XM TM",
    ];
    let mut sets = sets.map(str::to_owned).to_vec();
    match looped {
        true => sets.push(
            r#"looping={"enabled": true, "prelude": [0, 0], "loop": [1, 1], "coda": [2, 2], "loop_range": [1, 4], "loop_default": 3, "depth_selection": "fixed"}"#.to_owned(),
        ),
        false => sets.push(r#"looping={"enabled": false}"#.to_owned()),
    }
    if looped && !truncated {
        sets.push("looping.backward_truncation=none".to_owned());
    }
    let loaded = config::preset(Scale::Pico, &Overrides { sets, ..Overrides::default() });
    loaded.unwrap_or_else(|e| panic!("{e}")).model
}

fn executable(cfg: &ModelConfig, kinds: &[EntryKind], tokens: usize, carried: bool) -> Executable {
    let spec = |kind: &EntryKind| EntrySpec { kind: kind.clone(), rows: ROWS, tokens, depth: None };
    let entries = kinds.iter().map(spec).collect();
    let options = Options { target: host().to_string(), entries, carried, ..Options::default() };
    let plan = compile(cfg, &options).unwrap_or_else(|e| panic!("{e}"));
    let mut exec = Executable::new(plan, &ExecOptions::default()).unwrap_or_else(|e| panic!("{e}"));
    init::initialise(&mut exec, SEED).unwrap_or_else(|e| panic!("{e}"));
    exec
}

/// Rows of `from..from + n` of two streams, and the tokens behind them as labels.
fn inputs(from: usize, n: usize) -> [Vec<i32>; 2] {
    let token = |row: usize, t: usize| ((row * 17 + t * t * 3 + t * 5) % 39) as i32;
    [0, 1].map(|shift| (0..ROWS).flat_map(|row| (from..from + n).map(move |t| token(row, t + shift))).collect())
}

fn run(exec: &mut Executable, entry: &str, tokens: &[i32], labels: &[i32]) -> f64 {
    let seg = vec![3; tokens.len()];
    for (name, values) in [("tokens", tokens), ("seg", &seg[..]), ("labels", labels)] {
        exec.set_input(entry, name, values).unwrap_or_else(|e| panic!("{e}"));
    }
    exec.run(entry).unwrap_or_else(|e| panic!("{e}"));
    f64::from(exec.output::<f32>(entry, "loss").expect("a loss")[0])
}

/// Loss and gradients by name.
fn gradients(exec: &mut Executable, tokens: &[i32], labels: &[i32]) -> (f64, BTreeMap<String, Vec<f64>>) {
    let loss = run(exec, "grad", tokens, labels);
    let entry = exec.plan().entry("grad").expect("an entry point");
    let names: Vec<String> = entry.outputs.iter().map(|o| o.0.clone()).filter(|n| n.starts_with("grad.")).collect();
    let read = |name: String| {
        let values = exec.output::<f32>("grad", &name).expect("a gradient").iter().map(|&x| f64::from(x)).collect();
        (name, values)
    };
    (loss, names.into_iter().map(read).collect())
}

#[test]
fn positions_without_a_label_have_no_part_in_loss_and_gradient() {
    let mut exec = executable(&model(false, true), &[EntryKind::Grad], TOKENS, false);
    let [tokens, labels] = inputs(0, TOKENS);
    // The first row has no label at all.
    let kept = [10, 11, 15];
    let only = |kept: &[usize]| -> Vec<i32> {
        labels.iter().enumerate().map(|(i, &l)| if kept.contains(&i) { l } else { -100 }).collect()
    };
    let (loss, grads) = gradients(&mut exec, &tokens, &only(&kept));
    let each = kept.map(|i| gradients(&mut exec, &tokens, &only(&[i])));
    let mean = each.iter().map(|(l, _)| l).sum::<f64>() / 3.0;
    assert!((loss - mean).abs() < 1e-5 && loss > 1.0, "{loss}, the mean of what counts is {mean}");
    for (name, found) in &grads {
        let size = found.iter().fold(1e-4, |m: f64, x| m.max(x.abs()));
        for (i, x) in found.iter().enumerate() {
            let want = each.iter().map(|(_, g)| g[name][i]).sum::<f64>() / 3.0;
            assert!((x - want).abs() <= 1e-4 * size, "{name}[{i}] is {x}, expected {want}");
        }
    }
    // What stands behind the last label is not looked at by anything that counts.
    let mut other = tokens.clone();
    (0..TOKENS).for_each(|i| other[i] = (other[i] + 1) % 39);
    let (again, same) = gradients(&mut exec, &other, &only(&kept));
    assert_eq!(again.to_bits(), loss.to_bits(), "the row without labels does not show");
    assert!(same.iter().filter(|(n, _)| !n.contains("embed")).all(|(n, g)| *g == grads[n]), "nor in gradients");
    let (none, zero) = gradients(&mut exec, &tokens, &only(&[]));
    assert!(none == 0.0 && zero.values().flatten().all(|&x| x == 0.0), "no label, no loss and no gradient");
}

#[test]
fn segments_continue_one_another() {
    for looped in [false, true] {
        let cfg = model(looped, true);
        let mut whole = executable(&cfg, &[EntryKind::Loss], 3 * TOKENS, false);
        let mut parts = executable(&cfg, &[EntryKind::Loss, EntryKind::Backward { accumulate: false }], TOKENS, true);
        let [tokens, labels] = inputs(0, 3 * TOKENS);
        let want = run(&mut whole, "loss", &tokens, &labels);
        for entry in ["loss", "backward"] {
            let each = [0, 1, 2].map(|i| {
                let [tokens, labels] = inputs(i * TOKENS, TOKENS);
                run(&mut parts, entry, &tokens, &labels)
            });
            let found = each.iter().sum::<f64>() / 3.0;
            assert!((found - want).abs() < 2e-5, "{entry}, looped {looped}: {found}, in one piece {want}");
            // Without the state it is another loss.
            parts.reset_states();
            let [tokens, labels] = inputs(2 * TOKENS, TOKENS);
            assert!((run(&mut parts, entry, &tokens, &labels) - each[2]).abs() > 1e-4, "the state tells");
            parts.reset_states();
        }
    }
}

/// The states of an entry point, and back.
fn states(exec: &Executable) -> Vec<(String, usize, Vec<u8>)> {
    let all = exec.plan().states.iter().flat_map(|s| (0..s.copies as usize).map(|c| (s.name.clone(), c)));
    all.map(|(name, copy)| {
        let bytes = exec.state(&name, copy).expect("a state").to_vec();
        (name, copy, bytes)
    })
    .collect()
}

#[test]
fn gradients_end_where_a_segment_begins() {
    for looped in [false, true] {
        let mut exec = executable(&model(looped, false), &[EntryKind::Grad], TOKENS, true);
        let [first, behind] = [inputs(0, TOKENS), inputs(TOKENS, TOKENS)];
        run(&mut exec, "grad", &first[0], &first[1]);
        let carried = states(&exec);
        let (_, grads) = gradients(&mut exec, &behind[0], &behind[1]);
        let mut checked = 0;
        for name in
            ["norm.weight", "layers.0.attn_norm.weight", "layers.1.attn_norm.weight", "layers.2.ffn_norm.weight"]
        {
            let Some(grad) = grads.get(&format!("grad.{name}")) else { continue };
            let before = exec.weight::<f32>(name).expect("a weight").to_vec();
            let direction: Vec<f64> = (0..grad.len()).map(|i| if i % 3 == 0 { 1.0 } else { -0.5 }).collect();
            let slope: f64 = grad.iter().zip(&direction).map(|(g, d)| g * d).sum();
            let eps = 5e-3;
            let [plus, minus] = [eps, -eps].map(|eps| {
                let moved: Vec<f32> = before.iter().zip(&direction).map(|(w, d)| w + (eps * d) as f32).collect();
                exec.set_weight(name, &[before.len()], &moved).expect("set");
                // The state of the segment before is a constant.
                carried.iter().for_each(|(name, copy, bytes)| exec.set_state(name, *copy, bytes).expect("set"));
                run(&mut exec, "grad", &behind[0], &behind[1])
            });
            exec.set_weight(name, &[before.len()], &before).expect("set");
            let difference = (plus - minus) / (2.0 * eps);
            let bound = 0.03 * slope.abs().max(difference.abs()) + 1e-3;
            assert!(
                (slope - difference).abs() < bound,
                "looped {looped}, {name}: {slope}, by differences {difference}"
            );
            checked += 1;
        }
        assert!(checked >= 2, "{:?}", grads.keys());
    }
}
