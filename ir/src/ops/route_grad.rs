//! The gradient of the weights of chosen experts; the choice itself has none.

use super::{Accuracy, Flops, InferError, OpDef, route::FLOOR};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, Ty, f32c, i32c, math},
    lower::Lower,
};

/// `(logits [R, T, E], index i32 [R, T, k], dw [R, T, k]) -> dlogits [R, T, E]` for `w_j = scale s_j / sum s` over the chosen
/// `s = sigmoid(logits)`. The indices of a token differ; those outside are clamped.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteGrad {
    /// Experts of a token.
    pub k: usize,
    /// Factor of the normalised weights.
    pub scale: f32,
}

impl OpDef for RouteGrad {
    const NAME: &'static str = "route_grad";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        let [logits, index, dw] = ins else {
            return Err(InferError::new(Self::NAME, "takes logits, index and the gradient of the weights"));
        };
        let dtypes = [logits.dtype, index.dtype, dw.dtype] == [DType::F32, DType::I32, DType::F32];
        let fits = logits.dims.len() == 3 && index.dims.len() == 3 && index.dims[..2] == logits.dims[..2];
        if dtypes && fits && self.k > 0 && index.cols() == self.k && dw.dims == index.dims {
            return Ok(vec![logits.clone()]);
        }
        Err(InferError::new(Self::NAME, format!("{} experts do not fit {logits}, {index} and {dw}", self.k)))
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (experts, index, dw) = (ins[0].ty.cols(), ins[1].to_i64(), ins[2].as_f32());
        let mut out = vec![0.0; ins[0].ty.numel()];
        for (t, x) in ins[0].as_f32().chunks(experts).enumerate() {
            let at = |j: usize| index[t * self.k + j].clamp(0, experts as i64 - 1) as usize;
            let s: Vec<f64> = (0..self.k).map(|j| 1.0 / (1.0 + (-f64::from(x[at(j)])).exp())).collect();
            let total = s.iter().sum::<f64>() + f64::from(FLOOR);
            let grad = |j: usize| f64::from(dw[t * self.k + j]) * f64::from(self.scale) / total;
            let mean: f64 = (0..self.k).map(|j| grad(j) * s[j] / total).sum();
            for j in 0..self.k {
                out[t * experts + at(j)] += ((grad(j) - mean) * s[j] * (1.0 - s[j])) as f32;
            }
        }
        vec![Tensor::f32(&ins[0].ty.dims, out)]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(20 * ins[1].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (experts, k) = (cx.ty(0).cols(), self.k);
        let [logits, index, dw] = [0, 1, 2].map(|k| cx.buf(k));
        let token = cx.b.grid(cx.ty(0).rows());
        let row = cx.b.bind(&token * experts);
        let out = cx.b.scratch("dlogits", DType::F32, experts);
        cx.lanes(0, experts, 1, |cx, e| cx.b.store(out, e, f32c(0.0)));
        let (mut total, mut chosen) = (f32c(0.0), vec![]);
        for j in 0..k {
            let at = Expr::load(index, &token * k + j).min(i32c(experts as i32 - 1)).max(i32c(0));
            let at = cx.b.bind(at.cast(Ty::I64));
            let s = math::sigmoid(&mut cx.b, Expr::load(logits, &row + &at));
            let s = cx.b.bind(s);
            total = total + &s;
            chosen.push((at, s));
        }
        let total = cx.b.bind(total + f32c(FLOOR));
        let mut mean = f32c(0.0);
        let mut grads = vec![];
        for (j, (_, s)) in chosen.iter().enumerate() {
            let g = cx.b.bind(Expr::load(dw, &token * k + j) * f32c(self.scale) / &total);
            mean = mean + &g * s / &total;
            grads.push(g);
        }
        let mean = cx.b.bind(mean);
        for ((at, s), g) in chosen.iter().zip(grads) {
            let slope = s * (f32c(1.0) - s);
            cx.b.store(out, at, Expr::load(out, at) + (g - &mean) * slope);
        }
        cx.lanes(0, experts, 1, |cx, e| cx.put(0, &row + &e, Expr::load(out, e)));
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-5, atol: 1e-6 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |k, experts, scale| {
            (RouteGrad { k, scale }, vec![Type::f32(&[2, 3, experts]), Type::i32(&[2, 3, k]), Type::f32(&[2, 3, k])])
        };
        vec![of(2, 4, 1.0), of(1, 3, 2.5), of(3, 7, 0.5)]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        match k {
            1 => Tensor::i32(&ty.dims, (0..ty.numel()).map(|i| (i / self.k % 2 + i % self.k) as i32).collect()),
            _ => super::random_tensor(ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, ins) = Self::samples().remove(0);
        vec![
            (RouteGrad { k: 3, ..op.clone() }, ins.clone()),
            (op.clone(), ins[..2].to_vec()),
            (op, vec![Type::f32(&[6, 4]), ins[1].clone(), ins[2].clone()]),
        ]
    }
}
