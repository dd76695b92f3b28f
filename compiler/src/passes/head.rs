//! The gradient of the final norm and the head alone (semantics 13.2, ElasticZO): what a plan that probes all other weights may know
//! exactly.
//!
//! The last hidden states are constants, so nothing is differentiated below them. The embedding has the gradient of its use as the head,
//! none of its use as a table of tokens.

use std::collections::HashSet;

use chimera_ir::{Graph, Op, Tensor, Value, graph::Kind, ops::InferError};

use crate::{descend, passes::grad::GRAD};

/// The weights of the final norm and the head.
pub const HEAD: [&str; 2] = ["norm.weight", "embed.weight"];

/// Weights without those of the head.
pub(crate) fn below(trainable: &HashSet<String>) -> HashSet<String> {
    trainable.iter().filter(|name| !HEAD.contains(&name.as_str())).cloned().collect()
}

/// The graph of a loss with the gradient of the head's weights among `trainable` in states `grad.NAME`, and the sum of their squares as
/// its output.
///
/// # Errors
/// A graph without a head, no such weight, or an operation that refuses its operands.
pub fn graph(loss: &Graph, trainable: &HashSet<String>) -> Result<Graph, InferError> {
    let fail = |why: &str| InferError::new("head", why);
    let mut g = loss.clone();
    let end = g.outputs.iter().find(|(name, _)| name == "loss").map(|(_, v)| *v);
    let end = end.ok_or_else(|| fail("the graph has no output loss"))?;
    let ce = g.nodes().iter().find(|n| matches!(n.kind, Kind::Op(Op::CrossEntropy(_))));
    let panels = ce.map(|n| n.ins[1]).ok_or_else(|| fail("the loss is no cross-entropy"))?;
    let is_table = |v: Value| matches!(&g.def(v).kind, Kind::Param(name) if name == HEAD[1]);
    if !g.def(panels).ins.iter().copied().any(is_table) {
        return Err(fail("the head is not made of the embedding"));
    }
    let found = HEAD.into_iter().filter(|name| trainable.contains(*name));
    let weights: Vec<(&str, Value)> =
        found.filter_map(|name| Some((name, if name == HEAD[1] { panels } else { g.find_param(name)? }))).collect();
    if weights.is_empty() {
        return Err(fail("neither the final norm nor the head is trained; leave its gradient out"));
    }
    let seed = g.constant(Tensor::f32(&[1], vec![1.0]));
    let wanted: Vec<Value> = weights.iter().map(|w| w.1).collect();
    let grads = g.grad(end, seed, &wanted)?;
    g.outputs.clear();
    g.writes.clear();
    for (name, v) in weights {
        let grad = grads[v.0 as usize].ok_or_else(|| fail("the loss does not depend on the head"))?;
        let expected = g.find_param(name).map(|v| g.ty(v).clone());
        if expected.as_ref() != Some(g.ty(grad)) {
            return Err(fail(&format!("the gradient of {name} is {}, which is not its shape", g.ty(grad))));
        }
        g.outputs.push((format!("{GRAD}{name}"), grad));
    }
    descend::keep(&g, false)
}
