//! Whole training steps by each estimator: probes or gradient, update and packing, in tokens of data.
//!
//! Before it is timed, a step has given the same losses and weights with one thread and with several. Vocabularies are restricted to 8192.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use chimera_compiler::{
    Descent, EntryKind, EntrySpec, Family, Mask, Mode, Options, PerSequence, Scheme, Shared, StateForm, UpdateRule,
    compile,
};
use chimera_frontends::config::{Overrides, Scale, preset};
use chimera_ir::ops::{DescentRule, Distribution, Idle};
use chimera_ir::plan::Plan;
use chimera_runtime::train::Trainer;

use crate::measure::{Case, Effort, Setup, measure};
use crate::model::{SEED, Session, VOCAB, Workload, batch, executable, step_answers, whole_step, work};
use crate::peaks::{self, FMA, TERNARY};
use crate::row::Row;

/// Sequences of a batch, and their tokens, at each scale.
const WORKLOADS: [Workload; 2] = [
    Workload { scale: Scale::Nano, rows: 8, tokens: 128, whole: true },
    Workload { scale: Scale::Tiny, rows: 2, tokens: 128, whole: true },
];

/// The peer of other estimators.
const PEER: &str = "adamw";

/// An estimator by name.
enum Estimator {
    Probes(Scheme),
    Gradient(DescentRule),
}

fn shared(mode: Mode, mask: Mask) -> Estimator {
    Estimator::Probes(Scheme::Shared(Shared {
        mode,
        directions: 1,
        one_sided: false,
        scaled: false,
        family: Family::Dense(Distribution::Rademacher),
        mask,
        eps: 1e-3,
        eps_rel: None,
    }))
}

fn estimators() -> Vec<(&'static str, Estimator)> {
    let (beta1, beta2, eps) = (0.9, 0.95, 1e-8);
    let agreement = DescentRule::Agreement {
        beta1,
        beta2: 0.999,
        eps,
        rho: 0.95,
        lambda: 0.1,
        bounds: [0.5, 2.0],
        idle: Idle::Standard,
        fade: 0.95,
        gate: None,
        bytes: false,
    };
    let lowrank = PerSequence { rank: 1, kappa: 0.1, sigma_vec: 0.01, group: 1 };
    vec![
        (PEER, Estimator::Gradient(DescentRule::AdamW { beta1, beta2, eps })),
        ("sgd", Estimator::Gradient(DescentRule::Momentum { mu: 0.9 })),
        ("chimera21", Estimator::Gradient(agreement)),
        ("perseq-lowrank", Estimator::Probes(Scheme::PerSequence(lowrank))),
        ("mezo-requantise", shared(Mode::Requantise, Mask::Dense)),
        ("mezo-boundary", shared(Mode::Requantise, Mask::Boundary)),
        ("mezo-scales", shared(Mode::Scales, Mask::Dense)),
        ("mezo-additive", shared(Mode::Additive, Mask::Dense)),
        ("mezo-integer", shared(Mode::Integer { unit: 1.0 / 1024.0 }, Mask::Dense)),
    ]
}

fn plan(w: &Workload, estimator: &Estimator, setup: &Setup) -> Result<Plan> {
    let model = preset(w.scale, &Overrides { vocab_size: Some(VOCAB), ..Overrides::default() })?.model;
    let balance = model.moe.as_ref().map_or(0.0, |moe| moe.bias_update_rate as f32);
    let kinds = match estimator {
        Estimator::Probes(scheme) => {
            let rule = UpdateRule { balance, ..UpdateRule::default() };
            [EntryKind::DualLoss(scheme.clone()), EntryKind::Update(scheme.clone(), rule)]
        }
        Estimator::Gradient(rule) => {
            let descent = Descent { rule: *rule, weight_decay: 0.1, clip: 1.0, state: StateForm::Full, balance };
            [EntryKind::Backward { accumulate: false }, EntryKind::Descend(descent)]
        }
    };
    let spec = |kind| EntrySpec { kind, rows: w.rows, tokens: w.tokens, depth: None };
    let entries = kinds.into_iter().chain([EntryKind::Loss]).map(spec).collect();
    Ok(compile(&model, &Options { target: setup.target.to_string(), entries, ..Options::default() })?)
}

fn case(w: &Workload, name: &str, estimator: &Estimator, setup: &Setup) -> Result<Case> {
    let plan = plan(w, estimator, setup)?;
    let input = batch(w);
    let trainer =
        |threads| -> Result<Trainer> { Ok(Trainer::new(executable(&plan, &input, &setup.options(threads))?, SEED)?) };
    let (mut one, mut other) = (trainer(setup.threads)?, trainer(setup.other())?);
    ensure!(
        step_answers(&mut one, &input)? == step_answers(&mut other, &input)?,
        "answers differ between {} and {} threads",
        setup.threads,
        setup.other()
    );
    // Losses and update; packing is part of either, as the weights have changed.
    let first = if plan.entry("dual_loss").is_some() { "dual_loss" } else { "backward" };
    let (mut ternary, mut flops) = (0.0, 0.0);
    for entry in ["prepare", first, "update"].into_iter().filter(|e| plan.entry(e).is_some()) {
        let [t, f] = work(one.exec_mut(), entry)?;
        (ternary, flops) = (ternary + t, flops + f);
    }
    let scale = w.scale;
    let session = Rc::new(RefCell::new(Session::Training(Box::new(one))));
    Ok(Case {
        floor: vec![(TERNARY, ternary * 1e-9), (FMA, flops * 1e-9)],
        peer: (name != PEER).then(|| format!("train.{PEER}.{scale}")),
        ..whole_step(session, input, format!("train.{name}.{scale}"))
    })
}

/// Measure peaks and training steps.
///
/// # Errors
/// When a model cannot be compiled or run, or gives a wrong answer.
pub fn run(setup: &Setup, quick: bool, progress: &mut dyn FnMut(&str)) -> Result<Vec<Row>> {
    progress("peaks");
    let mut all = peaks::cases(setup)?;
    for w in &WORKLOADS[..if quick { 1 } else { WORKLOADS.len() }] {
        for (name, estimator) in estimators() {
            progress(&format!("compile and check {name} at {}", w.scale));
            all.push(case(w, name, &estimator, setup).with_context(|| format!("{name} at {}", w.scale))?);
        }
    }
    let effort = match quick {
        true => Effort { rounds: 4, burst: Duration::from_millis(50) },
        false => Effort { rounds: 9, burst: Duration::from_millis(500) },
    };
    measure(&mut all, effort, setup, progress)
}
