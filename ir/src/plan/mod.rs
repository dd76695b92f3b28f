//! The execution plan: data only, everything a machine needs to run a model and nothing about how it was compiled.
//!
//! Buffers say where bytes lie, kernels what is computed, steps in which order. Machine code is never part of a plan.

mod crc32c;
mod memory;
#[cfg(test)]
mod tests;
mod text;
mod tree;
mod verify;

pub use memory::Memory;
pub use text::{PlanError, from_bytes, from_text, to_bytes, to_text};
pub use verify::{MAX_BYTES, MAX_LOOP, verify};

use crate::{Tensor, Type, loops::Kernel};

/// The version of the format; another one is refused.
pub const VERSION: u32 = 1;

/// A buffer of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub u32);

/// A kernel of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KernelId(pub u32);

/// Where the bytes of a buffer lie. Offsets are multiples of 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the arena that all entry points share, valid during one call.
    Arena(u64),
    /// In memory that lasts: constants and what `prepare` derives from the weights.
    Persistent(u64),
    /// The weight of that index.
    Weight(u32),
    /// The state of that index; inside a loop the copy of the running iteration.
    State(u32),
}

/// A buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct BufferDecl {
    /// Element type and shape.
    pub ty: Type,
    /// Memory.
    pub place: Place,
    /// What it holds, for people.
    pub name: String,
}

/// What a weight is to a trainer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightKind {
    /// Latent of a ternary matrix.
    Ternary,
    /// Float matrix.
    Matrix,
    /// Embedding and tied head.
    Embedding,
    /// Gains, biases, gates.
    Vector,
    /// Written by rules of its own, never perturbed: expert selection bias.
    Buffer,
    /// Memory of an optimizer; starts at zero.
    Optimizer,
    /// Codes or scales of a ternary matrix in place of its latent, see [`CODES`]; never trained.
    Packed,
}

/// Behind the name of a ternary weight `[m, n]`: its packed codes in the layout of `PackTernary`. A `*` in the name stands for an
/// index: weights of one shape stacked along a leading dimension.
pub const CODES: &str = ".codes";
/// Behind the name of a ternary weight: its scales in the layout of `BlockScales`, stacked like the codes.
pub const SCALES: &str = ".alpha";

/// Between the name of an entry point and that of a state which no other entry point shares.
pub const OWN: &str = ":";

impl WeightKind {
    /// Every kind with its stable name.
    pub const ALL: [(WeightKind, &'static str); 7] = [
        (WeightKind::Ternary, "ternary"),
        (WeightKind::Matrix, "matrix"),
        (WeightKind::Embedding, "embedding"),
        (WeightKind::Vector, "vector"),
        (WeightKind::Buffer, "buffer"),
        (WeightKind::Optimizer, "optimizer"),
        (WeightKind::Packed, "packed"),
    ];
}

/// The compile option that says how the losses of probes are compared: a name of [`Comparison::ALL`].
pub const ESTIMATOR: &str = "estimator";
/// The compile option with the numbers of a rule that goes by the agreement of gradients: lambda, least and greatest kappa, eps, both
/// betas, and where there is a gate its threshold and sharpness.
pub const AGREEMENT: &str = "agreement";
/// Weights of a dynamic quantiser begin so: `quantiser.NAME`, the scale `f32 [1]` of the ternary weight of that name, and two more.
pub const QUANTISER: &str = "quantiser.";
/// The threshold of a dynamic quantiser as a share of the scale, `f32 [1]`.
pub const QUANTISER_THRESHOLD: &str = "quantiser.threshold";
/// The threshold that its warm-up ends at, `f32 [1]`.
pub const QUANTISER_TARGET: &str = "quantiser.target";
/// The compile option that says how many steps a kept mask lasts.
pub const MASK_REFRESH: &str = "mask-refresh";

/// How the losses of the probes of a step become the scalars of its update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// Every row has two probes of its own; differences have unit spread.
    PerSequence,
    /// Two probes for each direction, each on all rows.
    TwoSided,
    /// The same, divided by the spread of all losses.
    TwoSidedScaled,
    /// One probe for each direction and one without any, each on all rows.
    OneSided,
    /// The same, divided by the spread of the losses with a direction.
    OneSidedScaled,
}

impl Comparison {
    /// Every comparison with its stable name.
    pub const ALL: [(Comparison, &'static str); 5] = [
        (Comparison::PerSequence, "per-sequence"),
        (Comparison::TwoSided, "two-sided"),
        (Comparison::TwoSidedScaled, "two-sided-scaled"),
        (Comparison::OneSided, "one-sided"),
        (Comparison::OneSidedScaled, "one-sided-scaled"),
    ];

    /// The stable name.
    pub fn name(self) -> &'static str {
        Comparison::ALL.iter().find(|(c, _)| *c == self).map_or("", |(_, name)| name)
    }
}

/// A weight: a tensor that files hold and training changes.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightDecl {
    /// Name, unique.
    pub name: String,
    /// Element type and shape in memory.
    pub ty: Type,
    /// Role in training.
    pub kind: WeightKind,
}

/// A state carried from call to call of one stream batch; zero bytes are the fresh state.
#[derive(Clone, Debug, PartialEq)]
pub struct StateDecl {
    /// Name, unique, such as `layers.5.S`.
    pub name: String,
    /// Element type and shape of one copy.
    pub ty: Type,
    /// The number of copies: one for each loop iteration.
    pub copies: u32,
}

/// One step of an entry point.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Run a kernel on buffers in the order of its arguments.
    Run {
        /// The kernel.
        kernel: KernelId,
        /// Its arguments.
        args: Vec<BufferId>,
        /// Whether the grid is worth splitting over threads.
        split: bool,
        /// Index into [`Entry::groups`].
        group: u32,
    },
    /// Copy bytes between two buffers of one type.
    Copy {
        /// From.
        from: BufferId,
        /// To.
        to: BufferId,
    },
    /// The steps up to the matching `LoopEnd` run at most `max` times; the iteration number is written to `counter` (`i32[1]`) first.
    LoopBegin {
        /// Upper bound.
        max: u32,
        /// Receives the iteration number.
        counter: BufferId,
    },
    /// Go on with the next iteration when `again` (`i32[1]`) is not zero.
    LoopEnd {
        /// The flag.
        again: BufferId,
    },
}

/// Work and memory traffic of one part of the model, once for each execution of its steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Group {
    /// Name, such as `layers.3`.
    pub name: String,
    /// Float operations.
    pub flops: u64,
    /// Ternary multiply-accumulates.
    pub ternary: u64,
    /// Bytes read and written by kernels.
    pub bytes: u64,
}

/// The lifetime of an arena buffer in one entry point: first and last step that touches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// The buffer.
    pub buffer: BufferId,
    /// First step.
    pub first: u32,
    /// Last step, inclusive.
    pub last: u32,
}

/// A way into a plan.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Entry {
    /// `loss`, `dual_loss`, `logits`, `prefill`, `decode`, `prepare`, `update`, ...
    pub name: String,
    /// What the caller fills in before the call.
    pub inputs: Vec<(String, BufferId)>,
    /// What the caller may read after the call.
    pub outputs: Vec<(String, BufferId)>,
    /// The steps.
    pub steps: Vec<Step>,
    /// Tables by layer group.
    pub groups: Vec<Group>,
    /// Lifetimes of arena buffers.
    pub lifetimes: Vec<Lifetime>,
    /// Bytes of arena this entry needs.
    pub arena: u64,
    /// The least any arena could need: the largest sum of live bytes over the steps.
    pub arena_bound: u64,
    /// For a forward pass with several probes: the operations saved because their result is the same for all probes, and the
    /// operations of as many separate forward passes (a ternary MAC counts two). Zero for other entries.
    pub shared: (u64, u64),
}

impl Entry {
    /// Visit every mention of a buffer.
    fn each_buffer(&mut self, f: &mut dyn FnMut(&mut BufferId)) {
        self.inputs.iter_mut().chain(&mut self.outputs).for_each(|(_, b)| f(b));
        self.lifetimes.iter_mut().for_each(|l| f(&mut l.buffer));
        for step in &mut self.steps {
            match step {
                Step::Run { args, .. } => args.iter_mut().for_each(&mut *f),
                Step::Copy { from, to } => [from, to].into_iter().for_each(&mut *f),
                Step::LoopBegin { counter, .. } => f(counter),
                Step::LoopEnd { again } => f(again),
            }
        }
    }
}

/// One remark of the compiler about fusion, for `inspect`.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// Entry point.
    pub entry: String,
    /// Producer and consumer with their places.
    pub edge: String,
    /// `fused` or why not.
    pub verdict: String,
    /// How many edges of this kind there are.
    pub count: u32,
}

/// A plan.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Canonical JSON of the model configuration.
    pub config: String,
    /// Compile options that shaped the plan, in order: batch, seq, estimator, ...
    pub options: Vec<(String, String)>,
    /// The name of the target the plan was made for.
    pub target: String,
    /// Weights.
    pub weights: Vec<WeightDecl>,
    /// States.
    pub states: Vec<StateDecl>,
    /// Buffers.
    pub buffers: Vec<BufferDecl>,
    /// Persistent buffers with fixed contents.
    pub constants: Vec<(BufferId, Tensor)>,
    /// Bytes of persistent memory.
    pub persistent: u64,
    /// Kernels.
    pub kernels: Vec<Kernel>,
    /// Entry points.
    pub entries: Vec<Entry>,
    /// Fusion decisions.
    pub decisions: Vec<Decision>,
}

impl Plan {
    /// The entry point of that name.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|e| e.name == name)
    }

    /// The compile option of that name.
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.iter().find(|o| o.0 == name).map(|o| o.1.as_str())
    }

    /// A buffer.
    pub fn buffer(&self, id: BufferId) -> &BufferDecl {
        &self.buffers[id.0 as usize]
    }

    /// Leave out entry points other than those that `keep` names, and the kernels and arena buffers that none of the rest uses.
    pub fn retain_entries(&mut self, keep: impl Fn(&str) -> bool) {
        self.entries.retain(|e| keep(&e.name));
        self.decisions.retain(|d| keep(&d.entry));
        let mut new: Vec<Option<KernelId>> = vec![None; self.kernels.len()];
        let mut kept = vec![];
        for step in self.entries.iter_mut().flat_map(|e| &mut e.steps) {
            if let Step::Run { kernel, .. } = step {
                *kernel = *new[kernel.0 as usize].get_or_insert_with(|| {
                    kept.push(kernel.0 as usize);
                    KernelId(kept.len() as u32 - 1)
                });
            }
        }
        let mut old: Vec<Option<Kernel>> = std::mem::take(&mut self.kernels).into_iter().map(Some).collect();
        self.kernels = kept.into_iter().filter_map(|k| old[k].take()).collect();
        let lasts = |b: &BufferDecl| !matches!(b.place, Place::Arena(_));
        let mut used: Vec<bool> = self.buffers.iter().map(lasts).collect();
        self.entries.iter_mut().for_each(|e| e.each_buffer(&mut |b| used[b.0 as usize] = true));
        let new: Vec<u32> = used
            .iter()
            .scan(0, |next, &used| {
                *next += u32::from(used);
                Some(next.wrapping_sub(1))
            })
            .collect();
        let move_to = |b: &mut BufferId| b.0 = new[b.0 as usize];
        self.entries.iter_mut().for_each(|e| e.each_buffer(&mut |b| move_to(b)));
        self.constants.iter_mut().for_each(|(b, _)| move_to(b));
        let mut used = used.into_iter();
        self.buffers.retain(|_| used.next().unwrap_or(false));
    }

    /// Bytes of arena: the largest need of any entry point.
    pub fn arena(&self) -> u64 {
        self.entries.iter().map(|e| e.arena).max().unwrap_or(0)
    }

    /// Bytes of all weights in memory.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.iter().map(|w| w.ty.bytes() as u64).sum()
    }

    /// Bytes of all states.
    pub fn state_bytes(&self) -> u64 {
        self.states.iter().map(|s| s.ty.bytes().next_multiple_of(64) as u64 * u64::from(s.copies)).sum()
    }
}
