//! Steps with every address resolved: what a walk over an entry point looks at.
//!
//! All addresses of all steps stand in one table, for every iteration of a loop where they differ, so that a walk computes none and
//! allocates nothing. Verification has proven that each address has the bytes that its kernel declares.

use super::memory::{Block, Element, WeightMemory};
use chimera_ir::loops::Role;
use chimera_ir::plan::{BufferId, Entry, Place, Plan, Step};

/// Where the plan's memories lie.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) arena: Block,
    pub(super) persistent: Block,
    pub(super) weights: Vec<WeightMemory>,
    pub(super) states: Vec<Block>,
}

/// Bytes from one copy of a state to the next.
pub(super) fn stride(plan: &Plan, state: usize) -> usize {
    plan.states[state].ty.bytes().next_multiple_of(64)
}

impl Memory {
    /// The block, and the first byte in it, of a buffer in the given iteration; of a weight, its memory.
    fn locate(&self, plan: &Plan, buffer: BufferId, iteration: usize) -> Result<(&Block, usize), &WeightMemory> {
        match plan.buffer(buffer).place {
            Place::Arena(at) => Ok((&self.arena, at as usize)),
            Place::Persistent(at) => Ok((&self.persistent, at as usize)),
            Place::State(i) => Ok((&self.states[i as usize], stride(plan, i as usize) * iteration)),
            Place::Weight(i) => Err(&self.weights[i as usize]),
        }
    }

    /// The address of a buffer; null of a weight without memory.
    pub(super) fn address(&self, plan: &Plan, buffer: BufferId, iteration: usize) -> *mut u8 {
        let bytes = plan.buffer(buffer).ty.bytes();
        match self.locate(plan, buffer, iteration) {
            Ok((block, at)) => block.address(at, bytes),
            Err(weight) => weight.address(bytes),
        }
    }

    /// The elements of a buffer, in the first iteration; none of a weight without memory.
    pub(super) fn slice<T: Element>(&self, plan: &Plan, buffer: BufferId) -> Option<&[T]> {
        let len = plan.buffer(buffer).ty.numel();
        match self.locate(plan, buffer, 0) {
            Ok((block, at)) => Some(block.slice(at, len)),
            Err(weight) => weight.slice(len),
        }
    }
}

/// Addresses in the table: those of iteration `i` start at `first + i * stride`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Addresses {
    first: usize,
    stride: usize,
}

/// A step with its addresses.
#[derive(Clone, Debug)]
pub(super) enum Action {
    Run {
        kernel: usize,
        args: Addresses,
        grid: i64,
        split: bool,
    },
    /// From, to.
    Copy {
        pair: Addresses,
        bytes: usize,
    },
    Begin {
        counter: Addresses,
        max: usize,
    },
    End {
        again: Addresses,
    },
}

/// The steps of one entry point, and what they do to the memory that outlives a call.
#[derive(Debug)]
pub(super) struct Flat {
    /// One for each step.
    pub(super) ops: Vec<Action>,
    /// Weights that are read, ascending.
    pub(super) reads: Vec<usize>,
    /// Weights that are written, ascending.
    pub(super) writes: Vec<usize>,
    /// Ranges of persistent memory that are read, and that are written.
    read_ranges: Vec<(u64, u64)>,
    written_ranges: Vec<(u64, u64)>,
}

impl Flat {
    /// Whether these steps read persistent memory that `other` writes.
    pub(super) fn depends_on(&self, other: &Flat) -> bool {
        let written = merged(&other.written_ranges);
        self.read_ranges.iter().any(|&(lo, hi)| {
            let after = written.partition_point(|w| w.1 <= lo);
            written.get(after).is_some_and(|w| w.0 < hi)
        })
    }
}

/// Disjoint ascending ranges that cover the same bytes.
fn merged(ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    let mut out: Vec<(u64, u64)> = vec![];
    for (lo, hi) in sorted {
        match out.last_mut() {
            Some(last) if lo <= last.1 => last.1 = last.1.max(hi),
            _ => out.push((lo, hi)),
        }
    }
    out
}

fn varies(plan: &Plan, buffers: &[BufferId]) -> bool {
    buffers.iter().any(|b| matches!(plan.buffer(*b).place, Place::State(_)))
}

/// The addresses of all steps.
#[derive(Debug, Default)]
pub(super) struct Table {
    addresses: Vec<*mut u8>,
    /// For each weight, where its address stands.
    weights: Vec<Vec<usize>>,
}

// SAFETY: the addresses belong to blocks and mapped slices that the owner of the table owns too; they are only followed while it is
// borrowed mutably.
unsafe impl Send for Table {}
// SAFETY: as above; workers of one region read the table and touch disjoint elements, see `Executable::walk`.
unsafe impl Sync for Table {}

impl Table {
    /// An empty table for so many addresses and weights.
    pub(super) fn with_capacity(n: usize, weights: usize) -> Table {
        Table { addresses: Vec::with_capacity(n), weights: vec![vec![]; weights] }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.addresses.len()
    }

    /// The addresses of one iteration.
    pub(super) fn at(&self, addresses: Addresses, iteration: usize) -> &[*mut u8] {
        &self.addresses[addresses.first + addresses.stride * iteration..]
    }

    /// A weight lies elsewhere from now on.
    pub(super) fn move_weight(&mut self, weight: usize, to: *mut u8) {
        for &at in &self.weights[weight] {
            self.addresses[at] = to;
        }
    }

    fn add(&mut self, plan: &Plan, memory: &Memory, buffers: &[BufferId], iterations: usize) -> Addresses {
        let first = self.addresses.len();
        let varies = varies(plan, buffers);
        for iteration in 0..if varies { iterations } else { 1 } {
            for &b in buffers {
                if let Place::Weight(w) = plan.buffer(b).place {
                    self.weights[w as usize].push(self.addresses.len());
                }
                self.addresses.push(memory.address(plan, b, iteration));
            }
        }
        Addresses { first, stride: if varies { buffers.len() } else { 0 } }
    }

    /// Resolve the steps of an entry point of a verified plan.
    pub(super) fn flatten(&mut self, plan: &Plan, memory: &Memory, entry: &Entry) -> Flat {
        let mut iterations = 1;
        let mut ops = Vec::with_capacity(entry.steps.len());
        let mut touched = Touched::default();
        for (_, input) in &entry.inputs {
            touched.add(plan, *input, false, true);
        }
        for step in &entry.steps {
            if let Step::LoopBegin { max, .. } = step {
                iterations = *max as usize;
            }
            let addresses = self.add(plan, memory, &step.buffers(), iterations);
            ops.push(match step {
                Step::Run { kernel, args, split, .. } => {
                    let k = &plan.kernels[kernel.0 as usize];
                    for (d, &b) in k.bufs.iter().filter(|d| d.role != Role::Scratch).zip(args) {
                        touched.add(plan, b, d.role != Role::Out, d.role != Role::In);
                    }
                    Action::Run {
                        kernel: kernel.0 as usize,
                        args: addresses,
                        grid: k.grid as i64,
                        split: *split && k.grid > 1,
                    }
                }
                Step::Copy { from, to } => {
                    touched.add(plan, *from, true, false);
                    touched.add(plan, *to, false, true);
                    Action::Copy { pair: addresses, bytes: plan.buffer(*from).ty.bytes() }
                }
                Step::LoopBegin { counter, .. } => {
                    touched.add(plan, *counter, false, true);
                    Action::Begin { counter: addresses, max: iterations }
                }
                Step::LoopEnd { again } => {
                    touched.add(plan, *again, true, false);
                    iterations = 1;
                    Action::End { again: addresses }
                }
            });
        }
        for (_, output) in &entry.outputs {
            touched.add(plan, *output, true, false);
        }
        touched.finish(ops)
    }
}

/// Collects what steps do to weights and persistent memory.
#[derive(Default)]
struct Touched {
    weights: [Vec<usize>; 2],
    ranges: [Vec<(u64, u64)>; 2],
}

impl Touched {
    fn add(&mut self, plan: &Plan, buffer: BufferId, read: bool, written: bool) {
        let b = plan.buffer(buffer);
        for (i, _) in [read, written].into_iter().enumerate().filter(|(_, on)| *on) {
            match b.place {
                Place::Weight(w) => self.weights[i].push(w as usize),
                Place::Persistent(at) => self.ranges[i].push((at, at + b.ty.bytes() as u64)),
                Place::Arena(_) | Place::State(_) => {}
            }
        }
    }

    fn finish(self, ops: Vec<Action>) -> Flat {
        let [reads, writes] = self.weights.map(|mut w| {
            w.sort_unstable();
            w.dedup();
            w
        });
        let [read_ranges, written_ranges] = self.ranges;
        Flat { ops, reads, writes, read_ranges, written_ranges }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(read_ranges: &[(u64, u64)], written_ranges: &[(u64, u64)]) -> Flat {
        let (read_ranges, written_ranges) = (read_ranges.to_vec(), written_ranges.to_vec());
        Flat { ops: vec![], reads: vec![], writes: vec![], read_ranges, written_ranges }
    }

    #[test]
    fn dependence_is_overlap_of_bytes() {
        let prepare = flat(&[], &[(128, 192), (0, 64), (300, 400), (310, 320)]);
        for (lo, hi, expected) in [
            (0, 1, true),
            (63, 64, true),
            (64, 128, false),
            (100, 129, true),
            (191, 200, true),
            (192, 300, false),
            (399, 500, true),
            (330, 340, true),
            (400, 500, false),
        ] {
            assert_eq!(flat(&[(lo, hi)], &[]).depends_on(&prepare), expected, "{lo}..{hi}");
        }
        assert!(!flat(&[], &[(0, 64)]).depends_on(&prepare));
    }
}
