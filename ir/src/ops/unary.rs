//! Elementwise functions of one operand.

use super::{Accuracy, Binary, BinaryFn, Flops, InferError, OpDef, VjpCx};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Expr, f32c, math},
    lower::Lower,
};

/// Which function.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum UnaryFn {
    /// `-x`.
    Neg,
    /// `e^x`, exact exponent range clamped to [-87, 88].
    Exp,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `x / (1 + e^-x)`.
    Silu,
    /// `ln(1 + e^x)`.
    Softplus,
    /// Hyperbolic tangent.
    Tanh,
    /// `max(x, 0)`.
    Relu,
    /// Square root of `max(x, 0)`.
    Sqrt,
    /// `x mul + add`, two roundings.
    Affine {
        /// Factor.
        mul: f32,
        /// Offset.
        add: f32,
    },
}

/// `out[i] = f(x[i])`, `f32`, any shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Unary {
    /// The function.
    pub f: UnaryFn,
}

impl Unary {
    fn apply(&self, x: f32) -> f32 {
        match self.f {
            UnaryFn::Neg => -x,
            UnaryFn::Exp => x.clamp(-87.0, 88.0).exp(),
            UnaryFn::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            UnaryFn::Silu => x / (1.0 + (-x).exp()),
            UnaryFn::Softplus => x.max(0.0) + (-x.abs()).exp().ln_1p(),
            UnaryFn::Tanh => x.tanh(),
            UnaryFn::Relu if x > 0.0 => x,
            UnaryFn::Sqrt if x > 0.0 => x.sqrt(),
            UnaryFn::Relu | UnaryFn::Sqrt => 0.0,
            UnaryFn::Affine { mul, add } => x * mul + add,
        }
    }
}

impl OpDef for Unary {
    const NAME: &'static str = "unary";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [x] if x.dtype == DType::F32 => Ok(vec![x.clone()]),
            [x] => Err(InferError::new(Self::NAME, format!("wants f32, found {x}"))),
            _ => Err(InferError::new(Self::NAME, "takes one operand")),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        vec![Tensor::f32(&ins[0].ty.dims, ins[0].as_f32().iter().map(|&x| self.apply(x)).collect())]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let (x, y, g) = (cx.ins[0], cx.outs[0], cx.grad());
        let un = |f| Unary { f };
        let affine = |mul, add| Unary { f: UnaryFn::Affine { mul, add } };
        let mul = Binary { f: BinaryFn::Mul };
        let slope = match self.f {
            UnaryFn::Neg => return Ok(vec![Some(cx.op(un(UnaryFn::Neg), &[g])?)]),
            UnaryFn::Affine { mul, .. } => return Ok(vec![Some(cx.op(affine(mul, 0.0), &[g])?)]),
            UnaryFn::Exp => y,
            UnaryFn::Relu | UnaryFn::Sqrt => return Err(InferError::new(Self::NAME, "not differentiable yet")),
            UnaryFn::Sigmoid => {
                let rest = cx.op(affine(-1.0, 1.0), &[y])?;
                cx.op(mul.clone(), &[y, rest])?
            }
            UnaryFn::Softplus => cx.op(un(UnaryFn::Sigmoid), &[x])?,
            UnaryFn::Tanh => {
                let square = cx.op(mul.clone(), &[y, y])?;
                cx.op(affine(-1.0, 1.0), &[square])?
            }
            UnaryFn::Silu => {
                // s (1 + x (1 - s)).
                let s = cx.op(un(UnaryFn::Sigmoid), &[x])?;
                let rest = cx.op(affine(-1.0, 1.0), &[s])?;
                let inner = cx.op(mul.clone(), &[x, rest])?;
                let inner = cx.op(affine(1.0, 1.0), &[inner])?;
                cx.op(mul.clone(), &[s, inner])?
            }
        };
        Ok(vec![Some(cx.op(mul, &[g, slope])?)])
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        let each = if matches!(self.f, UnaryFn::Neg | UnaryFn::Relu | UnaryFn::Affine { .. }) { 2 } else { 10 };
        Flops::float(each * outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        cx.pointwise();
    }

    fn element(&self, cx: &mut Lower<'_>, row: &Expr, col: &Expr) -> Option<Expr> {
        let x = cx.load(0, row, col);
        let b = &mut cx.b;
        Some(match self.f {
            UnaryFn::Neg => -x,
            UnaryFn::Exp => math::exp(b, x),
            UnaryFn::Sigmoid => math::sigmoid(b, x),
            UnaryFn::Silu => math::silu(b, x),
            UnaryFn::Softplus => math::softplus(b, x),
            UnaryFn::Tanh => math::tanh(b, x),
            UnaryFn::Relu => x.max(f32c(0.0)),
            UnaryFn::Sqrt => x.max(f32c(0.0)).sqrt(),
            UnaryFn::Affine { mul, add } => x * f32c(mul) + f32c(add),
        })
    }

    fn is_pointwise(&self) -> bool {
        true
    }

    fn aligned(&self) -> &'static [usize] {
        &[0]
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn accuracy(&self) -> Accuracy {
        match self.f {
            UnaryFn::Neg | UnaryFn::Relu | UnaryFn::Sqrt | UnaryFn::Affine { .. } => Accuracy::Bits,
            _ => Accuracy::Close { rtol: 1e-6, atol: 5e-7 },
        }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        use UnaryFn::*;
        let all = [Neg, Exp, Sigmoid, Silu, Softplus, Tanh, Relu, Sqrt, Affine { mul: -2.5, add: 0.25 }];
        let shape = |i: usize| [&[7][..], &[3, 5], &[2, 3, 16]][i % 3].to_vec();
        all.into_iter().enumerate().map(|(i, f)| (Unary { f }, vec![Type::f32(&shape(i))])).collect()
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![(Unary { f: UnaryFn::Neg }, vec![]), (Unary { f: UnaryFn::Exp }, vec![Type::i32(&[2])])]
    }
}
