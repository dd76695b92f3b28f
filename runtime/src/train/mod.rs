//! Training: initial weights, the step of an estimator, the loop around it, and what a run keeps on disk.
//!
//! Invariant: after the same number of steps, weights, optimizer memory and data position depend on plan, seed, options and data alone,
//! not on threads, interruptions or the clock (unless a time budget was asked for).

pub mod agreement;
mod backprop;
mod carried;
pub mod checkpoint;
mod codes;
mod compare;
mod driver;
mod head;
mod health;
pub mod history;
pub mod init;
pub mod journal;
pub mod metrics;
pub mod paradigms;
pub mod prefix;
pub mod quantiser;
mod schedule;
pub mod standing;
mod step;
pub mod tensorboard;
mod validate;
mod watch;
pub mod weights;

pub use driver::{Budget, Event, Measure, Outcome, Progress, Run, RunOptions, Writing};
pub use health::{Health, Inspection};
pub use schedule::{Decay, Schedule};
pub use step::{Depths, Probed, Trainer};

use crate::exec::ExecError;
use crate::files::{FileError, is_full};
use crate::generate::GenerateError;
use crate::text::TextError;
use std::fmt;
use std::io;
use std::path::PathBuf;

/// Why training could not go on.
#[derive(Debug)]
pub enum TrainError {
    /// The executor refused.
    Exec(ExecError),
    /// A checkpoint or weight file could not be read or written.
    File(FileError),
    /// The data cannot be trained on.
    Text(TextError),
    /// The plan is not one for training: what is missing or wrong, and the cure.
    Plan(String),
    /// Weights that do not belong to the plan.
    Weights {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        reason: String,
    },
    /// A weight that is not a finite number.
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Flat index of the first such element.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// A checkpoint whose metadata do not make sense.
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        reason: String,
    },
    /// A journal that cannot be used.
    Journal {
        /// The file.
        path: PathBuf,
        /// What was found, what was expected, and the cure.
        reason: String,
        /// Whether its content is at fault.
        damaged: bool,
    },
    /// No text could be generated.
    Generate(GenerateError),
    /// The loss is not a finite number, or exploded.
    Diverged {
        /// The step, counted from 0.
        step: u64,
        /// The loss.
        loss: f64,
    },
    /// A log or the output could not be written.
    Io {
        /// The file, if it is one.
        path: Option<PathBuf>,
        /// The system's answer.
        source: io::Error,
    },
}

impl TrainError {
    /// Exit code of a command that ends with this error: 1 failure, 4 resource, 5 corrupted file.
    pub fn exit_code(&self) -> u8 {
        match self {
            TrainError::Exec(e) => e.exit_code(),
            TrainError::File(e) => e.exit_code(),
            TrainError::NotFinite { .. }
            | TrainError::Checkpoint { .. }
            | TrainError::Journal { damaged: true, .. } => 5,
            TrainError::Io { source, .. } if is_full(source.kind()) => 4,
            TrainError::Io { .. } => 1,
            TrainError::Text(_) | TrainError::Plan(_) | TrainError::Weights { .. } | TrainError::Diverged { .. } => 1,
            TrainError::Journal { .. } | TrainError::Generate(_) => 1,
        }
    }
}

impl fmt::Display for TrainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TrainError::Exec(e) => e.fmt(f),
            TrainError::File(e) => e.fmt(f),
            TrainError::Text(e) => e.fmt(f),
            TrainError::Plan(why) => write!(f, "the plan cannot be trained: {why}"),
            TrainError::Generate(e) => e.fmt(f),
            TrainError::Weights { path, reason }
            | TrainError::Checkpoint { path, reason }
            | TrainError::Journal { path, reason, .. } => {
                write!(f, "{}: {reason}", path.display())
            }
            TrainError::NotFinite { path, tensor, index, value } => {
                write!(
                    f,
                    "{}: tensor `{tensor}` has the value {value} at element {index}, expected finite numbers; restore the file from its source",
                    path.display()
                )
            }
            TrainError::Diverged { step, loss } => {
                write!(
                    f,
                    "the loss or its gradient is {loss} in step {step}, expected a finite number that does not grow; the last checkpoint is unchanged, resume it or start again with a smaller --lr"
                )
            }
            TrainError::Io { path: Some(path), source } => write!(f, "{}: cannot write: {source}", path.display()),
            TrainError::Io { path: None, source } => write!(f, "cannot write the output: {source}"),
        }
    }
}

impl std::error::Error for TrainError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            TrainError::Exec(e) => Some(e),
            TrainError::File(e) => Some(e),
            TrainError::Text(e) => Some(e),
            TrainError::Generate(e) => Some(e),
            TrainError::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl From<ExecError> for TrainError {
    fn from(e: ExecError) -> TrainError {
        TrainError::Exec(e)
    }
}

impl From<FileError> for TrainError {
    fn from(e: FileError) -> TrainError {
        TrainError::File(e)
    }
}

impl From<TextError> for TrainError {
    fn from(e: TextError) -> TrainError {
        TrainError::Text(e)
    }
}

impl From<GenerateError> for TrainError {
    fn from(e: GenerateError) -> TrainError {
        TrainError::Generate(e)
    }
}
