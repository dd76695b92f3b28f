//! `M <- mu M + g`, `w <- w (1 - lr wd) - lr M` (semantics 13.2).

use chimera_ir::{Value, ops::BinaryFn};

use super::{memory, sgd};
use crate::estimators::{Built, Cx, Weight};
use crate::update::UpdateRule;

/// The next value of a weight.
pub(super) fn step(cx: &mut Cx<'_>, rule: &UpdateRule, w: &Weight, g: Value, lr: Value) -> Built {
    let (name, m) = memory(cx, "momentum", w);
    let m = cx.affine(m, rule.momentum, 0.0)?;
    let m = cx.binary(BinaryFn::Add, m, g)?;
    cx.g.writes.push((name, m));
    sgd::step(cx, rule, w, m, lr)
}
