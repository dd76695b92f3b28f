//! Scales of ternary weights in the order in which products read them.

use super::{Axis, Flops, InferError, OpDef, check, pack_ternary::BLOCK_ROWS};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, f32c, int},
    lower::Lower,
};

/// The type of the blocked scales of scales `[m, nb]` or `[G, m, nb]`: `f32 [G?, ceil(m / 32), nb, 32]`.
pub fn blocked_type(alpha: &Type) -> Type {
    let rank = alpha.dims.len();
    let mut dims = alpha.dims[..rank - 2].to_vec();
    dims.extend([alpha.dims[rank - 2].div_ceil(BLOCK_ROWS), alpha.dims[rank - 1], BLOCK_ROWS]);
    Type::f32(&dims)
}

/// `alpha [m, nb]` or `[G, m, nb]` → `[G?, ceil(m / 32), nb, 32]`: the scales of the rows `32 b ..` are the columns of block `b`,
/// zero beyond row `m`.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockScales {}

impl OpDef for BlockScales {
    const NAME: &'static str = "block_scales";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 1..=1)?;
        check::is(Self::NAME, "alpha", &ins[0], DType::F32, 2..=3)?;
        Ok(vec![blocked_type(&ins[0])])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let from = &ins[0].ty;
        let (m, nb, ty) = (from.dims[from.dims.len() - 2], from.cols(), blocked_type(from));
        let blocks = m.div_ceil(BLOCK_ROWS);
        let at = |i: usize| {
            let (o, b, block) = (i % BLOCK_ROWS, i / BLOCK_ROWS % nb, i / BLOCK_ROWS / nb);
            let (g, row) = (block / blocks, block % blocks * BLOCK_ROWS + o);
            if row < m { ins[0].as_f32()[(g * m + row) * nb + b] } else { 0.0 }
        };
        vec![Tensor::f32(&ty.dims, (0..ty.numel()).map(at).collect())]
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let ty = cx.ty(0).clone();
        let (m, nb) = (ty.dims[ty.dims.len() - 2], ty.cols());
        let blocks = m.div_ceil(BLOCK_ROWS);
        let alpha = cx.buf(0);
        let at = cx.b.grid(ty.rows() / m * blocks);
        let row = cx.b.bind(&at % blocks * BLOCK_ROWS);
        let from = cx.b.bind((&at / blocks * m + &row) * nb);
        let count = cx.b.bind((int(m) - row).min(int(BLOCK_ROWS)));
        cx.each(0, nb, |cx, b| {
            let to = cx.b.bind((&at * nb + &b) * BLOCK_ROWS);
            let from = cx.b.bind(&from + b);
            cx.lanes(0, count.clone(), 1, |cx, o| {
                let scale = Expr::load(alpha, &from + &o * nb);
                cx.put(0, &to + o, scale);
            });
            cx.lanes(count.clone(), BLOCK_ROWS, 1, |cx, o| cx.put(0, &to + o, f32c(0.0)));
        });
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Weight { rank: 2 }]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        [&[37, 3][..], &[64, 1], &[2, 5, 2], &[3, 70, 1]].map(|dims| (BlockScales {}, vec![Type::f32(dims)])).into()
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        [vec![Type::f32(&[4])], vec![Type::i32(&[4, 4])], vec![]].map(|ins| (BlockScales {}, ins)).into()
    }
}
