//! Panels of a weight as panels of its transpose, which the input gradient of a product reads.
//!
//! A pure copy with zeros beyond the last row.

use super::{Axis, Flops, InferError, OpDef, check, pack_panels::PANEL};
use crate::{DType, Tensor, Type, loops::f32c, lower::Lower};

/// Panels `[G?, ceil(m / 16), n, 16]` of `W [m, n]`, laid out as by [`super::PackPanels`] → panels `[G?, ceil(n / 16), m, 16]` of
/// `W^T`.
#[derive(Clone, Debug, PartialEq)]
pub struct TransposePanels {
    /// Rows of the weight.
    pub m: usize,
}

impl OpDef for TransposePanels {
    const NAME: &'static str = "transpose_panels";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 1..=1)?;
        let panels = &ins[0];
        check::is(Self::NAME, "panels", panels, DType::F32, 3..=4)?;
        let rank = panels.dims.len();
        let [p, n, lanes] = panels.dims[rank - 3..] else { unreachable!("at least three dimensions") };
        if self.m == 0 || p != self.m.div_ceil(PANEL) || lanes != PANEL {
            return Err(InferError::new(Self::NAME, format!("{} rows do not fit panels {panels}", self.m)));
        }
        let mut dims = panels.dims[..rank - 3].to_vec();
        dims.extend([n.div_ceil(PANEL), self.m, PANEL]);
        Ok(vec![Type::f32(&dims)])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let ty = self.infer(&[ins[0].ty.clone()]).expect("accepted before").remove(0);
        let rank = ins[0].ty.dims.len();
        let [p, n, _] = ins[0].ty.dims[rank - 3..] else { unreachable!("at least three dimensions") };
        let at = |i: usize| {
            let (l, o, q) = (i % PANEL, i / PANEL % self.m, i / PANEL / self.m);
            let (g, col) = (q / n.div_ceil(PANEL), q % n.div_ceil(PANEL) * PANEL + l);
            if col < n { ins[0].as_f32()[((g * p + o / PANEL) * n + col) * PANEL + o % PANEL] } else { 0.0 }
        };
        let data = (0..ty.numel()).map(at).collect();
        vec![Tensor::f32(&ty.dims, data)]
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (from, m) = (cx.ty(0).clone(), self.m);
        let rank = from.dims.len();
        let [p_n, n, _] = from.dims[rank - 3..] else { unreachable!("at least three dimensions") };
        let (panels, q_n) = (cx.buf(0), n.div_ceil(PANEL));
        let at = cx.b.grid(from.numel() / (p_n * n * PANEL) * q_n);
        let (g, q) = (cx.b.bind(&at / q_n), cx.b.bind(&at % q_n));
        let to = cx.b.bind(at * (m * PANEL));
        for l in 0..PANEL {
            let col = cx.b.bind(&q * PANEL + l);
            let copy = |cx: &mut Lower<'_>, p: &crate::loops::Expr, rows: usize| {
                let from = cx.b.bind(((&g * p_n + p) * n + &col) * PANEL);
                let to = cx.b.bind(&to + p * (PANEL * PANEL) + l);
                cx.lanes(0, rows, 1, |cx, o| {
                    let x = crate::loops::Expr::load(panels, &from + &o);
                    cx.put(0, &to + o * PANEL, x);
                });
            };
            cx.if_else(
                col.clone().lt(crate::loops::int(n)),
                |cx| {
                    cx.each(0, m / PANEL, |cx, p| copy(cx, &p, PANEL));
                    if !m.is_multiple_of(PANEL) {
                        copy(cx, &(m / PANEL).into(), m % PANEL);
                    }
                },
                |cx| cx.lanes(0, m, 1, |cx, o| cx.put(0, &to + o * PANEL + l, f32c(0.0))),
            );
        }
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Weight { rank: 3 }]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![
            (TransposePanels { m: 16 }, vec![Type::f32(&[1, 5, 16])]),
            (TransposePanels { m: 3 }, vec![Type::f32(&[1, 32, 16])]),
            (TransposePanels { m: 37 }, vec![Type::f32(&[2, 3, 19, 16])]),
        ]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (TransposePanels { m: 17 }, vec![Type::f32(&[1, 5, 16])]),
            (TransposePanels { m: 16 }, vec![Type::f32(&[5, 16])]),
            (TransposePanels { m: 0 }, vec![Type::f32(&[1, 5, 16])]),
        ]
    }
}
