//! The low-rank perturbation of an embedding row.
//!
//! The same factors and signs as [`super::RankUpdate`], with the table row picked by the token.

use super::{Axis, Flops, InferError, OpDef, VjpCx};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Expr, Ty, f32c, i32c},
    lower::Lower,
};

/// `(e [R, T, d], tokens i32 [R, T], A [M, V, r], B [M, d, r], scale [1]) -> e + sign scale sum_q A[member, token, q] B[member, column, q]`.
///
/// `R = 2 M`; `sign` is + for batch rows below `M`, `member = batch row mod M`; tokens are clamped into the vocabulary. Section 13.4
/// of the semantics.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbedRank {
    /// The rank `r`.
    pub rank: usize,
    /// The number of members `M`.
    pub members: usize,
}

impl OpDef for EmbedRank {
    const NAME: &'static str = "embed_rank";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        if let [e, tokens, a, b, scale] = ins
            && let [rows, _, d] = e.dims[..]
            && e.dtype == DType::F32
            && rows == 2 * self.members
            && *tokens == Type::i32(&e.dims[..2])
            && a.dtype == DType::F32
            && a.dims.len() == 3
            && [a.dims[0], a.dims[2]] == [self.members, self.rank]
            && *b == Type::f32(&[self.members, d, self.rank])
            && *scale == Type::f32(&[1])
        {
            return Ok(vec![e.clone()]);
        }
        let why = format!(
            "takes e [2 M, T, d], tokens i32 [2 M, T], A [M, V, {0}], B [M, d, {0}] and scale [1] with M = {1}",
            self.rank, self.members
        );
        Err(InferError::new(Self::NAME, why))
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (e, tokens, a, b, scale) = (ins[0], ins[1].to_i64(), ins[2], ins[3].as_f32(), ins[4].as_f32()[0]);
        let (t, d, r, v) = (e.ty.dims[1], e.ty.cols(), self.rank, a.ty.dims[1]);
        let mut out = e.as_f32().to_vec();
        for (row, out) in out.chunks_mut(d).enumerate() {
            let (member, plus) = (row / t % self.members, row / t < self.members);
            let token = tokens[row].clamp(0, v as i64 - 1) as usize;
            let left = &a.as_f32()[(member * v + token) * r..][..r];
            for (col, out) in out.iter_mut().enumerate() {
                let right = &b[(member * d + col) * r..][..r];
                let sum = left.iter().zip(right).fold(0.0, |sum, (a, b)| a.mul_add(*b, sum));
                *out = if plus { scale } else { -scale }.mul_add(sum, *out);
            }
        }
        vec![Tensor::f32(&e.ty.dims, out)]
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
        let (t, d, v, r) = (cx.ty(0).dims[1], cx.ty(0).cols(), cx.ty(2).dims[1], self.rank);
        let [tokens, a, b] = [1, 2, 3].map(|k| cx.buf(k));
        let batch = cx.bind(row / t);
        let member = cx.bind(&batch % self.members);
        let token = Expr::load(tokens, row).min(i32c(v as i32 - 1)).max(i32c(0)).cast(Ty::I64);
        let left = cx.bind((&member * v + token) * r);
        let right = (member * d + col) * r;
        let sum = (0..r).fold(f32c(0.0), |sum, q| Expr::load(a, &left + q).fma(Expr::load(b, &right + q), sum));
        let scale = cx.load(4, &Expr::from(0), &Expr::from(0));
        let scale = cx.bind(scale);
        let e = cx.load(0, row, col);
        let signed = batch.lt(Expr::from(self.members)).select(scale.clone(), -scale);
        Some(signed.fma(sum, e))
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

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Rows, Axis::Rows, Axis::Shared, Axis::Shared, Axis::Shared]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |rank, members: usize, t, d, v| {
            let (e, tokens) = (Type::f32(&[2 * members, t, d]), Type::i32(&[2 * members, t]));
            let (a, b) = (Type::f32(&[members, v, rank]), Type::f32(&[members, d, rank]));
            (EmbedRank { rank, members }, vec![e, tokens, a, b, Type::f32(&[1])])
        };
        vec![of(1, 2, 3, 9, 5), of(2, 1, 1, 16, 3)]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        if k == 1 {
            // A few tokens fall outside.
            return Tensor::i32(&ty.dims, (0..ty.numel()).map(|_| (random() * 6.0) as i32).collect());
        }
        super::random_tensor(ty, random)
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let op = EmbedRank { rank: 1, members: 2 };
        let f = |d: &[usize]| Type::f32(d);
        let tokens = Type::i32(&[4, 3]);
        vec![
            (op.clone(), vec![f(&[3, 3, 5]), tokens.clone(), f(&[2, 9, 1]), f(&[2, 5, 1]), f(&[1])]),
            (op.clone(), vec![f(&[4, 3, 5]), f(&[4, 3]), f(&[2, 9, 1]), f(&[2, 5, 1]), f(&[1])]),
            (op.clone(), vec![f(&[4, 3, 5]), tokens.clone(), f(&[2, 9, 1]), f(&[2, 6, 1]), f(&[1])]),
            (op, vec![f(&[4, 3, 5]), tokens, f(&[2, 9, 2]), f(&[2, 5, 1]), f(&[1])]),
        ]
    }
}
