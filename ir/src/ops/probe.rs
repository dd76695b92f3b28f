//! A tensor shifted along directions, once forward and once back.
//!
//! Both signs of one direction use the same numbers; the probe never touches the stored tensor.

use super::{Axis, Flops, InferError, OpDef, VjpCx};
use crate::{DType, Tensor, Type, Value, loops::Expr, lower::Lower};

/// `(w [s...], z [M, s...], eps [1]) -> [2 M, s...]`: group `p < M` is `w + eps z[p]`, group `p >= M` is `w - eps z[p - M]`; the product and
/// the sum round once each. Sections 13.1 and 13.4 of the semantics.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {}

impl OpDef for Probe {
    const NAME: &'static str = "probe";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [w, z, eps]
                if w.dtype == DType::F32
                    && !w.dims.is_empty()
                    && z.dtype == DType::F32
                    && z.dims.get(1..) == Some(&w.dims)
                    && *eps == Type::f32(&[1]) =>
            {
                Ok(vec![Type::f32(&[&[2 * z.dims[0]], &w.dims[..]].concat())])
            }
            _ => Err(InferError::new(Self::NAME, "takes w [s...], z [M, s...] and eps [1], all f32")),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (w, z, eps) = (ins[0].as_f32(), ins[1].as_f32(), ins[2].as_f32()[0]);
        let shifted = |eps: f32| z.iter().enumerate().map(move |(i, z)| w[i % w.len()] + eps * z);
        let dims = [&[2 * ins[1].ty.dims[0]], &ins[0].ty.dims[..]].concat();
        vec![Tensor::f32(&dims, shifted(eps).chain(shifted(-eps)).collect())]
    }

    fn vjp(&self, _: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        Err(InferError::new(Self::NAME, "a probe replaces the gradient and has none"))
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        Flops::float(2 * outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        cx.pointwise();
    }

    fn element(&self, cx: &mut Lower<'_>, row: &Expr, col: &Expr) -> Option<Expr> {
        let (w_rows, z_rows) = (cx.ty(0).rows(), cx.ty(1).rows());
        let w = cx.load(0, &(row % w_rows), col);
        let z = cx.load(1, &(row % z_rows), col);
        let eps = cx.load(2, &Expr::from(0), &Expr::from(0));
        let signed = row.clone().lt(Expr::from(z_rows)).select(eps.clone(), -eps);
        Some(w + signed * z)
    }

    fn is_pointwise(&self) -> bool {
        true
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared; 3]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of =
            |m: usize, s: &[usize]| (Probe {}, vec![Type::f32(s), Type::f32(&[&[m], s].concat()), Type::f32(&[1])]);
        vec![of(1, &[7]), of(3, &[2, 9]), of(2, &[3, 1, 4])]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let f = |d: &[usize]| Type::f32(d);
        vec![
            (Probe {}, vec![f(&[7]), f(&[7]), f(&[1])]),
            (Probe {}, vec![f(&[7]), f(&[2, 8]), f(&[1])]),
            (Probe {}, vec![f(&[7]), f(&[2, 7]), f(&[2])]),
            (Probe {}, vec![f(&[7]), f(&[2, 7])]),
        ]
    }
}
