//! What one iteration of the depth loop leaves behind: used depths, finished rows, and whether to go on.
//!
//! The flag is the only control value of a plan that depends on activations, and only when `adaptive` is set.

use super::{Accuracy, Axis, Flops, InferError, OpDef, VjpCx};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Acc, Expr, Ty, f32c, i32c},
    lower::Lower,
};

/// `(h_new [R, T, d], h_old [R, T, d], active i32 [R], used i32 [R], done i32 [R], depth i32 [R], k i32 [1]) -> (used', done', go i32 [1])`.
///
/// `used' = used + active`. When `adaptive` and `k + 1 >= min`, an active row is done if the mean over its tokens of
/// `|h_new - h_old| / max(|h_new|, 1e-12)` is below `threshold`. `go` is 1 when a row with `k + 1 < depth` is not done. Section 9.3 of
/// the semantics; `h_new` is already masked by `active`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoopExit {
    /// The least number of iterations.
    pub min: usize,
    /// Relative change of the state below which a row is done.
    pub threshold: f32,
    /// Whether rows may finish early.
    pub adaptive: bool,
}

const FLOOR: f32 = 1e-12;

impl OpDef for LoopExit {
    const NAME: &'static str = "loop_exit";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        let [new, old, rest @ .., k] = ins else { return Err(InferError::new(Self::NAME, "takes seven operands")) };
        let floats = new.dtype == DType::F32 && new.dims.len() == 3 && new == old;
        let rows = floats.then(|| Type::i32(&new.dims[..1]));
        match rows {
            Some(rows) if rest.len() == 4 && rest.iter().all(|t| *t == rows) && *k == Type::i32(&[1]) => {
                Ok(vec![rows.clone(), rows, k.clone()])
            }
            _ => {
                let why = "takes h_new and h_old [R, T, d], active, used, done and depth i32 [R], and k i32 [1]";
                Err(InferError::new(Self::NAME, why))
            }
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let [rows, tokens, d] = ins[0].ty.dims[..] else { unreachable!("infer accepted three dimensions") };
        let ints = |k: usize| ins[k].to_i64();
        let (active, mut used, mut done, depth, k) = (ints(2), ints(3), ints(4), ints(5), ints(6)[0]);
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let mut go = 0;
        for r in 0..rows {
            used[r] += active[r];
            if self.adaptive && k + 1 >= self.min as i64 {
                let change = |t: usize| {
                    let new = &ins[0].as_f32()[(r * tokens + t) * d..][..d];
                    let old = &ins[1].as_f32()[(r * tokens + t) * d..][..d];
                    let diff = norm(&mut new.iter().zip(old).map(|(a, b)| a - b));
                    diff / norm(&mut new.iter().copied()).max(f64::from(FLOOR))
                };
                let rho = (0..tokens).map(change).sum::<f64>() / tokens as f64;
                let exits = active[r] != 0 && (rho as f32) < self.threshold;
                done[r] = i64::from(done[r] != 0 || exits);
            }
            go |= i32::from(k + 1 < depth[r] && done[r] == 0);
        }
        let vector = |v: Vec<i64>| Tensor::i32(&[rows], v.into_iter().map(|x| x as i32).collect());
        vec![vector(used), vector(done), Tensor::i32(&[1], vec![go])]
    }

    fn vjp(&self, _: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        Ok(vec![None; 7])
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(if self.adaptive { 5 * ins[0].numel() } else { 0 })
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let [rows, tokens, d] = cx.ty(0).dims[..] else { unreachable!("infer accepted three dimensions") };
        let [new, old, active, used, done, depth, k] = [0, 1, 2, 3, 4, 5, 6].map(|k| cx.buf(k));
        cx.grid(1);
        let k = cx.bind(Expr::load(k, 0) + i32c(1));
        let go = cx.local(i32c(0));
        cx.each(0, rows, |cx, r| {
            let active = cx.bind(Expr::load(active, &r));
            cx.put(0, &r, Expr::load(used, &r) + &active);
            let finished = cx.local(Expr::load(done, &r));
            if self.adaptive {
                let judged = i32c(self.min as i32).le(&k) & active.ne(i32c(0));
                cx.when(judged, |cx| {
                    let total = cx.local(f32c(0.0));
                    cx.each(0, tokens, |cx, t| {
                        let at = cx.bind((&r * tokens + t) * d);
                        let sums = cx.reduce(0, d, |cx, j| {
                            let x = cx.bind(Expr::load(new, &at + &j));
                            let diff = cx.bind(&x - Expr::load(old, &at + j));
                            vec![Acc::Dot(diff.clone(), diff), Acc::Dot(x.clone(), x)]
                        });
                        let [diff, norm] = [0, 1].map(|i| sums[i].clone().sqrt());
                        cx.set(total, total + diff / norm.max(f32c(FLOOR)));
                    });
                    let rho = total / f32c(tokens as f32);
                    let exits = rho.lt(f32c(self.threshold)).cast(Ty::I32);
                    cx.set(finished, Expr::from(finished).ne(i32c(0)).cast(Ty::I32) | exits);
                });
            }
            cx.put(1, &r, finished);
            let more = k.clone().lt(Expr::load(depth, r)) & Expr::from(finished).eq(i32c(0));
            cx.set(go, go | more.cast(Ty::I32));
        });
        cx.put(2, 0, go);
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        [vec![Axis::Rows; 6], vec![Axis::Shared]].concat()
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 0.0, atol: 0.0 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let ins = |r: usize, t: usize, d: usize| {
            let (h, v) = (Type::f32(&[r, t, d]), Type::i32(&[r]));
            vec![h.clone(), h, v.clone(), v.clone(), v.clone(), v, Type::i32(&[1])]
        };
        let op = |min, threshold, adaptive| LoopExit { min, threshold, adaptive };
        vec![
            (op(1, 0.01, false), ins(3, 2, 5)),
            (op(1, 1.4, true), ins(5, 3, 9)),
            (op(5, 9.0, true), ins(2, 1, 16)),
            (op(1, 9.0, true), ins(4, 1, 1)),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        let mut draw = |high: f32| (0..ty.numel()).map(|_| ((random() + 1.0) * 0.5 * high) as i32).collect();
        match k {
            2 => Tensor::i32(&ty.dims, draw(1.99)),
            3 | 5 => Tensor::i32(&ty.dims, draw(6.0)),
            4 => Tensor::i32(&ty.dims, draw(1.3)),
            6 => Tensor::i32(&ty.dims, draw(3.0)),
            _ => super::random_tensor(ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let op = LoopExit { min: 1, threshold: 0.01, adaptive: true };
        let (h, v, k) = (Type::f32(&[2, 3, 4]), Type::i32(&[2]), Type::i32(&[1]));
        let bad = Type::i32(&[3]);
        vec![
            (op.clone(), vec![]),
            (op.clone(), vec![h.clone(), h.clone(), v.clone(), v.clone(), v.clone(), k.clone()]),
            (op.clone(), vec![h.clone(), h.clone(), v.clone(), bad, v.clone(), v.clone(), k.clone()]),
            (op, vec![h, Type::f32(&[2, 3, 5]), v.clone(), v.clone(), v.clone(), v, k]),
        ]
    }
}
