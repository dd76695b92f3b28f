//! What is watched while a run goes on: whether its loss explodes, and whether memory stays within the plan's figure.
//!
//! Invariant: what the watch of the loss decides is a function of the losses alone, so that a resumed run decides alike.

/// Memory that nothing accounts for: code, stacks, buffers of files.
const SLACK: u64 = 32 << 20;

/// Whether a moving average that lies `margin` nats above its lowest has left every good place. A margin of 0 never says so.
pub(super) fn explodes(ema: f64, lowest: Option<f64>, margin: f64) -> bool {
    margin > 0.0 && lowest.is_some_and(|low| ema > low + margin)
}

/// Whether a moving average is so near its lowest that a run may go back there.
pub(super) fn is_calm(ema: Option<f64>, lowest: Option<f64>, margin: f64) -> bool {
    match (ema, lowest) {
        (Some(ema), low) => ema.is_finite() && !explodes(ema, low, margin / 2.0),
        (None, _) => true,
    }
}

/// Compares resident memory with what it was before the first step and what the plan needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct MemoryWatch {
    before: u64,
    planned: u64,
    quiet: bool,
}

impl MemoryWatch {
    /// A watch from here on: `resident` bytes now, `plan` bytes that the plan may come to use.
    pub(super) fn new(resident: u64, plan: u64) -> MemoryWatch {
        MemoryWatch { before: resident, planned: resident + plan, quiet: false }
    }

    /// Another plan takes over, which may come to use `plan` bytes.
    pub(super) fn plans(&mut self, plan: u64) {
        self.planned = self.planned.max(self.before + plan);
    }

    /// The figure that is exceeded, once.
    pub(super) fn exceeded(&mut self, resident: u64) -> Option<u64> {
        let beyond = resident > self.planned + self.planned / 16 + SLACK;
        (beyond && !std::mem::replace(&mut self.quiet, beyond)).then_some(self.planned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_explodes_relative_to_its_lowest() {
        assert!(!explodes(9.0, None, 2.0), "there is nothing to compare the first loss with");
        assert!(!explodes(4.9, Some(3.0), 2.0) && explodes(5.1, Some(3.0), 2.0));
        assert!(!explodes(1e9, Some(3.0), 0.0), "a margin of 0 never says so");
        assert!(is_calm(None, None, 2.0) && is_calm(Some(3.9), Some(3.0), 2.0) && !is_calm(Some(4.1), Some(3.0), 2.0));
        assert!(!is_calm(Some(f64::NAN), Some(3.0), 2.0));
    }

    #[test]
    fn memory_is_reported_once() {
        let mut watch = MemoryWatch::new(100 << 20, 60 << 20);
        assert_eq!(watch.exceeded(160 << 20), None);
        assert_eq!(watch.exceeded(300 << 20), Some(160 << 20));
        assert_eq!(watch.exceeded(400 << 20), None);
        let mut watch = MemoryWatch::new(100 << 20, 60 << 20);
        watch.plans(20 << 20);
        assert_eq!(watch.exceeded(160 << 20), None);
        watch.plans(200 << 20);
        assert_eq!((watch.exceeded(300 << 20), watch.exceeded(500 << 20)), (None, Some(300 << 20)));
    }
}
