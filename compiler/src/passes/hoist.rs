//! What depends on weights only moves out of the entry points into `prepare`, which runs when weights change.

use std::collections::HashMap;

use chimera_ir::{
    Graph, Value,
    graph::{Kind, Node},
    ops::InferError,
};

use crate::rebuild::{Rebuild, rebuild};

/// The prefix of names of derived weights.
pub const DERIVED: &str = "derived.";

/// The `prepare` graph under construction, shared by all entry points of a plan.
#[derive(Debug, Default)]
pub struct Prepare {
    graph: Graph,
    seen: HashMap<(String, Vec<Value>), Vec<Value>>,
    wanted: Vec<Value>,
}

impl Prepare {
    /// The finished graph: one output for every derived weight.
    pub fn finish(mut self) -> Graph {
        self.graph.outputs = self.wanted.iter().map(|v| (format!("{DERIVED}{}", v.0), *v)).collect();
        self.graph
    }

    /// Move weight-only values of `g` here.
    pub fn hoist(&mut self, g: &Graph) -> Result<Graph, InferError> {
        let mut inside: HashMap<(*const Graph, Value), Value> = HashMap::new();
        let frozen = Frozen::of(g);
        rebuild(g, &mut |cx, node| {
            let here = std::ptr::from_ref(cx.old);
            if !frozen.contains(here, node) {
                return Ok(None);
            }
            let ins: Vec<Value> = node.ins.iter().map(|&v| inside[&(here, v)]).collect();
            let outs = self.import(cx, node, ins)?;
            inside.extend(node.outs.iter().zip(&outs).map(|(&old, &new)| ((here, old), new)));
            // Users outside see a weight; users inside are imported in turn. Unused weights are swept.
            let seen_outside = node.outs.iter().zip(&outs);
            if !matches!(node.kind, Kind::Op(_)) {
                return Ok(None);
            }
            Ok(Some(
                seen_outside
                    .map(|(&old, &new)| {
                        let ty = cx.old.ty(old).clone();
                        if frozen.needed(here, old) && !self.wanted.contains(&new) {
                            self.wanted.push(new);
                        }
                        cx.new.param(&format!("{DERIVED}{}", new.0), ty)
                    })
                    .collect(),
            ))
        })
    }

    fn import(&mut self, cx: &Rebuild<'_>, node: &Node, ins: Vec<Value>) -> Result<Vec<Value>, InferError> {
        self.graph.at(node.site.clone());
        let ty = cx.old.ty(node.outs[0]).clone();
        let key = match &node.kind {
            Kind::Op(op) => op.text(),
            Kind::Param(name) => return Ok(vec![self.graph.param(name, ty)]),
            Kind::Const(t) => format!("const {} {:?}", t.ty, t.data),
            other => unreachable!("{} does not depend on weights only", other.name()),
        };
        let key = (key, ins.clone());
        if let Some(found) = self.seen.get(&key) {
            return Ok(found.clone());
        }
        let outs = match &node.kind {
            Kind::Op(op) => self.graph.ops(op.clone(), &ins)?,
            kind => self.graph.push(kind.clone(), vec![], vec![ty]),
        };
        self.seen.insert(key, outs.clone());
        Ok(outs)
    }
}

/// Which values depend on weights and constants only, and which of them others need.
struct Frozen {
    frozen: HashMap<*const Graph, Vec<bool>>,
    needed: HashMap<*const Graph, Vec<bool>>,
}

impl Frozen {
    fn of(g: &Graph) -> Frozen {
        let mut all = Frozen { frozen: HashMap::new(), needed: HashMap::new() };
        all.visit(g, &[]);
        all
    }

    fn visit(&mut self, g: &Graph, kept: &[Value]) {
        let mut frozen = vec![false; g.n_values()];
        let mut needed = vec![false; g.n_values()];
        for node in g.nodes() {
            let is = match &node.kind {
                Kind::Param(_) | Kind::Const(_) => true,
                Kind::Op(_) => !node.ins.is_empty() && node.ins.iter().all(|v| frozen[v.0 as usize]),
                Kind::Input(_) | Kind::State(_) | Kind::Repeat(_) => false,
            };
            node.outs.iter().for_each(|v| frozen[v.0 as usize] = is);
            if !is {
                node.ins.iter().for_each(|v| needed[v.0 as usize] = true);
            }
            if let Kind::Repeat(repeat) = &node.kind {
                self.visit(&repeat.body, &repeat.args);
            }
        }
        let results = g.outputs.iter().chain(&g.writes).map(|(_, v)| v);
        results.chain(kept).for_each(|v| needed[v.0 as usize] = true);
        self.frozen.insert(std::ptr::from_ref(g), frozen);
        self.needed.insert(std::ptr::from_ref(g), needed);
    }

    fn contains(&self, g: *const Graph, node: &Node) -> bool {
        node.outs.iter().all(|v| self.frozen[&g][v.0 as usize])
    }

    fn needed(&self, g: *const Graph, v: Value) -> bool {
        self.needed[&g][v.0 as usize]
    }
}
