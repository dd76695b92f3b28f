//! The dynamic ternary quantiser of a run: warm-up of its threshold, scales that follow the weights, and the controller that keeps
//! the information in a weight near a target (semantics 3.5).
//!
//! Invariant: it changes in a training step alone, before the forward pass, and by numbers that are in checkpoints; measuring and
//! generating leave it as it is.

use super::TrainError;
use crate::exec::Executable;
use chimera_ir::plan::{Plan, QUANTISER, QUANTISER_TARGET, QUANTISER_THRESHOLD, WeightKind};
use serde_json::{Value, json};

/// The entry point that adapts scales and threshold.
const ADAPT: &str = "adapt";
/// Distance from the wanted share of zeros that is let be.
const TOLERANCE: f64 = 0.02;
/// A correction of the threshold, and the greatest threshold.
const CORRECTION: f64 = 0.05;
const GREATEST: f64 = 1.5;
/// The threshold of strict rounding.
const STRICT: f64 = 0.5;

/// How the quantiser of a plan changes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// Decay of the running mean of magnitudes.
    pub ema: f32,
    /// Whether weights are rounded to the nearest code, whatever the threshold.
    pub strict: bool,
    /// First threshold.
    pub least: f64,
    /// Threshold behind the warm-up, until a controller changes it.
    pub target: f64,
    /// Training steps of the warm-up.
    pub warmup: u64,
    /// Wanted bits of a weight, if there is a controller.
    pub bits: Option<f64>,
    /// Steps between corrections.
    pub every: u64,
}

impl Rule {
    /// The rule of a plan that has one: the numbers of the option `quantiser`.
    pub fn of(plan: &Plan) -> Result<Option<Rule>, TrainError> {
        let Some(text) = plan.option("quantiser") else { return Ok(None) };
        let numbers: Vec<f64> = text.split(' ').filter_map(|x| x.parse().ok()).collect();
        let &[ema, strict, least, target, warmup, bits, every] = &numbers[..] else {
            return Err(TrainError::Plan(format!(
                "its quantiser is {text:?}, expected seven numbers; compile it again"
            )));
        };
        let (bits, every) = ((bits > 0.0).then_some(bits), (every as u64).max(1));
        Ok(Some(Rule { ema: ema as f32, strict: strict != 0.0, least, target, warmup: warmup as u64, bits, every }))
    }

    /// The threshold of training step `step`, counted from 0, on the way to `target`.
    pub fn threshold(&self, step: u64, target: f64) -> f64 {
        let over = if self.warmup <= 1 { 1.0 } else { (step as f64 / (self.warmup - 1) as f64).min(1.0) };
        if self.strict { STRICT } else { self.least + over * (target - self.least) }
    }

    /// The next target of the threshold, when `zeros` is the share of zeros and `wanted` that of the target.
    pub fn corrected(target: f64, zeros: f64, wanted: f64) -> f64 {
        let correction = match zeros - wanted {
            e if e < -TOLERANCE => CORRECTION,
            e if e > TOLERANCE => -CORRECTION,
            _ => 0.0,
        };
        (target + correction).clamp(0.0, GREATEST)
    }
}

/// Shannon entropy of the shares of -1, 0 and 1, in bits.
pub fn entropy(shares: [f64; 3]) -> f64 {
    -shares.iter().filter(|p| **p > 0.0).map(|p| p * p.log2()).sum::<f64>()
}

/// The share of zeros, at least a third, at which codes with equally many of both signs have so many bits.
pub fn zeros_for(bits: f64) -> f64 {
    let (mut low, mut high) = (1.0 / 3.0, 1.0);
    for _ in 0..80 {
        let middle = f64::midpoint(low, high);
        let side = (1.0 - middle) / 2.0;
        *(if entropy([side, middle, side]) > bits { &mut low } else { &mut high }) = middle;
    }
    f64::midpoint(low, high)
}

/// Gives the quantiser of fresh weights its first scales and threshold.
///
/// # Errors
/// A plan that contradicts its quantiser, or a failure to execute.
pub(super) fn settle(exec: &mut Executable) -> Result<(), TrainError> {
    let Some(rule) = Rule::of(exec.plan())? else { return Ok(()) };
    if exec.plan().entry(ADAPT).is_none() {
        return Ok(());
    }
    adapt(exec, 0.0, rule.threshold(0, rule.target), rule.target)
}

/// Adapts scales and threshold for training step `step`, and corrects the target when it is time to.
///
/// # Errors
/// As for [`settle`].
pub(super) fn advance(exec: &mut Executable, step: u64) -> Result<(), TrainError> {
    let Some(rule) = Rule::of(exec.plan())? else { return Ok(()) };
    let target = f64::from(exec.weight::<f32>(QUANTISER_TARGET)?.first().copied().unwrap_or(0.0));
    let threshold = rule.threshold(step, target);
    adapt(exec, rule.ema, threshold, target)?;
    if let (Some(bits), 0) = (rule.bits, (step + 1) % rule.every) {
        let zeros = Codes::of(exec)?.map_or(0.0, |codes| codes.shares[1]);
        exec.set_weight(QUANTISER_TARGET, &[1], &[Rule::corrected(target, zeros, zeros_for(bits)) as f32])?;
    }
    Ok(())
}

fn adapt(exec: &mut Executable, keep: f32, threshold: f64, target: f64) -> Result<(), TrainError> {
    let entry = exec.entry(ADAPT)?;
    let rest = (1.0 - f64::from(keep)) as f32;
    for (port, x) in [("keep", keep), ("rest", rest), ("threshold", threshold as f32), ("target", target as f32)] {
        exec.set_input(entry, port, &[x])?;
    }
    Ok(exec.run_entry(entry)?)
}

/// The codes of all ternary weights together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Codes {
    /// Shares of -1, 0 and 1.
    pub shares: [f64; 3],
    /// The threshold, and where it goes.
    pub threshold: f64,
    /// See `threshold`.
    pub target: f64,
}

impl Codes {
    /// Those of a plan with a dynamic quantiser.
    ///
    /// # Errors
    /// A weight that the quantiser should have and has not.
    pub fn of(exec: &Executable) -> Result<Option<Codes>, TrainError> {
        if exec.plan().option("quantiser").is_none() {
            return Ok(None);
        }
        let one =
            |name: &str| -> Result<f32, TrainError> { Ok(exec.weight::<f32>(name)?.first().copied().unwrap_or(0.0)) };
        let (threshold, target) = (one(QUANTISER_THRESHOLD)?, one(QUANTISER_TARGET)?);
        let mut counts = [0u64; 3];
        for w in exec.plan().weights.iter().filter(|w| w.kind == WeightKind::Ternary) {
            let limit = one(&format!("{QUANTISER}{}", w.name))? * threshold;
            for &x in exec.weight::<f32>(&w.name)? {
                counts[if x > limit { 2 } else { usize::from(x >= -limit) }] += 1;
            }
        }
        let all = counts.iter().sum::<u64>().max(1) as f64;
        let shares = counts.map(|n| n as f64 / all);
        Ok(Some(Codes { shares, threshold: threshold.into(), target: target.into() }))
    }

    /// Effective bits of a weight.
    pub fn bits(&self) -> f64 {
        entropy(self.shares)
    }

    /// For metrics.
    pub fn to_json(&self) -> Value {
        json!({ "zeros": self.shares[1], "bits": self.bits(), "threshold": self.threshold, "target": self.target })
    }
}
