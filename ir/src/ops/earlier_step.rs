//! The number of an earlier step.

use super::{Axis, Flops, InferError, OpDef};
use crate::{
    Tensor, Type,
    loops::{Expr, Ty},
    lower::Lower,
};

/// `step i32 [1] -> i32 [1]`: `max(step, 0) - by`, negative where there was no such step.
#[derive(Clone, Debug, PartialEq)]
pub struct EarlierStep {
    /// Steps between.
    pub by: usize,
}

impl OpDef for EarlierStep {
    const NAME: &'static str = "earlier_step";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        if *ins == [Type::i32(&[1])] && self.by <= i32::MAX as usize {
            return Ok(ins.to_vec());
        }
        Err(InferError::new(Self::NAME, "takes one i32 [1] and wants a distance below 2^31"))
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let step = ins[0].to_i64()[0].max(0);
        vec![Tensor::i32(&[1], vec![(step - self.by as i64) as i32])]
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let step = Expr::load(cx.buf(0), Expr::from(0)).cast(Ty::I64).max(Expr::from(0));
        cx.put(0, 0, (step - Expr::from(self.by)).cast(Ty::I32));
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        [0, 1, 50].into_iter().map(|by| (EarlierStep { by }, vec![Type::i32(&[1])])).collect()
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![(EarlierStep { by: 1 }, vec![Type::f32(&[1])]), (EarlierStep { by: 1 << 31 }, vec![Type::i32(&[1])])]
    }
}
