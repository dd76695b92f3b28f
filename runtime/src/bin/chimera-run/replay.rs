//! `chimera-run replay` and `chimera-run verify-run`: any step of a run from its journal, and two runs bit for bit.
//!
//! Invariant: what is compared are bits, and only numbers that do not depend on the clock.

use crate::options::{Failure, RunOptions as ExecArgs};
use crate::resume::trainer_at;
use chimera_runtime::train::checkpoint::{self, Meta};
use chimera_runtime::train::journal::{self, StepRecord};
use chimera_runtime::train::standing::Standing;
use chimera_runtime::train::{Progress, TrainError, Trainer};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Options of `replay`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:
  chimera-run replay runs/first --to 120 -o runs/first/at-120.b158
  chimera-run train --resume runs/first/at-120.b158 --out runs/branch")]
pub struct ReplayArgs {
    /// Folder of the run
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Steps done; the last step of the run when absent
    #[arg(long, value_name = "STEP")]
    pub to: Option<u64>,
    /// Where the checkpoint of that step goes [default: RUN/replayed-STEP.b158]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    pub exec: ExecArgs,
    /// No report on stderr
    #[arg(short, long, env = "CHIMERA_QUIET")]
    pub quiet: bool,
}

/// Options of `verify-run`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:
  chimera-run verify-run runs/first runs/again --to 120")]
pub struct VerifyArgs {
    /// Folder of a run
    #[arg(value_name = "A")]
    pub a: PathBuf,
    /// Folder of another
    #[arg(value_name = "B")]
    pub b: PathBuf,
    /// Compare up to this step and the weights behind it; the last step of both when absent
    #[arg(long, value_name = "STEP")]
    pub to: Option<u64>,
    #[command(flatten)]
    pub exec: ExecArgs,
}

/// Writes the checkpoint of a step of a run.
///
/// # Errors
/// A run that does not lead to that step, damage, or a file that cannot be written.
pub fn replay(args: &ReplayArgs) -> Result<(), Failure> {
    let standing = match args.to {
        Some(step) => Standing::at(&args.run, step)?,
        None => newest(&args.run)?,
    };
    let progress = standing.progress();
    let trainer = trainer_at(&standing, &args.exec)?;
    let name = format!("replayed-{:08}.b158", progress.step);
    let path = args.output.clone().unwrap_or_else(|| args.run.join(name));
    checkpoint::write(&path, trainer.exec(), &Meta { progress, ..standing.meta.clone() })?;
    if !args.quiet {
        eprintln!(
            "step {}: the checkpoint of step {} and {} steps of the journal",
            progress.step,
            standing.meta.progress.step,
            standing.trail.steps.len()
        );
    }
    writeln!(std::io::stdout().lock(), "{}", path.display())?;
    Ok(())
}

fn newest(run: &Path) -> Result<Standing, Failure> {
    Standing::newest(run)?.ok_or_else(|| Failure::new(format!("{}: the folder has no checkpoint", run.display())))
}

/// One of two runs.
struct Side {
    /// Steps done where its journal begins.
    from: u64,
    steps: Vec<StepRecord>,
    meta: Meta,
    end: Progress,
}

impl Side {
    fn open(run: &Path) -> Result<Side, Failure> {
        let end = newest(run)?.progress();
        let first = checkpoint::steps(run)?.first().copied().unwrap_or(0);
        let oldest = Standing::whole(run, first)?;
        let path = run.join(journal::NAME);
        if !oldest.journal {
            return Err(Failure::new(format!("{}: the run has no journal", path.display())));
        }
        if let Some(gap) = oldest.trail.gap {
            return Err(Failure::corrupted(format!(
                "{}: the journal is damaged at byte {}",
                path.display(),
                gap.offset
            )));
        }
        Ok(Side { from: first, steps: oldest.trail.steps, meta: oldest.meta, end })
    }

    /// The record that led to `step`.
    fn step(&self, step: u64) -> Option<&StepRecord> {
        self.steps.get(usize::try_from(step.checked_sub(self.from + 1)?).ok()?)
    }
}

/// Compares two runs and says where they differ first.
///
/// # Errors
/// A difference (1), damage, or a failure to execute.
pub fn verify(args: &VerifyArgs) -> Result<(), Failure> {
    let (a, b) = (Side::open(&args.a)?, Side::open(&args.b)?);
    let differ = |what: String| Err(Failure::new(format!("the runs differ: {what}")));
    if a.meta.config != b.meta.config {
        return differ("their configurations are not the same".into());
    }
    if a.meta.data != b.meta.data {
        return differ(format!("data ({}; {})", a.meta.data, b.meta.data));
    }
    let last = args.to.unwrap_or(a.end.step.min(b.end.step));
    let first = a.from.max(b.from);
    for step in first + 1..=last {
        let (Some(x), Some(y)) = (a.step(step), b.step(step)) else { break };
        if let Some(what) = difference(x, y) {
            return differ(format!("step {step}, {what}"));
        }
    }
    if args.to.is_none() && a.end.step != b.end.step {
        return differ(format!("one has {} steps, the other {}; the first {last} are equal", a.end.step, b.end.step));
    }
    let [left, right] =
        [&args.a, &args.b].map(|run| -> Result<Trainer, Failure> { trainer_at(&Standing::at(run, last)?, &args.exec) });
    let tensors = same_weights(&left?, &right?)?;
    match tensors {
        Ok(n) => {
            let steps = last.saturating_sub(first);
            writeln!(std::io::stdout().lock(), "equal: {steps} steps, and {n} tensors behind step {last}")?;
            Ok(())
        }
        Err(what) => differ(format!("behind step {last}, {what}")),
    }
}

/// What differs in two records of a step; times may.
fn difference(a: &StepRecord, b: &StepRecord) -> Option<String> {
    let float = |what: &str, x: f64, y: f64| (x.to_bits() != y.to_bits()).then(|| format!("{what}: {x} and {y}"));
    let whole = |what: &str, x: u64, y: u64| (x != y).then(|| format!("{what}: {x} and {y}"));
    let c = || {
        let at = a.c.iter().zip(&b.c).position(|(x, y)| x.to_bits() != y.to_bits());
        at.map(|i| format!("scalar {i}: {} and {}", a.c[i], b.c[i]))
    };
    let load = || {
        let at = a.loads.iter().zip(&b.loads).position(|(x, y)| x != y);
        at.map(|i| format!("load {i}: {} and {}", a.loads[i], b.loads[i]))
    };
    whole("data position", a.position, b.position)
        .or_else(|| float("loss", a.loss, b.loss))
        .or_else(|| whole("number of scalars", a.c.len() as u64, b.c.len() as u64))
        .or_else(c)
        .or_else(|| whole("number of loads", a.loads.len() as u64, b.loads.len() as u64))
        .or_else(load)
        .or_else(|| float("learning rate", a.lr, b.lr))
        .or_else(|| whole("returns to checkpoints", a.rollbacks.into(), b.rollbacks.into()))
}

/// The number of tensors if all bits agree, else the first difference.
fn same_weights(a: &Trainer, b: &Trainer) -> Result<Result<usize, String>, TrainError> {
    let weights = &a.exec().plan().weights;
    for w in weights {
        if w.ty.dtype.size() == 1 {
            let (x, y) = (a.exec().weight_bytes(&w.name)?, b.exec().weight_bytes(&w.name)?);
            if let Some(i) = x.iter().zip(y).position(|(x, y)| x != y) {
                return Ok(Err(format!("tensor `{}` at byte {i}: {} and {}", w.name, x[i], y[i])));
            }
            continue;
        }
        let (x, y) = (a.exec().weight_f32(&w.name)?, b.exec().weight_f32(&w.name)?);
        if let Some(i) = x.iter().zip(y.iter()).position(|(x, y)| x.to_bits() != y.to_bits()) {
            return Ok(Err(format!("tensor `{}` at element {i}: {} and {}", w.name, x[i], y[i])));
        }
    }
    Ok(Ok(weights.len()))
}
