//! What the agreement of gradients does to the steps of a run (semantics 12.2): read from the memory of the optimiser behind a step.
//!
//! Sums are in double precision in the order of the plan, so they do not depend on threads. Nothing here changes a run.

use crate::exec::{ExecError, Executable};
use chimera_ir::DType;
use chimera_ir::plan::AGREEMENT;
use serde_json::{Value, json};

/// Names of the memory begin so.
const MEMORY: &str = "optim.psi.";

/// The numbers of the rule, as the plan has them.
#[derive(Clone, Copy, Debug)]
struct Rule {
    lambda: f64,
    bounds: [f64; 2],
    eps: f64,
    betas: [f64; 2],
    /// Threshold and sharpness.
    gate: Option<[f64; 2]>,
}

impl Rule {
    fn of(exec: &Executable) -> Option<Rule> {
        let numbers: Vec<f64> = exec.plan().option(AGREEMENT)?.split(' ').filter_map(|x| x.parse().ok()).collect();
        let [lambda, least, most, eps, beta1, beta2, ref gate @ ..] = numbers[..] else { return None };
        let gate = <[f64; 2]>::try_from(gate).ok();
        Some(Rule { lambda, bounds: [least, most], eps, betas: [beta1, beta2], gate })
    }
}

/// Means over all weights unless it says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Agreement {
    /// Agreement of gradients with their running mean, -1 to 1.
    pub psi: f64,
    /// Share of the weights with an agreement of (nearly) -1 or 1.
    pub saturated: f64,
    /// Factor of the step.
    pub kappa: f64,
    /// Its least and greatest.
    pub kappa_range: [f64; 2],
    /// Its standard deviation.
    pub kappa_deviation: f64,
    /// Root of the mean of squares by the magnitude of the mean, held to at most 1e6.
    pub noise: f64,
    /// How far the gate is open, 1 without one.
    pub gate: f64,
    /// Magnitude of `ln kappa` times noise.
    pub collision: f64,
    /// Learning rate by weight: `lr kappa / (root + eps)`.
    pub rate: f64,
    /// Norm of the step, decay of weights left out.
    pub step_norm: f64,
}

/// Noise beyond this counts as much: weights without a gradient have none to speak of.
const NOISE: f64 = 1e6;
/// An agreement of at least this magnitude is saturated.
const SATURATED: f64 = 0.999;

impl Agreement {
    /// That of a plan whose rule has one, behind the first `steps` steps, the last of them with the learning rate `lr`.
    ///
    /// # Errors
    /// A plan whose memory is of other types than the rule's.
    pub fn of(exec: &Executable, steps: u64, lr: f64) -> Result<Option<Agreement>, ExecError> {
        let Some(rule) = Rule::of(exec) else { return Ok(None) };
        let [c1, c2] = rule.betas.map(|b| 1.0 / (1.0 - b.powf(steps as f64)));
        let (mut out, mut n, mut squares) =
            (Agreement { kappa_range: [f64::MAX, 0.0], ..Agreement::default() }, 0u64, 0.0);
        for weight in &exec.plan().weights {
            let Some(name) = weight.name.strip_prefix(MEMORY) else { continue };
            let [m, v] = ["m", "v"].map(|k| exec.weight::<f32>(&format!("optim.{k}.{name}")));
            let (m, v) = (m?, v?);
            let psi: Vec<f32> = match weight.ty.dtype {
                DType::I8 => exec.weight::<i8>(&weight.name)?.iter().map(|&c| f32::from(c) / 127.0).collect(),
                _ => exec.weight::<f32>(&weight.name)?.to_vec(),
            };
            for ((&m, &v), &psi) in m.iter().zip(v).zip(&psi) {
                let (mean, root, psi) = (f64::from(m) * c1, (f64::from(v) * c2).sqrt(), f64::from(psi));
                let noise = (root / (mean.abs() + rule.eps)).min(NOISE);
                let gate = rule.gate.map_or(1.0, |[least, sharp]| 1.0 / (1.0 + (-sharp * (least - noise)).exp()));
                let kappa = 1.0 + gate * ((rule.lambda * psi).exp().clamp(rule.bounds[0], rule.bounds[1]) - 1.0);
                let rate = lr * kappa / (root + rule.eps);
                n += 1;
                out.psi += psi;
                out.saturated += f64::from(u8::from(psi.abs() >= SATURATED));
                out.kappa += kappa;
                out.kappa_range = [out.kappa_range[0].min(kappa), out.kappa_range[1].max(kappa)];
                squares += kappa * kappa;
                out.noise += noise;
                out.gate += gate;
                out.collision += kappa.ln().abs() * noise;
                out.rate += rate;
                out.step_norm += (rate * mean) * (rate * mean);
            }
        }
        if n == 0 {
            return Ok(None);
        }
        let all = n as f64;
        for sum in [
            &mut out.psi,
            &mut out.saturated,
            &mut out.kappa,
            &mut out.noise,
            &mut out.gate,
            &mut out.collision,
            &mut out.rate,
        ] {
            *sum /= all;
        }
        out.kappa_deviation = (squares / all - out.kappa * out.kappa).max(0.0).sqrt();
        out.step_norm = out.step_norm.sqrt();
        Ok(Some(out))
    }

    /// For metrics.
    pub fn to_json(&self) -> Value {
        json!({
            "psi": self.psi,
            "saturated": self.saturated,
            "kappa": self.kappa,
            "kappa_min": self.kappa_range[0],
            "kappa_max": self.kappa_range[1],
            "kappa_deviation": self.kappa_deviation,
            "noise": self.noise,
            "gate": self.gate,
            "collision": self.collision,
            "rate": self.rate,
            "step_norm": self.step_norm,
        })
    }
}
