//! Scales of ternary weights.

use super::{Axis, Flops, InferError, OpDef, check};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, Ty, f32c, f64c, int},
    lower::Lower,
};

/// How many weights share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleMode {
    /// So many consecutive columns of a row; the last group of a row may be shorter.
    PerGroup(usize),
    /// A row.
    PerRow,
    /// The whole matrix; the value is repeated for every row.
    PerTensor,
}

/// `W [m, n]` or `[G, m, n]` → `alpha [G?, m, nb]`: `max(mean |W|, 1e-5)` over each group, summed in `f64` in ascending order and
/// rounded once. `nb` is `ceil(n / group)`, or 1. Semantics section 3.1.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupScale {
    /// The groups.
    pub mode: ScaleMode,
}

/// Rows of one instance: their sums are chains that run side by side.
const ROWS: usize = 4;

impl GroupScale {
    /// Columns of a group in a row of `n`.
    fn width(&self, n: usize) -> usize {
        match self.mode {
            ScaleMode::PerGroup(g) => g.min(n),
            ScaleMode::PerRow | ScaleMode::PerTensor => n,
        }
    }

    /// The sums over columns `lo .. lo + len` of the rows `at`, continued from `start`.
    fn sums(cx: &mut Lower<'_>, at: &[Expr], lo: &Expr, len: usize, start: Option<Expr>) -> Vec<Expr> {
        let accs: Vec<_> = at.iter().map(|_| cx.b.local(start.clone().unwrap_or(f64c(0.0)))).collect();
        cx.each(0, len, |cx, j| {
            let col = cx.b.bind(lo + j);
            for (row, &acc) in at.iter().zip(&accs) {
                let w = cx.load(0, row, &col);
                cx.b.set(acc, Expr::from(acc) + w.abs().cast(Ty::F64));
            }
        });
        accs.into_iter().map(Expr::from).collect()
    }

    fn scale(sum: Expr, count: usize) -> Expr {
        (sum / f64c(count as f64)).cast(Ty::F32).max(f32c(1e-5))
    }
}

impl OpDef for GroupScale {
    const NAME: &'static str = "group_scale";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 1..=1)?;
        check::is(Self::NAME, "the weight", &ins[0], DType::F32, 2..=3)?;
        if self.mode == ScaleMode::PerGroup(0) {
            return Err(InferError::new(Self::NAME, "a group has at least one column"));
        }
        let mut out = ins[0].clone();
        let n = out.cols();
        *out.dims.last_mut().expect("two dimensions") = n.div_ceil(self.width(n));
        Ok(vec![out])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let w = ins[0];
        let (n, m) = (w.ty.cols(), w.ty.dims[w.ty.dims.len() - 2]);
        let mean = |w: &[f32]| {
            let sum = w.iter().fold(0.0, |sum, x| sum + f64::from(x.abs()));
            ((sum / w.len() as f64) as f32).max(1e-5)
        };
        let alpha: Vec<f32> = match self.mode {
            ScaleMode::PerTensor => w.as_f32().chunks(m * n).flat_map(|w| vec![mean(w); m]).collect(),
            _ => w.as_f32().chunks(n).flat_map(|row| row.chunks(self.width(n)).map(mean)).collect(),
        };
        let ty = self.infer(std::slice::from_ref(&w.ty)).expect("accepted before").remove(0);
        vec![Tensor::f32(&ty.dims, alpha)]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(2 * ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let w = cx.ty(0).clone();
        let (m, n, rows) = (w.dims[w.dims.len() - 2], w.cols(), w.rows());
        if self.mode == ScaleMode::PerTensor {
            let g = cx.b.grid(rows / m);
            let first = cx.b.bind(&g * m);
            let total = cx.b.local(f64c(0.0));
            cx.each(0, m, |cx, i| {
                let row = cx.b.bind(&first + i);
                let sum = GroupScale::sums(cx, &[row], &int(0), n, Some(total.into())).remove(0);
                cx.b.set(total, sum);
            });
            let alpha = cx.b.bind(GroupScale::scale(total.into(), m * n));
            cx.each(0, m, |cx, i| cx.put(0, &first + i, &alpha));
            return;
        }
        let first = cx.b.grid(rows.div_ceil(ROWS)) * ROWS;
        let first = cx.b.bind(first);
        // Beyond the last row the sums are those of the last row and are not stored.
        let at: Vec<Expr> = (0..ROWS.min(rows)).map(|r| cx.b.bind((&first + r).min(int(rows - 1)))).collect();
        let (width, nb) = (self.width(n), n.div_ceil(self.width(n)));
        let full = n / width;
        let group = |cx: &mut Lower<'_>, b: &Expr, len: usize| {
            let lo = cx.b.bind(b * width);
            let sums = GroupScale::sums(cx, &at, &lo, len, None);
            for (r, sum) in sums.into_iter().enumerate() {
                let row = cx.b.bind(&first + r);
                let inside = row.clone().lt(int(rows));
                cx.when(inside, |cx| cx.put(0, row * nb + b, GroupScale::scale(sum, len)));
            }
        };
        cx.each(0, full, |cx, b| group(cx, &b, width));
        if n > full * width {
            group(cx, &int(full), n - full * width);
        }
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Weight { rank: 2 }]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |mode| GroupScale { mode };
        vec![
            (of(ScaleMode::PerGroup(128)), vec![Type::f32(&[7, 300])]),
            (of(ScaleMode::PerGroup(64)), vec![Type::f32(&[2, 3, 128])]),
            (of(ScaleMode::PerGroup(128)), vec![Type::f32(&[3, 5])]),
            (of(ScaleMode::PerRow), vec![Type::f32(&[9, 70])]),
            (of(ScaleMode::PerTensor), vec![Type::f32(&[2, 5, 33])]),
        ]
    }

    fn sample_input(&self, _: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        // The first row is zero: its scale is the least one.
        let n = ty.cols();
        Tensor::f32(&ty.dims, (0..ty.numel()).map(|i| if i < n { 0.0 } else { random() * 0.02 }).collect())
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (GroupScale { mode: ScaleMode::PerGroup(0) }, vec![Type::f32(&[2, 3])]),
            (GroupScale { mode: ScaleMode::PerRow }, vec![Type::f32(&[3])]),
            (GroupScale { mode: ScaleMode::PerRow }, vec![Type::i32(&[3, 3])]),
        ]
    }
}
