//! Sums over groups of rows, and over columns: the reverse of a broadcast.
//!
//! A column is one chain of additions in ascending row order, so the grid never shows in the result.

use super::{Accuracy, Flops, InferError, OpDef, check};
use crate::{DType, Tensor, Type, loops::f32c, lower::Lower};

/// `x [.., C]` of `R` rows → `dims` of `R'` rows and `C` or 1 columns, `R'` dividing `R`:
/// `out[r', c] = sum of x[r, c]` over the rows `r` with `r / (R / R') = r'`, and over all columns when there is one.
#[derive(Clone, Debug, PartialEq)]
pub struct SumTo {
    /// Dimensions of the result.
    pub dims: Vec<usize>,
}

/// Columns of one instance.
const WIDTH: usize = 64;

impl OpDef for SumTo {
    const NAME: &'static str = "sum_to";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 1..=1)?;
        let out = Type::f32(&self.dims);
        let x = &ins[0];
        let empty = self.dims.is_empty() || out.numel() == 0;
        if empty || x.dtype != DType::F32 || x.numel() == 0 {
            return Err(InferError::new(Self::NAME, format!("wants f32, found {x} to {out}")));
        }
        if (out.cols() == x.cols() || out.cols() == 1) && x.rows().is_multiple_of(out.rows()) {
            return Ok(vec![out]);
        }
        Err(InferError::new(Self::NAME, format!("cannot sum {x} to {out}")))
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (x, out) = (ins[0], Type::f32(&self.dims));
        let (cols, ratio) = (x.ty.cols(), x.ty.rows() / out.rows());
        let mut sums = vec![0.0f64; out.numel()];
        for (i, v) in x.as_f32().iter().enumerate() {
            let col = if out.cols() == 1 { 0 } else { i % cols };
            sums[i / cols / ratio * out.cols() + col] += f64::from(*v);
        }
        vec![Tensor::f32(&self.dims, sums.into_iter().map(|x| x as f32).collect())]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (x, out) = (cx.ty(0).clone(), cx.out_ty(0).clone());
        let (cols, ratio) = (x.cols(), x.rows() / out.rows());
        if out.cols() < cols {
            let group = cx.grid(out.rows());
            let total = cx.local(f32c(0.0));
            let first = cx.bind(&group * ratio);
            cx.each(0, ratio, |cx, r| {
                let row = cx.bind(&first + r);
                let sum = cx.sum(0, cols, |cx, c| cx.load(0, &row, &c));
                cx.set(total, total + sum);
            });
            cx.put(0, group, total);
            return;
        }
        let blocks = cols.div_ceil(WIDTH);
        let at = cx.grid(out.rows() * blocks);
        let group = cx.bind(&at / blocks);
        let lo = cx.bind(at % blocks * WIDTH);
        let hi = cx.bind((&lo + WIDTH).min(crate::loops::int(cols)));
        let first = cx.bind(&group * ratio);
        cx.lanes(lo, hi, 4, |cx, c| {
            let sum = cx.local(f32c(0.0));
            cx.each(0, ratio, |cx, r| {
                let row = cx.bind(&first + r);
                let v = cx.load(0, &row, &c);
                cx.set(sum, sum + v);
            });
            cx.put(0, &group * cols + c, sum);
        });
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-5, atol: 1e-5 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |x: &[usize], out: &[usize]| (SumTo { dims: out.to_vec() }, vec![Type::f32(x)]);
        vec![
            of(&[3, 5, 70], &[70]),
            of(&[4, 3, 5], &[2, 5]),
            of(&[4, 7], &[1]),
            of(&[4, 7], &[4, 1]),
            of(&[6, 1], &[1]),
        ]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let of = |x: Type, out: &[usize]| (SumTo { dims: out.to_vec() }, vec![x]);
        vec![
            of(Type::f32(&[3, 5]), &[2, 5]),
            of(Type::f32(&[3, 5]), &[4]),
            of(Type::i32(&[3, 5]), &[5]),
            of(Type::f32(&[3, 5]), &[]),
        ]
    }
}
