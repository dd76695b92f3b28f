//! Gradients of rows that were gathered: the reverse of [`super::GatherRows`].
//!
//! A row is one chain of additions in the order of the gathered rows, so the grid never shows in the result.

use super::{Flops, InferError, OpDef};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, Ty, f32c, i32c, int},
    lower::Lower,
};

/// `(dy [N, C], order i32 [N])` → `[N / k, C]`: row `t` is the sum of the rows `i` with `order[i] / k = t`. Slots outside are clamped.
#[derive(Clone, Debug, PartialEq)]
pub struct ScatterRows {
    /// Slots of a token.
    pub k: usize,
}

/// Rows of the result of one instance.
const BLOCK: usize = 16;

impl OpDef for ScatterRows {
    const NAME: &'static str = "scatter_rows";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        let [dy, order] = ins else { return Err(InferError::new(Self::NAME, "takes dy and order")) };
        let fits = order.dtype == DType::I32
            && order.dims.len() == 1
            && dy.dims.len() == 2
            && dy.dims[0] == order.dims[0]
            && self.k > 0
            && order.dims[0].is_multiple_of(self.k);
        if fits && dy.dtype == DType::F32 {
            return Ok(vec![Type::f32(&[order.dims[0] / self.k, dy.cols()])]);
        }
        Err(InferError::new(
            Self::NAME,
            format!("wants f32 dy [N, C] and order i32 [N] of {} slots a token, found {dy} and {order}", self.k),
        ))
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (dy, order) = (ins[0], ins[1].to_i64());
        let (n, cols) = (order.len(), dy.ty.cols());
        let mut out = vec![0.0f32; n / self.k * cols];
        for (slot, row) in order.iter().zip(dy.as_f32().chunks(cols)) {
            let to = (*slot).clamp(0, n as i64 - 1) as usize / self.k;
            out[to * cols..][..cols].iter_mut().zip(row).for_each(|(o, x)| *o += x);
        }
        vec![Tensor::f32(&[n / self.k, cols], out)]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (n, d) = (cx.ty(0).rows(), cx.ty(0).cols());
        let (dy, order) = (cx.buf(0), cx.buf(1));
        let sum = cx.b.scratch("sum", DType::F32, BLOCK * d);
        let first = cx.b.grid((n / self.k).div_ceil(BLOCK)) * BLOCK;
        let first = cx.b.bind(first);
        let rows = cx.b.bind((int(n / self.k) - &first).min(int(BLOCK)));
        cx.lanes(0, BLOCK * d, 4, |cx, i| cx.b.store(sum, i, f32c(0.0)));
        cx.each(0, n, |cx, i| {
            let slot = Expr::load(order, &i).min(i32c(n as i32 - 1)).max(i32c(0));
            let at = cx.b.bind(slot.cast(Ty::I64) / self.k - &first);
            cx.when(int(0).le(at.clone()) & at.clone().lt(rows.clone()), |cx| {
                let to = cx.b.bind(at.min(int(BLOCK - 1)).max(int(0)) * d);
                let from = cx.b.bind(i * d);
                cx.lanes(0, d, 4, |cx, c| {
                    let at = cx.b.bind(&to + &c);
                    cx.b.store(sum, &at, Expr::load(sum, &at) + Expr::load(dy, &from + c));
                });
            });
        });
        cx.each(0, rows, |cx, r| {
            let (from, to) = (cx.b.bind(&r * d), cx.b.bind((&first + r) * d));
            cx.lanes(0, d, 4, |cx, c| cx.put(0, &to + &c, Expr::load(sum, &from + c)));
        });
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![
            (ScatterRows { k: 2 }, vec![Type::f32(&[12, 37]), Type::i32(&[12])]),
            (ScatterRows { k: 1 }, vec![Type::f32(&[40, 5]), Type::i32(&[40])]),
            (ScatterRows { k: 1 }, vec![Type::f32(&[3, 4]), Type::i32(&[3])]),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        match k {
            1 => Tensor::i32(&ty.dims, super::gather_rows::permutation(ty.numel(), random)),
            _ => super::random_tensor(ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (ScatterRows { k: 2 }, vec![Type::f32(&[12, 4]), Type::i32(&[11])]),
            (ScatterRows { k: 5 }, vec![Type::f32(&[12, 4]), Type::i32(&[12])]),
            (ScatterRows { k: 0 }, vec![Type::f32(&[12, 4]), Type::i32(&[12])]),
            (ScatterRows { k: 2 }, vec![Type::f32(&[12, 4])]),
        ]
    }
}
