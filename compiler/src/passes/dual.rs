//! From the graph of a loss to one graph that evaluates it under many probes at once.
//!
//! With `M` directions there are `2M` probes: probe `p < M` adds direction `p`, probe `M + p` subtracts it. A value that no probed
//! weight reaches is computed once; every other value holds all probes, stacked along its leading dimension. Packed ternary weights
//! that are equal for all probes stay single, so both signs are rows of the same product.

use std::collections::{HashMap, HashSet};

use chimera_ir::{
    Graph, Op, Tensor, Type, Value,
    graph::{Kind, Node, Repeat},
    ops::{
        Axis, Binary, BinaryFn, BlockScales, CrossEntropy, Dispatch, InferError, Linear, PackTernary, Reshape,
        ScaleGroups, Stack, TernaryDense, TernaryProduct, TileRows,
    },
    plan::{Comparison, WeightKind},
};

use crate::estimators::{Cx, Estimator, Reach, Scales, Scheme, Site, SiteKind, Weight};

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
    let estimator = scheme.estimator();
    let mut t = Transform { estimator, rows, kinds, probed, once: 0, all: 0, random: None };
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
    let copies = estimator.copies(rows) as u64;
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
    estimator: &'a dyn Estimator,
    rows: usize,
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
        self.estimator.copies(self.rows)
    }

    /// Groups of a stacked weight.
    fn groups(&self) -> usize {
        self.estimator.groups(self.rows)
    }

    fn cx<'g>(&self, g: &'g mut Graph) -> Cx<'g> {
        let random = self.random.expect("the graph has its random inputs");
        Cx { g, random, members: self.estimator.members(self.rows) }
    }

    /// A probed weight and where probes meet it.
    fn reached(&self, name: &str) -> Option<(WeightKind, Reach)> {
        self.is_probed(name).map(|kind| (kind, self.estimator.reach(kind)))
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
                let Some((kind, Reach::Weight)) = self.reached(name) else { return plain(v, false) };
                let v =
                    self.estimator.perturbed(&mut self.cx(g), &Weight { name: name.clone(), kind, v, scales: None })?;
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
        // Codes of the perturbed latent, scales of the unperturbed one.
        if let Op::PackTernary(_) | Op::TernaryDense(_) = op {
            let [name] = &roots(old, node.ins[0])[..] else { unreachable!("a ternary weight has one latent") };
            if let Some((kind, Reach::Codes)) = self.reached(name) {
                let scales = Some(Scales { alpha: ins[1].v, ..quantised(op) });
                let latent = Weight { name: name.clone(), kind, v: ins[0].v, scales };
                let v = self.estimator.perturbed(&mut self.cx(g), &latent)?;
                ins[0] = New { v, split: true, batched: false };
            }
        }
        if let Op::TernaryProduct(TernaryProduct { n_weights, .. }) = op {
            for w in 0..*n_weights {
                let at = 3 + 2 * w;
                if let Some(v) = self.scaled(old, g, node.ins[at - 1], node.ins[at], map)? {
                    ins[at] = New { v, split: true, batched: false };
                }
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
            Op::Dispatch(Dispatch { experts, .. }) if any && self.estimator.comparison() != Comparison::PerSequence => {
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
        if let Op::TernaryDense(TernaryDense { group, .. }) = op
            && let Some(f) = self.factors(old, g, &op, node, map)?
        {
            outs = vec![g.op(ScaleGroups { group }, &[outs[0], f])?];
        }
        let batched = ins.iter().zip(&axes).any(|(i, a)| *a == Axis::Rows && i.batched);
        let status = |(v, o): (Value, &Value)| New { v, split: g.ty(v) != old.ty(*o), batched };
        Ok(outs.into_iter().zip(&node.outs).map(status).collect())
    }

    /// The factors of the scales of a dense ternary weight, if they are probed.
    fn factors(
        &self,
        old: &Graph,
        g: &mut Graph,
        op: &Op,
        node: &Node,
        map: &Map,
    ) -> Result<Option<Value>, InferError> {
        let [name] = &roots(old, node.ins[0])[..] else { return Ok(None) };
        let Some((kind, Reach::Scales)) = self.reached(name) else { return Ok(None) };
        let scales = Some(Scales { alpha: map[&node.ins[1]].v, ..quantised(op) });
        let w = Weight { name: name.clone(), kind, v: map[&node.ins[0]].v, scales };
        self.estimator.factors(&mut self.cx(g), &w).map(Some)
    }

    /// The blocked scales of packed codes with a group for each probe, if they are probed: `[G, ..]`, of stacked weights `[E G, ..]`.
    fn scaled(
        &self,
        old: &Graph,
        g: &mut Graph,
        codes: Value,
        alpha: Value,
        map: &Map,
    ) -> Result<Option<Value>, InferError> {
        let names = roots(old, codes);
        if !names.iter().any(|n| matches!(self.reached(n), Some((_, Reach::Scales)))) {
            return Ok(None);
        }
        let parts = match &old.def(alpha).kind {
            Kind::Op(Op::Stack(_)) => old.def(alpha).ins.clone(),
            _ => vec![alpha],
        };
        let mut groups = vec![];
        for (name, part) in names.iter().zip(&parts) {
            let Kind::Op(Op::BlockScales(_)) = &old.def(*part).kind else {
                return Err(InferError::new(
                    "probe",
                    format!("the scales of `{name}` are given, not made of a latent"),
                ));
            };
            let alpha = map[&old.def(*part).ins[0]].v;
            let all = self.stacked(g, New { v: alpha, split: false, batched: false })?.v;
            let probed = match self.reached(name) {
                Some((kind, Reach::Scales)) => {
                    // Codes and factors are functions of the scales alone here.
                    let scales = Some(Scales { alpha, group: 0, ratio: 0.0 });
                    let w = Weight { name: name.clone(), kind, v: alpha, scales };
                    let f = self.estimator.factors(&mut self.cx(g), &w)?;
                    g.op(Binary { f: BinaryFn::Mul }, &[all, f])?
                }
                _ => all,
            };
            groups.push(g.op(BlockScales {}, &[probed])?);
        }
        let &[one] = &groups[..] else {
            let stacked = g.op(Stack { n: groups.len() }, &groups)?;
            let mut dims = g.ty(stacked).dims.clone();
            let leads = dims[0] * dims[1];
            dims.splice(..2, [leads]);
            return g.op(Reshape { dims }, &[stacked]).map(Some);
        };
        Ok(Some(one))
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
        if map[&weight].split {
            return Ok(outs);
        }
        let mut weights = vec![];
        for name in roots(old, weight) {
            if let Some((kind, Reach::Product)) = self.reached(&name) {
                let v = g.find_param(&name);
                let v = v.ok_or_else(|| InferError::new("probe", format!("weight {name} is not in the graph")))?;
                weights.push(Weight { name, kind, v, scales: None });
            }
        }
        if weights.is_empty() {
            return Ok(outs);
        }
        let y = self.stacked(g, outs[0])?.v;
        let x = match op {
            Op::TernaryProduct(_) => float_input(old, g, map, node.ins[0])?,
            _ => map[&node.ins[0]],
        };
        let x = self.stacked(g, x)?.v;
        let kind = match op {
            Op::Embed(_) => SiteKind::Embed,
            Op::CrossEntropy(CrossEntropy { vocab }) => {
                let labels = self.stacked(g, map[&node.ins[2]])?.v;
                SiteKind::Loss { vocab: *vocab, panels: map[&weight].v, labels }
            }
            Op::TernaryProduct(TernaryProduct { grouped_rows: true, .. })
            | Op::Linear(Linear { grouped_rows: true, .. }) => {
                let (order, index) = routing(old, node.ins[0])?;
                let ty = old.ty(index);
                let slots = (ty.dims[2], ty.dims[1]);
                let index = self.stacked(g, map[&index])?.v;
                let offsets = map[node.ins.last().expect("grouped rows have offsets")].v;
                SiteKind::Grouped { offsets, order: map[&order].v, index, slots }
            }
            _ => SiteKind::Product,
        };
        let v = self.estimator.corrected(&mut self.cx(g), &Site { x, y, weights, kind })?;
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
}

/// How an operation quantises; its scales are not filled in.
fn quantised(op: &Op) -> Scales {
    let alpha = Value(0);
    match op {
        Op::PackTernary(PackTernary { group, ratio }) | Op::TernaryDense(TernaryDense { group, ratio }) => {
            Scales { alpha, group: *group, ratio: *ratio }
        }
        _ => unreachable!("only ternary weights are quantised"),
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
