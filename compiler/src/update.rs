//! The update of weights from the scalars of a zeroth-order step, as a graph (semantics 13.1, 13.4).

use std::collections::HashMap;

use chimera_ir::{
    DType, Graph, Tensor, Type, Value,
    ops::{
        self, Balance, Binary, BinaryFn, Distribution, InferError, LowRankGrad, MeanAbs, Random, RmsScalar, Unary,
        UnaryFn, WeightedSum,
    },
    plan::WeightKind,
};

use crate::passes::dual::Scheme;

/// How an estimate becomes a step.
#[derive(Clone, Debug, PartialEq)]
pub struct UpdateRule {
    /// Decay of the running mean of normalised estimates (per-sequence scheme).
    pub momentum: f32,
    /// Step scale of vectors (per-sequence scheme).
    pub vec_scale: f32,
    /// Weight decay of ternary matrices (shared directions).
    pub weight_decay: f32,
    /// Rate of the expert balance, from `load.*` inputs; 0 leaves selection biases alone.
    pub balance: f32,
}

impl Default for UpdateRule {
    fn default() -> UpdateRule {
        UpdateRule { momentum: 0.9, vec_scale: 0.02, weight_decay: 0.0, balance: 0.0 }
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
}

/// The prefix of the names of momentum tensors.
pub const MOMENTUM: &str = "optim.momentum.";

/// The update graph. Inputs: `c` (`f32 [M]`), `seed`, `step`, `lr` (`f32 [1]`), and with balance `load.<layer>` for each router.
pub fn graph(scheme: &Scheme, rule: &UpdateRule, members: usize, targets: &[Target]) -> Result<Graph, InferError> {
    let mut u = Update { g: Graph::default(), scheme, rule, members };
    u.g.at("update");
    let c = u.g.input("c", Type::f32(&[members]));
    let seed = u.g.input("seed", Type::i32(&[2]));
    let step = u.g.input("step", Type::i32(&[1]));
    let lr = u.g.input("lr", Type::f32(&[1]));
    let first = u.g.constant(Tensor::i32(&[1], vec![0]));
    let random = [seed, step, first];
    let loads: HashMap<String, Value> = targets
        .iter()
        .filter(|t| t.kind == WeightKind::Buffer && rule.balance > 0.0)
        .map(|t| (t.name.clone(), u.g.input(load_name(&t.name), Type::i32(&t.dims))))
        .collect();
    for t in targets {
        u.g.at(t.name.rsplit_once('.').map_or("update", |(site, _)| site));
        let w = u.g.param(&t.name, Type::f32(&t.dims));
        let next = match (t.kind, scheme) {
            (WeightKind::Buffer, _) => match loads.get(&t.name) {
                Some(&load) => u.g.op(Balance { rate: rule.balance }, &[w, load])?,
                None => continue,
            },
            (WeightKind::Optimizer | WeightKind::Packed, _) => continue,
            (_, Scheme::PerSequence { rank, .. }) => u.per_sequence(t, w, c, lr, random, *rank)?,
            (_, Scheme::Mezo { .. }) => u.mezo(t, w, c, lr, random)?,
        };
        u.g.writes.push((t.name.clone(), next));
    }
    u.g.verify()?;
    Ok(u.g)
}

/// The side output that holds the load behind a selection bias.
pub(crate) fn load_name(bias: &str) -> String {
    format!("load.{}", bias.trim_end_matches(".gate.e_score_correction_bias"))
}

struct Update<'a> {
    g: Graph,
    scheme: &'a Scheme,
    rule: &'a UpdateRule,
    members: usize,
}

impl Update<'_> {
    fn affine(&mut self, x: Value, mul: f32, add: f32) -> Result<Value, InferError> {
        self.g.op(Unary { f: UnaryFn::Affine { mul, add } }, &[x])
    }

    fn binary(&mut self, f: BinaryFn, a: Value, b: Value) -> Result<Value, InferError> {
        self.g.op(Binary { f }, &[a, b])
    }

    fn draw(
        &mut self,
        name: &str,
        shape: &[usize],
        dist: Distribution,
        random: [Value; 3],
    ) -> Result<Value, InferError> {
        let [seed, step, first] = random;
        let stream = self.g.constant(ops::stream(name));
        let op = Random { dist, shape: shape.to_vec(), members: self.members, dtype: DType::F32 };
        self.g.op(op, &[seed, step, first, stream])
    }

    /// `M <- mu M + (1 - mu) g / rms(g)`, `w <- w - lr scale M / sqrt((1 - mu) / (1 + mu))`.
    fn per_sequence(
        &mut self,
        t: &Target,
        w: Value,
        c: Value,
        lr: Value,
        random: [Value; 3],
        rank: usize,
    ) -> Result<Value, InferError> {
        let vector = t.kind == WeightKind::Vector;
        let g = if vector {
            let xi = self.draw(&t.name, &t.dims, Distribution::Gaussian, random)?;
            self.g.op(WeightedSum {}, &[c, xi])?
        } else {
            let [m, n] = t.dims[..] else {
                return Err(InferError::new("update", format!("{} is not a matrix", t.name)));
            };
            let a = self.draw(&format!("{}#A", t.name), &[m, rank], Distribution::Gaussian, random)?;
            let b = self.draw(&format!("{}#B", t.name), &[n, rank], Distribution::Gaussian, random)?;
            self.g.op(LowRankGrad { rank }, &[c, a, b])?
        };
        let mu = self.rule.momentum;
        let rms = self.g.op(RmsScalar {}, &[g])?;
        let rms = self.affine(rms, 1.0, 1e-12)?;
        let g = self.binary(BinaryFn::Div, g, rms)?;
        let g = self.affine(g, 1.0 - mu, 0.0)?;
        let name = format!("{MOMENTUM}{}", t.name);
        let m = self.g.param(&name, Type::f32(&t.dims));
        let m = self.affine(m, mu, 0.0)?;
        let m = self.binary(BinaryFn::Add, g, m)?;
        self.g.writes.push((name, m));
        let scale = if vector {
            self.affine(lr, self.rule.vec_scale, 0.0)?
        } else {
            let mean = self.g.op(MeanAbs { floor: 1e-3 }, &[w])?;
            self.binary(BinaryFn::Mul, mean, lr)?
        };
        let step = self.binary(BinaryFn::Mul, m, scale)?;
        let step = self.affine(step, -1.0 / ((1.0 - mu) / (1.0 + mu)).sqrt(), 0.0)?;
        self.binary(BinaryFn::Add, step, w)
    }

    /// `g = 1/K sum_k c_k / (2 eps) z_k`, `w <- w (1 - lr wd) - lr g`.
    fn mezo(&mut self, t: &Target, w: Value, c: Value, lr: Value, random: [Value; 3]) -> Result<Value, InferError> {
        let Scheme::Mezo { dist, eps, eps_rel, .. } = self.scheme else { unreachable!("called for shared directions") };
        let z = self.draw(&t.name, &t.dims, *dist, random)?;
        let ternary = t.kind == WeightKind::Ternary;
        let c = match eps_rel.filter(|_| ternary) {
            None => self.affine(c, 0.5 / eps, 0.0)?,
            Some(rel) => {
                let mean = self.g.op(MeanAbs { floor: 0.0 }, &[w])?;
                let width = self.affine(mean, 2.0 * rel, 0.0)?;
                self.binary(BinaryFn::Div, c, width)?
            }
        };
        let g = self.g.op(WeightedSum {}, &[c, z])?;
        let step = self.binary(BinaryFn::Mul, g, lr)?;
        let step = self.affine(step, -1.0, 0.0)?;
        let kept = if ternary && self.rule.weight_decay > 0.0 {
            let keep = self.affine(lr, -self.rule.weight_decay, 1.0)?;
            self.binary(BinaryFn::Mul, w, keep)?
        } else {
            w
        };
        self.binary(BinaryFn::Add, step, kept)
    }
}
