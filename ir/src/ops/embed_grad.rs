//! The gradient of a table whose rows were read by index.
//!
//! A row of the table is one chain of additions in the order of the tokens, so the grid never shows in the result.

use super::{Flops, InferError, OpDef, check};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, Ty, f32c, i32c, int},
    lower::Lower,
};

/// `(tokens i32 [R, T], dy [R, T, d])` → `[V, d]`: row `v` is the sum of the gradients of the tokens `v`. Tokens outside are clamped,
/// as by [`super::Embed`].
#[derive(Clone, Debug, PartialEq)]
pub struct EmbedGrad {
    /// Rows of the table.
    pub vocab: usize,
}

/// Rows of the table of one instance.
const BLOCK: usize = 64;

impl OpDef for EmbedGrad {
    const NAME: &'static str = "embed_grad";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 2..=2)?;
        check::is(Self::NAME, "tokens", &ins[0], DType::I32, 2..=2)?;
        check::is(Self::NAME, "dy", &ins[1], DType::F32, 3..=3)?;
        if ins[1].dims[..2] != ins[0].dims || self.vocab == 0 {
            return Err(InferError::new(
                Self::NAME,
                format!("{} wants a gradient for every token, found {}", ins[0], ins[1]),
            ));
        }
        Ok(vec![Type::f32(&[self.vocab, ins[1].cols()])])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let d = ins[1].ty.cols();
        let mut out = vec![0.0f32; self.vocab * d];
        for (token, dy) in ins[0].to_i64().into_iter().zip(ins[1].as_f32().chunks(d)) {
            let row = token.clamp(0, self.vocab as i64 - 1) as usize;
            out[row * d..][..d].iter_mut().zip(dy).for_each(|(o, x)| *o += x);
        }
        vec![Tensor::f32(&[self.vocab, d], out)]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(ins[1].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (n, d) = (cx.ty(0).numel(), cx.ty(1).cols());
        let (tokens, dy) = (cx.buf(0), cx.buf(1));
        let sum = cx.b.scratch("sum", DType::F32, BLOCK * d);
        let first = cx.b.grid(self.vocab.div_ceil(BLOCK)) * BLOCK;
        let first = cx.b.bind(first);
        let rows = cx.b.bind((int(self.vocab) - &first).min(int(BLOCK)));
        cx.lanes(0, BLOCK * d, 4, |cx, i| cx.b.store(sum, i, f32c(0.0)));
        cx.each(0, n, |cx, i| {
            let token = Expr::load(tokens, &i).max(i32c(0)).min(i32c(self.vocab as i32 - 1));
            let at = cx.b.bind(token.cast(Ty::I64) - &first);
            cx.when(int(0).le(at.clone()) & at.clone().lt(rows.clone()), |cx| {
                let to = cx.b.bind(at.min(int(BLOCK - 1)).max(int(0)) * d);
                let from = cx.b.bind(i * d);
                cx.lanes(0, d, 4, |cx, c| {
                    let at = cx.b.bind(&to + &c);
                    cx.b.store(sum, &at, Expr::load(sum, &at) + Expr::load(dy, &from + c));
                });
            });
        });
        cx.each(0, rows, |cx, r| {
            let (from, to) = (cx.b.bind(&r * d), cx.b.bind((&first + r) * d));
            cx.lanes(0, d, 4, |cx, c| cx.put(0, &to + &c, Expr::load(sum, &from + c)));
        });
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![
            (EmbedGrad { vocab: 4 }, vec![Type::i32(&[3, 5]), Type::f32(&[3, 5, 37])]),
            (EmbedGrad { vocab: 150 }, vec![Type::i32(&[2, 40]), Type::f32(&[2, 40, 5])]),
            (EmbedGrad { vocab: 1 }, vec![Type::i32(&[1, 2]), Type::f32(&[1, 2, 4])]),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        match k {
            0 => Tensor::i32(&ty.dims, (0..ty.numel()).map(|_| (random() * 160.0) as i32).collect()),
            _ => super::random_tensor(ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (EmbedGrad { vocab: 4 }, vec![Type::i32(&[3, 5]), Type::f32(&[3, 4, 37])]),
            (EmbedGrad { vocab: 0 }, vec![Type::i32(&[3, 5]), Type::f32(&[3, 5, 37])]),
        ]
    }
}
