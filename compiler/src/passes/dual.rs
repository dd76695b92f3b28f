//! From the graph of a loss to one graph that evaluates it under many probes at once.
//!
//! With `M` directions there are `2M` probes: probe `p < M` adds direction `p`, probe `M + p` subtracts it. A value that no probed
//! weight reaches is computed once; every other value holds all probes, stacked along its leading dimension. Packed ternary weights
//! that are equal for all probes stay single, so both signs are rows of the same product.

use std::collections::{HashMap, HashSet};

use chimera_ir::{
    DType, Graph, Op, Tensor, Type, Value,
    graph::{Kind, Node, Repeat},
    ops::{
        self, Axis, Binary, BinaryFn, CrossEntropy, Dispatch, Distribution, EmbedRank, InferError, Linear, MeanAbs,
        MemberDot, PackPanels, Probe, Random, RankUpdate, Reshape, Stack, TernaryProduct, TileRows, Unary, UnaryFn,
    },
    plan::WeightKind,
};

/// How weights are probed (semantics 13).
#[derive(Clone, Debug, PartialEq)]
pub enum Scheme {
    /// Every sequence has a direction of its own: low-rank on matrices, dense on vectors (13.4).
    PerSequence {
        /// Rank of the probes on matrices.
        rank: usize,
        /// Probe size on matrices relative to the mean magnitude of the weight.
        kappa: f32,
        /// Probe size on vectors.
        sigma_vec: f32,
    },
    /// All sequences share each direction (13.1, 13.3).
    Mezo {
        /// Whether ternary latents are perturbed and quantised again (mode A), or noise is added to the product (mode C).
        requantise: bool,
        /// Number of directions.
        directions: usize,
        /// Distribution of the entries.
        dist: Distribution,
        /// Probe size.
        eps: f32,
        /// Probe size on ternary matrices relative to their mean magnitude, instead of `eps`.
        eps_rel: Option<f32>,
    },
}

impl Scheme {
    /// The number of directions for a batch of `rows` sequences.
    pub fn members(&self, rows: usize) -> usize {
        match self {
            Scheme::PerSequence { .. } => rows,
            Scheme::Mezo { directions, .. } => *directions,
        }
    }

    /// Rows of the stacked batch.
    pub fn stacked_rows(&self, rows: usize) -> usize {
        match self {
            Scheme::PerSequence { .. } => 2 * rows,
            Scheme::Mezo { directions, .. } => 2 * directions * rows,
        }
    }
}

/// The transformed graph and how much of the work it shares.
#[derive(Debug)]
pub struct Probed {
    /// Inputs as before (for one batch), and `seed` (`i32 [2]`) and `step` (`i32 [1]`). Output `losses` for every stacked row.
    pub graph: Graph,
    /// See [`chimera_ir::plan::Entry::shared`].
    pub shared: (u64, u64),
}

/// Transform the graph of a loss over `rows` sequences. `probed` names the weights that probes reach.
pub fn probe(
    loss: &Graph,
    scheme: &Scheme,
    rows: usize,
    kinds: &HashMap<String, WeightKind>,
    probed: &HashSet<String>,
) -> Result<Probed, InferError> {
    let members = scheme.members(rows);
    // Per-sequence probes differ from row to row; otherwise each probe owns a block of rows.
    let mut t = Transform { scheme, rows, members, kinds, probed, once: 0, all: 0, random: None };
    let mut graph = Graph::default();
    graph.at("probe");
    let seed = graph.input("seed", Type::i32(&[2]));
    let step = graph.input("step", Type::i32(&[1]));
    let first = graph.constant(Tensor::i32(&[1], vec![0]));
    t.random = Some([seed, step, first]);
    let map = t.graph(loss, &mut graph, HashMap::new(), 1)?;
    let losses = loss.outputs.iter().find(|(n, _)| n == "losses").map(|(_, v)| map[v]);
    let losses = losses.ok_or_else(|| InferError::new("probe", "the graph has no output named losses"))?;
    graph.at("probe");
    let losses = t.stacked(&mut graph, losses)?;
    graph.outputs = vec![("losses".to_owned(), losses.v)];
    for (name, v) in loss.outputs.iter().filter(|(n, _)| n.starts_with("load.")) {
        graph.outputs.push((name.clone(), map[v].v));
    }
    graph.verify()?;
    let copies = scheme.stacked_rows(rows) as u64 / rows as u64;
    Ok(Probed { graph, shared: (t.once * (copies - 1), t.all * copies) })
}

/// A value of the new graph.
#[derive(Clone, Copy, Debug)]
struct New {
    v: Value,
    /// Holds all probes.
    split: bool,
    /// The leading dimension counts batch rows; weights and what is made of them do not have it.
    batched: bool,
}

struct Transform<'a> {
    scheme: &'a Scheme,
    rows: usize,
    members: usize,
    kinds: &'a HashMap<String, WeightKind>,
    probed: &'a HashSet<String>,
    once: u64,
    all: u64,
    random: Option<[Value; 3]>,
}

type Map = HashMap<Value, New>;

impl Transform<'_> {
    /// Copies of the batch in a stacked value.
    fn copies(&self) -> usize {
        self.scheme.stacked_rows(self.rows) / self.rows
    }

    /// Groups of a stacked weight.
    fn groups(&self) -> usize {
        2 * self.members
    }

    fn is_probed(&self, name: &str) -> Option<WeightKind> {
        self.probed.contains(name).then(|| self.kinds.get(name).copied()).flatten()
    }

    fn graph(&mut self, old: &Graph, g: &mut Graph, mut map: Map, times: u64) -> Result<Map, InferError> {
        for node in old.nodes() {
            if node.outs.iter().all(|v| map.contains_key(v)) {
                continue;
            }
            g.at(node.site.clone());
            let outs = self.node(old, g, node, &map, times)?;
            map.extend(node.outs.iter().copied().zip(outs));
        }
        Ok(map)
    }

    fn node(&mut self, old: &Graph, g: &mut Graph, node: &Node, map: &Map, times: u64) -> Result<Vec<New>, InferError> {
        let ty = || old.ty(node.outs[0]).clone();
        let plain = |v, batched| Ok(vec![New { v, split: false, batched }]);
        match &node.kind {
            Kind::Input(name) => plain(g.input(name.clone(), ty()), true),
            Kind::Const(t) => plain(g.constant(t.clone()), false),
            Kind::State(_) => Err(InferError::new("probe", "a probed loss starts from fresh states")),
            Kind::Param(name) => {
                let v = g.param(name, ty());
                let vector = self.is_probed(name) == Some(WeightKind::Vector);
                let dense = matches!(self.scheme, Scheme::Mezo { .. })
                    && matches!(self.is_probed(name), Some(WeightKind::Matrix | WeightKind::Embedding));
                if !vector && !dense {
                    return plain(v, false);
                }
                let v = self.perturbed(g, name, v)?;
                Ok(vec![New { v, split: true, batched: false }])
            }
            Kind::Repeat(r) => self.repeat(old, g, node, r, map),
            Kind::Op(op) => {
                let outs = self.apply(old, g, op, node, map)?;
                let work = work_of_op(old, op, node) * times;
                if outs.iter().any(|o| o.batched) {
                    self.all += work;
                    self.once += if outs.iter().any(|o| o.split) { 0 } else { work };
                }
                self.correct(old, g, op, node, map, outs)
            }
        }
    }

    /// The loop: when a probe reaches it, every carried batch value holds all probes from the start; else it runs once as it is.
    fn repeat(
        &mut self,
        old: &Graph,
        g: &mut Graph,
        node: &Node,
        r: &Repeat,
        map: &Map,
    ) -> Result<Vec<New>, InferError> {
        let mut ins: Vec<New> = node.ins.iter().map(|v| map[v]).collect();
        for (i, new) in ins.iter_mut().enumerate().take(r.n_carried) {
            new.batched |= old.ty(node.ins[i]).dims[0] == self.rows && !is_load(r, i);
        }
        let probed = |n: &Node| matches!(&n.kind, Kind::Param(name) if self.is_probed(name).is_some());
        if !ins.iter().any(|i| i.split) && !r.body.nodes().iter().any(probed) {
            let work = work_of(&r.body) * r.max as u64;
            self.all += work;
            self.once += work;
            let operands: Vec<Value> = ins.iter().map(|n| n.v).collect();
            let outs = g.repeat(r.clone(), &operands)?;
            return Ok(outs.into_iter().zip(&ins).map(|(v, n)| New { v, ..*n }).collect());
        }
        for new in ins.iter_mut().take(r.n_carried).filter(|n| n.batched) {
            *new = self.stacked(g, *new)?;
        }
        let mut body = Graph::default();
        let mut inner = Map::new();
        let mut args = vec![body.input("iteration", Type::i32(&[1]))];
        inner.insert(r.args[0], New { v: args[0], split: false, batched: false });
        for (i, new) in ins.iter().enumerate() {
            let v = body.input(format!("arg{i}"), g.ty(new.v).clone());
            args.push(v);
            inner.insert(r.args[i + 1], New { v, ..*new });
        }
        // Random words reach the body as further invariants.
        let outer = self.random.expect("the outer graph has its random inputs");
        let mut random = outer;
        for (i, v) in outer.iter().enumerate() {
            random[i] = body.input(format!("random{i}"), g.ty(*v).clone());
            args.push(random[i]);
        }
        self.random = Some(random);
        let inner = self.graph(&r.body, &mut body, inner, r.max as u64)?;
        self.random = Some(outer);
        for (i, (name, v)) in r.body.outputs.iter().enumerate() {
            let new = inner[v];
            let new = if i < r.n_carried && ins[i].split {
                self.stacked(&mut body, New { batched: true, ..new })?
            } else {
                new
            };
            body.outputs.push((name.clone(), new.v));
        }
        let operands: Vec<Value> = ins.iter().map(|n| n.v).chain(outer).collect();
        let outs = g.repeat(Repeat { body, args, n_carried: r.n_carried, max: r.max }, &operands)?;
        Ok(outs.into_iter().zip(&ins).map(|(v, n)| New { v, ..*n }).collect())
    }

    /// The operation itself, stacked when an operand is.
    fn apply(&mut self, old: &Graph, g: &mut Graph, op: &Op, node: &Node, map: &Map) -> Result<Vec<New>, InferError> {
        let mut ins: Vec<New> = node.ins.iter().map(|v| map[v]).collect();
        // Mode A: codes of the perturbed latent, scales of the unperturbed one.
        if let (Op::PackTernary(_) | Op::TernaryDense(_), Scheme::Mezo { requantise: true, .. }) = (op, self.scheme) {
            let [name] = &roots(old, node.ins[0])[..] else { unreachable!("a ternary weight has one latent") };
            if self.is_probed(name).is_some() {
                ins[0] = New { v: self.perturbed(g, name, ins[0].v)?, split: true, batched: false };
            }
        }
        let old_tys: Vec<Type> = node.ins.iter().map(|&v| old.ty(v).clone()).collect();
        let axes = op.axes(&old_tys);
        let any = ins.iter().any(|i| i.split);
        if any {
            for (new, axis) in ins.iter_mut().zip(&axes) {
                if *axis == Axis::Rows || matches!(op, Op::Stack(_)) {
                    *new = self.stacked(g, *new)?;
                }
            }
        }
        let op = match op {
            Op::Reshape(Reshape { dims }) if any => {
                let from = g.ty(ins[0].v).numel() / old_tys[0].numel();
                let mut dims = dims.clone();
                dims[0] *= from;
                Op::from(Reshape { dims })
            }
            Op::Dispatch(Dispatch { experts, .. }) if matches!(self.scheme, Scheme::Mezo { .. }) && any => {
                Op::from(Dispatch { experts: *experts, groups: self.groups() })
            }
            op => op.clone(),
        };
        let operands: Vec<Value> = ins.iter().map(|i| i.v).collect();
        let mut outs = g.ops(op.clone(), &operands)?;
        if let (Op::Stack(Stack { n }), true) = (&op, any) {
            // [E, G, ..] to [E G, ..]: rows sorted by expert, then by probe, find their weight.
            let mut dims = g.ty(outs[0]).dims.clone();
            dims.splice(..2, [n * self.groups()]);
            outs = vec![g.op(Reshape { dims }, &outs)?];
        }
        let batched = ins.iter().zip(&axes).any(|(i, a)| *a == Axis::Rows && i.batched);
        let status = |(v, o): (Value, &Value)| New { v, split: g.ty(v) != old.ty(*o), batched };
        Ok(outs.into_iter().zip(&node.outs).map(status).collect())
    }

    /// What probes add to the result of an operation whose weight is probed without being stacked.
    fn correct(
        &mut self,
        old: &Graph,
        g: &mut Graph,
        op: &Op,
        node: &Node,
        map: &Map,
        outs: Vec<New>,
    ) -> Result<Vec<New>, InferError> {
        let weight = match op {
            Op::TernaryProduct(_) => node.ins[2],
            Op::Linear(_) | Op::Embed(_) | Op::CrossEntropy(_) => node.ins[1],
            _ => return Ok(outs),
        };
        let names: Vec<String> =
            roots(old, weight).into_iter().filter(|n| self.is_probed(n).is_some() && !map[&weight].split).collect();
        if names.is_empty() {
            return Ok(outs);
        }
        let y = self.stacked(g, outs[0])?;
        let x = match op {
            Op::TernaryProduct(_) => float_input(old, g, map, node.ins[0])?,
            _ => map[&node.ins[0]],
        };
        let x = self.stacked(g, x)?;
        let grouped = match op {
            Op::TernaryProduct(TernaryProduct { grouped_rows, .. }) | Op::Linear(Linear { grouped_rows, .. }) => {
                *grouped_rows
            }
            _ => false,
        };
        let offsets = grouped.then(|| map[node.ins.last().expect("grouped rows have offsets")]);
        let v = match (self.scheme.clone(), op) {
            (Scheme::Mezo { .. }, _) => self.dense_noise(g, &names, x.v, y.v, offsets.map(|o| o.v))?,
            (Scheme::PerSequence { rank, kappa, .. }, Op::Embed(_)) => {
                let [a, b] = self.factors(g, &names[0], rank)?;
                let scale = self.low_rank_scale(g, &names[0], rank, kappa)?;
                g.op(EmbedRank { rank, members: self.members }, &[y.v, x.v, a, b, scale])?
            }
            (Scheme::PerSequence { rank, kappa, .. }, Op::CrossEntropy(CrossEntropy { vocab })) => {
                let [a, b] = self.factors(g, &names[0], rank)?;
                let u = g.op(MemberDot { rank, members: self.members, gathered: None }, &[x.v, b])?;
                let scale = self.low_rank_scale(g, &names[0], rank, kappa)?;
                let signs: Vec<f32> =
                    (0..2 * self.members).map(|r| if r < self.members { 1.0 } else { -1.0 }).collect();
                let signs = g.constant(Tensor::f32(&[2 * self.members, 1], signs));
                let mul = Binary { f: BinaryFn::Mul };
                let u = g.op(mul.clone(), &[u, signs])?;
                let u = g.op(mul, &[u, scale])?;
                let panels = map[&node.ins[1]].v;
                let labels = self.stacked(g, map[&node.ins[2]])?;
                g.op(CrossEntropy { vocab: *vocab }, &[x.v, panels, labels.v, u, a])?
            }
            (Scheme::PerSequence { rank, kappa, .. }, _) if grouped => {
                let (order, index) = routing(old, node.ins[0])?;
                let tokens = old.ty(index).dims[1];
                let gathered = Some((old.ty(index).dims[2], tokens));
                let (order, index) = (map[&order].v, self.stacked(g, map[&index])?.v);
                let (mut a, mut b, mut scale) = (vec![], vec![], vec![]);
                for name in &names {
                    let [fa, fb] = self.factors(g, name, rank)?;
                    a.push(fa);
                    b.push(fb);
                    scale.push(self.low_rank_scale(g, name, rank, kappa)?);
                }
                let n = names.len();
                let [a, b, scale] = [a, b, scale].map(|parts| g.op(Stack { n }, &parts));
                let u = g.op(MemberDot { rank, members: self.members, gathered }, &[x.v, b?, order, index])?;
                g.op(RankUpdate { rank, members: self.members, gathered }, &[y.v, u, a?, scale?, order, index])?
            }
            (Scheme::PerSequence { rank, kappa, .. }, _) => {
                let [a, b] = self.factors(g, &names[0], rank)?;
                let scale = self.low_rank_scale(g, &names[0], rank, kappa)?;
                let u = g.op(MemberDot { rank, members: self.members, gathered: None }, &[x.v, b])?;
                g.op(RankUpdate { rank, members: self.members, gathered: None }, &[y.v, u, a, scale])?
            }
        };
        Ok(vec![New { v, split: true, batched: true }])
    }

    /// A value with all probes stacked.
    fn stacked(&self, g: &mut Graph, new: New) -> Result<New, InferError> {
        if new.split {
            return Ok(new);
        }
        let v = if new.batched {
            g.op(TileRows { times: self.copies() }, &[new.v])?
        } else {
            let dims: Vec<usize> = std::iter::once(1).chain(g.ty(new.v).dims.iter().copied()).collect();
            let one = g.op(Reshape { dims }, &[new.v])?;
            g.op(TileRows { times: self.groups() }, &[one])?
        };
        Ok(New { v, split: true, ..new })
    }

    fn directions(&self, g: &mut Graph, name: &str, shape: &[usize], dist: Distribution) -> Result<Value, InferError> {
        let shape = shape.to_vec();
        let op = Random { dist, shape, members: self.members, dtype: DType::F32 };
        let [seed, step, first] = self.random.expect("the graph has its random inputs");
        let stream = g.constant(ops::stream(name));
        g.op(op, &[seed, step, first, stream])
    }

    /// `w +- eps z`, `[2 M, ..]`.
    fn perturbed(&self, g: &mut Graph, name: &str, w: Value) -> Result<Value, InferError> {
        let dist = match self.scheme {
            Scheme::PerSequence { .. } => Distribution::Gaussian,
            Scheme::Mezo { dist, .. } => *dist,
        };
        let shape = g.ty(w).dims.clone();
        let z = self.directions(g, name, &shape, dist)?;
        let eps = self.probe_size(g, name, w)?;
        g.op(Probe {}, &[w, z, eps])
    }

    fn probe_size(&self, g: &mut Graph, name: &str, w: Value) -> Result<Value, InferError> {
        let ternary = self.kinds.get(name) == Some(&WeightKind::Ternary);
        let constant = |g: &mut Graph, x: f32| g.constant(Tensor::f32(&[1], vec![x]));
        match self.scheme {
            Scheme::PerSequence { sigma_vec, .. } => Ok(constant(g, *sigma_vec)),
            Scheme::Mezo { eps_rel: Some(rel), .. } if ternary => {
                let mean = g.op(MeanAbs { floor: 0.0 }, &[w])?;
                g.op(Unary { f: UnaryFn::Affine { mul: *rel, add: 0.0 } }, &[mean])
            }
            Scheme::Mezo { eps, .. } => Ok(constant(g, *eps)),
        }
    }

    fn latent(&self, g: &mut Graph, name: &str) -> Result<Value, InferError> {
        g.find_param(name).ok_or_else(|| InferError::new("probe", format!("weight {name} is not in the graph")))
    }

    fn factors(&self, g: &mut Graph, name: &str, rank: usize) -> Result<[Value; 2], InferError> {
        let w = self.latent(g, name)?;
        let [m, n] = g.ty(w).dims[..] else { return Err(InferError::new("probe", format!("{name} is not a matrix"))) };
        let a = self.directions(g, &format!("{name}#A"), &[m, rank], Distribution::Gaussian)?;
        Ok([a, self.directions(g, &format!("{name}#B"), &[n, rank], Distribution::Gaussian)?])
    }

    /// `kappa max(mean|W|, 1e-3) / sqrt(rank)`.
    fn low_rank_scale(&self, g: &mut Graph, name: &str, rank: usize, kappa: f32) -> Result<Value, InferError> {
        let w = self.latent(g, name)?;
        let mean = g.op(MeanAbs { floor: 1e-3 }, &[w])?;
        g.op(Unary { f: UnaryFn::Affine { mul: kappa / (rank as f32).sqrt(), add: 0.0 } }, &[mean])
    }

    /// Mode C: `y + x (+-eps z)^T`.
    fn dense_noise(
        &self,
        g: &mut Graph,
        names: &[String],
        x: Value,
        y: Value,
        offsets: Option<Value>,
    ) -> Result<Value, InferError> {
        let mut noise = vec![];
        for name in names {
            let w = self.latent(g, name)?;
            let zero = g.op(Unary { f: UnaryFn::Affine { mul: 0.0, add: 0.0 } }, &[w])?;
            let Scheme::Mezo { dist, .. } = self.scheme else { unreachable!("dense noise is a shared direction") };
            let shape = g.ty(w).dims.clone();
            let z = self.directions(g, name, &shape, *dist)?;
            let eps = self.probe_size(g, name, w)?;
            noise.push(g.op(Probe {}, &[zero, z, eps])?);
        }
        let m = g.ty(y).cols();
        let mut panels = noise.into_iter().map(|n| g.op(PackPanels {}, &[n])).collect::<Result<Vec<_>, _>>()?;
        if offsets.is_some() {
            let stacked = g.op(Stack { n: names.len() }, &panels)?;
            let mut dims = g.ty(stacked).dims.clone();
            let groups = dims[0] * dims[1];
            dims.splice(..2, [groups]);
            panels = vec![g.op(Reshape { dims }, &[stacked])?];
        }
        let ins: Vec<Value> = [x, panels[0]].into_iter().chain(offsets).collect();
        let add = g.op(Linear { m, grouped_rows: offsets.is_some() }, &ins)?;
        g.op(Binary { f: BinaryFn::Add }, &[y, add])
    }
}

/// Operations of one run through a loop body, work on weights alone not counted.
fn work_of(body: &Graph) -> u64 {
    let mut on_weights = vec![false; body.n_values()];
    let mut work = 0;
    for node in body.nodes() {
        let alone = match &node.kind {
            Kind::Param(_) | Kind::Const(_) => true,
            Kind::Op(_) => node.ins.iter().all(|v| on_weights[v.0 as usize]),
            _ => false,
        };
        node.outs.iter().for_each(|v| on_weights[v.0 as usize] = alone);
        if let (Kind::Op(op), false) = (&node.kind, alone) {
            work += work_of_op(body, op, node);
        }
    }
    work
}

fn work_of_op(g: &Graph, op: &Op, node: &Node) -> u64 {
    let types = |vs: &[Value]| -> Vec<Type> { vs.iter().map(|&v| g.ty(v).clone()).collect() };
    let flops = op.flops(&types(&node.ins), &types(&node.outs));
    flops.float + 2 * flops.ternary
}

/// Whether a carried value is a count of tokens and not a batch value.
fn is_load(r: &Repeat, i: usize) -> bool {
    let v = r.body.outputs[i].1;
    matches!(&r.body.def(v).kind, Kind::Op(Op::Dispatch(_)))
}

/// The parameters that a weight-only value is made of, in order, matrices only.
fn roots(g: &Graph, v: Value) -> Vec<String> {
    let def = g.def(v);
    match &def.kind {
        Kind::Param(name) => vec![name.clone()],
        // Scales are functions of the latent that is counted already.
        Kind::Op(Op::PackTernary(_) | Op::TernaryDense(_)) => roots(g, def.ins[0]),
        Kind::Op(Op::PackPanels(_)) => roots(g, def.ins[0]),
        Kind::Op(Op::Stack(_)) => def.ins.iter().flat_map(|&i| roots(g, i)).collect(),
        _ => vec![],
    }
}

/// The float value behind activation codes.
fn float_input(old: &Graph, g: &mut Graph, map: &Map, codes: Value) -> Result<New, InferError> {
    let def = old.def(codes);
    match &def.kind {
        Kind::Op(Op::Quantise(_)) => Ok(map[&def.ins[0]]),
        // Codes of gathered rows: gather the float rows in the same order.
        Kind::Op(Op::GatherRows(op)) => {
            let float = float_input(old, g, map, def.ins[0])?;
            let v = g.op(op.clone(), &[float.v, map[&def.ins[1]].v])?;
            Ok(New { v, ..float })
        }
        _ => Err(InferError::new("probe", "codes that are not quantised from a float")),
    }
}

/// The row order and the expert choice behind a value in expert order.
fn routing(g: &Graph, v: Value) -> Result<(Value, Value), InferError> {
    let mut at = v;
    loop {
        let def = g.def(at);
        if let Kind::Op(Op::GatherRows(_)) = &def.kind {
            let order = def.ins[1];
            return Ok((order, g.def(order).ins[0]));
        }
        at = *def.ins.first().ok_or_else(|| InferError::new("probe", "rows of experts without a gather"))?;
    }
}
