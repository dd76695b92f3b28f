//! The step in which something that lasts several steps began.

use super::{Axis, Flops, InferError, OpDef};
use crate::{
    Tensor, Type,
    loops::{Expr, Ty},
    lower::Lower,
};

/// `step i32 [1] -> i32 [1]`: the greatest multiple of `period` that is not above `step`; 0 for negative steps.
#[derive(Clone, Debug, PartialEq)]
pub struct PeriodStart {
    /// The number of steps.
    pub period: usize,
}

impl OpDef for PeriodStart {
    const NAME: &'static str = "period_start";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        if *ins == [Type::i32(&[1])] && (1..=i32::MAX as usize).contains(&self.period) {
            return Ok(ins.to_vec());
        }
        Err(InferError::new(Self::NAME, "takes one i32 [1] and wants a period of at least one step"))
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let step = ins[0].to_i64()[0].max(0);
        vec![Tensor::i32(&[1], vec![(step - step % self.period as i64) as i32])]
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let step = Expr::load(cx.buf(0), Expr::from(0)).cast(Ty::I64).max(Expr::from(0));
        let step = cx.bind(step);
        let start = &step - &step % self.period;
        cx.put(0, 0, start.cast(Ty::I32));
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        [1, 50].into_iter().map(|period| (PeriodStart { period }, vec![Type::i32(&[1])])).collect()
    }

    fn sample_input(&self, _: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        Tensor::i32(&ty.dims, vec![(random() * 1000.0) as i32])
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (PeriodStart { period: 0 }, vec![Type::i32(&[1])]),
            (PeriodStart { period: 5 }, vec![Type::i32(&[2])]),
            (PeriodStart { period: 5 }, vec![Type::f32(&[1])]),
        ]
    }
}
