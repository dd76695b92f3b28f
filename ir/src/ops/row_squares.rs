//! Sum of squares of each row.

use super::{Accuracy, Axis, Flops, InferError, OpDef, long::sum_of_squares};
use crate::{DType, Tensor, Type, lower::Lower};

/// `out[r] = sum over c of x[r, c]^2`: `f32 [.., C]` to `[R]`, `R` all other dimensions together.
#[derive(Clone, Debug, PartialEq)]
pub struct RowSquares {}

impl OpDef for RowSquares {
    const NAME: &'static str = "row_squares";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [x] if x.dtype == DType::F32 => Ok(vec![Type::f32(&[x.rows()])]),
            _ => Err(InferError::new(Self::NAME, "takes one f32 operand")),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let square = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>();
        let out: Vec<f32> = ins[0].as_f32().chunks(ins[0].ty.cols()).map(square).collect();
        vec![Tensor::f32(&[ins[0].ty.rows()], out)]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(2 * ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let x = cx.ty(0).clone();
        let row = cx.b.grid(x.rows());
        let sum = sum_of_squares(cx, &row, x.cols());
        cx.put(0, row, sum);
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared; ins.len()]
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-5, atol: 1e-6 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        [vec![2, 3, 21], vec![4, 1], vec![300]].into_iter().map(|d| (RowSquares {}, vec![Type::f32(&d)])).collect()
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![(RowSquares {}, vec![Type::i32(&[3, 4])]), (RowSquares {}, vec![])]
    }
}
