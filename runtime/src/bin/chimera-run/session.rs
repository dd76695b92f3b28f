//! What training commands share: signals, and the plan of a run.
//!
//! Invariant: the first interrupt lets the running step end and its checkpoint be written; the second ends the process at once.

use crate::estimators::Way;
use crate::hyper::Hyper;
use crate::memory::compile_within;
use crate::options::{Failure, RunOptions};
use crate::weights;
use chimera_compiler::passes::head::HEAD;
use chimera_compiler::{EntryKind, EntrySpec, Options};
use chimera_frontends::config::ModelConfig;
use chimera_frontends::layers::Depth;
use chimera_ir::plan::Plan;
use chimera_runtime::exec::Executable;
use chimera_runtime::train::paradigms::{Replan, Stage};
use chimera_runtime::train::{Depths, TrainError, Trainer};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Rows that one measurement takes at a time.
const MEASURED_ROWS: usize = 16;
/// Parts of a batch in which layers that stay as they are run.
const PREFIX_PARTS: usize = 4;
/// Exit code of a process that an interrupt ends: 128 and the number of the signal.
const INTERRUPTED: i32 = 130;

/// A flag that the first interrupt sets, or a moment.
#[derive(Clone, Debug)]
pub struct Interrupt {
    flag: Arc<AtomicBool>,
    deadline: Option<Instant>,
}

impl Interrupt {
    /// From here on, the first SIGINT or SIGTERM sets the flag and the second ends the process.
    ///
    /// # Errors
    /// When the system refuses the handlers.
    pub fn register() -> Result<Interrupt, Failure> {
        let flag = Arc::new(AtomicBool::new(false));
        let fail = |e| Failure::new(format!("cannot listen to signals: {e}"));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag unset, the second finds it set.
            signal_hook::flag::register_conditional_shutdown(signal, INTERRUPTED, flag.clone()).map_err(fail)?;
            signal_hook::flag::register(signal, flag.clone()).map_err(fail)?;
        }
        Ok(Interrupt { flag, deadline: None })
    }

    /// The same, and from `deadline` on as if an interrupt had come.
    pub fn or_at(&self, deadline: Instant) -> Interrupt {
        Interrupt { deadline: Some(deadline), ..self.clone() }
    }

    /// Whether the first interrupt came, or the moment.
    pub fn requested(&self) -> bool {
        self.flag.load(Ordering::Relaxed) || self.deadline.is_some_and(|at| Instant::now() >= at)
    }
}

/// From here on, a write beyond the limit of file sizes is an error like that of a full disk and does not end the process.
///
/// # Errors
/// When the system refuses the handler.
#[cfg(unix)]
pub fn survive_large_files() -> Result<(), Failure> {
    let nobody = Arc::new(AtomicBool::new(false));
    let refused = |e| Failure::new(format!("cannot listen to signals: {e}"));
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, nobody).map(drop).map_err(refused)
}

/// The plan of a run, with `further` entry points.
///
/// # Errors
/// When the configuration cannot be compiled, or a pattern of `--only` matches nothing.
pub fn training_plan(
    config: &ModelConfig,
    hyper: &Hyper,
    further: Vec<EntrySpec>,
    run: &RunOptions,
) -> Result<Plan, Failure> {
    stage_plan(config, hyper, Stage::default(), further, run)
}

/// Refuses a choice of weights that has none for the gradient, or none for the estimate.
fn divided(names: &HashSet<String>) -> Result<(), Failure> {
    let of_head = names.iter().filter(|name| HEAD.contains(&name.as_str())).count();
    match of_head {
        0 => Err(Failure::usage(format!(
            "--only leaves out {}, so --hybrid-head has no meaning; leave it out or train one of them",
            HEAD.join(" and ")
        ))),
        n if n == names.len() => Err(Failure::usage(
            "--only leaves no weight to probe beside --hybrid-head; choose more weights, or --estimator adamw",
        )),
        _ => Ok(()),
    }
}

/// Rows that one measurement takes at a time; long sequences have as many as in training, as each has its state.
pub fn measured_rows(hyper: &Hyper) -> usize {
    if hyper.phase.carries() { hyper.batch as usize } else { MEASURED_ROWS }
}

/// The plan of a stage of a run, with `further` entry points.
///
/// # Errors
/// As for [`training_plan`].
pub fn stage_plan(
    config: &ModelConfig,
    hyper: &Hyper,
    stage: Stage,
    further: Vec<EntrySpec>,
    run: &RunOptions,
) -> Result<Plan, Failure> {
    let trainable = hyper.paradigms.trained(hyper, config, stage)?;
    let cut = hyper.paradigms.cut(hyper, config, stage)?;
    let at = hyper.paradigms.at(hyper, config, stage);
    let mut entries = training_entries(config, &at);
    // Measurements of all stages are those of one length.
    let measured = entries.iter_mut().filter(|e| e.kind == EntryKind::Loss);
    measured.for_each(|e| e.tokens = hyper.seq_len as usize);
    // Rows that were not kept are fewer than a batch, as a rule.
    let (rows, tokens) = ((at.batch as usize).div_ceil(PREFIX_PARTS), at.seq_len as usize);
    entries.extend(cut.map(|_| EntrySpec { kind: EntryKind::Prefix, rows, tokens, depth: None }));
    entries.extend(further);
    if let (true, Some(names)) = (hyper.hybrid_head, &trainable) {
        divided(names)?;
    }
    let (objective, carried, hybrid) = (hyper.phase.objective(), hyper.phase.carries(), hyper.hybrid_head);
    let options = Options { entries, objective, carried, hybrid, trainable, cut, ..run.compile()? };
    Ok(compile_within(config, options, run.budget, run.threads())?)
}

/// Compiles the stages of a run as they come.
#[derive(Clone, Debug)]
pub struct Planner {
    /// The model.
    pub config: ModelConfig,
    /// The options of the run.
    pub hyper: Hyper,
    /// Entry points that do not train.
    pub further: Vec<EntrySpec>,
    /// On what the plans run.
    pub run: RunOptions,
}

impl Planner {
    /// The trainer of a plan of the run.
    ///
    /// # Errors
    /// When it cannot be executed.
    pub fn trainer_of(&self, plan: Plan) -> Result<Trainer, Failure> {
        let mut options = self.run.exec();
        options.pinned = self.hyper.paradigms.pipeline;
        let mut exec = Executable::new(plan, &options)?;
        if let Some(path) = &self.hyper.fisher {
            weights::read_scores(path, &mut exec)?;
        }
        let trainer = Trainer::new(exec, self.hyper.seed)?;
        let trainer = trainer.with_depths(depths(&self.config)).in_parts(self.hyper.accumulate as usize);
        let mut keeping = self.hyper.paradigms.keeping();
        let left = options.max_bytes.saturating_sub(trainer.exec().bytes());
        keeping.bytes = keeping.bytes.min(left);
        Ok(trainer.with_prefix(keeping)?)
    }
}

impl Replan for Planner {
    fn trainer(&mut self, stage: Stage) -> Result<(Trainer, String), TrainError> {
        let made = stage_plan(&self.config, &self.hyper, stage, self.further.clone(), &self.run);
        let made = made.and_then(|plan| self.trainer_of(plan));
        let trainer = made.map_err(|e| TrainError::Plan(format!("its next stage has none: {}", e.message)))?;
        Ok((trainer, self.hyper.paradigms.sentence(&self.hyper, &self.config, stage)))
    }
}

/// The entry points of a training plan.
pub fn training_entries(config: &ModelConfig, hyper: &Hyper) -> Vec<EntrySpec> {
    let (rows, tokens) = (hyper.batch as usize, hyper.seq_len as usize);
    let balance = config.moe.as_ref().map_or(0.0, |moe| moe.bias_update_rate);
    // What is compared runs equally deep.
    let depth = config.looping.as_ref().filter(|_| hyper.phase.compares()).map(|l| Depth::Fixed(l.default));
    let spec = |kind, rows| EntrySpec { kind, rows, tokens, depth };
    let [first, update] = hyper.entries(balance);
    let rows_at_once = rows / hyper.accumulate as usize;
    let mut entries = vec![spec(first, rows_at_once), spec(update, rows), spec(EntryKind::Loss, measured_rows(hyper))];
    entries.extend(config.quantization.dynamic.as_ref().map(|_| spec(EntryKind::Adapt, rows)));
    entries.extend(hyper.hybrid_head.then(|| spec(EntryKind::Head, rows)));
    entries.extend(hyper.choice().map(|kind| spec(kind, rows)));
    entries
}

/// The entry point that compares estimates with the gradient.
///
/// # Errors
/// Steps that go along the gradient.
pub fn cosine_entry(config: &ModelConfig, hyper: &Hyper) -> Result<EntrySpec, Failure> {
    let (rows, tokens) = (hyper.batch as usize, hyper.seq_len as usize);
    let depth = config.looping.as_ref().filter(|_| hyper.phase.compares()).map(|l| Depth::Fixed(l.default));
    match hyper.way() {
        Way::Probe(scheme) => Ok(EntrySpec { kind: EntryKind::Cosine(scheme), rows, tokens, depth }),
        Way::Descend(_) => Err(Failure::usage(format!(
            "--gradient-cosine has no meaning for the estimator {}, whose steps go along the gradient; leave it out",
            hyper.estimator.text()
        ))),
    }
}

/// How the loop depths of training are drawn, if the configuration asks for that.
pub fn depths(config: &ModelConfig) -> Option<Depths> {
    let drawn = config.looping.as_ref().filter(|l| l.stochastic);
    drawn.map(|l| Depths { mean: l.default as f64, least: l.range[0] as u32, most: l.range[1] as u32 })
}
