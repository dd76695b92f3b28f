//! The gradient estimate of a full-rank direction per member.
//!
//! Members are added in ascending order, one fused rounding each.

use super::{Axis, Flops, InferError, OpDef};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, f32c},
    lower::Lower,
};

/// `(c [M], z [M, s...]) -> [s...]`: `(sum over b of c[b] z[b]) / M`, ascending from 0. Section 13.4 of the semantics.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightedSum {}

impl OpDef for WeightedSum {
    const NAME: &'static str = "weighted_sum";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [c, z]
                if c.dtype == DType::F32
                    && c.dims.len() == 1
                    && z.dtype == DType::F32
                    && z.dims.len() > 1
                    && z.dims[0] == c.dims[0] =>
            {
                Ok(vec![Type::f32(&z.dims[1..])])
            }
            _ => Err(InferError::new(Self::NAME, "takes c [M] and z [M, s...], both f32")),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (c, z) = (ins[0].as_f32(), ins[1].as_f32());
        let n = z.len() / c.len();
        let sum = |i: usize| c.iter().enumerate().fold(0.0, |sum: f32, (b, c)| c.mul_add(z[b * n + i], sum));
        vec![Tensor::f32(&ins[1].ty.dims[1..], (0..n).map(|i| sum(i) / c.len() as f32).collect())]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(2 * ins[1].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        cx.pointwise();
    }

    fn element(&self, cx: &mut Lower<'_>, row: &Expr, col: &Expr) -> Option<Expr> {
        let members = cx.ty(0).numel();
        let rows = cx.ty(1).rows() / members;
        let sum = cx.local(f32c(0.0));
        cx.each(0, members, |cx, b| {
            let c = cx.load(0, &Expr::from(0), &b);
            let z = cx.load(1, &(b * rows + row), col);
            cx.set(sum, c.fma(z, sum));
        });
        Some(sum / f32c(members as f32))
    }

    fn is_pointwise(&self) -> bool {
        true
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared; 2]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |m: usize, s: &[usize]| (WeightedSum {}, vec![Type::f32(&[m]), Type::f32(&[&[m], s].concat())]);
        vec![of(1, &[7]), of(5, &[2, 9]), of(3, &[19])]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let f = |d: &[usize]| Type::f32(d);
        vec![
            (WeightedSum {}, vec![f(&[3]), f(&[2, 7])]),
            (WeightedSum {}, vec![f(&[3]), f(&[3])]),
            (WeightedSum {}, vec![f(&[3])]),
        ]
    }
}
