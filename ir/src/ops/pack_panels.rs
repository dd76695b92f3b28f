//! Float weights in the layout that products read.

use super::{Axis, Flops, InferError, OpDef, VjpCx, check};
use crate::{DType, Tensor, Type, Value, loops::f32c, lower::Lower};

/// The number of rows of the weight that one panel holds.
pub const PANEL: usize = 16;

/// The type of the panels of a weight `[m, n]` or `[G, m, n]`: `[G?, ceil(m / 16), n, 16]`.
pub fn panels_type(weight: &Type) -> Type {
    let rank = weight.dims.len();
    let mut dims = weight.dims[..rank - 2].to_vec();
    dims.extend([weight.dims[rank - 2].div_ceil(PANEL), weight.dims[rank - 1], PANEL]);
    Type::f32(&dims)
}

/// `W [m, n]` or `[G, m, n]` → panels `[G?, ceil(m / 16), n, 16]`: panel `p`, column `j`, lane `l` holds `W[16 p + l, j]`, zero
/// beyond row `m`.
#[derive(Clone, Debug, PartialEq)]
pub struct PackPanels {}

impl OpDef for PackPanels {
    const NAME: &'static str = "pack_panels";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 1..=1)?;
        check::is(Self::NAME, "the weight", &ins[0], DType::F32, 2..=3)?;
        Ok(vec![panels_type(&ins[0])])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let w = ins[0];
        let ty = panels_type(&w.ty);
        let (m, n) = (w.ty.dims[w.ty.dims.len() - 2], w.ty.cols());
        let panels = m.div_ceil(PANEL);
        let at = |i: usize| {
            let (l, j, p) = (i % PANEL, i / PANEL % n, i / PANEL / n);
            let (g, row) = (p / panels, p % panels * PANEL + l);
            if row < m { w.as_f32()[(g * m + row) * n + j] } else { 0.0 }
        };
        let data = (0..ty.numel()).map(at).collect();
        vec![Tensor::f32(&ty.dims, data)]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        // The gradient of panels has the layout of the weight.
        Ok(vec![Some(cx.grad())])
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let w = cx.ty(0).clone();
        let (m, n) = (w.dims[w.dims.len() - 2], w.cols());
        let panels = m.div_ceil(PANEL);
        let p = cx.b.grid(w.rows() / m * panels);
        let row = cx.b.bind(&p / panels * m);
        let first = cx.b.bind(&p % panels * PANEL);
        cx.each(0, PANEL, |cx, l| {
            let at = cx.b.bind(&first + &l);
            let inside = at.clone().lt(crate::loops::int(m));
            let base = cx.b.bind(&p * (n * PANEL) + &l);
            let to = base.clone();
            cx.if_else(
                inside,
                |cx| {
                    let from = cx.b.bind(&row + &at);
                    cx.lanes(0, n, 2, |cx, j| {
                        let x = cx.load(0, &from, &j);
                        cx.put(0, &base + j * PANEL, x);
                    });
                },
                |cx| cx.lanes(0, n, 1, |cx, j| cx.put(0, to + j * PANEL, f32c(0.0))),
            );
        });
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Weight { rank: 2 }]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![
            (PackPanels {}, vec![Type::f32(&[16, 5])]),
            (PackPanels {}, vec![Type::f32(&[3, 9])]),
            (PackPanels {}, vec![Type::f32(&[2, 37, 11])]),
        ]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![(PackPanels {}, vec![Type::f32(&[16])]), (PackPanels {}, vec![Type::i32(&[16, 4])])]
    }
}
