//! The gradients of the Titans memory, token by token: through the reads, and through the gradient of the memory itself.
//!
//! States are kept at the starts of pieces of about `sqrt(T)` tokens and made again inside a piece on the way back.

mod lower;
mod reference;

use super::{
    Accuracy, Flops, InferError, OpDef, TitansMemory,
    heads::{expect, operands},
};
use crate::{Tensor, Type, lower::Lower};

/// `(q, k, v [R,T,H*K], alpha, eta, theta [R,T,H], pos [R,T], init1 [H,m,K], init2 [H,K,m], dy [R,T,H*K], the state if carried) ->
/// (dq, dk, dv, dalpha, deta, dtheta, dinit1 [R,H,m,K], dinit2 [R,H,K,m])` for [`super::TitansMemory`]; the gradients of the initial
/// weights are apart for every row.
///
/// From the last token to the first, with `W, S, A` the state when the token is read, `p = W1 q`, `G = dS + dW` and `c` the factor of
/// the normalised step:
///
/// ```text
/// dalpha = -dW W ; deta = G S ; dtheta = -c (d G1 k + r G2 z) ; dW = (1 - alpha) dW ; dS = eta G
/// d~ = -theta G1 k ; r~ = -theta G2 z ; dk = -theta c G1^T d ; dz = -theta c G2^T r
/// n = -c^2 (r~ r + d~ d) ; dd = c d~ + 2 n d / |r|^2 ; dr = c r~ - 2 n r |d|^2 / |r|^4 ; dz += 2 n z
/// b = dd silu'(u) ; du = dd (A2^T r) silu''(u) ; dr += A2 b ; dA2 += r b^T + 2 dr z^T ; dz += 2 A2^T dr
/// dk += 2 dr ; dv = -2 dr ; du += dz silu'(u) ; dA1 += du k^T ; dk += A1^T du
/// f = (W2^T dy) silu'(p) ; dq = dy + W1^T f ; dW2 += dy silu(p)^T ; dW1 += f q^T
/// ```
///
/// Then the gradient of an anchor joins that of the weights where it was taken, and that of the weights the initial ones where a
/// document starts. The surprise has no gradient; the carried state is a constant.
#[derive(Clone, Debug, PartialEq)]
pub struct TitansGrad {
    /// H.
    pub heads: usize,
    /// Tokens that share an anchor.
    pub inner: usize,
    /// Whether both gradients of a token are divided by `1 + |z|^2 + |d|^2 / |r|^2`.
    pub normalise: bool,
    /// Whether the state before the first token is an operand.
    pub carry: bool,
}

const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const ALPHA: usize = 3;
const ETA: usize = 4;
const THETA: usize = 5;
const POS: usize = 6;
const INIT: usize = 7;
const DY: usize = 9;
const STATE: usize = 10;

/// Added to `|r|^2` where it divides.
const TINY: f32 = 1e-12;

impl TitansGrad {
    fn forward(&self) -> TitansMemory {
        let Self { heads, inner, normalise, carry } = *self;
        TitansMemory { heads, inner, normalise, chunked: false, carry }
    }
}

impl OpDef for TitansGrad {
    const NAME: &'static str = "titans_grad";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        operands(Self::NAME, ins, if self.carry { 16 } else { 10 })?;
        let forward: Vec<Type> = ins[..DY].iter().chain(&ins[STATE..]).cloned().collect();
        let y = self.forward().infer(&forward)?.remove(0);
        expect(Self::NAME, "dy", &ins[DY], &y)?;
        if ins[INIT].dims.len() != 3 {
            return Err(InferError::new(Self::NAME, format!("init1 is {}, expected one memory", ins[INIT])));
        }
        let per_row = |t: &Type| Type::f32(&[&[y.dims[0]], &t.dims[..]].concat());
        Ok(ins[..POS].iter().cloned().chain(ins[INIT..DY].iter().map(per_row)).collect())
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        reference::eval(self, ins)
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        let (k, m) = (ins[Q].cols() / self.heads, ins[INIT].dims[1]);
        Flops::float(ins[Q].rows() * self.heads * 80 * k * m)
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        lower::lower(self, cx);
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 2e-4, atol: 1e-4 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let all = TitansMemory::samples().into_iter().filter(|(_, ins)| ins[INIT].dims.len() == 3);
        all.map(|(op, mut ins)| {
            ins.insert(DY, ins[V].clone());
            let TitansMemory { heads, inner, normalise, carry, .. } = op;
            (TitansGrad { heads, inner, normalise, carry }, ins)
        })
        .collect()
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        match k {
            DY => super::random_tensor(ty, random),
            k if k > DY => self.forward().sample_input(k - 1, ty, random),
            k => self.forward().sample_input(k, ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, ins) = Self::samples().remove(0);
        let with = super::heads::with_operand;
        vec![
            with(DY, Type::f32(&[1, 1, 1])),
            with(INIT, Type::f32(&[3, 2, 6, 5])),
            with(STATE, Type::f32(&[1])),
            (TitansGrad { carry: !op.carry, ..op }, ins),
        ]
    }
}
