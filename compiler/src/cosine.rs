//! How well an estimate points along the true gradient: inner products of both, as a graph.
//!
//! The estimate is that of the update, in the units of the gradient; the gradient is that of `grad`, through every iteration of a loop.
//! Nothing is written.

use std::collections::HashMap;

use chimera_ir::{
    DType, Data, Graph, Tensor, Type, Value,
    ops::{AddTotal, Binary, BinaryFn, InferError, RowSquares},
    plan::WeightKind,
};

use crate::{
    estimators::{Cx, Scheme, Weight},
    passes::grad::GRAD,
    update::{Quantised, Target},
};

/// The inner product of estimate and gradient of a weight, an output of `cosine`: `f64 [1]`.
pub const INNER: &str = "inner.";
/// The squared length of the gradient of a weight: `f64 [1]`.
pub const GRADIENT: &str = "gradient.";
/// The squared length of the estimate for a weight: `f64 [1]`.
pub const ESTIMATE: &str = "estimate.";

/// The unrolled graph of a loss with outputs `estimate.NAME` for every target that it reads. Further inputs: `c` (`f32 [M]`), `seed`
/// (`i32 [2]`), `step` (`i32 [1]`).
///
/// # Errors
/// When an operation refuses its operands.
pub fn estimates(
    loss: &Graph,
    scheme: &Scheme,
    members: usize,
    targets: &[Target],
    quantised: &Quantised,
) -> Result<Graph, InferError> {
    let mut g = loss.clone();
    g.at("estimate");
    let c = g.input("c", Type::f32(&[members]));
    let seed = g.input("seed", Type::i32(&[2]));
    let step = g.input("step", Type::i32(&[1]));
    let first = g.constant(Tensor::i32(&[1], vec![0]));
    for t in targets.iter().filter(|t| !t.exact) {
        let Some(v) = g.find_param(&t.name) else { continue };
        let scales = match t.kind {
            WeightKind::Buffer | WeightKind::Optimizer | WeightKind::Packed => continue,
            WeightKind::Ternary => Some(quantised.scales(&mut g, v)?),
            WeightKind::Matrix | WeightKind::Embedding | WeightKind::Vector => None,
        };
        let w = Weight { name: t.name.clone(), kind: t.kind, v, scales };
        let mut cx = Cx { g: &mut g, random: [seed, step, first], members };
        let estimate = scheme.estimator().gradient(&mut cx, &w, c)?;
        g.outputs.push((format!("{ESTIMATE}{}", t.name), estimate));
    }
    Ok(g)
}

/// Inner products in place of the estimates and gradients of a differentiated graph.
///
/// # Errors
/// When an operation refuses its operands.
pub fn compared(old: &Graph) -> Result<Graph, InferError> {
    let mut g = old.clone();
    g.at("cosine");
    let outputs = std::mem::take(&mut g.outputs);
    let gradients: HashMap<&str, Value> =
        outputs.iter().filter_map(|(name, v)| Some((name.strip_prefix(GRAD)?, *v))).collect();
    let none = g.constant(Tensor { ty: Type::new(DType::F64, &[1]), data: Data::F64(vec![0.0]) });
    for (name, estimate) in &outputs {
        let Some((name, &gradient)) = name.strip_prefix(ESTIMATE).and_then(|n| Some((n, gradients.get(n)?))) else {
            continue;
        };
        let products = g.op(Binary { f: BinaryFn::Mul }, &[gradient, *estimate])?;
        let inner = g.op(AddTotal {}, &[none, products])?;
        g.outputs.push((format!("{INNER}{name}"), inner));
        for (prefix, v) in [(GRADIENT, gradient), (ESTIMATE, *estimate)] {
            let rows = g.op(RowSquares {}, &[v])?;
            let total = g.op(AddTotal {}, &[none, rows])?;
            g.outputs.push((format!("{prefix}{name}"), total));
        }
    }
    g.writes.clear();
    Ok(g)
}
