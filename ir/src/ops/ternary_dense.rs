//! Ternary weights as floats.

use super::{
    Axis, Flops, InferError, OpDef, VjpCx,
    pack_ternary::{check_scales, reference, scale_width, ternary_sample},
};
use crate::{
    Tensor, Type, Value,
    loops::{Expr, f32c, int},
    lower::Lower,
};

/// `(W [m, n] or [G, m, n], alpha [m, nb] or [G, m, nb])` → `alpha * q` of the shape of `W`, with `q` as in [`super::PackTernary`]:
/// the weights that float activations meet. A third operand, of the type of `alpha`, has the limits above which a weight is not
/// zero, in place of `ratio * alpha`.
#[derive(Clone, Debug, PartialEq)]
pub struct TernaryDense {
    /// Columns that share a scale.
    pub group: usize,
    /// Share of the scale above which a weight is not zero.
    pub ratio: f32,
}

impl OpDef for TernaryDense {
    const NAME: &'static str = "ternary_dense";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check_scales(Self::NAME, self.group, &ins[..ins.len().min(2)])?;
        match ins {
            [w, _] => Ok(vec![w.clone()]),
            [w, alpha, limit] if alpha == limit => Ok(vec![w.clone()]),
            _ => Err(InferError::new(Self::NAME, "takes limits of the type of the scales, or none")),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let scales = reference(self.group, self.ratio, ins[0], ins[1]);
        let codes = match ins.get(2) {
            None => scales.clone(),
            Some(limit) => reference(self.group, 1.0, ins[0], limit),
        };
        let values = codes.into_iter().zip(scales).map(|((q, _), (_, alpha))| f32::from(q) * alpha).collect();
        vec![Tensor::f32(&ins[0].ty.dims, values)]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        // Straight through to the latent; the scale is a constant.
        let mut grads = vec![None; cx.ins.len()];
        grads[0] = Some(cx.grad());
        Ok(grads)
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(2 * ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (w, alpha) = (cx.ty(0).clone(), cx.ty(1).clone());
        let (n, nb) = (w.cols(), alpha.cols());
        let (width, scales) = (scale_width(self.group, n, nb), cx.buf(1));
        let limits = (cx.n_ins() > 2).then(|| cx.buf(2));
        let row = cx.b.grid(w.rows());
        let first = cx.b.bind(&row % alpha.rows() * nb);
        let group = |cx: &mut Lower<'_>, b: &Expr, len: usize| {
            let scale = cx.b.bind(Expr::load(scales, &first + b));
            let limit = match limits {
                None => f32c(self.ratio) * &scale,
                Some(limits) => Expr::load(limits, &first + b),
            };
            let limit = cx.b.bind(limit);
            let lo = cx.b.bind(b * width);
            cx.lanes(0, len, 2, |cx, j| {
                let col = cx.b.bind(&lo + j);
                let w = cx.load(0, &row, &col);
                let w = cx.b.bind(w);
                let above = limit.clone().lt(w.clone()).select(scale.clone(), f32c(0.0));
                let value = w.lt(-limit.clone()).select(-scale.clone(), above);
                cx.push(&row, &col, &[(0, value)]);
            });
        };
        let full = n / width;
        cx.each(0, full, |cx, b| group(cx, &b, width));
        if n > full * width {
            group(cx, &int(full), n - full * width);
        }
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn pushes(&self) -> std::ops::Range<usize> {
        0..1
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        vec![Axis::Weight { rank: 2 }; ins.len()]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |ratio| TernaryDense { group: 128, ratio };
        vec![
            (of(0.5), vec![Type::f32(&[7, 300]), Type::f32(&[7, 3])]),
            (of(0.7), vec![Type::f32(&[2, 3, 64]), Type::f32(&[3, 1])]),
            (of(0.5), vec![Type::f32(&[2, 5, 130]), Type::f32(&[2, 5, 2])]),
            (of(0.5), vec![Type::f32(&[7, 300]), Type::f32(&[7, 1]), Type::f32(&[7, 1])]),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        ternary_sample(k, ty, random)
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let of = TernaryDense { group: 64, ratio: 0.5 };
        vec![
            (of.clone(), vec![Type::f32(&[7, 300]), Type::f32(&[7, 3])]),
            (of.clone(), vec![Type::f32(&[7, 64]), Type::f32(&[7, 1]), Type::f32(&[1])]),
            (of, vec![Type::f32(&[7]), Type::f32(&[7])]),
        ]
    }
}
