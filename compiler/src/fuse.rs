//! Fusion: operations become clusters, one kernel each.
//!
//! Fusion decides where values live, never what they are: a fused pointwise operation computes the same expression in another place.

use std::collections::BTreeMap;

use chimera_ir::{
    Graph, Op, Type, Value,
    graph::{Kind, NodeId, Repeat},
    loops::Variant,
    lower::{Cluster, ClusterNode, Source},
};

use crate::passes::Budget;

/// What runs, in order.
#[derive(Clone, Debug)]
pub(crate) enum Item {
    /// A kernel.
    Run(Run),
    /// The same bytes under another type.
    Alias {
        /// The new value.
        to: Value,
        /// The value it is.
        from: Value,
    },
    /// A loop.
    Loop {
        /// The node of the graph.
        node: NodeId,
        /// The body.
        items: Vec<Item>,
    },
}

/// A cluster with its operands.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    /// The cluster.
    pub cluster: Cluster,
    /// Values of the cluster's inputs.
    pub ins: Vec<Value>,
    /// Values of the cluster's outputs.
    pub outs: Vec<Value>,
    /// Part of the model.
    pub site: String,
    /// Float operations and ternary multiply-accumulates.
    pub flops: (u64, u64),
}

impl Run {
    /// Whether every operation is pointwise and reads input `i` only where it writes.
    pub(crate) fn is_elementwise_in(&self, i: usize) -> bool {
        self.cluster.nodes.iter().all(|n| {
            let aligned = n.op.aligned();
            let reads = n.ins.iter().enumerate().filter(|(_, s)| **s == Source::Input(i));
            n.op.is_pointwise() && reads.into_iter().all(|(k, _)| aligned.contains(&k))
        })
    }

    /// The inputs that the kernel updates where they are, each with the value it becomes if anyone wants that.
    pub(crate) fn updates(&self) -> Vec<(usize, Option<Value>)> {
        let anchor = &self.cluster.nodes[self.cluster.anchor];
        let pair = |(k, o): (usize, usize)| {
            let Source::Input(i) = anchor.ins[k] else { unreachable!("updated operands are not fused") };
            let at = self.cluster.outputs.iter().position(|&x| x == (self.cluster.anchor, o));
            (i, at.map(|at| self.outs[at]))
        };
        anchor.op.updates().into_iter().map(pair).collect()
    }
}

impl Item {
    /// Whether `v` is an operand.
    pub(crate) fn reads(&self, g: &Graph, v: Value) -> bool {
        match self {
            Item::Run(run) => run.ins.contains(&v),
            Item::Alias { from, .. } => *from == v,
            // Bodies name weights for themselves.
            Item::Loop { node, .. } => g.node(*node).ins.contains(&v) || matches!(g.def(v).kind, Kind::Param(_)),
        }
    }
}

/// Decisions by edge (producer, consumer) and verdict.
pub type Decisions = BTreeMap<(String, String), u32>;

/// The clusters of `g` in an order that respects all uses.
pub(crate) fn fuse(g: &Graph, budget: &mut Budget, decisions: &mut Decisions) -> Vec<Item> {
    let uses = g.uses();
    let mut f = Fuse { g, uses, home: vec![None; g.nodes().len()], clusters: vec![], decisions };
    for (i, node) in g.nodes().iter().enumerate() {
        if let Kind::Op(op) = &node.kind
            && !matches!(op, Op::Reshape(_))
        {
            f.place(i, op, budget);
        }
    }
    f.items(budget)
}

#[derive(Clone, Debug)]
struct Draft {
    before: Vec<usize>,
    anchor: usize,
    after: Vec<usize>,
    alive: bool,
}

impl Draft {
    fn nodes(&self) -> impl Iterator<Item = usize> + '_ {
        self.before.iter().copied().chain([self.anchor]).chain(self.after.iter().copied())
    }
}

struct Fuse<'a> {
    g: &'a Graph,
    uses: Vec<u32>,
    home: Vec<Option<usize>>,
    clusters: Vec<Draft>,
    decisions: &'a mut Decisions,
}

impl Fuse<'_> {
    fn op(&self, node: usize) -> &Op {
        match &self.g.nodes()[node].kind {
            Kind::Op(op) => op,
            other => unreachable!("{} is not an operation", other.name()),
        }
    }

    fn ty(&self, v: Value) -> &Type {
        self.g.ty(v)
    }

    /// The cluster and node that define a value, if an operation does.
    fn home(&self, v: Value) -> Option<(usize, usize)> {
        let node = self.g.node_of(v).0 as usize;
        self.home[node].map(|c| (c, node))
    }

    fn place(&mut self, n: usize, op: &Op, budget: &mut Budget) {
        if op.is_pointwise() && self.continue_kernel(n, op, budget) {
            return;
        }
        let c = self.clusters.len();
        self.clusters.push(Draft { before: vec![], anchor: n, after: vec![], alive: true });
        self.home[n] = Some(c);
        for &k in op.pulls() {
            if let Some(&v) = self.g.nodes()[n].ins.get(k) {
                self.pull(c, n, v, budget);
            }
        }
    }

    fn note(&mut self, from: usize, to: usize, verdict: &str) {
        let edge = format!("{} -> {}", self.op(from).name(), self.op(to).name());
        *self.decisions.entry((edge, verdict.to_owned())).or_default() += 1;
    }

    /// Let the kernel that computes an operand carry on with pointwise node `n`.
    fn continue_kernel(&mut self, n: usize, op: &Op, budget: &mut Budget) -> bool {
        let node = &self.g.nodes()[n];
        let out = self.ty(node.outs[0]).clone();
        // The operand whose kernel runs last is the one that can carry on: all others are there by then.
        let mut candidates: Vec<(usize, usize, Value)> = op
            .aligned()
            .iter()
            .filter_map(|&k| node.ins.get(k).copied())
            .filter(|&v| self.ty(v).dims == out.dims)
            .filter_map(|v| self.home(v).map(|(c, d)| (c, d, v)))
            .collect();
        candidates.sort_by_key(|&(c, ..)| self.clusters[c].anchor);
        let Some(&(c, d, v)) = candidates.last() else { return false };
        match self.refuse_push(n, c, d, v) {
            Some(why) => {
                self.note(d, n, why);
                false
            }
            None if !budget.take() => false,
            None => {
                self.note(d, n, "fused");
                self.clusters[c].after.push(n);
                self.home[n] = Some(c);
                true
            }
        }
    }

    fn refuse_push(&self, n: usize, c: usize, d: usize, v: Value) -> Option<&'static str> {
        let cluster = &self.clusters[c];
        let anchor = cluster.anchor;
        if d == anchor {
            let at = self.g.nodes()[d].outs.iter().position(|&o| o == v)?;
            if !self.op(d).pushes().contains(&at) {
                return Some("the producer does not hand out its result element by element");
            }
        } else if !cluster.after.contains(&d) {
            return Some("the operand is computed in front of another kernel");
        }
        if self.reads_updated(n, anchor) {
            return Some("an operand is updated where it is");
        }
        let first = self.op(anchor).pushes().start;
        let pushed = self.ty(self.g.nodes()[anchor].outs[first]);
        let out = self.ty(self.g.nodes()[n].outs[0]);
        if (pushed.rows(), pushed.cols()) != (out.rows(), out.cols()) {
            return Some("the shapes differ");
        }
        for &other in &self.g.nodes()[n].ins {
            match self.home(other) {
                Some((oc, _)) if oc == c => {
                    // Another result of the same kernel must be handed out in the same place.
                    let aligned = self.op(n).aligned();
                    let reads = self.g.nodes()[n].ins.iter().enumerate().filter(|(_, x)| **x == other);
                    if reads.into_iter().any(|(k, _)| !aligned.contains(&k)) {
                        return Some("the operand is read away from where it is computed");
                    }
                    let (_, od) = self.home(other)?;
                    if od == anchor {
                        let at = self.g.nodes()[od].outs.iter().position(|&o| o == other)?;
                        if !self.op(od).pushes().contains(&at) {
                            return Some("another operand is not handed out element by element");
                        }
                    }
                }
                Some((oc, _)) if self.clusters[oc].anchor > anchor => return Some("another operand is computed later"),
                Some(_) => {}
                None => {
                    // Results of loops and aliases must be there as well.
                    let def = self.g.node_of(other).0 as usize;
                    let source = !matches!(self.g.nodes()[def].kind, Kind::Op(_) | Kind::Repeat(_));
                    if !source && def > anchor {
                        return Some("another operand is computed later");
                    }
                    if let Kind::Op(_) = self.g.nodes()[def].kind {
                        let root = self.alias_root(other);
                        if self.home(root).is_some_and(|(rc, _)| rc == c || self.clusters[rc].anchor > anchor) {
                            return Some("another operand is computed later");
                        }
                    }
                }
            }
        }
        None
    }

    /// Whether node `n` reads an operand that `anchor` updates in place.
    fn reads_updated(&self, n: usize, anchor: usize) -> bool {
        let (reads, operands) = (&self.g.nodes()[n].ins, &self.g.nodes()[anchor].ins);
        self.op(anchor).updates().iter().any(|&(k, _)| reads.contains(&operands[k]))
    }

    fn alias_root(&self, v: Value) -> Value {
        let def = self.g.def(v);
        match &def.kind {
            Kind::Op(Op::Reshape(_)) => self.alias_root(def.ins[0]),
            _ => v,
        }
    }

    /// Evaluate the pointwise producers of `v` inside the kernel of anchor `n`.
    fn pull(&mut self, c: usize, n: usize, v: Value, budget: &mut Budget) {
        let Some((p, d)) = self.home(v) else { return };
        let producer = &self.clusters[p];
        let pure = producer.nodes().all(|x| self.op(x).is_pointwise());
        let last = producer.nodes().last() == Some(d);
        let out = self.ty(self.g.nodes()[n].outs[0]);
        let why = if !pure {
            Some("the producer owns a kernel")
        } else if !last {
            Some("the producer is fused into something else")
        } else if self.uses[v.0 as usize] > 1 {
            Some("the result has several users")
        } else if self.op(n).is_pointwise() && self.ty(v).numel() < out.numel() {
            Some("the smaller result would be computed again and again")
        } else if producer.nodes().any(|x| self.escapes(x, p)) {
            Some("an intermediate result is needed elsewhere")
        } else if producer.nodes().any(|x| self.reads_updated(x, n)) {
            Some("an operand is updated where it is")
        } else {
            None
        };
        match why {
            Some(why) => self.note(d, n, why),
            None if budget.take() => {
                self.note(d, n, "fused");
                let nodes: Vec<usize> = self.clusters[p].nodes().collect();
                self.clusters[p].alive = false;
                for x in nodes {
                    self.home[x] = Some(c);
                    self.clusters[c].before.push(x);
                }
            }
            None => {}
        }
    }

    /// Whether a result of a node of cluster `p` is used outside of it, not counting the last node.
    fn escapes(&self, x: usize, p: usize) -> bool {
        let cluster = &self.clusters[p];
        if cluster.nodes().last() == Some(x) {
            return false;
        }
        let inside: u32 =
            cluster.nodes().flat_map(|y| &self.g.nodes()[y].ins).filter(|v| self.g.nodes()[x].outs.contains(v)).count()
                as u32;
        self.g.nodes()[x].outs.iter().map(|v| self.uses[v.0 as usize]).sum::<u32>() > inside
    }

    fn items(self, budget: &mut Budget) -> Vec<Item> {
        let mut at: Vec<Option<usize>> = vec![None; self.g.nodes().len()];
        for (c, draft) in self.clusters.iter().enumerate().filter(|(_, d)| d.alive) {
            at[draft.anchor] = Some(c);
        }
        let mut items = vec![];
        for (i, node) in self.g.nodes().iter().enumerate() {
            match &node.kind {
                Kind::Op(Op::Reshape(_)) => items.push(Item::Alias { to: node.outs[0], from: node.ins[0] }),
                Kind::Repeat(r) => {
                    let Repeat { body, .. } = &**r;
                    let inner = fuse(body, budget, self.decisions);
                    items.push(Item::Loop { node: NodeId(i as u32), items: inner });
                }
                _ => items.extend(at[i].map(|c| Item::Run(self.run(c)))),
            }
        }
        items
    }

    fn run(&self, c: usize) -> Run {
        let draft = &self.clusters[c];
        let mut before = draft.before.clone();
        before.sort_unstable();
        let members: Vec<usize> =
            before.iter().copied().chain([draft.anchor]).chain(draft.after.iter().copied()).collect();
        let index = |n: usize| members.iter().position(|&m| m == n);
        let mut ins: Vec<Value> = vec![];
        let mut nodes = vec![];
        let mut flops = (0, 0);
        for &m in &members {
            let node = &self.g.nodes()[m];
            let sources = node
                .ins
                .iter()
                .map(|&v| match index(self.g.node_of(v).0 as usize) {
                    Some(n) => {
                        let o = self.g.nodes()[members[n]].outs.iter().position(|&x| x == v);
                        Source::Node(n, o.expect("a value is among the results of its node"))
                    }
                    None => {
                        let known = ins.iter().position(|&x| x == v);
                        Source::Input(known.unwrap_or_else(|| {
                            ins.push(v);
                            ins.len() - 1
                        }))
                    }
                })
                .collect();
            let outs: Vec<Type> = node.outs.iter().map(|&v| self.ty(v).clone()).collect();
            let types: Vec<Type> = node.ins.iter().map(|&v| self.ty(v).clone()).collect();
            let f = self.op(m).flops(&types, &outs);
            flops = (flops.0 + f.float, flops.1 + f.ternary);
            nodes.push(ClusterNode { op: self.op(m).clone(), ins: sources, outs });
        }
        let mut outputs = vec![];
        let mut outs = vec![];
        for (n, &m) in members.iter().enumerate() {
            for (o, &v) in self.g.nodes()[m].outs.iter().enumerate() {
                let inside = members.iter().flat_map(|&x| &self.g.nodes()[x].ins).filter(|x| **x == v).count() as u32;
                if self.uses[v.0 as usize] > inside {
                    outputs.push((n, o));
                    outs.push(v);
                }
            }
        }
        let anchor = before.len();
        let inputs = ins.iter().map(|&v| self.ty(v).clone()).collect();
        Run {
            cluster: Cluster { inputs, nodes, anchor, outputs, variant: Variant::default() },
            ins,
            outs,
            site: self.g.nodes()[draft.anchor].site.clone(),
            flops,
        }
    }
}
