//! Means of the losses of tokens, for each row and for the batch.

use super::{Accuracy, Binary, BinaryFn, Flops, InferError, LossMeanGrad, OpDef, VjpCx, check, cross_entropy::IGNORE};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Acc, Expr, Ty, f32c, i32c},
    lower::Lower,
};

/// `(nll [R, T], labels i32 [R, T])` → `(losses [R], loss [1])`: sums over the tokens of a row and of all rows, each divided by the
/// number of labels that are not -100, or by 1.
#[derive(Clone, Debug, PartialEq)]
pub struct LossMean {}

impl OpDef for LossMean {
    const NAME: &'static str = "loss_mean";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 2..=2)?;
        check::is(Self::NAME, "nll", &ins[0], DType::F32, 2..=2)?;
        check::is(Self::NAME, "labels", &ins[1], DType::I32, 2..=2)?;
        if ins[0].dims != ins[1].dims {
            return Err(InferError::new(
                Self::NAME,
                format!("{} wants a label for every loss, found {}", ins[0], ins[1]),
            ));
        }
        Ok(vec![Type::f32(&ins[0].dims[..1]), Type::f32(&[1])])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (nll, labels, t) = (ins[0].as_f32(), ins[1].to_i64(), ins[0].ty.cols());
        let count = |labels: &[i64]| labels.iter().filter(|&&l| l != i64::from(IGNORE)).count();
        let mean = |sum: f32, n: usize| sum / n.max(1) as f32;
        let sums: Vec<f32> = nll.chunks(t).map(|row| row.iter().sum()).collect();
        let losses = sums.iter().zip(labels.chunks(t)).map(|(&sum, labels)| mean(sum, count(labels))).collect();
        let loss = mean(sums.iter().sum(), count(&labels));
        vec![Tensor::f32(&ins[0].ty.dims[..1], losses), Tensor::f32(&[1], vec![loss])]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let mut sum = None;
        for (o, per_row) in [(0, true), (1, false)] {
            let Some(g) = cx.grads[o] else { continue };
            let each = cx.op(LossMeanGrad { per_row }, &[cx.ins[1], g])?;
            sum = Some(match sum {
                None => each,
                Some(before) => cx.op(Binary { f: BinaryFn::Add }, &[before, each])?,
            });
        }
        Ok(vec![sum, None])
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, t) = (cx.ty(0).rows(), cx.ty(0).cols());
        let (nll, labels) = (cx.buf(0), cx.buf(1));
        cx.b.grid(1);
        let total = cx.b.local(f32c(0.0));
        let tokens = cx.b.local(i32c(0));
        let mean = |sum: Expr, n: Expr| sum / n.max(i32c(1)).cast(Ty::F32);
        cx.each(0, rows, |cx, row| {
            let base = cx.b.bind(&row * t);
            let sums = cx.reduce(0, t, |_, i| {
                let real = Expr::load(labels, &base + &i).ne(i32c(IGNORE)).select(i32c(1), i32c(0));
                vec![Acc::Sum(Expr::load(nll, &base + i)), Acc::Sum(real)]
            });
            cx.put(0, row, mean(sums[0].clone(), sums[1].clone()));
            cx.b.set(total, Expr::from(total) + &sums[0]);
            cx.b.set(tokens, Expr::from(tokens) + &sums[1]);
        });
        cx.put(1, 0, mean(total.into(), tokens.into()));
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-5, atol: 1e-6 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![
            (LossMean {}, vec![Type::f32(&[3, 37]), Type::i32(&[3, 37])]),
            (LossMean {}, vec![Type::f32(&[1, 1]), Type::i32(&[1, 1])]),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        // The first row has no label at all; losses are positive.
        match k {
            0 => Tensor::f32(&ty.dims, (0..ty.numel()).map(|_| 1.0 + random()).collect()),
            _ => {
                let label = |i: usize| if i < ty.cols() || i.is_multiple_of(3) { IGNORE } else { i as i32 };
                Tensor::i32(&ty.dims, (0..ty.numel()).map(label).collect())
            }
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (LossMean {}, vec![Type::f32(&[3, 4]), Type::i32(&[3, 5])]),
            (LossMean {}, vec![Type::f32(&[3, 4])]),
            (LossMean {}, vec![Type::i32(&[3, 4]), Type::i32(&[3, 4])]),
        ]
    }
}
