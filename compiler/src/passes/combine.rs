//! Operations that belong together become composite ones.

use chimera_ir::{
    Graph, Op, Value,
    graph::{Kind, Node},
    ops::{Binary, BinaryFn, InferError, Norm, NormKind, NormQuantise, Quantise, TernaryProduct, Unary, UnaryFn},
};

use super::Budget;
use crate::rebuild::{Rebuild, rebuild};

/// The operation that defines a value.
fn op_of(g: &Graph, v: Value) -> Option<&Op> {
    match &g.def(v).kind {
        Kind::Op(op) => Some(op),
        _ => None,
    }
}

/// `quantise(norm x)` reads `x` once: the float result stays available for other users.
pub(super) fn norm_quantise(g: &Graph, budget: &mut Budget) -> Result<Graph, InferError> {
    // The quantisation that uses a norm, if there is exactly one.
    let quantised = |g: &Graph, norm: Value| {
        let mut found =
            g.nodes().iter().filter(|n| n.ins.contains(&norm) && matches!(n.kind, Kind::Op(Op::Quantise(_))));
        found.next().filter(|_| found.next().is_none()).cloned()
    };
    // Results of a norm that has become composite, by its old value: float, codes, scales.
    let mut done: Vec<(*const Graph, Value, Vec<Value>)> = vec![];
    rebuild(g, &mut |cx, node| {
        let here = std::ptr::from_ref(cx.old);
        match &node.kind {
            Kind::Op(Op::Norm(n @ Norm { kind: NormKind::Rms, .. })) if n.width == cx.old.ty(node.ins[0]).cols() => {
                let Some(user) = quantised(cx.old, node.outs[0]) else { return Ok(None) };
                let Kind::Op(Op::Quantise(Quantise { block })) = user.kind else { return Ok(None) };
                if !budget.take() {
                    return Ok(None);
                }
                let ins = cx.all(&node.ins);
                let outs = cx.new.ops(NormQuantise { kind: n.kind, eps: n.eps, block }, &ins)?;
                done.push((here, node.outs[0], outs.clone()));
                Ok(Some(vec![outs[0]]))
            }
            Kind::Op(Op::Quantise(_)) => {
                let found = done.iter().find(|d| d.0 == here && d.1 == node.ins[0]);
                Ok(found.map(|(_, _, outs)| outs[1..].to_vec()))
            }
            _ => Ok(None),
        }
    })
}

/// `silu(product a) * product b` with the same activations: one product with two weights, whose tiles meet in registers.
pub(super) fn gate_up(g: &Graph, budget: &mut Budget) -> Result<Graph, InferError> {
    let mut first: Vec<(*const Graph, Value, Vec<Value>)> = vec![];
    rebuild(g, &mut |cx, node| {
        let here = std::ptr::from_ref(cx.old);
        let Kind::Op(Op::TernaryProduct(p)) = &node.kind else { return Ok(None) };
        if let Some((_, _, outs)) = first.iter().find(|f| f.0 == here && f.1 == node.outs[0]) {
            return Ok(Some(vec![outs[1]]));
        }
        let Some(partner) = partner(cx, node, p).filter(|_| budget.take()) else { return Ok(None) };
        let [codes, scales, packed, alpha] = [0, 1, 2, 3].map(|i| cx.get(node.ins[i]));
        let mut ins = vec![codes, scales, packed, alpha];
        for &w in &partner.ins[2..4] {
            ins.push(early(cx, w)?);
        }
        ins.extend(node.ins.get(4).map(|&v| cx.get(v)));
        let outs = cx.new.ops(TernaryProduct { n_weights: 2, ..p.clone() }, &ins)?;
        first.push((here, partner.outs[0], outs.clone()));
        Ok(Some(vec![outs[0]]))
    })
}

/// The product that meets `node` in a gate, if it comes later and has the same operands but for the weight.
fn partner(cx: &Rebuild<'_>, node: &Node, p: &TernaryProduct) -> Option<Node> {
    if p.n_weights != 1 {
        return None;
    }
    let g = cx.old;
    let users = |v: Value| g.nodes().iter().filter(move |n| n.ins.contains(&v)).collect::<Vec<_>>();
    let mut users_of_gate = users(node.outs[0]);
    // Low-rank corrections may stand between the product and the gate.
    while let [one] = users_of_gate[..] {
        match &one.kind {
            Kind::Op(Op::RankUpdate(_)) => users_of_gate = users(one.outs[0]),
            Kind::Op(Op::Unary(Unary { f: UnaryFn::Silu })) => {
                let gate = users(one.outs[0]);
                let [mul] = gate[..] else { return None };
                if !matches!(mul.kind, Kind::Op(Op::Binary(Binary { f: BinaryFn::Mul }))) {
                    return None;
                }
                let mut other = *mul.ins.iter().find(|&&v| v != one.outs[0])?;
                while let Some(Op::RankUpdate(_)) = op_of(g, other) {
                    other = g.def(other).ins[0];
                }
                let def = g.def(other);
                let same = def.kind_eq(node) && def.ins[..2] == node.ins[..2] && def.ins.get(4) == node.ins.get(4);
                return (same && def.outs[0] > node.outs[0] && g.ty(def.ins[2]) == g.ty(node.ins[2]))
                    .then(|| def.clone());
            }
            _ => return None,
        }
    }
    None
}

trait KindEq {
    fn kind_eq(&self, other: &Node) -> bool;
}

impl KindEq for Node {
    fn kind_eq(&self, other: &Node) -> bool {
        matches!((&self.kind, &other.kind), (Kind::Op(a), Kind::Op(b)) if a == b)
    }
}

/// Build a value at the current place: what is there is taken, what comes later is computed now.
fn early(cx: &mut Rebuild<'_>, v: Value) -> Result<Value, InferError> {
    if let Some(there) = cx.find(v) {
        return Ok(there);
    }
    let def = cx.old.def(v).clone();
    let ins = def.ins.iter().map(|&i| early(cx, i)).collect::<Result<Vec<_>, _>>()?;
    let at = def.outs.iter().position(|&o| o == v).expect("a value is among the results of its node");
    let ty = cx.old.ty(v).clone();
    Ok(match &def.kind {
        Kind::Op(op) => cx.new.ops(op.clone(), &ins)?[at],
        Kind::Param(name) => cx.new.param(name, ty),
        kind => cx.new.push(kind.clone(), vec![], vec![ty])[0],
    })
}
