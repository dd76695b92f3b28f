//! Root mean square of a whole tensor.
//!
//! Runs of [`RUN`] elements are summed in single precision, the runs in double precision, so size does not cost accuracy.

use super::{Accuracy, Axis, Flops, InferError, OpDef, long::long};
use crate::{
    DType, Tensor, Type,
    loops::{Acc, Expr, Ty, f64c},
    lower::Lower,
};

/// Elements of one run.
const RUN: usize = 1024;

/// `g [...] -> [1]`: `sqrt(mean(g^2))`.
#[derive(Clone, Debug, PartialEq)]
pub struct RmsScalar {}

impl OpDef for RmsScalar {
    const NAME: &'static str = "rms_scalar";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [g] if g.dtype == DType::F32 => Ok(vec![Type::f32(&[1])]),
            _ => Err(InferError::new(Self::NAME, "takes one f32 operand")),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let g = ins[0].as_f32();
        let mean = g.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / g.len() as f64;
        vec![Tensor::f32(&[1], vec![mean.sqrt() as f32])]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(2 * ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (n, g) = (cx.ty(0).numel(), cx.buf(0));
        cx.grid(1);
        let total = cx.local(f64c(0.0));
        let run = |cx: &mut Lower<'_>, at: &Expr, n: usize| {
            let sum = long(cx, n, &|cx, i| {
                let x = cx.bind(Expr::load(g, at + i));
                Acc::Dot(x.clone(), x)
            });
            cx.set(total, total + sum.cast(Ty::F64));
        };
        let full = n / RUN * RUN;
        if full > 0 {
            cx.each_step(0, full, RUN, |cx, at| run(cx, &at, RUN));
        }
        if n > full {
            run(cx, &Expr::from(full), n - full);
        }
        cx.put(0, 0, (total / f64c(n as f64)).sqrt().cast(Ty::F32));
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared]
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-6, atol: 0.0 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        [vec![7, 11], vec![1], vec![43, 51]].into_iter().map(|d| (RmsScalar {}, vec![Type::f32(&d)])).collect()
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![(RmsScalar {}, vec![]), (RmsScalar {}, vec![Type::i32(&[3])])]
    }
}
