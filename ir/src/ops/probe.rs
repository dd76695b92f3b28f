//! A tensor shifted along directions, once forward and once back, or forward only and once not at all.
//!
//! Both signs of one direction use the same numbers; the probe never touches the stored tensor.

use super::{Axis, Flops, InferError, OpDef, VjpCx};
use crate::{DType, Tensor, Type, Value, loops::Expr, lower::Lower};

/// `(w [s...], z [M, s...], eps [1]) -> [2 M, s...]`: group `p < M` is `w + eps z[p]`, group `p >= M` is `w - eps z[p - M]`; the product and
/// the sum round once each. One-sided `[M + 1, s...]`, the last group being `w` itself. A fourth operand `mask [s...]` multiplies `z`.
/// Sections 13.1, 13.2 and 13.4 of the semantics.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// Whether directions are tried forward only.
    pub one_sided: bool,
}

impl Probe {
    fn groups(&self, directions: usize) -> usize {
        if self.one_sided { directions + 1 } else { 2 * directions }
    }
}

impl OpDef for Probe {
    const NAME: &'static str = "probe";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [w, z, eps, mask @ ..]
                if mask.len() <= 1
                    && mask.iter().all(|m| m == w)
                    && w.dtype == DType::F32
                    && !w.dims.is_empty()
                    && z.dtype == DType::F32
                    && z.dims.get(1..) == Some(&w.dims)
                    && *eps == Type::f32(&[1]) =>
            {
                Ok(vec![Type::f32(&[&[self.groups(z.dims[0])], &w.dims[..]].concat())])
            }
            _ => Err(InferError::new(
                Self::NAME,
                "takes w [s...], z [M, s...], eps [1] and perhaps a mask [s...], all f32",
            )),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (w, z, eps) = (ins[0].as_f32(), ins[1].as_f32(), ins[2].as_f32()[0]);
        let mask = |i: usize| ins.get(3).map_or(1.0, |m| m.as_f32()[i % w.len()]);
        let shifted = |eps: f32| z.iter().enumerate().map(move |(i, z)| w[i % w.len()] + eps * (z * mask(i)));
        let dims = [&[self.groups(ins[1].ty.dims[0])], &ins[0].ty.dims[..]].concat();
        let second: Vec<f32> = if self.one_sided { w.to_vec() } else { shifted(-eps).collect() };
        vec![Tensor::f32(&dims, shifted(eps).chain(second).collect())]
    }

    fn vjp(&self, _: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        Err(InferError::new(Self::NAME, "a probe replaces the gradient and has none"))
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        Flops::float(2 * outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        cx.pointwise();
    }

    fn element(&self, cx: &mut Lower<'_>, row: &Expr, col: &Expr) -> Option<Expr> {
        let (w_rows, z_rows) = (cx.ty(0).rows(), cx.ty(1).rows());
        let w = cx.load(0, &(row % w_rows), col);
        let z = cx.load(1, &(row % z_rows), col);
        let z = if cx.n_ins() == 4 { z * cx.load(3, &(row % w_rows), col) } else { z };
        let eps = cx.load(2, &Expr::from(0), &Expr::from(0));
        let forward = row.clone().lt(Expr::from(z_rows));
        if self.one_sided {
            let w = cx.bind(w);
            return Some(forward.select(&w + eps * z, w));
        }
        Some(w + forward.select(eps.clone(), -eps) * z)
    }

    fn is_pointwise(&self) -> bool {
        true
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared; ins.len()]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |one_sided, m: usize, s: &[usize]| {
            (Probe { one_sided }, vec![Type::f32(s), Type::f32(&[&[m], s].concat()), Type::f32(&[1])])
        };
        let mut masked = of(false, 2, &[3, 5]);
        masked.1.push(Type::f32(&[3, 5]));
        vec![
            of(false, 1, &[7]),
            of(false, 3, &[2, 9]),
            of(false, 2, &[3, 1, 4]),
            of(true, 1, &[9]),
            of(true, 3, &[2, 9]),
            masked,
        ]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let both = Probe { one_sided: false };
        let f = |d: &[usize]| Type::f32(d);
        vec![
            (both.clone(), vec![f(&[7]), f(&[7]), f(&[1])]),
            (both.clone(), vec![f(&[7]), f(&[2, 8]), f(&[1])]),
            (both.clone(), vec![f(&[7]), f(&[2, 7]), f(&[2])]),
            (both.clone(), vec![f(&[7]), f(&[2, 7])]),
            (both, vec![f(&[7]), f(&[2, 7]), f(&[1]), f(&[6])]),
        ]
    }
}
