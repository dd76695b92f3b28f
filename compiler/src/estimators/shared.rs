//! All sequences share each direction (semantics 13.1 to 13.3).
//!
//! A direction has an entry for each weight. Ternary weights are reached in one of several modes; all others are read with the probe
//! added to them.

use chimera_ir::{
    Value,
    ops::{
        BinaryFn, Distribution, InferError, Linear, LowRankGrad, MemberDot, PackPanels, Probe, RankUpdate, Reshape,
        ScaleGroups, Stack, StochasticRound, Unary, UnaryFn, WeightedSum,
    },
    plan::{Comparison, WeightKind},
};

use super::{Built, Cx, Estimator, Family, Mask, Reach, Site, SiteKind, StepOf, Weight, mask};
use crate::optimisers::Optimiser;

/// How probes reach ternary weights (semantics 13.3).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// A: latents are perturbed and quantised again with their own scales.
    Requantise,
    /// B: codes stay, each scale is multiplied by `1 +- eps z` and the latents of its group by what the step makes of 1.
    Scales,
    /// C: noise is added to the product with the quantised weight; the latent takes the step.
    Additive,
    /// D: latents are integers from -127 to 127 times a unit; probes and steps are rounded to them by chance, independently.
    Integer {
        /// The unit.
        unit: f32,
    },
}

/// Greatest integer of mode D.
const LIMIT: f32 = 127.0;

/// Probes that all sequences share.
#[derive(Clone, Debug, PartialEq)]
pub struct Shared {
    /// How ternary weights are reached.
    pub mode: Mode,
    /// Number of directions.
    pub directions: usize,
    /// Whether directions are tried forward only and compared with the weights as they are.
    pub one_sided: bool,
    /// Whether steps are divided by the spread of the losses (FZOO).
    pub scaled: bool,
    /// What directions are.
    pub family: Family,
    /// What is probed.
    pub mask: Mask,
    /// Probe size.
    pub eps: f32,
    /// Probe size on ternary matrices relative to their mean magnitude, instead of `eps`.
    pub eps_rel: Option<f32>,
}

impl Default for Shared {
    fn default() -> Shared {
        Shared {
            mode: Mode::Requantise,
            directions: 1,
            one_sided: false,
            scaled: false,
            family: Family::Dense(Distribution::Rademacher),
            mask: Mask::Dense,
            eps: 1e-3,
            eps_rel: None,
        }
    }
}

impl Shared {
    fn probe(&self) -> Probe {
        Probe { one_sided: self.one_sided }
    }

    /// Whether the scales of this weight are probed and nothing else.
    fn scales_of(&self, w: &Weight) -> bool {
        w.kind == WeightKind::Ternary && self.mode == Mode::Scales
    }

    /// The rank of the directions of a weight, if they have factors.
    fn rank(&self, cx: &Cx<'_>, w: &Weight) -> Option<usize> {
        match cx.dims(w.v)[..] {
            [m, n] if w.kind != WeightKind::Vector => self.family.rank(m, n),
            _ => None,
        }
    }

    /// The directions of a weight, `[M, ...]`.
    fn directions(&self, cx: &mut Cx<'_>, w: &Weight) -> Built {
        let dims = cx.dims(w.v);
        match self.rank(cx, w) {
            Some(rank) => self.family.products(cx, w, rank),
            None => cx.draw(&w.name, &dims, self.family.entries()),
        }
    }

    /// The mask of the directions of a weight, if it has one; `update` where it is for the update.
    fn mask(&self, cx: &mut Cx<'_>, w: &Weight, eps: Value, update: bool) -> Built<Option<Value>> {
        match self.mask {
            Mask::Dense => Ok(None),
            Mask::Kept { .. } => Ok(Some(mask::kept(cx, w))),
            Mask::Boundary if w.kind != WeightKind::Ternary || self.mode != Mode::Requantise => Ok(None),
            // With entries of one magnitude no code beyond the boundary can change: the probe is the same without.
            Mask::Boundary if !update && self.family == Family::Dense(Distribution::Rademacher) => Ok(None),
            Mask::Boundary => mask::boundary(cx, w, eps).map(Some),
        }
    }

    /// The probe size on ternary weights that is relative to them.
    fn relative(&self, w: &Weight) -> Option<f32> {
        self.eps_rel.filter(|_| w.kind == WeightKind::Ternary && self.mode != Mode::Scales)
    }

    fn size(&self, cx: &mut Cx<'_>, w: &Weight) -> Built {
        match self.relative(w) {
            None => Ok(cx.number(self.eps)),
            Some(rel) => {
                let mean = cx.magnitude(w.v, 0.0)?;
                cx.affine(mean, rel, 0.0)
            }
        }
    }

    /// `base +- eps z`, with a group for each probe in front.
    fn around(&self, cx: &mut Cx<'_>, w: &Weight, base: Value) -> Built {
        let z = self.directions(cx, w)?;
        let eps = self.size(cx, w)?;
        let mask = self.mask(cx, w, eps, false)?;
        if let (Mode::Integer { unit }, WeightKind::Ternary) = (self.mode, w.kind) {
            let scaled = cx.binary(BinaryFn::Mul, z, eps)?;
            let dims = cx.dims(w.v);
            let chance = cx.draw(&format!("{}#probe", w.name), &dims, Distribution::Uniform)?;
            let z = cx.op(StochasticRound { unit, limit: LIMIT }, &[scaled, chance])?;
            let one = cx.number(1.0);
            let ins: Vec<Value> = [base, z, one].into_iter().chain(mask).collect();
            return cx.op(self.probe(), &ins);
        }
        let ins: Vec<Value> = [base, z, eps].into_iter().chain(mask).collect();
        cx.op(self.probe(), &ins)
    }

    /// `x (+-eps A B^T)^T` behind the product: two thin products for each row.
    fn thin(&self, cx: &mut Cx<'_>, site: &Site, rank: usize) -> Built {
        let members = cx.members;
        let probes = 2 * members;
        // One long row for each probe.
        let whole = |cx: &mut Cx<'_>, v: Value| {
            let ty = cx.g.ty(v).clone();
            cx.op(Reshape { dims: vec![probes, ty.rows() / probes, ty.cols()] }, &[v])
        };
        let dims = cx.dims(site.y);
        match site.kind {
            SiteKind::Grouped { order, index, slots: (k, tokens), .. } => {
                let rows = cx.dims(index)[0] / probes;
                let gathered = Some((k, tokens * rows));
                let index = cx.op(Reshape { dims: vec![probes, tokens * rows, k] }, &[index])?;
                let (mut a, mut b, mut scale) = (vec![], vec![], vec![]);
                for w in &site.weights {
                    let [left, right] = self.family.factors(cx, w)?;
                    a.push(left);
                    b.push(right);
                    scale.push(self.size(cx, w)?);
                }
                let n = site.weights.len();
                let [a, b, scale] = [a, b, scale].map(|parts| cx.op(Stack { n }, &parts));
                let u = cx.op(MemberDot { rank, members, gathered }, &[site.x, b?, order, index])?;
                cx.op(RankUpdate { rank, members, gathered }, &[site.y, u, a?, scale?, order, index])
            }
            _ => {
                let w = &site.weights[0];
                let [a, b] = self.family.factors(cx, w)?;
                let scale = self.size(cx, w)?;
                let (x, y) = (whole(cx, site.x)?, whole(cx, site.y)?);
                let u = cx.op(MemberDot { rank, members, gathered: None }, &[x, b])?;
                let y = cx.op(RankUpdate { rank, members, gathered: None }, &[y, u, a, scale])?;
                cx.op(Reshape { dims }, &[y])
            }
        }
    }
}

impl Estimator for Shared {
    fn members(&self, _: usize) -> usize {
        self.directions
    }

    fn comparison(&self) -> Comparison {
        match (self.one_sided, self.scaled) {
            (false, false) => Comparison::TwoSided,
            (false, true) => Comparison::TwoSidedScaled,
            (true, false) => Comparison::OneSided,
            (true, true) => Comparison::OneSidedScaled,
        }
    }

    fn copies(&self, rows: usize) -> usize {
        self.groups(rows)
    }

    fn groups(&self, _: usize) -> usize {
        if self.one_sided { self.directions + 1 } else { 2 * self.directions }
    }

    fn reach(&self, kind: WeightKind) -> Reach {
        match (kind, self.mode) {
            (WeightKind::Ternary, Mode::Requantise | Mode::Integer { .. }) => Reach::Codes,
            (WeightKind::Ternary, Mode::Scales) => Reach::Scales,
            (WeightKind::Ternary, Mode::Additive) => Reach::Product,
            _ => Reach::Weight,
        }
    }

    fn mask(&self) -> Mask {
        self.mask
    }

    fn perturbed(&self, cx: &mut Cx<'_>, w: &Weight) -> Built {
        self.around(cx, w, w.v)
    }

    /// `1 +- eps z` for each scale.
    fn factors(&self, cx: &mut Cx<'_>, w: &Weight) -> Built {
        let alpha = scales(w)?;
        let z = cx.draw(&format!("{}#alpha", w.name), &cx.dims(alpha), self.family.entries())?;
        let ones = cx.affine(alpha, 0.0, 1.0)?;
        let eps = cx.number(self.eps);
        cx.op(self.probe(), &[ones, z, eps])
    }

    /// `y + x (+-eps z)^T`.
    fn corrected(&self, cx: &mut Cx<'_>, site: &Site) -> Built {
        let offsets = match site.kind {
            SiteKind::Product => None,
            SiteKind::Grouped { offsets, .. } => Some(offsets),
            SiteKind::Embed | SiteKind::Loss { .. } => {
                return Err(InferError::new("probe", "a shared direction reaches an embedding by itself"));
            }
        };
        if let (Some(rank), Mask::Dense | Mask::Boundary, false) =
            (self.rank(cx, &site.weights[0]), self.mask, self.one_sided)
        {
            return self.thin(cx, site, rank);
        }
        let mut panels = vec![];
        for w in &site.weights {
            let zero = cx.affine(w.v, 0.0, 0.0)?;
            let noise = self.around(cx, w, zero)?;
            panels.push(cx.op(PackPanels {}, &[noise])?);
        }
        if offsets.is_some() {
            // [E, G, ..] to [E G, ..]: rows sorted by expert, then by probe, find their weight.
            let stacked = cx.op(Stack { n: panels.len() }, &panels)?;
            let mut dims = cx.dims(stacked);
            let groups = dims[0] * dims[1];
            dims.splice(..2, [groups]);
            panels = vec![cx.op(Reshape { dims }, &[stacked])?];
        }
        let m = cx.g.ty(site.y).cols();
        let ins: Vec<Value> = [site.x, panels[0]].into_iter().chain(offsets).collect();
        let add = cx.op(Linear { m, grouped_rows: offsets.is_some() }, &ins)?;
        cx.binary(BinaryFn::Add, site.y, add)
    }

    /// `1/K sum_k c_k / d z_k` with `d` the distance of the two probes that `c` compares.
    fn estimate(&self, cx: &mut Cx<'_>, w: &Weight, c: Value) -> Built {
        let sides = if self.one_sided { 1.0 } else { 2.0 };
        let c = match self.relative(w) {
            None => cx.affine(c, 1.0 / (sides * self.eps), 0.0)?,
            Some(rel) => {
                let mean = cx.magnitude(w.v, 0.0)?;
                let width = cx.affine(mean, sides * rel, 0.0)?;
                cx.binary(BinaryFn::Div, c, width)?
            }
        };
        if self.scales_of(w) {
            let z = cx.draw(&format!("{}#alpha", w.name), &cx.dims(scales(w)?), self.family.entries())?;
            return cx.op(WeightedSum {}, &[c, z]);
        }
        let g = match self.rank(cx, w) {
            Some(rank) => {
                let [a, b] = self.family.factors(cx, w)?;
                cx.op(LowRankGrad { rank }, &[c, a, b])?
            }
            None => {
                let z = self.directions(cx, w)?;
                cx.op(WeightedSum {}, &[c, z])?
            }
        };
        let eps = self.size(cx, w)?;
        match self.mask(cx, w, eps, true)? {
            Some(mask) => cx.binary(BinaryFn::Mul, g, mask),
            None => Ok(g),
        }
    }

    /// Where scales are probed, what their estimate makes of the latents that carry them.
    fn gradient(&self, cx: &mut Cx<'_>, w: &Weight, c: Value) -> Built {
        let g = self.estimate(cx, w, c)?;
        if !self.scales_of(w) {
            return Ok(g);
        }
        let group = w.scales.as_ref().map_or(0, |s| s.group);
        cx.op(ScaleGroups { group }, &[w.v, g])
    }

    fn moved(&self, cx: &mut Cx<'_>, w: &Weight, c: Value, step: &StepOf<'_>) -> Built {
        let g = self.estimate(cx, w, c)?;
        if self.scales_of(w) {
            let group = w.scales.as_ref().map_or(0, |s| s.group);
            let ones = cx.affine(scales(w)?, 0.0, 1.0)?;
            let scale = Weight { name: format!("{}#alpha", w.name), kind: WeightKind::Vector, v: ones, scales: None };
            let factor = step(cx, &scale, g)?;
            let factor = cx.op(Unary { f: UnaryFn::Relu }, &[factor])?;
            return cx.op(ScaleGroups { group }, &[w.v, factor]);
        }
        let next = step(cx, w, g)?;
        let (Mode::Integer { unit }, WeightKind::Ternary) = (self.mode, w.kind) else { return Ok(next) };
        let dims = cx.dims(w.v);
        let chance = cx.draw_once(&format!("{}#step", w.name), &dims, Distribution::Uniform)?;
        cx.op(StochasticRound { unit, limit: LIMIT }, &[next, chance])
    }

    fn optimiser(&self) -> Optimiser {
        Optimiser::Sgd
    }
}

/// The scales of a ternary weight.
fn scales(w: &Weight) -> Built {
    let found = w.scales.as_ref().map(|s| s.alpha);
    found.ok_or_else(|| InferError::new("probe", format!("{} has no scales", w.name)))
}
