//! The gradient estimate of a low-rank direction per member.
//!
//! An instance owns one tile of the result; the members are one long sum, so the tile shape never shows in the result.

use super::{Accuracy, Axis, Flops, InferError, OpDef};
use crate::{
    DType, Tensor, Type,
    loops::{
        Expr, f32c,
        tile::{Extent, Product},
    },
    lower::Lower,
};

/// Rows and columns of one tile.
const TILE: usize = 64;

/// `(c [M], A [M, m, r], B [M, n, r]) -> [m, n]`: `(sum over b of c[b] A[b] B[b]^T) / M`. Section 13.4 of the semantics.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRankGrad {
    /// The rank `r`.
    pub rank: usize,
}

impl OpDef for LowRankGrad {
    const NAME: &'static str = "low_rank_grad";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        if let [c, a, b] = ins
            && let ([cm], [am, m, ar], [bm, n, br]) = (&c.dims[..], &a.dims[..], &b.dims[..])
            && [cm, bm] == [am, am]
            && [*ar, *br] == [self.rank; 2]
            && ins.iter().all(|t| t.dtype == DType::F32)
        {
            return Ok(vec![Type::f32(&[*m, *n])]);
        }
        let why = format!("takes c [M], A [M, m, {0}] and B [M, n, {0}], all f32", self.rank);
        Err(InferError::new(Self::NAME, why))
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (c, a, b) = (ins[0].as_f32(), ins[1].as_f32(), ins[2].as_f32());
        let (m, n, r) = (ins[1].ty.dims[1], ins[2].ty.dims[1], self.rank);
        let term = |i: usize, j: usize, k: usize| {
            let (member, q) = (k / r, k % r);
            let factor = f64::from(c[member]) * f64::from(a[(member * m + i) * r + q]);
            factor * f64::from(b[(member * n + j) * r + q])
        };
        let sum = |i, j| (0..c.len() * r).map(|k| term(i, j, k)).sum::<f64>() / c.len() as f64;
        vec![Tensor::f32(&[m, n], (0..m * n).map(|at| sum(at / n, at % n) as f32).collect())]
    }

    fn flops(&self, ins: &[Type], outs: &[Type]) -> Flops {
        Flops::float(2 * outs[0].numel() * ins[0].numel() * self.rank)
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (members, r) = (cx.ty(0).numel(), self.rank);
        let (m, n) = (cx.ty(1).dims[1], cx.ty(2).dims[1]);
        let [c, a, b] = [0, 1, 2].map(|k| cx.buf(k));
        let wide = n.div_ceil(TILE);
        let id = cx.grid(m.div_ceil(TILE) * wide);
        let row0 = cx.bind(&id / wide * TILE);
        let col0 = cx.bind(&id % wide * TILE);
        let cols = cx.bind((Expr::from(n) - &col0).min(Expr::from(TILE)));
        let staged = cx.scratch("right", DType::F32, members * r * TILE);
        cx.each(0, members, |cx, member| {
            let c = cx.bind(Expr::load(c, &member));
            for q in 0..r {
                let to = cx.bind((&member * r + q) * TILE);
                let from = cx.bind((&member * n + &col0) * r + q);
                cx.lanes(0, &cols, 2, |cx, j| {
                    cx.store(staged, &to + &j, Expr::load(b, &from + j * r) * &c);
                });
            }
        });
        let rows: Extent =
            if m % TILE == 0 { TILE.into() } else { cx.bind((Expr::from(m) - &row0).min(Expr::from(TILE))).into() };
        let left = |_: &mut Lower<'_>, i: &Expr, k: &Expr| Expr::load(a, (k / r * m + (&row0 + i)) * r + k % r);
        let right = |_: &mut Lower<'_>, k: &Expr, j: &Expr| Expr::load(staged, k * TILE + j);
        let product =
            Product { m: rows, n: cols.clone().into(), k: (members * r).into(), a: &left, b: &right, init: None };
        product.emit(cx, &|cx, i, j, sum| {
            cx.push(&(&row0 + i), &(&col0 + j), &[(0, sum / f32c(members as f32))]);
        });
    }

    fn pushes(&self) -> std::ops::Range<usize> {
        0..1
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared; 3]
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-5, atol: 1e-6 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |members: usize, m: usize, n: usize, rank: usize| {
            let factor = |rows| Type::f32(&[members, rows, rank]);
            (LowRankGrad { rank }, vec![Type::f32(&[members]), factor(m), factor(n)])
        };
        vec![of(3, 5, 7, 1), of(2, 64, 70, 2), of(1, 67, 3, 3)]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let f = |d: &[usize]| Type::f32(d);
        let op = LowRankGrad { rank: 2 };
        vec![
            (op.clone(), vec![f(&[3]), f(&[3, 4, 2]), f(&[3, 4, 1])]),
            (op.clone(), vec![f(&[3]), f(&[3, 4, 2]), f(&[2, 4, 2])]),
            (op.clone(), vec![f(&[3, 1]), f(&[3, 4, 2]), f(&[3, 4, 2])]),
            (op, vec![]),
        ]
    }
}
