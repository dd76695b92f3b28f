//! The input gradient of a norm.

use super::{
    Accuracy, Flops, InferError, OpDef, check,
    norm::{Moments, Norm, NormKind},
};
use crate::{
    DType, Tensor, Type,
    loops::{Acc, Expr, f32c},
    lower::Lower,
};

/// `(x [.., C], dy [.., C])` → `dx [.., C]` for the gain-free norm `y = n` of each `width` columns:
/// `dx = s (dy - n mean(dy n))`, with the sum in place of the mean for [`NormKind::L2`], and `- mean(dy)` for [`NormKind::Layer`].
/// `s` is the factor of the norm. Semantics section 2.
#[derive(Clone, Debug, PartialEq)]
pub struct NormGrad {
    /// The kind.
    pub kind: NormKind,
    /// The number of columns that are normalised together.
    pub width: usize,
    /// Added under the root.
    pub eps: f32,
}

impl NormGrad {
    fn norm(&self) -> Norm {
        Norm { kind: self.kind, width: self.width, eps: self.eps }
    }
}

impl OpDef for NormGrad {
    const NAME: &'static str = "norm_grad";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 2..=2)?;
        if ins[0] != ins[1] {
            return Err(InferError::new(Self::NAME, format!("{} wants a gradient like it, found {}", ins[0], ins[1])));
        }
        self.norm().infer(&ins[..1])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let w = self.width as f64;
        let mut out = Vec::with_capacity(ins[0].ty.numel());
        for (x, dy) in ins[0].as_f32().chunks(self.width).zip(ins[1].as_f32().chunks(self.width)) {
            let layer = self.kind == NormKind::Layer;
            let mean = |v: &mut dyn Iterator<Item = f64>| v.sum::<f64>() / w;
            let center = if layer { mean(&mut x.iter().map(|&x| x.into())) } else { 0.0 };
            let squares: f64 = x.iter().map(|&x| (f64::from(x) - center).powi(2)).sum();
            let divide = if self.kind == NormKind::L2 { 1.0 } else { w };
            let s = 1.0 / (squares / divide + f64::from(self.eps)).sqrt();
            let n: Vec<f64> = x.iter().map(|&x| (f64::from(x) - center) * s).collect();
            let dot = n.iter().zip(dy).map(|(n, &d)| n * f64::from(d)).sum::<f64>() / divide;
            let shift = if layer { mean(&mut dy.iter().map(|&d| d.into())) } else { 0.0 };
            out.extend(n.iter().zip(dy).map(|(n, &d)| (s * (f64::from(d) - shift - n * dot)) as f32));
        }
        vec![Tensor::f32(&ins[0].ty.dims, out)]
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        Flops::float(10 * outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, cols) = (cx.ty(0).rows(), cx.ty(0).cols());
        let row = cx.b.grid(rows);
        let x = Norm::stage(cx, &row);
        let dy = cx.b.scratch("dy", DType::F32, cols);
        cx.lanes(0, cols, 2, |cx, c| {
            let e = cx.load(1, &row, &c);
            cx.b.store(dy, c, e);
        });
        let norm = self.norm();
        cx.each_step(0, cols, self.width, |cx, base| {
            let moments = Moments::of(cx, &norm, x, &base);
            let sums = cx.reduce(0, self.width, |cx, j| {
                let at = cx.b.bind(&base + j);
                let d = cx.b.bind(Expr::load(dy, &at));
                vec![Acc::Dot(moments.apply(Expr::load(x, at)), d.clone()), Acc::Sum(d)]
            });
            let width = f32c(self.width as f32);
            let dot = if self.kind == NormKind::L2 { sums[0].clone() } else { cx.b.bind(&sums[0] / &width) };
            let shift = (self.kind == NormKind::Layer).then(|| cx.b.bind(&sums[1] / &width));
            cx.lanes(0, self.width, 2, |cx, j| {
                let at = cx.b.bind(&base + j);
                let n = moments.apply(Expr::load(x, &at));
                let d = shift.iter().fold(Expr::load(dy, &at), |d, s| d - s);
                cx.push(&row, &at, &[(0, (d - n * &dot) * moments.scale())]);
            });
        });
    }

    fn pulls(&self) -> &'static [usize] {
        &[0, 1]
    }

    fn pushes(&self) -> std::ops::Range<usize> {
        0..1
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 2e-5, atol: 2e-5 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |kind, width, dims: &[usize]| (NormGrad { kind, width, eps: 1e-6 }, vec![Type::f32(dims); 2]);
        vec![
            of(NormKind::Rms, 30, &[4, 3, 30]),
            of(NormKind::L2, 5, &[4, 30]),
            of(NormKind::Layer, 15, &[2, 2, 30]),
            of(NormKind::Rms, 10, &[4, 30]),
        ]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let op = NormGrad { kind: NormKind::Rms, width: 7, eps: 1e-6 };
        vec![
            (op.clone(), vec![Type::f32(&[3, 30]); 2]),
            (op.clone(), vec![Type::f32(&[3, 7]), Type::f32(&[7])]),
            (op, vec![Type::f32(&[3, 7])]),
        ]
    }
}
