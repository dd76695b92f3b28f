//! Weight gradients of products: sums of outer products over rows.
//!
//! Every element is one chain of fused multiply-adds in ascending row order, so neither the grid nor the tiles show in the result.

use super::{
    Flops, InferError, OpDef, check,
    row_tiles::{group_of_rows, sample_offsets, sections},
};
use crate::{
    DType, Tensor, Type,
    loops::{Buf, Expr, Ty, f32c},
    lower::Lower,
};

/// `(dy [.., m], x [.., n], with grouped rows offsets i32 [S + 1])` → `[m, n]`, or `[G, m, n]` with groups: the sum over rows `r` of
/// `dy[r, o] x[r, j]`.
///
/// Row `r` of `R` belongs to group `r / (R / G)`; with grouped rows the rows `offsets[s] .. offsets[s + 1]` of section `s` of `S` belong
/// to group `s / (S / G)`.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightGrad {
    /// Groups of the weight, if it has any.
    pub groups: Option<usize>,
    /// Whether the last operand says which rows belong to which group.
    pub grouped_rows: bool,
}

/// Rows and columns of a register tile.
const TILE: [usize; 2] = [6, 16];
/// Rows of the weight that one instance makes.
const BLOCK: usize = 64;
/// Rows of the operands that are gathered where a cache holds them; sums wait in between.
const SPAN: usize = 128;
/// Rows of the samples with grouped rows.
const GROUPED_ROWS: usize = 41;

/// The value that the sum of row `i` and a lane of a tile starts from.
pub(super) type Start<'f> = &'f dyn Fn(&mut Lower<'_>, usize, &Expr) -> Expr;

/// `out[o0 + i, j0 + lane] = start + sum over r in lo .. hi of dy[r, i] x[r, lane]` for a tile of `rows` by `width`; `dy` and `x` are
/// buffers with the index of element `(0, 0)` of the tile and a stride.
pub(super) fn outer_tile(
    cx: &mut Lower<'_>,
    (dy, dy0, dy_stride): (Buf, &Expr, usize),
    (x, x0, x_stride): (Buf, &Expr, usize),
    [lo, hi]: [&Expr; 2],
    [rows, width]: [usize; 2],
    start: Start<'_>,
    store: &dyn Fn(&mut Lower<'_>, usize, &Expr, Expr),
) {
    cx.lanes(0, width, width.div_ceil(4) as u8, |cx, lane| {
        let mut accs = vec![];
        for i in 0..rows {
            let from = start(cx, i, &lane);
            accs.push(cx.b.local(from));
        }
        cx.each(lo, hi, |cx, r| {
            let right = cx.b.bind(Expr::load(x, x0 + &r * x_stride + &lane));
            for (i, &acc) in accs.iter().enumerate() {
                cx.b.set(acc, Expr::load(dy, dy0 + &r * dy_stride + i).fma(&right, acc));
            }
        });
        for (i, acc) in accs.into_iter().enumerate() {
            store(cx, i, &lane, acc.into());
        }
    });
}

/// Call `run(cx, first, size)` for `n` elements in pieces of `size`, the last one smaller.
pub(super) fn pieces(cx: &mut Lower<'_>, n: usize, size: usize, run: &dyn Fn(&mut Lower<'_>, &Expr, usize)) {
    let full = n / size * size;
    if full > 0 {
        cx.each_step(0, full, size, |cx, at| run(cx, &at, size));
    }
    if n > full {
        run(cx, &full.into(), n - full);
    }
}

/// Copies `count` rows of `width` elements, which begin `stride` apart, one behind the other.
fn gather(cx: &mut Lower<'_>, (from, from0, stride): (Buf, &Expr, usize), to: Buf, count: &Expr, width: usize) {
    let from0 = cx.b.bind(from0);
    cx.each(0, count.clone(), |cx, r| {
        let (source, target) = (cx.b.bind(&from0 + &r * stride), cx.b.bind(&r * width));
        cx.lanes(0, width, width.div_ceil(4) as u8, |cx, lane| {
            let value = Expr::load(from, &source + &lane);
            cx.b.store(to, &target + lane, value);
        });
    });
}

impl WeightGrad {
    fn group_count(&self) -> usize {
        self.groups.unwrap_or(1)
    }
}

impl OpDef for WeightGrad {
    const NAME: &'static str = "weight_grad";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        let want = 2 + usize::from(self.grouped_rows);
        check::count(Self::NAME, ins, want..=want)?;
        check::is(Self::NAME, "dy", &ins[0], DType::F32, 1..=4)?;
        check::is(Self::NAME, "x", &ins[1], DType::F32, 1..=4)?;
        let groups = self.group_count();
        match ins.get(2) {
            Some(offsets) if groups > 0 => drop(sections(Self::NAME, groups, offsets)?),
            None if groups > 0 && ins[0].rows().is_multiple_of(groups) => {}
            _ => {
                return Err(InferError::new(
                    Self::NAME,
                    format!("{groups} groups do not divide the rows of {}", ins[0]),
                ));
            }
        }
        if ins[0].rows() != ins[1].rows() {
            return Err(InferError::new(Self::NAME, format!("{} and {} have different rows", ins[0], ins[1])));
        }
        let dims: Vec<usize> = self.groups.into_iter().chain([ins[0].cols(), ins[1].cols()]).collect();
        Ok(vec![Type::f32(&dims)])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (dy, x) = (ins[0], ins[1]);
        let (rows, m, n) = (dy.ty.rows(), dy.ty.cols(), x.ty.cols());
        let offsets = ins.get(2).map(|t| t.to_i64());
        let group = group_of_rows(rows, self.group_count(), offsets.as_deref());
        let mut out = vec![0.0f32; self.group_count() * m * n];
        for (row, g) in group.into_iter().enumerate() {
            for o in 0..m {
                let to = &mut out[(g * m + o) * n..][..n];
                let left = dy.as_f32()[row * m + o];
                to.iter_mut().zip(&x.as_f32()[row * n..][..n]).for_each(|(w, x)| *w = left.mul_add(*x, *w));
            }
        }
        let dims: Vec<usize> = self.groups.into_iter().chain([m, n]).collect();
        vec![Tensor::f32(&dims, out)]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(2 * ins[0].numel() * ins[1].cols())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, m, n) = (cx.ty(0).rows(), cx.ty(0).cols(), cx.ty(1).cols());
        let (dy, x) = (cx.buf(0), cx.buf(1));
        let groups = self.group_count();
        let offsets = self.grouped_rows.then(|| (cx.buf(2), (cx.ty(2).numel() - 1) / groups));
        let (full, rest) = (m / BLOCK, m % BLOCK);
        let blocks = full + usize::from(rest > 0);
        let at = cx.b.grid(groups * blocks);
        let (g, block) = (cx.b.bind(&at / blocks), cx.b.bind(at % blocks));
        let (lo, hi) = match offsets {
            None => (cx.b.bind(&g * (rows / groups)), cx.b.bind((&g + 1) * (rows / groups))),
            Some((offsets, sections)) => {
                let bound = |at: Expr| Expr::load(offsets, at).cast(Ty::I64).max(Expr::from(0)).min(Expr::from(rows));
                (cx.b.bind(bound(&g * sections)), cx.b.bind(bound((&g + 1) * sections)))
            }
        };
        let o0 = cx.b.bind(block.clone() * BLOCK);
        let to = cx.b.bind((g * m + &o0) * n);
        let mut scratch = |name: &str, len: usize| cx.b.scratch(name, DType::F32, len);
        let (left, right) = (scratch("dy", SPAN * BLOCK), scratch("x", SPAN * TILE[1]));
        let sum = scratch("sum", m.min(BLOCK) * n);
        let part = |cx: &mut Lower<'_>, height: usize| {
            cx.lanes(0, height * n, 4, |cx, i| cx.b.store(sum, i, f32c(0.0)));
            cx.each_step(lo.clone(), hi.clone(), SPAN, |cx, first| {
                let count = cx.b.bind((hi.clone() - &first).min(Expr::from(SPAN)));
                gather(cx, (dy, &(&first * m + &o0), m), left, &count, height);
                pieces(cx, n, TILE[1], &|cx, j, width| {
                    gather(cx, (x, &(&first * n + j), n), right, &count, width);
                    pieces(cx, height, TILE[0], &|cx, i, tile| {
                        let at = cx.b.bind(i * n + j);
                        let (zero, start) = (Expr::from(0), |_: &mut Lower<'_>, r: usize, lane: &Expr| {
                            Expr::load(sum, &at + lane + r * n)
                        });
                        outer_tile(
                            cx,
                            (left, i, height),
                            (right, &zero, width),
                            [&zero, &count],
                            [tile, width],
                            &start,
                            &|cx, r, lane, w| cx.b.store(sum, &at + lane + r * n, w),
                        );
                    });
                });
            });
            cx.lanes(0, height * n, 4, |cx, i| cx.put(0, &to + &i, Expr::load(sum, i)));
        };
        match (full, rest) {
            (_, 0) => part(cx, BLOCK),
            (0, rest) => part(cx, rest),
            (full, rest) => {
                cx.if_else(block.lt(Expr::from(full)), |cx| part(cx, BLOCK), |cx| part(cx, rest));
            }
        }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |lead: &[usize], m: usize, n: usize, groups| {
            let ty = |c: usize| Type::f32(&[lead, &[c]].concat());
            (WeightGrad { groups, grouped_rows: false }, vec![ty(m), ty(n)])
        };
        let grouped = |groups: usize, sections: usize| {
            let ins = vec![
                Type::f32(&[GROUPED_ROWS, 7]),
                Type::f32(&[GROUPED_ROWS, 18]),
                Type::i32(&[groups * sections + 1]),
            ];
            (WeightGrad { groups: Some(groups), grouped_rows: true }, ins)
        };
        vec![
            of(&[2, 5], 7, 20, None),
            of(&[33], 50, 3, None),
            of(&[4, 2], 24, 16, Some(2)),
            of(&[3], 1, 1, None),
            of(&[3, 50], 70, 18, None),
            of(&[2, 130], 5, 33, Some(2)),
            grouped(4, 1),
            grouped(3, 2),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        match k {
            2 => Tensor::i32(&ty.dims, sample_offsets(ty.numel(), GROUPED_ROWS)),
            _ => super::random_tensor(ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (one, two) =
            (WeightGrad { groups: None, grouped_rows: false }, WeightGrad { groups: Some(2), grouped_rows: false });
        vec![
            (one.clone(), vec![Type::f32(&[3, 5]), Type::f32(&[4, 5])]),
            (two.clone(), vec![Type::f32(&[3, 5]), Type::f32(&[3, 5])]),
            (WeightGrad { grouped_rows: true, ..two }, vec![Type::f32(&[3, 5]), Type::f32(&[3, 5]), Type::i32(&[4])]),
            (one, vec![Type::f32(&[3, 5])]),
        ]
    }
}
