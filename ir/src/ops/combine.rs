//! Weighted sum of the expert outputs of a token.
//!
//! The order of the sum is the expert number, not the rank of the choice, so that it never depends on the scores.

use super::{Axis, CombineGrad, Flops, InferError, OpDef, VjpCx};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Expr, Ty, f32c, i32c},
    lower::Lower,
};

/// `(ys [N, d], slot i32 [N], index i32 [R, T, k], weight [R, T, k]) -> [R, T, d]`, `N = R T k`.
///
/// `out = out + ys[slot[token * k + j]] * weight[token, j]` from 0 over the experts of the token in ascending `index`, two roundings
/// each. Slots outside are clamped. Section 4.2 of the semantics.
#[derive(Clone, Debug, PartialEq)]
pub struct Combine {
    /// Experts of a token.
    pub k: usize,
}

impl OpDef for Combine {
    const NAME: &'static str = "combine";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        let [ys, slot, index, weight] = ins else {
            return Err(InferError::new(Self::NAME, "takes ys, slot, index and weight"));
        };
        let n = index.numel();
        let shapes = ys.dims.len() == 2
            && ys.dims[0] == n
            && slot.dims == [n]
            && index.dims.len() == 3
            && index.cols() == self.k
            && weight.dims == index.dims;
        let dtypes = [ys.dtype, slot.dtype, index.dtype, weight.dtype];
        if shapes && dtypes == [DType::F32, DType::I32, DType::I32, DType::F32] {
            return Ok(vec![Type::f32(&[index.dims[0], index.dims[1], ys.cols()])]);
        }
        let why = format!(
            "wants ys [N, d], slot i32 [N], index i32 and weight [R, T, {}], found {ys} {slot} {index} {weight}",
            self.k
        );
        Err(InferError::new(Self::NAME, why))
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (ys, slot, index, weight) = (ins[0], ins[1].to_i64(), ins[2].to_i64(), ins[3].as_f32());
        let d = ys.ty.cols();
        let mut out = vec![0.0; index.len() / self.k * d];
        for (token, out) in out.chunks_mut(d).enumerate() {
            let mut order: Vec<usize> = (token * self.k..(token + 1) * self.k).collect();
            order.sort_by_key(|&i| index[i]);
            for i in order {
                let row = slot[i].clamp(0, slot.len() as i64 - 1) as usize;
                let y = &ys.as_f32()[row * d..][..d];
                out.iter_mut().zip(y).for_each(|(out, y)| *out += y * weight[i]);
            }
        }
        let dims = &ins[2].ty.dims;
        vec![Tensor::f32(&[dims[0], dims[1], d], out)]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let ins: Vec<Value> = cx.ins.iter().copied().chain([cx.grad()]).collect();
        let outs = cx.graph.ops(CombineGrad { k: self.k }, &ins)?;
        Ok(vec![Some(outs[0]), None, None, Some(outs[1])])
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        Flops::float(2 * self.k * outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (d, k) = (cx.ty(0).cols(), self.k);
        let rows = cx.out_ty(0).rows();
        let [ys, slot, index, weight] = [0, 1, 2, 3].map(|k| cx.buf(k));
        let token = cx.grid(rows);
        let from = cx.scratch("from", DType::I32, k);
        let factor = cx.scratch("factor", DType::F32, k);
        let first = cx.bind(&token * k);
        let ids: Vec<Expr> = (0..k).map(|j| cx.bind(Expr::load(index, &first + j))).collect();
        for (j, id) in ids.iter().enumerate() {
            let mut rank = i32c(0);
            for (other, id2) in ids.iter().enumerate().filter(|&(other, _)| other != j) {
                let before = if other < j { id2.clone().le(id) } else { id2.clone().lt(id) };
                rank = rank + before.cast(Ty::I32);
            }
            let rank = cx.bind(rank.min(i32c(k as i32 - 1)).max(i32c(0)).cast(Ty::I64));
            cx.store(from, &rank, Expr::load(slot, &first + j));
            cx.store(factor, &rank, Expr::load(weight, &first + j));
        }
        let last = i32c((rows * k) as i32 - 1);
        let mut terms = vec![];
        for j in 0..k {
            let row = Expr::load(from, j).min(last.clone()).max(i32c(0)).cast(Ty::I64);
            terms.push((cx.bind(row * d), cx.bind(Expr::load(factor, j))));
        }
        cx.lanes(0, d, 2, |cx, col| {
            let sum = terms.iter().fold(f32c(0.0), |sum, (row, w)| sum + Expr::load(ys, row + &col) * w);
            cx.push(&token, &col, &[(0, sum)]);
        });
    }

    fn pushes(&self) -> std::ops::Range<usize> {
        0..1
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Rows; 4]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |r: usize, t: usize, k: usize, d: usize| {
            let n = r * t * k;
            (Combine { k }, vec![Type::f32(&[n, d]), Type::i32(&[n]), Type::i32(&[r, t, k]), Type::f32(&[r, t, k])])
        };
        vec![of(2, 3, 2, 9), of(1, 2, 3, 16), of(3, 1, 1, 5)]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        match k {
            1 => Tensor::i32(&ty.dims, super::gather_rows::permutation(ty.numel(), random)),
            2 => Tensor::i32(&ty.dims, (0..ty.numel()).map(|_| ((random() + 1.0) * 4.0) as i32).collect()),
            _ => super::random_tensor(ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let index = Type::i32(&[2, 3, 2]);
        let weight = Type::f32(&[2, 3, 2]);
        vec![
            (Combine { k: 2 }, vec![Type::f32(&[11, 4]), Type::i32(&[12]), index.clone(), weight.clone()]),
            (Combine { k: 1 }, vec![Type::f32(&[12, 4]), Type::i32(&[12]), index.clone(), weight.clone()]),
            (Combine { k: 2 }, vec![Type::f32(&[12, 4]), Type::i32(&[12]), weight, index]),
            (Combine { k: 2 }, vec![]),
        ]
    }
}
