//! One of two tensors for every batch row.

use super::{Flops, InferError, OpDef, VjpCx, check};
use crate::{
    DType, Data, Tensor, Type, Value,
    loops::{Expr, i32c},
    lower::Lower,
};

/// `(mask i32 [R], a [R, ...], b [R, ...])` → row `r` of `a` where `mask[r] != 0`, else of `b`. `f32`, `i32`, `i16` or bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Select {}

fn pick<T: Copy>(mask: &[i64], a: &[T], b: &[T]) -> Vec<T> {
    let row = a.len() / mask.len();
    (0..a.len()).map(|i| if mask[i / row] != 0 { a[i] } else { b[i] }).collect()
}

impl OpDef for Select {
    const NAME: &'static str = "select";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 3..=3)?;
        check::is(Self::NAME, "the mask", &ins[0], DType::I32, 1..=1)?;
        let [mask, a, b] = [&ins[0], &ins[1], &ins[2]];
        if a != b || a.dims.first() != mask.dims.first() || matches!(a.dtype, DType::BF16 | DType::F64) {
            return Err(InferError::new(Self::NAME, format!("cannot choose between {a} and {b} by {mask}")));
        }
        Ok(vec![a.clone()])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let mask = ins[0].to_i64();
        let data = match (&ins[1].data, &ins[2].data) {
            (Data::F32(a), Data::F32(b)) => Data::F32(pick(&mask, a, b)),
            (Data::I8(a), Data::I8(b)) => Data::I8(pick(&mask, a, b)),
            (Data::U8(a), Data::U8(b)) => Data::U8(pick(&mask, a, b)),
            (Data::I16(a), Data::I16(b)) => Data::I16(pick(&mask, a, b)),
            (Data::I32(a), Data::I32(b)) => Data::I32(pick(&mask, a, b)),
            (a, b) => panic!("infer refuses a choice between {} and {}", a.dtype().name(), b.dtype().name()),
        };
        vec![Tensor { ty: ins[1].ty.clone(), data }]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let (mask, g) = (cx.ins[0], cx.grad());
        let zero = Tensor::zeros(cx.graph.ty(g));
        let zero = cx.graph.constant(zero);
        let da = cx.op(Select {}, &[mask, g, zero])?;
        let db = cx.op(Select {}, &[mask, zero, g])?;
        Ok(vec![None, Some(da), Some(db)])
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        cx.pointwise();
    }

    fn element(&self, cx: &mut Lower<'_>, row: &Expr, col: &Expr) -> Option<Expr> {
        let (rows, a) = (cx.ty(0).numel(), cx.ty(1).clone());
        let at = if a.dims.len() == 1 { col.clone() } else { row / (a.rows() / rows) };
        let mask = Expr::load(cx.buf(0), at);
        let (a, b) = (cx.load(1, row, col), cx.load(2, row, col));
        Some(mask.ne(i32c(0)).select(a, b))
    }

    fn is_pointwise(&self) -> bool {
        true
    }

    fn aligned(&self) -> &'static [usize] {
        &[1, 2]
    }

    fn pulls(&self) -> &'static [usize] {
        &[1, 2]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of =
            |dtype: DType, dims: &[usize]| vec![Type::i32(&dims[..1]), Type::new(dtype, dims), Type::new(dtype, dims)];
        vec![
            (Select {}, of(DType::F32, &[5, 3, 7])),
            (Select {}, of(DType::I32, &[6])),
            (Select {}, of(DType::I16, &[3, 17])),
            (Select {}, of(DType::I8, &[4, 5])),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        match k {
            0 => Tensor::i32(&ty.dims, (0..ty.numel()).map(|_| i32::from(random() > 0.0)).collect()),
            _ => super::random_tensor(ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (Select {}, vec![Type::i32(&[2]), Type::f32(&[2]), Type::f32(&[3])]),
            (Select {}, vec![Type::i32(&[2]), Type::f32(&[3]), Type::f32(&[3])]),
            (Select {}, vec![Type::f32(&[2]), Type::f32(&[2]), Type::f32(&[2])]),
            (Select {}, vec![]),
        ]
    }
}
