//! The parts of a stacked tensor: the reverse of [`super::Stack`].
//!
//! A pure copy.

use super::{Axis, Flops, InferError, OpDef};
use crate::{DType, Tensor, Type, loops::Expr, lower::Lower};

/// `x [n, ..]` of `f32` → `n` results `[..]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Unstack {
    /// The number of parts.
    pub n: usize,
}

impl OpDef for Unstack {
    const NAME: &'static str = "unstack";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [x] if x.dtype == DType::F32 && x.dims.len() > 1 && x.dims[0] == self.n && self.n > 0 => {
                Ok(vec![Type::f32(&x.dims[1..]); self.n])
            }
            _ => Err(InferError::new(Self::NAME, format!("takes one f32 operand with {} parts in front", self.n))),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (x, dims) = (ins[0].as_f32(), &ins[0].ty.dims[1..]);
        x.chunks_exact(x.len() / self.n).map(|part| Tensor::f32(dims, part.to_vec())).collect()
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let part = cx.out_ty(0).clone();
        let (cols, from) = (part.cols(), cx.buf(0));
        let row = cx.b.grid(part.rows());
        for i in 0..self.n {
            cx.lanes(0, cols, 2, |cx, col| {
                let at = &row * cols + &col;
                cx.put(i, at.clone(), Expr::load(from, at + i * part.numel()));
            });
        }
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        vec![Axis::Weight { rank: ins[0].dims.len() }]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![(Unstack { n: 3 }, vec![Type::f32(&[3, 5, 7])]), (Unstack { n: 1 }, vec![Type::f32(&[1, 4])])]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![(Unstack { n: 2 }, vec![Type::f32(&[3, 4])]), (Unstack { n: 2 }, vec![Type::f32(&[2])])]
    }
}
