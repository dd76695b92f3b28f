//! Final norm and head along their gradient, beside an estimate for all other weights.

use std::collections::HashSet;

use chimera_compiler::{
    EntryKind, EntrySpec, Mode, Optimiser, Options, PerSequence, Scheme, Shared, UpdateRule, compile,
    passes::head::HEAD,
};
use chimera_frontends::config::{ModelConfig, Overrides, ParamKind, Scale, parameters, preset};
use chimera_runtime::{
    exec::{ExecOptions, Executable},
    text::Batch,
    train::{Trainer, init},
};

const SEED: u64 = 21;
const ROWS: usize = 4;
const TOKENS: usize = 12;

fn model() -> ModelConfig {
    let sets = vec!["num_hidden_layers=2".to_owned()];
    preset(Scale::Pico, &Overrides { sets, ..Overrides::default() }).expect("a preset loads").model
}

/// A trainer of the weights that are given, or of all.
fn trainer(
    cfg: &ModelConfig,
    scheme: &Scheme,
    rule: &UpdateRule,
    hybrid: bool,
    only: Option<HashSet<String>>,
) -> Trainer {
    let mut kinds = vec![
        EntryKind::DualLoss(scheme.clone()),
        EntryKind::Update(scheme.clone(), rule.clone()),
        EntryKind::Loss,
        EntryKind::Grad,
        EntryKind::Logits,
    ];
    kinds.extend(hybrid.then_some(EntryKind::Head));
    let entries = kinds.into_iter().map(|kind| EntrySpec { kind, rows: ROWS, tokens: TOKENS, depth: None }).collect();
    let options = Options { entries, hybrid, trainable: only, ..Options::default() };
    let plan = compile(cfg, &options).unwrap_or_else(|e| panic!("{e}"));
    let mut exec = Executable::new(plan, &ExecOptions { threads: 2, ..ExecOptions::default() }).expect("the plan runs");
    init::initialise(&mut exec, 5).expect("weights are initialised");
    Trainer::new(exec, SEED).expect("a plan for training")
}

fn batch(cfg: &ModelConfig) -> Batch {
    let n = ROWS * TOKENS;
    let at = |k: usize| (0..n).map(|i| ((i * 37 + k * 11) % cfg.vocab_size) as i32).collect();
    Batch { batch: ROWS, seq: TOKENS, tokens: at(1), labels: at(2), seg: vec![0; n], reference: vec![], padding: 0 }
}

fn schemes() -> [Scheme; 2] {
    [
        Scheme::PerSequence(PerSequence::default()),
        Scheme::Shared(Shared { mode: Mode::Additive, directions: 2, ..Shared::default() }),
    ]
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn weight(trainer: &Trainer, name: &str) -> Vec<f32> {
    trainer.exec().weight_f32(name).expect("a weight").into_owned()
}

fn state(trainer: &Trainer, name: &str) -> Vec<f32> {
    floats(trainer.exec().state(&format!("grad.{name}"), 0).expect("a gradient"))
}

fn close(what: &str, found: &[f32], want: &[f64]) {
    let largest = want.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    assert!(largest > 0.0 && found.len() == want.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(want).enumerate() {
        assert!((f64::from(*a) - b).abs() <= 1e-5 * largest, "{what}, element {i}: {a} is not {b}");
    }
}

/// The gradient of the mean cross-entropy with respect to the head: `sum (p - 1[label]) h / N`.
fn head_gradient(trainer: &mut Trainer, batch: &Batch, vocab: usize) -> Vec<f64> {
    let exec = trainer.exec_mut();
    exec.reset_states();
    exec.set_input("logits", "tokens", &batch.tokens).expect("it fits");
    exec.set_input("logits", "seg", &batch.seg).expect("it fits");
    exec.run("logits").expect("it runs");
    let logits = exec.output::<f32>("logits", "logits").expect("logits");
    let hidden = exec.output::<f32>("logits", "hidden").expect("hidden states");
    let (n, d) = (batch.labels.len(), hidden.len() / batch.labels.len());
    let mut out = vec![0.0; vocab * d];
    for (t, &label) in batch.labels.iter().enumerate() {
        let z = &logits[t * vocab..][..vocab];
        let top = z.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(f64::from(x)));
        let e: Vec<f64> = z.iter().map(|&x| (f64::from(x) - top).exp()).collect();
        let sum: f64 = e.iter().sum();
        for (v, e) in e.iter().enumerate() {
            let g = (e / sum - f64::from(u8::from(v == label as usize))) / n as f64;
            let row = out[v * d..][..d].iter_mut().zip(&hidden[t * d..][..d]);
            row.for_each(|(out, &h)| *out += g * f64::from(h));
        }
    }
    out
}

#[test]
fn the_head_has_its_gradient_and_takes_it() {
    let (cfg, lr) = (model(), 0.01);
    let batch = batch(&cfg);
    for scheme in schemes() {
        let rule = UpdateRule { optimiser: Some(Optimiser::Sgd), ..UpdateRule::default() };
        let mut trainer = trainer(&cfg, &scheme, &rule, true, None);
        let want = head_gradient(&mut trainer, &batch, cfg.vocab_size);
        for (name, values) in [("tokens", &batch.tokens), ("labels", &batch.labels), ("seg", &batch.seg)] {
            trainer.exec_mut().set_input("grad", name, values).expect("it fits");
        }
        trainer.exec_mut().run("grad").expect("it runs");
        let of = |name: &str| trainer.exec().output::<f32>("grad", &format!("grad.{name}")).expect("a gradient");
        let norm: Vec<f64> = of(HEAD[0]).iter().map(|&x| f64::from(x)).collect();
        let whole = of(HEAD[1]).to_vec();
        let before = HEAD.map(|name| weight(&trainer, name));
        let probed = trainer.probe(&batch, 0).expect("losses");
        assert!(HEAD.iter().enumerate().all(|(i, name)| weight(&trainer, name) == before[i]), "probes write nothing");
        close("the final norm", &state(&trainer, HEAD[0]), &norm);
        let head = state(&trainer, HEAD[1]);
        close("the head", &head, &want);
        // Rows that are no token of the batch are used by the head alone.
        let d = cfg.hidden_size;
        let unread = (0..cfg.vocab_size).filter(|&v| !batch.tokens.contains(&(v as i32)));
        let same = |v: usize| (0..d).all(|i| (head[v * d + i] - whole[v * d + i]).abs() < 1e-7);
        assert!(unread.into_iter().all(same), "the gradient of rows that only the head reads");
        assert!(!(0..cfg.vocab_size).all(same), "the embedding of tokens has another part, which is left out");
        let squares = [&state(&trainer, HEAD[0]), &head].map(|g| g.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>());
        let recorded = f64::from(*probed.c.last().expect("scalars"));
        assert!((recorded / squares.iter().sum::<f64>().sqrt() - 1.0).abs() < 1e-5, "{recorded}");
        trainer.apply(0, lr, &probed.c, &probed.loads).expect("an update");
        for (name, before) in HEAD.into_iter().zip(&before) {
            let after = weight(&trainer, name);
            let step: Vec<f64> = after.iter().zip(before).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
            let g = state(&trainer, name);
            for (step, g) in step.iter().zip(g) {
                assert!((step + lr * f64::from(g)).abs() <= 3e-7, "{name}: {step} is no step along {g}");
            }
        }
    }
}

#[test]
fn all_other_weights_move_as_without_it() {
    let cfg = model();
    let batch = batch(&cfg);
    let all = parameters(&cfg).into_iter().filter(|p| p.kind != ParamKind::Buffer).map(|p| p.name);
    let below: HashSet<String> = all.filter(|name| !HEAD.contains(&name.as_str())).collect();
    for scheme in schemes() {
        let rule = UpdateRule::default();
        let mut hybrid = trainer(&cfg, &scheme, &rule, true, None);
        let mut plain = trainer(&cfg, &scheme, &rule, false, Some(below.clone()));
        assert!(hybrid.needs_data() && !hybrid.is_along_gradient() && !plain.needs_data());
        assert_eq!(hybrid.forward_tokens(), plain.forward_tokens() + (ROWS * TOKENS) as u64);
        let [a, b] = [&mut hybrid, &mut plain].map(|t| t.step(&batch, 3, 0.01).expect("a step"));
        assert_eq!((&a.c[..b.c.len()], a.c.len()), (&b.c[..], b.c.len() + 1));
        for name in &below {
            assert!(weight(&hybrid, name) == weight(&plain, name), "{name}");
        }
        assert!(HEAD.iter().all(|name| weight(&hybrid, name) != weight(&plain, name)));
    }
}

#[test]
fn the_gradient_of_the_head_helps() {
    let cfg = model();
    let batch = batch(&cfg);
    let scheme = Scheme::PerSequence(PerSequence::default());
    let [with, without] = [true, false].map(|hybrid| {
        let mut trainer = trainer(&cfg, &scheme, &UpdateRule::default(), hybrid, None);
        (0..40).map(|step| trainer.step(&batch, step, 0.02).expect("a step").loss).last().expect("steps")
    });
    assert!(with < without - 0.1, "a loss of {with} with it, {without} without it");
}
