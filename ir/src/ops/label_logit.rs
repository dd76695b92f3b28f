//! The logit of the label of each token.

use super::{Flops, InferError, OpDef, check, linear::check_panels, pack_panels::PANEL};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, Ty, f32c, i32c},
    lower::Lower,
};

/// `(h [R, T, n], panels [ceil(V / 16), n, 16], labels i32 [R, T])` → `[R, T]`: `W[label] h`, the same chain as in
/// [`super::CrossEntropy`], and 0 for labels outside `0..V`.
#[derive(Clone, Debug, PartialEq)]
pub struct LabelLogit {
    /// The number of tokens.
    pub vocab: usize,
}

/// Checks the operands that a loss over a vocabulary and its gradients share.
pub(super) fn check_head(op: &'static str, vocab: usize, ins: &[Type]) -> Result<(), InferError> {
    let [h, panels, labels] = [&ins[0], &ins[1], &ins[2]];
    check::is(op, "h", h, DType::F32, 3..=3)?;
    check::is(op, "panels", panels, DType::F32, 3..=3)?;
    check_panels(op, vocab, panels, h)?;
    check::is(op, "labels", labels, DType::I32, 2..=2)?;
    if labels.dims != h.dims[..2] {
        return Err(InferError::new(op, format!("{h} wants labels for every token, found {labels}")));
    }
    Ok(())
}

impl OpDef for LabelLogit {
    const NAME: &'static str = "label_logit";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 3..=3)?;
        check_head(Self::NAME, self.vocab, ins)?;
        Ok(vec![ins[2].with(DType::F32)])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (h, panels, labels) = (ins[0], ins[1].as_f32(), ins[2].to_i64());
        let n = h.ty.cols();
        let logit = |(row, label): (usize, &i64)| match usize::try_from(*label) {
            Ok(v) if v < self.vocab => {
                let (w, x) = (&panels[v / PANEL * n * PANEL..], &h.as_f32()[row * n..][..n]);
                (0..n).fold(0.0f32, |z, j| x[j].mul_add(w[j * PANEL + v % PANEL], z))
            }
            _ => 0.0,
        };
        vec![Tensor::f32(&ins[2].ty.dims, labels.iter().enumerate().map(logit).collect())]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(2 * ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, n) = (cx.ty(0).rows(), cx.ty(0).cols());
        let [h, panels, labels] = [0, 1, 2].map(|k| cx.buf(k));
        let row = cx.b.grid(rows);
        let label = cx.b.bind(Expr::load(labels, &row));
        let last = self.vocab as i32 - 1;
        let v = cx.b.bind(label.clone().max(i32c(0)).min(i32c(last)).cast(Ty::I64));
        let w = cx.b.bind(&v / PANEL * (n * PANEL) + v % PANEL);
        let x = cx.b.bind(&row * n);
        let z = cx.b.local(f32c(0.0));
        cx.each(0, n, |cx, j| {
            let left = Expr::load(h, &x + &j);
            cx.b.set(z, left.fma(Expr::load(panels, &w + j * PANEL), z));
        });
        let inside = i32c(0).le(label.clone()) & label.le(i32c(last));
        cx.put(0, row, inside.select(z, f32c(0.0)));
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |r, t, n: usize, vocab: usize| {
            let panels = Type::f32(&[vocab.div_ceil(PANEL), n, PANEL]);
            (LabelLogit { vocab }, vec![Type::f32(&[r, t, n]), panels, Type::i32(&[r, t])])
        };
        vec![of(2, 3, 9, 11), of(2, 9, 5, 40)]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        super::CrossEntropy { vocab: self.vocab }.sample_input(k, ty, random)
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (h, panels, labels) = (Type::f32(&[2, 3, 5]), Type::f32(&[2, 5, 16]), Type::i32(&[2, 3]));
        let of = |vocab| LabelLogit { vocab };
        vec![
            (of(20), vec![h.clone(), panels.clone(), Type::i32(&[2, 4])]),
            (of(40), vec![h.clone(), panels.clone(), labels]),
            (of(20), vec![h, panels]),
        ]
    }
}
