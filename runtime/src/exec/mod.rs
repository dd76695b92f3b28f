//! Plan execution: memory, compiled kernels and the walk over the steps of an entry point.
//!
//! Invariant: `plan::verify` has proven that every buffer lies inside its memory and is at least as large as the kernels that use
//! it declare; all addresses here follow from that. Running allocates nothing, and the result does not depend on the number of
//! threads, because the instances of a grid are independent.

mod access;
mod error;
mod memory;
mod program;
mod region;
mod shares;
#[cfg(test)]
mod tests;
mod trace;
mod walk;
mod work;

pub use error::ExecError;
pub use memory::Element;
pub use trace::{KernelTime, Roofline, Trace};
pub use walk::StepTime;
pub use work::{Work, work};

use crate::affinity::available_threads;
use crate::pool::Pool;
use chimera_codegen::{Allowed, Module, Target, compile_with, host};
use chimera_ir::plan::{self, Place, Plan, Step, WeightKind};
use memory::{Block, WeightMemory, bytes_of};
use program::{Flat, Memory, Table};
use region::Regions;
use shares::Shares;
use std::path::PathBuf;

/// The entry point that derives persistent memory from the weights.
pub const PREPARE: &str = "prepare";

/// What memory is for, in errors.
const WEIGHTS: &str = "the weights";

/// How a plan is executed.
#[derive(Clone, Debug)]
pub struct ExecOptions {
    /// Threads, the caller included; at least 1.
    pub threads: usize,
    /// Emitters that may serve kernels.
    pub emitters: Allowed,
    /// The machine to compile for; must run on this one.
    pub target: Target,
    /// The most bytes of memory to allocate.
    pub max_bytes: u64,
    /// The folder where machine code is kept for the next run; none is kept when absent.
    pub code_cache: Option<PathBuf>,
    /// Whether each thread stays on a core of its own and does its own range of every grid, with no help for others.
    pub pinned: bool,
}

impl Default for ExecOptions {
    /// All threads that may run at once, all emitters, this machine, no limit, no cache.
    fn default() -> ExecOptions {
        ExecOptions {
            threads: available_threads(),
            emitters: Allowed::all(),
            target: host(),
            max_bytes: u64::MAX,
            code_cache: None,
            pinned: false,
        }
    }
}

/// An entry point of one [`Executable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EntryId(usize);

/// What names an entry point: its id, or its name at the cost of a search.
pub trait EntryKey {
    /// The id in `exec`.
    ///
    /// # Errors
    /// When there is no such entry point.
    fn of(self, exec: &Executable) -> Result<EntryId, ExecError>;
}

impl EntryKey for EntryId {
    fn of(self, _: &Executable) -> Result<EntryId, ExecError> {
        Ok(self)
    }
}

impl EntryKey for &str {
    fn of(self, exec: &Executable) -> Result<EntryId, ExecError> {
        exec.entry(self)
    }
}

/// The value of an input, kept from call to call.
#[derive(Debug)]
struct Input {
    value: Block,
    set: bool,
}

/// A plan with memory, machine code and threads.
///
/// Weights start unset and must be set or bound before an entry point reads them, except those of optimizers, which start at zero. A
/// weight that no entry point writes has no memory before it has values, and may stay where it is, see [`Executable::bind_weight`].
/// States start at zero. Inputs keep their values from call to call; outputs are there until another entry point runs.
///
/// What the entry point [`PREPARE`] derives from weights is kept current: when a weight that it reads has changed, by
/// [`Executable::set_weight`] or because an entry point wrote it, `prepare` runs again before the next entry point that reads what
/// it derives.
#[derive(Debug)]
pub struct Executable {
    plan: Plan,
    module: Module,
    pool: Pool,
    memory: Memory,
    table: Table,
    /// One for each entry point, like the following.
    entries: Vec<Flat>,
    inputs: Vec<Vec<Input>>,
    /// Whether the entry point reads what `prepare` writes.
    prepared: Vec<bool>,
    prepare: Option<EntryId>,
    /// Whether what `prepare` derives disagrees with the weights.
    stale: bool,
    /// Weights that have values.
    weight_set: Vec<bool>,
    /// The entry point whose values are in the arena.
    live: Option<EntryId>,
    /// One region of `scratch_stride` bytes for each worker.
    scratch: Block,
    scratch_stride: usize,
    shares: Shares,
    /// Where weights that are given values later find memory.
    regions: Regions,
    bytes: u64,
    max_bytes: u64,
    /// What a trace has recorded so far.
    trace: Option<Box<Trace>>,
}

impl Executable {
    /// Verify a plan, compile its kernels, allocate its memory and write its constants.
    ///
    /// # Errors
    /// A plan that contradicts itself, a kernel that no allowed emitter serves, memory beyond the limit or the system's, or threads that
    /// do not start.
    pub fn new(plan: Plan, options: &ExecOptions) -> Result<Executable, ExecError> {
        plan::verify(&plan)?;
        let threads = options.threads.max(1);
        let scratch_stride = plan.scratch_stride();
        let eager = with_memory(&plan);
        let weight_bytes = |i: &usize| plan.weights[*i].ty.bytes() as u64;
        let weights = (0..plan.weights.len()).filter(|&i| eager[i]).map(|i| weight_bytes(&i)).sum();
        let needs = plan::Memory { weights, ..plan.memory(threads) };
        let mut bytes = 0u64;
        for (what, needed) in needs.parts() {
            bytes = bytes.saturating_add(needed);
            if bytes > options.max_bytes {
                let allowed = Some(needed.saturating_sub(bytes - options.max_bytes));
                return Err(ExecError::Memory { what, needed, allowed });
            }
        }
        let cache = options.code_cache.as_deref();
        let module = compile_with(&plan.kernels, &options.target, &options.emitters, cache);
        let module = module.map_err(ExecError::Compile)?;
        let pool = if options.pinned { Pool::pinned(threads) } else { Pool::new(threads) };
        let pool = pool.map_err(ExecError::Threads)?;
        let sizes = (0..plan.weights.len()).filter(|&i| eager[i]).map(|i| weight_bytes(&i));
        let state_bytes = |s: usize| program::stride(&plan, s) as u64 * u64::from(plan.states[s].copies);
        let scratch_bytes = needs.scratch;
        let inputs = plan.entries.iter().flat_map(|e| &e.inputs).map(|i| plan.buffer(i.1).ty.bytes() as u64);
        let sizes = sizes.chain((0..plan.states.len()).map(state_bytes)).chain(inputs).chain([
            plan.arena(),
            plan.persistent,
            scratch_bytes,
        ]);
        let mut regions = Regions::with_room(sizes.map(|n| n.max(1))).ok_or(ExecError::Memory {
            what: "all memory",
            needed: bytes,
            allowed: None,
        })?;
        let mut block =
            |what, needed| Block::zeroed(&mut regions, needed).ok_or(ExecError::Memory { what, needed, allowed: None });
        let mut weight = |i: usize| match eager[i] {
            true => Ok(WeightMemory::Own(block("a weight", weight_bytes(&i))?)),
            false => Ok(WeightMemory::Unset),
        };
        let weights = (0..plan.weights.len()).map(&mut weight).collect::<Result<_, ExecError>>()?;
        let mut memory = Memory {
            arena: block("the arena", plan.arena())?,
            persistent: block("persistent memory", plan.persistent)?,
            weights,
            states: (0..plan.states.len()).map(|s| block("a state", state_bytes(s))).collect::<Result<_, _>>()?,
        };
        write_constants(&plan, &mut memory);
        let mut table = Table::with_capacity(plan.addresses() as usize, plan.weights.len());
        let entries: Vec<Flat> = plan.entries.iter().map(|e| table.flatten(&plan, &memory, e)).collect();
        let mut input = |i: &(String, plan::BufferId)| {
            Ok(Input { value: block("an input", plan.buffer(i.1).ty.bytes() as u64)?, set: false })
        };
        let inputs =
            plan.entries.iter().map(|e| e.inputs.iter().map(&mut input).collect()).collect::<Result<_, ExecError>>()?;
        let prepare = plan.entries.iter().position(|e| e.name == PREPARE);
        let depends = |e: &Flat| prepare.is_some_and(|p| e.depends_on(&entries[p]));
        let mut prepared: Vec<bool> = entries.iter().map(depends).collect();
        if let Some(p) = prepare {
            prepared[p] = false;
        }
        let weight_set = plan.weights.iter().map(|w| w.kind == WeightKind::Optimizer).collect();
        let scratch = block("scratch memory", scratch_bytes)?;
        Ok(Executable {
            prepare: prepare.map(EntryId),
            stale: true,
            live: None,
            plan,
            module,
            pool,
            memory,
            table,
            entries,
            inputs,
            prepared,
            weight_set,
            scratch,
            scratch_stride,
            shares: Shares::new(threads, !options.pinned),
            regions,
            bytes,
            max_bytes: options.max_bytes,
            trace: None,
        })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The compiled kernels, in the order of the plan.
    pub fn module(&self) -> &Module {
        &self.module
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Bytes of memory that are allocated, machine code and the plan itself excluded; weights count from when they have values, and
    /// only those that were copied, see [`Executable::mapped_bytes`].
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of weights that stay where they were bound: in mapped files, which the system reads when they are used and may drop again.
    pub fn mapped_bytes(&self) -> u64 {
        let mapped = |w: &WeightMemory| match w {
            WeightMemory::Mapped(slice) => slice.len() as u64,
            WeightMemory::Unset | WeightMemory::Own(_) => 0,
        };
        self.memory.weights.iter().map(mapped).sum()
    }
}

/// The weights that have memory from the beginning: those of optimizers, which start at zero, and those that a step writes.
fn with_memory(plan: &Plan) -> Vec<bool> {
    use chimera_ir::loops::Role;
    let mut out: Vec<bool> = plan.weights.iter().map(|w| w.kind == WeightKind::Optimizer).collect();
    let mut written = |b: plan::BufferId| {
        if let Place::Weight(w) = plan.buffer(b).place {
            out[w as usize] = true;
        }
    };
    for entry in &plan.entries {
        entry.inputs.iter().for_each(|i| written(i.1));
        for step in &entry.steps {
            match step {
                Step::Run { kernel, args, .. } => {
                    let bufs = plan.kernels[kernel.0 as usize].bufs.iter().filter(|d| d.role != Role::Scratch);
                    bufs.zip(args).filter(|(d, _)| d.role != Role::In).for_each(|(_, &b)| written(b));
                }
                Step::Copy { to, .. } => written(*to),
                Step::LoopBegin { counter, .. } => written(*counter),
                Step::LoopEnd { .. } => {}
            }
        }
    }
    out
}

fn write_constants(plan: &Plan, memory: &mut Memory) {
    use chimera_ir::Data;
    for (buffer, tensor) in &plan.constants {
        let bytes = match &tensor.data {
            Data::F32(v) => bytes_of(v),
            Data::F64(v) => bytes_of(v),
            // The bits of a `bf16` stored as they are.
            Data::BF16(v) => bytes_of(half::slice::HalfBitsSliceExt::reinterpret_cast::<half::bf16>(&v[..])),
            Data::I8(v) => bytes_of(v),
            Data::U8(v) => bytes_of(v),
            Data::I16(v) => bytes_of(v),
            Data::I32(v) => bytes_of(v),
        };
        // Verification has proven that constants are persistent and have the size of their buffer.
        if let Place::Persistent(at) = plan.buffer(*buffer).place {
            memory.persistent.slice_mut(at as usize, bytes.len()).copy_from_slice(bytes);
        }
    }
}
