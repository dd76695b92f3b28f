//! A step along the gradient: what `backward` found, for the update that follows.
//!
//! Invariant: the gradient itself never leaves the executable; of a step, the norm of the gradient is recorded. The update of a step
//! therefore follows `backward` on the same batch, never a record alone.

use super::TrainError;
use super::step::{Probed, counted, weighted};
use crate::exec::{EntryId, Executable};
use crate::text::Batch;
use chimera_ir::plan::Plan;

/// The entry point that computes gradients.
pub(super) const BACKWARD: &str = "backward";
/// Its output: the sum of the squares of the gradient.
const SQUARES: &str = "squares";

/// Whether a plan trains along gradients.
pub(super) fn has_gradients(plan: &Plan) -> bool {
    plan.entry(BACKWARD).is_some()
}

/// What a run of `backward` on `batch` says: the loss, and as the only scalar of the update the norm of the gradient.
///
/// # Errors
/// When the loss or the norm is not finite.
pub(super) fn descent(
    exec: &Executable,
    backward: EntryId,
    batch: &Batch,
    step: u64,
    loads: Vec<i32>,
) -> Result<Probed, TrainError> {
    let losses: Vec<f64> = exec.output::<f32>(backward, "losses")?.iter().map(|&x| f64::from(x)).collect();
    let loss = weighted(&losses, &counted(batch));
    let norm = exec.output::<f64>(backward, SQUARES)?.iter().sum::<f64>().sqrt();
    match [loss, norm].into_iter().find(|x| !x.is_finite()) {
        Some(bad) => Err(TrainError::Diverged { step, loss: bad }),
        None => Ok(Probed { plus: vec![], minus: vec![], c: vec![norm as f32], loads, loss }),
    }
}
