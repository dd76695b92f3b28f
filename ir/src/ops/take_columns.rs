//! The first columns of every row.

use super::{Flops, InferError, OpDef};
use crate::{DType, Tensor, Type, loops::Expr, lower::Lower};

/// `x [.., C]` of `f32` → `[.., n]`: the first `n` columns.
#[derive(Clone, Debug, PartialEq)]
pub struct TakeColumns {
    /// Columns that stay, at most `C`.
    pub n: usize,
}

impl OpDef for TakeColumns {
    const NAME: &'static str = "take_columns";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [x] if x.dtype == DType::F32 && !x.dims.is_empty() && (1..=x.cols()).contains(&self.n) => {
                let mut out = x.clone();
                *out.dims.last_mut().expect("x has a dimension") = self.n;
                Ok(vec![out])
            }
            _ => Err(InferError::new(Self::NAME, format!("takes one f32 operand of at least {} columns", self.n))),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let ty = self.infer(&[ins[0].ty.clone()]).expect("accepted before").remove(0);
        let rows = ins[0].as_f32().chunks(ins[0].ty.cols());
        vec![Tensor::f32(&ty.dims, rows.flat_map(|row| &row[..self.n]).copied().collect())]
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        cx.pointwise();
    }

    fn element(&self, cx: &mut Lower<'_>, row: &Expr, col: &Expr) -> Option<Expr> {
        Some(cx.load(0, row, col))
    }

    fn is_pointwise(&self) -> bool {
        true
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![(TakeColumns { n: 5 }, vec![Type::f32(&[2, 3, 8])]), (TakeColumns { n: 4 }, vec![Type::f32(&[4])])]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![(TakeColumns { n: 9 }, vec![Type::f32(&[2, 8])]), (TakeColumns { n: 0 }, vec![Type::f32(&[2, 8])])]
    }
}
