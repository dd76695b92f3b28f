//! Predicted times: counted work times fitted rates.
//!
//! The time of a kernel is the sum of its counts, each times a rate, for the worker with the most instances. Rows of data that are
//! gone through again cost nothing more when they fit the first cache, a rate by byte when they fit the second, and the rate of
//! memory when they do not. The rates were fitted to measured tables (least squares of relative errors) and are relative truths: they
//! rank variants, they do not replace a measurement.

use chimera_codegen::{Feature, Target};
use chimera_ir::ops::{Pass, Work};

/// Bytes of the first cache that a pass may fill.
const L1: u64 = 40 << 10;
/// Bytes of the second cache that a pass may fill.
const L2: u64 = 1 << 20;

/// Nanoseconds by unit of work.
struct Rates {
    mac: f64,
    flop: f64,
    unpack: f64,
    broadcast: f64,
    combine: f64,
    moved: f64,
    instance: f64,
    l2_byte: f64,
    dram_byte: f64,
}

/// 256-bit vectors without byte dot products.
const PLAIN: Rates = Rates {
    mac: 0.0064,
    flop: 0.010,
    unpack: 0.0040,
    broadcast: 0.10,
    combine: 0.16,
    moved: 0.5,
    instance: 300.0,
    l2_byte: 0.012,
    dram_byte: 0.085,
};

/// With byte dot products that add to 32 bits.
const DOT: Rates = Rates { mac: 0.0040, ..PLAIN };

fn rates(target: &Target) -> &'static Rates {
    let dot = target.has(Feature::AvxVnni) || target.has(Feature::Avx512Vnni) && target.has(Feature::Avx512vl);
    if dot { &DOT } else { &PLAIN }
}

/// Seconds that a kernel with this work takes on `target`, its grid split over `threads`.
pub fn predict(work: &Work, target: &Target, threads: usize) -> f64 {
    let r = rates(target);
    let counted = [
        (work.macs, r.mac),
        (work.flops, r.flop),
        (work.unpacked, r.unpack),
        (work.broadcasts, r.broadcast),
        (work.combined, r.combine),
        (work.moved, r.moved),
        (work.instances, r.instance),
    ];
    let busy: f64 = counted.iter().map(|&(n, rate)| n as f64 * rate).sum();
    let moved = |from: u64, to: u64| -> f64 {
        let there = |p: &&Pass| p.bytes > from && p.bytes <= to;
        work.passes.iter().filter(there).map(|p| p.bytes as f64 * p.times as f64).sum()
    };
    let near = moved(L1, L2) * r.l2_byte;
    let far = moved(L2, u64::MAX) * r.dram_byte;
    let instances = work.instances.max(1);
    let share = instances.div_ceil(threads.max(1) as u64) as f64 / instances as f64;
    // Memory is read while the rest goes on; without a hint some of it is waited for.
    let (most, least) = if busy > far { (busy, far) } else { (far, busy) };
    let waited = if work.ahead { 0.05 } else { 0.15 };
    (most + waited * least + near) * share * 1e-9
}
