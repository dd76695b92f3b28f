//! One spelling for equal expressions.

use chimera_ir::{
    Graph, Op, Value,
    graph::Node,
    ops::{Binary, BinaryFn, InferError, Reshape, TileRows, Unary, UnaryFn},
};

use super::Budget;
use crate::rebuild::{Rebuild, Ruling, rebuild};

/// Removes operations that change nothing, and puts the operand that is computed last in front of commutative ones, where the
/// kernel that computes it can carry on.
pub(super) fn run(g: &Graph, budget: &mut Budget) -> Result<Graph, InferError> {
    rebuild(g, &mut |cx, node| rule(cx, node, budget))
}

fn rule(cx: &mut Rebuild<'_>, node: &Node, budget: &mut Budget) -> Ruling {
    let chimera_ir::graph::Kind::Op(op) = &node.kind else { return Ok(None) };
    let ins = cx.all(&node.ins);
    let same = |cx: &Rebuild<'_>, v: Value| cx.new.ty(v) == cx.old.ty(node.outs[0]);
    let replaced = match op {
        Op::Unary(Unary { f: UnaryFn::Affine { mul: 1.0, add: 0.0 } }) => Some(ins[0]),
        Op::Unary(Unary { f: UnaryFn::Neg }) => match &cx.new.def(ins[0]).kind {
            chimera_ir::graph::Kind::Op(Op::Unary(Unary { f: UnaryFn::Neg })) => Some(cx.new.def(ins[0]).ins[0]),
            _ => None,
        },
        Op::Reshape(Reshape { .. }) | Op::TileRows(TileRows { times: 1 }) if same(cx, ins[0]) => Some(ins[0]),
        _ => None,
    };
    if let Some(v) = replaced {
        return Ok(budget.take().then(|| vec![v]));
    }
    let Op::Binary(Binary { f: f @ (BinaryFn::Add | BinaryFn::Mul) }) = op else { return Ok(None) };
    let swap = cx.new.ty(ins[0]) == cx.new.ty(ins[1]) && ins[0] < ins[1] && budget.take();
    if !swap {
        return Ok(None);
    }
    Ok(Some(cx.new.ops(Binary { f: *f }, &[ins[1], ins[0]])?))
}
