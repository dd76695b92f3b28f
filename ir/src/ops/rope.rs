//! Rotary position embedding of heads.

use super::{
    Accuracy, Flops, InferError, OpDef, Unary, UnaryFn, VjpCx,
    heads::{expect, operands, split},
};
use crate::{Tensor, Type, Value, loops::Expr, lower::Lower};

/// Rotates the two halves of every head: `(x1 cos - x2 sin, x2 cos + x1 sin)`.
///
/// `(x [R,T,H*K], cos, sin [R,T,K/2]) -> [R,T,H*K]`, K even. Source: component semantics 7.3.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// H.
    pub heads: usize,
}

impl OpDef for Rope {
    const NAME: &'static str = "rope";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        operands(Self::NAME, ins, 3)?;
        let (r, t, k) = split(Self::NAME, "x", &ins[0], self.heads)?;
        if !k.is_multiple_of(2) {
            return Err(InferError::new(Self::NAME, format!("head size is {k}, expected an even number")));
        }
        expect(Self::NAME, "cos", &ins[1], &Type::f32(&[r, t, k / 2]))?;
        expect(Self::NAME, "sin", &ins[2], &ins[1])?;
        Ok(vec![ins[0].clone()])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (x, cos, sin) = (ins[0].as_f32(), ins[1].as_f32(), ins[2].as_f32());
        let half = ins[1].ty.cols();
        let rotated = |i: usize| {
            let at = i / (2 * half * self.heads) * half + i % half;
            let (c, s) = (cos[at], sin[at]);
            if (i / half).is_multiple_of(2) { x[i] * c - x[i + half] * s } else { x[i] * c + x[i - half] * s }
        };
        vec![Tensor::f32(&ins[0].ty.dims, (0..x.len()).map(rotated).collect())]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        // The transpose of a rotation is the rotation back. Tables come from positions, which are not differentiable.
        let g = cx.grad();
        let back = cx.op(Unary { f: UnaryFn::Neg }, &[cx.ins[2]])?;
        Ok(vec![Some(cx.op(self.clone(), &[g, cx.ins[1], back])?), None, None])
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        Flops::float(3 * outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, half) = (cx.ty(0).rows(), cx.ty(1).cols());
        let row = cx.grid(rows);
        let (cos, sin) = (cx.buf(1), cx.buf(2));
        let at = cx.bind(&row * half);
        cx.each(0, self.heads, |cx, h| {
            let first = cx.bind(h * (2 * half));
            let second: Expr = cx.bind(&first + half);
            cx.lanes(0, half, 2, |cx, j| {
                let (c, s) = (cx.bind(Expr::load(cos, &at + &j)), cx.bind(Expr::load(sin, &at + &j)));
                let (a, b) = (&first + &j, &second + j);
                let (x, y) = (cx.load(0, &row, &a), cx.load(0, &row, &b));
                let (x, y) = (cx.bind(x), cx.bind(y));
                cx.push(&row, &a, &[(0, &x * &c - &y * &s)]);
                cx.push(&row, &b, &[(0, y * c + x * s)]);
            });
        });
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn pushes(&self) -> std::ops::Range<usize> {
        0..1
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Bits
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |heads, (r, t, k): (usize, usize, usize)| {
            let table = Type::f32(&[r, t, k / 2]);
            (Rope { heads }, vec![Type::f32(&[r, t, heads * k]), table.clone(), table])
        };
        vec![of(2, (2, 3, 24)), of(1, (1, 5, 2)), of(3, (2, 1, 10))]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let table = Type::f32(&[2, 3, 2]);
        vec![
            (Rope { heads: 2 }, vec![Type::f32(&[2, 3, 6]), table.clone(), table.clone()]),
            (Rope { heads: 2 }, vec![Type::f32(&[2, 3, 12]), table.clone(), table.clone()]),
            (Rope { heads: 2 }, vec![Type::f32(&[2, 3, 8]), table.clone(), Type::f32(&[2, 3, 1])]),
            (Rope { heads: 2 }, vec![Type::f32(&[2, 3, 8]), table]),
        ]
    }
}
