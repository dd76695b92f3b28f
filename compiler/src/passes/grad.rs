//! From the graph of a loss to one graph of the loss and its gradients.
//!
//! Loops are unrolled as far as gradients flow through them. What stays a loop is a constant for gradients, and so are the states of
//! earlier calls; an iteration that is unrolled has states of its own, `NAME.ITERATION`.

use std::collections::HashSet;

use chimera_ir::{
    Graph, Op, Tensor, Type, Value,
    graph::{Kind, Node, Repeat},
    ops::{InferError, LoopMask, StopRows},
};

/// The prefix of the names of gradients.
pub const GRAD: &str = "grad.";

/// The graph with every loop unrolled. With `half`, gradients end at the start of the last `ceil(n / 2)` of the `n` iterations of a loop
/// (semantics 9.2): iterations before that stay a loop where all rows run `max` iterations; with rows of their own depth, each row's
/// gradient ends at its own place.
///
/// # Errors
/// When an operation refuses its operands.
pub fn unroll(old: &Graph, half: bool) -> Result<Graph, InferError> {
    let mut g = Graph::default();
    let mut map: Vec<Option<Value>> = vec![None; old.n_values()];
    for node in old.nodes() {
        g.at(node.site.clone());
        let ins = found(&map, &node.ins);
        let outs = match &node.kind {
            Kind::Repeat(r) => iterations(&mut g, r, ins, half)?,
            _ => copy(old, &mut g, node, ins)?,
        };
        node.outs.iter().zip(outs).for_each(|(v, new)| map[v.0 as usize] = Some(new));
    }
    let rename = |list: &[(String, Value)]| -> Vec<(String, Value)> {
        list.iter().map(|(n, v)| (n.clone(), found(&map, &[*v])[0])).collect()
    };
    g.outputs = rename(&old.outputs);
    g.writes.extend(rename(&old.writes));
    Ok(g)
}

fn found(map: &[Option<Value>], vs: &[Value]) -> Vec<Value> {
    vs.iter().map(|v| map[v.0 as usize].expect("values are defined before they are used")).collect()
}

fn copy(old: &Graph, g: &mut Graph, node: &Node, ins: Vec<Value>) -> Result<Vec<Value>, InferError> {
    let ty = || old.ty(node.outs[0]).clone();
    match &node.kind {
        Kind::Op(op) => g.ops(op.clone(), &ins),
        Kind::Param(name) => Ok(vec![g.param(name, ty())]),
        kind => Ok(g.push(kind.clone(), ins, vec![ty()])),
    }
}

/// The depth of every row that a body masks its iterations by, if it does.
fn own_depth(body: &Graph) -> Option<Value> {
    let mask = body.nodes().iter().find(|n| matches!(n.kind, Kind::Op(Op::LoopMask(_))));
    mask.map(|n| n.ins[0])
}

fn iterations(g: &mut Graph, r: &Repeat, mut ins: Vec<Value>, half: bool) -> Result<Vec<Value>, InferError> {
    let depth = own_depth(&r.body);
    let mut first = 0;
    if half && depth.is_none() {
        first = r.max - r.max.div_ceil(2);
        if first > 0 {
            let outs = g.repeat(Repeat { max: first, ..r.clone() }, &ins)?;
            ins[..r.n_carried].copy_from_slice(&outs);
        }
    }
    for k in first..r.max {
        if let (Some(depth), true) = (depth.filter(|_| half), k > 0) {
            // The gradient of a row of depth d flows on where d < 2 k.
            let at = r.args.iter().position(|&a| a == depth).expect("the depth is an argument of the body");
            let rows = g.ty(ins[at - 1]).clone();
            let none = g.constant(Tensor::zeros(&rows));
            let bound = g.constant(Tensor::i32(&[1], vec![2 * k as i32 - 1]));
            let cut = g.op(LoopMask {}, &[ins[at - 1], none, bound])?;
            ins[0] = g.op(StopRows {}, &[cut, ins[0]])?;
        }
        let counter = g.constant(Tensor::i32(&[1], vec![k as i32]));
        let mut map: Vec<Option<Value>> = vec![None; r.body.n_values()];
        let given = std::iter::once(counter).chain(ins.iter().copied());
        r.args.iter().zip(given).for_each(|(a, v)| map[a.0 as usize] = Some(v));
        for node in r.body.nodes() {
            if node.outs.iter().all(|v| map[v.0 as usize].is_some()) {
                continue;
            }
            g.at(node.site.clone());
            let operands = found(&map, &node.ins);
            let outs = match &node.kind {
                Kind::State(name) => vec![g.state(format!("{name}.{k}"), r.body.ty(node.outs[0]).clone())],
                _ => copy(&r.body, g, node, operands)?,
            };
            node.outs.iter().zip(outs).for_each(|(v, new)| map[v.0 as usize] = Some(new));
        }
        for (i, (_, v)) in r.body.outputs[..r.n_carried].iter().enumerate() {
            ins[i] = found(&map, &[*v])[0];
        }
        for (name, v) in &r.body.writes {
            g.writes.push((format!("{name}.{k}"), found(&map, &[*v])[0]));
        }
    }
    ins.truncate(r.n_carried);
    Ok(ins)
}

/// The unrolled graph of a loss with outputs `grad.NAME` for every weight among `trainable`, of the shape of the weight. They are
/// multiplied by an input `f32 [1]` of the name `factor` where one is given.
///
/// # Errors
/// When an operation between a weight and the loss has no gradient: its name, and the part of the model.
pub fn grad(old: &Graph, trainable: &HashSet<String>, factor: Option<&str>) -> Result<Graph, InferError> {
    let mut g = old.clone();
    let loss = g.outputs.iter().find(|(name, _)| name == "loss").map(|(_, v)| *v);
    let loss = loss.ok_or_else(|| InferError::new("grad", "the graph has no output loss"))?;
    let weight = |n: &Node| match &n.kind {
        Kind::Param(name) if trainable.contains(name) => Some((name.clone(), n.outs[0])),
        _ => None,
    };
    let mut weights: Vec<(String, Value)> = g.nodes().iter().filter_map(weight).collect();
    weights.sort();
    let seed = match factor {
        Some(name) => g.input(name, Type::f32(&[1])),
        None => g.constant(Tensor::f32(&[1], vec![1.0])),
    };
    debug_assert_eq!(g.ty(loss), &Type::f32(&[1]), "a loss is one number");
    let wanted: Vec<Value> = weights.iter().map(|w| w.1).collect();
    let grads = g.grad(loss, seed, &wanted)?;
    for (name, v) in weights {
        let grad = match grads[v.0 as usize] {
            Some(grad) => grad,
            None => {
                let zero = Tensor::zeros(g.ty(v));
                g.constant(zero)
            }
        };
        g.outputs.push((format!("{GRAD}{name}"), grad));
    }
    Ok(g)
}
