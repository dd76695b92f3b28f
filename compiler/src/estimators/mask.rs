//! Which entries of a weight have a direction at all (semantics 13.2, 14 P3).
//!
//! Masks of magnitudes, of chance and of a score are made by an entry point of their own every so many steps and kept with the
//! weights, so that a resumed run has them; the mask at the boundary of ternary codes is made anew in every step.

use chimera_ir::{
    DType, Graph, Tensor, Type, Value,
    ops::{self, BoundaryMask, Distribution, InferError, Random, TopMask},
    plan::WeightKind,
};

use super::{Built, Cx, Reach, Scheme, Weight};
use crate::{optimisers::MEMORY, update::Target};

/// What is probed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mask {
    /// Everything.
    Dense,
    /// Ternary weights whose code differs between both probes; everything else.
    Boundary,
    /// A share of the entries of every tensor.
    Kept {
        /// Which come first.
        by: Score,
        /// The share.
        share: f32,
        /// Steps from one choice to the next.
        refresh: usize,
    },
}

/// What decides which entries come first; of equals the one with the lowest index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Small magnitude (Sparse MeZO).
    Small,
    /// Large magnitude.
    Large,
    /// Chance.
    Random,
    /// Large values of the tensor `optim.fisher.NAME` (SensZOQ).
    Fisher,
}

impl Mask {
    /// Steps from one choice to the next, where choices are kept.
    pub fn refresh(self) -> Option<usize> {
        match self {
            Mask::Kept { refresh, .. } => Some(refresh),
            Mask::Dense | Mask::Boundary => None,
        }
    }
}

/// The kept mask of a weight.
pub(super) fn kept(cx: &mut Cx<'_>, w: &Weight) -> Value {
    let dims = cx.dims(w.v);
    cx.g.param(&format!("{MEMORY}mask.{}", w.name), Type::f32(&dims))
}

/// The mask of a latent whose probes have size `eps`.
pub(super) fn boundary(cx: &mut Cx<'_>, w: &Weight, eps: Value) -> Built {
    let scales = w.scales.as_ref().ok_or_else(|| InferError::new("probe", format!("{} has no scales", w.name)))?;
    cx.op(BoundaryMask { group: scales.group, ratio: scales.ratio }, &[w.v, scales.alpha, eps])
}

/// The graph that chooses: inputs `seed` and `step`, and a write for each of the weights (name and shape).
pub(crate) fn graph(by: Score, share: f32, weights: &[(String, Vec<usize>)]) -> Built<Graph> {
    let mut g = Graph::default();
    g.at("mask");
    let seed = g.input("seed", Type::i32(&[2]));
    let step = g.input("step", Type::i32(&[1]));
    let first = g.constant(Tensor::i32(&[1], vec![0]));
    for (name, dims) in weights {
        let score = match by {
            Score::Small | Score::Large => g.param(name, Type::f32(dims)),
            Score::Fisher => g.param(&format!("{FISHER}{name}"), Type::f32(dims)),
            Score::Random => {
                let stream = g.constant(ops::stream(&format!("{name}#mask")));
                let op = Random { dist: Distribution::Uniform, shape: dims.clone(), members: 0, dtype: DType::F32 };
                g.op(op, &[seed, step, first, stream])?
            }
        };
        let n: usize = dims.iter().product();
        let keep = (f64::from(share) * n as f64 - 1e-9 * n as f64).ceil().clamp(1.0, n as f64) as usize;
        let mask = g.op(TopMask { keep, largest: by != Score::Small }, &[score])?;
        g.writes.push((format!("{MEMORY}mask.{name}"), mask));
    }
    g.verify()?;
    Ok(g)
}

/// The weights among targets whose mask a scheme keeps: name and shape.
pub(crate) fn masked(scheme: &Scheme, targets: &[Target]) -> Vec<(String, Vec<usize>)> {
    let probed = |t: &&Target| !matches!(t.kind, WeightKind::Buffer | WeightKind::Optimizer | WeightKind::Packed);
    let of = |t: &Target| (t.name.clone(), t.dims.clone());
    let chosen = targets
        .iter()
        .filter(|t| !t.exact)
        .filter(probed)
        .filter(|t| scheme.estimator().reach(t.kind) != Reach::Scales);
    chosen.map(of).collect()
}

/// The prefix of the names of given scores.
pub const FISHER: &str = "optim.fisher.";
