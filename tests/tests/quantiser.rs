//! The dynamic ternary quantiser: its threshold, scales and controller against the executable specification, and in training.

use std::collections::HashMap;

use chimera_compiler::{Descent, EntryKind, EntrySpec, Options, StateForm, compile, quantiser, update::Target};
use chimera_frontends::config::{Overrides, Scale, preset};
use chimera_ir::Tensor;
use chimera_ir::ops::{DescentRule, OpDef, TernaryDense};
use chimera_ir::plan::{QUANTISER, QUANTISER_TARGET, QUANTISER_THRESHOLD, WeightKind};
use chimera_runtime::exec::{ExecOptions, Executable};
use chimera_runtime::text::Batch;
use chimera_runtime::train::quantiser::{Codes, Rule, entropy, zeros_for};
use chimera_runtime::train::{Trainer, init};
use chimera_tests::engine::Engine;
use chimera_tests::golden::{Golden, assert_close};
use chimera_tests::reference::Memory;

fn rule(strict: bool) -> Rule {
    Rule { ema: 0.95, strict, least: 0.0, target: 0.7, warmup: 5, bits: None, every: 1 }
}

fn scalar(x: f32) -> Tensor {
    Tensor::f32(&[1], vec![x])
}

#[test]
fn forwards_of_the_specification() {
    let golden = Golden::open("dynamic_threshold");
    let (rtol, atol) = (golden.tolerance("rtol"), golden.tolerance("atol"));
    let [x, u, bias] = ["in.x", "param.U", "param.bias"].map(|n| golden.tensor(n));
    let &[forwards, rows, n] = &x.ty.dims[..] else { panic!("inputs of forwards") };
    let m = u.ty.dims[0];
    let target = Target { name: "u".into(), dims: u.ty.dims.clone(), kind: WeightKind::Ternary, exact: false };
    let graph = quantiser::graph(&[target]).expect("the graph builds");
    let scale = format!("{QUANTISER}u");
    for (mode, strict) in [("chimera", false), ("strict_bitnet", true)] {
        let (rule, mut memory) = (rule(strict), Memory::default());
        memory.weights.insert("u".into(), u.clone());
        for name in [&scale[..], QUANTISER_THRESHOLD, QUANTISER_TARGET] {
            memory.weights.insert(name.into(), scalar(0.0));
        }
        let adapt = |memory: &mut Memory, keep: f32, step: u64| {
            let rest = (1.0 - f64::from(keep)) as f32;
            let threshold = rule.threshold(step, rule.target) as f32;
            let inputs = [("keep", keep), ("rest", rest), ("threshold", threshold), ("target", 0.7)];
            let inputs: HashMap<_, _> = inputs.into_iter().map(|(n, x)| (n.to_owned(), scalar(x))).collect();
            Engine::Reference.run(&graph, &inputs, memory);
        };
        adapt(&mut memory, 0.0, 0);
        let (mut step, mut y, mut gammas) = (0, vec![], vec![]);
        for forward in 0..forwards {
            let alpha = golden.tensor(&format!("out.{mode}.alpha")).as_f32()[forward];
            if !strict {
                assert!((rule.threshold(step, rule.target) as f32 - alpha).abs() < 1e-6, "forward {forward}");
            }
            // The seventh forward is an evaluation: its threshold is that of its step, and the step is not counted.
            match forward {
                6 => {
                    memory.weights.insert(QUANTISER_THRESHOLD.into(), scalar(rule.threshold(step, rule.target) as f32));
                }
                _ => {
                    adapt(&mut memory, rule.ema, step);
                    step += 1;
                }
            }
            let gamma = memory.weights[&scale].as_f32()[0];
            gammas.push(gamma);
            let limit = gamma * memory.weights[QUANTISER_THRESHOLD].as_f32()[0];
            let column = |x: f32| Tensor::f32(&[m, 1], vec![x; m]);
            let dense = TernaryDense { group: n, ratio: 0.5 }.eval(&[&u, &column(gamma), &column(limit)]).remove(0);
            let x = &x.as_f32()[forward * rows * n..(forward + 1) * rows * n];
            let beta = x.iter().fold(0.0f32, |most, x| most.max(x.abs())) / 127.0 + 1e-6;
            for row in x.chunks(n) {
                for (w, b) in dense.as_f32().chunks(n).zip(bias.as_f32()) {
                    let code = |x: f32| f64::from((x / beta).round_ties_even().clamp(-127.0, 127.0));
                    let sum: f64 = row.iter().zip(w).map(|(&x, &w)| code(x) * f64::from(w)).sum();
                    y.push((sum * f64::from(beta)) as f32 + b);
                }
            }
        }
        assert_close(mode, &Tensor::f32(&[forwards, rows, m], y), &golden.tensor(&format!("out.{mode}.y")), rtol, atol);
        let want = golden.tensor(&format!("out.{mode}.gamma"));
        assert_close("gamma", &Tensor::f32(&[forwards], gammas), &want, rtol, atol);
    }
}

#[test]
fn information_and_its_controller() {
    let golden = Golden::open("dynamic_threshold");
    let (bits, zeros) = (golden.tensor("in.bits"), golden.tensor("out.sparse_zero_ratio"));
    for (&bits, &zeros) in bits.as_f32().iter().zip(zeros.as_f32()) {
        assert!((zeros_for(bits.into()) - f64::from(zeros)).abs() < 1e-5, "{bits} bits");
    }
    assert!((zeros_for(1.32) - 0.63038).abs() < 1e-5);
    assert!((entropy([1.0 / 3.0; 3]) - 3f64.log2()).abs() < 1e-12 && entropy([0.0, 1.0, 0.0]) == 0.0);
    let mut alpha = 0.7;
    let path = golden.tensor("out.controller");
    for (z, &want) in [0.1, 0.5, 0.62, 0.64, 0.66, 0.9, 0.9, 0.3].into_iter().zip(path.as_f32()) {
        alpha = Rule::corrected(alpha, z, zeros_for(1.32));
        assert!((alpha - f64::from(want)).abs() < 1e-6, "{z}: {alpha}, expected {want}");
    }
}

const ROWS: usize = 2;
const TOKENS: usize = 16;

fn trainer(sets: &[&str]) -> Trainer {
    let fixed = ["quantization.weight_scale=absmean_per_tensor", "quantization.dynamic.mode=chimera"];
    let sets = fixed.iter().chain(sets).map(|s| (*s).to_owned()).collect();
    let overrides = Overrides { vocab_size: Some(257), sets, ..Overrides::default() };
    let model = preset(Scale::Pico, &overrides).expect("pico").model;
    let rule = DescentRule::AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8 };
    let balance = model.moe.as_ref().map_or(0.0, |moe| moe.bias_update_rate as f32);
    let descent = Descent { rule, weight_decay: 0.1, clip: 1.0, state: StateForm::Full, balance };
    let kinds =
        [EntryKind::Backward { accumulate: false }, EntryKind::Descend(descent), EntryKind::Loss, EntryKind::Adapt];
    let entries = kinds.map(|kind| EntrySpec { kind, rows: ROWS, tokens: TOKENS, depth: None }).to_vec();
    let plan = compile(&model, &Options { entries, ..Options::default() }).expect("the plan compiles");
    let mut exec = Executable::new(plan, &ExecOptions { threads: 2, ..ExecOptions::default() }).expect("executable");
    init::initialise(&mut exec, 3).expect("initial weights");
    Trainer::new(exec, 3).expect("a training plan")
}

fn batch() -> Batch {
    let tokens: Vec<i32> = (0..ROWS * TOKENS).map(|i| (i * 7 % 50) as i32).collect();
    let labels = tokens.iter().map(|t| (t + 7) % 50).collect();
    Batch { batch: ROWS, seq: TOKENS, tokens, labels, seg: vec![0; ROWS * TOKENS], reference: vec![], padding: 0 }
}

/// Scales and threshold.
fn state(trainer: &Trainer) -> Vec<(String, f32)> {
    let weights = trainer.exec().plan().weights.iter().filter(|w| w.name.starts_with(QUANTISER));
    weights.map(|w| (w.name.clone(), trainer.exec().weight::<f32>(&w.name).expect("a scale")[0])).collect()
}

#[test]
fn training_warms_up_and_measuring_changes_nothing() {
    for activation in ["none", "absmax_per_block"] {
        let activation = format!("quantization.activation_method={activation}");
        let mut t = trainer(&["quantization.dynamic.warmup_steps=5", &activation]);
        let fresh = state(&t);
        assert!(fresh.len() > 10 && fresh.iter().filter(|s| s.0.contains("layers")).all(|s| s.1 > 0.0), "{fresh:?}");
        let mut losses = vec![];
        for step in 0..8u64 {
            losses.push(t.step(&batch(), step, 3e-3).expect("a step").loss);
            let codes = Codes::of(t.exec()).expect("weights").expect("a dynamic quantiser");
            let want = 0.7 * (step as f64 / 4.0).min(1.0);
            assert!((codes.threshold - want).abs() < 1e-6 && codes.bits() > 0.9, "{step}: {codes:?}");
            let before = state(&t);
            let exec = t.exec_mut();
            let b = batch();
            for (name, values) in [("tokens", &b.tokens), ("seg", &b.seg), ("labels", &b.labels)] {
                exec.set_input("loss", name, values).expect("an input");
            }
            exec.run("loss").expect("it runs");
            assert_eq!(before, state(&t), "measuring leaves the quantiser as it is");
        }
        assert!(losses[7] < losses[0] - 0.5 && state(&t) != fresh, "{losses:?}");
    }
}

/// Weights that are not trained have scales like the others.
#[test]
fn scales_are_those_of_all_weights() {
    let sets = ["quantization.weight_scale=absmean_per_tensor", "quantization.dynamic.mode=strict_bitnet"];
    let sets = sets.map(str::to_owned).into();
    let overrides = Overrides { vocab_size: Some(257), sets, ..Overrides::default() };
    let model = preset(Scale::Pico, &overrides).expect("pico").model;
    let trainable = Some(["embed.weight".to_owned()].into());
    let spec = |kind| EntrySpec { kind, rows: ROWS, tokens: TOKENS, depth: None };
    let entries = vec![spec(EntryKind::Loss), spec(EntryKind::Adapt)];
    let plan = compile(&model, &Options { entries, trainable, ..Options::default() }).expect("the plan compiles");
    let mut exec = Executable::new(plan, &ExecOptions { threads: 1, ..ExecOptions::default() }).expect("executable");
    init::initialise(&mut exec, 3).expect("initial weights");
    let scales: Vec<f32> = exec
        .plan()
        .weights
        .iter()
        .filter(|w| w.name.starts_with("quantiser.layers"))
        .map(|w| exec.weight::<f32>(&w.name).expect("a scale")[0])
        .collect();
    assert!(scales.len() > 10 && scales.iter().all(|&s| s > 0.0), "{scales:?}");
    let codes = Codes::of(&exec).expect("weights").expect("a dynamic quantiser");
    assert!(
        codes.threshold == 0.5 && (codes.shares[1] - 0.31).abs() < 0.02,
        "a third of Gaussian weights is zero: {codes:?}"
    );
}

#[test]
fn the_controller_reaches_its_bits() {
    let sets = ["quantization.dynamic.warmup_steps=0", "quantization.dynamic.target_bits=1.2"];
    let mut t = trainer(&sets);
    let mut seen = vec![];
    for step in 0..16u64 {
        t.step(&batch(), step, 1e-3).expect("a step");
        seen.push(Codes::of(t.exec()).expect("weights").expect("a dynamic quantiser"));
    }
    let (first, last) = (seen[0], seen[15]);
    // Half of the weights are zero at the first threshold.
    assert!((first.shares[1] - zeros_for(1.2)).abs() > 0.1, "{first:?}");
    assert!((last.shares[1] - zeros_for(1.2)).abs() < 0.045 && (last.bits() - 1.2).abs() < 0.1, "{last:?}");
}

#[test]
fn probes_and_group_scales_are_refused() {
    let sets = |scale: &str| {
        let sets = vec![format!("quantization.weight_scale={scale}"), "quantization.dynamic.mode=chimera".to_owned()];
        preset(Scale::Pico, &Overrides { vocab_size: Some(257), sets, ..Overrides::default() })
    };
    let error = sets("absmean_per_group").expect_err("a scale for each group").to_string();
    assert!(error.contains("absmean_per_tensor"), "{error}");
    let model = sets("absmean_per_tensor").expect("a scale for each weight").model;
    let scheme = chimera_compiler::Scheme::Shared(chimera_compiler::Shared::default());
    let entries = vec![EntrySpec { kind: EntryKind::DualLoss(scheme), rows: 2, tokens: 8, depth: None }];
    let error = compile(&model, &Options { entries, ..Options::default() }).expect_err("probes").to_string();
    assert!(error.contains("train along gradients"), "{error}");
}
