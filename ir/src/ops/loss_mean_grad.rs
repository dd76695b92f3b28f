//! The gradient of the mean of token losses.

use super::{Accuracy, Flops, InferError, OpDef, check, cross_entropy::IGNORE};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, Ty, i32c},
    lower::Lower,
};

/// `(labels i32 [R, T], g [R] or [1])` → `[R, T]`: the gradient of a row (or of the batch) divided by the number of its labels that are
/// not -100, or by 1, for all of its tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct LossMeanGrad {
    /// Whether every row has a mean of its own.
    pub per_row: bool,
}

impl OpDef for LossMeanGrad {
    const NAME: &'static str = "loss_mean_grad";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 2..=2)?;
        check::is(Self::NAME, "labels", &ins[0], DType::I32, 2..=2)?;
        let want = Type::f32(&[if self.per_row { ins[0].dims[0] } else { 1 }]);
        if ins[1] != want {
            return Err(InferError::new(Self::NAME, format!("wants the gradient {want}, found {}", ins[1])));
        }
        Ok(vec![ins[0].with(DType::F32)])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (labels, t) = (ins[0].to_i64(), ins[0].ty.cols());
        let real = |l: &&i64| **l != i64::from(IGNORE);
        let each = |i: usize| {
            let row = i / t;
            let counted = if self.per_row { &labels[row * t..][..t] } else { &labels[..] };
            let n = counted.iter().filter(real).count().max(1) as f32;
            ins[1].as_f32()[if self.per_row { row } else { 0 }] / n
        };
        vec![Tensor::f32(&ins[0].ty.dims, (0..labels.len()).map(each).collect())]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, t) = (cx.ty(0).rows(), cx.ty(0).cols());
        let (labels, g) = (cx.buf(0), cx.buf(1));
        let row = cx.b.grid(rows);
        let base = cx.b.bind(&row * t);
        let real = |at: Expr| Expr::load(labels, at).ne(i32c(IGNORE));
        let (first, len) = if self.per_row { (base.clone(), t) } else { (Expr::from(0), rows * t) };
        let n = cx.sum(0, len, |_, i| real(&first + i).select(i32c(1), i32c(0)));
        let g = Expr::load(g, if self.per_row { row.clone() } else { Expr::from(0) });
        let g = cx.b.bind(g / n.max(i32c(1)).cast(Ty::F32));
        cx.lanes(0, t, 2, |cx, i| cx.push(&row, &i, &[(0, g.clone())]));
    }

    fn pushes(&self) -> std::ops::Range<usize> {
        0..1
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Bits
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![
            (LossMeanGrad { per_row: false }, vec![Type::i32(&[3, 7]), Type::f32(&[1])]),
            (LossMeanGrad { per_row: true }, vec![Type::i32(&[3, 7]), Type::f32(&[3])]),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        match k {
            // The first row has no label at all.
            0 => {
                let label = |i: usize| if i < ty.cols() || i.is_multiple_of(3) { IGNORE } else { i as i32 };
                Tensor::i32(&ty.dims, (0..ty.numel()).map(label).collect())
            }
            _ => super::random_tensor(ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (LossMeanGrad { per_row: true }, vec![Type::i32(&[3, 7]), Type::f32(&[1])]),
            (LossMeanGrad { per_row: false }, vec![Type::f32(&[3, 7]), Type::f32(&[1])]),
        ]
    }
}
