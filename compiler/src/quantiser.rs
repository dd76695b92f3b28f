//! The adaptation of a dynamic ternary quantiser, as a graph (semantics 3.5).
//!
//! Scales and threshold are weights that only this entry point writes, so that no forward pass changes them.

use chimera_ir::{
    Graph, Type,
    ops::{Binary, BinaryFn, InferError, MeanAbs},
    plan::{QUANTISER, QUANTISER_TARGET, QUANTISER_THRESHOLD, WeightKind},
};

use crate::update::Target;

/// The least scale.
const LEAST: f32 = 1e-6;

/// `gamma <- keep gamma + rest max(mean |W|, 1e-6)` for every ternary weight. Inputs, `f32 [1]`: `keep` and `rest`; `threshold`
/// and `target`, which become those of the quantiser.
///
/// # Errors
/// When an operation refuses its operands.
pub fn graph(targets: &[Target]) -> Result<Graph, InferError> {
    let mut g = Graph::default();
    g.at("quantiser");
    let one = Type::f32(&[1]);
    let [keep, rest] = ["keep", "rest"].map(|name| g.input(name, one.clone()));
    for (port, name) in [("threshold", QUANTISER_THRESHOLD), ("target", QUANTISER_TARGET)] {
        let value = g.input(port, one.clone());
        g.param(name, one.clone());
        g.writes.push((name.to_owned(), value));
    }
    for t in targets.iter().filter(|t| t.kind == WeightKind::Ternary) {
        let name = format!("{QUANTISER}{}", t.name);
        let (w, before) = (g.param(&t.name, Type::f32(&t.dims)), g.param(&name, one.clone()));
        let mean = g.op(MeanAbs { floor: LEAST }, &[w])?;
        let kept = g.op(Binary { f: BinaryFn::Mul }, &[before, keep])?;
        let new = g.op(Binary { f: BinaryFn::Mul }, &[mean, rest])?;
        let next = g.op(Binary { f: BinaryFn::Add }, &[kept, new])?;
        g.writes.push((name, next));
    }
    g.verify()?;
    Ok(g)
}
