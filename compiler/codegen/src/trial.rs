//! Kernels on data of their own, to be timed side by side: what a tuner needs and a runtime does not.
//!
//! Kernels are taken at their word that indices stay within the declared lengths, as those of a plan are.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use chimera_ir::Data;
use chimera_ir::loops::{BufDecl, Kernel, Role};
use memmap2::MmapMut;

use crate::{Allowed, CodegenError, Module, Target, compile};

/// Why kernels cannot be tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrialError {
    /// One cannot be compiled.
    Codegen(CodegenError),
    /// The contents of the arguments do not fit.
    Contents(String),
}

impl fmt::Display for TrialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TrialError::Codegen(e) => e.fmt(f),
            TrialError::Contents(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for TrialError {}

/// Zeroed pages of their own, huge ones where the system has them, as the runtime's memory is.
#[derive(Debug)]
struct Bytes(MmapMut);

/// A huge page; mappings of a multiple of it start at one.
const HUGE: usize = 2 << 20;

impl Bytes {
    fn zeros(len: usize) -> Result<Bytes, TrialError> {
        let whole = if len < HUGE { len.max(1) } else { len.next_multiple_of(HUGE) };
        let map = MmapMut::map_anon(whole);
        let map = map.map_err(|e| TrialError::Contents(format!("{len} bytes of memory cannot be had: {e}")))?;
        // Small pages are right too, only slower.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Bytes(map))
    }

    fn of(data: &Data) -> Result<Bytes, TrialError> {
        let len = data.len() * data.dtype().size();
        let mut bytes = Bytes::zeros(len)?;
        let from: *const u8 = match data {
            Data::F32(v) => v.as_ptr().cast(),
            Data::F64(v) => v.as_ptr().cast(),
            Data::BF16(v) => v.as_ptr().cast(),
            Data::I8(v) => v.as_ptr().cast(),
            Data::U8(v) => v.as_ptr(),
            Data::I16(v) => v.as_ptr().cast(),
            Data::I32(v) => v.as_ptr().cast(),
        };
        // SAFETY: the elements are plain numbers of this many bytes, and the memory was made for as many.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.start(), len) };
        Ok(bytes)
    }

    fn start(&mut self) -> *mut u8 {
        self.0.as_mut_ptr()
    }
}

/// Kernels with the same arguments, compiled.
#[derive(Debug)]
pub struct Trial {
    module: Module,
    grids: Vec<i64>,
    /// Private memory of each worker, enough for every kernel.
    scratch: Vec<Bytes>,
    /// Sets of arguments that runs take in turn; what a set lacks is that of the first.
    sets: Vec<Vec<Option<Bytes>>>,
    /// The set of the next run.
    next: usize,
}

/// The arguments of one run: a table of pointers, and private memory for each worker.
struct Run {
    args: Vec<Vec<*mut u8>>,
    scratch: Vec<*mut u8>,
}

// SAFETY: workers read the tables; what they write through the pointers is disjoint, as `Entry::call` asks.
unsafe impl Sync for Run {}

impl Trial {
    /// Compile `kernels`, which have equal arguments with these contents, for at most `threads` workers. Runs take `copies` copies of
    /// the arguments `streamed` in turn, so that these come from memory further away.
    ///
    /// # Errors
    /// When a kernel cannot be compiled, or the contents do not fit.
    pub fn new(
        kernels: &[Kernel],
        target: &Target,
        allowed: &Allowed,
        contents: &[Data],
        (streamed, copies): (&[usize], usize),
        threads: usize,
    ) -> Result<Trial, TrialError> {
        let arguments =
            |k: &Kernel| -> Vec<BufDecl> { k.bufs.iter().filter(|b| b.role != Role::Scratch).cloned().collect() };
        for k in kernels {
            let args = arguments(k);
            let fits = |(b, c): (&BufDecl, &Data)| b.len == c.len() && b.dtype == c.dtype();
            if args.len() != contents.len() || !args.iter().zip(contents).all(fits) {
                return Err(TrialError::Contents(format!(
                    "kernel {}: found contents for other arguments, expected those that it declares",
                    k.name
                )));
            }
        }
        let module = compile(kernels, target, allowed).map_err(TrialError::Codegen)?;
        let scratch = kernels.iter().map(Kernel::scratch_bytes).max().unwrap_or(0);
        let own =
            |set: usize, i: usize| (set == 0 || streamed.contains(&i)).then(|| Bytes::of(&contents[i])).transpose();
        let set = |set| (0..contents.len()).map(|i| own(set, i)).collect::<Result<Vec<_>, _>>();
        let sets = (0..copies.max(1)).map(set).collect::<Result<Vec<_>, _>>()?;
        Ok(Trial {
            module,
            grids: kernels.iter().map(|k| k.grid as i64).collect(),
            scratch: (0..threads.max(1)).map(|_| Bytes::zeros(scratch)).collect::<Result<_, _>>()?,
            sets,
            next: 0,
        })
    }

    /// The compiled kernels.
    pub fn module(&self) -> &Module {
        &self.module
    }

    /// The time that `times` runs of kernel `which` take on `threads` workers, each with an equal part of the grid: elapsed time, but
    /// the processor time of a single worker, which other work on the machine does not lengthen.
    ///
    /// # Panics
    /// When there is no such kernel or there are more workers than the trial was made for.
    pub fn time(&mut self, which: usize, threads: usize, times: usize) -> Duration {
        assert!(threads >= 1 && threads <= self.scratch.len(), "a trial has memory for the workers it was made for");
        let (entry, grid, n) = (self.module.entry(which).clone(), self.grids[which], self.sets.len());
        let starts = |set: &mut Vec<Option<Bytes>>| -> Vec<Option<*mut u8>> {
            set.iter_mut().map(|b| b.as_mut().map(Bytes::start)).collect()
        };
        let starts: Vec<_> = self.sets.iter_mut().map(starts).collect();
        let shared = |i: usize| starts[0][i].expect("the first set has all arguments");
        let own =
            |set: &Vec<Option<*mut u8>>| set.iter().enumerate().map(|(i, b)| b.unwrap_or_else(|| shared(i))).collect();
        let args = starts.iter().map(own).collect();
        let run = Run { args, scratch: self.scratch.iter_mut().map(Bytes::start).collect() };
        let (first, run) = (self.next, &run);
        self.next = (first + times) % n;
        let work = |worker: usize, at: usize| {
            let part = |w: usize| grid * w as i64 / threads as i64;
            let args = &run.args[(first + at) % n];
            // SAFETY: `new` checked that every argument has its declared length, and kernels keep their indices within it; every worker has scratch
            // memory of its own and a part of the grid of its own, whose instances are independent.
            unsafe { entry.call(args.as_ptr(), run.scratch[worker], part(worker), part(worker + 1)) };
        };
        if threads == 1 {
            let start = processor_time();
            (0..times).for_each(|at| work(0, at));
            return processor_time().saturating_sub(start);
        }
        // One more than the workers that have finished their runs so far, over all runs.
        let arrived = AtomicUsize::new(0);
        let wait = |round: usize| {
            arrived.fetch_add(1, Ordering::AcqRel);
            let mut spins = 0u32;
            while arrived.load(Ordering::Acquire) < (round + 1) * threads {
                spins += 1;
                // Where there are fewer processors than workers, spinning alone would not end.
                if spins > 1 << 12 { std::thread::yield_now() } else { std::hint::spin_loop() }
            }
        };
        let all = |worker: usize| {
            wait(0);
            let start = Instant::now();
            for at in 0..times {
                work(worker, at);
                wait(at + 1);
            }
            start.elapsed()
        };
        std::thread::scope(|scope| {
            (1..threads).for_each(|worker| {
                scope.spawn(move || all(worker));
            });
            all(0)
        })
    }
}

/// The processor time of this thread so far.
fn processor_time() -> Duration {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use chimera_ir::DType;
    use chimera_ir::loops::{Builder, Expr};

    use super::*;

    fn kernel() -> Kernel {
        let mut b = Builder::new("count");
        let x = b.buf("x", DType::I32, 64, Role::InOut);
        let g = b.grid(8);
        b.each(0, 8, |b, i| {
            let at = b.bind(&g * 8 + i);
            b.store(x, &at, Expr::load(x, &at) + chimera_ir::loops::i32c(1));
        });
        b.finish()
    }

    fn trial(contents: &[Data]) -> Result<Trial, TrialError> {
        Trial::new(&[kernel()], &crate::host(), &Allowed::all(), contents, (&[0], 2), 2)
    }

    #[test]
    fn every_run_does_the_whole_grid_on_the_next_copy() {
        let mut t = trial(&[Data::I32(vec![5; 64])]).unwrap();
        t.time(0, 1, 3);
        t.time(0, 2, 2);
        let numbers = |set: &Option<Bytes>| -> Vec<i32> {
            let bytes = &set.as_ref().expect("both sets have the argument").0[..64 * 4];
            bytes.chunks_exact(4).map(|c| i32::from_ne_bytes([c[0], c[1], c[2], c[3]])).collect()
        };
        assert_eq!(numbers(&t.sets[0][0]), vec![5 + 3; 64], "runs 0, 2 and 4");
        assert_eq!(numbers(&t.sets[1][0]), vec![5 + 2; 64], "runs 1 and 3");
    }

    #[test]
    fn contents_have_to_fit() {
        let e = trial(&[Data::I32(vec![0; 63])]).unwrap_err();
        assert!(matches!(&e, TrialError::Contents(_)), "{e}");
        let e = trial(&[Data::F32(vec![0.0; 64])]).unwrap_err().to_string();
        assert!(e.contains("count") && e.contains("declares"), "{e}");
    }
}
