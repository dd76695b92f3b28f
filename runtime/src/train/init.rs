//! Initial weights from named random streams.
//!
//! Invariant: the values of a weight depend on its name, shape, role and the seed alone, so a model can be made weight by weight, in
//! any order, on any machine.

use super::{TrainError, quantiser};
use crate::exec::Executable;
use crate::rng::{STEP_INIT, Stream};
use chimera_ir::DType;
use chimera_ir::plan::{Plan, WeightDecl, WeightKind};

/// Standard deviation of the persistent slots of a memory layer.
const SLOT_RANGE: f32 = 0.02;
/// Least and greatest initial time step of a gated delta rule.
const TIME_STEP: [f64; 2] = [0.001, 0.1];

/// Initial value of a weight in row-major order; `range` is the standard deviation of matrices and of the embedding.
///
/// Matrices are normal, gains one, biases zero, except for the gates of the mixers and the loop, which begin where they let state
/// live long.
pub fn initial(weight: &WeightDecl, range: f64, seed: u64) -> Vec<f32> {
    let name = weight.name.as_str();
    let (n, dims) = (weight.ty.numel(), &weight.ty.dims);
    let stream = Stream::new(name, STEP_INIT, 0, seed);
    let normal = |scale: f32| {
        let mut out = vec![0.0; n];
        stream.fill_gaussian(0, &mut out);
        out.iter_mut().for_each(|x| *x *= scale);
        out
    };
    let uniform = |f: &dyn Fn(f32) -> f32| {
        let mut out = vec![0.0; n];
        stream.fill_uniform(0, &mut out);
        out.iter_mut().for_each(|x| *x = f(*x));
        out
    };
    let ends = |suffix: &str| name.ends_with(suffix);
    if weight.kind == WeightKind::Optimizer {
        return vec![0.0; n];
    }
    if ends("norm.weight") || name == "loop.B" {
        return vec![1.0; n];
    }
    if name == "loop.dt" {
        // Gives exp(-softplus(dt)) = sqrt(1/5).
        return vec![(0.5 * 5f64.ln()).exp_m1().ln() as f32; n];
    }
    if name == "loop.C.weight" {
        return (0..n).map(|i| if i / dims[0] == i % dims[0] { 1.0 } else { 0.0 }).collect();
    }
    if ends("A_log") && name != "loop.A_log" {
        return uniform(&|u| (16.0 * u).ln());
    }
    if ends("dt_bias") {
        let [least, greatest] = TIME_STEP.map(f64::ln);
        return uniform(&|u| {
            let dt = (u * (greatest - least) as f32 + least as f32).exp().max(1e-4);
            // The inverse of softplus.
            dt + (-(-dt).exp_m1()).ln()
        });
    }
    if is_convolution(name) {
        let width = (dims[1] as f64).sqrt() as f32;
        return uniform(&|u| (2.0 * u - 1.0) / width);
    }
    match () {
        () if ends("igate.bias") => vec![-10.0; n],
        () if ends("fgate.bias") => (0..n).map(|i| 3.0 + 3.0 * i as f32 / (n.max(2) - 1) as f32).collect(),
        () if ends(".alpha_proj.bias") => vec![-4.6; n],
        () if ends(".eta_proj.bias") => vec![2.2; n],
        () if ends("memory_w1") => normal((dims[2] as f64).powf(-0.5) as f32),
        () if ends("persistent_memory") => normal(SLOT_RANGE),
        () => match weight.kind {
            WeightKind::Ternary | WeightKind::Matrix | WeightKind::Embedding => normal(range as f32),
            WeightKind::Vector | WeightKind::Buffer | WeightKind::Optimizer | WeightKind::Packed => vec![0.0; n],
        },
    }
}

/// Whether the last but one part of a dotted name, or the only one, names a convolution.
fn is_convolution(name: &str) -> bool {
    let mut parts = name.rsplit('.');
    let last = parts.next().unwrap_or_default();
    parts.next().unwrap_or(last).contains("_conv")
}

/// The standard deviation of initial matrices that the configuration of a plan asks for.
///
/// # Errors
/// When the plan's configuration is not a JSON object with a number `initializer_range`.
pub fn initializer_range(plan: &Plan) -> Result<f64, TrainError> {
    let config: serde_json::Value = serde_json::from_str(&plan.config).unwrap_or_default();
    let range = config.get("initializer_range").and_then(serde_json::Value::as_f64);
    range
        .ok_or_else(|| TrainError::Plan("its configuration has no number `initializer_range`; compile it again".into()))
}

/// Give every weight of `exec` its initial value.
///
/// # Errors
/// As for [`initializer_range`], or a weight that cannot be set.
pub fn initialise(exec: &mut Executable, seed: u64) -> Result<(), TrainError> {
    let range = initializer_range(exec.plan())?;
    for weight in exec.plan().weights.clone() {
        let (name, dims, n) = (&weight.name, &weight.ty.dims, weight.ty.numel());
        match weight.ty.dtype {
            DType::I8 => exec.set_weight(name, dims, &vec![0i8; n])?,
            DType::U8 => exec.set_weight(name, dims, &vec![0u8; n])?,
            _ => exec.set_weight(name, dims, &initial(&weight, range, seed))?,
        }
    }
    quantiser::settle(exec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use chimera_ir::Type;

    fn value(name: &str, kind: WeightKind, dims: &[usize]) -> Vec<f32> {
        initial(&WeightDecl { name: name.into(), kind, ty: Type::f32(dims) }, 0.02, 3)
    }

    #[test]
    fn roles_and_names_decide() {
        let matrix = value("layers.0.mlp.up_proj.weight", WeightKind::Ternary, &[40, 50]);
        let spread = (matrix.iter().map(|x| x * x).sum::<f32>() / 2000.0).sqrt();
        assert!((spread - 0.02).abs() < 0.002, "{spread}");
        let first = Stream::new("layers.0.mlp.up_proj.weight", STEP_INIT, 0, 3).gaussian(0);
        assert_eq!(matrix[0], first * 0.02);
        assert_eq!(value("layers.0.attn_norm.weight", WeightKind::Vector, &[3]), [1.0; 3]);
        assert_eq!(value("optim.momentum.layers.0.attn_norm.weight", WeightKind::Optimizer, &[3]), [0.0; 3]);
        assert_eq!(value("layers.1.attn.fgate.bias", WeightKind::Vector, &[3]), [3.0, 4.5, 6.0]);
        assert_eq!(value("layers.1.attn.fgate.bias", WeightKind::Vector, &[1]), [3.0]);
        assert_eq!(value("layers.1.attn.knot_gate", WeightKind::Vector, &[1]), [0.0]);
        assert_eq!(value("loop.C.weight", WeightKind::Matrix, &[2, 2]), [1.0, 0.0, 0.0, 1.0]);
        assert!(value("layers.0.attn.q_conv.weight", WeightKind::Vector, &[8, 4]).iter().all(|x| x.abs() <= 0.5));
    }
}
