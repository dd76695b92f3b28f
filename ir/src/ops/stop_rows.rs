//! A place where the gradients of some batch rows end.
//!
//! A pure copy.

use super::{Flops, InferError, OpDef, Select, VjpCx};
use crate::{DType, Tensor, Type, Value, loops::Expr, lower::Lower};

/// `(mask i32 [R], x [R, ..])` → `x`; the gradient of row `r` is 0 where `mask[r] != 0`.
#[derive(Clone, Debug, PartialEq)]
pub struct StopRows {}

impl OpDef for StopRows {
    const NAME: &'static str = "stop_rows";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [mask, x] if x.dtype == DType::F32 && x.numel() > 0 && *mask == Type::i32(&x.dims[..1]) => {
                Ok(vec![x.clone()])
            }
            _ => Err(InferError::new(Self::NAME, "takes i32 [R] and f32 [R, ..]")),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        vec![ins[1].clone()]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let g = cx.grad();
        let zero = Tensor::zeros(cx.graph.ty(g));
        let zero = cx.graph.constant(zero);
        Ok(vec![None, Some(cx.op(Select {}, &[cx.ins[0], zero, g])?)])
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        cx.pointwise();
    }

    fn element(&self, cx: &mut Lower<'_>, row: &Expr, col: &Expr) -> Option<Expr> {
        Some(cx.load(1, row, col))
    }

    fn is_pointwise(&self) -> bool {
        true
    }

    fn aligned(&self) -> &'static [usize] {
        &[1]
    }

    fn pulls(&self) -> &'static [usize] {
        &[1]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![
            (StopRows {}, vec![Type::i32(&[3]), Type::f32(&[3, 4, 5])]),
            (StopRows {}, vec![Type::i32(&[2]), Type::f32(&[2])]),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        // Gradients end where a mask says so, which differences do not see.
        if k == 0 { Tensor::zeros(ty) } else { super::random_tensor(ty, random) }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (StopRows {}, vec![Type::i32(&[2]), Type::f32(&[3, 4])]),
            (StopRows {}, vec![Type::f32(&[3]), Type::f32(&[3, 4])]),
        ]
    }
}
