//! Token rows in dispatch order.
//!
//! A pure copy: row `i` of the result is bit for bit the token that slot `order[i]` belongs to.

use super::{Axis, Flops, InferError, OpDef, Reshape, ScatterRows, VjpCx};
use crate::{
    DType, Data, Tensor, Type, Value,
    loops::{Expr, Ty, i32c},
    lower::Lower,
};

/// `(x [R, T, C] of f32 or i8, order i32 [N]) -> [N, C]`, `N = R T k`: row `i` is row `order[i] / k` of the flat rows of `x`. Slots
/// outside are clamped.
#[derive(Clone, Debug, PartialEq)]
pub struct GatherRows {
    /// Slots of a token.
    pub k: usize,
}

impl OpDef for GatherRows {
    const NAME: &'static str = "gather_rows";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        let [x, order] = ins else { return Err(InferError::new(Self::NAME, "takes x and order")) };
        let fits = order.dtype == DType::I32 && order.dims == [x.rows() * self.k] && self.k > 0;
        if fits && matches!(x.dtype, DType::F32 | DType::I8) {
            return Ok(vec![Type::new(x.dtype, &[order.dims[0], x.cols()])]);
        }
        let why = format!("wants x of f32 or i8 and order i32 [{} rows of x], found {x} and {order}", self.k);
        Err(InferError::new(Self::NAME, why))
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (x, order) = (ins[0], ins[1].to_i64());
        let cols = x.ty.cols();
        let slot = |i: usize| order[i].clamp(0, order.len() as i64 - 1) as usize;
        let from = |i: usize| slot(i / cols) / self.k * cols + i % cols;
        let n = order.len() * cols;
        let data = match &x.data {
            Data::I8(v) => Data::I8((0..n).map(|i| v[from(i)]).collect()),
            _ => Data::F32((0..n).map(|i| x.as_f32()[from(i)]).collect()),
        };
        vec![Tensor { ty: Type::new(x.ty.dtype, &[order.len(), cols]), data }]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let rows = cx.op(ScatterRows { k: self.k }, &[cx.grad(), cx.ins[1]])?;
        // Codes have the gradient of what they stand for.
        let dims = cx.graph.ty(cx.ins[0]).dims.clone();
        Ok(vec![Some(cx.op(Reshape { dims }, &[rows])?), None])
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let ty = cx.out_ty(0).clone();
        let order = cx.buf(1);
        let row = cx.grid(ty.rows());
        let slot = Expr::load(order, &row).min(i32c(ty.rows() as i32 - 1)).max(i32c(0));
        let from = cx.bind(slot.cast(Ty::I64) / self.k);
        cx.lanes(0, ty.cols(), 2, |cx, col| {
            let x = cx.load(0, &from, &col);
            cx.put(0, &row * ty.cols() + col, x);
        });
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Rows, Axis::Rows]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![
            (GatherRows { k: 2 }, vec![Type::f32(&[2, 3, 9]), Type::i32(&[12])]),
            (GatherRows { k: 1 }, vec![Type::new(DType::I8, &[2, 2, 64]), Type::i32(&[4])]),
            (GatherRows { k: 3 }, vec![Type::f32(&[2, 1]), Type::i32(&[6])]),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        if k == 1 {
            return Tensor::i32(&ty.dims, permutation(ty.numel(), random));
        }
        super::random_tensor(ty, random)
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (GatherRows { k: 2 }, vec![Type::f32(&[2, 3, 9]), Type::i32(&[6])]),
            (GatherRows { k: 2 }, vec![Type::i32(&[2, 3, 9]), Type::i32(&[12])]),
            (GatherRows { k: 0 }, vec![Type::f32(&[2, 3, 9]), Type::i32(&[6])]),
            (GatherRows { k: 2 }, vec![Type::f32(&[2, 3, 9])]),
        ]
    }
}

/// `0 .. n` in random order.
pub(super) fn permutation(n: usize, random: &mut dyn FnMut() -> f32) -> Vec<i32> {
    let keys: Vec<f32> = (0..n).map(|_| random()).collect();
    let mut order: Vec<i32> = (0..n as i32).collect();
    order.sort_by(|&a, &b| keys[a as usize].total_cmp(&keys[b as usize]));
    order
}
