//! Normalisation of groups of columns, with an optional gain.

use super::{
    Accuracy, Axis, Binary, BinaryFn, Flops, InferError, NormGrad, OpDef, Reshape, SumTo, VjpCx, check, long::long,
};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Acc, Buf, Expr, f32c, math},
    lower::Lower,
};

/// What a group is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps)`.
    Rms,
    /// `x / sqrt(sum(x^2) + eps)`.
    L2,
    /// `(x - mean(x)) / sqrt(var(x) + eps)`.
    Layer,
}

/// `(x [.., C], gain?)` → `[.., C]`: each contiguous group of `width` columns is normalised on its own, then multiplied by the gain.
///
/// The gain is `[C]` or `[width]` (the same for every group of columns), with groups of batch rows `[G, C]` or `[G, width]`.
/// Semantics section 2; the reciprocal root is a correctly rounded root and a correctly rounded quotient.
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    /// The kind.
    pub kind: NormKind,
    /// The number of columns that are normalised together; divides the number of columns.
    pub width: usize,
    /// Added under the root.
    pub eps: f32,
}

/// Index of a gain element: groups of batch rows, and whether the columns repeat every `width`.
#[derive(Clone, Copy, Debug)]
pub(super) struct GainShape {
    groups: usize,
    cols: usize,
}

impl GainShape {
    pub(super) fn check(op: &'static str, gain: &Type, x: &Type, width: usize) -> Result<(), InferError> {
        check::is(op, "the gain", gain, DType::F32, 1..=2)?;
        check::groups(op, "the gain", gain, 1, x)?;
        if gain.cols() == x.cols() || gain.cols() == width {
            return Ok(());
        }
        Err(InferError::new(op, format!("the gain wants {} or {width} columns, found {gain}", x.cols())))
    }

    pub(super) fn of(gain: &Type) -> GainShape {
        GainShape { groups: if gain.dims.len() == 2 { gain.dims[0] } else { 1 }, cols: gain.cols() }
    }

    fn at(self, row: usize, rows: usize, col: usize) -> usize {
        row / (rows / self.groups) * self.cols + col % self.cols
    }

    /// Index of the gain of column `base + j`, where `base` is a multiple of the width and `j` is below it.
    pub(super) fn index(self, row: &Expr, rows: usize, width: usize, base: &Expr, j: &Expr) -> Expr {
        let group = if self.groups == 1 { Expr::from(0) } else { row / (rows / self.groups) * self.cols };
        if self.cols == width { group + j } else { group + base + j }
    }
}

/// What a group of columns is shifted and multiplied by.
#[derive(Clone, Debug)]
pub(super) struct Moments {
    mean: Option<Expr>,
    scale: Expr,
}

impl Moments {
    /// Over `x[base .. base + width]`.
    pub(super) fn of(cx: &mut Lower<'_>, norm: &Norm, x: Buf, base: &Expr) -> Moments {
        let width = norm.width as f32;
        let mean = (norm.kind == NormKind::Layer).then(|| {
            let sum = long(cx, norm.width, &|_, j| Acc::Sum(Expr::load(x, base + j)));
            cx.b.bind(sum / f32c(width))
        });
        let sum = long(cx, norm.width, &|cx, j| {
            let x = Expr::load(x, base + j);
            let x = cx.b.bind(mean.iter().fold(x, |x, m| x - m));
            Acc::Dot(x.clone(), x)
        });
        let mean_square = if norm.kind == NormKind::L2 { sum } else { sum / f32c(width) };
        Moments { mean, scale: cx.b.bind(math::rsqrt(mean_square + f32c(norm.eps))) }
    }

    /// What the shifted elements are multiplied by.
    pub(super) fn scale(&self) -> &Expr {
        &self.scale
    }

    /// The normalised element.
    pub(super) fn apply(&self, x: Expr) -> Expr {
        self.mean.iter().fold(x, |x, m| x - m) * &self.scale
    }
}

impl Norm {
    /// Copy row `row` of operand 0 to scratch, so that a fused producer is evaluated once.
    pub(super) fn stage(cx: &mut Lower<'_>, row: &Expr) -> Buf {
        let cols = cx.ty(0).cols();
        let x = cx.b.scratch("x", DType::F32, cols);
        cx.lanes(0, cols, 2, |cx, c| {
            let e = cx.load(0, row, &c);
            cx.b.store(x, c, e);
        });
        x
    }
}

impl OpDef for Norm {
    const NAME: &'static str = "norm";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 1..=2)?;
        check::is(Self::NAME, "x", &ins[0], DType::F32, 1..=4)?;
        if self.width == 0 || !ins[0].cols().is_multiple_of(self.width) {
            let why = format!("groups of {} columns do not divide those of {}", self.width, ins[0]);
            return Err(InferError::new(Self::NAME, why));
        }
        if let Some(gain) = ins.get(1) {
            GainShape::check(Self::NAME, gain, &ins[0], self.width)?;
        }
        Ok(vec![ins[0].clone()])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let x = ins[0];
        let (rows, cols) = (x.ty.rows(), x.ty.cols());
        let mut out = Vec::with_capacity(x.ty.numel());
        for (i, group) in x.as_f32().chunks(self.width).enumerate() {
            let n = self.width as f32;
            let mean = if self.kind == NormKind::Layer { group.iter().sum::<f32>() / n } else { 0.0 };
            let squares: f32 = group.iter().map(|x| (x - mean) * (x - mean)).sum();
            let scale = 1.0 / (if self.kind == NormKind::L2 { squares } else { squares / n } + self.eps).sqrt();
            for (j, x) in group.iter().enumerate() {
                let at = i * self.width + j;
                let y = (x - mean) * scale;
                let gain = |g: &&Tensor| g.as_f32()[GainShape::of(&g.ty).at(at / cols, rows, at % cols)];
                out.push(ins.get(1).map(gain).map_or(y, |g| y * g));
            }
        }
        vec![Tensor::f32(&x.ty.dims, out)]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let (x, dy) = (cx.ins[0], cx.grad());
        let grad = NormGrad { kind: self.kind, width: self.width, eps: self.eps };
        let Some(&gain) = cx.ins.get(1) else { return Ok(vec![Some(cx.op(grad, &[x, dy])?)]) };
        // A gain of one group of columns meets each group as a row.
        let (ty, gain_ty) = (cx.graph.ty(x).clone(), cx.graph.ty(gain).clone());
        let width = gain_ty.cols();
        let rows = Reshape { dims: vec![ty.numel() / width, width] };
        let back = Reshape { dims: ty.dims.clone() };
        let mul = Binary { f: BinaryFn::Mul };
        let dy_rows = cx.op(rows.clone(), &[dy])?;
        let dx = if cx.wants(0) {
            let scaled = cx.op(mul.clone(), &[dy_rows, gain])?;
            let scaled = cx.op(back, &[scaled])?;
            Some(cx.op(grad, &[x, scaled])?)
        } else {
            None
        };
        let dgain = if cx.wants(1) {
            let plain = cx.op(self.clone(), &[x])?;
            let plain = cx.op(rows, &[plain])?;
            let each = cx.op(mul, &[plain, dy_rows])?;
            Some(cx.op(SumTo { dims: gain_ty.dims }, &[each])?)
        } else {
            None
        };
        Ok(vec![dx, dgain])
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        Flops::float(4 * outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, cols) = (cx.ty(0).rows(), cx.ty(0).cols());
        let gain = (cx.n_ins() == 2).then(|| (cx.buf(1), GainShape::of(cx.ty(1))));
        let row = cx.b.grid(rows);
        let x = Norm::stage(cx, &row);
        cx.each_step(0, cols, self.width, |cx, base| {
            let moments = Moments::of(cx, self, x, &base);
            cx.lanes(0, self.width, 2, |cx, j| {
                let y = moments.apply(Expr::load(x, &base + &j));
                let y = match gain {
                    Some((gain, shape)) => y * Expr::load(gain, shape.index(&row, rows, self.width, &base, &j)),
                    None => y,
                };
                cx.push(&row, &(&base + &j), &[(0, y)]);
            });
        });
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn pushes(&self) -> std::ops::Range<usize> {
        0..1
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        [Axis::Rows, Axis::Weight { rank: 1 }][..ins.len()].to_vec()
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-5, atol: 1e-5 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let norm = |kind, width| Norm { kind, width, eps: 1e-6 };
        let x = Type::f32(&[4, 3, 30]);
        vec![
            (norm(NormKind::Rms, 30), vec![x.clone()]),
            (norm(NormKind::Rms, 30), vec![x.clone(), Type::f32(&[30])]),
            (norm(NormKind::Rms, 10), vec![x.clone(), Type::f32(&[2, 10])]),
            (norm(NormKind::L2, 5), vec![x.clone()]),
            (norm(NormKind::Layer, 15), vec![x.clone(), Type::f32(&[4, 30])]),
            (norm(NormKind::Layer, 300), vec![Type::f32(&[3, 300])]),
        ]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let norm = |width| Norm { kind: NormKind::Rms, width, eps: 1e-6 };
        vec![
            (norm(7), vec![Type::f32(&[3, 30])]),
            (norm(0), vec![Type::f32(&[3, 30])]),
            (norm(10), vec![Type::f32(&[3, 30]), Type::f32(&[11])]),
            (norm(10), vec![Type::f32(&[3, 30]), Type::f32(&[2, 10])]),
            (norm(10), vec![Type::i32(&[3, 30])]),
            (norm(10), vec![]),
        ]
    }
}
