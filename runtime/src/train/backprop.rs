//! A step along the gradient: what `backward` found, for the update that follows.
//!
//! Invariant: the gradient itself never leaves the executable; of a step, the norm of the gradient and the share of the weight decay are
//! recorded. The update of a step
//! therefore follows `backward` on the same batch, never a record alone.

use super::TrainError;
use super::prefix::PREFIX;
use super::step::{DEPTH, Probed, REFERENCE, input_type, matrix, total_load, weighted};
use crate::exec::{EntryId, Executable};
use crate::text::Batch;
use chimera_ir::plan::Plan;

/// The entry point that computes gradients.
pub(super) const BACKWARD: &str = "backward";
/// The states where it leaves gradients begin so.
const GRADIENT: &str = "grad.";
/// Its input where gradients of parts of a batch add up: what part the rows are.
const SHARE: &str = "share";
/// Its output: the sum of the squares of the gradient.
const SQUARES: &str = "squares";

/// Number of scalars of an update.
pub(super) const SCALARS: usize = 2;
/// Which of them is the share of the weight decay.
pub(super) const DECAY: usize = 1;

/// Whether a plan trains along gradients.
pub(super) fn has_gradients(plan: &Plan) -> bool {
    plan.entry(BACKWARD).is_some()
}

/// What a gradient is taken on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Given<'a> {
    /// The rows.
    pub(super) batch: &'a Batch,
    /// A loop depth for every row, where the plan takes one.
    pub(super) depths: Option<&'a [i32]>,
    /// What layers in front of those of the plan give for the rows, where it begins behind them.
    pub(super) prefix: Option<&'a [f32]>,
}

/// The gradient of the loss on a batch, whose rows go through `backward` in parts of its number of rows. Returned are the loss, and as
/// scalars of the update the norm of the gradient and the share of the weight decay that counts: all of it. `loads` are the outputs with
/// the loads of experts.
///
/// # Errors
/// A batch that is no such parts, or a loss or norm that is not finite.
pub(super) fn descent(
    exec: &mut Executable,
    backward: EntryId,
    Given { batch, depths, prefix }: Given<'_>,
    loads: &[String],
    step: u64,
) -> Result<Probed, TrainError> {
    let [rows, _] = matrix(exec.plan(), BACKWARD, "tokens")?;
    let accumulates = input_type(exec.plan(), BACKWARD, SHARE).is_ok();
    let parts = batch.batch / rows;
    if !batch.batch.is_multiple_of(rows) || parts == 0 || (parts > 1 && !accumulates) {
        return Err(TrainError::Plan(format!(
            "found a batch of {} rows, expected {rows}{}; compile it for another batch",
            batch.batch,
            if accumulates { " or a multiple" } else { "" }
        )));
    }
    let counts = batch.weights();
    let total: f64 = counts.iter().sum();
    if accumulates {
        exec.reset_states_where(&|name| name.starts_with(GRADIENT));
    }
    let (mut losses, mut all) = (Vec::with_capacity(batch.batch), vec![]);
    for part in 0..parts {
        let at = part * rows..(part + 1) * rows;
        let cells = at.start * batch.seq..at.end * batch.seq;
        for (name, values) in [("tokens", &batch.tokens), ("seg", &batch.seg), ("labels", &batch.labels)] {
            exec.set_input(backward, name, values.get(cells.clone()).unwrap_or_default())?;
        }
        if !batch.reference.is_empty() {
            exec.set_input(backward, REFERENCE, batch.reference.get(at.clone()).unwrap_or_default())?;
        }
        if let Some(depths) = depths {
            exec.set_input(backward, DEPTH, depths.get(at.clone()).unwrap_or_default())?;
        }
        if let Some(values) = prefix {
            let width = values.len() / batch.batch;
            exec.set_input(backward, PREFIX, values.get(at.start * width..at.end * width).unwrap_or_default())?;
        }
        if accumulates {
            let share = counts[at].iter().sum::<f64>() / total.max(1.0);
            exec.set_input(backward, SHARE, &[share as f32])?;
        }
        exec.run_entry(backward)?;
        losses.extend(exec.output::<f32>(backward, "losses")?.iter().map(|&x| f64::from(x)));
        let mut found = vec![];
        for name in loads {
            found.extend(total_load(exec, backward, name)?);
        }
        match part {
            0 => all = found,
            _ => all.iter_mut().zip(found).for_each(|(sum, x)| *sum = sum.saturating_add(x)),
        }
    }
    let loss = weighted(&losses, &counts);
    let norm = exec.output::<f64>(backward, SQUARES)?.iter().sum::<f64>().sqrt();
    match [loss, norm].into_iter().find(|x| !x.is_finite()) {
        Some(bad) => Err(TrainError::Diverged { step, loss: bad }),
        None => Ok(Probed { plus: vec![], minus: vec![], c: vec![norm as f32, 1.0], loads: all, loss }),
    }
}
