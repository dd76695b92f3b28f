//! The gradients of the mLSTM cell, token by token.
//!
//! States are kept at the starts of pieces of about `sqrt(T)` tokens and made again inside a piece on the way back.

use super::{
    Accuracy, Flops, InferError, Mlstm, OpDef,
    heads::{NEG, Pieces, clear, expect, operands},
};
use crate::{
    DType, Tensor, Type,
    loops::{Acc, Buf, Expr, f32c, i32c, math},
    lower::Lower,
};

/// `(q, k, v [R,T,H*K], i, f [R,T,H], pos [R,T], dy [R,T,H*K], C, n, m if carried) -> (dq, dk, dv, di, df)` for [`super::Mlstm`], whose
/// stabiliser `m` is a constant for gradients. With `d = dy / den` and `e` the gradient of `n q`, which is
/// `-sign(n q) dy h / den` where `|n q| > e^(-m)` and else 0, from the last token to the first:
///
/// ```text
/// dC += q d^T ; dn += q e ; dq = C d + n e ; dk = b (dC v + dn) ; dv = b dC^T k ; di = k dk
/// df = a (sum dC C' + dn n') sigmoid(-f) ; dC = a dC ; dn = a dn, or 0 where pos = 0
/// ```
///
/// The carried states are constants.
#[derive(Clone, Debug, PartialEq)]
pub struct MlstmGrad {
    /// H.
    pub heads: usize,
    /// Whether the states before the first token are operands.
    pub carry: bool,
}

const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const I: usize = 3;
const F: usize = 4;
const POS: usize = 5;
const DY: usize = 6;
const STATE: usize = 7;

impl OpDef for MlstmGrad {
    const NAME: &'static str = "mlstm_grad";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        operands(Self::NAME, ins, if self.carry { 10 } else { 7 })?;
        let forward: Vec<Type> = ins[..DY].iter().chain(&ins[STATE..]).cloned().collect();
        let y = Mlstm { heads: self.heads, chunk: 0, carry: self.carry }.infer(&forward)?.remove(0);
        expect(Self::NAME, "dy", &ins[DY], &y)?;
        Ok(ins[..POS].to_vec())
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let [rows, tokens, width] = ins[Q].ty.dims[..] else { unreachable!("checked by infer") };
        let (h_n, k_n) = (self.heads, width / self.heads);
        let wide = |i: usize| -> Vec<f64> { ins[i].as_f32().iter().map(|&x| x.into()).collect() };
        let [q, k, v, gi, gf, dy] = [Q, K, V, I, F, DY].map(wide);
        let pos = ins[POS].to_i64();
        let scale = (k_n as f64).powf(-0.5);
        let mut grads: Vec<Vec<f64>> = ins[..POS].iter().map(|t| vec![0.0; t.ty.numel()]).collect();
        for at in 0..rows * h_n {
            let (r, h) = (at / h_n, at % h_n);
            let fresh = (vec![0.0; k_n * k_n], vec![0.0; k_n], f64::from(NEG));
            let (mut c, mut n, mut m) = fresh.clone();
            if self.carry {
                c.copy_from_slice(&wide(STATE)[at * k_n * k_n..][..k_n * k_n]);
                n.copy_from_slice(&wide(STATE + 1)[at * k_n..][..k_n]);
                m = wide(STATE + 2)[at];
            }
            // For every token: the states before and behind it, what was kept and added, and the stabiliser.
            let mut seen = vec![];
            for t in 0..tokens {
                let (row, gate) = (r * tokens + t, (r * tokens + t) * h_n + h);
                if pos[row] == 0 {
                    (c, n, m) = fresh.clone();
                }
                let before = (c.clone(), n.clone());
                let lf = gf[gate].min(0.0) - (-gf[gate].abs()).exp().ln_1p();
                let next = (lf + m).max(gi[gate]);
                let (a, b) = ((lf + m - next).exp(), (gi[gate] - next).exp());
                m = next;
                let (k, v) = (&k[gate * k_n..][..k_n], &v[gate * k_n..][..k_n]);
                c.iter_mut().enumerate().for_each(|(i, x)| *x = a * *x + b * k[i / k_n] * v[i % k_n]);
                n.iter_mut().zip(k).for_each(|(x, k)| *x = a * *x + b * k);
                seen.push((before, (c.clone(), n.clone()), a, b, m));
            }
            let (mut dc, mut dn) = (vec![0.0; k_n * k_n], vec![0.0; k_n]);
            for t in (0..tokens).rev() {
                let (row, gate) = (r * tokens + t, (r * tokens + t) * h_n + h);
                let cols = gate * k_n..(gate + 1) * k_n;
                let ((c0, n0), (c, n), a, b, m) = &seen[t];
                let (q, k, v) = (&q[cols.clone()], &k[cols.clone()], &v[cols.clone()]);
                let dy = &dy[cols.clone()];
                let nq = scale * n.iter().zip(q).map(|(n, q)| n * q).sum::<f64>();
                let den = nq.abs().max((-m).exp()) + 1e-6;
                let h_of = |y: usize| scale * (0..k_n).map(|x| c[x * k_n + y] * q[x]).sum::<f64>() / den;
                let dden = -(0..k_n).map(|y| dy[y] * h_of(y)).sum::<f64>() / den;
                let e = if nq.abs() > (-m).exp() { dden * nq.signum() } else { 0.0 };
                for x in 0..k_n {
                    dn[x] += scale * q[x] * e;
                    let line = x * k_n..(x + 1) * k_n;
                    let read: f64 = c[line.clone()].iter().zip(dy).map(|(c, d)| c * d / den).sum();
                    grads[Q][cols.start + x] = scale * (read + n[x] * e);
                    dc[line.clone()].iter_mut().zip(dy).for_each(|(o, d)| *o += scale * q[x] * d / den);
                    let wrote: f64 = dc[line].iter().zip(v).map(|(d, v)| d * v).sum();
                    grads[K][cols.start + x] = b * (wrote + dn[x]);
                }
                for y in 0..k_n {
                    grads[V][cols.start + y] = b * (0..k_n).map(|x| dc[x * k_n + y] * k[x]).sum::<f64>();
                }
                grads[I][gate] = grads[K][cols].iter().zip(k).map(|(d, k)| d * k).sum();
                let kept: f64 = dc.iter().zip(c0).chain(dn.iter().zip(n0)).map(|(d, s)| d * s).sum();
                grads[F][gate] = a * kept / (1.0 + gf[gate].exp());
                let keep = if pos[row] == 0 { 0.0 } else { *a };
                dc.iter_mut().chain(&mut dn).for_each(|x| *x *= keep);
            }
        }
        let narrow = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
        grads.into_iter().zip(ins).map(|(x, t)| Tensor::f32(&t.ty.dims, narrow(x))).collect()
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        let k = ins[Q].cols() / self.heads;
        Flops::float(ins[Q].rows() * self.heads * (24 * k * k + 100))
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let [rows, tokens, d] = cx.ty(Q).dims[..] else { unreachable!("checked by infer") };
        let k = d / self.heads;
        let size = k * k + k;
        let at = cx.grid(rows * self.heads);
        let (r, h) = (cx.bind(&at / self.heads), cx.bind(&at % self.heads));
        let pieces = Pieces::new(cx, tokens, size);
        let mut scratch = |name: &str, len: usize| cx.scratch(name, DType::F32, len);
        let f = Frame {
            heads: self.heads,
            k,
            states: pieces.states,
            grad: scratch("grad", size),
            gates: [scratch("kept", tokens), scratch("added", tokens), scratch("floor", tokens)],
            d: scratch("d", k),
            read: scratch("read", k),
            row0: cx.bind(r * tokens),
            h,
        };
        let start = Expr::from(0);
        let m = if self.carry {
            let [c, n, m] = [STATE, STATE + 1, STATE + 2].map(|i| cx.buf(i));
            let (c0, n0) = (cx.bind(&at * (k * k)), cx.bind(&at * k));
            cx.lanes(0, k * k, 4, |cx, i| cx.store(f.states, &i, Expr::load(c, &c0 + &i)));
            cx.lanes(0, k, 1, |cx, i| cx.store(f.states, &i + k * k, Expr::load(n, &n0 + i)));
            cx.local(Expr::load(m, at))
        } else {
            clear(cx, f.states, &start, size);
            cx.local(f32c(NEG))
        };
        clear(cx, f.grad, &start, size);
        cx.each(0, tokens, |cx, t| f.gate(cx, &t, m));
        pieces.there_and_back(cx, &|cx, t, from, to| f.step(cx, t, from, to), &|cx, t, from| f.back(cx, t, from));
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 2e-4, atol: 1e-4 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let all = Mlstm::samples().into_iter();
        all.map(|(op, mut ins)| {
            ins.insert(DY, ins[V].clone());
            (MlstmGrad { heads: op.heads, carry: op.carry }, ins)
        })
        .collect()
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        let forward = Mlstm { heads: self.heads, chunk: 0, carry: self.carry };
        match k {
            DY => super::random_tensor(ty, random),
            k if k > DY => forward.sample_input(k - 1, ty, random),
            k => forward.sample_input(k, ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, ins) = Self::samples().remove(0);
        let with = super::heads::with_operand;
        vec![with(DY, Type::f32(&[1, 1, 1])), with(I, Type::f32(&[1])), (MlstmGrad { carry: !op.carry, ..op }, ins)]
    }
}

/// One head of one row. A state is `C`, then `n`.
struct Frame {
    heads: usize,
    k: usize,
    /// States before and behind the tokens of a piece.
    states: Buf,
    /// Gradient of the state.
    grad: Buf,
    /// For every token what is kept, what is added, and `e^(-m)`.
    gates: [Buf; 3],
    /// `dy / den` of a token.
    d: Buf,
    /// `C dy / den` of a token.
    read: Buf,
    /// Row of the first token.
    row0: Expr,
    h: Expr,
}

impl Frame {
    fn size(&self) -> usize {
        self.k * self.k + self.k
    }

    /// The row of token `t`, its first column and its gate.
    fn place(&self, cx: &mut Lower<'_>, t: &Expr) -> [Expr; 3] {
        let row = cx.bind(&self.row0 + t);
        let gate = cx.bind(&row * self.heads + &self.h);
        [row, cx.bind(&gate * self.k), gate]
    }

    fn gate(&self, cx: &mut Lower<'_>, t: &Expr, m: crate::loops::Var) {
        let [row, _, gate] = self.place(cx, t);
        let [i, f, pos] = [I, F, POS].map(|i| cx.buf(i));
        let before = cx.bind(Expr::load(pos, row).eq(i32c(0)).select(f32c(NEG), m));
        let lf = math::softplus(cx, -Expr::load(f, &gate));
        let kept = cx.bind(before - lf);
        let i = cx.bind(Expr::load(i, gate));
        let next = cx.bind(kept.clone().max(i.clone()));
        for (buf, e) in self.gates.iter().zip([kept - &next, i - &next, -next.clone()]) {
            let e = math::exp(cx, e);
            cx.store(*buf, t, e);
        }
        cx.set(m, next);
    }

    /// The state behind token `t` at `to` of `states`, from that at `from`, which does not count where a document starts.
    fn step(&self, cx: &mut Lower<'_>, t: &Expr, from: &Expr, to: &Expr) {
        let k_n = self.k;
        let [row, cols, _] = self.place(cx, t);
        let [k, v, pos] = [K, V, POS].map(|i| cx.buf(i));
        let fresh = cx.bind(Expr::load(pos, row).eq(i32c(0)));
        let before = |at: Expr| fresh.clone().select(f32c(0.0), Expr::load(self.states, at));
        let (a, b) = (cx.bind(Expr::load(self.gates[0], t)), cx.bind(Expr::load(self.gates[1], t)));
        cx.each(0, k_n, |cx, x| {
            let key = cx.bind(Expr::load(k, &cols + &x) * &b);
            let line = cx.bind(x * k_n);
            cx.lanes(0, k_n, 4, |cx, y| {
                let at = cx.bind(&line + &y);
                let kept = before(from + &at) * &a;
                cx.store(self.states, to + at, Expr::load(v, &cols + y).fma(&key, kept));
            });
        });
        cx.lanes(k_n * k_n, self.size(), 1, |cx, at| {
            let key = Expr::load(k, &cols + &at - k_n * k_n) * &b;
            cx.store(self.states, to + &at, before(from + &at) * &a + key);
        });
    }

    /// The gradients of token `t`; the state before it is at `from` of `states`, that behind it follows.
    fn back(&self, cx: &mut Lower<'_>, t: &Expr, from: &Expr) {
        let (k_n, states, grad, d) = (self.k, self.states, self.grad, self.d);
        let square = k_n * k_n;
        let [row, cols, gate] = self.place(cx, t);
        let [q, k, v, f, pos, dy] = [Q, K, V, F, POS, DY].map(|i| cx.buf(i));
        let scale = f32c((k_n as f32).powf(-0.5));
        let after = cx.bind(from + self.size());
        let fresh = cx.bind(Expr::load(pos, row).eq(i32c(0)));
        let before = |at: Expr| fresh.clone().select(f32c(0.0), Expr::load(states, at));
        let [a, b, floor] = self.gates.map(|g| cx.bind(Expr::load(g, t)));
        let nq = cx
            .reduce(0, k_n, |_, x| vec![Acc::Dot(Expr::load(states, &after + &x + square), Expr::load(q, &cols + x))]);
        let nq = cx.bind(&nq[0] * &scale);
        let size = cx.bind(nq.clone().abs());
        let den = cx.bind(size.clone().max(floor.clone()) + f32c(1e-6));
        // dy h: the part of every key in what was read.
        let read = cx.local(f32c(0.0));
        cx.each(0, k_n, |cx, x| {
            let line = cx.bind(&after + &x * k_n);
            let dot =
                cx.reduce(0, k_n, |_, y| vec![Acc::Dot(Expr::load(states, &line + &y), Expr::load(dy, &cols + y))]);
            let dot = cx.bind(&dot[0] / &den);
            cx.set(read, (Expr::load(q, &cols + &x) * &scale).fma(dot.clone(), read));
            cx.store(self.read, x, dot);
        });
        let slope = cx.bind(-(Expr::from(read) / &den));
        let signed = cx.bind(nq.lt(f32c(0.0)).select(-slope.clone(), slope.clone()));
        let e = cx.bind(floor.lt(size).select(signed, f32c(0.0)));
        cx.lanes(0, k_n, 1, |cx, y| cx.store(d, &y, Expr::load(dy, &cols + &y) / &den));
        let (di, kept) = (cx.local(f32c(0.0)), cx.local(f32c(0.0)));
        cx.each(0, k_n, |cx, x| {
            let line = cx.bind(&x * k_n);
            let query = cx.bind(Expr::load(q, &cols + &x) * &scale);
            cx.lanes(0, k_n, 4, |cx, y| {
                let at = cx.bind(&line + &y);
                cx.store(grad, &at, query.clone().fma(Expr::load(d, y), Expr::load(grad, &at)));
            });
            let dots = cx.reduce(0, k_n, |cx, y| {
                let at = cx.bind(&line + &y);
                let g = cx.bind(Expr::load(grad, &at));
                vec![Acc::Dot(g.clone(), Expr::load(v, &cols + y)), Acc::Dot(g, before(from + at))]
            });
            let n = cx.bind(&x + square);
            let dn = cx.bind(query.fma(e.clone(), Expr::load(grad, &n)));
            cx.store(grad, &n, &dn);
            let dk = cx.bind((&dots[0] + &dn) * &b);
            let dq = Expr::load(states, &after + &n).fma(e.clone(), Expr::load(self.read, &x));
            cx.put(0, &cols + &x, dq * &scale);
            cx.set(di, Expr::load(k, &cols + &x).fma(dk.clone(), di));
            cx.put(1, &cols + &x, dk);
            cx.set(kept, dn.fma(before(from + n), Expr::from(kept) + &dots[1]));
        });
        cx.lanes(0, k_n, 4, |cx, y| {
            let sum = cx.local(f32c(0.0));
            cx.each(0, k_n, |cx, x| {
                cx.set(sum, Expr::load(k, &cols + &x).fma(Expr::load(grad, x * k_n + &y), sum));
            });
            cx.put(2, &cols + y, sum * &b);
        });
        cx.put(3, &gate, di);
        let open = math::sigmoid(cx, -Expr::load(f, &gate));
        cx.put(4, gate, kept * &a * open);
        let keep = cx.bind(fresh.clone().select(f32c(0.0), a.clone()));
        cx.lanes(0, self.size(), 4, |cx, i| cx.store(grad, &i, Expr::load(grad, &i) * &keep));
    }
}
