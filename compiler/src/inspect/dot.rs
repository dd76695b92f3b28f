//! The steps of an entry point as a Graphviz graph.
//!
//! An edge leads from the step that wrote a buffer last to each step that reads it. Weights and what is derived from them are left
//! out, because they would touch every step.

use std::collections::HashMap;

use chimera_ir::{
    loops::Role,
    plan::{BufferId, Entry, Place, Plan, Step},
};
use petgraph::{
    dot::{Config, Dot},
    graph::{DiGraph, NodeIndex},
};

#[derive(Clone, Debug)]
struct Shape {
    label: String,
    shape: &'static str,
}

/// A name for the first byte of a place. In the arena only one buffer at a time starts there.
fn key(place: Place) -> (u8, u64) {
    match place {
        Place::Arena(at) => (0, at),
        Place::Persistent(at) => (1, at),
        Place::Weight(i) => (2, i.into()),
        Place::State(i) => (3, i.into()),
    }
}

struct Flow<'a> {
    plan: &'a Plan,
    graph: DiGraph<Shape, String>,
    /// The node that wrote these bytes last.
    writer: HashMap<(u8, u64), NodeIndex>,
}

impl Flow<'_> {
    fn node(&mut self, label: String, shape: &'static str) -> NodeIndex {
        self.graph.add_node(Shape { label, shape })
    }

    fn read(&mut self, at: NodeIndex, b: BufferId) {
        let buffer = self.plan.buffer(b);
        let from = match (self.writer.get(&key(buffer.place)), buffer.place) {
            (Some(&from), _) => from,
            (None, Place::State(_)) => {
                let from = self.node(format!("state {}", buffer.name), "cylinder");
                self.writer.insert(key(buffer.place), from);
                from
            }
            (None, _) => return,
        };
        if from != at {
            self.graph.add_edge(from, at, buffer.ty.to_string());
        }
    }

    fn write(&mut self, at: NodeIndex, b: BufferId) {
        self.writer.insert(key(self.plan.buffer(b).place), at);
    }

    fn step(&mut self, i: usize, step: &Step) {
        match step {
            Step::Run { kernel, args, .. } => {
                let k = &self.plan.kernels[kernel.0 as usize];
                let at = self.node(format!("{i}: {}", k.name), "box");
                let roles = k.bufs.iter().map(|b| b.role).filter(|r| *r != Role::Scratch);
                let args: Vec<(Role, BufferId)> = roles.zip(args.iter().copied()).collect();
                args.iter().filter(|a| a.0 != Role::Out).for_each(|a| self.read(at, a.1));
                args.iter().filter(|a| a.0 != Role::In).for_each(|a| self.write(at, a.1));
            }
            Step::Copy { from, to } => {
                let at = self.node(format!("{i}: copy"), "box");
                self.read(at, *from);
                self.write(at, *to);
            }
            Step::LoopBegin { max, counter } => {
                let at = self.node(format!("{i}: loop, at most {max} iterations"), "diamond");
                self.write(at, *counter);
            }
            Step::LoopEnd { again } => {
                let at = self.node(format!("{i}: end of loop"), "diamond");
                self.read(at, *again);
            }
        }
    }
}

/// The steps of `entry` in the DOT language.
pub fn dot(plan: &Plan, entry: &Entry) -> String {
    let mut flow = Flow { plan, graph: DiGraph::new(), writer: HashMap::new() };
    for (name, b) in &entry.inputs {
        let at = flow.node(format!("input {name}"), "ellipse");
        flow.write(at, *b);
    }
    for (i, step) in entry.steps.iter().enumerate() {
        flow.step(i, step);
    }
    for (name, b) in &entry.outputs {
        let at = flow.node(format!("output {name}"), "ellipse");
        flow.read(at, *b);
    }
    let edge =
        |_: &DiGraph<Shape, String>, e: petgraph::graph::EdgeReference<'_, String>| format!("label = {:?}", e.weight());
    let node =
        |_: &DiGraph<Shape, String>, (_, s): (NodeIndex, &Shape)| format!("label = {:?}, shape = {}", s.label, s.shape);
    let config = [Config::NodeNoLabel, Config::EdgeNoLabel];
    format!("{:?}", Dot::with_attr_getters(&flow.graph, &config, &edge, &node))
}
