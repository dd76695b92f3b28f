//! States that a training entry point carries from step to step (semantics 12.4), in checkpoints.
//!
//! Invariant: what the next step continues is in the checkpoint, so that a resumed run has the bits of an uninterrupted one.

use super::TrainError;
use super::backprop::BACKWARD;
use super::weights::{STATE, WeightFile};
use crate::exec::Executable;
use chimera_ir::plan::OWN;

/// Bytes of a word.
const WORD: usize = 4;

/// Whether a state belongs to an entry point alone.
pub(super) fn belongs(state: &str, entry: &str) -> bool {
    state.strip_prefix(entry).is_some_and(|rest| rest.starts_with(OWN))
}

/// Names of states in checkpoints, `state.NAME.COPY`, with name and copy in the plan.
fn named(exec: &Executable) -> Vec<(String, String, usize)> {
    let own = exec.plan().states.iter().filter(|s| belongs(&s.name, BACKWARD));
    own.flat_map(|s| (0..s.copies as usize).map(|copy| (format!("{STATE}{}.{copy}", s.name), s.name.clone(), copy)))
        .collect()
}

/// The carried states with their names in checkpoints, filled up to whole words.
pub(super) fn states(exec: &Executable) -> Result<Vec<(String, Vec<u8>)>, TrainError> {
    let read = |(full, name, copy): (String, String, usize)| {
        let mut bytes = exec.state(&name, copy)?.to_vec();
        bytes.resize(bytes.len().next_multiple_of(WORD), 0);
        Ok((full, bytes))
    };
    named(exec).into_iter().map(read).collect()
}

/// Sets the carried states from a checkpoint; those that it does not have are fresh.
///
/// # Errors
/// Damage, or a state of another size.
pub(super) fn restore(file: &WeightFile, exec: &mut Executable) -> Result<(), TrainError> {
    exec.reset_states_where(&|name| belongs(name, BACKWARD));
    for (full, name, copy) in named(exec) {
        let Some(bytes) = file.words(&full)? else { continue };
        let wanted = exec.state(&name, copy)?.len();
        if bytes.len() != wanted.next_multiple_of(WORD) {
            let reason =
                format!("the state `{full}` has {} bytes, expected {wanted}; use the options of the run", bytes.len());
            return Err(TrainError::Checkpoint { path: file.path().to_path_buf(), reason });
        }
        exec.set_state(&name, copy, &bytes[..wanted])?;
    }
    Ok(())
}
