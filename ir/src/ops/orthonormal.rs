//! Orthonormal columns that span what given columns span.
//!
//! Columns are made orthogonal to those before them twice, so that nearly parallel ones lose nothing.

use super::{Accuracy, Axis, Flops, InferError, OpDef};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, f32c},
    lower::Lower,
};

/// `A [m, r]` → `Q [m, r]`, `m >= r`: Gram and Schmidt from left to right. Section 13.2 of the semantics (SubZero).
#[derive(Clone, Debug, PartialEq)]
pub struct Orthonormal {}

/// How often a column is made orthogonal to each one before it.
const TIMES: usize = 2;

impl OpDef for Orthonormal {
    const NAME: &'static str = "orthonormal";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [a] if a.dtype == DType::F32 && a.dims.len() == 2 && a.dims[0] >= a.dims[1] => Ok(vec![a.clone()]),
            [a] => {
                Err(InferError::new(Self::NAME, format!("wants a matrix with no more columns than rows, found {a}")))
            }
            _ => Err(InferError::new(Self::NAME, "takes one operand")),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let [m, r] = ins[0].ty.dims[..] else { panic!("infer wants a matrix") };
        let mut q: Vec<Vec<f64>> =
            (0..r).map(|j| (0..m).map(|i| f64::from(ins[0].as_f32()[i * r + j])).collect()).collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        for j in 0..r {
            let (before, rest) = q.split_at_mut(j);
            let column = &mut rest[0];
            for other in (0..TIMES).flat_map(|_| before.iter()) {
                let along = dot(column, other);
                column.iter_mut().zip(other).for_each(|(x, y)| *x -= along * y);
            }
            let norm = dot(column, column).sqrt();
            column.iter_mut().for_each(|x| *x /= norm);
        }
        vec![Tensor::f32(&[m, r], (0..m * r).map(|i| q[i % r][i / r] as f32).collect())]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(2 * TIMES * ins[0].numel() * ins[0].cols())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (m, r, a) = (cx.ty(0).dims[0], cx.ty(0).dims[1], cx.buf(0));
        cx.grid(1);
        let q = cx.scratch("columns", DType::F32, m * r);
        cx.each(0, r, |cx, j| {
            let column = cx.bind(&j * m);
            cx.each(0, m, |cx, i| cx.store(q, &column + &i, Expr::load(a, i * r + &j)));
            cx.each(0, TIMES, |cx, _| {
                cx.each(0, j.clone(), |cx, k| {
                    let other = cx.bind(k * m);
                    let along = cx.sum(0, m, |_, i| Expr::load(q, &column + &i) * Expr::load(q, &other + i));
                    let along = cx.bind(-along);
                    cx.lanes(0, m, 2, |cx, i| {
                        let x = along.clone().fma(Expr::load(q, &other + &i), Expr::load(q, &column + &i));
                        cx.store(q, &column + i, x);
                    });
                });
            });
            let square = cx.sum(0, m, |_, i| Expr::load(q, &column + &i) * Expr::load(q, &column + i));
            let scale = cx.bind(f32c(1.0) / square.sqrt());
            cx.each(0, m, |cx, i| {
                let x = cx.bind(Expr::load(q, &column + &i) * &scale);
                cx.store(q, &column + &i, &x);
                cx.put(0, i * r + &j, x);
            });
        });
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared]
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-4, atol: 1e-5 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        [[7, 3], [40, 4], [5, 1]].into_iter().map(|d| (Orthonormal {}, vec![Type::f32(&d)])).collect()
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (Orthonormal {}, vec![Type::f32(&[3, 4])]),
            (Orthonormal {}, vec![Type::f32(&[3])]),
            (Orthonormal {}, vec![]),
        ]
    }
}
