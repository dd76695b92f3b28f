//! The tensor graph: an append-only arena of SSA values.
//!
//! Values appear after everything they use. A node may have several results. Loops are nodes that own a body graph.

use std::{collections::HashMap, fmt};

use crate::{
    Op, Tensor, Type,
    ops::{Binary, BinaryFn, InferError, VjpCx},
};

/// What the sites of gradients end with, behind the site that is differentiated.
pub const GRAD_SITE: &str = ".grad";

/// A reference to one value of a [`Graph`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(pub u32);

/// A reference to one node of a [`Graph`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u32);

/// How a node comes to its values.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A tensor given with every call.
    Input(String),
    /// A named weight.
    Param(String),
    /// The carried state of that name, as it was before the call (inside a loop: of the current iteration).
    State(String),
    /// A literal.
    Const(Tensor),
    /// An operation.
    Op(Op),
    /// A loop.
    Repeat(Box<Repeat>),
}

/// A loop of at most `max` iterations whose body exists once.
///
/// Inputs of the node: the start values of the carried values, then the invariants. Arguments of the body, in order: the iteration
/// number (`i32[1]`), the carried values, the invariants. Outputs of the body: the next carried values, then `i32[1]`, non-zero
/// when another iteration is wanted. The first iteration always runs. Results of the node: the final carried values.
#[derive(Clone, Debug)]
pub struct Repeat {
    /// The body.
    pub body: Graph,
    /// The arguments of the body.
    pub args: Vec<Value>,
    /// How many values are carried.
    pub n_carried: usize,
    /// The upper bound of the number of iterations; every state in the body exists once for each.
    pub max: usize,
}

/// One node.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it does.
    pub kind: Kind,
    /// What it uses.
    pub ins: Vec<Value>,
    /// Its results.
    pub outs: Vec<Value>,
    /// The part of the model it belongs to, such as `layers.3.attn`.
    pub site: String,
}

#[derive(Clone, Debug)]
struct ValueInfo {
    ty: Type,
    node: NodeId,
}

/// A tensor program in SSA form.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    nodes: Vec<Node>,
    values: Vec<ValueInfo>,
    params: HashMap<String, Value>,
    states: HashMap<String, Value>,
    site: String,
    /// Named results.
    pub outputs: Vec<(String, Value)>,
    /// New contents of states and weights, by name; they take effect when all of the graph has run.
    pub writes: Vec<(String, Value)>,
}

impl Graph {
    /// Nodes appended from now on belong to this part of the model.
    pub fn at(&mut self, site: impl Into<String>) {
        self.site = site.into();
    }

    /// The part of the model that nodes are appended to.
    pub fn site(&self) -> &str {
        &self.site
    }

    /// The weight or state of that name before the call, if the graph has it.
    pub fn find_memory(&self, name: &str) -> Option<Value> {
        self.params.get(name).or_else(|| self.states.get(name)).copied()
    }

    /// Append an input.
    pub fn input(&mut self, name: impl Into<String>, ty: Type) -> Value {
        self.source(Kind::Input(name.into()), ty)
    }

    /// Append a weight, or find it if it is there already.
    pub fn param(&mut self, name: &str, ty: Type) -> Value {
        if let Some(&found) = self.params.get(name) {
            return found;
        }
        self.source(Kind::Param(name.to_owned()), ty)
    }

    /// The weight of that name, if the graph has it.
    pub fn find_param(&self, name: &str) -> Option<Value> {
        self.params.get(name).copied()
    }

    /// Append the contents of a state before the call, or find them if they are there already.
    pub fn state(&mut self, name: impl Into<String>, ty: Type) -> Value {
        let name = name.into();
        let found = self.states.get(&name).copied();
        found.unwrap_or_else(|| self.source(Kind::State(name), ty))
    }

    /// Append a literal.
    pub fn constant(&mut self, t: Tensor) -> Value {
        let ty = t.ty.clone();
        self.source(Kind::Const(t), ty)
    }

    fn source(&mut self, kind: Kind, ty: Type) -> Value {
        self.push(kind, vec![], vec![ty])[0]
    }

    /// Append an operation with several results; their types are inferred, never stated.
    pub fn ops(&mut self, op: impl Into<Op>, ins: &[Value]) -> Result<Vec<Value>, InferError> {
        let op = op.into();
        let types: Vec<Type> = ins.iter().map(|&v| self.ty(v).clone()).collect();
        let outs = op.infer(&types)?;
        Ok(self.push(Kind::Op(op), ins.to_vec(), outs))
    }

    /// Append an operation with one result.
    pub fn op(&mut self, op: impl Into<Op>, ins: &[Value]) -> Result<Value, InferError> {
        Ok(self.ops(op, ins)?[0])
    }

    /// Append a loop; see [`Repeat`] for the order of `ins`.
    pub fn repeat(&mut self, repeat: Repeat, ins: &[Value]) -> Result<Vec<Value>, InferError> {
        let fail = |why: String| Err(InferError::new("repeat", why));
        let (n, body) = (repeat.n_carried, &repeat.body);
        if repeat.args.len() != ins.len() + 1 || body.outputs.len() != n + 1 || ins.len() < n {
            return fail("the body does not take or return what the loop carries".into());
        }
        for (i, v) in ins.iter().enumerate() {
            if self.ty(*v) != body.ty(repeat.args[i + 1]) {
                return fail(format!("operand {i} is {}, the body wants {}", self.ty(*v), body.ty(repeat.args[i + 1])));
            }
        }
        let outs: Vec<Type> = ins[..n].iter().map(|&v| self.ty(v).clone()).collect();
        for (i, ty) in outs.iter().enumerate() {
            if body.ty(body.outputs[i].1) != ty {
                return fail(format!("carried value {i} changes its type"));
            }
        }
        Ok(self.push(Kind::Repeat(Box::new(repeat)), ins.to_vec(), outs))
    }

    /// Append a node of any kind with known result types.
    pub fn push(&mut self, kind: Kind, ins: Vec<Value>, tys: Vec<Type>) -> Vec<Value> {
        let node = NodeId(self.nodes.len() as u32);
        match &kind {
            Kind::Param(name) => drop(self.params.insert(name.clone(), Value(self.values.len() as u32))),
            Kind::State(name) => drop(self.states.insert(name.clone(), Value(self.values.len() as u32))),
            _ => {}
        }
        let first = self.values.len() as u32;
        let outs: Vec<Value> = (0..tys.len() as u32).map(|i| Value(first + i)).collect();
        self.values.extend(tys.into_iter().map(|ty| ValueInfo { ty, node }));
        self.nodes.push(Node { kind, ins, outs: outs.clone(), site: self.site.clone() });
        outs
    }

    /// The type of `v`.
    pub fn ty(&self, v: Value) -> &Type {
        &self.values[v.0 as usize].ty
    }

    /// The node that defines `v`.
    pub fn def(&self, v: Value) -> &Node {
        &self.nodes[self.values[v.0 as usize].node.0 as usize]
    }

    /// The id of the node that defines `v`.
    pub fn node_of(&self, v: Value) -> NodeId {
        self.values[v.0 as usize].node
    }

    /// A node.
    pub fn node(&self, n: NodeId) -> &Node {
        &self.nodes[n.0 as usize]
    }

    /// All nodes in definition order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The number of values.
    pub fn n_values(&self) -> usize {
        self.values.len()
    }

    /// How often each value is used, outputs and writes included.
    pub fn uses(&self) -> Vec<u32> {
        let mut uses = vec![0; self.values.len()];
        let results = self.outputs.iter().chain(&self.writes).map(|(_, v)| v);
        self.nodes.iter().flat_map(|n| &n.ins).chain(results).for_each(|v| uses[v.0 as usize] += 1);
        uses
    }

    /// Check every invariant that construction cannot enforce: order of definitions, operand types, and inferred result types.
    pub fn verify(&self) -> Result<(), InferError> {
        let mut next = 0;
        for node in &self.nodes {
            let fail =
                |why: &str| Err(InferError::new("graph", format!("{} at {}: {why}", node.kind.name(), node.site)));
            if node.ins.iter().any(|v| v.0 >= next) {
                return fail("an operand is not defined yet");
            }
            if let Kind::Op(op) = &node.kind {
                let ins: Vec<Type> = node.ins.iter().map(|&v| self.ty(v).clone()).collect();
                let outs: Vec<Type> = node.outs.iter().map(|&v| self.ty(v).clone()).collect();
                if op.infer(&ins)? != outs {
                    return fail("the result types are not the inferred ones");
                }
            }
            if let Kind::Repeat(r) = &node.kind {
                r.body.verify()?;
            }
            next += node.outs.len() as u32;
        }
        match self.outputs.iter().chain(&self.writes).find(|(_, v)| v.0 >= next) {
            Some((name, _)) => Err(InferError::new("graph", format!("result {name} is not defined"))),
            None => Ok(()),
        }
    }

    /// Give every state another name, those of loops too.
    pub fn rename_states(&mut self, name: &dyn Fn(&str) -> String) {
        for node in &mut self.nodes {
            match &mut node.kind {
                Kind::State(state) => *state = name(state),
                Kind::Repeat(r) => r.body.rename_states(name),
                _ => {}
            }
        }
        self.writes.iter_mut().for_each(|(state, _)| *state = name(state));
    }

    /// Append the gradient of `loss` (seeded by `seed`) with respect to every value that lies between it and one of `wanted`.
    ///
    /// Loops are constants: what is to be differentiated is unrolled before. An error names the part of the model.
    pub fn grad(&mut self, loss: Value, seed: Value, wanted: &[Value]) -> Result<Vec<Option<Value>>, InferError> {
        let mut reached = vec![false; self.values.len()];
        wanted.iter().for_each(|v| reached[v.0 as usize] = true);
        for node in &self.nodes {
            if matches!(node.kind, Kind::Op(_)) && node.ins.iter().any(|v| reached[v.0 as usize]) {
                node.outs.iter().for_each(|v| reached[v.0 as usize] = true);
            }
        }
        let mut grads: Vec<Option<Value>> = vec![None; self.values.len()];
        grads[loss.0 as usize] = Some(seed);
        for n in (0..=self.node_of(loss).0).rev() {
            let node = self.nodes[n as usize].clone();
            let outs: Vec<Option<Value>> = node.outs.iter().map(|v| grads[v.0 as usize]).collect();
            let wanted: Vec<bool> = node.ins.iter().map(|v| reached[v.0 as usize]).collect();
            let Kind::Op(op) = &node.kind else { continue };
            if outs.iter().all(Option::is_none) || !wanted.contains(&true) {
                continue;
            }
            self.site = format!("{}{GRAD_SITE}", node.site);
            let mut cx = VjpCx { graph: self, ins: &node.ins, outs: &node.outs, grads: &outs, wanted: &wanted };
            let at = |e: InferError| {
                InferError::new(e.op, format!("{} (gradient of {} at {})", e.why, op.name(), node.site))
            };
            for ((input, partial), wanted) in node.ins.iter().zip(op.vjp(&mut cx).map_err(at)?).zip(wanted) {
                let slot = grads[input.0 as usize];
                grads[input.0 as usize] = match (slot, partial.filter(|_| wanted)) {
                    (Some(a), Some(b)) => Some(self.op(Binary { f: BinaryFn::Add }, &[a, b])?),
                    (a, b) => a.or(b),
                };
            }
        }
        Ok(grads)
    }
}

impl Kind {
    /// A word for people: the operation's name, or what else the node is.
    pub fn name(&self) -> &str {
        match self {
            Kind::Input(_) => "input",
            Kind::Param(_) => "param",
            Kind::State(_) => "state",
            Kind::Const(_) => "const",
            Kind::Op(op) => op.name(),
            Kind::Repeat(_) => "repeat",
        }
    }
}

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_graph(self, f, 0)
    }
}

fn write_graph(g: &Graph, f: &mut fmt::Formatter<'_>, depth: usize) -> fmt::Result {
    let pad = "  ".repeat(depth);
    let list = |vs: &[Value]| vs.iter().map(|v| format!("%{}", v.0)).collect::<Vec<_>>().join(", ");
    for node in &g.nodes {
        let tys: Vec<String> = node.outs.iter().map(|&v| g.ty(v).to_string()).collect();
        let what = match &node.kind {
            Kind::Input(n) | Kind::Param(n) | Kind::State(n) => format!("{} \"{n}\"", node.kind.name()),
            Kind::Const(_) => "const".into(),
            Kind::Op(op) => op.text(),
            Kind::Repeat(r) => format!("repeat max={} carried={}", r.max, r.n_carried),
        };
        writeln!(f, "{pad}{} = {what}({}) : {}  # {}", list(&node.outs), list(&node.ins), tys.join(", "), node.site)?;
        if let Kind::Repeat(r) = &node.kind {
            writeln!(f, "{pad}  args {}", list(&r.args))?;
            write_graph(&r.body, f, depth + 1)?;
        }
    }
    for (name, v) in &g.outputs {
        writeln!(f, "{pad}output \"{name}\" = %{}", v.0)?;
    }
    for (name, v) in &g.writes {
        writeln!(f, "{pad}write \"{name}\" = %{}", v.0)?;
    }
    Ok(())
}
