//! What the operations over heads share: shape checks, loops over blocks of rows, and documents for samples.
//!
//! Columns of activations `[R, T, H * K]` are ordered by head: column `h * K + k`.

use super::{InferError, OpDef};
use crate::{
    DType, Tensor, Type,
    loops::{Acc, Buf, Expr, f32c, math},
    lower::Lower,
};

/// Minus infinity of stabilisers and masks: finite, so that no difference of two of them is NaN.
pub(super) const NEG: f32 = -1.0e30;

/// Rows that chunked forms treat at a time, so that what lies above the diagonal is mostly skipped.
pub(super) const BLOCK: usize = 16;

/// Refuse a wrong number of operands.
pub(super) fn operands(op: &'static str, ins: &[Type], n: usize) -> Result<(), InferError> {
    let found = ins.len();
    if found == n { Ok(()) } else { Err(InferError::new(op, format!("takes {n} operands, found {found}"))) }
}

/// Refuse an operand whose type is not the expected one.
pub(super) fn expect(op: &'static str, what: &str, found: &Type, want: &Type) -> Result<(), InferError> {
    if found == want { Ok(()) } else { Err(InferError::new(op, format!("{what} is {found}, expected {want}"))) }
}

/// Refuse a weight that is neither `want` nor groups of it, `[G, ..want]` with `G` dividing the batch rows.
pub(super) fn expect_weight(
    op: &'static str,
    what: &str,
    found: &Type,
    want: &Type,
    rows: usize,
) -> Result<(), InferError> {
    let grouped = found.dtype == want.dtype
        && found.dims.len() == want.dims.len() + 1
        && found.dims[1..] == want.dims[..]
        && rows.is_multiple_of(found.dims[0]);
    if grouped { Ok(()) } else { expect(op, what, found, want) }
}

/// `[R, T, H * K]` of an activation as `(R, T, K)`.
pub(super) fn split(
    op: &'static str,
    what: &str,
    ty: &Type,
    heads: usize,
) -> Result<(usize, usize, usize), InferError> {
    match ty.dims[..] {
        [r, t, c] if *ty == Type::f32(&[r, t, c]) && heads > 0 && c.is_multiple_of(heads) => Ok((r, t, c / heads)),
        _ => Err(InferError::new(op, format!("{what} is {ty}, expected f32[rows, tokens, {heads} heads * size]"))),
    }
}

/// Weights below this power of e are zero.
const FADED: f32 = -60.0;

/// `e^x` of what a token or a state weighs relative to another one; 0 where it has faded. What such a weight multiplies is then never so
/// small that the processor has to normalise it.
pub(super) fn fade(cx: &mut Lower<'_>, x: Expr) -> Expr {
    let x = cx.bind(x);
    let e = math::exp(cx, &x);
    // What is not a number stays that.
    x.lt(f32c(FADED)).select(f32c(0.0), e)
}

/// Vectors of lanes worth interleaving over `n` contiguous columns when every lane is one chain of multiply-adds.
pub(super) fn chains(n: usize) -> u8 {
    (n / 4).clamp(1, 8) as u8
}

/// Store zero to `len` elements from `base`.
pub(super) fn clear(cx: &mut Lower<'_>, buf: Buf, base: &Expr, len: usize) {
    cx.lanes(0, len, 4, |cx, i| cx.store(buf, base + i, f32c(0.0)));
}

/// `n` rows in blocks of [`BLOCK`]: `f` receives the first row and the number of rows.
pub(super) fn row_blocks(cx: &mut Lower<'_>, n: usize, f: &dyn Fn(&mut Lower<'_>, &Expr, usize)) {
    let full = n / BLOCK * BLOCK;
    if full > 0 {
        cx.each_step(0, full, BLOCK, |cx, i| f(cx, &i, BLOCK));
    }
    if n > full {
        f(cx, &Expr::from(full), n - full);
    }
}

/// A recurrence that is gone through forward, then back. States are kept at the starts of pieces of about `sqrt(T)` tokens and made
/// again inside a piece on the way back.
pub(super) struct Pieces {
    tokens: usize,
    piece: usize,
    /// Elements of a state.
    size: usize,
    /// States at the starts of pieces.
    marks: Buf,
    /// States before and behind the tokens of a piece. The caller first puts the state before the first token at the begin.
    pub(super) states: Buf,
}

impl Pieces {
    pub(super) fn new(cx: &mut Lower<'_>, tokens: usize, size: usize) -> Pieces {
        let piece = (1..=tokens).find(|n| n * n >= tokens).unwrap_or(1);
        let marks = cx.scratch("marks", DType::F32, tokens.div_ceil(piece) * size);
        let states = cx.scratch("states", DType::F32, (piece + 1) * size);
        Pieces { tokens, piece, size, marks, states }
    }

    /// Go through all tokens: `step(t, from, to)` makes the state at `to` of `states` from the one before token `t`; `back(t, from)`
    /// hears of the tokens in reverse, with both states there.
    pub(super) fn there_and_back(
        &self,
        cx: &mut Lower<'_>,
        step: &dyn Fn(&mut Lower<'_>, &Expr, &Expr, &Expr),
        back: &dyn Fn(&mut Lower<'_>, &Expr, &Expr),
    ) {
        let Pieces { tokens, piece, size, marks, states } = *self;
        let (pieces, start) = (tokens.div_ceil(piece), Expr::from(0));
        cx.each(0, pieces, |cx, p| {
            let mark = cx.bind(&p * size);
            cx.lanes(0, size, 4, |cx, i| cx.store(marks, &mark + &i, Expr::load(states, i)));
            let end = cx.bind((&p * piece + piece).min(Expr::from(tokens)));
            cx.each(p * piece, end, |cx, t| step(cx, &t, &start, &start));
        });
        cx.each(0, pieces, |cx, p| {
            let p = cx.bind(Expr::from(pieces - 1) - p);
            let mark = cx.bind(&p * size);
            cx.lanes(0, size, 4, |cx, i| cx.store(states, &i, Expr::load(marks, &mark + &i)));
            let first = cx.bind(p * piece);
            let n = cx.bind((Expr::from(tokens) - &first).min(Expr::from(piece)));
            cx.each(0, &n, |cx, i| {
                let from = cx.bind(&i * size);
                let to = cx.bind(&from + size);
                step(cx, &(&first + i), &from, &to);
            });
            cx.each(0, &n, |cx, i| {
                let i = cx.bind(&n - 1 - i);
                let from = cx.bind(&i * size);
                back(cx, &(&first + i), &from);
            });
        });
    }
}

/// `T` tokens in chunks of `chunk`: `f` receives the first token and the number of tokens.
pub(super) fn chunks(cx: &mut Lower<'_>, tokens: usize, chunk: usize, f: &dyn Fn(&mut Lower<'_>, &Expr, usize)) {
    let full = tokens / chunk * chunk;
    if full > 0 {
        cx.each_step(0, full, chunk, |cx, s| f(cx, &s, chunk));
    }
    if tokens > full {
        f(cx, &Expr::from(full), tokens - full);
    }
}

/// A callback that gives an element of a matrix by row and column.
pub(super) type Entry<'f> = &'f dyn Fn(&mut Lower<'_>, &Expr, &Expr) -> Expr;

/// `store(i, sum over k of a(i, k) x(k))` for `lo <= i < hi`, where rows of `a` are contiguous: four rows share the loads of `x`.
pub(super) fn dots(
    cx: &mut Lower<'_>,
    (lo, hi): (Expr, Expr),
    k: usize,
    a: Entry<'_>,
    x: &dyn Fn(&mut Lower<'_>, &Expr) -> Expr,
    store: &dyn Fn(&mut Lower<'_>, &Expr, Expr),
) {
    let rows = |cx: &mut Lower<'_>, i: &Expr, n: usize| {
        let at: Vec<Expr> = (0..n).map(|r| cx.bind(i + r)).collect();
        let sums = cx.reduce(0, k, |cx, j| {
            let right = x(cx, &j);
            let right = cx.bind(right);
            at.iter().map(|i| Acc::Dot(a(cx, i, &j), right.clone())).collect()
        });
        for (i, sum) in at.iter().zip(sums) {
            store(cx, i, sum);
        }
    };
    let (lo, hi) = (cx.bind(lo), cx.bind(hi));
    let full = cx.bind(&lo + (&hi - &lo) / 4 * 4);
    cx.each_step(lo, full.clone(), 4, |cx, i| rows(cx, &i, 4));
    cx.each(full, hi, |cx, i| rows(cx, &i, 1));
}

/// Positions for samples: even rows continue a document at position 5, odd rows start one; every row starts another one in its
/// middle and a short one after that.
pub(super) fn sample_positions(ty: &Type) -> Tensor {
    let tokens = ty.cols();
    let mut pos = Vec::with_capacity(ty.numel());
    for row in 0..ty.rows() {
        let mut next = if row % 2 == 0 { 5 } else { 0 };
        for t in 0..tokens {
            if t > 0 && (t == tokens / 2 + row || t == tokens / 2 + row + 2) {
                next = 0;
            }
            pos.push(next);
            next += 1;
        }
    }
    Tensor::i32(&ty.dims, pos)
}

/// A carried state for samples: small numbers, and NaN in odd rows, which [`sample_positions`] makes the kernel ignore.
pub(super) fn sample_state(ty: &Type, scale: f32, random: &mut dyn FnMut() -> f32) -> Tensor {
    let each = ty.numel() / ty.dims[0];
    let data = (0..ty.numel()).map(|i| if i / each % 2 == 1 { f32::NAN } else { random() * scale });
    Tensor::f32(&ty.dims, data.collect())
}

/// Random numbers in `lo .. hi` for samples.
pub(super) fn sample_between(ty: &Type, lo: f32, hi: f32, random: &mut dyn FnMut() -> f32) -> Tensor {
    let data = (0..ty.numel()).map(|_| lo + (hi - lo) * 0.5 * (random() + 1.0));
    Tensor::f32(&ty.dims, data.collect())
}

/// The first sample of an operation with an operand of another type, for what it must refuse.
pub(super) fn with_operand<O: OpDef>(k: usize, ty: Type) -> (O, Vec<Type>) {
    let (op, mut ins) = O::samples().remove(0);
    ins[k] = ty;
    (op, ins)
}
