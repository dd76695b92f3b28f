//! Balance of experts by their selection bias.

use super::{Accuracy, Axis, Flops, InferError, OpDef};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, Ty, f32c},
    lower::Lower,
};

/// `out[e] = bias[e] + rate * sign(mean(load) - load[e])` (semantics 4.2): bias `f32 [E]`, load `i32 [E]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Balance {
    /// Size of the step.
    pub rate: f32,
}

impl OpDef for Balance {
    const NAME: &'static str = "balance";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [b, l] if b.dtype == DType::F32 && *l == b.with(DType::I32) && b.dims.len() == 1 => Ok(vec![b.clone()]),
            _ => Err(InferError::new(Self::NAME, "takes a bias f32 [E] and a load i32 [E]")),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let load = ins[1].to_i64();
        let total: i64 = load.iter().sum();
        let n = load.len() as i64;
        // The sign of mean - load, without a division.
        let sign = |l: i64| (total - l * n).signum() as f32;
        let out = ins[0].as_f32().iter().zip(load).map(|(b, l)| b + self.rate * sign(l)).collect();
        vec![Tensor::f32(&ins[0].ty.dims, out)]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(3 * ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let n = cx.ty(0).numel();
        let (bias, load) = (cx.buf(0), cx.buf(1));
        let total = cx.b.sum(0, n, |_, i| Expr::load(load, i));
        cx.each(0, n, |cx, e| {
            let own = cx.b.bind(Expr::load(load, &e) * Expr::I32(n as i32));
            let above = cx.b.bind(own.clone().lt(&total).cast(Ty::I32).cast(Ty::F32));
            let below = cx.b.bind(total.clone().lt(own).cast(Ty::I32).cast(Ty::F32));
            let value = Expr::load(bias, &e) + f32c(self.rate) * (above - below);
            cx.put(0, e, value);
        });
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared; ins.len()]
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Bits
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![(Balance { rate: 1e-3 }, vec![Type::f32(&[5]), Type::i32(&[5])])]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![(Balance { rate: 1e-3 }, vec![Type::f32(&[5]), Type::i32(&[4])])]
    }
}
