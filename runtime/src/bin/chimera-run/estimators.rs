//! The estimators of a descent direction: names, defaults, and which options each of them has.
//!
//! Invariant: every estimator has one row in [`ESTIMATORS`], in the order of [`EstimatorName`]; an option [`of_some`] that is not in
//! the row of the chosen one is refused.

use crate::hyper::Hyper;
use crate::probes::OptimiserName;
use chimera_compiler::{Descent, EntryKind, Scheme, StateForm};
use chimera_ir::ops::{DescentRule, Idle};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How a descent direction is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EstimatorName {
    /// Every sequence has its own low-rank direction
    PerseqLowrank,
    /// All sequences share each direction
    Mezo,
    /// Along the gradient, with running means of it and of its square
    Adamw,
    /// Along the gradient, with momentum
    Sgd,
    /// As adamw, by how well gradients agree with their running mean
    Chimera21,
}

/// What an estimator has of its own.
pub struct EstimatorRow {
    pub name: EstimatorName,
    /// Whether it goes along the gradient.
    pub gradients: bool,
    /// What makes a step of its estimate without `--optimiser`; nothing where steps are its own.
    pub optimiser: Option<OptimiserName>,
    /// Default of `--batch`.
    pub batch: u32,
    /// Default of `--lr`.
    pub lr: f64,
    /// Default of `--warmup`.
    pub warmup: u64,
    /// Default of `--weight-decay`.
    pub weight_decay: f64,
    /// Default of `--beta2`.
    pub beta2: f64,
    /// The options that it has and not every estimator.
    pub options: &'static [&'static str],
}

/// Whether only some estimators have an option.
pub fn of_some(option: &str) -> bool {
    ESTIMATORS.iter().any(|row| row.options.contains(&option))
}

/// Every estimator, in the order of [`EstimatorName`].
pub const ESTIMATORS: [EstimatorRow; 5] = [
    EstimatorRow {
        name: EstimatorName::PerseqLowrank,
        gradients: false,
        optimiser: Some(OptimiserName::Normalised),
        batch: 16,
        lr: 0.01,
        warmup: 0,
        weight_decay: 0.0,
        beta2: 0.0,
        options: &[
            "optimiser",
            "momentum",
            "second",
            "vec_scale",
            "weight_decay",
            "rank",
            "group_size",
            "kappa",
            "sigma",
            "hybrid_head",
            "history",
        ],
    },
    EstimatorRow {
        name: EstimatorName::Mezo,
        gradients: false,
        optimiser: Some(OptimiserName::Sgd),
        batch: 16,
        lr: 1e-4,
        warmup: 0,
        weight_decay: 0.0,
        beta2: 0.0,
        options: &[
            "optimiser",
            "momentum",
            "second",
            "vec_scale",
            "weight_decay",
            "rank",
            "mode",
            "directions",
            "one_sided",
            "scaled",
            "family",
            "period",
            "mask",
            "sparsity",
            "fisher",
            "mask_refresh",
            "unit",
            "distribution",
            "eps",
            "eps_rel",
            "hybrid_head",
            "history",
        ],
    },
    EstimatorRow {
        name: EstimatorName::Adamw,
        gradients: true,
        optimiser: None,
        batch: 8,
        lr: 2e-3,
        warmup: 20,
        weight_decay: 0.1,
        beta2: 0.95,
        options: &["weight_decay", "beta1", "beta2", "adam_eps", "clip", "accumulate", "state"],
    },
    EstimatorRow {
        name: EstimatorName::Sgd,
        gradients: true,
        optimiser: None,
        batch: 8,
        lr: 0.03,
        warmup: 20,
        weight_decay: 0.0,
        beta2: 0.0,
        options: &["weight_decay", "momentum", "clip", "accumulate"],
    },
    EstimatorRow {
        name: EstimatorName::Chimera21,
        gradients: true,
        optimiser: None,
        batch: 8,
        lr: 2e-3,
        warmup: 20,
        weight_decay: 0.1,
        beta2: 0.999,
        options: &[
            "weight_decay",
            "beta1",
            "beta2",
            "adam_eps",
            "clip",
            "accumulate",
            "zero_gradient",
            "kappa_gate",
            "psi_bytes",
        ],
    },
];

impl EstimatorName {
    /// Its row.
    pub fn row(self) -> &'static EstimatorRow {
        &ESTIMATORS[self as usize]
    }

    /// The name on the command line.
    pub fn text(self) -> String {
        self.to_possible_value().map_or(String::new(), |v| v.get_name().to_owned())
    }
}

/// What becomes of the agreement of a weight whose gradient is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ZeroGradient {
    /// It fades slowly
    Standard,
    /// It stays
    Freeze,
    /// It fades by a factor
    Decay,
    /// It grows while there is a running mean
    Inertia,
}

impl ZeroGradient {
    /// The same for the compiler.
    pub fn idle(self) -> Idle {
        match self {
            ZeroGradient::Standard => Idle::Standard,
            ZeroGradient::Freeze => Idle::Freeze,
            ZeroGradient::Decay => Idle::Decay,
            ZeroGradient::Inertia => Idle::Inertia,
        }
    }
}

/// What holds the agreement back where gradients are noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KappaGate {
    /// Nothing
    None,
    /// The ratio of the root of the mean of squares to the mean, open below 2
    NoiseRatio,
}

impl KappaGate {
    /// Threshold and sharpness (semantics 12.2).
    fn numbers(self) -> Option<[f32; 2]> {
        match self {
            KappaGate::None => None,
            KappaGate::NoiseRatio => Some([2.0, 4.0]),
        }
    }
}

/// How the memory of a matrix is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum StateName {
    /// Floats
    #[value(name = "32bit")]
    #[serde(rename = "32bit")]
    Full,
    /// A byte for each number, with scales for blocks of 128
    #[value(name = "8bit")]
    #[serde(rename = "8bit")]
    Bytes,
}

impl StateName {
    fn form(self) -> StateForm {
        match self {
            StateName::Full => StateForm::Full,
            StateName::Bytes => StateForm::Bytes,
        }
    }
}

/// An estimator with its numbers.
#[derive(Clone, Debug, PartialEq)]
pub enum Way {
    /// By losses of probes.
    Probe(Scheme),
    /// Along the gradient.
    Descend(DescentRule),
}

impl Hyper {
    /// The entry points that make and apply an estimate; `balance` is the rate of the experts' selection biases.
    pub fn entries(&self, balance: f64) -> [EntryKind; 2] {
        match self.way() {
            Way::Probe(scheme) => [EntryKind::DualLoss(scheme.clone()), EntryKind::Update(scheme, self.rule(balance))],
            Way::Descend(rule) => {
                let (weight_decay, clip) = (self.weight_decay as f32, self.clip as f32);
                let descent = Descent { rule, weight_decay, clip, state: self.state.form(), balance: balance as f32 };
                [EntryKind::Backward { accumulate: self.accumulate > 1 }, EntryKind::Descend(descent)]
            }
        }
    }

    /// The entry point that chooses what is probed, where a choice lasts some steps.
    pub fn choice(&self) -> Option<EntryKind> {
        match self.way() {
            Way::Probe(scheme) if scheme.mask().refresh().is_some() => Some(EntryKind::Mask(scheme)),
            _ => None,
        }
    }

    /// The estimator for the compiler.
    pub fn way(&self) -> Way {
        let (beta1, beta2, eps) = (self.beta1 as f32, self.beta2 as f32, self.adam_eps as f32);
        match self.estimator {
            EstimatorName::PerseqLowrank => Way::Probe(Scheme::PerSequence(self.per_sequence())),
            EstimatorName::Mezo => Way::Probe(Scheme::Shared(self.shared())),
            EstimatorName::Adamw => Way::Descend(DescentRule::AdamW { beta1, beta2, eps }),
            EstimatorName::Sgd => Way::Descend(DescentRule::Momentum { mu: self.momentum as f32 }),
            EstimatorName::Chimera21 => Way::Descend(DescentRule::Agreement {
                beta1,
                beta2,
                eps,
                rho: 0.95,
                lambda: 0.1,
                bounds: [0.5, 2.0],
                idle: self.zero_gradient.idle(),
                fade: 0.95,
                gate: self.kappa_gate.numbers(),
                bytes: self.psi_bytes,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_estimator_has_its_row() {
        for (row, name) in ESTIMATORS.iter().zip(EstimatorName::value_variants()) {
            assert_eq!(row.name, *name);
        }
        assert_eq!(ESTIMATORS.len(), EstimatorName::value_variants().len());
    }
}
