//! `M <- mu M + (1 - mu) g / rms(g)`, `w <- w (1 - lr wd) - lr scale M / sqrt((1 - mu) / (1 + mu))` (semantics 13.4).
//!
//! The scale is the mean magnitude of a matrix, and a constant for vectors; the root is the size of a running mean of noise.

use chimera_ir::{
    Value,
    ops::{BinaryFn, RmsScalar},
    plan::WeightKind,
};

use super::{decayed, memory};
use crate::estimators::{Built, Cx, Weight};
use crate::update::UpdateRule;

/// The next value of a weight.
pub(super) fn step(cx: &mut Cx<'_>, rule: &UpdateRule, w: &Weight, g: Value, lr: Value) -> Built {
    let mu = rule.momentum;
    let rms = cx.op(RmsScalar {}, &[g])?;
    let rms = cx.affine(rms, 1.0, 1e-12)?;
    let g = cx.binary(BinaryFn::Div, g, rms)?;
    let g = cx.affine(g, 1.0 - mu, 0.0)?;
    let (name, m) = memory(cx, "momentum", w);
    let m = cx.affine(m, mu, 0.0)?;
    let m = cx.binary(BinaryFn::Add, g, m)?;
    cx.g.writes.push((name, m));
    let scale = if w.kind == WeightKind::Vector {
        cx.affine(lr, rule.vec_scale, 0.0)?
    } else {
        let mean = cx.magnitude(w.v, 1e-3)?;
        cx.binary(BinaryFn::Mul, mean, lr)?
    };
    let step = cx.binary(BinaryFn::Mul, m, scale)?;
    let step = cx.affine(step, -1.0 / ((1.0 - mu) / (1.0 + mu)).sqrt(), 0.0)?;
    let kept = decayed(cx, rule, w, lr)?;
    cx.binary(BinaryFn::Add, step, kept)
}
