//! The gradients of the step size of the exact flow of the delta rule.

use super::{
    Accuracy, EflaBeta, Flops, InferError, OpDef,
    efla_beta::SMALL,
    heads::{expect, operands},
};
use crate::{
    Tensor, Type,
    loops::{Acc, Expr, f32c, math},
    lower::Lower,
};

/// `(k [R,T,H*K], beta [R,T,H], y [R,T,H], dy [R,T,H]) -> (dk, dbeta)` for `y` of [`super::EflaBeta`] with `s = |k|^2`:
/// `dbeta = dy e^(-beta s)`, `dk = 2 k dy (beta e^(-beta s) - y) / s`, and for small `s` `dy (1 - beta s)` and `-k dy beta^2`.
#[derive(Clone, Debug, PartialEq)]
pub struct EflaGrad {
    /// H.
    pub heads: usize,
}

impl OpDef for EflaGrad {
    const NAME: &'static str = "efla_grad";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        operands(Self::NAME, ins, 4)?;
        let y = EflaBeta { heads: self.heads }.infer(&ins[..2])?.remove(0);
        expect(Self::NAME, "y", &ins[2], &y)?;
        expect(Self::NAME, "dy", &ins[3], &y)?;
        Ok(ins[..2].to_vec())
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let width = ins[0].ty.cols() / self.heads;
        let (mut dk, mut dbeta) = (vec![], vec![]);
        for (i, k) in ins[0].as_f32().chunks_exact(width).enumerate() {
            let [beta, y, dy] = [1, 2, 3].map(|x| f64::from(ins[x].as_f32()[i]));
            let s: f64 = k.iter().map(|&x| f64::from(x).powi(2)).sum();
            let e = (-beta * s).exp();
            let small = s < f64::from(SMALL);
            let slope = if small { -beta * beta } else { 2.0 * (beta * e - y) / s };
            dbeta.push((dy * if small { 1.0 - beta * s } else { e }) as f32);
            dk.extend(k.iter().map(|&k| (dy * slope * f64::from(k)) as f32));
        }
        vec![Tensor::f32(&ins[0].ty.dims, dk), Tensor::f32(&ins[1].ty.dims, dbeta)]
    }

    fn flops(&self, ins: &[Type], outs: &[Type]) -> Flops {
        Flops::float(3 * ins[0].numel() + 20 * outs[1].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, width) = (cx.ty(0).rows(), cx.ty(0).cols() / self.heads);
        let [k, beta, y, dy] = [0, 1, 2, 3].map(|i| cx.buf(i));
        let row = cx.grid(rows);
        cx.each(0, self.heads, |cx, h| {
            let gate = cx.bind(&row * self.heads + &h);
            let at = cx.bind(&gate * width);
            let s = cx.reduce(0, width, |_, c| vec![Acc::Dot(Expr::load(k, &at + &c), Expr::load(k, &at + c))]);
            let s = s[0].clone();
            let [beta, y, dy] = [beta, y, dy].map(|b| cx.bind(Expr::load(b, &gate)));
            let small = cx.bind(s.clone().lt(f32c(SMALL)));
            let e = math::exp(cx, -(&beta * &s));
            let e = cx.bind(e);
            let dbeta = small.clone().select(f32c(1.0) - &beta * &s, e.clone());
            cx.put(1, gate, dbeta * &dy);
            let slope = (&beta * &e - y) * f32c(2.0) / s.max(f32c(SMALL));
            let slope = cx.bind(small.select(-(&beta * &beta), slope) * dy);
            cx.lanes(0, width, 2, |cx, c| cx.put(0, &at + &c, Expr::load(k, &at + c) * &slope));
        });
    }

    fn accuracy(&self) -> Accuracy {
        // A difference of two close numbers over a small one.
        Accuracy::Close { rtol: 1e-3, atol: 1e-3 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let all = EflaBeta::samples().into_iter();
        all.map(|(op, ins)| {
            let gate = ins[1].clone();
            (EflaGrad { heads: op.heads }, [ins, vec![gate.clone(), gate]].concat())
        })
        .collect()
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        EflaBeta { heads: self.heads }.sample_input(k.min(1), ty, random)
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, mut ins) = Self::samples().remove(0);
        let short = ins[..3].to_vec();
        ins[3] = Type::f32(&[1]);
        vec![(op.clone(), ins), (op, short)]
    }
}
