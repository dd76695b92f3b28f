//! The walk over the steps of an entry point.
//!
//! A split grid is cut into contiguous ranges, one for each worker, the same ones every time; who is done helps others, see `shares`.

use super::program::Action;
use super::trace::Trace;
use super::{EntryId, EntryKey, ExecError, Executable};
use std::time::{Duration, Instant};

/// What one execution of one step took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepTime {
    /// Index into the steps of the entry point.
    pub step: usize,
    /// Iteration of the loop around it; 0 outside of loops.
    pub iteration: usize,
    /// Wall time.
    pub time: Duration,
}

impl Executable {
    /// Run an entry point, by id or name; `prepare` runs before it where needed. Allocates nothing unless it fails.
    ///
    /// # Errors
    /// No such entry point, or weights or inputs that it reads were never set.
    pub fn run(&mut self, entry: impl EntryKey) -> Result<(), ExecError> {
        self.run_entry(entry.of(self)?)
    }

    /// [`Executable::run`] of an id.
    ///
    /// # Errors
    /// Weights or inputs that it reads were never set.
    pub fn run_entry(&mut self, entry: EntryId) -> Result<(), ExecError> {
        self.run_observed(entry, &mut |_, _, _| {})
    }

    /// [`Executable::run`], with the time of every executed step in order.
    ///
    /// # Errors
    /// As [`Executable::run`].
    pub fn run_traced(&mut self, entry: impl EntryKey) -> Result<Vec<StepTime>, ExecError> {
        let entry = entry.of(self)?;
        self.ready(entry)?;
        let mut times = vec![];
        let mut last = Instant::now();
        self.run_observed(entry, &mut |step, iteration, begin| {
            let now = Instant::now();
            if !begin {
                times.push(StepTime { step, iteration, time: now - last });
            }
            last = now;
        })?;
        Ok(times)
    }

    /// Run `prepare` if the plan has it and it is not current.
    ///
    /// # Errors
    /// As [`Executable::run`].
    pub fn prepare(&mut self) -> Result<(), ExecError> {
        match self.prepare {
            Some(prepare) if self.stale => self.run_entry(prepare),
            _ => Ok(()),
        }
    }

    /// Check weights and inputs, and make what `prepare` derives current if this entry point reads it.
    fn ready(&mut self, entry: EntryId) -> Result<(), ExecError> {
        if self.stale && self.prepared[entry.0] {
            self.prepare()?;
        }
        let (e, flat) = (&self.plan.entries[entry.0], &self.entries[entry.0]);
        if flat.reads.iter().any(|&w| !self.weight_set[w]) {
            let missing = flat.reads.iter().filter(|&&w| !self.weight_set[w]);
            let names = missing.map(|&w| self.plan.weights[w].name.clone()).collect();
            return Err(ExecError::MissingWeights { entry: e.name.clone(), names });
        }
        if self.inputs[entry.0].iter().any(|i| !i.set) {
            let missing = e.inputs.iter().zip(&self.inputs[entry.0]).filter(|(_, i)| !i.set);
            let names = missing.map(|((name, _), _)| name.clone()).collect();
            return Err(ExecError::MissingInputs { entry: e.name.clone(), names });
        }
        Ok(())
    }

    fn run_observed(&mut self, entry: EntryId, observe: &mut dyn FnMut(usize, usize, bool)) -> Result<(), ExecError> {
        self.ready(entry)?;
        self.live = Some(entry);
        for ((_, buffer), input) in self.plan.entries[entry.0].inputs.iter().zip(&self.inputs[entry.0]) {
            let bytes = self.plan.buffer(*buffer).ty.bytes();
            let (from, to) = (input.value.address(0, bytes), self.memory.address(&self.plan, *buffer, 0));
            // SAFETY: both addresses have `bytes` bytes and belong to different allocations; `self` is borrowed mutably.
            unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
        }
        let mut trace = self.trace.take();
        if let Some(trace) = &mut trace {
            trace.begin(entry);
        }
        self.walk(entry, trace.as_deref_mut(), observe);
        if let Some(trace) = &mut trace {
            trace.end();
        }
        self.trace = trace;
        if Some(entry) == self.prepare {
            self.stale = false;
        }
        for &w in &self.entries[entry.0].writes {
            self.weight_set[w] = true;
        }
        self.weights_changed(entry);
        Ok(())
    }

    fn weights_changed(&mut self, entry: EntryId) {
        if let Some(prepare) = self.prepare {
            let read = &self.entries[prepare.0].reads;
            self.stale |= self.entries[entry.0].writes.iter().any(|w| read.binary_search(w).is_ok());
        }
    }

    /// Execute the steps. `observe` hears of the begin (`true`) of the walk and of the end of every step.
    fn walk(&mut self, entry: EntryId, mut trace: Option<&mut Trace>, observe: &mut dyn FnMut(usize, usize, bool)) {
        let ops = &self.entries[entry.0].ops;
        // The first step of the open loop, its bound and the addresses of its counter.
        let mut open = None;
        let (mut at, mut iteration) = (0, 0);
        observe(0, 0, true);
        while let Some(op) = ops.get(at) {
            let mut next = at + 1;
            let ended = iteration;
            let begin = trace.as_ref().map_or(Duration::ZERO, |t| t.now());
            match *op {
                Action::Run { kernel, args, grid, split } => {
                    let args = Args(self.table.at(args, iteration).as_ptr());
                    match trace.as_deref() {
                        None => self.run_kernel(kernel, args, grid, split, |_, call| {
                            call();
                        }),
                        Some(t) => self.run_kernel(kernel, args, grid, split, |worker, call| {
                            let begin = t.now();
                            let part = call();
                            if part > 0.0 {
                                t.span(worker, at, ended, part, begin);
                            }
                        }),
                    }
                }
                Action::Copy { pair, bytes } => {
                    let pair = self.table.at(pair, iteration);
                    // SAFETY: both buffers have `bytes` bytes by verification; `copy` allows overlap; no region is open, so nobody
                    // else touches the memory of this executable, which is borrowed mutably.
                    unsafe { std::ptr::copy(pair[0], pair[1], bytes) };
                }
                Action::Begin { counter, max } => {
                    open = Some((next, max, counter));
                    self.set_counter(self.table.at(counter, 0)[0], 0);
                }
                Action::End { again } => {
                    // SAFETY: an `i32[1]` at a multiple of 64 by verification; nobody writes it, see `Copy`.
                    let again = unsafe { self.table.at(again, iteration)[0].cast::<i32>().read() } != 0;
                    match open {
                        Some((first, max, counter)) if again && iteration + 1 < max => {
                            iteration += 1;
                            self.set_counter(self.table.at(counter, iteration)[0], iteration as i32);
                            next = first;
                        }
                        _ => {
                            open = None;
                            iteration = 0;
                        }
                    }
                }
            }
            observe(at, ended, false);
            if let Some(t) = &mut trace {
                if !matches!(op, Action::Run { .. }) {
                    t.span(0, at, ended, 1.0, begin);
                }
                t.step(entry, at, begin);
            }
            at = next;
        }
    }

    fn set_counter(&self, counter: *mut u8, iteration: i32) {
        // SAFETY: an `i32[1]` at a multiple of 64 by verification; no region is open and the walk borrows `self` mutably.
        unsafe { counter.cast::<i32>().write(iteration) };
    }

    /// Run a kernel; `around(worker, work)` makes each worker work, which tells the share of the grid that it did.
    fn run_kernel(
        &self,
        kernel: usize,
        args: Args,
        grid: i64,
        split: bool,
        around: impl Fn(usize, &dyn Fn() -> f32) + Sync,
    ) {
        let code = self.module.entry(kernel);
        let call = |lo: i64, hi: i64, worker: usize| {
            let scratch = self.scratch.address(self.scratch_stride * worker, self.scratch_stride);
            // SAFETY: the table holds an address for every argument, each with the declared number of elements by verification; each
            // worker has a scratch region of its own, of the largest size that a kernel needs; workers get disjoint ranges of
            // the grid, whose instances are independent by the rules of the kernel IR, and nothing else runs meanwhile;
            // `0 <= lo <= hi <= grid`; indices stay within declared lengths by the promise of the kernel, which is part of the plan.
            unsafe { code.call(args.get(), scratch, lo, hi) }
        };
        if split && self.pool.threads() > 1 {
            self.shares.deal(grid);
            self.pool.run(&|worker, _| {
                around(worker, &|| {
                    let mut done = 0;
                    while let Some((lo, hi)) = self.shares.take(worker) {
                        call(lo, hi, worker);
                        done += hi - lo;
                    }
                    done as f32 / grid as f32
                });
            });
        } else {
            around(0, &|| {
                call(0, grid, 0);
                1.0
            });
        }
    }
}

/// The argument addresses of a step, shared by the workers of a region.
#[derive(Clone, Copy)]
struct Args(*const *mut u8);

// SAFETY: the pointer leads into the table, which nobody changes while the executable runs; what its addresses lead to is shared
// under the rules given where they are used.
unsafe impl Sync for Args {}

impl Args {
    fn get(&self) -> *const *mut u8 {
        self.0
    }
}
