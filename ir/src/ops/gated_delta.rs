//! The gated delta rule: an associative memory with decay and targeted overwrite.

use super::{
    Accuracy, Flops, GatedDeltaGrad, InferError, OpDef, VjpCx,
    heads::{
        BLOCK, chains, chunks, clear, expect, operands, row_blocks, sample_between, sample_positions, sample_state,
        split, with_operand,
    },
};
use crate::{
    Tensor, Type, Value,
    loops::{Buf, Expr, f32c, i32c, math, tile::Product},
    lower::Lower,
};

/// For every row and head, with `q` scaled by `K^-1/2`:
///
/// ```text
/// S_t = e^(g_t) S_(t-1) ;  u = beta_t (v_t - S_t^T k_t) ;  S_t += k_t u^T ;  o_t = S_t^T q_t
/// ```
///
/// `(q, k [R,T,H*K], v [R,T,H*V], g, beta [R,T,H], pos [R,T], S [R,H,K,V] if carried) -> (o [R,T,H*V], S if carried)`.
/// `S` is zero where `pos = 0`, and at the start of every row when it is not carried. `g <= 0`.
/// Source: component semantics 5, there also the single-solve form of a chunk.
#[derive(Clone, Debug, PartialEq)]
pub struct GatedDelta {
    /// H.
    pub heads: usize,
    /// Tokens that are treated together; 0 for one at a time. Results agree within rounding.
    pub chunk: usize,
    /// Whether the state is an operand, updated in place.
    pub carry: bool,
}

const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const G: usize = 3;
const BETA: usize = 4;
const POS: usize = 5;
const STATE: usize = 6;

impl OpDef for GatedDelta {
    const NAME: &'static str = "gated_delta";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        operands(Self::NAME, ins, 6 + usize::from(self.carry))?;
        let (r, t, k) = split(Self::NAME, "q", &ins[Q], self.heads)?;
        let (_, _, v) = split(Self::NAME, "v", &ins[V], self.heads)?;
        let gate = Type::f32(&[r, t, self.heads]);
        expect(Self::NAME, "k", &ins[K], &ins[Q])?;
        expect(Self::NAME, "v", &ins[V], &Type::f32(&[r, t, self.heads * v]))?;
        expect(Self::NAME, "g", &ins[G], &gate)?;
        expect(Self::NAME, "beta", &ins[BETA], &gate)?;
        expect(Self::NAME, "pos", &ins[POS], &Type::i32(&[r, t]))?;
        let mut outs = vec![ins[V].clone()];
        if self.carry {
            expect(Self::NAME, "the state", &ins[STATE], &Type::f32(&[r, self.heads, k, v]))?;
            outs.push(ins[STATE].clone());
        }
        Ok(outs)
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (rows, tokens, h_n) = (ins[Q].ty.dims[0], ins[Q].ty.dims[1], self.heads);
        let (k_n, v_n) = (ins[Q].ty.dims[2] / h_n, ins[V].ty.dims[2] / h_n);
        let (q, k, v) = (ins[Q].as_f32(), ins[K].as_f32(), ins[V].as_f32());
        let (g, beta, pos) = (ins[G].as_f32(), ins[BETA].as_f32(), ins[POS].to_i64());
        let mut states = if self.carry { ins[STATE].as_f32().to_vec() } else { vec![0.0; rows * h_n * k_n * v_n] };
        let mut out = vec![0.0; v.len()];
        for (at, s) in states.chunks_exact_mut(k_n * v_n).enumerate() {
            let (r, h) = (at / h_n, at % h_n);
            for row in r * tokens..(r + 1) * tokens {
                let (qk, vo) = ((row * h_n + h) * k_n, (row * h_n + h) * v_n);
                if pos[row] == 0 {
                    s.fill(0.0);
                }
                let decay = g[row * h_n + h].exp();
                s.iter_mut().for_each(|x| *x *= decay);
                for j in 0..v_n {
                    let seen: f32 = (0..k_n).map(|i| s[i * v_n + j] * k[qk + i]).sum();
                    let u = beta[row * h_n + h] * (v[vo + j] - seen);
                    (0..k_n).for_each(|i| s[i * v_n + j] += k[qk + i] * u);
                    let read: f32 = (0..k_n).map(|i| s[i * v_n + j] * q[qk + i]).sum();
                    out[vo + j] = read * (k_n as f32).powf(-0.5);
                }
            }
        }
        let mut results = vec![Tensor::f32(&ins[V].ty.dims, out)];
        if self.carry {
            results.push(Tensor::f32(&ins[STATE].ty.dims, states));
        }
        results
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let Some(dy) = cx.grads[0] else { return Ok(vec![None; cx.ins.len()]) };
        let ins: Vec<Value> =
            cx.ins[..STATE].iter().copied().chain([dy]).chain(cx.ins[STATE..].iter().copied()).collect();
        let outs = cx.graph.ops(GatedDeltaGrad { heads: self.heads, carry: self.carry }, &ins)?;
        // The state of earlier calls is a constant.
        Ok(outs.into_iter().map(Some).chain(cx.ins[POS..].iter().map(|_| None)).collect())
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        let (k, v) = (ins[Q].cols() / self.heads, ins[V].cols() / self.heads);
        let c = self.chunk.min(ins[Q].dims[1]);
        let each = if c <= 1 { 7 * k * v } else { 2 * (c * k + c * v / 2 + c * v + 3 * k * v) + 10 * c / 2 };
        Flops::float(ins[Q].rows() * self.heads * each)
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, tokens) = (cx.ty(Q).dims[0], cx.ty(Q).dims[1]);
        let (k, v) = (cx.ty(Q).cols() / self.heads, cx.ty(V).cols() / self.heads);
        let at = cx.grid(rows * self.heads);
        let (r, h) = (cx.bind(&at / self.heads), cx.bind(&at % self.heads));
        let row0 = cx.bind(r * tokens);
        let (state, base) = if self.carry {
            (cx.buf(STATE), cx.bind(at * (k * v)))
        } else {
            (cx.scratch("state", crate::DType::F32, k * v), Expr::from(0))
        };
        let f = Frame { op: self, k, v, row0, h, state, base };
        if self.chunk == 0 || tokens == 1 {
            if !self.carry {
                clear(cx, state, &f.base, k * v);
            }
            cx.each(0, tokens, |cx, t| f.step(cx, &t));
            return;
        }
        if self.carry {
            let first = Expr::load(cx.buf(POS), &f.row0);
            cx.when(first.eq(i32c(0)), |cx| clear(cx, state, &f.base, k * v));
        } else {
            clear(cx, state, &f.base, k * v);
        }
        let chunk = self.chunk.min(tokens);
        let mut scratch = |name: &str, len: usize| cx.scratch(name, crate::DType::F32, len);
        let sc = Scratch {
            ld: chunk,
            kt: scratch("kt", k * chunk),
            sum: scratch("sum", chunk),
            carry: scratch("carry", chunk),
            d: scratch("d", chunk * chunk),
            a: scratch("a", chunk * chunk),
            p: scratch("p", chunk * chunk),
            u: scratch("u", chunk * v),
            o: scratch("o", BLOCK * v),
            doc: cx.scratch("doc", crate::DType::I32, chunk),
        };
        chunks(cx, tokens, chunk, &|cx, s, n| f.chunk(cx, &sc, s, n));
    }

    fn updates(&self) -> Vec<(usize, usize)> {
        if self.carry { vec![(STATE, 1)] } else { vec![] }
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 5e-5, atol: 1e-5 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |heads, chunk, carry, (r, t, k, v): (usize, usize, usize, usize)| {
            let gate = Type::f32(&[r, t, heads]);
            let qk = Type::f32(&[r, t, heads * k]);
            let mut ins = vec![qk.clone(), qk, Type::f32(&[r, t, heads * v]), gate.clone(), gate, Type::i32(&[r, t])];
            if carry {
                ins.push(Type::f32(&[r, heads, k, v]));
            }
            (GatedDelta { heads, chunk, carry }, ins)
        };
        vec![
            of(2, 0, true, (3, 7, 5, 3)),
            of(1, 0, false, (2, 5, 8, 8)),
            of(2, 0, true, (2, 1, 8, 12)),
            of(2, 4, true, (3, 11, 5, 9)),
            of(2, 20, true, (2, 37, 24, 27)),
            of(1, 16, false, (2, 33, 8, 8)),
            of(1, 64, false, (2, 3, 4, 4)),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        match k {
            Q | K => sample_between(ty, -0.4, 0.4, random),
            G => sample_between(ty, -1.5, 0.0, random),
            BETA => sample_between(ty, 0.0, 1.0, random),
            POS => sample_positions(ty),
            STATE => sample_state(ty, 0.5, random),
            _ => super::random_tensor(ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, ins) = Self::samples().remove(0);
        let with = with_operand;
        vec![
            with(Q, Type::f32(&[3, 7, 9])),
            with(K, Type::f32(&[3, 7, 12])),
            with(V, Type::f32(&[3, 6, 6])),
            with(G, Type::f32(&[3, 7, 1])),
            with(BETA, Type::f32(&[3, 7])),
            with(POS, Type::f32(&[3, 7])),
            with(STATE, Type::f32(&[3, 2, 3, 5])),
            (GatedDelta { heads: 0, ..op.clone() }, ins.clone()),
            (GatedDelta { carry: false, ..op.clone() }, ins.clone()),
        ]
    }
}

/// One head of one row.
struct Frame<'a> {
    op: &'a GatedDelta,
    k: usize,
    v: usize,
    /// Row of the first token.
    row0: Expr,
    h: Expr,
    state: Buf,
    /// Where the head starts in `state`.
    base: Expr,
}

/// Memory of one chunk; square matrices have `ld` columns.
struct Scratch {
    ld: usize,
    /// Keys, transposed.
    kt: Buf,
    /// Sums of `g` from the start of the chunk.
    sum: Buf,
    /// What remains of the incoming state at a token.
    carry: Buf,
    /// What remains of token `j` at token `i`; 0 where `j > i`.
    d: Buf,
    /// The negated strict lower triangle of the system.
    a: Buf,
    /// Scores.
    p: Buf,
    /// Right-hand side, then solution.
    u: Buf,
    /// Reads of the incoming state.
    o: Buf,
    /// Document of a token, 0 for the one of the incoming state.
    doc: Buf,
}

impl Frame<'_> {
    fn scale(&self) -> f32 {
        (self.k as f32).powf(-0.5)
    }

    /// Index of the first column of this head in an operand of `width` columns a head.
    fn column(&self, row: &Expr, width: usize) -> Expr {
        (row * self.op.heads + &self.h) * width
    }

    fn step(&self, cx: &mut Lower<'_>, t: &Expr) {
        let (state, base, v_n) = (self.state, &self.base, self.v);
        let [q, k, v, g, beta, pos] = [Q, K, V, G, BETA, POS].map(|i| cx.buf(i));
        let row = cx.bind(&self.row0 + t);
        cx.when(Expr::load(pos, &row).eq(i32c(0)), |cx| clear(cx, state, base, self.k * v_n));
        let qk = cx.bind(self.column(&row, self.k));
        let vo = cx.bind(self.column(&row, v_n));
        let gate = cx.bind(self.column(&row, 1));
        let decay = math::exp(cx, Expr::load(g, &gate));
        let beta = cx.bind(Expr::load(beta, gate));
        cx.lanes(0, v_n, chains(v_n), |cx, j| {
            let seen = cx.local(f32c(0.0));
            cx.each(0, self.k, |cx, i| {
                let s = Expr::load(state, base + &i * v_n + &j);
                cx.set(seen, Expr::load(k, &qk + i).fma(s, seen));
            });
            let u = cx.bind(&beta * (Expr::load(v, &vo + &j) - &decay * seen));
            let read = cx.local(f32c(0.0));
            cx.each(0, self.k, |cx, i| {
                let at = cx.bind(base + &i * v_n + &j);
                let s = cx.bind(Expr::load(k, &qk + &i).fma(&u, Expr::load(state, &at) * &decay));
                cx.store(state, at, &s);
                cx.set(read, Expr::load(q, &qk + i).fma(s, read));
            });
            cx.put(0, &vo + j, read * f32c(self.scale()));
        });
    }

    fn chunk(&self, cx: &mut Lower<'_>, sc: &Scratch, s: &Expr, n: usize) {
        let row0 = cx.bind(&self.row0 + s);
        self.decays(cx, sc, &row0, n);
        let k = cx.buf(K);
        cx.each(0, self.k, |cx, i| {
            let at = cx.bind(self.column(&row0, self.k) + &i);
            cx.lanes(0, n, 1, |cx, j| {
                cx.store(sc.kt, &i * sc.ld + &j, Expr::load(k, &at + j * (self.op.heads * self.k)));
            });
        });
        row_blocks(cx, n, &|cx, i0, rows| self.block(cx, sc, &row0, i0, rows));
        self.advance(cx, sc, n);
    }

    /// Decay factors between all tokens of a chunk, and from the incoming state.
    fn decays(&self, cx: &mut Lower<'_>, sc: &Scratch, row0: &Expr, n: usize) {
        let (g, pos) = (cx.buf(G), cx.buf(POS));
        let sum = cx.local(f32c(0.0));
        let doc = cx.local(i32c(0));
        cx.each(0, n, |cx, i| {
            let row = cx.bind(row0 + &i);
            cx.set(sum, sum + Expr::load(g, self.column(&row, 1)));
            cx.set(doc, doc + Expr::load(pos, row).eq(i32c(0)).select(i32c(1), i32c(0)));
            cx.store(sc.sum, &i, sum);
            cx.store(sc.doc, &i, doc);
            let e = math::exp(cx, sum);
            cx.store(sc.carry, i, Expr::from(doc).eq(i32c(0)).select(e, f32c(0.0)));
        });
        cx.each(0, n, |cx, i| {
            let (sum, doc) = (cx.bind(Expr::load(sc.sum, &i)), cx.bind(Expr::load(sc.doc, &i)));
            let row = cx.bind(&i * sc.ld);
            cx.lanes(0, &i + 1, 2, |cx, j| {
                let e = math::exp(cx, &sum - Expr::load(sc.sum, &j));
                let same = Expr::load(sc.doc, &j).eq(&doc);
                cx.store(sc.d, &row + j, same.select(e, f32c(0.0)));
            });
            cx.lanes(i + 1, n, 2, |cx, j| cx.store(sc.d, &row + j, f32c(0.0)));
        });
    }

    /// Rows `i0 .. i0 + rows` of the chunk: their part of the system, its solution, and the outputs.
    fn block(&self, cx: &mut Lower<'_>, sc: &Scratch, row0: &Expr, i0: &Expr, rows: usize) {
        let (ld, v_n, heads) = (sc.ld, self.v, self.op.heads);
        let [q, k, v, beta] = [Q, K, V, BETA].map(|i| cx.buf(i));
        let first = cx.bind(row0 + i0);
        let hi = cx.bind(i0 + rows);
        let qk = cx.bind(self.column(&first, self.k));
        let vo = cx.bind(self.column(&first, v_n));
        let gate = cx.bind(self.column(&first, 1));
        let m = cx.bind(i0 * ld);
        let ui = cx.bind(i0 * v_n);
        let rate = |i: &Expr| Expr::load(beta, &gate + i * heads);
        let carry = |i: &Expr| Expr::load(sc.carry, i0 + i);
        let state = |_: &mut Lower<'_>, k: &Expr, j: &Expr| Expr::load(self.state, &self.base + k * v_n + j);
        let keys = |_: &mut Lower<'_>, k: &Expr, j: &Expr| Expr::load(sc.kt, k * ld + j);
        let q_row = |_: &mut Lower<'_>, i: &Expr, c: &Expr| Expr::load(q, &qk + i * (heads * self.k) + c);
        let k_row = |_: &mut Lower<'_>, i: &Expr, c: &Expr| Expr::load(k, &qk + i * (heads * self.k) + c);
        let solved = |_: &mut Lower<'_>, j: &Expr, c: &Expr| Expr::load(sc.u, j * v_n + c);

        Product { m: rows.into(), n: hi.clone().into(), k: self.k.into(), a: &k_row, b: &keys, init: None }.emit(
            cx,
            &|cx, i, j, x| {
                let at = cx.bind(&m + i * ld + j);
                cx.store(sc.a, &at, -(x * Expr::load(sc.d, &at) * rate(i)));
            },
        );
        Product { m: rows.into(), n: hi.clone().into(), k: self.k.into(), a: &q_row, b: &keys, init: None }.emit(
            cx,
            &|cx, i, j, x| {
                let at = cx.bind(&m + i * ld + j);
                cx.store(sc.p, &at, x * Expr::load(sc.d, &at) * f32c(self.scale()));
            },
        );
        Product { m: rows.into(), n: v_n.into(), k: self.k.into(), a: &k_row, b: &state, init: None }.emit(
            cx,
            &|cx, i, j, x| {
                let value = Expr::load(v, &vo + i * (heads * v_n) + j);
                cx.store(sc.u, &ui + i * v_n + j, rate(i) * (value - carry(i) * x));
            },
        );
        let system = |_: &mut Lower<'_>, i: &Expr, j: &Expr| Expr::load(sc.a, &m + i * ld + j);
        let rest = |_: &mut Lower<'_>, i: &Expr, j: &Expr| Expr::load(sc.u, &ui + i * v_n + j);
        Product { m: rows.into(), n: v_n.into(), k: i0.clone().into(), a: &system, b: &solved, init: Some(&rest) }
            .emit(cx, &|cx, i, j, x| cx.store(sc.u, &ui + i * v_n + j, x));
        cx.each(1, rows, |cx, i| {
            let (row, at) = (cx.bind(&m + &i * ld + i0), cx.bind(&ui + &i * v_n));
            cx.lanes(0, v_n, chains(v_n), |cx, c| {
                let u = cx.local(Expr::load(sc.u, &at + &c));
                cx.each(0, i, |cx, j| {
                    let solved = Expr::load(sc.u, &ui + &j * v_n + &c);
                    cx.set(u, Expr::load(sc.a, &row + j).fma(solved, u));
                });
                cx.store(sc.u, &at + c, u);
            });
        });
        Product { m: rows.into(), n: v_n.into(), k: self.k.into(), a: &q_row, b: &state, init: None }
            .emit(cx, &|cx, i, j, x| cx.store(sc.o, i * v_n + j, x * (carry(i) * f32c(self.scale()))));
        let scores = |_: &mut Lower<'_>, i: &Expr, j: &Expr| Expr::load(sc.p, &m + i * ld + j);
        let read = |_: &mut Lower<'_>, i: &Expr, j: &Expr| Expr::load(sc.o, i * v_n + j);
        Product { m: rows.into(), n: v_n.into(), k: hi.into(), a: &scores, b: &solved, init: Some(&read) }
            .emit(cx, &|cx, i, j, x| cx.put(0, &vo + i * (heads * v_n) + j, x));
    }

    /// The state after `n` tokens of a chunk.
    fn advance(&self, cx: &mut Lower<'_>, sc: &Scratch, n: usize) {
        let v_n = self.v;
        cx.each(0, n, |cx, j| {
            let left = cx.bind(Expr::load(sc.d, &j + (n - 1) * sc.ld));
            let at = cx.bind(j * v_n);
            cx.lanes(0, v_n, 4, |cx, c| {
                let i = cx.bind(&at + c);
                cx.store(sc.u, &i, Expr::load(sc.u, &i) * &left);
            });
        });
        let carry = cx.bind(Expr::load(sc.carry, n - 1));
        let at = |i: &Expr, j: &Expr| &self.base + i * v_n + j;
        Product {
            m: self.k.into(),
            n: v_n.into(),
            k: n.into(),
            a: &|_: &mut Lower<'_>, i, j| Expr::load(sc.kt, i * sc.ld + j),
            b: &|_: &mut Lower<'_>, j, c| Expr::load(sc.u, j * v_n + c),
            init: Some(&|_: &mut Lower<'_>, i, j| Expr::load(self.state, at(i, j)) * &carry),
        }
        .emit(cx, &|cx, i, j, x| cx.store(self.state, at(i, j), x));
    }
}
