//! Choice of experts by biased sigmoid affinity.
//!
//! The bias selects and never weighs; equal scores go to the lowest index, so the choice is a function of the scores alone.

use super::{Accuracy, Axis, Flops, InferError, OpDef, RouteGrad, VjpCx};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Acc, Expr, Ty, f32c, i32c, math},
    lower::Lower,
};

/// `(logits [R, T, E], bias [E] or [G, E]) -> (index i32 [R, T, k], weight [R, T, k])`.
///
/// `s = sigmoid(logits)`; the `k` experts with the largest `s + bias`, best first, ties to the lowest index;
/// `weight = s / (sum of the chosen s + 1e-20) * scale`. Section 4.2 of the semantics.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// Experts of a token.
    pub k: usize,
    /// Factor of the normalised weights.
    pub scale: f32,
}

/// Keeps the quotient finite.
pub(super) const FLOOR: f32 = 1e-20;

impl OpDef for Route {
    const NAME: &'static str = "route";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        let [logits, bias] = ins else { return Err(InferError::new(Self::NAME, "takes logits and bias")) };
        let floats = logits.dtype == DType::F32 && bias.dtype == DType::F32;
        if !floats || logits.dims.len() != 3 {
            return Err(InferError::new(Self::NAME, format!("wants f32 logits [R, T, E], found {logits} and {bias}")));
        }
        let fits = bias.cols() == logits.cols() && bias.dims.len() <= 2 && logits.dims[0].is_multiple_of(bias.rows());
        if !fits {
            return Err(InferError::new(Self::NAME, format!("bias {bias} does not fit logits {logits}")));
        }
        if self.k == 0 || self.k > logits.cols() {
            let why = format!("cannot choose {} of {} experts", self.k, logits.cols());
            return Err(InferError::new(Self::NAME, why));
        }
        let dims = [logits.dims[0], logits.dims[1], self.k];
        Ok(vec![Type::i32(&dims), Type::f32(&dims)])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (logits, bias) = (ins[0], ins[1]);
        let experts = logits.ty.cols();
        let per_group = logits.ty.rows() / bias.ty.rows();
        let (mut index, mut weight) = (vec![], vec![]);
        for (row, x) in logits.as_f32().chunks(experts).enumerate() {
            let s: Vec<f32> = x.iter().map(|&x| 1.0 / (1.0 + (-x).exp())).collect();
            let bias = &bias.as_f32()[row / per_group * experts..][..experts];
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|&a, &b| (s[b] + bias[b]).total_cmp(&(s[a] + bias[a])));
            order.truncate(self.k);
            let total: f32 = order.iter().map(|&e| s[e]).sum();
            index.extend(order.iter().map(|&e| e as i32));
            weight.extend(order.iter().map(|&e| s[e] / (total + FLOOR) * self.scale));
        }
        let dims = [logits.ty.dims[0], logits.ty.dims[1], self.k];
        vec![Tensor::i32(&dims, index), Tensor::f32(&dims, weight)]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let Some(dw) = cx.grads[1] else { return Ok(vec![None, None]) };
        let op = RouteGrad { k: self.k, scale: self.scale };
        Ok(vec![Some(cx.op(op, &[cx.ins[0], cx.outs[0], dw])?), None])
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(ins[0].numel() * (10 + self.k))
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (logits, bias) = (cx.ty(0).clone(), cx.ty(1).clone());
        let experts = logits.cols();
        let row = cx.grid(logits.rows());
        let s = cx.scratch("affinity", DType::F32, experts);
        let score = cx.scratch("score", DType::F32, experts);
        let chosen = cx.scratch("chosen", DType::F32, self.k);
        let group = cx.bind(&row / (logits.rows() / bias.rows()));
        cx.lanes(0, experts, 1, |cx, e| {
            let x = cx.load(0, &row, &e);
            let x = math::sigmoid(&mut cx.b, x);
            cx.store(s, &e, &x);
            let bias = cx.load(1, &group, &e);
            cx.store(score, e, x + bias);
        });
        let total = cx.local(f32c(0.0));
        for j in 0..self.k {
            let best = cx.reduce(0, experts, |_, e| vec![Acc::Max(Expr::load(score, e))]).remove(0);
            // The first of the best has the greatest distance from the end; expert 0 where no score is a number.
            let left = cx.reduce(0, experts, |cx, e| {
                let is_best = cx.bind(Expr::load(score, &e).eq(&best));
                vec![Acc::Max(is_best.select((Expr::from(experts) - e).cast(Ty::I32), i32c(0)))]
            });
            let left = f32c(f32::NEG_INFINITY).lt(&best).select(left[0].clone(), i32c(experts as i32));
            let at = Expr::from(experts) - left.cast(Ty::I64);
            let at = cx.bind(at.max(Expr::from(0)).min(Expr::from(experts - 1)));
            cx.store(score, &at, f32c(f32::NEG_INFINITY));
            let x = cx.bind(Expr::load(s, &at));
            cx.store(chosen, j, &x);
            cx.set(total, total + x);
            cx.put(0, &row * self.k + j, at.cast(Ty::I32));
        }
        let total = cx.bind(total + f32c(FLOOR));
        for j in 0..self.k {
            cx.put(1, &row * self.k + j, Expr::load(chosen, j) / &total * f32c(self.scale));
        }
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Rows, Axis::Weight { rank: 1 }]
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-6, atol: 1e-7 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let op = |k, scale| Route { k, scale };
        vec![
            (op(2, 1.0), vec![Type::f32(&[2, 3, 5]), Type::f32(&[5])]),
            (op(3, 2.5), vec![Type::f32(&[4, 1, 16]), Type::f32(&[2, 16])]),
            (op(1, 1.0), vec![Type::f32(&[1, 2, 1]), Type::f32(&[1])]),
        ]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let op = |k| Route { k, scale: 1.0 };
        vec![
            (op(6), vec![Type::f32(&[2, 3, 5]), Type::f32(&[5])]),
            (op(0), vec![Type::f32(&[2, 3, 5]), Type::f32(&[5])]),
            (op(2), vec![Type::f32(&[2, 3, 5]), Type::f32(&[4])]),
            (op(2), vec![Type::f32(&[3, 3, 5]), Type::f32(&[2, 5])]),
            (op(2), vec![Type::f32(&[3, 5]), Type::f32(&[5])]),
            (op(2), vec![Type::f32(&[2, 3, 5])]),
        ]
    }
}
