//! Elementwise functions of two operands, the second one broadcast.

use super::{Accuracy, Axis, Flops, InferError, OpDef, SumTo, Unary, UnaryFn, VjpCx};
use crate::{DType, Tensor, Type, Value, loops::Expr, lower::Lower};

/// Which function.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BinaryFn {
    /// Sum.
    Add,
    /// Difference.
    Sub,
    /// Product.
    Mul,
    /// Quotient.
    Div,
}

/// `out[r, c] = f(a[r, c], b[r / (rows(a) / rows(b)), c or 0])`, `f32`.
///
/// `b` has the columns of `a` or one, and a number of rows that divides that of `a`: the same shape, one vector for all rows, a
/// column, a scalar, or one vector for each group of consecutive rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Binary {
    /// The function.
    pub f: BinaryFn,
}

impl Binary {
    fn apply(&self, a: f32, b: f32) -> f32 {
        match self.f {
            BinaryFn::Add => a + b,
            BinaryFn::Sub => a - b,
            BinaryFn::Mul => a * b,
            BinaryFn::Div => a / b,
        }
    }
}

impl OpDef for Binary {
    const NAME: &'static str = "binary";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        let [a, b] = ins else { return Err(InferError::new(Self::NAME, "takes two operands")) };
        let fits = (b.cols() == a.cols() || b.cols() == 1) && a.rows().is_multiple_of(b.rows());
        if fits && a.dtype == DType::F32 && b.dtype == DType::F32 {
            return Ok(vec![a.clone()]);
        }
        Err(InferError::new(Self::NAME, format!("cannot broadcast {b} to {a}")))
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let [a, b] = [ins[0], ins[1]];
        let (rows, cols) = (a.ty.rows(), a.ty.cols());
        let ratio = rows / b.ty.rows();
        let at = |r: usize, c: usize| b.as_f32()[r / ratio * b.ty.cols() + if b.ty.cols() == 1 { 0 } else { c }];
        let out = (0..rows * cols).map(|i| self.apply(a.as_f32()[i], at(i / cols, i % cols))).collect();
        vec![Tensor::f32(&a.ty.dims, out)]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let ([a, b], g) = ([cx.ins[0], cx.ins[1]], cx.grad());
        let op = |f| Binary { f };
        let neg = |cx: &mut VjpCx<'_>, v| cx.op(Unary { f: UnaryFn::Neg }, &[v]);
        // What a broadcast operand met is summed.
        let dims = cx.graph.ty(b).dims.clone();
        let same = cx.graph.ty(a) == cx.graph.ty(b);
        let sum = |cx: &mut VjpCx<'_>, v| if same { Ok(v) } else { cx.op(SumTo { dims: dims.clone() }, &[v]) };
        let (wants_a, wants_b) = (cx.wants(0), cx.wants(1));
        let (mut da, mut db) = (None, None);
        match self.f {
            BinaryFn::Add | BinaryFn::Sub => {
                da = Some(g);
                if wants_b {
                    let total = sum(cx, g)?;
                    db = Some(if self.f == BinaryFn::Sub { neg(cx, total)? } else { total });
                }
            }
            BinaryFn::Mul => {
                if wants_a {
                    da = Some(cx.op(op(BinaryFn::Mul), &[g, b])?);
                }
                if wants_b {
                    let each = cx.op(op(BinaryFn::Mul), &[g, a])?;
                    db = Some(sum(cx, each)?);
                }
            }
            BinaryFn::Div => {
                let each = cx.op(op(BinaryFn::Div), &[g, b])?;
                da = Some(each);
                if wants_b {
                    let slope = cx.op(op(BinaryFn::Mul), &[each, cx.outs[0]])?;
                    let total = sum(cx, slope)?;
                    db = Some(neg(cx, total)?);
                }
            }
        }
        Ok(vec![da, db])
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        Flops::float(outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        cx.pointwise();
    }

    fn element(&self, cx: &mut Lower<'_>, row: &Expr, col: &Expr) -> Option<Expr> {
        let (rows, b) = (cx.ty(0).rows(), cx.ty(1).clone());
        let x = cx.load(0, row, col);
        let group = if b.rows() == 1 { Expr::from(0) } else { row / (rows / b.rows()) };
        let y = cx.load(1, &group, &if b.cols() == 1 { Expr::from(0) } else { col.clone() });
        Some(match self.f {
            BinaryFn::Add => x + y,
            BinaryFn::Sub => x - y,
            BinaryFn::Mul => x * y,
            BinaryFn::Div => x / y,
        })
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

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        // An operand with the leading dimension of the first one counts batch rows; anything smaller is a weight.
        let rows = ins[1].dims.len() == ins[0].dims.len() && ins[1].dims[0] == ins[0].dims[0];
        vec![Axis::Rows, if rows { Axis::Rows } else { Axis::Weight { rank: 1 } }]
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Bits
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        use BinaryFn::*;
        let shapes = [
            (vec![4], vec![4]),
            (vec![2, 3, 5], vec![5]),
            (vec![4, 3, 5], vec![2, 5]),
            (vec![2, 3, 8], vec![1]),
            (vec![2, 3, 9], vec![2, 3, 1]),
        ];
        let pair = |(a, b): (Vec<usize>, Vec<usize>)| vec![Type::f32(&a), Type::f32(&b)];
        let each = |f| shapes.clone().map(|s| (Binary { f }, pair(s)));
        [Add, Sub, Mul, Div].into_iter().flat_map(each).collect()
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let add = Binary { f: BinaryFn::Add };
        vec![
            (add.clone(), vec![Type::f32(&[2]), Type::f32(&[3])]),
            (add.clone(), vec![Type::f32(&[3, 4]), Type::f32(&[2, 4])]),
            (add, vec![]),
        ]
    }
}
