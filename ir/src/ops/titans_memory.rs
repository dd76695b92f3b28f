//! The Titans memory: a small network per head that is trained at test time and read before it sees a token.

mod chunk;

use super::{
    Accuracy, Axis, Flops, InferError, OpDef, TitansGrad, VjpCx,
    heads::{
        chains, clear, dots, expect, expect_weight, operands, sample_between, sample_positions, sample_state, split,
        with_operand,
    },
};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Acc, Buf, Expr, Ty, f32c, i32c, math},
    lower::Lower,
};

/// For every row and head a memory `M(x) = x + W2 silu(W1 x)` with momentum `S` and an anchor `A`, the weights at the last position
/// that is a multiple of `inner`. With gradients of `|M_A(k) - v|^2` at the anchor:
///
/// ```text
/// h_t = M_(t-1)(q_t) ;  u = A1 k ; z = silu(u) ; r = 2 (k + A2 z - v) ; d = (A2^T r) silu'(u)
/// S1 = eta S1 - theta d k^T ;  S2 = eta S2 - theta r z^T ;  W = (1 - alpha) W + S
/// ```
///
/// `(q, k, v [R,T,H*K], alpha, eta, theta [R,T,H], pos [R,T], init1 [H,m,K] or [G,H,m,K], init2 [H,K,m] or [G,H,K,m], W1, S1, A1
/// [R,H,m,K], W2, S2, A2 [R,H,K,m] if carried) -> (h [R,T,H*K], surprise |r| [R,T,H], then the state if carried)`.
/// Where `pos = 0` the weights are the initial ones and the momentum is zero. A state that is not carried starts as zeros.
/// `alpha` is at most 0.999 and `eta` at least 1e-6. Source: component semantics 7.1 and 7.2 with erratum 1.
#[derive(Clone, Debug, PartialEq)]
pub struct TitansMemory {
    /// H.
    pub heads: usize,
    /// Tokens that share an anchor; part of the meaning.
    pub inner: usize,
    /// Whether both gradients of a token are divided by `1 + |z|^2 + |d|^2 / |r|^2`.
    pub normalise: bool,
    /// Whether the tokens of an anchor are treated together. Results agree within rounding.
    pub chunked: bool,
    /// Whether the state is an operand, updated in place.
    pub carry: bool,
}

const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const ALPHA: usize = 3;
const ETA: usize = 4;
const THETA: usize = 5;
const POS: usize = 6;
const INIT: usize = 7;
const STATE: usize = 9;

const MAX_ALPHA: f32 = 0.999;
const MIN_ETA: f32 = 1e-6;

impl OpDef for TitansMemory {
    const NAME: &'static str = "titans_memory";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        operands(Self::NAME, ins, if self.carry { 15 } else { 9 })?;
        let (r, t, k) = split(Self::NAME, "q", &ins[Q], self.heads)?;
        let gate = Type::f32(&[r, t, self.heads]);
        expect(Self::NAME, "k", &ins[K], &ins[Q])?;
        expect(Self::NAME, "v", &ins[V], &ins[Q])?;
        for (at, name) in [(ALPHA, "alpha"), (ETA, "eta"), (THETA, "theta")] {
            expect(Self::NAME, name, &ins[at], &gate)?;
        }
        expect(Self::NAME, "pos", &ins[POS], &Type::i32(&[r, t]))?;
        let m = ins[INIT].dims.iter().rev().nth(1).copied().unwrap_or(1);
        if self.inner == 0 {
            return Err(InferError::new(Self::NAME, "inner is 0, expected at least 1"));
        }
        expect_weight(Self::NAME, "init1", &ins[INIT], &Type::f32(&[self.heads, m, k]), r)?;
        let mut second = ins[INIT].clone();
        let rank = second.dims.len();
        second.dims.swap(rank - 2, rank - 1);
        expect(Self::NAME, "init2", &ins[INIT + 1], &second)?;
        for (at, s) in ins[STATE..].iter().enumerate() {
            let dims = if at < 3 { [r, self.heads, m, k] } else { [r, self.heads, k, m] };
            expect(Self::NAME, "the state", s, &Type::f32(&dims))?;
        }
        Ok([ins[Q].clone(), gate].iter().chain(&ins[STATE..]).cloned().collect())
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let [rows, tokens, d] = ins[Q].ty.dims[..] else { unreachable!("checked by infer") };
        let (h_n, k_n) = (self.heads, d / self.heads);
        let [q, k, v, alpha, eta, theta] = [Q, K, V, ALPHA, ETA, THETA].map(|x| ins[x].as_f32());
        let pos = ins[POS].to_i64();
        let init = [INIT, INIT + 1].map(|x| ins[x].as_f32());
        let m_n = ins[INIT].ty.dims.iter().rev().nth(1).copied().expect("init1 is a matrix");
        let size = m_n * k_n;
        let ratio = rows / (init[0].len() / (h_n * size));
        let mut state: Vec<Vec<f32>> = match self.carry {
            true => ins[STATE..].iter().map(|s| s.as_f32().to_vec()).collect(),
            false => vec![vec![0.0; rows * h_n * size]; 6],
        };
        let (mut reads, mut surprise) = (vec![0.0; q.len()], vec![0.0; alpha.len()]);
        let matvec = |w: &[f32], x: &[f32]| -> Vec<f32> {
            w.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
        };
        let square = |x: &[f32]| x.iter().map(|a| a * a).sum::<f32>();
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        for (r, t, h) in (0..rows).flat_map(|r| (0..tokens).flat_map(move |t| (0..h_n).map(move |h| (r, t, h)))) {
            let row = r * tokens + t;
            let (cols, gate) = ((row * h_n + h) * k_n..(row * h_n + h + 1) * k_n, row * h_n + h);
            let (q, k, v) = (&q[cols.clone()], &k[cols.clone()], &v[cols.clone()]);
            let part = (r * h_n + h) * size..(r * h_n + h + 1) * size;
            let mut parts = state.iter_mut().map(|s| &mut s[part.clone()]);
            let [w1, s1, a1, w2, s2, a2]: [&mut [f32]; 6] =
                std::array::from_fn(|_| parts.next().expect("the state has six tensors"));
            for (w, s, a, init) in [(&mut *w1, &mut *s1, &mut *a1, init[0]), (&mut *w2, &mut *s2, &mut *a2, init[1])] {
                if pos[row] == 0 {
                    w.copy_from_slice(&init[(r / ratio * h_n + h) * size..][..size]);
                    s.fill(0.0);
                }
                if pos[row] % self.inner as i64 == 0 {
                    a.copy_from_slice(w);
                }
            }
            let hidden: Vec<f32> = matvec(w1, q).into_iter().map(|u| u * sigmoid(u)).collect();
            for (i, x) in matvec(w2, &hidden).into_iter().enumerate() {
                reads[cols.start + i] = q[i] + x;
            }
            let u = matvec(a1, k);
            let z: Vec<f32> = u.iter().map(|u| u * sigmoid(*u)).collect();
            let mut g2: Vec<f32> = matvec(a2, &z).iter().zip(k).zip(v).map(|((x, k), v)| 2.0 * (k + x - v)).collect();
            let slope = |u: f32| sigmoid(u) * (1.0 + u * (1.0 - sigmoid(u)));
            let back = |m: usize| (0..k_n).map(|i| g2[i] * a2[i * m_n + m]).sum::<f32>();
            let mut g1: Vec<f32> = (0..m_n).map(|m| back(m) * slope(u[m])).collect();
            let r2 = square(&g2);
            surprise[gate] = r2.sqrt();
            if self.normalise {
                let scale = 1.0 / (1.0 + square(&z) + square(&g1) / (r2 + 1e-12));
                g1.iter_mut().chain(&mut g2).for_each(|x| *x *= scale);
            }
            let (alpha, eta, theta) = (alpha[gate].min(MAX_ALPHA), eta[gate].max(MIN_ETA), theta[gate]);
            for (w, s, left, right) in [(w1, s1, &g1, k), (w2, s2, &g2, &z[..])] {
                for (i, (w, s)) in w.iter_mut().zip(s).enumerate() {
                    *s = eta * *s - theta * (left[i / right.len()] * right[i % right.len()]);
                    *w = (1.0 - alpha) * *w + *s;
                }
            }
        }
        let mut results = vec![Tensor::f32(&ins[Q].ty.dims, reads), Tensor::f32(&ins[ALPHA].ty.dims, surprise)];
        if self.carry {
            results.extend(state.into_iter().zip(&ins[STATE..]).map(|(s, x)| Tensor::f32(&x.ty.dims, s)));
        }
        results
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let Some(dy) = cx.grads[0] else { return Ok(vec![None; cx.ins.len()]) };
        let ins: Vec<Value> =
            cx.ins[..STATE].iter().copied().chain([dy]).chain(cx.ins[STATE..].iter().copied()).collect();
        let Self { heads, inner, normalise, carry, .. } = *self;
        let mut outs = cx.graph.ops(TitansGrad { heads, inner, normalise, carry }, &ins)?;
        for (at, input) in [(POS, INIT), (POS + 1, INIT + 1)] {
            outs[at] = cx.over_rows(outs[at], cx.ins[input])?;
        }
        let (first, last) = outs.split_at(POS);
        let some = |v: &Value| Some(*v);
        // The state of earlier calls is a constant.
        let rest = cx.ins[STATE..].iter().map(|_| None);
        Ok(first.iter().map(some).chain([None]).chain(last.iter().map(some)).chain(rest).collect())
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        let (k, m) = (ins[Q].cols() / self.heads, ins[INIT].dims.iter().rev().nth(1).copied().unwrap_or(1));
        let each = if self.chunked { 2 * (11 * k * m + 2 * self.inner * (k + m)) } else { 20 * k * m };
        Flops::float(ins[Q].rows() * self.heads * (each + 40 * m))
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let [rows, tokens, d] = cx.ty(Q).dims[..] else { unreachable!("checked by infer") };
        let k = d / self.heads;
        let m = cx.ty(INIT).dims.iter().rev().nth(1).copied().expect("init1 is a matrix");
        let ratio = rows / (cx.ty(INIT).numel() / (d * m));
        let at = cx.grid(rows * self.heads);
        let (r, h) = (cx.bind(&at / self.heads), cx.bind(&at % self.heads));
        let init = cx.bind((&r / ratio * self.heads + &h) * (k * m));
        let row0 = cx.bind(r * tokens);
        let (state, base) = match self.carry {
            true => (std::array::from_fn(|s| cx.buf(STATE + s)), cx.bind(at * (k * m))),
            false => (std::array::from_fn(|_| cx.scratch("memory", DType::F32, k * m)), Expr::from(0)),
        };
        let f = Frame { op: self, tokens, k, m, row0, h, init, state, base };
        if !self.carry {
            f.state.iter().for_each(|&s| clear(cx, s, &f.base, k * m));
        }
        if self.chunked && tokens > 1 {
            f.chunks(cx);
        } else {
            let sc = [("hidden", m), ("z", m), ("slope", m), ("r", k)].map(|(n, len)| cx.scratch(n, DType::F32, len));
            cx.each(0, tokens, |cx, t| f.step(cx, &sc, &t));
        }
    }

    fn updates(&self) -> Vec<(usize, usize)> {
        if self.carry { (0..6).map(|s| (STATE + s, 2 + s)).collect() } else { vec![] }
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        let mut axes = vec![Axis::Rows; ins.len()];
        axes[INIT..INIT + 2].fill(Axis::Weight { rank: 3 });
        axes
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 5e-5, atol: 1e-5 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |op: TitansMemory, (r, t, k, m): (usize, usize, usize, usize), groups: Option<usize>| {
            let (qkv, gate) = (Type::f32(&[r, t, op.heads * k]), Type::f32(&[r, t, op.heads]));
            let weight = |a, b| Type::f32(&groups.into_iter().chain([op.heads, a, b]).collect::<Vec<_>>());
            let mut ins = vec![qkv.clone(), qkv.clone(), qkv, gate.clone(), gate.clone(), gate, Type::i32(&[r, t])];
            ins.extend([weight(m, k), weight(k, m)]);
            if op.carry {
                ins.extend(vec![Type::f32(&[r, op.heads, m, k]); 3]);
                ins.extend(vec![Type::f32(&[r, op.heads, k, m]); 3]);
            }
            (op, ins)
        };
        let op = |inner, normalise, chunked, carry| TitansMemory { heads: 2, inner, normalise, chunked, carry };
        vec![
            of(op(4, true, false, true), (3, 11, 5, 6), None),
            of(op(1, false, false, false), (2, 5, 4, 4), Some(2)),
            of(op(16, true, false, true), (2, 1, 8, 8), None),
            of(op(4, true, true, true), (4, 11, 5, 6), Some(2)),
            of(op(8, false, true, true), (2, 37, 24, 24), None),
            of(op(16, true, true, false), (2, 21, 8, 12), None),
            of(op(3, true, true, true), (2, 2, 4, 4), None),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        let width = (ty.cols() / self.heads) as f32;
        match k {
            Q | K => sample_between(ty, -width.powf(-0.5), width.powf(-0.5), random),
            ALPHA => sample_between(ty, 0.0, 0.1, random),
            ETA => sample_between(ty, 0.0, 0.9, random),
            THETA => sample_between(ty, 0.0, 0.05, random),
            POS => sample_positions(ty),
            k if k >= STATE => sample_state(ty, 0.3, random),
            k if k >= INIT => sample_between(ty, -0.4, 0.4, random),
            _ => super::random_tensor(ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, ins) = Self::samples().remove(0);
        let with = with_operand;
        vec![
            with(K, Type::f32(&[3, 11, 12])),
            with(ETA, Type::f32(&[3, 11, 1])),
            with(POS, Type::i32(&[3])),
            with(INIT, Type::f32(&[2, 5, 6])),
            with(INIT, Type::f32(&[6])),
            with(INIT + 1, Type::f32(&[2, 6, 5])),
            with(STATE, Type::f32(&[3, 2, 5, 6])),
            with(STATE + 5, Type::f32(&[3, 2, 6, 5])),
            (TitansMemory { inner: 0, ..op.clone() }, ins.clone()),
            (TitansMemory { carry: false, ..op.clone() }, ins.clone()),
        ]
    }
}

/// One head of one row.
struct Frame<'a> {
    op: &'a TitansMemory,
    tokens: usize,
    k: usize,
    m: usize,
    /// Row of the first token.
    row0: Expr,
    h: Expr,
    /// Where the head starts in the initial weights.
    init: Expr,
    /// W1, S1, A1, W2, S2, A2.
    state: [Buf; 6],
    /// Where the head starts in the state.
    base: Expr,
}

impl Frame<'_> {
    /// Index of the first column of this head in an operand of `width` columns a head.
    fn column(&self, row: &Expr, width: usize) -> Expr {
        (row * self.op.heads + &self.h) * width
    }

    /// alpha, eta and theta of the token in `row`, within their bounds.
    fn gates(&self, cx: &mut Lower<'_>, row: &Expr) -> [Expr; 3] {
        let at = cx.bind(self.column(row, 1));
        let [alpha, eta, theta] = [ALPHA, ETA, THETA].map(|g| Expr::load(cx.buf(g), &at));
        [cx.bind(alpha.min(f32c(MAX_ALPHA))), cx.bind(eta.max(f32c(MIN_ETA))), cx.bind(theta)]
    }

    /// Whether an anchor is set at the token in `row`.
    fn anchors(&self, cx: &mut Lower<'_>, row: &Expr) -> Expr {
        let pos = Expr::load(cx.buf(POS), row).cast(Ty::I64);
        (pos % self.op.inner).eq(Expr::from(0))
    }

    /// Resets at the start of a document and sets the anchor.
    fn start(&self, cx: &mut Lower<'_>, row: &Expr) {
        let (size, base) = (self.k * self.m, &self.base);
        let [w1, s1, a1, w2, s2, a2] = self.state;
        let inits = [INIT, INIT + 1].map(|i| cx.buf(i));
        let first = Expr::load(cx.buf(POS), row).eq(i32c(0));
        cx.when(first, |cx| {
            for (w, s, init) in [(w1, s1, inits[0]), (w2, s2, inits[1])] {
                cx.lanes(0, size, 4, |cx, i| cx.store(w, base + &i, Expr::load(init, &self.init + i)));
                clear(cx, s, base, size);
            }
        });
        let anchors = self.anchors(cx, row);
        cx.when(anchors, |cx| {
            for (w, a) in [(w1, a1), (w2, a2)] {
                cx.lanes(0, size, 4, |cx, i| cx.store(a, base + &i, Expr::load(w, base + i)));
            }
        });
    }

    /// One token.
    fn step(&self, cx: &mut Lower<'_>, &[hidden, z, slope, r]: &[Buf; 4], t: &Expr) {
        let (k_n, m_n, base) = (self.k, self.m, &self.base);
        let [w1, s1, a1, w2, s2, a2] = self.state;
        let [q, k, v] = [Q, K, V].map(|x| cx.buf(x));
        let row = cx.bind(&self.row0 + t);
        self.start(cx, &row);
        let at = cx.bind(self.column(&row, k_n));
        let ends = |n: usize| (Expr::from(0), Expr::from(n));
        let first = |w: Buf| move |_: &mut Lower<'_>, i: &Expr, j: &Expr| Expr::load(w, base + i * k_n + j);
        let second = |w: Buf| move |_: &mut Lower<'_>, i: &Expr, j: &Expr| Expr::load(w, base + i * m_n + j);
        let input = |x: Buf| {
            let at = at.clone();
            move |_: &mut Lower<'_>, j: &Expr| Expr::load(x, &at + j)
        };
        let of = |x: Buf| move |_: &mut Lower<'_>, j: &Expr| Expr::load(x, j);

        dots(cx, ends(m_n), k_n, &first(w1), &input(q), &|cx, i, x| cx.store(hidden, i, x));
        cx.lanes(0, m_n, 2, |cx, i| {
            let h = math::silu(cx, Expr::load(hidden, &i));
            cx.store(hidden, i, h);
        });
        dots(cx, ends(k_n), m_n, &second(w2), &of(hidden), &|cx, i, x| cx.put(0, &at + i, Expr::load(q, &at + i) + x));

        dots(cx, ends(m_n), k_n, &first(a1), &input(k), &|cx, i, x| cx.store(z, i, x));
        cx.lanes(0, m_n, 2, |cx, i| {
            let u = cx.bind(Expr::load(z, &i));
            let s = math::sigmoid(cx, &u);
            cx.store(slope, &i, &s * (f32c(1.0) + &u * (f32c(1.0) - &s)));
            cx.store(z, i, u * s);
        });
        dots(cx, ends(k_n), m_n, &second(a2), &of(z), &|cx, i, x| {
            cx.store(r, i, f32c(2.0) * (Expr::load(k, &at + i) + x - Expr::load(v, &at + i)));
        });
        // From here on `slope` holds the first gradient.
        cx.lanes(0, m_n, chains(m_n), |cx, j| {
            let back = cx.local(f32c(0.0));
            cx.each(0, k_n, |cx, i| {
                let w = Expr::load(a2, base + &i * m_n + &j);
                cx.set(back, Expr::load(r, i).fma(w, back));
            });
            cx.store(slope, &j, back * Expr::load(slope, &j));
        });
        let square = |x: Buf| move |_: &mut Lower<'_>, i: Expr| vec![Acc::Dot(Expr::load(x, &i), Expr::load(x, i))];
        let r2 = cx.reduce(0, k_n, square(r)).remove(0);
        cx.put(1, self.column(&row, 1), r2.clone().sqrt());
        let [alpha, eta, theta] = self.gates(cx, &row);
        let rate = if self.op.normalise {
            let z2 = cx.reduce(0, m_n, square(z)).remove(0);
            let d2 = cx.reduce(0, m_n, square(slope)).remove(0);
            cx.bind(theta / (f32c(1.0) + z2 + d2 / (r2 + f32c(1e-12))))
        } else {
            theta
        };
        let keep = cx.bind(f32c(1.0) - alpha);
        for (w, s, left, n, right, at, width) in
            [(w1, s1, slope, m_n, k, at.clone(), k_n), (w2, s2, r, k_n, z, Expr::from(0), m_n)]
        {
            cx.each(0, n, |cx, i| {
                let factor = cx.bind(-(&rate * Expr::load(left, &i)));
                let row = cx.bind(base + i * width);
                cx.lanes(0, width, 4, |cx, j| {
                    let to = cx.bind(&row + &j);
                    let moved = factor.fma(Expr::load(right, &at + j), &eta * Expr::load(s, &to));
                    let moved = cx.bind(moved);
                    cx.store(s, &to, &moved);
                    cx.store(w, &to, keep.clone().fma(Expr::load(w, &to), moved));
                });
            });
        }
    }
}
