//! What a run measures of its estimate, against plain arithmetic: cosine to the gradient, and codes that a step changes.

use std::collections::{HashMap, HashSet};

use chimera_compiler::{
    EntryKind, EntrySpec, Family, Mode, Optimiser, Options, PerSequence, Scheme, Shared, UpdateRule, compile,
};
use chimera_frontends::config::{ModelConfig, Overrides, ParamKind, Scale, parameters, preset};
use chimera_ir::{
    Tensor,
    ops::{Distribution, GroupScale, OpDef, ScaleMode},
    plan::WeightKind,
};
use chimera_runtime::{
    exec::{ExecOptions, Executable},
    rng,
    text::Batch,
    train::{Health, Probed, Trainer, init},
};

const SEED: u64 = 21;
const TOKENS: usize = 12;
/// A vector, a ternary matrix and the embedding.
const NAMES: [&str; 3] = ["norm.weight", "layers.0.mlp.up_proj.weight", "embed.weight"];

fn model(sets: &[&str]) -> ModelConfig {
    let sets = sets.iter().map(|s| (*s).to_owned()).collect();
    preset(Scale::Pico, &Overrides { sets, ..Overrides::default() }).expect("a preset loads").model
}

fn small() -> ModelConfig {
    model(&["quantization.activation_method=none", "num_hidden_layers=2"])
}

fn trainer(cfg: &ModelConfig, scheme: &Scheme, rule: &UpdateRule, names: &[&str], rows: usize) -> Trainer {
    let kinds = [
        EntryKind::DualLoss(scheme.clone()),
        EntryKind::Update(scheme.clone(), rule.clone()),
        EntryKind::Loss,
        EntryKind::Grad,
        EntryKind::Cosine(scheme.clone()),
    ];
    let entries = kinds.map(|kind| EntrySpec { kind, rows, tokens: TOKENS, depth: None }).into();
    let trainable: HashSet<String> = names.iter().map(|n| (*n).to_owned()).collect();
    let trainable = Some(trainable).filter(|set| !set.is_empty());
    let plan = compile(cfg, &Options { entries, trainable, ..Options::default() }).unwrap_or_else(|e| panic!("{e}"));
    let mut exec = Executable::new(plan, &ExecOptions { threads: 2, ..ExecOptions::default() }).expect("the plan runs");
    init::initialise(&mut exec, 5).expect("weights are initialised");
    Trainer::new(exec, SEED).expect("a plan for training")
}

/// Rows of text that differ, or one row several times.
fn batch(cfg: &ModelConfig, rows: usize, differ: bool) -> Batch {
    let n = rows * TOKENS;
    let place = |i: usize| if differ { i } else { i % TOKENS };
    let at = |k: usize| (0..n).map(|i| ((place(i) * 37 + k * 11) % cfg.vocab_size) as i32).collect();
    Batch { batch: rows, seq: TOKENS, tokens: at(1), labels: at(2), seg: vec![0; n], reference: vec![], padding: 0 }
}

fn health(trainer: &mut Trainer, batch: &Batch, step: u64) -> (Health, Probed) {
    let probed = trainer.probe(batch, step).expect("losses");
    let mut health = Health::default();
    trainer.compare(batch, step, &probed, &mut health).expect("a gradient");
    (health, probed)
}

/// The gradient of a weight on a batch.
fn gradients(trainer: &mut Trainer, batch: &Batch) -> HashMap<&'static str, Vec<f64>> {
    let exec = trainer.exec_mut();
    for (name, values) in [("tokens", &batch.tokens), ("labels", &batch.labels), ("seg", &batch.seg)] {
        exec.set_input("grad", name, values).expect("it fits");
    }
    exec.run("grad").expect("it runs");
    let of = |name| exec.output::<f32>("grad", &format!("grad.{name}")).expect("a gradient");
    NAMES.map(|name| (name, of(name).iter().map(|&x| f64::from(x)).collect())).into()
}

fn gaussian(name: &str, n: usize, step: u64, k: usize) -> Vec<f64> {
    let mut out = vec![0.0; n];
    rng::fill_gaussian(&mut out, name, step as u32, k as u32, SEED);
    out.into_iter().map(f64::from).collect()
}

/// The estimate for a weight `w` in the units of its gradient.
fn estimate(scheme: &Scheme, name: &str, dims: &[usize], w: &[f32], step: u64, c: &[f32]) -> Vec<f64> {
    let n: usize = dims.iter().product();
    let mut g = vec![0.0; n];
    for (k, c) in c.iter().enumerate() {
        let (c, mut add) = (f64::from(*c), |c: f64, z: Vec<f64>| g.iter_mut().zip(z).for_each(|(g, z)| *g += c * z));
        match (scheme, dims) {
            (Scheme::PerSequence(s), &[m, n]) => {
                let r = s.rank;
                let a = gaussian(&format!("{name}#A"), m * r, step, k);
                let b = gaussian(&format!("{name}#B"), n * r, step, k);
                let mean = w.iter().map(|w| f64::from(w.abs())).sum::<f64>() / w.len() as f64;
                let width = f64::from(s.kappa) * mean.max(1e-3) / (r as f64).sqrt() * r as f64;
                let entry = |i: usize| (0..r).map(|q| a[i / n * r + q] * b[i % n * r + q]).sum::<f64>();
                add(c / width, (0..m * n).map(entry).collect());
            }
            (Scheme::PerSequence(s), _) => add(c / f64::from(s.sigma_vec), gaussian(name, n, step, k)),
            (Scheme::Shared(_), _) => add(c, gaussian(name, n, step, k)),
        }
    }
    g
}

fn cosine(pairs: &[(&[f64], &[f64])]) -> f64 {
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        pairs.iter().flat_map(|(a, b)| a.iter().zip(*b)).map(|(a, b)| f(*a, *b)).sum()
    };
    sum(&|a, b| a * b) / (sum(&|a, _| a * a) * sum(&|_, b| b * b)).sqrt()
}

#[test]
fn cosines_are_those_of_plain_arithmetic() {
    let cfg = small();
    let (batch, step) = (batch(&cfg, 4, true), 3);
    let family = Family::Dense(Distribution::Gaussian);
    let shared = Shared { family, directions: 3, eps: 1e-2, ..Shared::default() };
    for scheme in [
        Scheme::PerSequence(PerSequence { rank: 2, group: 2, ..PerSequence::default() }),
        Scheme::Shared(Shared { mode: Mode::Additive, ..shared.clone() }),
        Scheme::Shared(shared),
    ] {
        let mut trainer = trainer(&cfg, &scheme, &UpdateRule::default(), &NAMES, 4);
        let (found, probed) = health(&mut trainer, &batch, step);
        let gradients = gradients(&mut trainer, &batch);
        let estimates = NAMES.map(|name| {
            let dims = parameters(&cfg).into_iter().find(|p| p.name == name).expect("the model has it").dims;
            let w = trainer.exec().weight_f32(name).expect("a weight").into_owned();
            estimate(&scheme, name, &dims, &w, step, &probed.c)
        });
        let pairs: Vec<(&[f64], &[f64])> =
            NAMES.iter().zip(&estimates).map(|(n, e)| (&e[..], &gradients[n][..])).collect();
        let near = |what: &str, found: Option<f64>, want: f64| {
            assert!(found.is_some_and(|x| (x - want).abs() < 2e-5), "{scheme:?}, {what}: {found:?} is not {want}");
        };
        near("all", found.cosine, cosine(&pairs));
        let kinds = [WeightKind::Vector, WeightKind::Ternary, WeightKind::Embedding];
        for (kind, pair) in kinds.into_iter().zip(&pairs) {
            near("a kind", found.kinds.iter().find(|k| k.0 == kind).map(|k| k.1), cosine(&[*pair]));
        }
        assert_eq!(found.kinds.len(), 3);
    }
}

/// With `K` directions in `d` dimensions the squared cosine is about `K / (K + d)`.
#[test]
fn many_directions_point_along_the_gradient() {
    let cfg = small();
    let d = cfg.hidden_size as f64;
    let mut schemes: [Vec<f64>; 2] = [vec![], vec![]];
    for k in [8, 64, 512] {
        let family = Family::Dense(Distribution::Rademacher);
        let shared = Shared { family, directions: k, eps: 1e-2, ..Shared::default() };
        let all = [(Scheme::Shared(shared), 1), (Scheme::PerSequence(PerSequence::default()), k)];
        for ((scheme, rows), cosines) in all.iter().zip(&mut schemes) {
            let mut trainer = trainer(&cfg, scheme, &UpdateRule::default(), &NAMES[..1], *rows);
            let (health, _) = health(&mut trainer, &batch(&cfg, *rows, false), 0);
            let (found, want) = (health.cosine.expect("a cosine"), (k as f64 / (k as f64 + d)).sqrt());
            assert!((found - want).abs() < 0.2, "{scheme:?}: {found}, about {want} is to be expected");
            cosines.push(found);
        }
    }
    for found in schemes {
        assert!(found.is_sorted() && found[2] > 0.8, "{found:?}");
    }
}

#[test]
fn scales_point_along_the_gradient_of_what_they_scale() {
    let cfg = small();
    let shared = Shared { mode: Mode::Scales, directions: 1024, eps: 1e-2, ..Shared::default() };
    let mut trainer = trainer(&cfg, &Scheme::Shared(shared), &UpdateRule::default(), &NAMES[1..2], 1);
    let (health, _) = health(&mut trainer, &batch(&cfg, 1, true), 0);
    let found = health.cosine.expect("a cosine");
    assert!(found > 0.05, "{found}");
}

#[test]
fn flips_are_codes_that_differ() {
    let cfg = model(&["num_hidden_layers=2"]);
    let scheme = Scheme::PerSequence(PerSequence::default());
    let rule = UpdateRule { optimiser: Some(Optimiser::Normalised), ..UpdateRule::default() };
    let mut trainer = trainer(&cfg, &scheme, &rule, &[], 4);
    let codes = |trainer: &Trainer| -> Vec<u8> {
        let mut out = vec![];
        for p in parameters(&cfg).into_iter().filter(|p| p.kind == ParamKind::Ternary) {
            let w = Tensor::f32(&p.dims, trainer.exec().weight_f32(&p.name).expect("a weight").into_owned());
            let q = &cfg.quantization;
            let alpha = GroupScale { mode: ScaleMode::PerGroup(q.group_size) }.eval(&[&w]).remove(0);
            let limit = |i: usize| {
                let (n, nb) = (p.dims[1], alpha.ty.cols());
                q.threshold_ratio as f32 * alpha.as_f32()[i / n * nb + i % n / q.group_size]
            };
            let code = |(i, x): (usize, &f32)| if x.abs() > limit(i) { 1 + u8::from(*x > 0.0) } else { 0 };
            out.extend(w.as_f32().iter().enumerate().map(code));
        }
        out
    };
    assert_eq!(trainer.flips().expect("no codes are kept"), None);
    let batch = batch(&cfg, 4, true);
    for (step, lr) in [(0, 0.05), (1, 0.0)] {
        let before = codes(&trainer);
        trainer.keep_codes().expect("codes");
        trainer.step(&batch, step, lr).expect("a step");
        let changed = before.iter().zip(codes(&trainer)).filter(|(a, b)| **a != *b).count();
        let found = trainer.flips().expect("codes").expect("the plan has codes");
        assert_eq!(found, changed as f64 / before.len() as f64, "step {step}");
        assert_eq!(changed > 0, step == 0, "{changed} codes change with the rate {lr}");
    }
}
