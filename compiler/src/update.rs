//! The update of weights from the scalars of a zeroth-order step, as a graph (semantics 13.1, 13.4).

use std::collections::HashMap;

use chimera_ir::{
    Graph, Tensor, Type, Value,
    ops::{Balance, GroupScale, InferError, ScaleMode},
    plan::WeightKind,
};

use crate::{
    estimators::{Cx, Scales, Scheme, Weight},
    optimisers::{Optimiser, replay::Past},
    passes::grad::GRAD,
};

/// How an estimate becomes a step.
#[derive(Clone, Debug, PartialEq)]
pub struct UpdateRule {
    /// What makes a step of an estimate; that of the scheme when absent.
    pub optimiser: Option<Optimiser>,
    /// Decay of a running mean of estimates.
    pub momentum: f32,
    /// Steps whose estimates [`Optimiser::Replay`] draws again.
    pub history: usize,
    /// Decay of a running mean of squares.
    pub second: f32,
    /// Step scale of vectors where steps are relative to the size of a weight.
    pub vec_scale: f32,
    /// Weight decay of ternary matrices.
    pub weight_decay: f32,
    /// Rate of the expert balance, from `load.*` inputs; 0 leaves selection biases alone.
    pub balance: f32,
}

impl Default for UpdateRule {
    fn default() -> UpdateRule {
        UpdateRule {
            optimiser: None,
            momentum: 0.9,
            history: 50,
            second: 0.999,
            vec_scale: 0.02,
            weight_decay: 0.0,
            balance: 0.0,
        }
    }
}

/// A weight to update.
#[derive(Clone, Debug)]
pub struct Target {
    /// Name.
    pub name: String,
    /// Shape.
    pub dims: Vec<usize>,
    /// Kind.
    pub kind: WeightKind,
    /// Whether its gradient is in a state `grad.NAME` and stands in place of an estimate.
    pub exact: bool,
}

/// How ternary weights are quantised.
#[derive(Clone, Copy, Debug)]
pub struct Quantised {
    /// How many weights share a scale.
    pub mode: ScaleMode,
    /// Share of the scale above which a weight is not zero.
    pub ratio: f32,
}

impl Quantised {
    /// The scales of a latent.
    pub(crate) fn scales(&self, g: &mut Graph, v: Value) -> Result<Scales, InferError> {
        let columns = g.ty(v).cols();
        let alpha = g.op(GroupScale { mode: self.mode }, &[v])?;
        let group = match self.mode {
            ScaleMode::PerGroup(n) => n,
            ScaleMode::PerRow | ScaleMode::PerTensor => columns,
        };
        Ok(Scales { alpha, group, ratio: self.ratio })
    }
}

/// The update graph. Inputs: `c` (`f32 [M]`), `seed`, `step`, `lr` (`f32 [1]`), and with balance `load.<layer>` for each router.
pub fn graph(
    scheme: &Scheme,
    rule: &UpdateRule,
    members: usize,
    targets: &[Target],
    quantised: &Quantised,
) -> Result<Graph, InferError> {
    let mut g = Graph::default();
    g.at("update");
    let c = g.input("c", Type::f32(&[members]));
    let seed = g.input("seed", Type::i32(&[2]));
    let step = g.input("step", Type::i32(&[1]));
    let lr = g.input("lr", Type::f32(&[1]));
    let first = g.constant(Tensor::i32(&[1], vec![0]));
    let loads: HashMap<String, Value> = targets
        .iter()
        .filter(|t| t.kind == WeightKind::Buffer && rule.balance > 0.0)
        .map(|t| (t.name.clone(), g.input(load_name(&t.name), Type::i32(&t.dims))))
        .collect();
    let estimator = scheme.estimator();
    let optimiser = rule.optimiser.unwrap_or_else(|| estimator.optimiser());
    let past = match optimiser {
        Optimiser::Replay => {
            let mut cx = Cx { g: &mut g, random: [seed, step, first], members };
            Some(Past::read(&mut cx, rule, c)?)
        }
        _ => None,
    };
    for t in targets {
        g.at(t.name.rsplit_once('.').map_or("update", |(site, _)| site));
        let v = g.param(&t.name, Type::f32(&t.dims));
        let scales = match t.kind {
            WeightKind::Ternary => Some(quantised.scales(&mut g, v)?),
            _ => None,
        };
        let w = Weight { name: t.name.clone(), kind: t.kind, v, scales };
        let next = match t.kind {
            WeightKind::Buffer => match loads.get(&t.name) {
                Some(&load) => g.op(Balance { rate: rule.balance }, &[w.v, load])?,
                None => continue,
            },
            WeightKind::Optimizer | WeightKind::Packed => continue,
            _ if t.exact => {
                let gradient = g.state(format!("{GRAD}{}", t.name), Type::f32(&t.dims));
                let mut cx = Cx { g: &mut g, random: [seed, step, first], members };
                optimiser.step(&mut cx, rule, &w, gradient, lr)?
            }
            _ => {
                let mut cx = Cx { g: &mut g, random: [seed, step, first], members };
                match &past {
                    None => estimator.moved(&mut cx, &w, c, &|cx, w, g| optimiser.step(cx, rule, w, g, lr))?,
                    Some(past) => estimator.moved(&mut cx, &w, c, &|cx, target, g| {
                        let sum = past.sum(cx, estimator, rule.momentum, &w, g)?;
                        Optimiser::Sgd.step(cx, rule, target, sum, lr)
                    })?,
                }
            }
        };
        g.writes.push((w.name, next));
    }
    g.verify()?;
    Ok(g)
}

/// The side output that holds the load behind a selection bias.
pub(crate) fn load_name(bias: &str) -> String {
    format!("load.{}", bias.trim_end_matches(".gate.e_score_correction_bias"))
}
