//! What training commands share: signals, and the plan of a run.
//!
//! Invariant: the first interrupt lets the running step end and its checkpoint be written; the second ends the process at once.

use crate::estimators::Way;
use crate::hyper::Hyper;
use crate::options::{Failure, RunOptions};
use chimera_compiler::passes::head::HEAD;
use chimera_compiler::{EntryKind, EntrySpec, Options, compile};
use chimera_frontends::config::{ModelConfig, parameters};
use chimera_frontends::layers::Depth;
use chimera_ir::plan::Plan;
use chimera_runtime::train::Depths;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Rows that one measurement takes at a time.
const MEASURED_ROWS: usize = 16;
/// Exit code of a process that an interrupt ends: 128 and the number of the signal.
const INTERRUPTED: i32 = 130;

/// A flag that the first interrupt sets.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<AtomicBool>);

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
        Ok(Interrupt(flag))
    }

    /// Whether the first interrupt came.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
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
    let parameters = parameters(config);
    let trainable = hyper.trainable(parameters.iter().map(|p| p.name.as_str()))?;
    if let (true, Some(names)) = (hyper.hybrid_head, &trainable) {
        divided(names)?;
    }
    let entries = [training_entries(config, hyper), further].concat();
    let (objective, carried) = (hyper.phase.objective(), hyper.phase.carries());
    let hybrid = hyper.hybrid_head;
    Ok(compile(config, &Options { entries, objective, carried, hybrid, trainable, ..run.compile()? })?)
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
