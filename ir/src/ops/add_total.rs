//! A running total in double precision.

use super::{Accuracy, Axis, Flops, InferError, OpDef};
use crate::{
    DType, Data, Tensor, Type,
    loops::{Expr, Ty},
    lower::Lower,
};

/// `(total f64 [1], x f32 [..]) -> f64 [1]`: the total and all elements, in double precision.
#[derive(Clone, Debug, PartialEq)]
pub struct AddTotal {}

impl OpDef for AddTotal {
    const NAME: &'static str = "add_total";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        let total = Type::new(DType::F64, &[1]);
        match ins {
            [t, x] if *t == total && x.dtype == DType::F32 => Ok(vec![total]),
            _ => Err(InferError::new(Self::NAME, "takes a total f64 [1] and one f32 operand")),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let Data::F64(total) = &ins[0].data else { unreachable!("the total is f64") };
        let sum: f64 = ins[1].as_f32().iter().map(|&x| f64::from(x)).sum();
        vec![Tensor { ty: ins[0].ty.clone(), data: Data::F64(vec![total[0] + sum]) }]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(ins[1].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (n, total, x) = (cx.ty(1).numel(), cx.buf(0), cx.buf(1));
        cx.grid(1);
        let sum = cx.sum(0, n, |_, i| Expr::load(x, i).cast(Ty::F64));
        cx.put(0, 0, Expr::load(total, Expr::from(0)) + sum);
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared; ins.len()]
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-6, atol: 1e-9 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |dims: &[usize]| (AddTotal {}, vec![Type::new(DType::F64, &[1]), Type::f32(dims)]);
        vec![of(&[1]), of(&[7, 11]), of(&[130])]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![(AddTotal {}, vec![Type::f32(&[1]), Type::f32(&[3])]), (AddTotal {}, vec![])]
    }
}
