//! The kernel of [`Random`]: lanes over counter blocks, then the words of a block are laid side by side.
//!
//! An instance owns [`BLOCKS`] consecutive blocks of one member; the last one stores fewer elements.

use super::{
    COS, Distribution, LN, LN_2, LN_SPLIT, MULTIPLIERS, QUARTER_TURN, ROUNDS, Random, SIN, TWO_POW_MINUS_23,
    TWO_POW_MINUS_24, WEYL, bits,
};
use crate::{
    DType,
    loops::{Bin, Buf, Builder, Cmp, Expr, Ty, f32c, i32c},
    lower::Lower,
};

/// Blocks of one grid instance, when the tensor has that many.
const BLOCKS: usize = 64;

pub(super) fn lower(op: &Random, cx: &mut Lower<'_>) {
    let (n, per) = (op.numel(), op.dist.per_block());
    let blocks = n.div_ceil(per).min(BLOCKS);
    let span = blocks * per;
    let chunks = n.div_ceil(span);
    let (seed, step, first, stream) = (cx.buf(0), cx.buf(1), cx.buf(2), cx.buf(3));
    let id = cx.grid(op.members.max(1) * chunks);
    let member = cx.bind(&id / chunks);
    let start = cx.bind(&id % chunks * span);
    let direction = cx.bind(Expr::load(first, 0) + member.clone().cast(Ty::I32));
    let step = cx.bind(Expr::load(step, 0));
    let stream = cx.bind(Expr::load(stream, 0));
    let mut key = [cx.bind(Expr::load(seed, 0)), cx.bind(Expr::load(seed, 1))];
    let mut keys = vec![];
    for _ in 0..ROUNDS {
        let next = [0, 1].map(|k| cx.bind(key[k].clone() + bits(WEYL[k])));
        keys.push(std::mem::replace(&mut key, next));
    }
    let float = matches!(op.dist, Distribution::Gaussian | Distribution::Uniform | Distribution::TernaryUniform);
    let dtype = if float { DType::F32 } else { DType::I32 };
    let staged: [Buf; 4] = [0, 1, 2, 3].map(|w| cx.scratch(&format!("word{w}"), dtype, blocks));
    let base = cx.bind(&start / per);
    cx.lanes(0, blocks, 1, |cx, j| {
        let block = cx.bind((&base + &j).cast(Ty::I32));
        let words = philox(&mut cx.b, [block, stream, step, direction], &keys);
        let values = match op.dist {
            Distribution::Rademacher => words,
            Distribution::Gaussian => {
                let [a, b, c, d] = words;
                let [a, b] = box_muller(&mut cx.b, a, b);
                let [c, d] = box_muller(&mut cx.b, c, d);
                [a, b, c, d]
            }
            Distribution::Uniform => words.map(|w| (w.shr(9).cast(Ty::F32) + f32c(0.5)) * f32c(TWO_POW_MINUS_23)),
            Distribution::TernaryUniform => words.map(|w| (Expr::bin(Bin::MulHi, w, i32c(3)) - i32c(1)).cast(Ty::F32)),
        };
        for (buf, value) in staged.iter().zip(values) {
            cx.store(*buf, &j, value);
        }
    });
    let out = cx.bind(&member * n + &start);
    let count = cx.bind(Expr::from(n) - &start);
    let count = cx.bind(count.min(Expr::from(span)));
    if float {
        interleave(cx, &staged, &out, &count);
    } else {
        unpack(op, cx, &staged, &out, &count);
    }
}

/// Element `4 j + w` is word `w` of block `j`.
fn interleave(cx: &mut Lower<'_>, staged: &[Buf; 4], out: &Expr, count: &Expr) {
    let full = cx.bind(count / 4);
    cx.each(0, &full, |cx, j| {
        for (w, buf) in staged.iter().enumerate() {
            cx.put(0, out + &j * 4 + w, Expr::load(*buf, &j));
        }
    });
    let rest = cx.bind(count - &full * 4);
    let last = Expr::from(cx.decl(staged[0]).len - 1);
    let last = cx.bind(full.clone().min(last));
    for (w, buf) in staged.iter().take(3).enumerate() {
        cx.when(Expr::from(w).lt(&rest), |cx| cx.put(0, out + &full * 4 + w, Expr::load(*buf, &last)));
    }
}

/// Element `128 j + 32 w + b` is bit `b` of word `w` of block `j`.
fn unpack(op: &Random, cx: &mut Lower<'_>, staged: &[Buf; 4], out: &Expr, count: &Expr) {
    let masks = cx.scratch("masks", DType::I32, 32);
    for b in 0..32 {
        cx.store(masks, b as usize, bits(1 << b));
    }
    let narrow = op.dtype == DType::I8;
    cx.each(0, (count + 127usize) / 128, |cx, j| {
        for (w, buf) in staged.iter().enumerate() {
            let word = cx.bind(Expr::load(*buf, &j));
            let lo = cx.bind(&j * 128 + 32 * w);
            let left = cx.bind((count - &lo).min(Expr::from(32)));
            cx.lanes(0, left, 2, |cx, b| {
                let clear = (&word & Expr::load(masks, &b)).eq(i32c(0));
                let value = if narrow { clear.select(i32c(1), i32c(-1)) } else { clear.select(f32c(1.0), f32c(-1.0)) };
                cx.put(0, out + &lo + b, value);
            });
        }
    });
}

fn philox(b: &mut Builder, counter: [Expr; 4], keys: &[[Expr; 2]]) -> [Expr; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    for [k0, k1] in keys {
        let high = |b: &mut Builder, c: &Expr, k: usize| b.bind(Expr::bin(Bin::MulHi, c.clone(), bits(MULTIPLIERS[k])));
        let (p, q) = (high(b, &c0, 0), high(b, &c2, 1));
        let low = [b.bind(c2 * bits(MULTIPLIERS[1])), b.bind(c0 * bits(MULTIPLIERS[0]))];
        c0 = b.bind(q ^ c1 ^ k0);
        c2 = b.bind(p ^ c3 ^ k1);
        [c1, c3] = low;
    }
    [c0, c1, c2, c3]
}

/// Plain products and sums only: the reference contracts nothing.
fn horner(b: &mut Builder, z: &Expr, coefficients: &[f32]) -> Expr {
    let first = f32c(coefficients[0]);
    coefficients[1..].iter().fold(first, |p, &c| b.bind(p * z + f32c(c)))
}

fn box_muller(b: &mut Builder, x0: Expr, x1: Expr) -> [Expr; 2] {
    let u = (x0.shr(8) + i32c(1)).cast(Ty::F32);
    let u = b.bind(u.to_bits());
    let m = b.bind(((&u & i32c(0x007f_ffff)) | i32c(0x3f80_0000)).from_bits());
    let big = b.bind(f32c(LN_SPLIT).lt(&m));
    let e = b.bind(u.shr(23) + big.clone().select(i32c(1 - 127 - 24), i32c(-127 - 24)));
    let f = b.bind(big.select(&m * f32c(0.5), &m) - f32c(1.0));
    let s = b.bind(&f / (&f + f32c(2.0)));
    let z = b.bind(&s * &s);
    let p = horner(b, &z, &LN);
    let ln = b.bind(e.cast(Ty::F32) * f32c(LN_2) + (&s * f32c(2.0) + (&s * &z) * p));
    let r = b.bind((ln * f32c(-2.0)).sqrt());
    let y = (x1.clone().shr(6) & i32c(0x00ff_ffff)).cast(Ty::F32) * f32c(TWO_POW_MINUS_24) - f32c(0.5);
    let t = b.bind(y * f32c(QUARTER_TURN));
    let z = b.bind(&t * &t);
    let s = horner(b, &z, &SIN);
    let s = b.bind(&t + (&t * &z) * s);
    let c = horner(b, &z, &COS);
    // Quadrants 0..4: cos = c, -s, -c, s and sin = s, c, -s, -c.
    let q = b.bind(x1.shr(30));
    let odd = b.bind((&q & i32c(1)).cmp(Cmp::Ne, i32c(0)));
    let (cos, sin) = (b.bind(odd.clone().select(&s, &c)), b.bind(odd.select(&c, &s)));
    let flip_cos = b.bind(((&q + i32c(1)) & i32c(2)).shl(30));
    let flip_sin = b.bind((q & i32c(2)).shl(30));
    [flip_cos, flip_sin]
        .into_iter()
        .zip([cos, sin])
        .map(|(flip, x)| b.bind(&r * (x.to_bits() ^ flip).from_bits()))
        .collect::<Vec<_>>()
        .try_into()
        .expect("two values")
}
