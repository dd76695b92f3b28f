//! A matrix whose weight groups are multiplied by a factor each.

use super::{
    Accuracy, Axis, Flops, InferError, OpDef,
    check::{count, is},
    pack_ternary::scale_width,
};
use crate::{DType, Tensor, Type, loops::Expr, lower::Lower};

/// `(W [m, n], f [m, nb] or [G, m, nb]) -> W f [m, n] or [G, m, n]`; a factor belongs to `group` consecutive columns, with one column
/// to the whole row.
#[derive(Clone, Debug, PartialEq)]
pub struct ScaleGroups {
    /// Columns that share a factor.
    pub group: usize,
}

impl OpDef for ScaleGroups {
    const NAME: &'static str = "scale_groups";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        count(Self::NAME, ins, 2..=2)?;
        let [w, f] = [&ins[0], &ins[1]];
        is(Self::NAME, "the weight", w, DType::F32, 2..=2)?;
        is(Self::NAME, "the factors", f, DType::F32, 2..=3)?;
        let columns = f.cols() == 1 || (self.group > 0 && f.cols() == w.cols().div_ceil(self.group));
        if f.dims[f.dims.len() - 2] != w.dims[0] || !columns {
            let why = format!("factors {f} do not fit groups of {} columns of {w}", self.group);
            return Err(InferError::new(Self::NAME, why));
        }
        let mut out = f.clone();
        *out.dims.last_mut().expect("two dimensions") = w.cols();
        Ok(vec![out])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (w, f) = (ins[0].as_f32(), ins[1].as_f32());
        let (n, nb) = (ins[0].ty.cols(), ins[1].ty.cols());
        let width = scale_width(self.group, n, nb);
        let mut dims = ins[1].ty.dims.clone();
        *dims.last_mut().expect("two dimensions") = n;
        let value = |i: usize| w[i % w.len()] * f[i / n * nb + i % n / width];
        vec![Tensor::f32(&dims, (0..ins[1].ty.rows() * n).map(value).collect())]
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        Flops::float(outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        cx.pointwise();
    }

    fn element(&self, cx: &mut Lower<'_>, row: &Expr, col: &Expr) -> Option<Expr> {
        let (m, n, nb) = (cx.ty(0).rows(), cx.ty(0).cols(), cx.ty(1).cols());
        let w = cx.load(0, &(row % m), col);
        let f = cx.load(1, row, &(col / scale_width(self.group, n, nb)));
        Some(w * f)
    }

    fn is_pointwise(&self) -> bool {
        true
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared, Axis::Weight { rank: 2 }]
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Bits
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |w: &[usize], f: &[usize]| (ScaleGroups { group: 128 }, vec![Type::f32(w), Type::f32(f)]);
        vec![of(&[7, 300], &[7, 3]), of(&[5, 128], &[2, 5, 1]), of(&[3, 200], &[4, 3, 2])]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let of = |w: &[usize], f: &[usize]| (ScaleGroups { group: 128 }, vec![Type::f32(w), Type::f32(f)]);
        vec![of(&[7, 300], &[7, 2]), of(&[7, 300], &[6, 3]), of(&[2, 7, 300], &[7, 3])]
    }
}
