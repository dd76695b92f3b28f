//! Adam on the estimate, decay on ternary weights only (semantics 12.1, 13.2).
//!
//! The corrections for the start are running means of ones, one for the whole plan each, so nothing but memory counts steps.

use chimera_ir::{
    Type, Value,
    ops::{BinaryFn, InferError},
};

use super::{MEMORY, decayed, memory};
use crate::estimators::{Built, Cx, Weight};
use crate::update::UpdateRule;

/// What keeps the quotient finite.
const EPS: f32 = 1e-8;

/// `decay x + (1 - decay) y`.
fn mean(cx: &mut Cx<'_>, decay: f32, x: Value, y: Value) -> Built {
    let (x, y) = (cx.affine(x, decay, 0.0)?, cx.affine(y, 1.0 - decay, 0.0)?);
    cx.binary(BinaryFn::Add, x, y)
}

/// `1 - decay^t` behind step `t`, the running mean of ones.
fn ones(cx: &mut Cx<'_>, what: &str, decay: f32) -> Result<Value, InferError> {
    let name = format!("{MEMORY}adam.{what}");
    let found = cx.g.writes.iter().find(|(n, _)| *n == name).map(|(_, v)| *v);
    if let Some(v) = found {
        return Ok(v);
    }
    let before = cx.g.param(&name, Type::f32(&[1]));
    let v = cx.affine(before, decay, 1.0 - decay)?;
    cx.g.writes.push((name, v));
    Ok(v)
}

/// The next value of a weight.
pub(super) fn step(cx: &mut Cx<'_>, rule: &UpdateRule, w: &Weight, g: Value, lr: Value) -> Built {
    let [one, two] = [ones(cx, "first", rule.momentum)?, ones(cx, "second", rule.second)?];
    let (first, m) = memory(cx, "first", w);
    let (second, v) = memory(cx, "second", w);
    let m = mean(cx, rule.momentum, m, g)?;
    let square = cx.binary(BinaryFn::Mul, g, g)?;
    let v = mean(cx, rule.second, v, square)?;
    cx.g.writes.push((first, m));
    cx.g.writes.push((second, v));
    let (m, v) = (cx.binary(BinaryFn::Div, m, one)?, cx.binary(BinaryFn::Div, v, two)?);
    let root = cx.root(v)?;
    let root = cx.affine(root, 1.0, EPS)?;
    let step = cx.binary(BinaryFn::Div, m, root)?;
    let step = cx.binary(BinaryFn::Mul, step, lr)?;
    let step = cx.affine(step, -1.0, 0.0)?;
    let kept = decayed(cx, rule, w, lr)?;
    cx.binary(BinaryFn::Add, step, kept)
}
