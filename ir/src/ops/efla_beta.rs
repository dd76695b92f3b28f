//! The step size of the exact flow of the delta rule.

use super::{
    Accuracy, EflaGrad, Flops, InferError, OpDef, VjpCx,
    heads::{expect, operands, sample_between, split},
};
use crate::{
    Tensor, Type, Value,
    loops::{Acc, Builder, Expr, f32c, math},
    lower::Lower,
};

/// `(1 - e^(-beta s)) / s` with `s = |k|^2` per head, and `beta (1 - beta s / 2)` for `s < 1e-4`.
///
/// `(k [R,T,H*K], beta [R,T,H]) -> [R,T,H]`. Source: component semantics 5.1.
#[derive(Clone, Debug, PartialEq)]
pub struct EflaBeta {
    /// H.
    pub heads: usize,
}

pub(super) const SMALL: f32 = 1e-4;

impl OpDef for EflaBeta {
    const NAME: &'static str = "efla_beta";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        operands(Self::NAME, ins, 2)?;
        let (r, t, _) = split(Self::NAME, "k", &ins[0], self.heads)?;
        expect(Self::NAME, "beta", &ins[1], &Type::f32(&[r, t, self.heads]))?;
        Ok(vec![ins[1].clone()])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let width = ins[0].ty.cols() / self.heads;
        let step = |(k, &beta): (&[f32], &f32)| {
            let s: f32 = k.iter().map(|x| x * x).sum();
            if s < SMALL { beta * (1.0 - beta * s / 2.0) } else { -(-beta * s).exp_m1() / s }
        };
        let out = ins[0].as_f32().chunks_exact(width).zip(ins[1].as_f32()).map(step).collect();
        vec![Tensor::f32(&ins[1].ty.dims, out)]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let ins = [cx.ins[0], cx.ins[1], cx.outs[0], cx.grad()];
        let outs = cx.graph.ops(EflaGrad { heads: self.heads }, &ins)?;
        Ok(outs.into_iter().map(Some).collect())
    }

    fn flops(&self, ins: &[Type], outs: &[Type]) -> Flops {
        Flops::float(2 * ins[0].numel() + 20 * outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, width) = (cx.ty(0).rows(), cx.ty(0).cols() / self.heads);
        let row = cx.grid(rows);
        cx.each(0, self.heads, |cx, h| {
            let at = cx.bind(&h * width);
            let s = cx.reduce(0, width, |cx, c| {
                let k = cx.load(0, &row, &(&at + c));
                let k = cx.bind(k);
                vec![Acc::Dot(k.clone(), k)]
            });
            let (s, beta) = (s[0].clone(), cx.load(1, &row, &h));
            let beta = cx.bind(beta);
            let small = cx.bind(s.clone().lt(f32c(SMALL)));
            let safe = cx.bind(small.clone().select(f32c(1.0), &s));
            let decayed = one_minus_exp(cx, &beta * &safe);
            let series = &beta * (f32c(1.0) - &beta * &s * f32c(0.5));
            cx.push(&row, &h, &[(0, small.select(series, decayed / safe))]);
        });
    }

    fn pulls(&self) -> &'static [usize] {
        &[0, 1]
    }

    fn pushes(&self) -> std::ops::Range<usize> {
        0..1
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 5e-6, atol: 1e-7 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of =
            |heads, (r, t, k)| (EflaBeta { heads }, vec![Type::f32(&[r, t, heads * k]), Type::f32(&[r, t, heads])]);
        vec![of(2, (2, 3, 5)), of(3, (1, 1, 24)), of(1, (4, 1, 1))]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        if k == 1 {
            return sample_between(ty, 0.0, 1.0, random);
        }
        // Magnitudes from 1e-4 to 1, one for every row.
        let cols = ty.cols();
        let data = (0..ty.numel()).map(|i| random() * 0.1f32.powi((i / cols % 5) as i32)).collect();
        Tensor::f32(&ty.dims, data)
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (EflaBeta { heads: 2 }, vec![Type::f32(&[2, 3, 5]), Type::f32(&[2, 3, 2])]),
            (EflaBeta { heads: 2 }, vec![Type::f32(&[2, 3, 4]), Type::f32(&[2, 3, 1])]),
            (EflaBeta { heads: 0 }, vec![Type::f32(&[2, 3, 4]), Type::f32(&[2, 3, 1])]),
            (EflaBeta { heads: 2 }, vec![Type::f32(&[2, 3, 4])]),
        ]
    }
}

/// `1 - e^-x` for `x >= 0` without cancellation: the Taylor series below one half.
fn one_minus_exp(b: &mut Builder, x: Expr) -> Expr {
    let x = b.bind(x);
    let e = math::exp(b, -x.clone());
    let mut p = f32c(-1.0 / 40320.0);
    for c in [1.0 / 5040.0, -1.0 / 720.0, 1.0 / 120.0, -1.0 / 24.0, 1.0 / 6.0, -0.5, 1.0] {
        p = b.bind(p.fma(&x, f32c(c)));
    }
    b.bind(x.clone().lt(f32c(0.5)).select(p * &x, f32c(1.0) - e))
}
