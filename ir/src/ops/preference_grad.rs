//! The gradient of the loss of preferred answers.

use super::{Accuracy, Flops, InferError, OpDef, check};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, f32c, math},
    lower::Lower,
};

/// `(margins [R], g [R] or [1])` → `[R, T]`: what every token's `nll` of [`super::Preference`] has of a gradient `g` of its margins, its
/// losses, or its mean loss. All tokens of a row have the same; both rows of a pair have it with opposite signs.
#[derive(Clone, Debug, PartialEq)]
pub struct PreferenceGrad {
    /// As in [`super::Preference`].
    pub beta: f32,
    /// Tokens of a row.
    pub tokens: usize,
    /// Whether every row has a gradient, else the mean over pairs has.
    pub per_row: bool,
    /// Whether it is that of losses, else of margins.
    pub of_loss: bool,
}

impl OpDef for PreferenceGrad {
    const NAME: &'static str = "preference_grad";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 2..=2)?;
        check::is(Self::NAME, "margins", &ins[0], DType::F32, 1..=1)?;
        let rows = ins[0].dims[0];
        let want = Type::f32(&[if self.per_row { rows } else { 1 }]);
        if ins[1] != want || !rows.is_multiple_of(2) || self.tokens == 0 {
            let why = format!("wants margins of pairs and the gradient {want}, found {} and {}", ins[0], ins[1]);
            return Err(InferError::new(Self::NAME, why));
        }
        Ok(vec![Type::f32(&[rows, self.tokens])])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (margins, g) = (ins[0].as_f32(), ins[1].as_f32());
        let each = |i: usize| {
            let (row, first) = (i / self.tokens, i / self.tokens / 2 * 2);
            let g = if self.per_row { g[first] + g[first + 1] } else { g[0] / (margins.len() / 2) as f32 };
            let slope = if self.of_loss { 1.0 / (1.0 + margins[first].exp()) } else { -1.0 };
            let d = self.beta * slope * g;
            if row == first { d } else { -d }
        };
        vec![Tensor::f32(&[margins.len(), self.tokens], (0..margins.len() * self.tokens).map(each).collect())]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(ins[0].numel() * (self.tokens + 12))
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let rows = cx.ty(0).dims[0];
        let (margins, g) = (cx.buf(0), cx.buf(1));
        let row = cx.b.grid(rows);
        let first = cx.b.bind(&row / 2 * 2);
        let g = match self.per_row {
            true => Expr::load(g, &first) + Expr::load(g, &first + 1),
            false => Expr::load(g, Expr::from(0)) / f32c((rows / 2) as f32),
        };
        let slope = match self.of_loss {
            true => math::sigmoid(&mut cx.b, f32c(0.0) - Expr::load(margins, &first)),
            false => f32c(-1.0),
        };
        let d = cx.b.bind(f32c(self.beta) * slope * g);
        let d = cx.b.bind(row.clone().eq(first).select(d.clone(), f32c(0.0) - d));
        cx.lanes(0, self.tokens, 2, |cx, i| cx.push(&row, &i, &[(0, d.clone())]));
    }

    fn pushes(&self) -> std::ops::Range<usize> {
        0..1
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-5, atol: 1e-6 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |tokens, per_row, of_loss| PreferenceGrad { beta: 0.3, tokens, per_row, of_loss };
        vec![
            (of(19, false, true), vec![Type::f32(&[6]), Type::f32(&[1])]),
            (of(3, true, true), vec![Type::f32(&[4]), Type::f32(&[4])]),
            (of(1, true, false), vec![Type::f32(&[2]), Type::f32(&[2])]),
        ]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let op = PreferenceGrad { beta: 0.3, tokens: 3, per_row: false, of_loss: true };
        vec![
            (op.clone(), vec![Type::f32(&[3]), Type::f32(&[1])]),
            (op.clone(), vec![Type::f32(&[4]), Type::f32(&[4])]),
            (op, vec![Type::f32(&[4, 2]), Type::f32(&[1])]),
        ]
    }
}
