//! Ternary codes of float weights, packed for the integer product.

use super::{Axis, Flops, InferError, OpDef, VjpCx, check};
use crate::{
    DType, Data, Tensor, Type, Value,
    loops::{Expr, f32c, i32c, int},
    lower::Lower,
};

/// Rows of a weight that one packed block holds.
pub const BLOCK_ROWS: usize = 32;

/// The type of the packed codes of a weight `[m, n]` or `[G, m, n]`: `u8 [G?, ceil(m / 32), ceil64(n) / 4, 32]`.
pub fn packed_type(weight: &Type) -> Type {
    let rank = weight.dims.len();
    let mut dims = weight.dims[..rank - 2].to_vec();
    dims.extend([weight.dims[rank - 2].div_ceil(BLOCK_ROWS), weight.dims[rank - 1].next_multiple_of(64) / 4, 32]);
    Type::new(DType::U8, &dims)
}

/// `(W [m, n] or [G, m, n], alpha [m, nb] or [G, m, nb])` → packed codes `u8 [G?, ceil(m / 32), np / 4, 32]` with `np` the next
/// multiple of 64 above `n`.
///
/// A weight is `q = sign(W)` where `|W| > ratio * alpha`, else 0, and its code is `q + 1`. `alpha` belongs to `group` consecutive
/// columns; with one column it belongs to the whole row. Byte `4 r8 + k4` of block `(ob, kb)` holds in bits `2 g .. 2 g + 2` the
/// code of row `32 ob + 8 g + r8`, column `4 kb + k4`. Rows and columns beyond the weight have code 1.
#[derive(Clone, Debug, PartialEq)]
pub struct PackTernary {
    /// Columns that share a scale.
    pub group: usize,
    /// Share of the scale above which a weight is not zero.
    pub ratio: f32,
}

/// Checks the weight and the scales of a ternarisation; returns the leading groups of both.
pub(super) fn check_scales(op: &'static str, group: usize, ins: &[Type]) -> Result<[usize; 2], InferError> {
    check::count(op, ins, 2..=2)?;
    let [w, alpha] = [&ins[0], &ins[1]];
    check::is(op, "the weight", w, DType::F32, 2..=3)?;
    check::is(op, "alpha", alpha, DType::F32, 2..=3)?;
    let lead = |t: &Type| if t.dims.len() == 3 { t.dims[0] } else { 1 };
    let (m, n) = (w.dims[w.dims.len() - 2], w.cols());
    let rows = alpha.dims[alpha.dims.len() - 2];
    let columns = alpha.cols() == 1 || (group > 0 && alpha.cols() == n.div_ceil(group));
    if rows == m && columns && (lead(alpha) == lead(w) || lead(alpha) == 1) {
        return Ok([lead(w), lead(alpha)]);
    }
    Err(InferError::new(op, format!("scales {alpha} do not fit groups of {group} columns of {w}")))
}

/// Columns that share a scale in a row of `n` columns with `nb` scales.
pub(super) fn scale_width(group: usize, n: usize, nb: usize) -> usize {
    if nb == 1 { n } else { group }
}

/// `sign(w)` if `|w|` is above the threshold, else 0.
pub(super) fn ternary(w: f32, threshold: f32) -> i8 {
    if w.abs() > threshold { if w > 0.0 { 1 } else { -1 } } else { 0 }
}

/// The ternary values and the scale of every element, in row-major order.
pub(super) fn reference(group: usize, ratio: f32, w: &Tensor, alpha: &Tensor) -> Vec<(i8, f32)> {
    let (n, nb) = (w.ty.cols(), alpha.ty.cols());
    let (width, scales) = (scale_width(group, n, nb), alpha.ty.rows());
    let scale = |i: usize| alpha.as_f32()[i / n % scales * nb + i % n / width];
    w.as_f32().iter().enumerate().map(|(i, &w)| (ternary(w, ratio * scale(i)), scale(i))).collect()
}

impl PackTernary {
    /// The columns `lo .. lo + len` of one group of eight rows: locals hold the rows and the thresholds of its four members.
    fn columns(cx: &mut Lower<'_>, rows: &[Expr; 4], limits: &[Expr; 4], to: &Expr, lo: &Expr, len: usize) {
        cx.lanes(0, len, 1, |cx, j| {
            let col = cx.b.bind(lo + j);
            let mut byte = i32c(0);
            for (g, (row, limit)) in rows.iter().zip(limits).enumerate() {
                let w = cx.load(0, row, &col);
                let w = cx.b.bind(w);
                // 0, 1 or 2 in the place of this group; comparisons are 0 or all ones.
                let shift = 2 * g as i32;
                let above = limit.clone().lt(w.clone()).select(i32c(2 << shift), i32c(1 << shift));
                let code = w.lt(-limit.clone()).select(i32c(0), above);
                byte = cx.b.bind(byte | code);
            }
            cx.put(0, to + &col / 4 * 32 + &col % 4, byte);
        });
    }
}

impl OpDef for PackTernary {
    const NAME: &'static str = "pack_ternary";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check_scales(Self::NAME, self.group, ins)?;
        Ok(vec![packed_type(&ins[0])])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let w = ins[0];
        let (m, n) = (w.ty.dims[w.ty.dims.len() - 2], w.ty.cols());
        let ty = packed_type(&w.ty);
        let (blocks, kbs) = (m.div_ceil(BLOCK_ROWS), ty.dims[ty.dims.len() - 2]);
        let codes = reference(self.group, self.ratio, w, ins[1]);
        let code = |g: usize, row: usize, col: usize| {
            if row < m && col < n { (codes[(g * m + row) * n + col].0 + 1) as u8 } else { 1 }
        };
        let byte = |at: usize| {
            let (k4, r8, kb, ob) = (at % 4, at / 4 % 8, at / 32 % kbs, at / 32 / kbs);
            let (g, ob) = (ob / blocks, ob % blocks);
            (0..4).map(|q| code(g, BLOCK_ROWS * ob + 8 * q + r8, 4 * kb + k4) << (2 * q)).sum()
        };
        let data = Data::U8((0..ty.numel()).map(byte).collect());
        vec![Tensor { ty, data }]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        // Straight through to the latent; the scale is a constant. The gradient of codes has the layout of the weight, with padding.
        let n = cx.graph.ty(cx.ins[0]).cols();
        Ok(vec![Some(cx.columns(n)?), None])
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(2 * ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (w, alpha) = (cx.ty(0).clone(), cx.ty(1).clone());
        let (m, n, nb) = (w.dims[w.dims.len() - 2], w.cols(), alpha.cols());
        let (blocks, np) = (m.div_ceil(BLOCK_ROWS), n.next_multiple_of(64));
        let scales = cx.buf(1);
        let shared = alpha.rows() == m;
        let block = cx.b.grid(w.rows() / m * blocks);
        let first = cx.b.bind(&block % blocks * BLOCK_ROWS);
        let lead = cx.b.bind(&block / blocks * m);
        let width = scale_width(self.group, n, nb);
        cx.each(0, 8, |cx, r8| {
            let to = cx.b.bind(&block * (np * 8) + &r8 * 4);
            let inner: [Expr; 4] = std::array::from_fn(|g| cx.b.bind(&first + &r8 + 8 * g));
            // A row beyond the weight reads the last row with an infinite threshold, which makes its codes 1.
            let rows: [Expr; 4] = std::array::from_fn(|g| {
                let row = inner[g].clone().min(int(m - 1)) + &lead;
                cx.b.bind(row)
            });
            let group = |cx: &mut Lower<'_>, b: &Expr, len: usize| {
                let limits = std::array::from_fn(|g| {
                    let row = if shared { inner[g].clone().min(int(m - 1)) } else { rows[g].clone() };
                    let limit = f32c(self.ratio) * Expr::load(scales, row * nb + b);
                    cx.b.bind(inner[g].clone().lt(int(m)).select(limit, f32c(f32::INFINITY)))
                });
                let lo = cx.b.bind(b * width);
                PackTernary::columns(cx, &rows, &limits, &to, &lo, len);
            };
            let full = n / width;
            cx.each(0, full, |cx, b| group(cx, &b, width));
            if n > full * width {
                group(cx, &int(full), n - full * width);
            }
            if np > n {
                cx.lanes(n, np, 1, |cx, col| cx.put(0, &to + &col / 4 * 32 + col % 4, i32c(0b0101_0101)));
            }
        });
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Weight { rank: 2 }, Axis::Weight { rank: 2 }]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |ratio| PackTernary { group: 128, ratio };
        vec![
            (of(0.5), vec![Type::f32(&[37, 300]), Type::f32(&[37, 3])]),
            (of(0.7), vec![Type::f32(&[3, 5]), Type::f32(&[3, 1])]),
            (of(0.5), vec![Type::f32(&[2, 40, 130]), Type::f32(&[2, 40, 2])]),
            (of(0.5), vec![Type::f32(&[2, 33, 64]), Type::f32(&[33, 1])]),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        ternary_sample(k, ty, random)
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let of = PackTernary { group: 128, ratio: 0.5 };
        vec![
            (of.clone(), vec![Type::f32(&[37, 300]), Type::f32(&[37, 2])]),
            (of.clone(), vec![Type::f32(&[37, 300]), Type::f32(&[36, 3])]),
            (of.clone(), vec![Type::f32(&[37, 300]), Type::f32(&[2, 37, 3])]),
            (of, vec![Type::f32(&[37, 300])]),
        ]
    }
}

/// Weights with zeros and exact ties, and positive scales.
pub(super) fn ternary_sample(k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
    let draw = |i: usize| match (k, i % 16) {
        (0, 0) => 0.0,
        (0, _) => random(),
        _ => 0.25 + random().abs(),
    };
    Tensor::f32(&ty.dims, (0..ty.numel()).map(draw).collect())
}
