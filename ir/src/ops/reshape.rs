//! The same elements under another shape.

use super::{Flops, InferError, OpDef, VjpCx, check};
use crate::{DType, Tensor, Type, Value, lower::Lower};

/// How many elements one instance of the copying kernel moves.
const CHUNK: usize = 4096;

/// `x` of any type and shape → the same elements in row-major order with dimensions `dims`.
///
/// The memory planner makes the result an alias of its operand where it can; the kernel is a copy.
#[derive(Clone, Debug, PartialEq)]
pub struct Reshape {
    /// The new dimensions.
    pub dims: Vec<usize>,
}

impl OpDef for Reshape {
    const NAME: &'static str = "reshape";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 1..=1)?;
        let out = Type::new(ins[0].dtype, &self.dims);
        if ins[0].dtype == DType::BF16 {
            return Err(InferError::new(Self::NAME, "bf16 can be read but not copied"));
        }
        if out.numel() != ins[0].numel() || self.dims.is_empty() {
            return Err(InferError::new(Self::NAME, format!("cannot make {out} of {}", ins[0])));
        }
        Ok(vec![out])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        vec![Tensor { ty: Type::new(ins[0].ty.dtype, &self.dims), data: ins[0].data.clone() }]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let (g, dims) = (cx.grad(), cx.graph.ty(cx.ins[0]).dims.clone());
        Ok(vec![Some(cx.op(Reshape { dims }, &[g])?)])
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let n = cx.ty(0).numel();
        let from = cx.buf(0);
        let chunk = cx.b.grid(n.div_ceil(CHUNK));
        let lo = cx.b.bind(chunk * CHUNK);
        let hi = (&lo + CHUNK).min(crate::loops::int(n));
        cx.lanes(lo, hi, 2, |cx, i| cx.put(0, i.clone(), crate::loops::Expr::load(from, i)));
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![
            (Reshape { dims: vec![3, 5] }, vec![Type::f32(&[5, 3])]),
            (Reshape { dims: vec![4, 3, 7] }, vec![Type::new(DType::I8, &[84])]),
            (Reshape { dims: vec![4099] }, vec![Type::i32(&[1, 4099])]),
        ]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (Reshape { dims: vec![3, 5] }, vec![]),
            (Reshape { dims: vec![3, 5] }, vec![Type::f32(&[14])]),
            (Reshape { dims: vec![2] }, vec![Type::new(DType::BF16, &[2])]),
        ]
    }
}
