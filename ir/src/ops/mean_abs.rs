//! Mean magnitude of a tensor.
//!
//! The sum is double precision and rounded once, so that the result does not show the order of summation.

use super::{Accuracy, Axis, Flops, InferError, OpDef, VjpCx};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Expr, Ty, f32c, f64c},
    lower::Lower,
};

/// `w [...] -> [1]`: `max(f32(mean |w|), floor)`, the mean in double precision.
#[derive(Clone, Debug, PartialEq)]
pub struct MeanAbs {
    /// The least result.
    pub floor: f32,
}

impl OpDef for MeanAbs {
    const NAME: &'static str = "mean_abs";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [w] if w.dtype == DType::F32 => Ok(vec![Type::f32(&[1])]),
            _ => Err(InferError::new(Self::NAME, "takes one f32 operand")),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let w = ins[0].as_f32();
        let mean = w.iter().map(|x| f64::from(x.abs())).sum::<f64>() / w.len() as f64;
        vec![Tensor::f32(&[1], vec![(mean as f32).max(self.floor)])]
    }

    fn vjp(&self, _: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        // A scale of perturbations, a constant for gradients.
        Ok(vec![None])
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(2 * ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (n, w) = (cx.ty(0).numel(), cx.buf(0));
        cx.grid(1);
        let sum = cx.sum(0, n, |_, i| Expr::load(w, i).abs().cast(Ty::F64));
        cx.put(0, 0, (sum / f64c(n as f64)).cast(Ty::F32).max(f32c(self.floor)));
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared]
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1.2e-7, atol: 0.0 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![
            (MeanAbs { floor: 1e-3 }, vec![Type::f32(&[7, 11])]),
            (MeanAbs { floor: 2.0 }, vec![Type::f32(&[3])]),
            (MeanAbs { floor: 0.0 }, vec![Type::f32(&[1])]),
        ]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![(MeanAbs { floor: 0.0 }, vec![]), (MeanAbs { floor: 0.0 }, vec![Type::i32(&[3])])]
    }
}
