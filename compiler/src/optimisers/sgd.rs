//! `w <- w (1 - lr wd) - lr g`, decay on ternary weights only (semantics 13.1).

use chimera_ir::{Value, ops::BinaryFn};

use super::decayed;
use crate::estimators::{Built, Cx, Weight};
use crate::update::UpdateRule;

/// The next value of a weight.
pub(super) fn step(cx: &mut Cx<'_>, rule: &UpdateRule, w: &Weight, g: Value, lr: Value) -> Built {
    let step = cx.binary(BinaryFn::Mul, g, lr)?;
    let step = cx.affine(step, -1.0, 0.0)?;
    let kept = decayed(cx, rule, w, lr)?;
    cx.binary(BinaryFn::Add, step, kept)
}
