//! The position of every token inside its document.

use super::{
    Flops, InferError, OpDef,
    heads::{expect, operands},
};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, i32c},
    lower::Lower,
};

/// `pos[t] = 0` where the document id differs from the one of the token before, else one more than before.
///
/// `(seg i32 [R,T], next i32 [R], document i32 [R] if carried) -> (pos i32 [R,T], next, document if carried)`. The state holds the
/// position and the document id of the last token, each plus one, so that zeros mean a row without a token. Document ids are not
/// negative. Source: component semantics 1.2.
#[derive(Clone, Debug, PartialEq)]
pub struct Positions {
    /// Whether the state is an operand, updated in place; otherwise every row starts a document.
    pub carry: bool,
}

impl OpDef for Positions {
    const NAME: &'static str = "positions";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        operands(Self::NAME, ins, if self.carry { 3 } else { 1 })?;
        let [r, t] = ins[0].dims[..] else {
            return Err(InferError::new(Self::NAME, format!("seg is {}, expected i32[rows, tokens]", ins[0])));
        };
        expect(Self::NAME, "seg", &ins[0], &Type::i32(&[r, t]))?;
        ins[1..].iter().try_for_each(|s| expect(Self::NAME, "the state", s, &Type::i32(&[r])))?;
        Ok(ins.to_vec())
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (rows, tokens) = (ins[0].ty.dims[0], ins[0].ty.dims[1]);
        let seg = ints(ins[0]);
        let (mut next, mut document) =
            if self.carry { (ints(ins[1]), ints(ins[2])) } else { (vec![0; rows], vec![0; rows]) };
        let mut pos = Vec::with_capacity(rows * tokens);
        for r in 0..rows {
            for s in &seg[r * tokens..(r + 1) * tokens] {
                if s + 1 != document[r] {
                    next[r] = 0;
                }
                pos.push(next[r]);
                (next[r], document[r]) = (next[r] + 1, s + 1);
            }
        }
        let mut out = vec![Tensor::i32(&[rows, tokens], pos)];
        if self.carry {
            out.extend([next, document].map(|s| Tensor::i32(&[rows], s)));
        }
        out
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, tokens) = (cx.ty(0).dims[0], cx.ty(0).dims[1]);
        let r = cx.grid(rows);
        let seg = cx.buf(0);
        let start = |cx: &mut Lower<'_>, k: usize| if self.carry { Expr::load(cx.buf(k), &r) } else { i32c(0) };
        let (next, document) = (start(cx, 1), start(cx, 2));
        let (next, document) = (cx.local(next), cx.local(document));
        cx.each(0, tokens, |cx, t| {
            let at = cx.bind(&r * tokens + t);
            let s = cx.bind(Expr::load(seg, &at) + i32c(1));
            let same = Expr::from(document).eq(&s);
            cx.set(next, same.select(next, i32c(0)));
            cx.put(0, at, next);
            cx.set(next, next + i32c(1));
            cx.set(document, s);
        });
        if self.carry {
            let state = [1, 2].map(|k| cx.buf(k));
            cx.store(state[0], &r, next);
            cx.store(state[1], r, document);
        }
    }

    fn updates(&self) -> Vec<(usize, usize)> {
        if self.carry { vec![(1, 1), (2, 2)] } else { vec![] }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let seg = Type::i32(&[3, 9]);
        let state = Type::i32(&[3]);
        vec![
            (Positions { carry: false }, vec![seg.clone()]),
            (Positions { carry: true }, vec![seg, state.clone(), state.clone()]),
            (Positions { carry: true }, vec![Type::i32(&[3, 1]), state.clone(), state]),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        // Documents of a few tokens with ids 0, 1 and 2; every other row continues.
        let n = ty.numel();
        let data = match k {
            0 => (0..n).map(|i| ((i / ty.cols() + i % ty.cols() / 3) % 3) as i32).collect(),
            1 => (0..n).map(|_| (3.0 + 3.0 * random()) as i32).collect(),
            _ => (0..n).map(|i| if i % 2 == 0 { i as i32 + 1 } else { 0 }).collect(),
        };
        Tensor::i32(&ty.dims, data)
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let seg = Type::i32(&[3, 9]);
        vec![
            (Positions { carry: false }, vec![Type::f32(&[3, 9])]),
            (Positions { carry: false }, vec![Type::i32(&[9])]),
            (Positions { carry: true }, vec![seg.clone()]),
            (Positions { carry: true }, vec![seg.clone(), Type::i32(&[2]), Type::i32(&[3])]),
            (Positions { carry: true }, vec![seg, Type::i32(&[3]), Type::new(DType::I8, &[3])]),
        ]
    }
}

fn ints(t: &Tensor) -> Vec<i32> {
    t.to_i64().into_iter().map(|x| x as i32).collect()
}
