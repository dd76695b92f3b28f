//! Copies of a tensor one after another along the leading dimension.

use super::{Flops, InferError, OpDef, check};
use crate::{DType, Tensor, Type, loops::Expr, lower::Lower};

/// `x [R, ...]` → `[times R, ...]` with row `p R + r` equal to row `r` of `x`. Any type but `bf16`.
#[derive(Clone, Debug, PartialEq)]
pub struct TileRows {
    /// The number of copies.
    pub times: usize,
}

impl OpDef for TileRows {
    const NAME: &'static str = "tile_rows";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 1..=1)?;
        if self.times == 0 || ins[0].dims.is_empty() || ins[0].dtype == DType::BF16 {
            return Err(InferError::new(Self::NAME, format!("cannot make {} copies of {}", self.times, ins[0])));
        }
        let mut out = ins[0].clone();
        out.dims[0] *= self.times;
        Ok(vec![out])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        use crate::Data::*;
        let n = self.times;
        let data = match &ins[0].data {
            F32(v) => F32(v.repeat(n)),
            F64(v) => F64(v.repeat(n)),
            BF16(v) => BF16(v.repeat(n)),
            I8(v) => I8(v.repeat(n)),
            U8(v) => U8(v.repeat(n)),
            I16(v) => I16(v.repeat(n)),
            I32(v) => I32(v.repeat(n)),
        };
        let mut ty = ins[0].ty.clone();
        ty.dims[0] *= n;
        vec![Tensor { ty, data }]
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        cx.pointwise();
    }

    fn element(&self, cx: &mut Lower<'_>, row: &Expr, col: &Expr) -> Option<Expr> {
        let (rows, cols) = (cx.ty(0).rows(), cx.ty(0).cols());
        // A vector is one row whose columns repeat.
        let vector = cx.ty(0).dims.len() == 1;
        Some(if vector { cx.load(0, row, &(col % cols)) } else { cx.load(0, &(row % rows), col) })
    }

    fn is_pointwise(&self) -> bool {
        true
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![
            (TileRows { times: 2 }, vec![Type::i32(&[5])]),
            (TileRows { times: 3 }, vec![Type::f32(&[2, 3, 9])]),
            (TileRows { times: 2 }, vec![Type::new(DType::I8, &[3, 64])]),
            (TileRows { times: 1 }, vec![Type::new(DType::I16, &[2, 7])]),
        ]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (TileRows { times: 0 }, vec![Type::f32(&[2])]),
            (TileRows { times: 2 }, vec![]),
            (TileRows { times: 2 }, vec![Type::f32(&[])]),
        ]
    }
}
