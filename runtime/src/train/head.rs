//! Steps of an estimate whose final norm and head follow their gradient.
//!
//! Invariant: the gradient never leaves the executable; of a step, its norm is recorded behind the scalars of the directions. The update
//! therefore follows the entry point `head` on the same batch at the same weights, never a record alone.

use super::step::{DEPTH, Probed, input_type, set_batch};
use super::{TrainError, Trainer};
use crate::text::Batch;

/// The entry point that computes this gradient.
pub(super) const HEAD: &str = "head";
/// Its output: the sum of the squares of the gradient.
const SQUARES: &str = "squares";

impl Trainer {
    /// Leaves the gradient of final norm and head on a batch for the update, and returns its norm.
    ///
    /// # Errors
    /// A norm that is not finite, or a failure to execute.
    pub(super) fn head_gradient(&mut self, batch: &Batch, step: u64) -> Result<f32, TrainError> {
        let entry = self.exec.entry(HEAD)?;
        let depths = input_type(self.exec.plan(), HEAD, DEPTH).is_ok().then(|| self.drawn(batch, step)).flatten();
        set_batch(&mut self.exec, entry, batch)?;
        if let Some(depths) = depths {
            self.exec.set_input(entry, DEPTH, &depths)?;
        }
        self.exec.run_entry(entry)?;
        let norm = self.exec.output::<f64>(entry, SQUARES)?.iter().sum::<f64>().sqrt();
        match norm.is_finite() {
            true => Ok(norm as f32),
            false => Err(TrainError::Diverged { step, loss: norm }),
        }
    }

    /// Whether final norm and head follow their gradient, beside an estimate for all other weights.
    pub fn is_hybrid(&self) -> bool {
        self.head
    }

    /// The norm of that gradient in a step, if there is one.
    pub(super) fn head_norm(&self, probed: &Probed) -> Option<f64> {
        probed.c.last().filter(|_| self.head).map(|&norm| f64::from(norm))
    }

    /// What the directions' scalars are among those of a step.
    pub(super) fn of_directions<'c>(&self, c: &'c [f32]) -> &'c [f32] {
        if self.head { c.split_last().map_or(c, |(_, directions)| directions) } else { c }
    }
}
