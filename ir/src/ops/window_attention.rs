//! Attention over persistent slots, a sliding window of the document, and one slot read from a memory.

mod softmax;

use super::{
    Accuracy, Axis, Flops, InferError, OpDef, VjpCx, WindowGrad,
    heads::{expect, expect_weight, operands, sample_positions, split, with_operand},
};
use crate::{
    DType, Data, Tensor, Type, Value,
    loops::{Buf, Expr, Ty, i32c},
    lower::Lower,
};

/// For every token and head the average of values weighted by the softmax of scores, all divided by `sqrt(K)`:
///
/// * persistent slot `p`: score `q pk_p`, value `pv_p`;
/// * token `lag` steps back, `lag < window` and `lag <= pos`: score `qr kr`, value `v`;
/// * the memory: score `q hn`, value `h`.
///
/// With a window: `(q, qr, kr, v [R,T,H*K], pk, pv [P,H*K] or [G,P,H*K], hn, h [R,T,H*K], pos [R,T], keys, values [R,window,H*K],
/// count i32 [R,H] if carried) -> (y [R,T,H*K], keys, values, count if carried)`. Token number `c` of a row is kept in slot
/// `c % window` of `keys` (as `kr`, already rotated) and `values`. `count` is the number of tokens that came before, the same for
/// all heads; from `window` on it counts `window + c % window`. Zeros mean a row without a token.
///
/// With `window` 0 there are no `qr`, `kr`, `keys`, `values` and `count`: `(q, v, pk, pv, hn, h, pos) -> y`.
/// Source: component semantics 7.3 with erratum 2.
#[derive(Clone, Debug, PartialEq)]
pub struct WindowAttention {
    /// H.
    pub heads: usize,
    /// Tokens that are visible, the current one included; 0 for none.
    pub window: usize,
    /// Whether the keys and values of earlier calls are operands, updated in place.
    pub carry: bool,
}

/// The places of the operands; `qr` and `kr` are those of `q` and `v` when there is no window.
struct Places {
    q: usize,
    qr: usize,
    kr: usize,
    v: usize,
    pk: usize,
    hn: usize,
    pos: usize,
}

impl WindowAttention {
    fn places(&self) -> Places {
        let n = if self.window > 0 { 2 } else { 0 };
        Places { q: 0, qr: n / 2, kr: n, v: 1 + n, pk: 2 + n, hn: 4 + n, pos: 6 + n }
    }

    fn cached(&self) -> bool {
        self.carry && self.window > 0
    }

    /// `count` after `n` tokens.
    fn counted(&self, n: usize) -> usize {
        if n < self.window { n } else { self.window + n % self.window }
    }
}

const STATE: usize = 9;

impl OpDef for WindowAttention {
    const NAME: &'static str = "window_attention";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        let at = self.places();
        operands(Self::NAME, ins, at.pos + 1 + if self.cached() { 3 } else { 0 })?;
        let (r, t, k) = split(Self::NAME, "q", &ins[0], self.heads)?;
        let d = self.heads * k;
        for (name, i) in [("qr", at.qr), ("kr", at.kr), ("v", at.v), ("hn", at.hn), ("h", at.hn + 1)] {
            expect(Self::NAME, name, &ins[i], &ins[0])?;
        }
        let slots = ins[at.pk].dims.iter().rev().nth(1).copied().unwrap_or(1);
        expect_weight(Self::NAME, "pk", &ins[at.pk], &Type::f32(&[slots, d]), r)?;
        expect(Self::NAME, "pv", &ins[at.pk + 1], &ins[at.pk])?;
        expect(Self::NAME, "pos", &ins[at.pos], &Type::i32(&[r, t]))?;
        if self.cached() {
            let cache = Type::f32(&[r, self.window, d]);
            expect(Self::NAME, "the keys", &ins[STATE], &cache)?;
            expect(Self::NAME, "the values", &ins[STATE + 1], &cache)?;
            expect(Self::NAME, "the count", &ins[STATE + 2], &Type::i32(&[r, self.heads]))?;
        }
        Ok(std::iter::once(&ins[0]).chain(&ins[at.pos + 1..]).cloned().collect())
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let [rows, tokens, d] = ins[0].ty.dims[..] else { unreachable!("checked by infer") };
        let (at, k_n, window) = (self.places(), d / self.heads, self.window);
        let part = |i: usize, row: usize, h: usize| &ins[i].as_f32()[row * d + h * k_n..][..k_n];
        let pos = ins[at.pos].to_i64();
        let slots = ins[at.pk].ty.dims.iter().rev().nth(1).copied().expect("pk is a matrix");
        let ratio = rows / (ins[at.pk].ty.numel() / (slots * d));
        let mut out = vec![0.0; rows * tokens * d];
        let before = |r: usize, h: usize| match self.cached() {
            true => ins[STATE + 2].to_i64()[r * self.heads + h].max(0) as usize,
            false => 0,
        };
        for (r, t, h) in (0..rows).flat_map(|r| (0..tokens).flat_map(move |t| (0..self.heads).map(move |h| (r, t, h))))
        {
            let row = r * tokens + t;
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            let q = part(at.q, row, h);
            let persistent = (0..slots).map(|p| (r / ratio) * slots + p);
            let mut slots: Vec<(f32, &[f32])> =
                persistent.map(|p| (dot(q, part(at.pk, p, h)), part(at.pk + 1, p, h))).collect();
            if window > 0 {
                let c = before(r, h) + t;
                for lag in 0..=c.min(window - 1).min(pos[row].max(0) as usize) {
                    let (keys, values, source) = match t.checked_sub(lag) {
                        Some(t) => (at.kr, at.v, r * tokens + t),
                        None => (STATE, STATE + 1, r * window + (c - lag) % window),
                    };
                    slots.push((dot(part(at.qr, row, h), part(keys, source, h)), part(values, source, h)));
                }
            }
            slots.push((dot(q, part(at.hn, row, h)), part(at.hn + 1, row, h)));
            let scale = (k_n as f32).powf(-0.5);
            let most = slots.iter().map(|s| s.0 * scale).fold(f32::NEG_INFINITY, f32::max);
            let weight = |s: &(f32, &[f32])| (s.0 * scale - most).exp();
            let total: f32 = slots.iter().map(weight).sum();
            for (i, y) in out[row * d + h * k_n..][..k_n].iter_mut().enumerate() {
                *y = slots.iter().map(|s| weight(s) * s.1[i]).sum::<f32>() / total;
            }
        }
        let mut results = vec![Tensor::f32(&ins[0].ty.dims, out)];
        if self.cached() {
            let mut caches = [ins[STATE].as_f32().to_vec(), ins[STATE + 1].as_f32().to_vec()];
            for (r, t, h) in
                (0..rows).flat_map(|r| (0..tokens).flat_map(move |t| (0..self.heads).map(move |h| (r, t, h))))
            {
                let slot = r * window + (before(r, h) + t) % window;
                for (cache, from) in caches.iter_mut().zip([at.kr, at.v]) {
                    cache[slot * d + h * k_n..][..k_n].copy_from_slice(part(from, r * tokens + t, h));
                }
            }
            results.extend(caches.map(|c| Tensor::f32(&ins[STATE].ty.dims, c)));
            let count = |i| self.counted(before(i / self.heads, i % self.heads) + tokens) as i32;
            results.push(Tensor::i32(&[rows, self.heads], (0..rows * self.heads).map(count).collect()));
        }
        results
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let Some(dy) = cx.grads[0] else { return Ok(vec![None; cx.ins.len()]) };
        let at = self.places();
        let (first, rest) = cx.ins.split_at(at.pos + 1);
        let ins: Vec<Value> = first.iter().copied().chain([dy]).chain(rest.iter().copied()).collect();
        let Self { heads, window, carry } = *self;
        let mut outs = cx.graph.ops(WindowGrad { heads, window, carry }, &ins)?;
        for slots in [at.pk, at.pk + 1] {
            outs[slots] = cx.over_rows(outs[slots], cx.ins[slots])?;
        }
        // Tokens of earlier calls are constants.
        Ok(outs.into_iter().map(Some).chain(cx.ins[at.pos..].iter().map(|_| None)).collect())
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        let slots = ins[self.places().pk].dims.iter().rev().nth(1).copied().unwrap_or(1);
        let seen = if self.carry { self.window } else { self.window.min(ins[0].dims[1].div_ceil(2)) };
        Flops::float(ins[0].numel() * 4 * (slots + seen + 1))
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let [rows, tokens, d] = cx.ty(0).dims[..] else { unreachable!("checked by infer") };
        let at = self.places();
        let slots = cx.ty(at.pk).dims.iter().rev().nth(1).copied().expect("pk is a matrix");
        let ratio = rows / (cx.ty(at.pk).numel() / (slots * d));
        let tile = if tokens < softmax::TILE / 4 { tokens } else { softmax::TILE };
        // A carried window is overwritten behind the last token, so one instance does all tokens of its head.
        let tiles = if self.cached() { 1 } else { tokens.div_ceil(tile) };
        let n = cx.grid(rows * self.heads * tiles);
        let first = cx.bind(&n % tiles * tile);
        let (r, h) = (cx.bind(&n / (self.heads * tiles)), cx.bind(n / tiles % self.heads));
        let f = Frame {
            at,
            d,
            k: d / self.heads,
            tokens,
            slots,
            window: self.window,
            row0: cx.bind(&r * tokens),
            p0: cx.bind(&r / ratio * slots),
            head: cx.bind(&h * (d / self.heads)),
            cache: None,
            r,
        };
        if !self.cached() {
            f.tile(cx, tile, &first);
            return;
        }
        let [keys, values, count] = [STATE, STATE + 1, STATE + 2].map(|s| cx.buf(s));
        let cell = cx.bind(&f.r * self.heads + h);
        // Where a document starts, the tokens before it stay in the ring and are out of reach.
        let before = cx.bind(Expr::load(count, &cell).max(i32c(0)).cast(Ty::I64));
        let f = Frame { cache: Some(Cache { keys, values, before: before.clone() }), ..f };
        cx.each_step(0, tokens, tile, |cx, first| f.tile(cx, tile, &first));
        let [kr, v] = [f.at.kr, f.at.v].map(|i| cx.buf(i));
        cx.each(tokens.saturating_sub(self.window), tokens, |cx, t| {
            let from = cx.bind((&f.row0 + &t) * d + &f.head);
            let to = cx.bind((&f.r * self.window + (&before + t) % self.window) * d + &f.head);
            cx.lanes(0, f.k, 4, |cx, c| {
                cx.store(keys, &to + &c, Expr::load(kr, &from + &c));
                cx.store(values, &to + &c, Expr::load(v, &from + c));
            });
        });
        let n = cx.bind(before + tokens);
        let wrapped = &n % self.window + self.window;
        cx.store(count, cell, n.clone().lt(Expr::from(self.window)).select(n, wrapped).cast(Ty::I32));
    }

    fn updates(&self) -> Vec<(usize, usize)> {
        if self.cached() { (0..3).map(|s| (STATE + s, 1 + s)).collect() } else { vec![] }
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        let (mut axes, pk) = (vec![Axis::Rows; ins.len()], self.places().pk);
        axes[pk..pk + 2].fill(Axis::Weight { rank: 2 });
        axes
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 2e-5, atol: 2e-6 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |op: WindowAttention, (r, t, k, p): (usize, usize, usize, usize), groups: Option<usize>| {
            let d = op.heads * k;
            let (x, slots) = (Type::f32(&[r, t, d]), groups.into_iter().chain([p, d]).collect::<Vec<_>>());
            let mut ins = vec![x.clone(); if op.window > 0 { 4 } else { 2 }];
            ins.extend([Type::f32(&slots), Type::f32(&slots), x.clone(), x, Type::i32(&[r, t])]);
            if op.cached() {
                ins.extend(vec![Type::f32(&[r, op.window, d]); 2]);
                ins.push(Type::i32(&[r, op.heads]));
            }
            (op, ins)
        };
        let op = |heads, window, carry| WindowAttention { heads, window, carry };
        vec![
            of(op(2, 5, true), (3, 11, 6, 3), None),
            of(op(2, 7, true), (4, 1, 8, 5), Some(2)),
            of(op(1, 3, true), (2, 3, 5, 1), None),
            of(op(2, 40, true), (2, 37, 24, 4), None),
            of(op(2, 6, false), (2, 37, 8, 4), Some(2)),
            of(op(1, 64, false), (2, 2, 4, 2), None),
            of(op(3, 0, false), (2, 19, 4, 5), None),
            of(op(2, 0, true), (2, 1, 4, 3), Some(1)),
            of(op(1, 1, true), (2, 5, 4, 2), None),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        match k {
            k if k == self.places().pos => sample_positions(ty),
            // Rows with no, some and more tokens than the window holds.
            k if k == STATE + 2 => {
                let cols = ty.cols();
                let count = |i: usize| self.counted([4, 0, 2 * self.window + 1][i / cols % 3]) as i32;
                Tensor { ty: ty.clone(), data: Data::I32((0..ty.numel()).map(count).collect()) }
            }
            _ => super::random_tensor(ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, ins) = Self::samples().remove(0);
        let with = with_operand;
        vec![
            with(0, Type::f32(&[3, 11, 11])),
            with(1, Type::f32(&[3, 11, 6])),
            with(4, Type::f32(&[3, 6])),
            with(5, Type::f32(&[4, 12])),
            with(7, Type::f32(&[11, 12])),
            with(8, Type::f32(&[3, 11])),
            with(STATE, Type::f32(&[3, 4, 12])),
            with(STATE + 2, Type::i32(&[3])),
            (WindowAttention { window: 0, ..op.clone() }, ins.clone()),
            (WindowAttention { carry: false, ..op.clone() }, ins.clone()),
        ]
    }
}

/// Keys and values of earlier calls.
struct Cache {
    keys: Buf,
    values: Buf,
    /// The number of tokens before this call.
    before: Expr,
}

/// One head of one row.
struct Frame {
    at: Places,
    d: usize,
    k: usize,
    tokens: usize,
    slots: usize,
    window: usize,
    r: Expr,
    /// Row of the first token.
    row0: Expr,
    /// Row of the first persistent slot.
    p0: Expr,
    /// First column.
    head: Expr,
    cache: Option<Cache>,
}
