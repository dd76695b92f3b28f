//! What makes a step of an estimate. One file for each row of [`Optimiser`].
//!
//! All memory of an optimiser is in weights of the plan that start at zero, so checkpoints hold it like any weight.

mod adam;
mod momentum;
mod normalised;
pub(crate) mod replay;
mod sgd;

use chimera_ir::{Type, Value, ops::BinaryFn, plan::WeightKind};

use crate::estimators::{Built, Cx, Weight};
use crate::update::UpdateRule;

/// The prefix of the names of memory.
pub const MEMORY: &str = "optim.";

/// The rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Optimiser {
    /// The estimate times the rate.
    Sgd,
    /// A running sum of fading estimates times the rate.
    Momentum,
    /// As [`Optimiser::Momentum`] over the last steps, without its memory: their estimates are drawn again.
    Replay,
    /// A running mean of estimates of unit size, relative to the size of the weight (13.4).
    Normalised,
    /// A running mean of estimates by the root of that of their squares, for each entry.
    Adam,
}

impl Optimiser {
    /// The next value of a weight.
    pub(crate) fn step(self, cx: &mut Cx<'_>, rule: &UpdateRule, w: &Weight, g: Value, lr: Value) -> Built {
        match self {
            Optimiser::Sgd => sgd::step(cx, rule, w, g, lr),
            // A gradient cannot be drawn again.
            Optimiser::Momentum | Optimiser::Replay => momentum::step(cx, rule, w, g, lr),
            Optimiser::Adam => adam::step(cx, rule, w, g, lr),
            Optimiser::Normalised => normalised::step(cx, rule, w, g, lr),
        }
    }
}

/// Memory of a weight by name, of its shape.
fn memory(cx: &mut Cx<'_>, what: &str, w: &Weight) -> (String, Value) {
    let (name, dims) = (format!("{MEMORY}{what}.{}", w.name), cx.dims(w.v));
    let v = cx.g.param(&name, Type::f32(&dims));
    (name, v)
}

/// `w (1 - lr wd)` for ternary weights, `w` for others.
fn decayed(cx: &mut Cx<'_>, rule: &UpdateRule, w: &Weight, lr: Value) -> Built {
    if w.kind != WeightKind::Ternary || rule.weight_decay == 0.0 {
        return Ok(w.v);
    }
    let keep = cx.affine(lr, -rule.weight_decay, 1.0)?;
    cx.binary(BinaryFn::Mul, w.v, keep)
}
