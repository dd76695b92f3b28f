//! Cosines and sines of rotary position embeddings.

use super::{
    Accuracy, Flops, InferError, OpDef,
    heads::{expect, operands},
};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, Ty, f32c, math},
    lower::Lower,
};

/// How rotary frequencies are stretched to longer contexts by a factor `s`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// The base becomes `theta * s^(dim / (dim - 2))`.
    Ntk(f32),
    /// Frequencies are divided by `s`.
    Linear(f32),
    /// Frequencies are divided by `s^(dim / (dim - 2))`.
    SeedLegacy(f32),
}

/// `cos` and `sin` of `pos * theta^(-2i / dim)` for `i < dim / 2`.
///
/// `pos i32 [R,T] -> (cos, sin [R,T,dim/2])`. Frequencies and angles are rounded to `f32`. Source: component semantics 7.3.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// Columns that are rotated, even.
    pub dim: usize,
    /// The base, above 1.
    pub theta: f32,
    /// Stretching.
    pub scaling: RopeScaling,
}

/// Tokens of one grid instance.
const TOKENS: usize = 16;

impl RopeTable {
    /// The frequency of every pair of columns: each operation is rounded to `f32`, powers are taken in `f64` first.
    fn frequencies(&self) -> Vec<f32> {
        let dim = self.dim as f64;
        let stretch = |s: f32| f64::from(s).powf(dim / (dim - 2.0));
        let theta = match self.scaling {
            RopeScaling::Ntk(s) => (f64::from(self.theta) * stretch(s)) as f32,
            _ => self.theta,
        };
        let frequency = |i: usize| {
            let exponent = -(2.0 * i as f32) / self.dim as f32;
            let f = f64::from(theta).powf(exponent.into()) as f32;
            match self.scaling {
                RopeScaling::None | RopeScaling::Ntk(_) => f,
                RopeScaling::Linear(s) => f / s,
                RopeScaling::SeedLegacy(s) => f / stretch(s) as f32,
            }
        };
        (0..self.dim / 2).map(frequency).collect()
    }
}

impl OpDef for RopeTable {
    const NAME: &'static str = "rope_table";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        operands(Self::NAME, ins, 1)?;
        let fail = |why: String| Err(InferError::new(Self::NAME, why));
        let [r, t] = ins[0].dims[..] else { return fail(format!("pos is {}, expected i32[rows, tokens]", ins[0])) };
        expect(Self::NAME, "pos", &ins[0], &Type::i32(&[r, t]))?;
        let (min, s) = match self.scaling {
            RopeScaling::None => (2, 1.0),
            RopeScaling::Linear(s) => (2, s),
            RopeScaling::Ntk(s) | RopeScaling::SeedLegacy(s) => (4, s),
        };
        if self.dim < min || !self.dim.is_multiple_of(2) {
            return fail(format!("dimension is {}, expected an even number from {min}", self.dim));
        }
        let positive = |x: f32| x > 0.0 && x.is_finite();
        if !positive(self.theta) || !positive(s) {
            return fail(format!("base is {} and factor {s}, expected positive numbers", self.theta));
        }
        Ok(vec![Type::f32(&[r, t, self.dim / 2]); 2])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let table = self.frequencies();
        let angle = |p: i64| table.iter().map(move |f| p as f32 * f);
        let angles: Vec<f32> = ins[0].to_i64().into_iter().flat_map(angle).collect();
        let dims = [ins[0].ty.dims[0], ins[0].ty.dims[1], self.dim / 2];
        let of = |f: fn(f64) -> f64| Tensor::f32(&dims, angles.iter().map(|&a| f(a.into()) as f32).collect());
        vec![of(f64::cos), of(f64::sin)]
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        Flops::float(21 * outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (tokens, half) = (cx.ty(0).numel(), self.dim / 2);
        let pos = cx.buf(0);
        let block = cx.grid(tokens.div_ceil(TOKENS));
        let table = cx.scratch("frequencies", DType::F32, half);
        for (i, f) in self.frequencies().into_iter().enumerate() {
            cx.store(table, i, f32c(f));
        }
        let lo = cx.bind(block * TOKENS);
        let hi = cx.bind((&lo + TOKENS).min(Expr::from(tokens)));
        cx.each(lo, hi, |cx, t| {
            let p = cx.bind(Expr::load(pos, &t).cast(Ty::F32));
            cx.lanes(0, half, 1, |cx, i| {
                let (cos, sin) = math::cos_sin(cx, &p * Expr::load(table, &i));
                let at = cx.bind(&t * half + i);
                cx.put(0, &at, cos);
                cx.put(1, at, sin);
            });
        });
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 0.0, atol: 3e-7 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        use RopeScaling::*;
        let of = |dim, scaling, dims: [usize; 2]| (RopeTable { dim, theta: 10000.0, scaling }, vec![Type::i32(&dims)]);
        vec![
            of(24, None, [2, 9]),
            of(6, Ntk(4.0), [1, 33]),
            of(8, Linear(2.0), [3, 1]),
            of(32, SeedLegacy(4.0), [1, 1]),
            of(2, None, [1, 3]),
        ]
    }

    fn sample_input(&self, _: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        Tensor::i32(&ty.dims, (0..ty.numel()).map(|i| (random().abs() * 10f32.powi((i % 6) as i32)) as i32).collect())
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let of = |dim, theta, scaling| (RopeTable { dim, theta, scaling }, vec![Type::i32(&[2, 3])]);
        vec![
            of(3, 1e4, RopeScaling::None),
            of(0, 1e4, RopeScaling::None),
            of(2, 1e4, RopeScaling::Ntk(2.0)),
            of(4, 0.0, RopeScaling::None),
            of(4, 1e4, RopeScaling::Linear(f32::NAN)),
            (RopeTable { dim: 4, theta: 1e4, scaling: RopeScaling::None }, vec![Type::f32(&[2, 3])]),
        ]
    }
}
