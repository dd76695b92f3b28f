//! A norm over whole rows followed by quantisation, in one pass over the row.

use super::{
    Accuracy, Axis, Flops, InferError, Norm, NormKind, OpDef, Quantise, check,
    norm::{GainShape, Moments},
    quantise::Codes,
};
use crate::{DType, Tensor, Type, loops::Expr, lower::Lower};

/// `(x [.., n], gain?)` → `(y [.., n], codes i8 [.., np], scales [.., nc])`: [`Norm`] over whole rows, then [`Quantise`], bit for
/// bit. The float result is computed but not stored when nobody wants it.
#[derive(Clone, Debug, PartialEq)]
pub struct NormQuantise {
    /// The kind of the norm.
    pub kind: NormKind,
    /// Added under the root of the norm.
    pub eps: f32,
    /// Columns of a block of the quantisation, see [`Quantise::block`].
    pub block: usize,
}

impl NormQuantise {
    /// The two operations for rows of `cols` columns.
    pub fn parts(&self, cols: usize) -> (Norm, Quantise) {
        (Norm { kind: self.kind, width: cols, eps: self.eps }, Quantise { block: self.block })
    }
}

impl OpDef for NormQuantise {
    const NAME: &'static str = "norm_quantise";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 1..=2)?;
        let [codes, scales] = Quantise::results(Self::NAME, self.block, &ins[0])?;
        if let Some(gain) = ins.get(1) {
            GainShape::check(Self::NAME, gain, &ins[0], ins[0].cols())?;
        }
        Ok(vec![ins[0].clone(), codes, scales])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (norm, quantise) = self.parts(ins[0].ty.cols());
        let y = norm.eval(ins).remove(0);
        let codes = quantise.eval(&[&y]);
        std::iter::once(y).chain(codes).collect()
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(8 * ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, n) = (cx.ty(0).rows(), cx.ty(0).cols());
        let (norm, quantise) = self.parts(n);
        let gain = (cx.n_ins() == 2).then(|| (cx.buf(1), GainShape::of(cx.ty(1))));
        let row = cx.b.grid(rows);
        let x = Norm::stage(cx, &row);
        let y = cx.b.scratch("y", DType::F32, n);
        let moments = Moments::of(cx, &norm, x, &Expr::from(0));
        let float = cx.out(0);
        cx.lanes(0, n, 2, |cx, j| {
            let mut e = moments.apply(Expr::load(x, &j));
            if let Some((gain, shape)) = gain {
                e = e * Expr::load(gain, shape.index(&row, rows, n, &Expr::from(0), &j));
            }
            let e = cx.b.bind(e);
            if let Some(float) = float {
                cx.b.store(float, &row * n + &j, &e);
            }
            cx.b.store(y, j, e);
        });
        let to = Codes { codes: cx.out(1), scales: cx.out(2) };
        quantise.row(cx, &row, n, to, &|_, col| Expr::load(y, col));
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        [Axis::Rows, Axis::Weight { rank: 1 }][..ins.len()].to_vec()
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Rounding { rtol: 1e-5, atol: 1e-5 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |block| NormQuantise { kind: NormKind::Rms, eps: 1e-6, block };
        let layer = NormQuantise { kind: NormKind::Layer, eps: 1e-5, block: 64 };
        vec![
            (of(64), vec![Type::f32(&[2, 3, 130])]),
            (of(64), vec![Type::f32(&[4, 3, 64]), Type::f32(&[2, 64])]),
            (of(0), vec![Type::f32(&[5, 37]), Type::f32(&[37])]),
            (layer, vec![Type::f32(&[3, 100])]),
        ]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let of = |block| NormQuantise { kind: NormKind::Rms, eps: 1e-6, block };
        vec![
            (of(32), vec![Type::f32(&[2, 64])]),
            (of(64), vec![Type::f32(&[2, 64]), Type::f32(&[32])]),
            (of(64), vec![Type::i32(&[2, 64])]),
        ]
    }
}
