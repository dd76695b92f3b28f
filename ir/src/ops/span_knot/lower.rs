//! The kernel of [`SpanKnot`]: one instance walks the tokens of one row.
//!
//! A flipped bit never opposes its field again, so the candidates of all steps are collected once, and a step only finds the threshold
//! above which those left are the best. A candidate is a key, its field above its rank, greatest for the lowest bit: keys have no ties.

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
/// Bits that one iteration of the loop over candidates looks at; divides the number of bits.
const UNROLL: usize = 8;
/// From this many transforms on, one vector holds an element of each; from this many tokens on, tables in that order pay.
const SIDE_BY_SIDE: usize = 8;

/// Where bit `k P + j`, element `j` of transform `k`, lies.
#[derive(Clone, Copy)]
struct Layout {
    n: usize,
    p: usize,
    /// 1: in order. Else the number of transforms, and the bit lies at `j inner + k`.
    inner: usize,
}

impl Layout {
    fn of(op: &SpanKnot, d: usize, tokens: usize) -> Layout {
        let (n, p) = (op.bits, d.next_power_of_two());
        let inner = if n / p >= SIDE_BY_SIDE && tokens >= SIDE_BY_SIDE { n / p } else { 1 };
        Layout { n, p, inner }
    }

    /// Bring a table that lies in order into the layout; `back` the other way.
    fn copy(&self, cx: &mut Lower<'_>, from: (Buf, &Expr), to: (Buf, &Expr), back: bool) {
        let Layout { p, inner, .. } = *self;
        cx.each(0, p, |cx, j| {
            cx.each(0, inner, |cx, k| {
                let (bit, here) = (cx.bind(&k * p + &j), cx.bind(&j * inner + k));
                let (source, target) = if back { (here, bit) } else { (bit, here) };
                let x = Expr::load(from.0, from.1 + source);
                cx.store(to.0, to.1 + target, x);
            });
        });
    }
}

struct Bufs {
    signs: Buf,
    /// Counters and the first one of this row.
    counters: Buf,
    row: Expr,
    x: Buf,
    a: Buf,
    filler: Buf,
    /// The role vector behind its last [`ROTATION`] elements.
    role: Buf,
    /// `n - 1 - bit`.
    rank: Buf,
    /// Keys of all bits, 0 of those that no step flips.
    key: Buf,
    /// Keys of the candidates.
    left: Buf,
}

/// What is true of one token.
struct Token {
    index: Expr,
    first: Expr,
    /// Where the turned role vector begins.
    turned: Expr,
    rho: Expr,
}

pub(super) fn lower(op: &SpanKnot, cx: &mut Lower<'_>) {
    let [rows, tokens, d] = cx.ty(0).dims[..] else { unreachable!("infer accepted three dimensions") };
    let lay = Layout::of(op, d, tokens);
    let Layout { n, p, inner } = lay;
    let [h, emb, pos, mut signs, role] = [0, 1, 2, 3, 4].map(|k| cx.buf(k));
    let r = cx.grid(rows);
    let x = cx.scratch("x", DType::I32, p);
    let [a, filler, rank, key] = ["sketch", "filler", "rank", "key"].map(|name| cx.scratch(name, DType::I32, n));
    let left = cx.scratch("left", DType::I32, n.next_power_of_two());
    let turned = cx.scratch("turned", DType::I8, n + ROTATION * inner);
    let own = !op.carry || inner > 1;
    let (counters, row) =
        if own { (cx.scratch("counters", DType::I16, n), Expr::from(0)) } else { (cx.buf(5), cx.bind(&r * n)) };
    if inner > 1 {
        let table = cx.scratch("signs", DType::I8, n);
        lay.copy(cx, (signs, &Expr::from(0)), (table, &Expr::from(0)), false);
        signs = table;
    }
    if !op.carry {
        cx.lanes(0, n, 1, |cx, i| cx.store(counters, i, i32c(0)));
    } else if own {
        let state = (cx.buf(5), &cx.bind(&r * n));
        lay.copy(cx, state, (counters, &row), false);
    }
    let bufs = Bufs { signs, counters, row, x, a, filler, role: turned, rank, key, left };
    cx.lanes(d, p, 1, |cx, j| cx.store(x, j, i32c(0)));
    fill_role(cx, &lay, role, turned);
    fill_rank(cx, &lay, rank);
    cx.each(0, tokens, |cx, t| {
        let index = cx.bind(&r * tokens + t);
        let pos = cx.bind(Expr::load(pos, &index));
        let first = cx.bind(pos.clone().eq(i32c(0)));
        let turn = (pos & i32c(ROTATION as i32 - 1)).cast(Ty::I64);
        let turned = cx.bind((Expr::from(ROTATION) - turn) * inner);
        sketch(op, cx, &bufs, &lay, (emb, filler), &index, d);
        sketch(op, cx, &bufs, &lay, (h, a), &index, d);
        let squares = cx.sum(0, d, |cx, j| {
            let x = cx.bind(Expr::load(x, j));
            (&x * &x).cast(Ty::F64)
        });
        let rho = cx.bind(squares.sqrt());
        let token = Token { index, first, turned, rho };
        let (flips, threshold) = relax(op, cx, &bufs, &token, n);
        // What flips takes the place of the filler.
        let flipped = filler;
        let stats = cx.wants(1);
        if stats {
            cx.put(1, &token.index * 3, Expr::from(flips).cast(Ty::F32));
            energy(op, cx, &bufs, &token, Some(threshold), 2);
        }
        cx.lanes(0, n, 1, |cx, i| {
            let c = cx.bind(token.first.clone().select(i32c(0), Expr::load(counters, &bufs.row + &i)));
            let start = cx.bind(sign(Expr::load(a, &i)));
            let flip = cx.bind(Expr::from(threshold).le(Expr::load(key, &i)));
            let end = cx.bind(flip.select(-start.clone(), &start));
            cx.store(flipped, &i, &end - start);
            cx.store(counters, &bufs.row + i, &c - c.clone().sar(6) + end.shl(8));
        });
        let scale = f32c(((p * n) as f64).sqrt() as f32);
        cx.if_else(
            i32c(0).lt(flips),
            |cx| {
                hadamard(cx, &lay, flipped, &|_, _, at| Expr::load(flipped, at));
                read_back(cx, &lay, &bufs, flipped, &(&token.index * d), d, &scale);
            },
            |cx| cx.lanes(0, d, 2, |cx, j| cx.put(0, &token.index * d + j, f32c(0.0))),
        );
    });
    if op.carry && own {
        let state = (cx.buf(5), &cx.bind(&r * n));
        lay.copy(cx, (bufs.counters, &bufs.row), state, true);
    }
}

fn fill_rank(cx: &mut Lower<'_>, lay: &Layout, rank: Buf) {
    let Layout { n, p, inner } = *lay;
    let at = |bit: Expr| (Expr::from(n - 1) - bit).cast(Ty::I32);
    if inner == 1 {
        return cx.lanes(0, n, 1, |cx, bit| cx.store(rank, &bit, at(bit.clone())));
    }
    cx.each(0, p, |cx, j| {
        cx.lanes(0, inner, 1, |cx, k| cx.store(rank, &j * inner + &k, at(k * p + &j)));
    });
}

/// 1, or -1 of negative numbers.
fn sign(x: Expr) -> Expr {
    x.sar(31) | i32c(1)
}

/// The role vector, with elements in front so that it turns by an offset.
fn fill_role(cx: &mut Lower<'_>, lay: &Layout, role: Buf, turned: Buf) {
    let Layout { n, p, inner } = *lay;
    if inner == 1 {
        cx.lanes(0, ROTATION, 1, |cx, i| cx.store(turned, &i, Expr::load(role, &i + (n - ROTATION))));
        cx.lanes(0, n, 1, |cx, i| cx.store(turned, &i + ROTATION, Expr::load(role, &i)));
        return;
    }
    cx.each(0, p + ROTATION, |cx, j| {
        cx.each(0, inner, |cx, k| {
            let bit = cx.bind((&k * p + &j + (n - ROTATION)) % n);
            cx.store(turned, &j * inner + k, Expr::load(role, bit));
        });
    });
}

/// Row `token` of `from` as rounded integers in `x` and their sketch in `to`. Elements of `x` behind the row stay zero.
fn sketch(
    op: &SpanKnot,
    cx: &mut Lower<'_>,
    bufs: &Bufs,
    lay: &Layout,
    (from, to): (Buf, Buf),
    token: &Expr,
    d: usize,
) {
    let (x, signs) = (bufs.x, bufs.signs);
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
    hadamard(cx, lay, to, &|_, j, at| Expr::load(x, j) * Expr::load(signs, at));
}

/// Walsh-Hadamard transforms side by side or one behind the other, of `value(j, at)` for element `j` of the transform that lies at `at`.
fn hadamard(cx: &mut Lower<'_>, lay: &Layout, buf: Buf, value: &dyn Fn(&mut Lower<'_>, &Expr, &Expr) -> Expr) {
    let Layout { n, p, inner } = *lay;
    let radix = RADIX.min(p);
    cx.each_step(0, n, inner * radix, |cx, base| {
        let first = cx.bind(if inner == 1 { &base % p } else { &base / inner });
        let load = |cx: &mut Lower<'_>, l: usize, at: &Expr| value(cx, &(&first + l), at);
        if inner == 1 {
            return butterflies(cx, buf, &base, 1, radix, &load);
        }
        cx.lanes(0, inner, 1, |cx, k| {
            let at = cx.bind(&base + k);
            butterflies(cx, buf, &at, inner, radix, &load);
        });
    });
    let mut h = inner * radix;
    while h < inner * p {
        let radix = RADIX.min(inner * p / h);
        cx.each_step(0, n, h * radix, |cx, base| {
            cx.lanes(0, h, 1, |cx, j| {
                let at = cx.bind(&base + j);
                butterflies(cx, buf, &at, h, radix, &|_, _, at| Expr::load(buf, at));
            });
        });
        h *= radix;
    }
}

/// The transform of the `radix` elements at `at + l h`.
fn butterflies(
    cx: &mut Lower<'_>,
    buf: Buf,
    at: &Expr,
    h: usize,
    radix: usize,
    load: &dyn Fn(&mut Lower<'_>, usize, &Expr) -> Expr,
) {
    let mut v: Vec<Expr> = vec![];
    for l in 0..radix {
        let x = load(cx, l, &(at + l * h));
        v.push(cx.bind(x));
    }
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

/// The transforms of what flipped, times the signs, summed over the transforms.
fn read_back(cx: &mut Lower<'_>, lay: &Layout, bufs: &Bufs, flipped: Buf, to: &Expr, d: usize, scale: &Expr) {
    let Layout { n, p, inner } = *lay;
    let product = |at: &Expr| Expr::load(flipped, at) * Expr::load(bufs.signs, at);
    if inner > 1 {
        return cx.each(0, d, |cx, j| {
            let sum = cx.sum(&j * inner, (&j + 1usize) * inner, |_, at| product(&at));
            cx.put(0, to + j, sum.cast(Ty::F32) / scale.clone());
        });
    }
    cx.lanes(0, d, 1, |cx, j| {
        let sum = cx.local(i32c(0));
        cx.each_step(0, n, p, |cx, k| {
            let at = cx.bind(k + &j);
            cx.set(sum, sum + product(&at));
        });
        cx.put(0, to + j, Expr::from(sum).cast(Ty::F32) / scale.clone());
    });
}

/// Fill `key`; returns locals with the number of flips and the key from which on bits flip.
fn relax(op: &SpanKnot, cx: &mut Lower<'_>, bufs: &Bufs, token: &Token, n: usize) -> (Var, Var) {
    let (shift, limit) = (n.next_power_of_two().ilog2() as i32, op.limit() as i32);
    let [c2, c3] = op.couplings().map(|c| cx.bind((f64c(c) * &token.rho).nearest().cast(Ty::I32)));
    let c2 = cx.bind(token.first.clone().select(i32c(0), c2));
    cx.lanes(0, n, 1, |cx, i| {
        let x = cx.bind(Expr::load(bufs.a, &i));
        let coherence = i32c(0).le(Expr::load(bufs.counters, &bufs.row + &i)).select(&c2, -c2.clone());
        let binding = i32c(0).le(bound(bufs, token, &i)).select(&c3, -c3.clone());
        let field = cx.bind(&x + coherence + binding);
        let opposed = cx.bind(i32c(0).le(x).select(-field.clone(), field));
        let key = opposed.clone().shl(shift) | Expr::load(bufs.rank, &i);
        cx.store(bufs.key, i, i32c(0).lt(opposed).select(key, i32c(0)));
    });
    if cx.wants(1) {
        energy(op, cx, bufs, token, None, 1);
    }
    let flips = cx.local(i32c(0));
    let threshold = cx.local(i32c(i32::MAX));
    if op.iters == 0 || limit == 0 {
        return (flips, threshold);
    }
    let count = collect(cx, bufs, n);
    let all = cx.bind(count.clone().cast(Ty::I32));
    let more = cx.local(i32c(1));
    let greatest = cx.bind((c2.abs() + c3.abs() + i32c(1)).shl(shift));
    let depth = (op.greatest_gain(cx.ty(0).cols()) + 2.0).log2().ceil() as usize + shift as usize;
    cx.each(0, op.iters, |cx, _| {
        let go = Expr::from(more).ne(i32c(0)) & Expr::from(flips).lt(&all);
        cx.when(go, |cx| {
            let before = Expr::from(cx.local(threshold));
            let wanted = cx.bind((flips + i32c(limit)).min(&all));
            cx.set(threshold, i32c(1));
            cx.when(wanted.clone().lt(&all), |cx| {
                bisect(cx, bufs, &count, &wanted, before.clone().min(&greatest), depth, threshold);
            });
            let lowest = cx.bind(threshold);
            let gained = cx.sum(0, &count, |cx, i| {
                let key = cx.bind(Expr::load(bufs.left, i));
                let now = cx.bind(key.clone().lt(&before).select(key.clone().shr(shift), i32c(0)));
                lowest.clone().le(key).select(now, i32c(0))
            });
            cx.set(flips, wanted);
            let delta = f64c(2.0 * op.weights[0]) * gained.cast(Ty::F64) / (f64c(n as f64) * &token.rho);
            cx.set(more, f64c(op.exit_delta).le(delta).cast(Ty::I32));
        });
    });
    (flips, threshold)
}

/// A number with the sign of the binding vector at `i`.
fn bound(bufs: &Bufs, token: &Token, i: &Expr) -> Expr {
    Expr::load(bufs.filler, i) ^ Expr::load(bufs.role, i + &token.turned)
}

/// Move the keys of candidates to the front of `left`; returns how many there are.
fn collect(cx: &mut Lower<'_>, bufs: &Bufs, n: usize) -> Expr {
    let count = cx.local(Expr::from(0));
    cx.each_step(0, n, UNROLL, |cx, i| {
        for l in 0..UNROLL {
            let key = cx.bind(Expr::load(bufs.key, &i + l));
            cx.store(bufs.left, Expr::from(count) & Expr::from(n.next_power_of_two() - 1), &key);
            // 1 for a positive key, 0 for 0.
            cx.set(count, count + (-key).shr(31).cast(Ty::I64));
        }
    });
    cx.bind(Expr::from(count).min(Expr::from(n)).max(Expr::from(0)))
}

/// Set `threshold`, which is 1, to a key from which on there are exactly `wanted` candidates, fewer than there are; from `high` on there
/// are fewer.
fn bisect(cx: &mut Lower<'_>, bufs: &Bufs, count: &Expr, wanted: &Expr, high: Expr, depth: usize, threshold: Var) {
    let high = cx.local(high);
    let found = cx.local(i32c(0));
    cx.each(0, depth, |cx, _| {
        cx.when(Expr::from(found).eq(i32c(0)), |cx| {
            let middle = cx.bind(threshold + (high - Expr::from(threshold)).sar(1));
            let below = cx.bind(&middle - i32c(1));
            let above = cx.sum(0, count, |_, i| below.clone().lt(Expr::load(bufs.left, i)).cast(Ty::I32));
            let above = cx.bind(above);
            let enough = cx.bind(wanted.clone().le(&above));
            cx.set(threshold, enough.clone().select(&middle, threshold));
            cx.set(high, enough.select(high, middle));
            cx.set(found, above.eq(wanted).cast(Ty::I32));
        });
    });
}

/// Put the energy of the signs, those from key `flipped` on flipped, as statistic `at`.
fn energy(op: &SpanKnot, cx: &mut Lower<'_>, bufs: &Bufs, token: &Token, flipped: Option<Var>, at: usize) {
    let (n, [w1, w2, w3]) = (f64c(op.bits as f64), op.weights);
    let sums = cx.reduce(0, op.bits, |cx, i| {
        let x = cx.bind(Expr::load(bufs.a, &i));
        let start = sign(x.clone());
        let end = match flipped {
            Some(from) => {
                let start = cx.bind(start);
                Expr::from(from).le(Expr::load(bufs.key, &i)).select(-start.clone(), start)
            }
            None => start,
        };
        let end = cx.bind(end);
        let coherence = &end * sign(Expr::load(bufs.counters, &bufs.row + &i));
        let binding = &end * sign(bound(bufs, token, &i));
        vec![Acc::Sum(&end * x), Acc::Sum(coherence), Acc::Sum(binding)]
    });
    let [auto, coherence, binding] = [0, 1, 2].map(|k| sums[k].clone().cast(Ty::F64));
    let half = |w: f64, sum: Expr| f64c(w) * (f64c(1.0) - sum / &n) / f64c(2.0);
    let coherence = token.first.clone().select(f64c(0.0), half(w2, coherence));
    let auto = f64c(-w1) * auto / (&n * token.rho.clone().max(f64c(1.0)));
    let energy = auto + coherence + half(w3, binding);
    cx.put(1, &token.index * 3 + at, energy.cast(Ty::F32));
}
