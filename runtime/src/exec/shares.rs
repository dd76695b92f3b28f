//! Who does which instances of a grid.
//!
//! Every worker begins with a contiguous range, the same one every time, so that caches keep what it will need again. It takes half of
//! what is left of its range at a time; who has nothing left takes half of what another has left, from the end. Instances are
//! independent, so nobody sees in a result who did them.

use crate::pool::Padded;
use std::sync::atomic::{AtomicU64, Ordering};

/// The ranges of all workers.
#[derive(Debug)]
pub(super) struct Shares {
    /// What each worker has left, in units: the begin in the low half, the end in the high one.
    left: Vec<Padded<AtomicU64>>,
    /// Instances of the grid.
    grid: AtomicU64,
    /// Whether who is done helps others.
    helps: bool,
}

/// The range of worker `worker` among `workers`.
fn range(grid: u64, worker: usize, workers: usize) -> (u64, u64) {
    let cut = |w: usize| (u128::from(grid) * w as u128 / workers as u128) as u64;
    (cut(worker), cut(worker + 1))
}

/// Instances of a unit, so that ranges of units fit 32 bits.
fn unit(grid: u64) -> u64 {
    grid.div_ceil(u64::from(u32::MAX)).max(1)
}

fn packed(lo: u64, hi: u64) -> u64 {
    hi << 32 | lo
}

fn parts(range: u64) -> (u64, u64) {
    (range & u64::from(u32::MAX), range >> 32)
}

impl Shares {
    pub(super) fn new(workers: usize, helps: bool) -> Shares {
        Shares { left: (0..workers).map(|_| Padded(AtomicU64::new(0))).collect(), grid: AtomicU64::new(0), helps }
    }

    /// Give every worker its range; before workers begin.
    pub(super) fn deal(&self, grid: i64) {
        let grid = grid.max(0) as u64;
        self.grid.store(grid, Ordering::Relaxed);
        let units = grid.div_ceil(unit(grid));
        for (w, left) in self.left.iter().enumerate() {
            let (lo, hi) = range(units, w, self.left.len());
            left.store(packed(lo, hi), Ordering::Relaxed);
        }
    }

    /// The next instances for a worker; `None` when all are taken.
    pub(super) fn take(&self, worker: usize) -> Option<(i64, i64)> {
        let n = if self.helps { self.left.len() } else { 1 };
        let (lo, hi) = self.half(worker, true).or_else(|| (1..n).find_map(|w| self.half((worker + w) % n, false)))?;
        let grid = self.grid.load(Ordering::Relaxed);
        let unit = unit(grid);
        Some(((lo * unit) as i64, (hi * unit).min(grid) as i64))
    }

    /// Half of what a worker has left, rounded up: the first, or the last.
    fn half(&self, of: usize, first: bool) -> Option<(u64, u64)> {
        let mut taken = (0, 0);
        let update = |range| {
            let (lo, hi) = parts(range);
            let half = (hi - lo).div_ceil(2);
            taken = if first { (lo, lo + half) } else { (hi - half, hi) };
            let rest = if first { packed(lo + half, hi) } else { packed(lo, hi - half) };
            (lo < hi).then_some(rest)
        };
        self.left[of].fetch_update(Ordering::Relaxed, Ordering::Relaxed, update).is_ok().then_some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(shares: &Shares, workers: usize, order: impl Fn(usize) -> usize) -> Vec<(i64, i64)> {
        let mut taken = vec![];
        let mut idle = 0;
        for turn in 0.. {
            match shares.take(order(turn) % workers) {
                Some(range) => taken.push(range),
                None => idle += 1,
            }
            if idle == workers {
                break;
            }
        }
        taken.sort_unstable();
        taken
    }

    #[test]
    fn every_instance_is_taken_once_whoever_asks() {
        for grid in [0, 1, 2, 3, 7, 64, 1 << 20, 1 << 40] {
            for workers in 1..6 {
                for step in [0, 1, 3] {
                    let shares = Shares::new(workers, true);
                    shares.deal(grid);
                    let taken = all(&shares, workers, |turn| turn * step);
                    let covered = taken.iter().fold(0, |end, &(lo, hi)| {
                        assert!(lo == end && lo < hi, "{lo}..{hi} behind {end}");
                        hi
                    });
                    assert_eq!(covered, grid, "{workers} workers");
                }
            }
        }
    }

    #[test]
    fn workers_begin_with_ranges_of_their_own() {
        let shares = Shares::new(2, true);
        shares.deal(16);
        assert_eq!([shares.take(0), shares.take(1)], [Some((0, 4)), Some((8, 12))]);
        assert_eq!([shares.take(0), shares.take(0), shares.take(0)], [Some((4, 6)), Some((6, 7)), Some((7, 8))]);
        // Worker 1 has 12 .. 16 left.
        assert_eq!(shares.take(0), Some((14, 16)));
        assert_eq!(shares.take(1), Some((12, 13)));
    }

    #[test]
    fn workers_that_do_not_help_do_their_own_range() {
        let shares = Shares::new(2, false);
        shares.deal(16);
        let done = |worker| std::iter::from_fn(|| shares.take(worker)).map(|(lo, hi)| hi - lo).sum::<i64>();
        assert_eq!([done(0), done(0), done(1)], [8, 0, 8]);
    }

    #[test]
    fn threads_share_a_grid() {
        let shares = Shares::new(2, true);
        for _ in 0..200 {
            shares.deal(1000);
            let count = |worker: usize| {
                let mut done = 0;
                while let Some((lo, hi)) = shares.take(worker) {
                    done += hi - lo;
                }
                done
            };
            let sum = std::thread::scope(|s| {
                let other = s.spawn(|| count(1));
                count(0) + other.join().expect("a worker")
            });
            assert_eq!(sum, 1000);
        }
    }
}
