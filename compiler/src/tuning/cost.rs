//! Predicted times: counted work times fitted rates.
//!
//! The time of a kernel is the sum of its counts, each times a rate, for the worker with the most instances. What is gone through
//! again costs nothing more where it fits the first cache, and a rate by byte beyond. Weights come from outside once; what is asked
//! for ahead is waited for less. The rates were fitted to measured tables by least squares of relative errors, with the
//! multiply-accumulates, the sums and the instance held at what they cost alone. They rank variants; they replace no measurement.

use chimera_codegen::{Feature, Target};
use chimera_ir::ops::{Pass, Work};

/// Bytes of the first cache that a pass may fill.
const L1: u64 = 28 << 10;

/// The part of an instance that workers wait for the last one, as none is as fast as another.
const WAIT: f64 = 0.05;

/// Nanoseconds by unit of work, see [`Work`].
struct Rates {
    /// By multiply-accumulate of a loop that does nothing else.
    peak: f64,
    mac: f64,
    flop: f64,
    unpack: f64,
    load: f64,
    combine: f64,
    summed: f64,
    instance: f64,
    /// By byte of a pass that the first cache does not hold.
    again: f64,
    /// By byte of the weights.
    outside: f64,
    /// The same where they are asked for ahead.
    ahead: f64,
}

/// 256-bit vectors without byte dot products.
const PLAIN: Rates = Rates {
    peak: 0.0066,
    mac: 0.005,
    flop: 0.010,
    unpack: 0.0057,
    load: 0.12,
    combine: 0.05,
    summed: 0.6,
    instance: 200.0,
    again: 0.0021,
    outside: 0.036,
    ahead: 0.005,
};

/// With byte dot products that add to 32 bits: one instruction in place of two.
const DOT: Rates = Rates { peak: 0.0036, mac: 0.0025, ..PLAIN };

fn rates(target: &Target) -> &'static Rates {
    let dot = target.has(Feature::AvxVnni) || target.has(Feature::Avx512Vnni) && target.has(Feature::Avx512vl);
    if dot { &DOT } else { &PLAIN }
}

/// The predicted share of the peak of byte products that work reaches on one thread; `None` of work that has none.
pub fn share_of_peak(work: &Work, target: &Target) -> Option<f64> {
    let least = work.macs as f64 * rates(target).peak * 1e-9;
    (work.macs > 0).then(|| least / predict(work, target, 1))
}

/// Seconds that a kernel with this work takes on `target`, its grid split over `threads`.
pub fn predict(work: &Work, target: &Target, threads: usize) -> f64 {
    let r = rates(target);
    let outside = if work.ahead { r.ahead } else { r.outside };
    let again: u64 = work.passes.iter().filter(|p| p.bytes > L1).map(|p: &Pass| p.bytes.saturating_mul(p.times)).sum();
    let counted = [
        (work.macs, r.mac),
        (work.flops, r.flop),
        (work.unpacked, r.unpack),
        (work.loads, r.load),
        (work.combined, r.combine),
        (work.summed, r.summed),
        (work.instances, r.instance),
        (again, r.again),
        (work.outside, outside),
    ];
    let all: f64 = counted.iter().map(|&(n, rate)| n as f64 * rate).sum();
    let instances = work.instances.max(1);
    let busiest = instances.div_ceil(threads.max(1) as u64) as f64;
    let share = (busiest + if threads > 1 { WAIT } else { 0.0 }) / instances as f64;
    all * share * 1e-9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busiest_worker_counts_and_caches_are_told_apart() {
        let target: Target = "x86-64-v3".parse().unwrap();
        let work = Work { macs: 1_000_000, instances: 3, ..Work::default() };
        let [one, two, three] = [1, 2, 3].map(|threads| predict(&work, &target, threads));
        let share = |busiest: f64| (busiest + WAIT) / 3.0;
        assert!(
            (two / one - share(2.0)).abs() < 1e-9 && (three / one - share(1.0)).abs() < 1e-9,
            "{one} {two} {three}"
        );
        let passes = |bytes| Work { passes: vec![Pass { bytes, times: 100 }], ..work.clone() };
        assert_eq!(predict(&passes(L1), &target, 1), one);
        assert!(predict(&passes(L1 + 1), &target, 1) > one);
        let cold = Work { outside: 1 << 20, ..work };
        let asked = Work { ahead: true, ..cold.clone() };
        assert!(predict(&cold, &target, 1) > predict(&asked, &target, 1));
        let dot: Target = "x86-64-v4+avxvnni".parse().unwrap();
        assert!(predict(&cold, &dot, 1) < predict(&cold, &target, 1));
    }
}
