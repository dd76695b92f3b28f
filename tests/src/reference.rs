//! The meaning of a graph: every node evaluated by the reference semantics of its operation.
//!
//! Slow and obvious on purpose. What compiles and runs a graph is compared with this, so it shares no code with it.

use std::collections::HashMap;
use std::rc::Rc;

use chimera_ir::graph::{Kind, Repeat};
use chimera_ir::{Graph, Tensor, Value};

/// Weights, and carried states by name and loop iteration. A state that is absent is zero.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Weights by name.
    pub weights: HashMap<String, Tensor>,
    /// States by name and copy.
    pub states: HashMap<(String, usize), Tensor>,
}

impl Memory {
    fn write(&mut self, name: &str, copy: usize, t: Tensor) {
        match self.weights.get_mut(name) {
            Some(weight) => *weight = t,
            None => drop(self.states.insert((name.to_owned(), copy), t)),
        }
    }
}

/// Evaluate `g`: the outputs by name. Writes take effect in `memory` when all of the graph has run, those of a loop body after each
/// iteration.
///
/// # Panics
/// When an input or a weight is missing, or has another type than the graph declares.
pub fn evaluate(g: &Graph, inputs: &HashMap<String, Tensor>, memory: &mut Memory) -> HashMap<String, Tensor> {
    let results = run(g, &HashMap::new(), inputs, 0, memory);
    g.outputs.iter().map(|(name, v)| (name.clone(), Tensor::clone(&results[v.0 as usize]))).collect()
}

type Values = Vec<Rc<Tensor>>;

fn run(
    g: &Graph,
    given: &HashMap<Value, Rc<Tensor>>,
    inputs: &HashMap<String, Tensor>,
    iteration: usize,
    memory: &mut Memory,
) -> Values {
    let mut values: Values = Vec::with_capacity(g.n_values());
    for node in g.nodes() {
        let ins: Values = node.ins.iter().map(|v| Rc::clone(&values[v.0 as usize])).collect();
        let ty = |i: usize| g.ty(node.outs[i]);
        let source = |what: &str, name: &str, t: Option<&Tensor>| {
            let t = t.unwrap_or_else(|| panic!("the graph needs {what} `{name}`"));
            assert_eq!(&t.ty, ty(0), "{what} `{name}`");
            vec![Rc::new(t.clone())]
        };
        let outs = match &node.kind {
            Kind::Input(name) => match given.get(&node.outs[0]) {
                Some(t) => vec![Rc::clone(t)],
                None => source("input", name, inputs.get(name)),
            },
            Kind::Param(name) => source("weight", name, memory.weights.get(name)),
            Kind::State(name) => {
                let fresh = Tensor::zeros(ty(0));
                source("state", name, Some(memory.states.get(&(name.clone(), iteration)).unwrap_or(&fresh)))
            }
            Kind::Const(t) => vec![Rc::new(t.clone())],
            Kind::Op(op) => {
                let ins: Vec<&Tensor> = ins.iter().map(Rc::as_ref).collect();
                op.eval(&ins).into_iter().map(Rc::new).collect()
            }
            Kind::Repeat(r) => repeat(r, ins, memory),
        };
        assert_eq!(outs.len(), node.outs.len(), "{} at {}", node.kind.name(), node.site);
        for (i, out) in outs.iter().enumerate() {
            assert_eq!(&out.ty, ty(i), "result {i} of {} at {}", node.kind.name(), node.site);
        }
        values.extend(outs);
    }
    for (name, v) in &g.writes {
        memory.write(name, iteration, Tensor::clone(&values[v.0 as usize]));
    }
    values
}

fn repeat(r: &Repeat, mut ins: Values, memory: &mut Memory) -> Values {
    for iteration in 0..r.max {
        let counter = Rc::new(Tensor::i32(&[1], vec![iteration as i32]));
        let given = r.args.iter().copied().zip([counter].into_iter().chain(ins.iter().cloned())).collect();
        let values = run(&r.body, &given, &HashMap::new(), iteration, memory);
        let outs: Values = r.body.outputs.iter().map(|(_, v)| Rc::clone(&values[v.0 as usize])).collect();
        ins[..r.n_carried].clone_from_slice(&outs[..r.n_carried]);
        if outs[r.n_carried].to_i64()[0] == 0 {
            break;
        }
    }
    ins.truncate(r.n_carried);
    ins
}
