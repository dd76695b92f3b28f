//! Names of modes, families, masks and optimisers of probes on the command line, and what they are to the compiler.
//!
//! Invariant: an option that other options leave without a meaning is refused.

use crate::estimators::{EstimatorName, StateName};
use crate::hyper::{Hyper, HyperArgs};
use crate::options::Failure;
use chimera_compiler::{Family, Mask, Mode, Optimiser, PerSequence, Score, Shared, UpdateRule};
use chimera_ir::ops::Distribution;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The slowest decay of the mean of squares that a byte can follow: a code moves by less than half its distance from the next one
/// beyond it.
const BYTES_BETA2: f64 = 0.99;

/// How shared directions reach ternary weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModeName {
    /// Latents are perturbed and quantised again
    Requantise,
    /// Scales are perturbed; codes never change
    Scales,
    /// Noise is added to the product
    Additive,
    /// Latents are integers times --unit; probes and steps are rounded to them by chance
    Integer,
}

/// What directions of shared probes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FamilyName {
    /// Every entry is drawn
    Dense,
    /// U V^T, U drawn in every step, V every --period steps
    Lozo,
    /// U Z V^T, Z drawn in every step, orthonormal U and V every --period steps
    Subzero,
    /// U diag(tau) V^T, tau drawn in every step, U and V once
    Tezo,
}

/// What is probed and trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MaskName {
    /// All entries
    Dense,
    /// Ternary weights whose code a probe can change, and all entries of others (requantise)
    Boundary,
    /// The share --sparsity of the entries of every tensor with the smallest magnitudes
    SmallMag,
    /// The share --sparsity with the largest magnitudes
    LargeMag,
    /// The share --sparsity by chance
    Random,
    /// The share --sparsity with the largest values in the tensors of --fisher
    Fisher,
}

/// What makes a step of an estimate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OptimiserName {
    /// The estimate times the learning rate
    Sgd,
    /// A fading sum of estimates times the learning rate
    Momentum,
    /// As momentum over the last --history steps, drawn again instead of kept
    Replay,
    /// A running mean of estimates of unit size, relative to the size of the weight
    Normalised,
    /// Adam on the estimates
    Adam,
}

/// Entries of shared directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Entries {
    /// Signs
    Rademacher,
    /// Normal values
    Gaussian,
}

impl HyperArgs {
    /// Refuses what would have no meaning together.
    ///
    /// # Errors
    /// The first option without a meaning, and what gives it one.
    pub fn meaningful(&self, hyper: &Hyper) -> Result<(), Failure> {
        let given: Vec<&str> = self.given().into_iter().map(|(key, _)| key).collect();
        let has = |key: &str| given.contains(&key);
        let refuse = |key: &str, cure: &str| {
            let flag = key.replace('_', "-");
            Err(Failure::usage(format!(
                "--{flag} has no meaning here, expected {cure} with it; leave it out or give both"
            )))
        };
        if let Some(optimiser) = hyper.optimiser.or(hyper.estimator.row().optimiser) {
            let unread = match optimiser {
                OptimiserName::Sgd => &["momentum", "second", "vec_scale", "history"][..],
                OptimiserName::Momentum => &["second", "vec_scale", "history"],
                OptimiserName::Replay => &["second", "vec_scale"],
                OptimiserName::Normalised => &["second", "history"],
                OptimiserName::Adam => &["vec_scale", "history"],
            };
            match unread.iter().copied().find(|key| has(key)) {
                Some("second") => return refuse("second", "--optimiser adam"),
                Some("vec_scale") => return refuse("vec_scale", "--optimiser normalised"),
                Some("history") => return refuse("history", "--optimiser replay"),
                Some(key) => return refuse(key, "--optimiser momentum, replay, normalised or adam"),
                None => {}
            }
        }
        if hyper.state == StateName::Bytes && hyper.beta2 > BYTES_BETA2 {
            return Err(Failure::usage(format!(
                "--beta2 is {}, expected at most {BYTES_BETA2} with --state 8bit, whose codes are too far apart for a slower decay; choose a smaller one or --state 32bit",
                hyper.beta2
            )));
        }
        if hyper.estimator != EstimatorName::Mezo {
            return Ok(());
        }
        let share = !matches!(hyper.mask, MaskName::Dense | MaskName::Boundary);
        let of_share = if has("sparsity") { "sparsity" } else { "mask_refresh" };
        let factors = hyper.family != FamilyName::Dense;
        match () {
            () if hyper.mask == MaskName::Boundary && hyper.mode != ModeName::Requantise => {
                refuse("mask boundary", "--mode requantise")
            }
            () if has(of_share) && !share => refuse(of_share, "a --mask of a share"),
            () if has("fisher") && hyper.mask != MaskName::Fisher => refuse("fisher", "--mask fisher"),
            () if hyper.mask == MaskName::Fisher && hyper.fisher.is_none() => refuse("mask fisher", "--fisher FILE"),
            () if has("unit") && hyper.mode != ModeName::Integer => refuse("unit", "--mode integer"),
            () if has("rank") && !factors => refuse("rank", "--family lozo, subzero or tezo"),
            () if has("period") && !matches!(hyper.family, FamilyName::Lozo | FamilyName::Subzero) => {
                refuse("period", "--family lozo or subzero")
            }
            () if has("distribution") && factors => refuse("distribution", "--family dense"),
            () => Ok(()),
        }
    }
}

impl Hyper {
    /// Probes of each sequence for the compiler.
    pub fn per_sequence(&self) -> PerSequence {
        PerSequence {
            rank: self.rank as usize,
            kappa: self.kappa as f32,
            sigma_vec: self.sigma as f32,
            group: self.group_size as usize,
        }
    }

    /// Probes that all sequences share, for the compiler.
    pub fn shared(&self) -> Shared {
        Shared {
            mode: match self.mode {
                ModeName::Requantise => Mode::Requantise,
                ModeName::Scales => Mode::Scales,
                ModeName::Integer => Mode::Integer { unit: self.unit as f32 },
                ModeName::Additive => Mode::Additive,
            },
            directions: self.directions as usize,
            one_sided: self.one_sided,
            scaled: self.scaled,
            family: self.family(),
            mask: self.mask(),
            eps: self.eps as f32,
            eps_rel: self.eps_rel.map(|x| x as f32),
        }
    }

    fn family(&self) -> Family {
        let (rank, period) = (self.rank as usize, self.period as usize);
        match (self.family, self.distribution) {
            (FamilyName::Dense, Entries::Rademacher) => Family::Dense(Distribution::Rademacher),
            (FamilyName::Dense, Entries::Gaussian) => Family::Dense(Distribution::Gaussian),
            (FamilyName::Lozo, _) => Family::Lozo { rank, period },
            (FamilyName::Subzero, _) => Family::SubZero { rank, period },
            (FamilyName::Tezo, _) => Family::TeZo { rank },
        }
    }

    fn mask(&self) -> Mask {
        let by = match self.mask {
            MaskName::Dense => return Mask::Dense,
            MaskName::Boundary => return Mask::Boundary,
            MaskName::SmallMag => Score::Small,
            MaskName::LargeMag => Score::Large,
            MaskName::Random => Score::Random,
            MaskName::Fisher => Score::Fisher,
        };
        Mask::Kept { by, share: self.sparsity as f32, refresh: self.mask_refresh as usize }
    }

    /// The update for the compiler; `balance` is the rate of the experts' selection biases.
    pub fn rule(&self, balance: f64) -> UpdateRule {
        UpdateRule {
            optimiser: self.optimiser.map(|name| match name {
                OptimiserName::Sgd => Optimiser::Sgd,
                OptimiserName::Momentum => Optimiser::Momentum,
                OptimiserName::Replay => Optimiser::Replay,
                OptimiserName::Normalised => Optimiser::Normalised,
                OptimiserName::Adam => Optimiser::Adam,
            }),
            second: self.second as f32,
            momentum: self.momentum as f32,
            history: self.history as usize,
            vec_scale: self.vec_scale as f32,
            weight_decay: self.weight_decay as f32,
            balance: balance as f32,
        }
    }
}
