//! The gradient of the weighted sum of expert outputs.

use super::{Accuracy, Axis, Combine, Flops, InferError, OpDef};
use crate::{
    Tensor, Type,
    loops::{Acc, Expr, Ty, i32c},
    lower::Lower,
};

/// `(ys [N, d], slot i32 [N], index i32 [R, T, k], weight [R, T, k], dy [R, T, d]) -> (dys [N, d], dweight [R, T, k])`: the operands of
/// [`super::Combine`] and the gradient of its result. `slot` is a permutation, so every row of `dys` belongs to one token.
#[derive(Clone, Debug, PartialEq)]
pub struct CombineGrad {
    /// Experts of a token.
    pub k: usize,
}

impl OpDef for CombineGrad {
    const NAME: &'static str = "combine_grad";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        if ins.len() != 5 || (Combine { k: self.k }).infer(&ins[..4])?[0] != ins[4] {
            return Err(InferError::new(Self::NAME, "takes the operands of a combine and a gradient like its result"));
        }
        Ok(vec![ins[0].clone(), ins[3].clone()])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (ys, slot, weight, dy) = (ins[0].as_f32(), ins[1].to_i64(), ins[3].as_f32(), ins[4].as_f32());
        let d = ins[0].ty.cols();
        let (mut dys, mut dw) = (vec![0.0; ys.len()], vec![0.0; weight.len()]);
        for (i, slot) in slot.iter().enumerate() {
            let row = (*slot).clamp(0, weight.len() as i64 - 1) as usize * d;
            let dy = &dy[i / self.k * d..][..d];
            dw[i] = ys[row..][..d].iter().zip(dy).map(|(y, g)| f64::from(*y) * f64::from(*g)).sum::<f64>() as f32;
            dys[row..][..d].iter_mut().zip(dy).for_each(|(o, g)| *o = g * weight[i]);
        }
        vec![Tensor::f32(&ins[0].ty.dims, dys), Tensor::f32(&ins[3].ty.dims, dw)]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(3 * ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (n, d, k) = (cx.ty(0).rows(), cx.ty(0).cols(), self.k);
        let [ys, slot, weight, dy] = [0, 1, 3, 4].map(|k| cx.buf(k));
        let token = cx.b.grid(n / k);
        let from = cx.b.bind(&token * d);
        for j in 0..k {
            let at = cx.b.bind(&token * k + j);
            let row = Expr::load(slot, &at).min(i32c(n as i32 - 1)).max(i32c(0)).cast(Ty::I64);
            let row = cx.b.bind(row * d);
            let w = cx.b.bind(Expr::load(weight, &at));
            let dot = cx.reduce(0, d, |_, c| vec![Acc::Dot(Expr::load(ys, &row + &c), Expr::load(dy, &from + c))]);
            cx.put(1, at, &dot[0]);
            cx.lanes(0, d, 2, |cx, c| cx.put(0, &row + &c, Expr::load(dy, &from + c) * &w));
        }
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Rows; 5]
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-5, atol: 1e-6 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let dy = |ins: &[Type]| Combine { k: ins[2].cols() }.infer(ins).expect("a sample").remove(0);
        let all = Combine::samples().into_iter();
        all.map(|(op, ins)| (CombineGrad { k: op.k }, [&ins[..], &[dy(&ins)]].concat())).collect()
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        Combine { k: self.k }.sample_input(k, ty, random)
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, mut ins) = Self::samples().remove(0);
        let short = ins[..4].to_vec();
        ins[4] = Type::f32(&[2, 3, 8]);
        vec![(op.clone(), ins), (op, short)]
    }
}
