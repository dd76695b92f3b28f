//! The scalars of a step of gradient descent.

use super::{Accuracy, Axis, Flops, InferError, OpDef};
use crate::{
    Tensor, Type,
    loops::{Expr, Ty, f32c, f64c, i32c},
    lower::Lower,
};

/// `(c f32 [2], step i32 [1], lr f32 [1]) -> f32 [5]`, where `c` are the norm of the gradient and a share of the weight decay: the factor
/// `min(1, clip / (norm + 1e-12))` that limits the norm, the learning rate, `1 / (1 - beta^(step + 1))` for both running means, powers in
/// double precision, and the share of the weight decay. Steps count from 0 as words of 32 bits.
#[derive(Clone, Debug, PartialEq)]
pub struct DescentRates {
    /// Most that the norm may be; 0 leaves it as it is.
    pub clip: f32,
    /// Decay of the running means.
    pub betas: [f32; 2],
}

/// Bits of the number of a step.
const BITS: i32 = 31;

impl DescentRates {
    fn correction(beta: f32, t: i32) -> f32 {
        let (mut power, mut square) = (1.0, f64::from(beta));
        for bit in 0..BITS {
            power *= if (t >> bit) & 1 == 1 { square } else { 1.0 };
            square *= square;
        }
        (1.0 / (1.0 - power)) as f32
    }
}

impl OpDef for DescentRates {
    const NAME: &'static str = "descent_rates";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        match ins {
            [c, step, lr] if *c == Type::f32(&[2]) && *step == Type::i32(&[1]) && *lr == Type::f32(&[1]) => {
                Ok(vec![Type::f32(&[5])])
            }
            _ => Err(InferError::new(Self::NAME, "takes scalars f32 [2], a step i32 [1] and a learning rate f32 [1]")),
        }
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (norm, step, lr) = (ins[0].as_f32()[0], ins[1].to_i64()[0] as i32, ins[2].as_f32()[0]);
        let scale = if self.clip > 0.0 { (self.clip / (norm + 1e-12)).min(1.0) } else { 1.0 };
        let [c1, c2] = self.betas.map(|beta| DescentRates::correction(beta, step.wrapping_add(1)));
        vec![Tensor::f32(&[5], vec![scale, lr, c1, c2, ins[0].as_f32()[1]])]
    }

    fn flops(&self, _: &[Type], _: &[Type]) -> Flops {
        Flops::float(4 * BITS as usize)
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let first = || Expr::from(0);
        let (norm, step, lr) =
            (Expr::load(cx.buf(0), first()), Expr::load(cx.buf(1), first()), Expr::load(cx.buf(2), first()));
        cx.grid(1);
        let scale = if self.clip > 0.0 { (f32c(self.clip) / (norm + f32c(1e-12))).min(f32c(1.0)) } else { f32c(1.0) };
        cx.put(0, 0, scale);
        cx.put(0, 1, lr);
        let share = Expr::load(cx.buf(0), Expr::from(1));
        cx.put(0, 4, share);
        let t = cx.bind(step + i32c(1));
        for (i, beta) in self.betas.into_iter().enumerate() {
            let (mut power, mut square) = (f64c(1.0), f64::from(beta));
            for bit in 0..BITS {
                let set = (t.clone().shr(bit) & i32c(1)).eq(i32c(1));
                power = cx.bind(power * set.select(f64c(square), f64c(1.0)));
                square *= square;
            }
            cx.put(0, 2 + i, (f64c(1.0) / (f64c(1.0) - power)).cast(Ty::F32));
        }
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared; ins.len()]
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Bits
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let ins = vec![Type::f32(&[2]), Type::i32(&[1]), Type::f32(&[1])];
        vec![
            (DescentRates { clip: 0.25, betas: [0.9, 0.999] }, ins.clone()),
            (DescentRates { clip: 0.0, betas: [0.0, 0.95] }, ins),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        match k {
            0 => Tensor::f32(&[2], vec![random().abs(), random().abs()]),
            1 => Tensor::i32(&[1], vec![(random().abs() * 3000.0) as i32]),
            _ => super::random_tensor(ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let op = DescentRates { clip: 1.0, betas: [0.9, 0.999] };
        vec![(op.clone(), vec![Type::f32(&[1]); 3]), (op, vec![])]
    }
}
