//! The loss of answers that are preferred to others (semantics 12.3).

use super::{Accuracy, Binary, BinaryFn, Flops, InferError, OpDef, PreferenceGrad, VjpCx, check};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Expr, f32c, math},
    lower::Lower,
};

/// `(nll [R, T], reference [R])` → `(losses [R], loss [1], margins [R], logp [R])`, where row `2 p` is preferred to row `2 p + 1`.
///
/// `logp` is minus the sum of a row of `nll`. The margin of a pair is `beta ((logp_0 - reference_0) - (logp_1 - reference_1))` and its loss
/// `ln(1 + e^-margin)`; both rows have those of their pair. `loss` is the mean over all pairs.
#[derive(Clone, Debug, PartialEq)]
pub struct Preference {
    /// How strongly a difference counts.
    pub beta: f32,
}

/// `ln(1 + e^-m)`.
fn softplus_of_minus(m: f32) -> f32 {
    (-m).max(0.0) + (-m.abs()).exp().ln_1p()
}

impl OpDef for Preference {
    const NAME: &'static str = "preference";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 2..=2)?;
        check::is(Self::NAME, "nll", &ins[0], DType::F32, 2..=2)?;
        let rows = ins[0].dims[0];
        if !rows.is_multiple_of(2) {
            return Err(InferError::new(Self::NAME, format!("compares pairs of rows, found {rows} rows")));
        }
        let row = Type::f32(&[rows]);
        if ins[1] != row {
            return Err(InferError::new(Self::NAME, format!("wants a reference {row}, found {}", ins[1])));
        }
        Ok(vec![row.clone(), Type::f32(&[1]), row.clone(), row])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (nll, reference, t) = (ins[0].as_f32(), ins[1].as_f32(), ins[0].ty.cols());
        let logp: Vec<f32> = nll.chunks(t).map(|row| -row.iter().sum::<f32>()).collect();
        let gained: Vec<f32> = logp.iter().zip(reference).map(|(l, r)| l - r).collect();
        let margins: Vec<f32> = gained.chunks(2).flat_map(|p| [self.beta * (p[0] - p[1]); 2]).collect();
        let losses: Vec<f32> = margins.iter().map(|&m| softplus_of_minus(m)).collect();
        let loss = losses.chunks(2).map(|p| p[0]).sum::<f32>() / (losses.len() / 2) as f32;
        let rows = |x: Vec<f32>| Tensor::f32(&[x.len()], x);
        vec![rows(losses), Tensor::f32(&[1], vec![loss]), rows(margins), rows(logp)]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        if cx.grads[3].is_some() {
            return Err(InferError::new(Self::NAME, "log-probabilities are not differentiable yet"));
        }
        let (tokens, margins) = (cx.graph.ty(cx.ins[0]).cols(), cx.outs[2]);
        let mut sum = None;
        for (o, per_row, of_loss) in [(0, true, true), (1, false, true), (2, true, false)] {
            let Some(g) = cx.grads[o] else { continue };
            let each = cx.op(PreferenceGrad { beta: self.beta, tokens, per_row, of_loss }, &[margins, g])?;
            sum = Some(match sum {
                None => each,
                Some(before) => cx.op(Binary { f: BinaryFn::Add }, &[before, each])?,
            });
        }
        // What the reference says is a constant.
        Ok(vec![sum, None])
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(ins[0].numel() + 24 * ins[0].rows())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, t) = (cx.ty(0).rows(), cx.ty(0).cols());
        let (nll, reference) = (cx.buf(0), cx.buf(1));
        cx.b.grid(1);
        let total = cx.b.local(f32c(0.0));
        cx.each(0, rows / 2, |cx, pair| {
            let gained = [0, 1].map(|i| {
                let row = cx.b.bind(&pair * 2 + i);
                let base = cx.b.bind(&row * t);
                let sum = cx.sum(0, t, |_, k| Expr::load(nll, &base + k));
                let logp = cx.b.bind(f32c(0.0) - sum);
                cx.put(3, row.clone(), logp.clone());
                cx.b.bind(logp - Expr::load(reference, row))
            });
            let [first, second] = gained;
            let margin = cx.b.bind(f32c(self.beta) * (first - second));
            let loss = math::softplus(&mut cx.b, f32c(0.0) - &margin);
            let loss = cx.b.bind(loss);
            for i in 0..2 {
                cx.put(0, &pair * 2 + i, loss.clone());
                cx.put(2, &pair * 2 + i, margin.clone());
            }
            cx.b.set(total, Expr::from(total) + loss);
        });
        cx.put(1, 0, Expr::from(total) / f32c((rows / 2) as f32));
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-5, atol: 1e-5 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![
            (Preference { beta: 0.5 }, vec![Type::f32(&[6, 37]), Type::f32(&[6])]),
            (Preference { beta: 0.1 }, vec![Type::f32(&[2, 1]), Type::f32(&[2])]),
        ]
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let op = Preference { beta: 0.1 };
        vec![
            (op.clone(), vec![Type::f32(&[3, 4]), Type::f32(&[3])]),
            (op.clone(), vec![Type::f32(&[4, 4]), Type::f32(&[2])]),
            (op.clone(), vec![Type::i32(&[4, 4]), Type::f32(&[4])]),
            (op, vec![Type::f32(&[4, 4])]),
        ]
    }
}
