//! Every sequence of a batch has a direction of its own, tried with both signs (semantics 13.4).
//!
//! Low-rank on matrices, where it stands behind the product and leaves packed codes alone; dense on vectors.

use chimera_ir::{
    Tensor, Value,
    ops::{
        BinaryFn, CrossEntropy, Distribution, EmbedRank, LowRankGrad, MemberDot, Probe, RankUpdate, Reshape, Stack,
        WeightedSum,
    },
    plan::{Comparison, WeightKind},
};

use super::{Built, Cx, Estimator, Reach, Site, SiteKind, Weight};
use crate::optimisers::Optimiser;

/// Probes of single sequences.
#[derive(Clone, Debug, PartialEq)]
pub struct PerSequence {
    /// Rank of the probes on matrices.
    pub rank: usize,
    /// Probe size on matrices relative to the mean magnitude of the weight.
    pub kappa: f32,
    /// Probe size on vectors.
    pub sigma_vec: f32,
    /// Consecutive sequences that share a direction.
    pub group: usize,
}

impl Default for PerSequence {
    fn default() -> PerSequence {
        PerSequence { rank: 1, kappa: 0.1, sigma_vec: 0.01, group: 1 }
    }
}

impl PerSequence {
    /// `A [M, m, r]` and `B [M, n, r]`.
    fn factors(&self, cx: &mut Cx<'_>, w: &Weight) -> Built<[Value; 2]> {
        let [m, n] = cx.matrix(w)?;
        let a = cx.draw(&format!("{}#A", w.name), &[m, self.rank], Distribution::Gaussian)?;
        Ok([a, cx.draw(&format!("{}#B", w.name), &[n, self.rank], Distribution::Gaussian)?])
    }

    /// `kappa max(mean|W|, 1e-3) / sqrt(rank)`.
    fn scale(&self, cx: &mut Cx<'_>, w: &Weight) -> Built {
        let mean = cx.magnitude(w.v, 1e-3)?;
        cx.affine(mean, self.kappa / (self.rank as f32).sqrt(), 0.0)
    }
}

/// A value with one long row for each probe, `[2 M, .., columns]`.
fn joined(cx: &mut Cx<'_>, v: Value) -> Built {
    let (probes, dims) = (2 * cx.members, cx.dims(v));
    if dims.len() < 2 || dims[0] == probes || !dims[0].is_multiple_of(probes) {
        return Ok(v);
    }
    let mut joined = vec![probes, dims[0] / probes * dims[1]];
    joined.extend(&dims[2..]);
    cx.op(Reshape { dims: joined }, &[v])
}

impl Estimator for PerSequence {
    fn members(&self, rows: usize) -> usize {
        rows / self.group.max(1)
    }

    fn comparison(&self) -> Comparison {
        Comparison::PerSequence
    }

    fn copies(&self, _: usize) -> usize {
        2
    }

    fn groups(&self, rows: usize) -> usize {
        2 * self.members(rows)
    }

    fn reach(&self, kind: WeightKind) -> Reach {
        if kind == WeightKind::Vector { Reach::Weight } else { Reach::Product }
    }

    fn perturbed(&self, cx: &mut Cx<'_>, w: &Weight) -> Built {
        let shape = cx.dims(w.v);
        let z = cx.draw(&w.name, &shape, Distribution::Gaussian)?;
        let eps = cx.number(self.sigma_vec);
        cx.op(Probe { one_sided: false }, &[w.v, z, eps])
    }

    fn corrected(&self, cx: &mut Cx<'_>, site: &Site) -> Built {
        let (rank, members) = (self.rank, cx.members);
        let (y, first, dims) = (site.y, &site.weights[0], cx.dims(site.y));
        let tokens = cx.dims(site.x);
        // Sequences that share a direction are one long row.
        let x = joined(cx, site.x)?;
        match site.kind {
            SiteKind::Embed => {
                let [a, b] = self.factors(cx, first)?;
                let scale = self.scale(cx, first)?;
                let y = joined(cx, y)?;
                let y = cx.op(EmbedRank { rank, members }, &[y, x, a, b, scale])?;
                cx.op(Reshape { dims }, &[y])
            }
            SiteKind::Loss { vocab, panels, labels } => {
                let [a, b] = self.factors(cx, first)?;
                let u = cx.op(MemberDot { rank, members, gathered: None }, &[x, b])?;
                let scale = self.scale(cx, first)?;
                let signs: Vec<f32> = (0..2 * members).map(|r| if r < members { 1.0 } else { -1.0 }).collect();
                let signs = cx.g.constant(Tensor::f32(&[2 * members, 1], signs));
                let u = cx.binary(BinaryFn::Mul, u, signs)?;
                let u = cx.binary(BinaryFn::Mul, u, scale)?;
                let u = cx.op(Reshape { dims: vec![tokens[0], tokens[1], rank] }, &[u])?;
                cx.op(CrossEntropy { vocab }, &[site.x, panels, labels, u, a])
            }
            SiteKind::Grouped { order, index, slots: (k, tokens), .. } => {
                let rows = cx.dims(index)[0] / (2 * members);
                let gathered = Some((k, tokens * rows));
                let index = cx.op(Reshape { dims: vec![2 * members, tokens * rows, k] }, &[index])?;
                let (mut a, mut b, mut scale) = (vec![], vec![], vec![]);
                for w in &site.weights {
                    let [fa, fb] = self.factors(cx, w)?;
                    a.push(fa);
                    b.push(fb);
                    scale.push(self.scale(cx, w)?);
                }
                let n = site.weights.len();
                let [a, b, scale] = [a, b, scale].map(|parts| cx.op(Stack { n }, &parts));
                let u = cx.op(MemberDot { rank, members, gathered }, &[site.x, b?, order, index])?;
                cx.op(RankUpdate { rank, members, gathered }, &[y, u, a?, scale?, order, index])
            }
            SiteKind::Product => {
                let [a, b] = self.factors(cx, first)?;
                let scale = self.scale(cx, first)?;
                let u = cx.op(MemberDot { rank, members, gathered: None }, &[x, b])?;
                let y = joined(cx, y)?;
                let y = cx.op(RankUpdate { rank, members, gathered: None }, &[y, u, a, scale])?;
                cx.op(Reshape { dims }, &[y])
            }
        }
    }

    fn estimate(&self, cx: &mut Cx<'_>, w: &Weight, c: Value) -> Built {
        if w.kind == WeightKind::Vector {
            let shape = cx.dims(w.v);
            let xi = cx.draw(&w.name, &shape, Distribution::Gaussian)?;
            return cx.op(WeightedSum {}, &[c, xi]);
        }
        let [a, b] = self.factors(cx, w)?;
        cx.op(LowRankGrad { rank: self.rank }, &[c, a, b])
    }

    /// Differences of losses grow with the size of the probe, and with the rank that shares it.
    fn gradient(&self, cx: &mut Cx<'_>, w: &Weight, c: Value) -> Built {
        let g = self.estimate(cx, w, c)?;
        if w.kind == WeightKind::Vector {
            return cx.affine(g, 1.0 / self.sigma_vec, 0.0);
        }
        let scale = self.scale(cx, w)?;
        let width = cx.affine(scale, self.rank as f32, 0.0)?;
        cx.binary(BinaryFn::Div, g, width)
    }

    fn optimiser(&self) -> Optimiser {
        Optimiser::Normalised
    }
}
