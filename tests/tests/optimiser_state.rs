//! Memory of the optimiser in bytes: a run stays near that with floats, at about a quarter of the memory.

use chimera_compiler::{Descent, EntryKind, EntrySpec, Options, StateForm, compile};
use chimera_frontends::config::{Overrides, Scale, preset};
use chimera_ir::ops::DescentRule;
use chimera_ir::plan::WeightKind;
use chimera_runtime::exec::{ExecOptions, Executable};
use chimera_runtime::text::Batch;
use chimera_runtime::train::{Trainer, init};

const ROWS: usize = 4;
const TOKENS: usize = 32;
const STEPS: u64 = 60;

fn trainer(state: StateForm) -> Trainer {
    let model = preset(Scale::Pico, &Overrides { vocab_size: Some(257), ..Overrides::default() }).expect("pico").model;
    let rule = DescentRule::AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8 };
    let descent = Descent { rule, weight_decay: 0.1, clip: 1.0, state, balance: 0.0 };
    let kinds = [EntryKind::Backward { accumulate: false }, EntryKind::Descend(descent), EntryKind::Loss];
    let entries = kinds.map(|kind| EntrySpec { kind, rows: ROWS, tokens: TOKENS, depth: None }).to_vec();
    let plan = compile(&model, &Options { entries, ..Options::default() }).expect("the plan compiles");
    let mut exec = Executable::new(plan, &ExecOptions { threads: 2, ..ExecOptions::default() }).expect("executable");
    init::initialise(&mut exec, 3).expect("initial weights");
    Trainer::new(exec, 3).expect("a training plan")
}

/// Words of one of a few sentences, shifted by the step.
fn batch(step: u64) -> Batch {
    let text = b"the cat sat on the mat, the dog lay on the log and the bird sang in the tree. ";
    let at = |i: usize| i32::from(text[(i + 5 * step as usize) % text.len()]);
    let cells = || (0..ROWS).flat_map(|r| (0..TOKENS).map(move |t| r * 17 + t));
    Batch {
        batch: ROWS,
        seq: TOKENS,
        tokens: cells().map(at).collect(),
        labels: cells().map(|i| at(i + 1)).collect(),
        seg: vec![0; ROWS * TOKENS],
        reference: vec![],
        padding: 0,
    }
}

fn losses(trainer: &mut Trainer) -> Vec<f64> {
    (0..STEPS).map(|s| trainer.step(&batch(s), s, 2e-3).expect("a step").loss).collect()
}

/// Bytes of the memory of the optimiser, by weights that are matrices and others.
fn memory(trainer: &Trainer) -> u64 {
    let weights = &trainer.exec().plan().weights;
    weights.iter().filter(|w| w.kind == WeightKind::Optimizer).map(|w| w.ty.bytes() as u64).sum()
}

#[test]
fn bytes_follow_floats() {
    let [mut full, mut bytes] = [StateForm::Full, StateForm::Bytes].map(trainer);
    let share = memory(&bytes) as f64 / memory(&full) as f64;
    assert!(share < 0.32, "bytes take {share} of the memory");
    let start: Vec<Vec<f32>> = weights(&full);
    let (a, b) = (losses(&mut full), losses(&mut bytes));
    assert!(a[0] == b[0] && a[STEPS as usize - 1] < a[0] - 1.0, "{a:?}");
    // The mean of the last ten steps, and the whole curve, of a loss that falls by five nats.
    let last = |x: &[f64]| x[x.len() - 10..].iter().sum::<f64>() / 10.0;
    assert!((last(&a) - last(&b)).abs() < 0.1, "{} and {}", last(&a), last(&b));
    let apart = a.iter().zip(&b).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
    assert!(apart < 0.15, "{apart} nats apart");
    // Weights have gone much the same way, as far as they do when codes turn at other steps.
    let (x, y) = (weights(&full), weights(&bytes));
    let mut cosines: Vec<f64> = (0..x.len())
        .filter_map(|i| {
            let way =
                |w: &[Vec<f32>]| -> Vec<f64> { w[i].iter().zip(&start[i]).map(|(a, b)| f64::from(a - b)).collect() };
            let (p, q) = (way(&x), way(&y));
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let norms = (dot(&p, &p) * dot(&q, &q)).sqrt();
            (norms > 0.0).then(|| dot(&p, &q) / norms)
        })
        .collect();
    cosines.sort_by(f64::total_cmp);
    assert!(cosines[cosines.len() / 2] > 0.6, "median cosine {}", cosines[cosines.len() / 2]);
}

fn weights(trainer: &Trainer) -> Vec<Vec<f32>> {
    let plan = trainer.exec().plan();
    let names = plan.weights.iter().filter(|w| w.kind == WeightKind::Ternary).map(|w| w.name.clone());
    names.map(|n| trainer.exec().weight_f32(&n).expect("a weight").into_owned()).collect()
}
