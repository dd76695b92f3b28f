//! From kernels to callable code: choice of emitters, parallel emission, placement.
//!
//! The result for one kernel does not depend on the other kernels or on the number of threads.

use std::borrow::Borrow;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use chimera_ir::loops::{Kernel, KernelError, verify};
use rayon::prelude::*;

use crate::cache::{self, Key};
use crate::interp::Interpreted;
use crate::memory::CodeMemory;
use crate::{Allowed, Code, Refusal, Target, emitters, host, portable};

/// Why kernels could not be compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CodegenError {
    /// A kernel breaks a rule of the kernel IR.
    Kernel(KernelError),
    /// No allowed emitter serves a kernel.
    Refused {
        /// Name of the kernel.
        kernel: String,
        /// The target.
        target: Target,
        /// Emitters and their reasons.
        refusals: Vec<(&'static str, Refusal)>,
    },
    /// No emitter has this name.
    UnknownEmitter {
        /// The name.
        found: String,
    },
    /// The code would not run on this machine.
    Foreign {
        /// The target.
        target: Target,
    },
    /// The system gave no executable memory.
    Memory(String),
}

impl fmt::Display for CodegenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CodegenError::Kernel(e) => e.fmt(f),
            CodegenError::Refused { kernel, target, refusals } => {
                write!(f, "no allowed emitter serves kernel {kernel:?} on {target}")?;
                refusals.iter().try_for_each(|(name, why)| write!(f, "; {name}: {why}"))
            }
            CodegenError::UnknownEmitter { found } => {
                write!(f, "emitter {found:?} is unknown: expected a comma-separated list of")?;
                emitters().iter().try_for_each(|e| write!(f, " {}", e.name()))
            }
            CodegenError::Foreign { target } => {
                write!(f, "code for {target} does not run on this machine, which is {}", host())
            }
            CodegenError::Memory(e) => write!(f, "no executable memory: {e}"),
        }
    }
}

impl std::error::Error for CodegenError {}

#[cfg(target_arch = "x86_64")]
type MachineEntry = unsafe extern "sysv64" fn(*const *mut u8, *mut u8, i64, i64);
#[cfg(not(target_arch = "x86_64"))]
type MachineEntry = unsafe extern "C" fn(*const *mut u8, *mut u8, i64, i64);

/// A compiled kernel, callable. Clones share the code.
#[derive(Clone, Debug)]
pub struct Entry(Callable);

#[derive(Clone, Debug)]
enum Callable {
    Machine(MachineEntry, #[expect(dead_code, reason = "keeps the code alive")] Arc<CodeMemory>),
    Interpreted(Arc<Interpreted>),
}

impl Entry {
    /// Run the grid instances `lo .. hi`. Machine code allocates nothing.
    ///
    /// # Safety
    /// * `args` points to one pointer for every buffer that is not scratch, in order, each to at least the declared number of elements.
    /// * `scratch` points to `kernel.scratch_bytes()` bytes, aligned to 64, that nobody else uses during the call. Scratch buffers lie
    ///   there in order, each at a multiple of 64.
    /// * During the call nobody else writes what these instances read or write, or reads what they write.
    /// * `0 <= lo` and `hi <= kernel.grid`, and the indices that the kernel computes stay within the declared lengths.
    pub unsafe fn call(&self, args: *const *mut u8, scratch: *mut u8, lo: i64, hi: i64) {
        match &self.0 {
            // SAFETY: the code was emitted for this signature and is kept alive by the second field; the rest is the caller's promise.
            Callable::Machine(f, _) => unsafe { f(args, scratch, lo, hi) },
            // SAFETY: the caller's promise.
            Callable::Interpreted(k) => unsafe { k.call(args, scratch, lo, hi) },
        }
    }
}

/// One kernel of a [`Module`].
#[derive(Clone, Debug)]
pub struct Compiled {
    /// Name of the emitter that serves the kernel.
    pub emitter: &'static str,
    /// More specific emitters and why they do not.
    pub refusals: Vec<(&'static str, Refusal)>,
    /// Size of the machine code; 0 when interpreted.
    pub code_bytes: usize,
    /// The code.
    pub entry: Entry,
}

/// Compiled kernels, in the order in which they were given.
#[derive(Clone, Debug)]
pub struct Module {
    /// The target of the machine code.
    pub target: Target,
    /// One for every kernel.
    pub kernels: Vec<Compiled>,
    /// Whether the code was emitted by an earlier run.
    pub cached: bool,
}

impl Module {
    /// The code of kernel `n`.
    pub fn entry(&self, n: usize) -> &Entry {
        &self.kernels[n].entry
    }
}

pub(crate) struct Emitted {
    pub(crate) emitter: &'static str,
    pub(crate) refusals: Vec<(&'static str, Refusal)>,
    pub(crate) code: Code,
}

/// Code from the first allowed emitter that serves the kernel.
pub(crate) fn emit(kernel: &Kernel, target: &Target, allowed: Allowed) -> Result<Emitted, CodegenError> {
    verify(kernel).map_err(CodegenError::Kernel)?;
    let mut refusals = vec![];
    for emitter in allowed.emitters() {
        match emitter.accepts(kernel, target).and_then(|()| emitter.emit(kernel, target)) {
            Ok(code) => return Ok(Emitted { emitter: emitter.name(), refusals, code }),
            Err(why) => refusals.push((emitter.name(), why)),
        }
    }
    Err(CodegenError::Refused { kernel: kernel.name.clone(), target: *target, refusals })
}

/// Compile kernels for `target`, each with the first allowed emitter that serves it, on all cores.
///
/// # Errors
/// A kernel that is ill-formed or that no allowed emitter serves, a target that this machine cannot execute, or no memory.
pub fn compile<K: Borrow<Kernel> + Sync>(
    kernels: &[K],
    target: &Target,
    allowed: &Allowed,
) -> Result<Module, CodegenError> {
    compile_with(kernels, target, allowed, None)
}

/// As [`compile`], but code that an earlier run left in the folder `cache` is not emitted again, and new code is left there. The folder
/// may be deleted at any time; one that cannot be used, or whose files are damaged, costs time only.
///
/// # Errors
/// As for [`compile`].
pub fn compile_with<K: Borrow<Kernel> + Sync>(
    kernels: &[K],
    target: &Target,
    allowed: &Allowed,
    cache: Option<&Path>,
) -> Result<Module, CodegenError> {
    if !target.runs_on(&host()) {
        return Err(CodegenError::Foreign { target: *target });
    }
    let cache = cache.and_then(|folder| Some((folder, Key::of(kernels, target, *allowed)?)));
    let known = cache.and_then(|(folder, key)| cache::load(folder, key, kernels.len()));
    let cached = known.is_some();
    let emitted = match known {
        Some(emitted) => emitted,
        None => kernels.par_iter().map(|k| emit(k.borrow(), target, *allowed)).collect::<Result<Vec<_>, _>>()?,
    };
    if let Some((folder, key)) = cache.filter(|_| !cached) {
        // Without an entry the next run emits the code again.
        let _ = cache::store(folder, key, &emitted);
    }
    let machine: Vec<&[u8]> = emitted
        .iter()
        .filter_map(|e| match &e.code {
            Code::Machine(bytes) => Some(&bytes[..]),
            Code::Interpreted => None,
        })
        .collect();
    let memory = match machine[..] {
        [] => None,
        _ => Some(Arc::new(CodeMemory::place(portable::isa(target), &machine).map_err(CodegenError::Memory)?)),
    };
    let mut placed = 0;
    let finish = |(e, k): (&Emitted, &K)| {
        let (code_bytes, callable) = match (&e.code, &memory) {
            (Code::Machine(bytes), Some(memory)) => {
                placed += 1;
                // SAFETY: the memory holds at this address code that an emitter made for exactly this signature.
                let f = unsafe { std::mem::transmute::<*const u8, MachineEntry>(memory.entry(placed - 1)) };
                (bytes.len(), Callable::Machine(f, memory.clone()))
            }
            _ => (0, Callable::Interpreted(Arc::new(Interpreted::new(k.borrow())))),
        };
        Compiled { emitter: e.emitter, refusals: e.refusals.clone(), code_bytes, entry: Entry(callable) }
    };
    let kernels = emitted.iter().zip(kernels).map(finish).collect();
    Ok(Module { target: *target, kernels, cached })
}
