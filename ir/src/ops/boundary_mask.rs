//! Which weights have another ternary code when they move by a probe.

use super::{
    Axis, Flops, InferError, OpDef,
    pack_ternary::{check_scales, scale_width, ternary, ternary_sample},
};
use crate::{
    Tensor, Type,
    loops::{Expr, f32c, i32c},
    lower::Lower,
};

/// `(W [m, n], alpha [m, nb], eps [1]) -> mask [m, n]`: 1 where the codes of `W + eps` and `W - eps` differ, with codes as in
/// [`super::PackTernary`]. Section 13.3 of the semantics, mode A.
#[derive(Clone, Debug, PartialEq)]
pub struct BoundaryMask {
    /// Columns that share a scale.
    pub group: usize,
    /// Share of the scale above which a weight is not zero.
    pub ratio: f32,
}

impl OpDef for BoundaryMask {
    const NAME: &'static str = "boundary_mask";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        if let [w, alpha, eps] = ins
            && w.dims.len() == 2
            && alpha.dims.len() == 2
            && *eps == Type::f32(&[1])
        {
            check_scales(Self::NAME, self.group, &[w.clone(), alpha.clone()])?;
            return Ok(vec![w.clone()]);
        }
        Err(InferError::new(Self::NAME, "takes W [m, n], alpha [m, nb] and eps [1], all f32"))
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (w, alpha, eps) = (ins[0].as_f32(), ins[1].as_f32(), ins[2].as_f32()[0]);
        let (n, nb) = (ins[0].ty.cols(), ins[1].ty.cols());
        let width = scale_width(self.group, n, nb);
        let differs = |i: usize| {
            let limit = self.ratio * alpha[i / n * nb + i % n / width];
            ternary(w[i] + eps, limit) != ternary(w[i] - eps, limit)
        };
        let mask = (0..w.len()).map(|i| if differs(i) { 1.0 } else { 0.0 }).collect();
        vec![Tensor::f32(&ins[0].ty.dims, mask)]
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        Flops::float(6 * outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        cx.pointwise();
    }

    fn element(&self, cx: &mut Lower<'_>, row: &Expr, col: &Expr) -> Option<Expr> {
        let (n, nb) = (cx.ty(0).cols(), cx.ty(1).cols());
        let w = cx.load(0, row, col);
        let w = cx.bind(w);
        let alpha = cx.load(1, row, &(col / scale_width(self.group, n, nb)));
        let limit = cx.bind(f32c(self.ratio) * alpha);
        let eps = cx.load(2, &Expr::from(0), &Expr::from(0));
        let eps = cx.bind(eps);
        let code = |w: Expr| {
            let above = limit.clone().lt(w.clone()).select(i32c(1), i32c(0));
            w.lt(-limit.clone()).select(i32c(-1), above)
        };
        let [up, down] = [code(&w + &eps), code(&w - &eps)];
        Some(up.ne(down).select(f32c(1.0), f32c(0.0)))
    }

    fn is_pointwise(&self) -> bool {
        true
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared; 3]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |w: &[usize], alpha: &[usize]| {
            (BoundaryMask { group: 128, ratio: 0.5 }, vec![Type::f32(w), Type::f32(alpha), Type::f32(&[1])])
        };
        vec![of(&[7, 300], &[7, 3]), of(&[3, 40], &[3, 1])]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        if k == 2 { Tensor::f32(&[1], vec![0.1]) } else { ternary_sample(k, ty, random) }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let of = |types: Vec<Type>| (BoundaryMask { group: 128, ratio: 0.5 }, types);
        vec![
            of(vec![Type::f32(&[7, 300]), Type::f32(&[7, 2]), Type::f32(&[1])]),
            of(vec![Type::f32(&[7, 300]), Type::f32(&[7, 3])]),
            of(vec![Type::f32(&[7, 300]), Type::f32(&[7, 3]), Type::f32(&[2])]),
        ]
    }
}
