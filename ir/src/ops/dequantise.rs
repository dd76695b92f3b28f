//! What activation codes stand for.

use super::{Flops, InferError, OpDef, check, quantise::CODE_PAD};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, Ty},
    lower::Lower,
};

/// `(codes i8 [.., np], scales [.., ceil(n / block)])` → `[.., n]`: code times scale, as by [`super::Quantise`].
#[derive(Clone, Debug, PartialEq)]
pub struct Dequantise {
    /// Columns of a block; 0 for the whole row.
    pub block: usize,
    /// Columns without padding.
    pub n: usize,
}

impl Dequantise {
    fn width(&self) -> usize {
        if self.block == 0 { self.n } else { self.block }
    }
}

impl OpDef for Dequantise {
    const NAME: &'static str = "dequantise";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 2..=2)?;
        let [codes, scales] = [&ins[0], &ins[1]];
        check::is(Self::NAME, "codes", codes, DType::I8, 1..=4)?;
        check::is(Self::NAME, "scales", scales, DType::F32, 1..=4)?;
        let fits = self.n > 0
            && codes.cols() == self.n.next_multiple_of(CODE_PAD)
            && scales.cols() == self.n.div_ceil(self.width())
            && scales.rows() == codes.rows();
        if !fits {
            return Err(InferError::new(Self::NAME, format!("{} columns do not fit {codes} and {scales}", self.n)));
        }
        let mut out = codes.with(DType::F32);
        *out.dims.last_mut().expect("codes have a dimension") = self.n;
        Ok(vec![out])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let types: Vec<Type> = ins.iter().map(|t| t.ty.clone()).collect();
        let ty = self.infer(&types).expect("accepted before").remove(0);
        let (codes, np, nc) = (ins[0].to_i64(), ins[0].ty.cols(), ins[1].ty.cols());
        let at = |i: usize| {
            let (row, col) = (i / self.n, i % self.n);
            codes[row * np + col] as f32 * ins[1].as_f32()[row * nc + col / self.width()]
        };
        let data = (0..ty.numel()).map(at).collect();
        vec![Tensor::f32(&ty.dims, data)]
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        Flops::float(outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, np, nc) = (cx.ty(0).rows(), cx.ty(0).cols(), cx.ty(1).cols());
        let (codes, scales) = (cx.buf(0), cx.buf(1));
        let row = cx.b.grid(rows);
        for c in 0..nc {
            let lo = c * self.width();
            let scale = cx.b.bind(Expr::load(scales, &row * nc + c));
            let from = cx.b.bind(&row * np + lo);
            cx.lanes(0, self.width().min(self.n - lo), 2, |cx, j| {
                let x = Expr::load(codes, &from + &j).cast(Ty::F32) * &scale;
                cx.push(&row, &(j + lo), &[(0, x)]);
            });
        }
    }

    fn pushes(&self) -> std::ops::Range<usize> {
        0..1
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |block, n: usize, nc: usize, lead: &[usize]| {
            let codes = Type::new(DType::I8, &[lead, &[n.next_multiple_of(64)]].concat());
            (Dequantise { block, n }, vec![codes, Type::f32(&[lead, &[nc]].concat())])
        };
        vec![of(64, 200, 4, &[2, 3]), of(0, 72, 1, &[5]), of(128, 128, 1, &[2])]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let codes = Type::new(DType::I8, &[3, 128]);
        vec![
            (Dequantise { block: 64, n: 64 }, vec![codes.clone(), Type::f32(&[3, 2])]),
            (Dequantise { block: 64, n: 100 }, vec![codes.clone(), Type::f32(&[3, 1])]),
            (Dequantise { block: 64, n: 100 }, vec![codes, Type::f32(&[2, 2])]),
        ]
    }
}
