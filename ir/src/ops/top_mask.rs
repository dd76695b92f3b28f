//! Which elements of a tensor have the largest or the smallest magnitudes.
//!
//! Exactly as many as asked for; of equal magnitudes those with the lowest index are taken first.

use super::{Axis, Flops, InferError, OpDef};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, f32c, i32c},
    lower::Lower,
};

/// `score [...] -> mask [...]`: 1 for the `keep` elements of the largest (or smallest) magnitude, 0 for others. Sections 13.2 and 14
/// (P3) of the semantics.
#[derive(Clone, Debug, PartialEq)]
pub struct TopMask {
    /// The number of ones.
    pub keep: usize,
    /// Whether large magnitudes are kept, and not small ones.
    pub largest: bool,
}

/// Bits of the largest finite magnitude and of infinity lie below this.
const BITS: i32 = 31;

impl OpDef for TopMask {
    const NAME: &'static str = "top_mask";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [x] if x.dtype == DType::F32 && (1..=x.numel()).contains(&self.keep) && x.numel() < 1 << 31 => {
                Ok(vec![x.clone()])
            }
            [x] if x.dtype == DType::F32 => {
                Err(InferError::new(Self::NAME, format!("cannot keep {} elements of {x}", self.keep)))
            }
            _ => Err(InferError::new(Self::NAME, "takes one f32 operand")),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let key = |x: f32| if self.largest { -i64::from(x.abs().to_bits()) } else { i64::from(x.abs().to_bits()) };
        let x = ins[0].as_f32();
        let mut order: Vec<usize> = (0..x.len()).collect();
        order.sort_by_key(|&i| key(x[i]));
        let mut mask = vec![0.0; x.len()];
        order[..self.keep].iter().for_each(|&i| mask[i] = 1.0);
        vec![Tensor::f32(&ins[0].ty.dims, mask)]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(2 * (BITS as usize + 2) * ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (n, x) = (cx.ty(0).numel(), cx.buf(0));
        cx.grid(1);
        // Magnitudes are ordered like their bits.
        let key = |i: &Expr| {
            let bits = Expr::load(x, i.clone()).abs().to_bits();
            if self.largest { bits } else { i32c(i32::MAX) - bits }
        };
        let keep = i32c(self.keep as i32);
        // The largest bound that at least `keep` keys reach, bit by bit.
        let (bound, bit) = (cx.local(i32c(0)), cx.local(i32c(1 << (BITS - 1))));
        cx.each(0, BITS as usize, |cx, _| {
            let next = cx.bind(bound | bit);
            let reached = cx.sum(0, n, |_, i| next.clone().le(key(&i)).select(i32c(1), i32c(0)));
            let reached = cx.bind(reached);
            cx.set(bound, keep.clone().le(reached).select(next.clone(), bound));
            cx.set(bit, Expr::from(bit).shr(1));
        });
        let bound = cx.bind(bound);
        let above = cx.sum(0, n, |_, i| bound.clone().lt(key(&i)).select(i32c(1), i32c(0)));
        let ties = cx.local(keep - above);
        cx.each(0, n, |cx, i| {
            let key = cx.bind(key(&i));
            let tie = cx.bind(key.clone().eq(bound.clone()) & i32c(0).lt(ties));
            let taken = bound.clone().lt(key) | tie.clone();
            cx.put(0, i, taken.select(f32c(1.0), f32c(0.0)));
            cx.set(ties, ties - tie.select(i32c(1), i32c(0)));
        });
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |keep, largest, dims: &[usize]| (TopMask { keep, largest }, vec![Type::f32(dims)]);
        vec![
            of(1, true, &[7]),
            of(60, true, &[13, 23]),
            of(60, false, &[13, 23]),
            of(299, false, &[13, 23]),
            of(5, true, &[5]),
            of(40, true, &[3, 40]),
        ]
    }

    fn sample_input(&self, _: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        // Many equal magnitudes, zeros of both signs among them.
        Tensor::f32(&ty.dims, (0..ty.numel()).map(|_| (random() * 8.0).round() / 8.0).collect())
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let of = |keep| TopMask { keep, largest: true };
        vec![(of(0), vec![Type::f32(&[4])]), (of(5), vec![Type::f32(&[4])]), (of(1), vec![Type::i32(&[4])])]
    }
}
