//! Float products with packed panels: small linear layers, routers, the logits head.

use super::{
    Axis, Flops, InferError, OpDef, TransposePanels, VjpCx, WeightGrad, check,
    pack_panels::PANEL,
    row_tiles::{Instances, TILE, group_of_rows, panel_product, row_tiles, sample_offsets, sections},
};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Expr, int},
    lower::Lower,
};

/// `(x [.., n], panels [ceil(m / 16), n, 16] or [G, ceil(m / 16), n, 16])` → `y [.., m]`: `y = sum_j W[o, j] x[j]`, a chain of fused
/// multiply-adds in ascending `j` from +0. Panels are laid out as by [`super::PackPanels`]; batch row `r` of `R` uses group
/// `r / (R / G)`. With grouped rows, `offsets i32 [S + 1]` follow, and the rows `offsets[s] .. offsets[s + 1]` of section `s` of `S` use
/// group `s / (S / G)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// Columns of the result.
    pub m: usize,
    /// Whether the last operand says which rows use which group of the weights.
    pub grouped_rows: bool,
}

/// Rows of one instance.
const ROWS: usize = 33;
/// About this many instances are made if there is work for them.
const INSTANCES: usize = 32;

/// Rows of the samples with grouped rows.
const GROUPED_ROWS: usize = 41;

/// Checks panels of a weight with `m` rows against the columns of `x`.
pub(super) fn check_panels(op: &'static str, m: usize, panels: &Type, x: &Type) -> Result<(), InferError> {
    check::is(op, "panels", panels, DType::F32, 3..=4)?;
    let want = [m.div_ceil(PANEL), x.cols(), PANEL];
    if m == 0 || !panels.dims.ends_with(&want) {
        return Err(InferError::new(
            op,
            format!("{m} rows of {} columns want panels {want:?}, found {panels}", x.cols()),
        ));
    }
    Ok(())
}

fn groups(panels: &Type) -> usize {
    if panels.dims.len() == 4 { panels.dims[0] } else { 1 }
}

impl OpDef for Linear {
    const NAME: &'static str = "linear";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        let want = 2 + usize::from(self.grouped_rows);
        check::count(Self::NAME, ins, want..=want)?;
        check::is(Self::NAME, "x", &ins[0], DType::F32, 1..=4)?;
        check_panels(Self::NAME, self.m, &ins[1], &ins[0])?;
        match ins.get(2) {
            None => drop(check::groups(Self::NAME, "panels", &ins[1], 3, &ins[0])?),
            Some(offsets) => drop(sections(Self::NAME, groups(&ins[1]), offsets)?),
        }
        let mut out = ins[0].clone();
        *out.dims.last_mut().expect("x has a dimension") = self.m;
        Ok(vec![out])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (x, panels) = (ins[0], ins[1]);
        let (rows, n) = (x.ty.rows(), x.ty.cols());
        let size = self.m.div_ceil(PANEL) * n * PANEL;
        let offsets = ins.get(2).map(|t| t.to_i64());
        let group = group_of_rows(rows, panels.ty.numel() / size, offsets.as_deref());
        let element = |row: usize, o: usize| {
            let w = &panels.as_f32()[group[row] * size + o / PANEL * n * PANEL..];
            let x = &x.as_f32()[row * n..][..n];
            (0..n).fold(0.0f32, |y, j| x[j].mul_add(w[j * PANEL + o % PANEL], y))
        };
        let out = (0..rows * self.m).map(|i| element(i / self.m, i % self.m)).collect();
        let types: Vec<Type> = ins.iter().map(|t| t.ty.clone()).collect();
        let ty = self.infer(&types).expect("accepted before").remove(0);
        vec![Tensor::f32(&ty.dims, out)]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let (x, panels, dy) = (cx.ins[0], cx.ins[1], cx.grad());
        let (n, ty) = (cx.graph.ty(x).cols(), cx.graph.ty(panels).clone());
        let offsets = cx.ins.get(2).copied();
        let dx = if cx.wants(0) {
            let back = cx.op(TransposePanels { m: self.m }, &[panels])?;
            let ins: Vec<Value> = [dy, back].into_iter().chain(offsets).collect();
            Some(cx.op(Linear { m: n, grouped_rows: self.grouped_rows }, &ins)?)
        } else {
            None
        };
        let dw = if cx.wants(1) {
            let ins: Vec<Value> = [dy, x].into_iter().chain(offsets).collect();
            let groups = (ty.dims.len() == 4).then(|| ty.dims[0]);
            Some(cx.op(WeightGrad { groups, grouped_rows: self.grouped_rows }, &ins)?)
        } else {
            None
        };
        Ok([dx, dw].into_iter().chain(offsets.map(|_| None)).collect())
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(2 * ins[0].numel() * self.m)
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, n) = (cx.ty(0).rows(), cx.ty(0).cols());
        let all = self.m.div_ceil(PANEL);
        let groups = groups(cx.ty(1));
        // A weight of few rows fills a part of its only panel; more rows of the operand fill the registers instead.
        let width = if self.m <= PANEL / 2 { self.m.next_multiple_of(4) } else { PANEL };
        let tile = if width < PANEL { 2 * TILE } else { TILE };
        let extent = if self.grouped_rows { rows } else { rows / groups };
        // As few rows leave registers for several panels.
        let span = match extent {
            1 => 4,
            2 | 3 => 2,
            _ => 1,
        };
        let span = all.min(span);
        let height = extent.div_ceil(extent.div_ceil(ROWS)).next_multiple_of(tile);
        let work = rows / extent * extent.div_ceil(height) * all;
        let (x, panels) = (cx.buf(0), cx.buf(1));
        let out = cx.b.scratch("tile", DType::F32, tile.max(span) * PANEL);
        let instances = Instances {
            rows,
            groups,
            offsets: self.grouped_rows.then(|| (cx.buf(2), (cx.ty(2).numel() - 1) / groups)),
            height,
            blocks: all,
            chunk: (work / INSTANCES).max(1).next_multiple_of(span).min(all),
        };
        instances.emit(cx, &|_, _, _| {}, &|cx, part| {
            let [first, end] = part.blocks;
            let panel = |cx: &mut Lower<'_>, p: Expr, span: usize| {
                let p0 = cx.b.bind((part.group * all + &p) * (n * PANEL));
                let col = cx.b.bind(p * PANEL);
                let count = cx.b.bind((int(self.m) - &col).min(int(span * PANEL)));
                // A tile of more rows than there are would reach beyond them.
                row_tiles(cx, part.rows, part.known, tile.min(rows), &|cx, row, rows| {
                    let x0 = cx.b.bind(row * n);
                    panel_product(cx, (x, &x0), (panels, &p0), [rows, span, n, width], &|cx, r, q, lane, y| {
                        cx.b.store(out, lane + (r * span + q) * PANEL, y);
                    });
                    for r in 0..rows {
                        let row = cx.b.bind(row + r);
                        cx.lanes(0, count.clone(), 2, |cx, l| {
                            let y = Expr::load(out, &l + r * span * PANEL);
                            cx.push(&row, &(&col + l), &[(0, y)]);
                        });
                    }
                });
            };
            let full = cx.b.bind(first + (end - first) / span * span);
            cx.each_step(first, &full, span, |cx, p| panel(cx, p, span));
            if span > 1 {
                cx.each(&full, end, |cx, p| panel(cx, p, 1));
            }
        });
    }

    fn pushes(&self) -> std::ops::Range<usize> {
        0..1
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        let grouped = [Axis::Rows, Axis::Weight { rank: 4 }, Axis::Shared];
        if self.grouped_rows { grouped.to_vec() } else { vec![Axis::Rows, Axis::Weight { rank: 3 }] }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |rows: &[usize], n: usize, m: usize, lead: &[usize]| {
            let dims = [lead, &[m.div_ceil(PANEL), n, PANEL]].concat();
            (Linear { m, grouped_rows: false }, vec![Type::f32(&[rows, &[n]].concat()), Type::f32(&dims)])
        };
        let grouped = |rows: usize, m: usize, groups: usize, sections: usize| {
            let panels = Type::f32(&[groups, m.div_ceil(PANEL), 9, PANEL]);
            let offsets = Type::i32(&[groups * sections + 1]);
            (Linear { m, grouped_rows: true }, vec![Type::f32(&[rows, 9]), panels, offsets])
        };
        vec![
            of(&[2, 3], 17, 2, &[]),
            of(&[1, 1], 30, 700, &[]),
            of(&[70], 9, 40, &[]),
            of(&[2, 37], 8, 33, &[2]),
            of(&[4, 2], 5, 16, &[4]),
            grouped(GROUPED_ROWS, 20, 4, 1),
            grouped(GROUPED_ROWS, 5, 3, 2),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        match k {
            2 => Tensor::i32(&ty.dims, sample_offsets(ty.numel(), GROUPED_ROWS)),
            _ => super::random_tensor(ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let x = Type::f32(&[3, 5]);
        let of = |m| Linear { m, grouped_rows: false };
        vec![
            (of(17), vec![x.clone(), Type::f32(&[1, 5, 16])]),
            (of(0), vec![x.clone(), Type::f32(&[1, 5, 16])]),
            (of(16), vec![x.clone(), Type::f32(&[1, 6, 16])]),
            (of(16), vec![x.clone(), Type::f32(&[2, 1, 5, 16])]),
            (Linear { m: 16, grouped_rows: true }, vec![x.clone(), Type::f32(&[2, 1, 5, 16]), Type::i32(&[4])]),
            (of(16), vec![x]),
        ]
    }
}
