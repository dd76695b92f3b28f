//! Momentum without memory of the size of the weights: `M = sum over j of mu^j g_{t-j}`, whose estimates are drawn again from the
//! scalars of the last steps (semantics 13.2).
//!
//! The scalars are weights of the plan, so checkpoints hold them. An earlier estimate is what the present step would make of its scalars
//! and directions: a probe size that is relative to a weight is that of the weight now.

use chimera_ir::{
    Type, Value,
    ops::{BinaryFn, EarlierStep, InferError},
};

use super::MEMORY;
use crate::estimators::{Built, Cx, Estimator, Weight};
use crate::update::UpdateRule;

/// The scalars of earlier steps and the numbers of these, the latest first.
pub(crate) struct Past(Vec<(Value, Value)>);

impl Past {
    /// The last `rule.history` steps; their scalars move on by one place, behind those of this step.
    pub(crate) fn read(cx: &mut Cx<'_>, rule: &UpdateRule, c: Value) -> Result<Past, InferError> {
        let (ty, mut newer) = (Type::f32(&[cx.members]), c);
        let (mut past, mut writes) = (vec![], vec![]);
        for by in 1..=rule.history {
            let name = format!("{MEMORY}past.{by}");
            let old = cx.g.param(&name, ty.clone());
            writes.push((name, newer));
            past.push((old, cx.op(EarlierStep { by }, &[cx.random[1]])?));
            newer = old;
        }
        // Oldest first: every place is read before it is written.
        cx.g.writes.extend(writes.into_iter().rev());
        Ok(Past(past))
    }

    /// The estimate `g` for a weight and the fading ones before it.
    pub(crate) fn sum(&self, cx: &mut Cx<'_>, row: &dyn Estimator, mu: f32, w: &Weight, g: Value) -> Built {
        let (now, mut sum, mut fade) = (cx.random[1], g, 1.0);
        for &(c, step) in &self.0 {
            fade *= mu;
            let c = cx.affine(c, fade, 0.0)?;
            cx.random[1] = step;
            let old = row.estimate(cx, w, c);
            cx.random[1] = now;
            sum = cx.binary(BinaryFn::Add, sum, old?)?;
        }
        Ok(sum)
    }
}
