//! Several tensors as one with a new leading dimension.

use super::{Axis, Flops, InferError, OpDef, Unstack, VjpCx};
use crate::{Data, Tensor, Type, Value, loops::Expr, lower::Lower};

/// `out[i, ...] = operand_i[...]`; all operands have one type of at least one dimension.
#[derive(Clone, Debug, PartialEq)]
pub struct Stack {
    /// The number of operands.
    pub n: usize,
}

impl OpDef for Stack {
    const NAME: &'static str = "stack";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        if ins.len() != self.n || ins.is_empty() {
            return Err(InferError::new(Self::NAME, format!("takes {} operands, found {}", self.n, ins.len())));
        }
        if let Some(other) = ins.iter().find(|t| **t != ins[0]) {
            return Err(InferError::new(Self::NAME, format!("cannot stack {other} on {}", ins[0])));
        }
        let dims: Vec<usize> = std::iter::once(self.n).chain(ins[0].dims.iter().copied()).collect();
        Ok(vec![Type::new(ins[0].dtype, &dims)])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        macro_rules! join {
            ($($Variant:ident),*) => {
                match &ins[0].data {
                    $(Data::$Variant(_) => Data::$Variant(
                        ins.iter().flat_map(|t| match &t.data { Data::$Variant(v) => v.clone(), _ => vec![] }).collect(),
                    )),*
                }
            };
        }
        let types: Vec<Type> = ins.iter().map(|t| t.ty.clone()).collect();
        let ty = self.infer(&types).expect("operands were accepted").remove(0);
        vec![Tensor { ty, data: join!(F32, F64, BF16, I8, U8, I16, I32) }]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let parts = cx.graph.ops(Unstack { n: self.n }, &[cx.grad()])?;
        Ok(parts.into_iter().map(Some).collect())
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let part = cx.ty(0).clone();
        let row = cx.b.grid(part.rows());
        let cols = part.cols();
        for i in 0..self.n {
            let from = cx.buf(i);
            cx.lanes(0, cols, 2, |cx, col| {
                let at = &row * cols + &col;
                cx.put(0, Expr::from(i * part.numel()) + &at, Expr::load(from, at));
            });
        }
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        vec![Axis::Weight { rank: ins[0].dims.len() }; ins.len()]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![
            (Stack { n: 3 }, vec![Type::f32(&[5, 7]); 3]),
            (Stack { n: 2 }, vec![Type::new(crate::DType::U8, &[2, 3, 32]); 2]),
            (Stack { n: 1 }, vec![Type::i32(&[4])]),
        ]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![(Stack { n: 2 }, vec![Type::f32(&[2]), Type::f32(&[3])]), (Stack { n: 2 }, vec![Type::f32(&[2])])]
    }
}
