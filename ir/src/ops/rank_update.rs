//! The outer half of a low-rank perturbation: added to the product of the unperturbed weight.
//!
//! Batch rows below `M` get the direction with a plus sign, the others with a minus sign.

use super::{
    Axis, Flops, InferError, OpDef, VjpCx,
    member_dot::{batch_row, batch_rows, expert, expert_of, factor_fits, n_batch_rows, rows_fit},
};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Expr, f32c},
    lower::Lower,
};

/// `(y [R, T, m], u [R, T, r], A [M, m, r], scale [1]) -> y + sign scale sum_q u[q] A[member, column, q]`, `R = 2 M`.
///
/// `sign` is + for batch rows below `M`, `member = batch row mod M`. With `gathered = (k, T)`: `y [N, m]`, `u [N, r]`, `A [E, M, m, r]` and
/// `scale [E, 1]` for each expert, then `order i32 [N]` and `index`, see [`super::MemberDot`]. Section 13.4 of the semantics.
#[derive(Clone, Debug, PartialEq)]
pub struct RankUpdate {
    /// The rank `r`.
    pub rank: usize,
    /// The number of members `M`.
    pub members: usize,
    /// Slots of a token and tokens of a batch row, when the rows are in dispatch order.
    pub gathered: Option<(usize, usize)>,
}

impl OpDef for RankUpdate {
    const NAME: &'static str = "rank_update";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        if let [y, u, a, scale, order @ ..] = ins
            && y.dtype == DType::F32
            && rows_fit(y, self.gathered, order)
            && *u == Type::f32(&[&y.dims[..y.dims.len() - 1], &[self.rank]].concat())
            && factor_fits(a, &[self.members, y.cols(), self.rank], self.gathered)
            && factor_fits(scale, &[1], self.gathered)
            && (self.gathered.is_none() || scale.dims[0] == a.dims[0])
            && n_batch_rows(y, self.gathered) == 2 * self.members
        {
            return Ok(vec![y.clone()]);
        }
        let why = format!(
            "takes y [2 M, T, m], u [2 M, T, {0}], A [M, m, {0}] and scale [1] with M = {1}; when gathered, A and scale for each expert, order i32 [N] and index",
            self.rank, self.members
        );
        Err(InferError::new(Self::NAME, why))
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (y, u, a, scale) = (ins[0], ins[1].as_f32(), ins[2].as_f32(), ins[3].as_f32());
        let (m, r) = (y.ty.cols(), self.rank);
        let mut out = y.as_f32().to_vec();
        for (row, batch) in batch_rows(&y.ty, self.gathered, ins.get(4).copied()).into_iter().enumerate() {
            let e = expert_of(row, ins[2].ty.dims[0], ins.get(4..6));
            let signed = if batch < self.members { scale[e] } else { -scale[e] };
            let a = &a[(e * self.members + batch % self.members) * m * r..][..m * r];
            for (col, out) in out[row * m..][..m].iter_mut().enumerate() {
                let sum = (0..r).fold(0.0, |sum, q| u[row * r + q].mul_add(a[col * r + q], sum));
                *out = signed.mul_add(sum, *out);
            }
        }
        vec![Tensor::f32(&y.ty.dims, out)]
    }

    fn vjp(&self, _: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        Err(InferError::new(Self::NAME, "a probe replaces the gradient and has none"))
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        Flops::float((2 * self.rank + 2) * outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        cx.pointwise();
    }

    fn element(&self, cx: &mut Lower<'_>, row: &Expr, col: &Expr) -> Option<Expr> {
        let m = cx.ty(0).cols();
        let batch = batch_row(cx, row, self.gathered, 4);
        let batch = cx.bind(batch);
        let y = cx.load(0, row, col);
        let e = match self.gathered {
            Some(_) => expert(cx, row, 4, cx.ty(2).dims[0]),
            None => Expr::from(0),
        };
        let at = ((&e * self.members + &batch % self.members) * m + col) * self.rank;
        let mut sum = f32c(0.0);
        for q in 0..self.rank {
            let u = cx.load(1, row, &Expr::from(q));
            sum = u.fma(Expr::load(cx.buf(2), &at + q), sum);
        }
        let scale = cx.load(3, &e, &Expr::from(0));
        let scale = cx.bind(scale);
        let signed = batch.lt(Expr::from(self.members)).select(scale.clone(), -scale);
        Some(signed.fma(sum, y))
    }

    fn is_pointwise(&self) -> bool {
        true
    }

    fn aligned(&self) -> &'static [usize] {
        &[0]
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        [Axis::Rows, Axis::Rows, Axis::Shared, Axis::Shared, Axis::Rows, Axis::Rows][..ins.len()].to_vec()
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |rank, members, tokens, m| {
            let (y, u) = (Type::f32(&[2 * members, tokens, m]), Type::f32(&[2 * members, tokens, rank]));
            let a = Type::f32(&[members, m, rank]);
            (RankUpdate { rank, members, gathered: None }, vec![y, u, a, Type::f32(&[1])])
        };
        let gathered = |rank, members, k, tokens, m| {
            let n = 2 * members * tokens * k;
            let (y, u, a) = (Type::f32(&[n, m]), Type::f32(&[n, rank]), Type::f32(&[3, members, m, rank]));
            let index = Type::i32(&[2 * members, tokens, k]);
            let ins = vec![y, u, a, Type::f32(&[3, 1]), Type::i32(&[n]), index];
            (RankUpdate { rank, members, gathered: Some((k, tokens)) }, ins)
        };
        vec![of(1, 2, 3, 9), of(2, 1, 1, 16), gathered(1, 2, 2, 3, 7), gathered(2, 1, 1, 2, 5)]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        if k == 4 {
            return Tensor::i32(&ty.dims, super::gather_rows::permutation(ty.numel(), random));
        }
        if k == 5 {
            return Tensor::i32(&ty.dims, (0..ty.numel()).map(|_| (random() * 3.9).abs() as i32).collect());
        }
        super::random_tensor(ty, random)
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let op = |gathered| RankUpdate { rank: 1, members: 2, gathered };
        let f = |d: &[usize]| Type::f32(d);
        vec![
            (op(None), vec![f(&[3, 2, 5]), f(&[3, 2, 1]), f(&[2, 5, 1]), f(&[1])]),
            (op(None), vec![f(&[4, 2, 5]), f(&[4, 2, 2]), f(&[2, 5, 1]), f(&[1])]),
            (op(None), vec![f(&[4, 2, 5]), f(&[4, 2, 1]), f(&[2, 4, 1]), f(&[1])]),
            (op(Some((1, 2))), vec![f(&[8, 5]), f(&[8, 1]), f(&[2, 5, 1]), f(&[1])]),
        ]
    }
}
