//! The mLSTM cell: a matrix memory with exponential gates.

use super::{
    Accuracy, Flops, InferError, MlstmGrad, OpDef, VjpCx,
    heads::{
        BLOCK, NEG, chains, chunks, clear, expect, fade, operands, row_blocks, sample_between, sample_positions,
        sample_state, split, with_operand,
    },
};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Acc, Buf, Expr, Var, f32c, i32c, math, tile::Product},
    lower::Lower,
};

/// For every row and head, with `q` scaled by `K^-1/2` and `l = ln sigmoid(f)`:
///
/// ```text
/// m_t = max(l_t + m_(t-1), i_t) ;  a = e^(l_t + m_(t-1) - m_t) ;  b = e^(i_t - m_t)
/// C_t = a C_(t-1) + b k_t v_t^T ;  n_t = a n_(t-1) + b k_t
/// h_t = C_t^T q_t / (max(|n_t q_t|, e^(-m_t)) + 1e-6)
/// ```
///
/// `(q, k, v [R,T,H*K], i, f [R,T,H], pos [R,T], C [R,H,K,K], n [R,H,K], m [R,H] if carried) -> (h [R,T,H*K], C, n, m if carried)`.
/// `C = n = 0` and `m = -1e30` where `pos = 0`, and at the start of every row when they are not carried.
/// Source: component semantics 6, there also the form of a chunk.
#[derive(Clone, Debug, PartialEq)]
pub struct Mlstm {
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
const I: usize = 3;
const F: usize = 4;
const POS: usize = 5;
const STATE: usize = 6;

impl OpDef for Mlstm {
    const NAME: &'static str = "mlstm";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        operands(Self::NAME, ins, if self.carry { 9 } else { 6 })?;
        let (r, t, k) = split(Self::NAME, "q", &ins[Q], self.heads)?;
        let gate = Type::f32(&[r, t, self.heads]);
        expect(Self::NAME, "k", &ins[K], &ins[Q])?;
        expect(Self::NAME, "v", &ins[V], &ins[Q])?;
        expect(Self::NAME, "i", &ins[I], &gate)?;
        expect(Self::NAME, "f", &ins[F], &gate)?;
        expect(Self::NAME, "pos", &ins[POS], &Type::i32(&[r, t]))?;
        if self.carry {
            let shapes = [vec![r, self.heads, k, k], vec![r, self.heads, k], vec![r, self.heads]];
            for (s, (name, dims)) in ins[STATE..].iter().zip(["C", "n", "m"].iter().zip(shapes)) {
                expect(Self::NAME, name, s, &Type::f32(&dims))?;
            }
        }
        Ok(std::iter::once(&ins[V]).chain(&ins[STATE..]).cloned().collect())
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let [rows, tokens, d] = ins[Q].ty.dims[..] else { unreachable!("checked by infer") };
        let (h_n, k_n) = (self.heads, d / self.heads);
        let [q, k, v, i, f] = [Q, K, V, I, F].map(|x| ins[x].as_f32());
        let pos = ins[POS].to_i64();
        let state = |x: usize, fresh: f32, len: usize| {
            if self.carry { ins[STATE + x].as_f32().to_vec() } else { vec![fresh; len] }
        };
        let mut c = state(0, 0.0, rows * d * k_n);
        let mut n = state(1, 0.0, rows * d);
        let mut m = state(2, NEG, rows * h_n);
        let mut out = vec![0.0; v.len()];
        for at in 0..rows * h_n {
            let (r, h) = (at / h_n, at % h_n);
            let c = &mut c[at * k_n * k_n..][..k_n * k_n];
            let n = &mut n[at * k_n..][..k_n];
            for row in r * tokens..(r + 1) * tokens {
                let cols = (row * h_n + h) * k_n..(row * h_n + h + 1) * k_n;
                let (q, k, v) = (&q[cols.clone()], &k[cols.clone()], &v[cols.clone()]);
                if pos[row] == 0 {
                    c.fill(0.0);
                    n.fill(0.0);
                    m[at] = NEG;
                }
                let (gi, gf) = (i[row * h_n + h], f[row * h_n + h]);
                let lf = gf.min(0.0) - (-gf.abs()).exp().ln_1p();
                let next = (lf + m[at]).max(gi);
                let (keep, add) = ((lf + m[at] - next).exp(), (gi - next).exp());
                m[at] = next;
                for x in 0..k_n {
                    n[x] = keep * n[x] + add * k[x];
                    (0..k_n).for_each(|y| c[x * k_n + y] = keep * c[x * k_n + y] + add * k[x] * v[y]);
                }
                let scale = (k_n as f32).powf(-0.5);
                let nq: f32 = (0..k_n).map(|x| n[x] * (q[x] * scale)).sum();
                let den = nq.abs().max((-next).exp()) + 1e-6;
                for (y, o) in out[cols].iter_mut().enumerate() {
                    *o = (0..k_n).map(|x| c[x * k_n + y] * (q[x] * scale)).sum::<f32>() / den;
                }
            }
        }
        let mut results = vec![Tensor::f32(&ins[V].ty.dims, out)];
        if self.carry {
            results.extend([c, n, m].into_iter().zip(&ins[STATE..]).map(|(s, x)| Tensor::f32(&x.ty.dims, s)));
        }
        results
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let Some(dy) = cx.grads[0] else { return Ok(vec![None; cx.ins.len()]) };
        let ins: Vec<Value> =
            cx.ins[..STATE].iter().copied().chain([dy]).chain(cx.ins[STATE..].iter().copied()).collect();
        let outs = cx.graph.ops(MlstmGrad { heads: self.heads, carry: self.carry }, &ins)?;
        // The state of earlier calls is a constant.
        Ok(outs.into_iter().map(Some).chain(cx.ins[POS..].iter().map(|_| None)).collect())
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        let k = ins[Q].cols() / self.heads;
        let c = self.chunk.min(ins[Q].dims[1]);
        // Pairs of a token in a chunk: those before it and in its block.
        let pairs = (c + BLOCK.min(c)) / 2;
        let each = if c <= 1 { 6 * k * k + 80 } else { 4 * k * k + 4 * pairs * k + 12 * pairs + 80 };
        Flops::float(ins[Q].rows() * self.heads * each)
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let [rows, tokens, d] = cx.ty(Q).dims[..] else { unreachable!("checked by infer") };
        let k = d / self.heads;
        let at = cx.grid(rows * self.heads);
        let (r, h) = (cx.bind(&at / self.heads), cx.bind(&at % self.heads));
        let row0 = cx.bind(r * tokens);
        let (c, n, c0, n0, m) = if self.carry {
            let m = Expr::load(cx.buf(STATE + 2), &at);
            let m = cx.local(m);
            (cx.buf(STATE), cx.buf(STATE + 1), cx.bind(&at * (k * k)), cx.bind(&at * k), m)
        } else {
            let (c, n) = (cx.scratch("c", DType::F32, k * k), cx.scratch("n", DType::F32, k));
            (c, n, Expr::from(0), Expr::from(0), cx.local(f32c(NEG)))
        };
        let f = Frame { heads: self.heads, k, row0, h, c, n, c0, n0, m };
        if !self.carry {
            f.reset(cx);
        }
        if self.chunk == 0 || tokens == 1 {
            cx.each(0, tokens, |cx, t| f.step(cx, &t));
        } else {
            if self.carry {
                cx.when(Expr::load(cx.buf(POS), &f.row0).eq(i32c(0)), |cx| f.reset(cx));
            }
            let chunk = self.chunk.min(tokens);
            let mut scratch = |name: &str, len: usize| cx.scratch(name, DType::F32, len);
            let sc = Scratch {
                ld: chunk,
                kt: scratch("kt", k * chunk),
                b: scratch("b", chunk),
                gate: scratch("gate", chunk),
                wi: scratch("wi", chunk),
                mt: scratch("mt", chunk),
                den: scratch("den", chunk),
                e: scratch("e", chunk * chunk),
                p: scratch("p", chunk * chunk),
                o: scratch("o", BLOCK * k),
                doc: cx.scratch("doc", DType::I32, chunk),
            };
            chunks(cx, tokens, chunk, &|cx, s, n| f.chunk(cx, &sc, s, n));
        }
        if self.carry {
            let m = cx.buf(STATE + 2);
            cx.store(m, at, f.m);
        }
    }

    fn updates(&self) -> Vec<(usize, usize)> {
        if self.carry { (0..3).map(|s| (STATE + s, 1 + s)).collect() } else { vec![] }
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 2e-4, atol: 2e-4 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |heads, chunk, carry, (r, t, k): (usize, usize, usize)| {
            let gate = Type::f32(&[r, t, heads]);
            let qkv = Type::f32(&[r, t, heads * k]);
            let mut ins = vec![qkv.clone(), qkv.clone(), qkv, gate.clone(), gate, Type::i32(&[r, t])];
            if carry {
                ins.extend([Type::f32(&[r, heads, k, k]), Type::f32(&[r, heads, k]), Type::f32(&[r, heads])]);
            }
            (Mlstm { heads, chunk, carry }, ins)
        };
        vec![
            of(2, 0, true, (3, 7, 5)),
            of(1, 0, false, (2, 5, 8)),
            of(2, 0, true, (2, 1, 12)),
            of(2, 4, true, (3, 11, 5)),
            of(2, 20, true, (2, 37, 24)),
            of(1, 16, false, (2, 33, 8)),
            of(1, 64, false, (2, 3, 4)),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        match k {
            I => sample_between(ty, -4.0, 2.0, random),
            F => sample_between(ty, 0.0, 5.0, random),
            POS => sample_positions(ty),
            k if k >= STATE => sample_state(ty, 1.0, random),
            _ => super::random_tensor(ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, ins) = Self::samples().remove(0);
        let with = with_operand;
        vec![
            with(Q, Type::f32(&[3, 7, 9])),
            with(V, Type::f32(&[3, 7, 12])),
            with(I, Type::f32(&[3, 7, 1])),
            with(POS, Type::f32(&[3, 7])),
            with(STATE, Type::f32(&[3, 2, 5])),
            with(STATE + 1, Type::f32(&[3, 2])),
            with(STATE + 2, Type::f32(&[3])),
            (Mlstm { heads: 0, ..op.clone() }, ins.clone()),
            (Mlstm { carry: false, ..op.clone() }, ins.clone()),
        ]
    }
}

/// One head of one row.
struct Frame {
    heads: usize,
    k: usize,
    /// Row of the first token.
    row0: Expr,
    h: Expr,
    c: Buf,
    n: Buf,
    /// Where the head starts in `c` and `n`.
    c0: Expr,
    n0: Expr,
    /// The running stabiliser.
    m: Var,
}

/// Memory of one chunk; square matrices have `ld` columns.
struct Scratch {
    ld: usize,
    /// Keys, transposed.
    kt: Buf,
    /// Sums of `l` from the start of the chunk.
    b: Buf,
    /// Input gates.
    gate: Buf,
    /// Weight of the incoming state at a token.
    wi: Buf,
    /// Stabiliser at a token.
    mt: Buf,
    /// The least denominator at a token, then the denominator.
    den: Buf,
    /// Weight of token `j` at token `i`; 0 where `j > i`, and undefined behind the block of `i`.
    e: Buf,
    /// Weighted scores.
    p: Buf,
    /// Reads of the incoming state.
    o: Buf,
    /// Document of a token, 0 for the one of the incoming state.
    doc: Buf,
}

impl Frame {
    fn scale(&self) -> f32 {
        (self.k as f32).powf(-0.5)
    }

    /// Index of the first column of this head in an operand of `width` columns a head.
    fn column(&self, row: &Expr, width: usize) -> Expr {
        (row * self.heads + &self.h) * width
    }

    fn reset(&self, cx: &mut Lower<'_>) {
        clear(cx, self.c, &self.c0, self.k * self.k);
        clear(cx, self.n, &self.n0, self.k);
        cx.set(self.m, f32c(NEG));
    }

    fn step(&self, cx: &mut Lower<'_>, t: &Expr) {
        let (k_n, c, n, c0, n0) = (self.k, self.c, self.n, &self.c0, &self.n0);
        let [q, k, v, i, f, pos] = [Q, K, V, I, F, POS].map(|x| cx.buf(x));
        let row = cx.bind(&self.row0 + t);
        cx.when(Expr::load(pos, &row).eq(i32c(0)), |cx| self.reset(cx));
        let at = cx.bind(self.column(&row, k_n));
        let gate = cx.bind(self.column(&row, 1));
        let lf = math::log_sigmoid(cx, Expr::load(f, &gate));
        let kept = cx.bind(lf + self.m);
        let input = cx.bind(Expr::load(i, gate));
        let next = cx.bind(kept.clone().max(&input));
        let keep = fade(cx, kept - &next);
        let add = fade(cx, input - &next);
        let (keep, add) = (cx.bind(keep), cx.bind(add));
        let limit = math::exp(cx, -next.clone());
        cx.set(self.m, next);
        cx.lanes(0, k_n, 2, |cx, x| {
            let to = cx.bind(n0 + &x);
            let added = &add * Expr::load(k, &at + x);
            cx.store(n, &to, keep.clone().fma(Expr::load(n, &to), added));
        });
        let nq = cx.reduce(0, k_n, |_, x| vec![Acc::Dot(Expr::load(n, n0 + &x), Expr::load(q, &at + x))]).remove(0);
        let den = (nq * f32c(self.scale())).abs().max(limit) + f32c(1e-6);
        let den = cx.bind(f32c(self.scale()) / den);
        cx.lanes(0, k_n, chains(k_n), |cx, y| {
            let value = cx.bind(&add * Expr::load(v, &at + &y));
            let read = cx.local(f32c(0.0));
            cx.each(0, k_n, |cx, x| {
                let to = cx.bind(c0 + &x * k_n + &y);
                let added = Expr::load(k, &at + &x) * &value;
                let s = cx.bind(keep.clone().fma(Expr::load(c, &to), added));
                cx.store(c, to, &s);
                cx.set(read, Expr::load(q, &at + x).fma(s, read));
            });
            cx.put(0, &at + y, read * &den);
        });
    }

    fn chunk(&self, cx: &mut Lower<'_>, sc: &Scratch, s: &Expr, n: usize) {
        let row0 = cx.bind(&self.row0 + s);
        self.weights(cx, sc, &row0, n);
        let k = cx.buf(K);
        cx.each(0, self.k, |cx, i| {
            let at = cx.bind(self.column(&row0, self.k) + &i);
            cx.lanes(0, n, 1, |cx, j| {
                cx.store(sc.kt, &i * sc.ld + &j, Expr::load(k, &at + j * (self.heads * self.k)));
            });
        });
        row_blocks(cx, n, &|cx, i0, rows| self.block(cx, sc, &row0, i0, rows));
        self.advance(cx, sc, &row0, n);
    }

    /// Stabilisers and weights of all pairs of tokens of a chunk, and of the incoming state.
    fn weights(&self, cx: &mut Lower<'_>, sc: &Scratch, row0: &Expr, n: usize) {
        let (i_gate, f_gate, pos) = (cx.buf(I), cx.buf(F), cx.buf(POS));
        let gate0 = cx.bind(self.column(row0, 1));
        cx.lanes(0, n, 1, |cx, i| {
            let gate = cx.bind(&gate0 + &i * self.heads);
            let lf = math::log_sigmoid(cx, Expr::load(f_gate, &gate));
            cx.store(sc.b, &i, lf);
            cx.store(sc.gate, i, Expr::load(i_gate, gate));
        });
        let sum = cx.local(f32c(0.0));
        let doc = cx.local(i32c(0));
        cx.each(0, n, |cx, i| {
            cx.set(sum, sum + Expr::load(sc.b, &i));
            cx.set(doc, doc + Expr::load(pos, row0 + &i).eq(i32c(0)).select(i32c(1), i32c(0)));
            cx.store(sc.b, &i, sum);
            cx.store(sc.doc, i, doc);
        });
        cx.each(0, n, |cx, i| {
            let (b, doc) = (cx.bind(Expr::load(sc.b, &i)), cx.bind(Expr::load(sc.doc, &i)));
            let same = |j: &Expr| Expr::load(sc.doc, j).eq(&doc);
            let exponent = |j: &Expr| (&b - Expr::load(sc.b, j)) + Expr::load(sc.gate, j);
            let most = cx.reduce(0, &i + 1, |_, j| vec![Acc::Max(same(&j).select(exponent(&j), f32c(NEG)))]).remove(0);
            let inter = cx.bind(doc.clone().eq(i32c(0)).select(&b + self.m, f32c(NEG)));
            let mt = cx.bind(inter.clone().max(most));
            cx.store(sc.mt, &i, &mt);
            cx.store(sc.wi, &i, inter - &mt);
            let row = cx.bind(&i * sc.ld);
            // Whole blocks, so that there are whole vectors; nothing reads columns behind them.
            let end = cx.bind(((&i / BLOCK + 1) * BLOCK).min(Expr::from(n)));
            cx.lanes(0, end, 2, |cx, j| {
                let e = fade(cx, exponent(&j) - &mt);
                let seen = same(&j) & j.clone().le(&i);
                cx.store(sc.e, &row + j, seen.select(e, f32c(0.0)));
            });
        });
        cx.lanes(0, n, 1, |cx, i| {
            let wi = fade(cx, Expr::load(sc.wi, &i));
            cx.store(sc.wi, &i, wi);
            let limit = math::exp(cx, -Expr::load(sc.mt, &i));
            cx.store(sc.den, i, limit);
        });
    }

    /// Outputs of rows `i0 .. i0 + rows` of the chunk.
    fn block(&self, cx: &mut Lower<'_>, sc: &Scratch, row0: &Expr, i0: &Expr, rows: usize) {
        let (ld, k_n, d) = (sc.ld, self.k, self.heads * self.k);
        let (q, v) = (cx.buf(Q), cx.buf(V));
        let first = cx.bind(row0 + i0);
        let hi = cx.bind(i0 + rows);
        let at = cx.bind(self.column(&first, k_n));
        let v0 = cx.bind(self.column(row0, k_n));
        let m = cx.bind(i0 * ld);
        let q_row = |_: &mut Lower<'_>, i: &Expr, c: &Expr| Expr::load(q, &at + i * d + c);
        let keys = |_: &mut Lower<'_>, k: &Expr, j: &Expr| Expr::load(sc.kt, k * ld + j);
        Product { m: rows.into(), n: hi.clone().into(), k: k_n.into(), a: &q_row, b: &keys, init: None }.emit(
            cx,
            &|cx, i, j, x| {
                let to = cx.bind(&m + i * ld + j);
                cx.store(sc.p, &to, x * Expr::load(sc.e, &to) * f32c(self.scale()));
            },
        );
        cx.each(0, rows, |cx, i| {
            let (row, q0, i) = (cx.bind(&m + &i * ld), cx.bind(&at + &i * d), cx.bind(i0 + i));
            let inner = cx.reduce(0, hi.clone(), |_, j| vec![Acc::Sum(Expr::load(sc.p, &row + j))]).remove(0);
            let n = |c: &Expr| Expr::load(self.n, &self.n0 + c);
            let outer = cx.reduce(0, k_n, |_, c| vec![Acc::Dot(Expr::load(q, &q0 + &c), n(&c))]).remove(0);
            let den = (Expr::load(sc.wi, &i) * f32c(self.scale())).fma(outer, inner).abs();
            let limit = Expr::load(sc.den, &i);
            cx.store(sc.den, i, den.max(limit) + f32c(1e-6));
        });
        let state = |_: &mut Lower<'_>, k: &Expr, j: &Expr| Expr::load(self.c, &self.c0 + k * k_n + j);
        Product { m: rows.into(), n: k_n.into(), k: k_n.into(), a: &q_row, b: &state, init: None }.emit(
            cx,
            &|cx, i, j, x| {
                cx.store(sc.o, i * k_n + j, x * (Expr::load(sc.wi, i0 + i) * f32c(self.scale())));
            },
        );
        let scores = |_: &mut Lower<'_>, i: &Expr, j: &Expr| Expr::load(sc.p, &m + i * ld + j);
        let values = |_: &mut Lower<'_>, j: &Expr, c: &Expr| Expr::load(v, &v0 + j * d + c);
        let read = |_: &mut Lower<'_>, i: &Expr, j: &Expr| Expr::load(sc.o, i * k_n + j);
        Product { m: rows.into(), n: k_n.into(), k: hi.into(), a: &scores, b: &values, init: Some(&read) }
            .emit(cx, &|cx, i, j, x| cx.put(0, &at + i * d + j, x / Expr::load(sc.den, i0 + i)));
    }

    /// The state after `n` tokens of a chunk.
    fn advance(&self, cx: &mut Lower<'_>, sc: &Scratch, row0: &Expr, n: usize) {
        let (k_n, d, last) = (self.k, self.heads * self.k, (n - 1) * sc.ld);
        let (k, v) = (cx.buf(K), cx.buf(V));
        let at = cx.bind(self.column(row0, k_n));
        let wi = cx.bind(Expr::load(sc.wi, n - 1));
        cx.each(0, k_n, |cx, i| {
            cx.lanes(0, n, 2, |cx, j| {
                let to = cx.bind(&i * sc.ld + &j);
                cx.store(sc.kt, &to, Expr::load(sc.kt, &to) * Expr::load(sc.e, j + last));
            });
        });
        let state = |i: &Expr, j: &Expr| &self.c0 + i * k_n + j;
        Product {
            m: k_n.into(),
            n: k_n.into(),
            k: n.into(),
            a: &|_: &mut Lower<'_>, i, j| Expr::load(sc.kt, i * sc.ld + j),
            b: &|_: &mut Lower<'_>, j, c| Expr::load(v, &at + j * d + c),
            init: Some(&|_: &mut Lower<'_>, i, j| Expr::load(self.c, state(i, j)) * &wi),
        }
        .emit(cx, &|cx, i, j, x| cx.store(self.c, state(i, j), x));
        cx.lanes(0, k_n, 2, |cx, c| {
            let to = cx.bind(&self.n0 + &c);
            let sum = cx.local(Expr::load(self.n, &to) * &wi);
            cx.each(0, n, |cx, j| {
                let weight = Expr::load(sc.e, &j + last);
                cx.set(sum, weight.fma(Expr::load(k, &at + j * d + &c), sum));
            });
            cx.store(self.n, to, sum);
        });
        cx.set(self.m, Expr::load(sc.mt, n - 1));
    }
}
