//! What memory a plan takes when it runs, to the byte.
//!
//! Executors allocate exactly this, so that a figure that was computed at compile time is the one that is found at run time.

use super::{BufferId, Place, Plan, Step};

/// Bytes by purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The arena that all entry points share.
    pub arena: u64,
    /// Constants, inputs inside the plan, and what is derived from the weights.
    pub persistent: u64,
    /// Weights, the memory of the optimiser among them.
    pub weights: u64,
    /// States, gradients among them.
    pub states: u64,
    /// Scratch memory of all threads.
    pub scratch: u64,
    /// Values of the inputs, kept from call to call.
    pub inputs: u64,
    /// The table of the addresses of all steps.
    pub table: u64,
}

impl Memory {
    /// Every part with what it is for, in the order in which limits are checked.
    pub fn parts(&self) -> [(&'static str, u64); 7] {
        [
            ("the arena", self.arena),
            ("persistent memory", self.persistent),
            ("the weights", self.weights),
            ("the states", self.states),
            ("scratch memory", self.scratch),
            ("the inputs", self.inputs),
            ("the table of addresses", self.table),
        ]
    }

    /// All bytes.
    pub fn total(&self) -> u64 {
        self.parts().iter().fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }
}

/// Regions of two threads never share a cache line, nor the pair that a prefetcher fetches.
const APART: usize = 128;

impl Plan {
    /// The memory of the plan on so many threads, when all weights have been copied into it.
    pub fn memory(&self, threads: usize) -> Memory {
        let bytes =
            |list: &[(String, BufferId)]| -> u64 { list.iter().map(|i| self.buffer(i.1).ty.bytes() as u64).sum() };
        Memory {
            arena: self.arena(),
            persistent: self.persistent,
            weights: self.weight_bytes(),
            states: self.state_bytes(),
            scratch: self.scratch_stride() as u64 * threads as u64,
            inputs: self.entries.iter().map(|e| bytes(&e.inputs)).fold(0, u64::saturating_add),
            table: self.addresses().saturating_mul(8),
        }
    }

    /// Bytes of scratch memory of one thread.
    pub fn scratch_stride(&self) -> usize {
        self.kernels.iter().map(|k| k.scratch_bytes()).max().unwrap_or(0).next_multiple_of(APART)
    }

    /// The number of addresses of all steps; those of a step that reads a state count for every iteration of a loop.
    pub fn addresses(&self) -> u64 {
        let mut total = 0u64;
        for entry in &self.entries {
            let mut iterations = 1u64;
            for step in &entry.steps {
                if let Step::LoopBegin { max, .. } = step {
                    iterations = u64::from(*max);
                }
                let buffers = step.buffers();
                let varies = buffers.iter().any(|b| matches!(self.buffer(*b).place, Place::State(_)));
                let copies = if varies { iterations } else { 1 };
                total = total.saturating_add((buffers.len() as u64).saturating_mul(copies));
                if let Step::LoopEnd { .. } = step {
                    iterations = 1;
                }
            }
        }
        total
    }
}

impl Step {
    /// The buffers of a step in the order of its addresses.
    pub fn buffers(&self) -> Vec<BufferId> {
        match self {
            Step::Run { args, .. } => args.clone(),
            Step::Copy { from, to } => vec![*from, *to],
            Step::LoopBegin { counter, .. } => vec![*counter],
            Step::LoopEnd { again } => vec![*again],
        }
    }
}
