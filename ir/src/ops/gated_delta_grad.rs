//! The gradients of the gated delta rule, token by token.
//!
//! States are kept at the starts of pieces of about `sqrt(T)` tokens and made again inside a piece on the way back.

use super::{
    Accuracy, Flops, GatedDelta, InferError, OpDef,
    heads::{Pieces, clear, expect, operands},
};
use crate::{
    DType, Tensor, Type,
    loops::{Acc, Buf, Expr, f32c, i32c, math},
    lower::Lower,
};

/// `(q, k [R,T,H*K], v [R,T,H*V], g, beta [R,T,H], pos [R,T], dy [R,T,H*V], S [R,H,K,V] if carried) -> (dq, dk, dv, dg, dbeta)` for
/// [`super::GatedDelta`]. With `S'` the decayed state, `r = v - S'^T k` and `u = beta r`, from the last token to the first:
///
/// ```text
/// dS += q dy^T ; dq = S dy ; du = dS^T k ; dbeta = du r ; dv = beta du ; dk = dS u - S' dv
/// dS' = dS - k dv^T ; dg = sum dS' S' ; dS = e^g dS', or 0 where pos = 0
/// ```
///
/// The carried state is a constant.
#[derive(Clone, Debug, PartialEq)]
pub struct GatedDeltaGrad {
    /// H.
    pub heads: usize,
    /// Whether the state before the first token is an operand.
    pub carry: bool,
}

const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const G: usize = 3;
const BETA: usize = 4;
const POS: usize = 5;
const DY: usize = 6;
const STATE: usize = 7;

impl OpDef for GatedDeltaGrad {
    const NAME: &'static str = "gated_delta_grad";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        operands(Self::NAME, ins, 7 + usize::from(self.carry))?;
        let forward: Vec<Type> = ins[..DY].iter().chain(&ins[STATE..]).cloned().collect();
        let y = GatedDelta { heads: self.heads, chunk: 0, carry: self.carry }.infer(&forward)?.remove(0);
        expect(Self::NAME, "dy", &ins[DY], &y)?;
        Ok(ins[..POS].to_vec())
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (rows, tokens, h_n) = (ins[Q].ty.dims[0], ins[Q].ty.dims[1], self.heads);
        let (k_n, v_n) = (ins[Q].ty.dims[2] / h_n, ins[V].ty.dims[2] / h_n);
        let wide = |i: usize| -> Vec<f64> { ins[i].as_f32().iter().map(|&x| x.into()).collect() };
        let [q, k, v, g, beta, dy] = [Q, K, V, G, BETA, DY].map(wide);
        let pos = ins[POS].to_i64();
        let scale = (k_n as f64).powf(-0.5);
        let mut grads: Vec<Vec<f64>> = ins[..POS].iter().map(|t| vec![0.0; t.ty.numel()]).collect();
        for at in 0..rows * h_n {
            let (r, h) = (at / h_n, at % h_n);
            let size = k_n * v_n;
            let mut s = if self.carry { wide(STATE)[at * size..][..size].to_vec() } else { vec![0.0; size] };
            // Decayed states, and states, of all tokens.
            let (mut decayed, mut states, mut rest) = (vec![], vec![], vec![]);
            for t in 0..tokens {
                let (row, gate) = (r * tokens + t, (r * tokens + t) * h_n + h);
                let keep = if pos[row] == 0 { 0.0 } else { g[gate].exp() };
                s.iter_mut().for_each(|x| *x = if keep == 0.0 { 0.0 } else { *x * keep });
                decayed.push(s.clone());
                let seen = |j: usize| (0..k_n).map(|i| s[i * v_n + j] * k[gate * k_n + i]).sum::<f64>();
                let left: Vec<f64> = (0..v_n).map(|j| v[gate * v_n + j] - seen(j)).collect();
                for (i, x) in s.iter_mut().enumerate() {
                    *x += k[gate * k_n + i / v_n] * beta[gate] * left[i % v_n];
                }
                states.push(s.clone());
                rest.push(left);
            }
            let mut ds = vec![0.0; size];
            for t in (0..tokens).rev() {
                let (row, gate) = (r * tokens + t, (r * tokens + t) * h_n + h);
                let (q, k, dy) = (&q[gate * k_n..][..k_n], &k[gate * k_n..][..k_n], &dy[gate * v_n..][..v_n]);
                for (i, x) in ds.iter_mut().enumerate() {
                    *x += scale * q[i / v_n] * dy[i % v_n];
                }
                let du: Vec<f64> = (0..v_n).map(|j| (0..k_n).map(|i| k[i] * ds[i * v_n + j]).sum()).collect();
                let dr: Vec<f64> = du.iter().map(|x| beta[gate] * x).collect();
                grads[BETA][gate] = du.iter().zip(&rest[t]).map(|(a, b)| a * b).sum();
                grads[V][gate * v_n..][..v_n].copy_from_slice(&dr);
                for i in 0..k_n {
                    let line = i * v_n..(i + 1) * v_n;
                    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                    grads[Q][gate * k_n + i] = scale * dot(&states[t][line.clone()], dy);
                    let wrote = beta[gate] * dot(&ds[line.clone()], &rest[t]);
                    grads[K][gate * k_n + i] = wrote - dot(&decayed[t][line], &dr);
                }
                for (i, x) in ds.iter_mut().enumerate() {
                    *x -= k[i / v_n] * dr[i % v_n];
                    grads[G][gate] += *x * decayed[t][i];
                    *x *= if pos[row] == 0 { 0.0 } else { g[gate].exp() };
                }
            }
        }
        let narrow = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
        grads.into_iter().zip(ins).map(|(x, t)| Tensor::f32(&t.ty.dims, narrow(x))).collect()
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        let (k, v) = (ins[Q].cols() / self.heads, ins[V].cols() / self.heads);
        Flops::float(ins[Q].rows() * self.heads * 26 * k * v)
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, tokens) = (cx.ty(Q).dims[0], cx.ty(Q).dims[1]);
        let (k, v) = (cx.ty(Q).cols() / self.heads, cx.ty(V).cols() / self.heads);
        let size = k * v;
        let at = cx.grid(rows * self.heads);
        let (r, h) = (cx.bind(&at / self.heads), cx.bind(&at % self.heads));
        let pieces = Pieces::new(cx, tokens, size);
        let mut scratch = |name: &str, len: usize| cx.scratch(name, DType::F32, len);
        let f = Frame {
            heads: self.heads,
            k,
            v,
            states: pieces.states,
            ds: scratch("ds", size),
            rest: scratch("rest", v),
            du: scratch("du", v),
            row0: cx.bind(r * tokens),
            h,
        };
        let start = Expr::from(0);
        if self.carry {
            let state = cx.buf(STATE);
            let from = cx.bind(at * size);
            cx.lanes(0, size, 4, |cx, i| cx.store(f.states, &i, Expr::load(state, &from + &i)));
        } else {
            clear(cx, f.states, &start, size);
        }
        clear(cx, f.ds, &start, size);
        pieces.there_and_back(cx, &|cx, t, from, to| f.step(cx, t, from, to), &|cx, t, from| f.back(cx, t, from));
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 5e-5, atol: 2e-5 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let all = GatedDelta::samples().into_iter();
        all.map(|(op, mut ins)| {
            ins.insert(DY, ins[V].clone());
            (GatedDeltaGrad { heads: op.heads, carry: op.carry }, ins)
        })
        .collect()
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        let forward = GatedDelta { heads: self.heads, chunk: 0, carry: self.carry };
        match k {
            DY => super::random_tensor(ty, random),
            STATE => forward.sample_input(STATE - 1, ty, random),
            k => forward.sample_input(k, ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, ins) = Self::samples().remove(0);
        let with = super::heads::with_operand;
        vec![
            with(DY, Type::f32(&[3, 7, 5])),
            with(STATE, Type::f32(&[3, 2, 3, 5])),
            (GatedDeltaGrad { carry: false, ..op }, ins),
        ]
    }
}

/// One head of one row.
struct Frame {
    heads: usize,
    k: usize,
    v: usize,
    /// States before and behind the tokens of a piece.
    states: Buf,
    /// Gradient of the state.
    ds: Buf,
    /// `v - S'^T k` of a token.
    rest: Buf,
    /// Gradient of `u`.
    du: Buf,
    /// Row of the first token.
    row0: Expr,
    h: Expr,
}

impl Frame {
    /// The row of token `t`, the first columns of its keys and values, and its gate.
    fn place(&self, cx: &mut Lower<'_>, t: &Expr) -> [Expr; 4] {
        let row = cx.bind(&self.row0 + t);
        let gate = cx.bind(&row * self.heads + &self.h);
        [row, cx.bind(&gate * self.k), cx.bind(&gate * self.v), gate]
    }

    /// The state behind token `t` at `to` of `states`, from that at `from`, which does not count where a document starts.
    fn step(&self, cx: &mut Lower<'_>, t: &Expr, from: &Expr, to: &Expr) {
        let [row, qk, vo, gate] = self.place(cx, t);
        let [k, v, g, beta, pos] = [K, V, G, BETA, POS].map(|i| cx.buf(i));
        let fresh = cx.bind(Expr::load(pos, row).eq(i32c(0)));
        let before = |at: Expr| fresh.clone().select(f32c(0.0), Expr::load(self.states, at));
        let decay = math::exp(cx, Expr::load(g, &gate));
        let beta = cx.bind(Expr::load(beta, gate));
        cx.lanes(0, self.v, 4, |cx, j| {
            let seen = cx.local(f32c(0.0));
            cx.each(0, self.k, |cx, i| {
                let s = before(from + &i * self.v + &j);
                cx.set(seen, Expr::load(k, &qk + i).fma(s, seen));
            });
            let u = cx.bind(&beta * (Expr::load(v, &vo + &j) - &decay * seen));
            cx.each(0, self.k, |cx, i| {
                let at = cx.bind(&i * self.v + &j);
                let kept = before(from + &at) * &decay;
                cx.store(self.states, to + at, Expr::load(k, &qk + i).fma(&u, kept));
            });
        });
    }

    /// The gradients of token `t`; the state before it is at `from` of `states`, that behind it follows.
    fn back(&self, cx: &mut Lower<'_>, t: &Expr, from: &Expr) {
        let (k_n, v_n, states, ds) = (self.k, self.v, self.states, self.ds);
        let [row, qk, vo, gate] = self.place(cx, t);
        let [q, k, v, g, beta, pos, dy] = [Q, K, V, G, BETA, POS, DY].map(|i| cx.buf(i));
        let scale = f32c((k_n as f32).powf(-0.5));
        let decay = math::exp(cx, Expr::load(g, &gate));
        let beta = cx.bind(Expr::load(beta, &gate));
        let after = cx.bind(from + k_n * v_n);
        let fresh = cx.bind(Expr::load(pos, row).eq(i32c(0)));
        let before = |at: Expr| fresh.clone().select(f32c(0.0), Expr::load(states, at));
        cx.lanes(0, v_n, 4, |cx, j| {
            let (seen, sum) = (cx.local(f32c(0.0)), cx.local(f32c(0.0)));
            let dy = cx.bind(Expr::load(dy, &vo + &j) * &scale);
            cx.each(0, k_n, |cx, i| {
                let at = cx.bind(&i * v_n + &j);
                let d = cx.bind(Expr::load(q, &qk + &i).fma(&dy, Expr::load(ds, &at)));
                cx.store(ds, &at, &d);
                let key = cx.bind(Expr::load(k, &qk + i));
                cx.set(seen, key.clone().fma(before(from + at), seen));
                cx.set(sum, key.fma(d, sum));
            });
            cx.store(self.rest, &j, Expr::load(v, &vo + &j) - &decay * seen);
            cx.store(self.du, &j, sum);
            cx.put(2, &vo + j, &beta * sum);
        });
        let dots = cx.reduce(0, v_n, |_, j| vec![Acc::Dot(Expr::load(self.du, &j), Expr::load(self.rest, j))]);
        cx.put(4, &gate, &dots[0]);
        let dg = cx.local(f32c(0.0));
        let keep = cx.bind(fresh.clone().select(f32c(0.0), decay.clone()));
        cx.each(0, k_n, |cx, i| {
            let line = cx.bind(&i * v_n);
            let key = cx.bind(Expr::load(k, &qk + &i) * &beta);
            let dots = cx.reduce(0, v_n, |cx, j| {
                let at = cx.bind(&line + &j);
                let d = cx.bind(Expr::load(ds, &at));
                let s = cx.bind(before(from + &at));
                let du = cx.bind(Expr::load(self.du, &j));
                vec![
                    Acc::Dot(Expr::load(states, &after + at), Expr::load(dy, &vo + &j)),
                    Acc::Dot(d.clone(), Expr::load(self.rest, j)),
                    Acc::Dot(s.clone(), du.clone()),
                    Acc::Dot(d - &key * du, s),
                ]
            });
            cx.put(0, &qk + &i, &dots[0] * &scale);
            cx.put(1, &qk + i, &beta * (&dots[1] - &decay * &dots[2]));
            cx.set(dg, dg + &dots[3] * &decay);
            cx.lanes(0, v_n, 4, |cx, j| {
                let at = cx.bind(&line + &j);
                cx.store(ds, &at, (Expr::load(ds, &at) - &key * Expr::load(self.du, j)) * &keep);
            });
        });
        cx.put(3, gate, dg);
    }
}
