//! The kernel of [`SpanKnot`]: one instance walks the tokens of one row.
//!
//! A flipped bit never opposes its field again, so the candidates of all steps are collected once and a step only takes the best
//! of those that are left, by bisection on the integer field.

use super::{ROTATION, SpanKnot};
use crate::{
    DType,
    loops::{
        Acc, Buf, Expr, Ty, Var, f32c, f64c, i32c,
        math::{self, rsqrt},
    },
    lower::Lower,
};

/// Stages of the transform that one pass over memory does in registers.
const RADIX: usize = 8;

struct Bufs {
    signs: Buf,
    /// Counters and the first one of this row.
    counters: Buf,
    row: Expr,
    x: Buf,
    a: Buf,
    bound: Buf,
    /// Fields of the candidates, ascending by bit.
    gain: Buf,
    /// Bits of the candidates.
    bit: Buf,
    /// End minus start.
    flipped: Buf,
}

/// Exact sums of start sign times sketch, coherence and binding vector; each flip lowers them by twice its part.
struct Sums {
    auto: Var,
    coherence: Var,
    binding: Var,
}

pub(super) fn lower(op: &SpanKnot, cx: &mut Lower<'_>) {
    let [rows, tokens, d] = cx.ty(0).dims[..] else { unreachable!("infer accepted three dimensions") };
    let (n, p) = (op.bits, d.next_power_of_two());
    let [h, emb, pos, signs, role] = [0, 1, 2, 3, 4].map(|k| cx.buf(k));
    let r = cx.grid(rows);
    let x = cx.scratch("x", DType::I32, p);
    let a = cx.scratch("sketch", DType::I32, n);
    let bound = cx.scratch("bound", DType::I8, n);
    let turned = cx.scratch("turned", DType::I8, n + ROTATION);
    let [gain, bit, flipped] = ["gain", "bit", "flipped"].map(|name| cx.scratch(name, DType::I32, n));
    let (counters, row) =
        if op.carry { (cx.buf(5), cx.bind(&r * n)) } else { (cx.scratch("counters", DType::I16, n), Expr::from(0)) };
    if !op.carry {
        cx.lanes(0, n, 1, |cx, i| cx.store(counters, i, i32c(0)));
    }
    let bufs = Bufs { signs, counters, row, x, a, bound, gain, bit, flipped };
    cx.lanes(d, p, 1, |cx, j| cx.store(x, j, i32c(0)));
    cx.lanes(0, ROTATION, 1, |cx, i| cx.store(turned, &i, Expr::load(role, &i + (n - ROTATION))));
    cx.lanes(0, n, 1, |cx, i| cx.store(turned, &i + ROTATION, Expr::load(role, &i)));
    cx.each(0, tokens, |cx, t| {
        let token = cx.bind(&r * tokens + t);
        let pos = cx.bind(Expr::load(pos, &token));
        let first = cx.bind(pos.clone().eq(i32c(0)));
        sketch(op, cx, &bufs, emb, &token, d);
        let turn = (pos & i32c(ROTATION as i32 - 1)).cast(Ty::I64);
        let shift = cx.bind(Expr::from(ROTATION) - turn);
        cx.lanes(0, n, 1, |cx, i| {
            let role = cx.bind(Expr::load(turned, &i + &shift));
            let positive = i32c(0).le(Expr::load(a, &i));
            cx.store(bound, i, positive.select(&role, -role.clone()));
        });
        sketch(op, cx, &bufs, h, &token, d);
        let squares = cx.sum(0, d, |cx, j| {
            let x = cx.bind(Expr::load(x, j));
            (&x * &x).cast(Ty::F64)
        });
        let rho = cx.bind(squares.sqrt());
        let flips = relax(op, cx, &bufs, &first, &rho, &token, p);
        cx.lanes(0, n, 1, |cx, i| {
            let c = cx.bind(first.clone().select(i32c(0), Expr::load(counters, &bufs.row + &i)));
            let start = i32c(0).le(Expr::load(a, &i)).select(i32c(1), i32c(-1));
            let end = start + Expr::load(flipped, &i);
            cx.store(counters, &bufs.row + i, &c - c.clone().sar(6) + end.shl(8));
        });
        let scale = f32c(((p * n) as f64).sqrt() as f32);
        cx.if_else(
            i32c(0).lt(flips),
            |cx| {
                hadamard(cx, flipped, n, p);
                cx.lanes(0, d, 1, |cx, j| {
                    let sum = cx.local(i32c(0));
                    cx.each_step(0, n, p, |cx, k| {
                        let at = cx.bind(k + &j);
                        cx.set(sum, sum + Expr::load(flipped, &at) * Expr::load(signs, &at));
                    });
                    cx.put(0, &token * d + j, Expr::from(sum).cast(Ty::F32) / scale.clone());
                });
            },
            |cx| cx.lanes(0, d, 2, |cx, j| cx.put(0, &token * d + j, f32c(0.0))),
        );
    });
}

/// Row `token` of `from` as rounded integers in `x` and their sketch in `a`. Elements of `x` behind the row stay zero.
fn sketch(op: &SpanKnot, cx: &mut Lower<'_>, bufs: &Bufs, from: Buf, token: &Expr, d: usize) {
    let (x, a, signs) = (bufs.x, bufs.a, bufs.signs);
    let start = cx.bind(token * d);
    let square = cx.reduce(0, d, |cx, j| {
        let x = cx.bind(Expr::load(from, &start + j));
        vec![Acc::Dot(x.clone(), x)]
    });
    let scale = cx.bind(rsqrt(square[0].clone() / f32c(d as f32) + f32c(op.eps)));
    cx.lanes(0, d, 1, |cx, j| {
        let value = Expr::load(from, &start + &j) * &scale * f32c(256.0);
        let value = cx.bind(value.max(f32c(-32767.0)).min(f32c(32767.0)));
        cx.store(x, j, math::round_to_i32(value));
    });
    let p = d.next_power_of_two();
    cx.each_step(0, op.bits, p, |cx, k| {
        cx.lanes(0, p, 2, |cx, j| {
            let at = cx.bind(&k + &j);
            cx.store(a, &at, Expr::load(x, j) * Expr::load(signs, &at));
        });
    });
    hadamard(cx, a, op.bits, p);
}

/// Walsh-Hadamard transforms of the runs of `p` of the first `n` elements, in place.
fn hadamard(cx: &mut Lower<'_>, buf: Buf, n: usize, p: usize) {
    let mut h = 1;
    while h < p {
        let radix = RADIX.min(p / h);
        cx.each_step(0, n, h * radix, |cx, base| {
            if h == 1 {
                butterflies(cx, buf, &base, h, radix);
            } else {
                cx.lanes(0, h, 1, |cx, j| {
                    let at = cx.bind(&base + j);
                    butterflies(cx, buf, &at, h, radix);
                });
            }
        });
        h *= radix;
    }
}

/// The transform of the `radix` elements `at + l h`.
fn butterflies(cx: &mut Lower<'_>, buf: Buf, at: &Expr, h: usize, radix: usize) {
    let mut v: Vec<Expr> = (0..radix).map(|l| cx.bind(Expr::load(buf, at + l * h))).collect();
    let mut step = 1;
    while step < radix {
        for i in (0..radix).filter(|i| i & step == 0) {
            let (sum, difference) = (&v[i] + &v[i + step], &v[i] - &v[i + step]);
            (v[i], v[i + step]) = (cx.bind(sum), cx.bind(difference));
        }
        step *= 2;
    }
    for (l, v) in v.into_iter().enumerate() {
        cx.store(buf, at + l * h, v);
    }
}

/// Fill `flipped`, store the statistics, and return the number of flips as a local.
fn relax(op: &SpanKnot, cx: &mut Lower<'_>, bufs: &Bufs, first: &Expr, rho: &Expr, token: &Expr, p: usize) -> Var {
    let (n, a) = (op.bits, bufs.a);
    let [c2, c3] = op.couplings().map(|c| cx.bind((f64c(c) * rho).nearest().cast(Ty::I32)));
    let c2 = cx.bind(first.clone().select(i32c(0), c2));
    cx.lanes(0, n, 1, |cx, i| {
        let x = cx.bind(Expr::load(a, &i));
        let coherence = i32c(0).le(Expr::load(bufs.counters, &bufs.row + &i)).select(&c2, -c2.clone());
        let binding = i32c(0).lt(Expr::load(bufs.bound, &i)).select(&c3, -c3.clone());
        let field = cx.bind(&x + coherence + binding);
        let opposed = i32c(0).le(x).select(-field.clone(), field);
        cx.store(bufs.gain, &i, opposed.max(i32c(0)));
        cx.store(bufs.flipped, i, i32c(0));
    });
    let stats = cx.wants(1);
    let sums = Sums { auto: cx.local(f64c(0.0)), coherence: cx.local(i32c(0)), binding: cx.local(i32c(0)) };
    if stats {
        start_sums(cx, bufs, &sums, n, p);
        put_energy(op, cx, &sums, first, rho, &(token * 3 + 1usize));
    }
    let flips = cx.local(i32c(0));
    let limit = op.limit() as i32;
    if op.iters > 0 && limit > 0 {
        let count = collect(cx, bufs, n);
        let left = cx.local(count.clone().cast(Ty::I32));
        let more = cx.local(i32c(1));
        let greatest = cx.bind(c2.abs() + c3.abs() + i32c(1));
        let depth = (op.greatest_gain(cx.ty(0).cols()) + 2.0).log2().ceil() as usize;
        cx.each(0, op.iters, |cx, _| {
            let go = Expr::from(more).ne(i32c(0)) & i32c(0).lt(left);
            cx.when(go, |cx| {
                let threshold = cx.local(i32c(0));
                let ties = cx.local(i32c(0));
                cx.when(i32c(limit).lt(left), |cx| {
                    let above = bisect(cx, bufs, &count, limit, &greatest, depth, threshold);
                    cx.set(ties, i32c(limit) - above);
                });
                let gained = flip(cx, bufs, &count, threshold, ties, &sums, stats);
                let step = cx.bind(Expr::from(left).min(i32c(limit)));
                cx.set(flips, flips + &step);
                cx.set(left, left - step);
                let delta = f64c(2.0 * op.weights[0]) * Expr::from(gained).cast(Ty::F64) / (f64c(n as f64) * rho);
                cx.set(more, f64c(op.exit_delta).le(delta).cast(Ty::I32));
            });
        });
    }
    if stats {
        cx.put(1, token * 3, Expr::from(flips).cast(Ty::F32));
        put_energy(op, cx, &sums, first, rho, &(token * 3 + 2usize));
    }
    flips
}

/// Move the candidates to the front of `gain`, their bits to `bit`; returns how many there are.
fn collect(cx: &mut Lower<'_>, bufs: &Bufs, n: usize) -> Expr {
    let count = cx.local(Expr::from(0));
    cx.each(0, n, |cx, i| {
        let gain = cx.bind(Expr::load(bufs.gain, &i));
        let at = cx.bind(Expr::from(count).min(Expr::from(n - 1)).max(Expr::from(0)));
        cx.store(bufs.gain, &at, &gain);
        cx.store(bufs.bit, at, i.cast(Ty::I32));
        cx.set(count, count + i32c(0).lt(gain).cast(Ty::I64));
    });
    cx.bind(Expr::from(count).min(Expr::from(n)))
}

/// Set `threshold` to the field of candidate number `limit`, counted from the greatest; returns how many are above it. More than
/// `limit` candidates are left.
fn bisect(
    cx: &mut Lower<'_>,
    bufs: &Bufs,
    count: &Expr,
    limit: i32,
    greatest: &Expr,
    depth: usize,
    threshold: Var,
) -> Expr {
    let at_least = |cx: &mut Lower<'_>, x: &Expr| {
        let below = cx.bind(x - i32c(1));
        cx.sum(0, count, |_, i| below.clone().lt(Expr::load(bufs.gain, i)).cast(Ty::I32))
    };
    let high = cx.local(greatest);
    cx.set(threshold, i32c(1));
    cx.each(0, depth, |cx, _| {
        let middle = cx.bind((threshold + high).sar(1));
        let enough = at_least(cx, &middle);
        let enough = cx.bind(i32c(limit).le(enough));
        cx.set(threshold, enough.clone().select(&middle, threshold));
        cx.set(high, enough.select(high, middle));
    });
    let next = cx.bind(threshold + i32c(1));
    at_least(cx, &next)
}

/// Flip the candidates above the threshold and the first `ties` at it; returns the sum of their fields as a local.
fn flip(cx: &mut Lower<'_>, bufs: &Bufs, count: &Expr, threshold: Var, ties: Var, sums: &Sums, stats: bool) -> Var {
    let gained = cx.local(i32c(0));
    cx.each(0, count, |cx, i| {
        let gain = cx.bind(Expr::load(bufs.gain, &i));
        let tie = cx.bind(gain.clone().eq(threshold) & i32c(0).lt(ties));
        cx.set(ties, ties - tie.clone().cast(Ty::I32));
        cx.when(Expr::from(threshold).lt(&gain) | tie, |cx| {
            let last = i32c(cx.decl(bufs.bit).len as i32 - 1);
            let at = cx.bind(Expr::load(bufs.bit, &i).min(last).max(i32c(0)).cast(Ty::I64));
            let x = cx.bind(Expr::load(bufs.a, &at));
            let positive = cx.bind(i32c(0).le(&x));
            cx.store(bufs.flipped, &at, positive.clone().select(i32c(-2), i32c(2)));
            cx.store(bufs.gain, &i, i32c(0));
            cx.set(gained, gained + gain);
            if stats {
                let c = Expr::load(bufs.counters, &bufs.row + &at);
                let bound = cx.bind(Expr::load(bufs.bound, at));
                cx.set(sums.auto, sums.auto - (x.clone().abs() + x.clone().abs()).cast(Ty::F64));
                cx.set(sums.coherence, sums.coherence + (x ^ c).lt(i32c(0)).select(i32c(2), i32c(-2)));
                cx.set(sums.binding, sums.binding + positive.select(-bound.clone() - &bound, &bound + &bound));
            }
        });
    });
    gained
}

fn start_sums(cx: &mut Lower<'_>, bufs: &Bufs, sums: &Sums, n: usize, p: usize) {
    // The magnitudes of one transform add up to at most p rho, which fits 32 bits.
    cx.each_step(0, n, p, |cx, k| {
        let end = cx.bind(&k + p);
        let parts = cx.reduce(k, end, |cx, i| {
            let x = cx.bind(Expr::load(bufs.a, &i));
            let c = Expr::load(bufs.counters, &bufs.row + &i);
            let bound = cx.bind(Expr::load(bufs.bound, i));
            let coherence = (&x ^ c).lt(i32c(0)).select(i32c(-1), i32c(1));
            let binding = i32c(0).le(&x).select(&bound, -bound.clone());
            vec![Acc::Sum(x.abs()), Acc::Sum(coherence), Acc::Sum(binding)]
        });
        cx.set(sums.auto, sums.auto + parts[0].clone().cast(Ty::F64));
        cx.set(sums.coherence, sums.coherence + &parts[1]);
        cx.set(sums.binding, sums.binding + &parts[2]);
    });
}

fn put_energy(op: &SpanKnot, cx: &mut Lower<'_>, sums: &Sums, first: &Expr, rho: &Expr, at: &Expr) {
    let (n, [w1, w2, w3]) = (f64c(op.bits as f64), op.weights);
    let auto = f64c(-w1) * sums.auto / (&n * rho.clone().max(f64c(1.0)));
    let half = |w: f64, sum: Var| f64c(w) * (f64c(1.0) - Expr::from(sum).cast(Ty::F64) / &n) / f64c(2.0);
    let coherence = first.clone().select(f64c(0.0), half(w2, sums.coherence));
    let energy = auto + coherence + half(w3, sums.binding);
    cx.put(1, at, energy.cast(Ty::F32));
}
