//! How many ternary codes an update changes.
//!
//! Invariant: codes are compared as `prepare` leaves them for the forward passes, two bits each; what fills up their blocks never
//! changes.

use super::TrainError;
use crate::exec::{Executable, PREPARE};
use chimera_ir::DType;
use chimera_ir::plan::{Place, Plan, WeightKind};

/// The packed codes of a plan before an update.
#[derive(Debug)]
pub(super) struct Codes {
    /// Outputs of `prepare`.
    names: Vec<String>,
    before: Vec<u8>,
    /// Ternary weights.
    weights: u64,
}

impl Codes {
    /// Memory for the codes that `prepare` derives from the ternary weights of a plan; none where it derives none.
    pub(super) fn of(plan: &Plan) -> Option<Codes> {
        let prepare = plan.entry(PREPARE)?;
        let packed = |port: &&(String, _)| {
            let buffer = plan.buffer(port.1);
            buffer.ty.dtype == DType::U8 && matches!(buffer.place, Place::Persistent(_))
        };
        let ports: Vec<_> = prepare.outputs.iter().filter(packed).collect();
        let bytes = ports.iter().map(|port| plan.buffer(port.1).ty.bytes()).sum();
        let ternary = plan.weights.iter().filter(|w| w.kind == WeightKind::Ternary);
        let weights = ternary.map(|w| w.ty.numel() as u64).sum();
        let names = ports.into_iter().map(|port| port.0.clone()).collect();
        (bytes > 0 && weights > 0).then(|| Codes { names, before: vec![0; bytes], weights })
    }

    /// Keeps the codes of the weights as they are.
    ///
    /// # Errors
    /// When execution fails.
    pub(super) fn keep(&mut self, exec: &mut Executable) -> Result<(), TrainError> {
        exec.prepare()?;
        let mut rest = &mut self.before[..];
        for name in &self.names {
            let now = exec.output::<u8>(PREPARE, name)?;
            let (here, others) = rest.split_at_mut(now.len());
            here.copy_from_slice(now);
            rest = others;
        }
        Ok(())
    }

    /// The share of the ternary weights whose codes are others than those that were kept.
    ///
    /// # Errors
    /// When execution fails.
    pub(super) fn changed(&self, exec: &mut Executable) -> Result<f64, TrainError> {
        exec.prepare()?;
        let (mut rest, mut n) = (&self.before[..], 0);
        for name in &self.names {
            let now = exec.output::<u8>(PREPARE, name)?;
            let (here, others) = rest.split_at(now.len());
            n += different(here, now);
            rest = others;
        }
        Ok(n as f64 / self.weights as f64)
    }
}

/// Pairs of bits that differ.
fn different(a: &[u8], b: &[u8]) -> u64 {
    let pairs = |x: u64| u64::from(((x | x >> 1) & 0x5555_5555_5555_5555).count_ones());
    let word = |bytes: &[u8]| bytes.iter().fold(0, |word, &byte| word << 8 | u64::from(byte));
    a.chunks(8).zip(b.chunks(8)).map(|(a, b)| pairs(word(a) ^ word(b))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_two_bits() {
        let a: Vec<u8> = (0..29).map(|i| i * 37).collect();
        let mut b = a.clone();
        assert_eq!(different(&a, &b), 0);
        b[0] ^= 0b11;
        b[9] ^= 0b1001;
        b[28] ^= 0b1000_0000;
        assert_eq!(different(&a, &b), 4);
    }
}
