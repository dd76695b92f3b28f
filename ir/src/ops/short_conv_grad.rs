//! The gradients of a short convolution.

use super::{
    Accuracy, Flops, InferError, OpDef, ShortConv,
    heads::{expect, operands, sample_positions},
};
use crate::{
    Tensor, Type,
    loops::{Expr, Var, f32c, i32c, int},
    lower::Lower,
};

/// `(u [R,T,D], kernel [D,n], pos [R,T], dy [R,T,D], last [R,n-1,D] if carried) -> (du [R,T,D], dkernel [D,n])` for
/// [`super::ShortConv`]: `du[t] = sum over lag of dy[t + lag] kernel[n - 1 - lag]`, `dkernel[j] = sum over tokens of dy[t] u[t - lag]`,
/// over the pairs of tokens that the convolution joins. The carried inputs are constants.
#[derive(Clone, Debug, PartialEq)]
pub struct ShortConvGrad {
    /// n, at least 2.
    pub taps: usize,
    /// Whether the inputs before the first token are an operand.
    pub carry: bool,
}

const U: usize = 0;
const KERNEL: usize = 1;
const POS: usize = 2;
const DY: usize = 3;
const LAST: usize = 4;
/// Columns of one instance.
const WIDTH: usize = 16;

impl ShortConvGrad {
    fn forward(&self) -> ShortConv {
        ShortConv { taps: self.taps, carry: self.carry }
    }
}

impl OpDef for ShortConvGrad {
    const NAME: &'static str = "short_conv_grad";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        operands(Self::NAME, ins, 4 + usize::from(self.carry))?;
        let forward: Vec<Type> = ins[..DY].iter().chain(&ins[LAST..]).cloned().collect();
        let y = self.forward().infer(&forward)?.remove(0);
        expect(Self::NAME, "dy", &ins[DY], &y)?;
        expect(Self::NAME, "the kernel", &ins[KERNEL], &Type::f32(&[y.cols(), self.taps]))?;
        Ok(vec![y, ins[KERNEL].clone()])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let [rows, tokens, d] = ins[U].ty.dims[..] else { unreachable!("checked by infer") };
        let (u, kernel, dy, n) = (ins[U].as_f32(), ins[KERNEL].as_f32(), ins[DY].as_f32(), self.taps);
        let pos = ins[POS].to_i64();
        let (mut du, mut dk) = (vec![0.0f64; u.len()], vec![0.0f64; kernel.len()]);
        for (r, t, c) in (0..rows).flat_map(|r| (0..tokens).flat_map(move |t| (0..d).map(move |c| (r, t, c)))) {
            let g = f64::from(dy[(r * tokens + t) * d + c]);
            for lag in (0..n).filter(|&lag| pos[r * tokens + t] >= lag as i64) {
                let tap = c * n + n - 1 - lag;
                if t >= lag {
                    let from = (r * tokens + t - lag) * d + c;
                    du[from] += g * f64::from(kernel[tap]);
                    dk[tap] += g * f64::from(u[from]);
                } else if self.carry {
                    dk[tap] += g * f64::from(ins[LAST].as_f32()[(r * (n - 1) + n - 1 + t - lag) * d + c]);
                }
            }
        }
        let narrow = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
        vec![Tensor::f32(&ins[U].ty.dims, narrow(du)), Tensor::f32(&ins[KERNEL].ty.dims, narrow(dk))]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(4 * self.taps * ins[U].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let [rows, tokens, d] = cx.ty(U).dims[..] else { unreachable!("checked by infer") };
        let n = self.taps;
        let lo = cx.b.grid(d.div_ceil(WIDTH)) * WIDTH;
        let lo = cx.bind(lo);
        let hi = cx.bind((&lo + WIDTH).min(int(d)));
        cx.lanes(lo, hi, 4, |cx, c| {
            let kernel = cx.buf(KERNEL);
            let taps: Vec<Expr> = (0..n).map(|lag| cx.bind(Expr::load(kernel, &c * n + (n - 1 - lag)))).collect();
            let sums: Vec<Var> = (0..n).map(|_| cx.local(f32c(0.0))).collect();
            cx.each(0, rows, |cx, r| {
                let first = tokens.min(n - 1);
                for t in 0..first {
                    self.token(cx, &r, &Expr::from(t), t, &c, &sums);
                }
                cx.each(first, tokens, |cx, t| self.token(cx, &r, &t, n - 1, &c, &sums));
                let last = tokens.saturating_sub(n - 1);
                cx.each(0, last, |cx, t| self.input(cx, &r, &t, n - 1, &c, &taps));
                for t in last..tokens {
                    self.input(cx, &r, &Expr::from(t), tokens - 1 - t, &c, &taps);
                }
            });
            for (lag, sum) in sums.into_iter().enumerate() {
                cx.put(1, &c * n + (n - 1 - lag), sum);
            }
        });
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-5, atol: 1e-5 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |taps, carry, (r, t, d): (usize, usize, usize)| {
            let x = Type::f32(&[r, t, d]);
            let mut ins = vec![x.clone(), Type::f32(&[d, taps]), Type::i32(&[r, t]), x];
            if carry {
                ins.push(Type::f32(&[r, taps - 1, d]));
            }
            (ShortConvGrad { taps, carry }, ins)
        };
        vec![of(4, false, (2, 9, 21)), of(4, true, (3, 7, 16)), of(2, true, (2, 1, 5)), of(5, false, (1, 3, 4))]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        if k == POS { sample_positions(ty) } else { super::random_tensor(ty, random) }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, ins) = Self::samples().remove(0);
        let with = super::heads::with_operand;
        vec![
            with(DY, Type::f32(&[2, 9, 20])),
            with(KERNEL, Type::f32(&[2, 21, 4])),
            (ShortConvGrad { carry: true, ..op }, ins),
        ]
    }
}

impl ShortConvGrad {
    /// What token `t` adds to the gradient of the kernel; `known` tokens of this call are before it, at least.
    fn token(&self, cx: &mut Lower<'_>, r: &Expr, t: &Expr, known: usize, c: &Expr, sums: &[Var]) {
        let [_, tokens, d] = cx.ty(U).dims[..] else { unreachable!("checked by infer") };
        let [u, pos, dy] = [U, POS, DY].map(|k| cx.buf(k));
        let row = cx.bind(r * tokens + t);
        let at = cx.bind(&row * d + c);
        let seen = cx.bind(Expr::load(pos, row));
        let g = cx.bind(Expr::load(dy, &at));
        for (lag, &sum) in sums.iter().enumerate() {
            let x = match (lag <= known, self.carry) {
                (true, _) => Expr::load(u, &at - lag * d),
                (false, true) => {
                    let slot = r * (self.taps - 1) + t + (self.taps - 1 - lag);
                    Expr::load(cx.buf(LAST), slot * d + c)
                }
                (false, false) => continue,
            };
            let x = i32c(lag as i32).le(seen.clone()).select(x, f32c(0.0));
            cx.set(sum, g.clone().fma(x, sum));
        }
    }

    /// The gradient of input `t`, which at most `ahead` tokens behind it have seen.
    fn input(&self, cx: &mut Lower<'_>, r: &Expr, t: &Expr, ahead: usize, c: &Expr, taps: &[Expr]) {
        let [_, tokens, d] = cx.ty(U).dims[..] else { unreachable!("checked by infer") };
        let (pos, dy) = (cx.buf(POS), cx.buf(DY));
        let row = cx.bind(r * tokens + t);
        let sum = cx.local(f32c(0.0));
        for (lag, tap) in taps.iter().enumerate().take(ahead + 1) {
            let seen = i32c(lag as i32).le(Expr::load(pos, &row + lag));
            let g = seen.select(Expr::load(dy, (&row + lag) * d + c), f32c(0.0));
            cx.set(sum, g.fma(tap, sum));
        }
        cx.put(0, row * d + c, sum);
    }
}
