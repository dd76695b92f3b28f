//! Rows of a table by index.

use super::{Axis, EmbedGrad, Flops, InferError, OpDef, VjpCx, check};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Expr, Ty, i32c},
    lower::Lower,
};

/// `(tokens i32 [R, T], table [V, d] or [G, V, d])` → `[R, T, d]`: row `tokens[r, t]` of the table of the group of batch row `r`.
///
/// A token outside `0..V` reads the nearest row; the runtime refuses such tokens before they get here.
#[derive(Clone, Debug, PartialEq)]
pub struct Embed {}

impl OpDef for Embed {
    const NAME: &'static str = "embed";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 2..=2)?;
        let [tokens, table] = [&ins[0], &ins[1]];
        check::is(Self::NAME, "tokens", tokens, DType::I32, 2..=2)?;
        check::is(Self::NAME, "the table", table, DType::F32, 2..=3)?;
        check::groups(Self::NAME, "the table", table, 2, tokens)?;
        Ok(vec![Type::f32(&[tokens.dims[0], tokens.dims[1], table.cols()])])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (tokens, table) = (ins[0].to_i64(), ins[1]);
        let (d, n) = (table.ty.cols(), tokens.len());
        let groups = if table.ty.dims.len() == 3 { table.ty.dims[0] } else { 1 };
        let v = table.ty.rows() / groups;
        let row = |i: usize| i / (n / groups) * v + tokens[i].clamp(0, v as i64 - 1) as usize;
        let out = (0..n).flat_map(|i| &table.as_f32()[row(i) * d..][..d]).copied().collect();
        vec![Tensor::f32(&[ins[0].ty.dims[0], ins[0].ty.dims[1], d], out)]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let [vocab, _] = cx.graph.ty(cx.ins[1]).dims[..] else {
            return Err(InferError::new(Self::NAME, "not differentiable with groups of tables"));
        };
        let dy = cx.grad();
        Ok(vec![None, Some(cx.op(EmbedGrad { vocab }, &[cx.ins[0], dy])?)])
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        cx.pointwise();
    }

    fn element(&self, cx: &mut Lower<'_>, row: &Expr, col: &Expr) -> Option<Expr> {
        let (n, table) = (cx.ty(0).numel(), cx.ty(1).clone());
        let groups = if table.dims.len() == 3 { table.dims[0] } else { 1 };
        let v = table.rows() / groups;
        let token = Expr::load(cx.buf(0), row).max(i32c(0)).min(i32c(v as i32 - 1));
        let at = cx.b.bind(token.cast(Ty::I64) + row / (n / groups) * v);
        Some(cx.load(1, &at, col))
    }

    fn is_pointwise(&self) -> bool {
        true
    }

    fn pulls(&self) -> &'static [usize] {
        &[1]
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Rows, Axis::Weight { rank: 2 }]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![
            (Embed {}, vec![Type::i32(&[2, 3]), Type::f32(&[7, 5])]),
            (Embed {}, vec![Type::i32(&[4, 3]), Type::f32(&[2, 7, 16])]),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        match k {
            // One past both ends of the table, too.
            0 => Tensor::i32(&ty.dims, (0..ty.numel()).map(|_| (random() * 4.5) as i32 + 3).collect()),
            _ => super::random_tensor(ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (Embed {}, vec![Type::i32(&[2, 3]), Type::f32(&[7])]),
            (Embed {}, vec![Type::f32(&[2, 3]), Type::f32(&[7, 5])]),
            (Embed {}, vec![Type::i32(&[3, 3]), Type::f32(&[2, 7, 5])]),
            (Embed {}, vec![Type::i32(&[3, 3])]),
        ]
    }
}
