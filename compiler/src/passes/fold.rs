//! Small constant expressions become constants.

use chimera_ir::{Graph, Tensor, graph::Kind, ops::InferError};

use super::Budget;
use crate::rebuild::rebuild;

/// Larger results stay expressions and are computed once, before the first call.
const LARGEST: usize = 1024;

pub(super) fn run(g: &Graph, budget: &mut Budget) -> Result<Graph, InferError> {
    rebuild(g, &mut |cx, node| {
        let Kind::Op(op) = &node.kind else { return Ok(None) };
        let small = node.outs.iter().all(|&v| cx.old.ty(v).numel() <= LARGEST);
        let ins = cx.all(&node.ins);
        let consts: Option<Vec<Tensor>> = ins
            .iter()
            .map(|&v| match &cx.new.def(v).kind {
                Kind::Const(t) => Some(t.clone()),
                _ => None,
            })
            .collect();
        let Some(consts) = consts.filter(|_| small && !node.ins.is_empty() && budget.take()) else { return Ok(None) };
        let results = op.eval(&consts.iter().collect::<Vec<_>>());
        Ok(Some(results.into_iter().map(|t| cx.new.constant(t)).collect()))
    })
}
