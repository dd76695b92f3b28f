//! Root mean square of each row.

use super::{Accuracy, Binary, BinaryFn, Flops, InferError, OpDef, Unary, UnaryFn, VjpCx, long::sum_of_squares};
use crate::{DType, Tensor, Type, Value, loops::f32c, lower::Lower};

/// `out[r, 0] = sqrt(mean over c of x[r, c]^2 + eps)`: `f32 [.., C]` to `[.., 1]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RowRms {
    /// Added to the mean square.
    pub eps: f32,
}

impl OpDef for RowRms {
    const NAME: &'static str = "row_rms";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [x] if x.dtype == DType::F32 && x.dims.len() > 1 => {
                let mut out = x.clone();
                *out.dims.last_mut().expect("two dimensions") = 1;
                Ok(vec![out])
            }
            _ => Err(InferError::new(Self::NAME, "takes one f32 operand of at least two dimensions")),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let cols = ins[0].ty.cols();
        let rms = |row: &[f32]| (row.iter().map(|x| x * x).sum::<f32>() / cols as f32 + self.eps).sqrt();
        let out: Vec<f32> = ins[0].as_f32().chunks(cols).map(rms).collect();
        let mut dims = ins[0].ty.dims.clone();
        *dims.last_mut().expect("two dimensions") = 1;
        vec![Tensor::f32(&dims, out)]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let (x, g) = (cx.ins[0], cx.grad());
        let each = cx.op(Binary { f: BinaryFn::Div }, &[g, cx.outs[0]])?;
        let mul = 1.0 / cx.graph.ty(x).cols() as f32;
        let each = cx.op(Unary { f: UnaryFn::Affine { mul, add: 0.0 } }, &[each])?;
        Ok(vec![Some(cx.op(Binary { f: BinaryFn::Mul }, &[x, each])?)])
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(2 * ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let x = cx.ty(0).clone();
        let row = cx.b.grid(x.rows());
        let sum = sum_of_squares(cx, &row, x.cols());
        let rms = (sum / f32c(x.cols() as f32) + f32c(self.eps)).sqrt();
        cx.push(&row, &0.into(), &[(0, rms)]);
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn pushes(&self) -> std::ops::Range<usize> {
        0..1
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-5, atol: 1e-6 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![(RowRms { eps: 1e-6 }, vec![Type::f32(&[2, 3, 21])]), (RowRms { eps: 0.5 }, vec![Type::f32(&[4, 1])])]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![(RowRms { eps: 0.0 }, vec![Type::f32(&[3])]), (RowRms { eps: 0.0 }, vec![])]
    }
}
