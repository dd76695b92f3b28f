//! Which batch rows take part in one iteration of the depth loop.
//!
//! A row that is masked keeps everything it has; this operation only says which.

use super::{Axis, Flops, InferError, OpDef, VjpCx};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Expr, Ty, i32c},
    lower::Lower,
};

/// `(depth i32 [R], done i32 [R], k i32 [1]) -> active i32 [R]`: 1 where `k < depth` and `done` is 0. Section 9.2 of the semantics.
#[derive(Clone, Debug, PartialEq)]
pub struct LoopMask {}

impl OpDef for LoopMask {
    const NAME: &'static str = "loop_mask";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [depth, done, k]
                if depth.dtype == DType::I32 && depth.dims.len() == 1 && done == depth && *k == Type::i32(&[1]) =>
            {
                Ok(vec![depth.clone()])
            }
            _ => Err(InferError::new(Self::NAME, "takes depth i32 [R], done i32 [R] and k i32 [1]")),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (depth, done, k) = (ins[0].to_i64(), ins[1].to_i64(), ins[2].to_i64()[0]);
        let active = depth.iter().zip(&done).map(|(&depth, &done)| i32::from(k < depth && done == 0)).collect();
        vec![Tensor::i32(&ins[0].ty.dims, active)]
    }

    fn vjp(&self, _: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        Ok(vec![None; 3])
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, k) = (cx.ty(0).numel(), cx.buf(2));
        cx.grid(1);
        let k = cx.bind(Expr::load(k, 0));
        let (depth, done) = (cx.buf(0), cx.buf(1));
        cx.lanes(0, rows, 1, |cx, r| {
            let active = k.clone().lt(Expr::load(depth, &r)) & Expr::load(done, &r).eq(i32c(0));
            cx.put(0, r, active.cast(Ty::I32));
        });
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Rows, Axis::Rows, Axis::Shared]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |r: usize| (LoopMask {}, vec![Type::i32(&[r]), Type::i32(&[r]), Type::i32(&[1])]);
        vec![of(11), of(1)]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (LoopMask {}, vec![Type::i32(&[3]), Type::i32(&[2]), Type::i32(&[1])]),
            (LoopMask {}, vec![Type::f32(&[3]), Type::i32(&[3]), Type::i32(&[1])]),
            (LoopMask {}, vec![Type::i32(&[3]), Type::i32(&[3])]),
        ]
    }
}
