//! Rounding to a grid, up or down by chance, so that the mean is what was rounded.

use super::{Axis, Flops, InferError, OpDef};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, f32c},
    lower::Lower,
};

/// `(x [s...], u [s...] uniform in (0, 1)) -> unit clamp(floor(x / unit + u), -limit, limit)`. Sections 13.2 (QuZO) and 13.5 of the
/// semantics. With a power of two as unit nothing but the floor rounds, as long as `x / unit` has bits left behind the point.
#[derive(Clone, Debug, PartialEq)]
pub struct StochasticRound {
    /// The distance of neighbours on the grid.
    pub unit: f32,
    /// The greatest magnitude in units.
    pub limit: f32,
}

impl OpDef for StochasticRound {
    const NAME: &'static str = "stochastic_round";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        let positive = |x: f32| x.is_finite() && x > 0.0;
        match ins {
            [x, u] if x.dtype == DType::F32 && x == u && positive(self.unit) && positive(self.limit) => {
                Ok(vec![x.clone()])
            }
            _ => {
                Err(InferError::new(Self::NAME, "takes x and u of one shape, f32, and wants a positive unit and limit"))
            }
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let round =
            |(x, u): (&f32, &f32)| (x * (1.0 / self.unit) + u).floor().clamp(-self.limit, self.limit) * self.unit;
        let values = ins[0].as_f32().iter().zip(ins[1].as_f32()).map(round).collect();
        vec![Tensor::f32(&ins[0].ty.dims, values)]
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        Flops::float(6 * outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        cx.pointwise();
    }

    fn element(&self, cx: &mut Lower<'_>, row: &Expr, col: &Expr) -> Option<Expr> {
        let x = cx.load(0, row, col);
        let u = cx.load(1, row, col);
        let x = cx.bind(x * f32c(1.0 / self.unit) + u);
        let near = cx.bind(x.clone().nearest());
        let floor = x.lt(near.clone()).select(&near - f32c(1.0), near);
        Some(floor.max(f32c(-self.limit)).min(f32c(self.limit)) * f32c(self.unit))
    }

    fn is_pointwise(&self) -> bool {
        true
    }

    fn aligned(&self) -> &'static [usize] {
        &[0, 1]
    }

    fn pulls(&self) -> &'static [usize] {
        &[0, 1]
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared; 2]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |dims: &[usize]| (StochasticRound { unit: 0.125, limit: 5.0 }, vec![Type::f32(dims); 2]);
        vec![of(&[7]), of(&[3, 50])]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        let draw = |_| if k == 0 { random() } else { 0.001 + 0.998 * random().abs() };
        Tensor::f32(&ty.dims, (0..ty.numel()).map(draw).collect())
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let of = |unit| StochasticRound { unit, limit: 5.0 };
        vec![
            (of(0.0), vec![Type::f32(&[3]); 2]),
            (of(1.0), vec![Type::f32(&[3]), Type::f32(&[4])]),
            (of(1.0), vec![Type::f32(&[3])]),
        ]
    }
}
