//! Tokens sorted by expert.
//!
//! The sort is stable: inside an expert the tokens keep their order, so that everything after it is deterministic.

use super::{Axis, Flops, InferError, OpDef, VjpCx};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Builder, Expr, Ty, i32c},
    lower::Lower,
};

/// `index i32 [R, T, k] -> (order i32 [N], slot i32 [N], offsets i32 [groups * experts + 1], load i32 [experts])`, `N = R T k`.
///
/// Flat slot `i = (r T + t) k + j` has the key `index[i] * groups + group(r)` with `group(r) = r / (R / groups)`. `order` maps a
/// sorted position to its flat slot, `slot` is the inverse; the positions of key `g` are `offsets[g] .. offsets[g + 1]`, and `load`
/// counts the slots of an expert over all groups. Indices outside the experts are clamped.
#[derive(Clone, Debug, PartialEq)]
pub struct Dispatch {
    /// The number of experts.
    pub experts: usize,
    /// The number of groups of batch rows with weights of their own.
    pub groups: usize,
}

impl OpDef for Dispatch {
    const NAME: &'static str = "dispatch";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [x] if x.dtype == DType::I32 && x.dims.len() == 3 => {
                if self.experts == 0 || self.groups == 0 || !x.dims[0].is_multiple_of(self.groups) {
                    let why = format!("cannot divide {x} into {} groups of {} experts", self.groups, self.experts);
                    return Err(InferError::new(Self::NAME, why));
                }
                let all = Type::i32(&[x.numel()]);
                Ok(vec![all.clone(), all, Type::i32(&[self.groups * self.experts + 1]), Type::i32(&[self.experts])])
            }
            _ => Err(InferError::new(Self::NAME, "takes one operand, i32 [R, T, k]")),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let index = ins[0].to_i64();
        let per_group = index.len() / self.groups;
        let expert = |i: usize| index[i].clamp(0, self.experts as i64 - 1) as usize;
        let key = |i: usize| expert(i) * self.groups + i / per_group;
        let mut order: Vec<usize> = (0..index.len()).collect();
        order.sort_by_key(|&i| key(i));
        let mut slot = vec![0; index.len()];
        for (at, &i) in order.iter().enumerate() {
            slot[i] = at as i32;
        }
        let count = |f: &dyn Fn(usize) -> bool| (0..index.len()).filter(|&i| f(i)).count() as i32;
        let offsets: Vec<i32> = (0..=self.groups * self.experts).map(|g| count(&|i| key(i) < g)).collect();
        let load: Vec<i32> = (0..self.experts).map(|e| count(&|i| expert(i) == e)).collect();
        let order = order.into_iter().map(|i| i as i32).collect();
        let vector = |v: Vec<i32>| Tensor::i32(&[v.len()], v);
        vec![vector(order), vector(slot), vector(offsets), vector(load)]
    }

    fn vjp(&self, _: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        Ok(vec![None])
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::default()
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (n, index) = (cx.ty(0).numel(), cx.buf(0));
        let keys = self.groups * self.experts;
        let per_group = n / self.groups;
        let next = cx.scratch("next", DType::I32, keys);
        let last = i32c(self.experts as i32 - 1);
        let key = |b: &mut Builder, g: &Expr, i: &Expr| {
            let e = Expr::load(index, i).min(last.clone()).max(i32c(0)).cast(Ty::I64);
            b.bind(e * self.groups + g)
        };
        cx.lanes(0, keys, 1, |cx, g| cx.store(next, g, i32c(0)));
        cx.each(0, self.groups, |cx, g| {
            cx.each(&g * per_group, (&g + 1usize) * per_group, |cx, i| {
                let at = key(&mut cx.b, &g, &i);
                cx.store(next, &at, Expr::load(next, &at) + i32c(1));
            });
        });
        cx.each(0, self.experts, |cx, e| {
            let total = cx.local(i32c(0));
            for g in 0..self.groups {
                cx.set(total, total + Expr::load(next, &e * self.groups + g));
            }
            cx.put(3, e, total);
        });
        // From counts to the first position of every key.
        let start = cx.local(i32c(0));
        cx.each(0, keys, |cx, g| {
            let count = cx.bind(Expr::load(next, &g));
            cx.store(next, &g, start);
            cx.put(2, g, start);
            cx.set(start, start + count);
        });
        cx.put(2, keys, start);
        cx.each(0, self.groups, |cx, g| {
            cx.each(&g * per_group, (&g + 1usize) * per_group, |cx, i| {
                let at = key(&mut cx.b, &g, &i);
                let position = cx.bind(Expr::load(next, &at).min(i32c(n as i32 - 1)).max(i32c(0)));
                cx.store(next, &at, &position + i32c(1));
                cx.put(0, position.clone().cast(Ty::I64), i.clone().cast(Ty::I32));
                cx.put(1, i, position);
            });
        });
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Rows]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![
            (Dispatch { experts: 4, groups: 1 }, vec![Type::i32(&[2, 5, 2])]),
            (Dispatch { experts: 5, groups: 2 }, vec![Type::i32(&[4, 3, 1])]),
            (Dispatch { experts: 1, groups: 1 }, vec![Type::i32(&[1, 1, 1])]),
        ]
    }

    fn sample_input(&self, _: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        // A few indices fall outside.
        let index = (0..ty.numel()).map(|_| ((random() + 0.9) * 0.6 * self.experts as f32) as i32).collect();
        Tensor::i32(&ty.dims, index)
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (Dispatch { experts: 4, groups: 2 }, vec![Type::i32(&[3, 5, 2])]),
            (Dispatch { experts: 0, groups: 1 }, vec![Type::i32(&[3, 5, 2])]),
            (Dispatch { experts: 4, groups: 1 }, vec![Type::i32(&[3, 5])]),
            (Dispatch { experts: 4, groups: 1 }, vec![Type::f32(&[3, 5, 2])]),
        ]
    }
}
