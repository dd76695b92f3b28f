//! Fork-join thread pool for plan execution: workers spin briefly between regions, then sleep.
//!
//! Invariant: `run` returns only after every worker has left the region, so a region may borrow from its caller. Regions
//! of one pool never overlap and never nest, and in steady state nothing is allocated.

use crate::affinity::{available_threads, cores, stay_on};
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::hint::spin_loop;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long a worker looks for the next region before it sleeps.
const SPIN_TIME: Duration = Duration::from_micros(40);
/// Bounds on the number of looks, whatever the measurement of one look says.
const SPIN_BOUNDS: (u32, u32) = (100, 50_000);

type Region<'a> = dyn Fn(usize, usize) + Sync + 'a;
type Payload = Box<dyn Any + Send>;

thread_local! {
    /// Whether this thread is inside a region of any pool.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// A fixed set of threads that execute one region at a time. Dropping the pool joins its threads.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held while a region runs: callers on different threads take turns.
    turn: Mutex<()>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.shared.threads).field("spin", &self.shared.spin).finish()
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] included; 0 counts as 1. A pool with more threads than
    /// [`available_threads`] never spins, because a spinning thread would keep a working one off its CPU.
    ///
    /// # Errors
    /// When the system refuses to start a thread.
    pub fn new(threads: usize) -> io::Result<Pool> {
        let spin = if threads <= 1 || threads > available_threads() { 0 } else { spin_budget() };
        Pool::with_spin(threads, spin, &[])
    }

    /// As [`Pool::new`], where each thread stays on a core of its own, and leaves the first core to the caller of [`Pool::run`], which is
    /// not bound. Where there are fewer cores than threads, or the system has no such call, threads run where they may.
    ///
    /// # Errors
    /// When the system refuses to start a thread.
    pub fn pinned(threads: usize) -> io::Result<Pool> {
        let spin = if threads <= 1 || threads > available_threads() { 0 } else { spin_budget() };
        let cores = cores();
        Pool::with_spin(threads, spin, if cores.len() < threads { &[] } else { &cores })
    }

    fn with_spin(threads: usize, spin: u32, cores: &[usize]) -> io::Result<Pool> {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            threads,
            spin,
            epoch: Padded(AtomicU64::new(0)),
            remaining: Padded(AtomicUsize::new(0)),
            sleeping: (1..threads).map(|_| Padded(AtomicBool::new(false))).collect(),
            caller_sleeps: Padded(AtomicBool::new(false)),
            stop: AtomicBool::new(false),
            region: UnsafeCell::new(None),
            finished: (Mutex::new(()), Condvar::new()),
            panic: Mutex::new(None),
        });
        let mut pool = Pool { shared, workers: Vec::with_capacity(threads - 1), turn: Mutex::new(()) };
        for worker in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let core = cores.get(worker).copied();
            let started = thread::Builder::new().name(format!("chimera-worker-{worker}")).spawn(move || {
                if let Some(core) = core {
                    stay_on(core);
                }
                work(&shared, worker);
            });
            // On failure the pool is dropped here, which joins the threads that did start.
            pool.workers.push(started.map_err(|error| {
                let reason = format!("cannot start thread {} of {threads}: {error}; ask for fewer threads", worker + 1);
                io::Error::new(error.kind(), reason)
            })?);
        }
        Ok(pool)
    }

    /// Number of threads that execute a region, the caller included.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Calls `f(worker, n_workers)` once on every thread of the pool, worker 0 being the caller, and returns when all
    /// calls have returned. What the workers wrote is visible to the caller afterwards.
    ///
    /// # Panics
    /// When called inside a region (regions do not nest), and with the payload of the caller's panic or else of the first
    /// panic of a worker, after all workers have left the region.
    pub fn run(&self, f: &(dyn Fn(usize, usize) + Sync)) {
        let _inside = Inside::enter();
        if self.workers.is_empty() {
            return f(0, 1);
        }
        let turn = lock(&self.turn);
        let shared = &*self.shared;
        shared.open(f, &self.workers);
        let own = catch_unwind(AssertUnwindSafe(|| f(0, shared.threads)));
        shared.wait_for_workers();
        let of_worker = lock(&shared.panic).take();
        drop(turn);
        if let Some(payload) = own.err().or(of_worker) {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches every panic of its regions, so joining it cannot fail.
            let _ = worker.join();
        }
    }
}

/// Marks this thread as inside a region until dropped.
struct Inside;

impl Inside {
    fn enter() -> Inside {
        let nested = INSIDE.replace(true);
        assert!(!nested, "regions of a thread pool do not nest: `Pool::run` was called inside a region");
        Inside
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(false);
    }
}

/// Keeps a value on cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Padded<T>(pub(crate) T);

impl<T> std::ops::Deref for Padded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

struct Shared {
    threads: usize,
    /// Looks before a waiting thread sleeps; 0 where spinning would harm.
    spin: u32,
    /// Number of regions opened so far. A change tells the workers to start.
    epoch: Padded<AtomicU64>,
    /// Workers that have not yet left the region.
    remaining: Padded<AtomicUsize>,
    /// Whether worker `i + 1` sleeps, or is about to.
    sleeping: Vec<Padded<AtomicBool>>,
    /// Whether the caller sleeps, or is about to.
    caller_sleeps: Padded<AtomicBool>,
    stop: AtomicBool,
    /// The open region. Written by the caller while no worker is inside, read by workers while the caller waits.
    region: UnsafeCell<Option<*const Region<'static>>>,
    finished: (Mutex<()>, Condvar),
    /// The first panic of a worker in the open region.
    panic: Mutex<Option<Payload>>,
}

// SAFETY: `region` is the only field without its own synchronisation. The caller, alone through `Pool::turn`, writes it
// while `remaining` is 0, before the release of `epoch`; workers read it after acquiring `epoch` and before they release
// `remaining`, and the caller writes again only after acquiring `remaining` at 0. The pointee is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: moving `Shared` moves no thread-bound data: the raw pointer is only used under the protocol above.
unsafe impl Send for Shared {}

impl Shared {
    /// Publishes a region and wakes the workers that sleep.
    fn open(&self, f: &Region<'_>, workers: &[JoinHandle<()>]) {
        // SAFETY: only the lifetime changes. `Pool::run` does not return before every worker has left the region, and
        // workers use the pointer only inside it, so the reference outlives all uses.
        let f = unsafe { std::mem::transmute::<*const Region<'_>, *const Region<'static>>(f) };
        // SAFETY: no worker is inside a region, see `Sync`.
        unsafe { *self.region.get() = Some(f) };
        self.remaining.store(workers.len(), Ordering::Relaxed);
        // With `wait_for_region`: either the worker sees the new epoch before it sleeps, or this sees that it sleeps.
        self.epoch.fetch_add(1, Ordering::SeqCst);
        for (sleeping, worker) in self.sleeping.iter().zip(workers) {
            if sleeping.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }

    /// Blocks until a region after `seen` is open; returns its number.
    fn wait_for_region(&self, worker: usize, seen: u64) -> u64 {
        for _ in 0..self.spin {
            let epoch = self.epoch.load(Ordering::Acquire);
            if epoch != seen {
                return epoch;
            }
            spin_loop();
        }
        let sleeping = &self.sleeping[worker - 1];
        sleeping.store(true, Ordering::SeqCst);
        let epoch = loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            if epoch != seen {
                break epoch;
            }
            thread::park();
        };
        sleeping.store(false, Ordering::Relaxed);
        epoch
    }

    /// Tells the caller that one worker has left the region.
    fn leave(&self) {
        if self.remaining.fetch_sub(1, Ordering::SeqCst) == 1 && self.caller_sleeps.load(Ordering::SeqCst) {
            let (mutex, condvar) = &self.finished;
            drop(lock(mutex));
            condvar.notify_one();
        }
    }

    /// Blocks until every worker has left the region.
    fn wait_for_workers(&self) {
        for _ in 0..self.spin {
            if self.remaining.load(Ordering::Acquire) == 0 {
                return;
            }
            spin_loop();
        }
        // With `leave`: either the last worker sees the flag and notifies under the lock, or the count is seen at 0.
        self.caller_sleeps.store(true, Ordering::SeqCst);
        let (mutex, condvar) = &self.finished;
        let mut guard = lock(mutex);
        while self.remaining.load(Ordering::SeqCst) != 0 {
            guard = condvar.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_sleeps.store(false, Ordering::Relaxed);
    }
}

/// The life of worker `worker`.
fn work(shared: &Shared, worker: usize) {
    INSIDE.set(true);
    let mut seen = 0;
    loop {
        seen = shared.wait_for_region(worker, seen);
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        // SAFETY: a region is open and this worker has not left it, see `Sync`.
        let region = unsafe { *shared.region.get() };
        let result = catch_unwind(AssertUnwindSafe(|| {
            let region = region.expect("an epoch that is not a stop opens a region");
            // SAFETY: the caller keeps the closure alive until this worker has left the region.
            unsafe { (*region)(worker, shared.threads) }
        }));
        if let Err(payload) = result {
            lock(&shared.panic).get_or_insert(payload);
        }
        shared.leave();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code of this module panics while it holds a lock, so there is no broken state behind a poisoned one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks that fit into [`SPIN_TIME`] on this CPU: the pause instruction takes between 10 and 150 cycles.
fn spin_budget() -> u32 {
    const LOOKS: u32 = 256;
    let epoch = AtomicU64::new(0);
    let start = Instant::now();
    for _ in 0..LOOKS {
        std::hint::black_box(epoch.load(Ordering::Acquire));
        spin_loop();
    }
    let nanos = start.elapsed().as_nanos().max(1);
    let looks = SPIN_TIME.as_nanos() * u128::from(LOOKS) / nanos;
    u32::try_from(looks).unwrap_or(u32::MAX).clamp(SPIN_BOUNDS.0, SPIN_BOUNDS.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pools that spin for long, briefly and never, so that every way of waiting is taken.
    fn pools(threads: usize) -> [Pool; 3] {
        [2000, 3, 0].map(|spin| Pool::with_spin(threads, spin, &[]).expect("threads start"))
    }

    fn message(payload: &Payload) -> &str {
        payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied()).unwrap_or("")
    }

    #[test]
    fn every_worker_runs_every_region_once() {
        for threads in [1, 2, 3, 5] {
            for pool in pools(threads) {
                let counts: Vec<_> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
                for region in 0..2000 {
                    pool.run(&|worker, n| {
                        assert_eq!(n, threads);
                        counts[worker].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == region + 1));
                }
            }
        }
    }

    #[test]
    fn writes_of_workers_are_visible_and_uneven_work_is_waited_for() {
        for pool in pools(3) {
            for region in 0..300u64 {
                let sums: Vec<_> = (0..3).map(|_| AtomicU64::new(0)).collect();
                pool.run(&|worker, _| {
                    let work = if region % 3 == worker as u64 { 20_000 } else { 10 };
                    let sum = (0..work).fold(region, |a, b| std::hint::black_box(a + b));
                    if region % 100 == 0 && worker == 1 {
                        thread::sleep(Duration::from_millis(2));
                    }
                    sums[worker].store(sum, Ordering::Relaxed);
                });
                for (worker, sum) in sums.iter().enumerate() {
                    let work: u64 = if region % 3 == worker as u64 { 20_000 } else { 10 };
                    assert_eq!(sum.load(Ordering::Relaxed), region + work * (work - 1) / 2);
                }
            }
        }
    }

    #[test]
    fn sleeping_workers_wake() {
        for pool in pools(2) {
            let count = AtomicUsize::new(0);
            for _ in 0..5 {
                thread::sleep(Duration::from_millis(3));
                pool.run(&|_, _| {
                    count.fetch_add(1, Ordering::Relaxed);
                });
            }
            assert_eq!(count.into_inner(), 10);
        }
    }

    #[test]
    fn panics_propagate_and_the_pool_stays_usable() {
        for threads in [1, 3] {
            for pool in pools(threads) {
                for culprit in 0..threads {
                    let caught = catch_unwind(AssertUnwindSafe(|| {
                        pool.run(&|worker, _| assert!(worker != culprit, "worker {worker} gave up"));
                    }));
                    let payload = caught.expect_err("the panic reaches the caller");
                    assert_eq!(message(&payload), format!("worker {culprit} gave up"));
                    let count = AtomicUsize::new(0);
                    pool.run(&|_, _| {
                        count.fetch_add(1, Ordering::Relaxed);
                    });
                    assert_eq!(count.into_inner(), threads);
                }
            }
        }
    }

    #[test]
    fn nested_regions_are_refused() {
        for threads in [1, 2] {
            for pool in pools(threads) {
                for nester in 0..threads {
                    let caught = catch_unwind(AssertUnwindSafe(|| {
                        pool.run(&|worker, _| {
                            if worker == nester {
                                pool.run(&|_, _| {});
                            }
                        });
                    }));
                    let payload = caught.expect_err("nesting is refused");
                    assert!(message(&payload).contains("do not nest"));
                }
                pool.run(&|_, _| {});
            }
        }
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        for pool in pools(2) {
            let inside = AtomicUsize::new(0);
            thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        for _ in 0..200 {
                            pool.run(&|_, _| {
                                assert!(inside.fetch_add(1, Ordering::SeqCst) < 2);
                                inside.fetch_sub(1, Ordering::SeqCst);
                            });
                        }
                    });
                }
            });
        }
    }

    #[test]
    fn dropping_joins_the_threads() {
        for threads in [1, 2, 4] {
            for pool in pools(threads) {
                let shared = Arc::downgrade(&pool.shared);
                pool.run(&|_, _| {});
                drop(pool);
                assert!(shared.upgrade().is_none(), "a worker still holds the shared state");
            }
            drop(pools(threads));
        }
    }

    #[test]
    fn threads_of_a_pinned_pool_stay_on_cores_of_their_own() {
        let all = cores();
        for threads in [1, 2, all.len() + 1] {
            let pool = Pool::pinned(threads).expect("threads start");
            let places: Vec<_> = (0..threads).map(|_| Mutex::new(vec![])).collect();
            pool.run(&|worker, _| *lock(&places[worker]) = cores());
            let bound = threads <= all.len();
            for (worker, place) in places.iter().enumerate() {
                let own = if bound && worker > 0 { vec![all[worker]] } else { all.clone() };
                assert_eq!(*lock(place), own, "worker {worker} of {threads}");
            }
        }
    }

    #[test]
    fn an_oversubscribed_pool_does_not_spin() {
        let available = available_threads();
        assert_eq!(Pool::new(available + 1).expect("threads start").shared.spin, 0);
        assert_eq!(Pool::new(0).expect("no thread is needed").threads(), 1);
        if available > 1 {
            let spin = Pool::new(available).expect("threads start").shared.spin;
            assert!((SPIN_BOUNDS.0..=SPIN_BOUNDS.1).contains(&spin));
        }
    }
}
