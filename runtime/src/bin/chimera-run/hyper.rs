//! The options of a training run that decide its bits, on the command line and in checkpoints.
//!
//! Invariant: a resumed run has the options of the checkpoint; an option that says otherwise is refused, never ignored.

use crate::estimators::{ESTIMATORS, EstimatorName, KappaGate, StateName, ZeroGradient, of_some};
use crate::options::Failure;
use crate::paradigms::Paradigms;
use crate::phases::Phase;
use crate::probes::{Entries, FamilyName, MaskName, ModeName, OptimiserName};
use chimera_runtime::text::DataSpec;
use chimera_runtime::train::Decay;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::path::PathBuf;

/// Options on the command line; absent ones take the default, or what the checkpoint says.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct HyperArgs {
    /// Tokens of a row [default: 64]
    #[arg(long, env = "CHIMERA_SEQ_LEN", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub seq_len: Option<u32>,
    /// Rows of a batch [default: 8 along gradients, else 16]
    #[arg(long, env = "CHIMERA_BATCH", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    pub batch: Option<u32>,
    /// Greatest learning rate [default: 0.01 perseq-lowrank, 1e-4 mezo, 2e-3 adamw and chimera21, 0.03 sgd]
    #[arg(long, env = "CHIMERA_LR", value_parser = positive)]
    pub lr: Option<f64>,
    /// Learning rate behind the warm-up: constant, cosine, or two-stage, which is lower and without weight decay in the second half [default: cosine]
    #[arg(long, env = "CHIMERA_LR_DECAY")]
    pub lr_decay: Option<Decay>,
    /// Last learning rate of the decay as a share of the greatest [default: 0.1]
    #[arg(long, env = "CHIMERA_LR_FLOOR", value_parser = share)]
    pub lr_floor: Option<f64>,
    /// Steps of linear warm-up [default: 20 along gradients, else 0]
    #[arg(long, env = "CHIMERA_WARMUP")]
    pub warmup: Option<u64>,
    /// Estimator of the descent direction [default: perseq-lowrank]
    #[arg(long, env = "CHIMERA_ESTIMATOR")]
    pub estimator: Option<EstimatorName>,
    /// What makes a step of an estimate [default: normalised perseq-lowrank, sgd mezo]
    #[arg(long, env = "CHIMERA_OPTIMISER")]
    pub optimiser: Option<OptimiserName>,
    /// Decay of the running mean of squares (adam) [default: 0.999]
    #[arg(long, env = "CHIMERA_SECOND", value_parser = share)]
    pub second: Option<f64>,
    /// Rank of the probes (perseq-lowrank, and mezo with --family lozo, subzero, tezo) [default: 1]
    #[arg(long, env = "CHIMERA_RANK", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub rank: Option<u32>,
    /// Consecutive sequences of a batch that share a direction (perseq-lowrank) [default: 1]
    #[arg(long, env = "CHIMERA_GROUP_SIZE", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    pub group_size: Option<u32>,
    /// Probe size on matrices relative to their mean magnitude (perseq-lowrank) [default: 0.1]
    #[arg(long, env = "CHIMERA_KAPPA", value_parser = positive)]
    pub kappa: Option<f64>,
    /// Probe size on vectors (perseq-lowrank) [default: 0.01]
    #[arg(long, env = "CHIMERA_SIGMA", value_parser = positive)]
    pub sigma: Option<f64>,
    /// Decay of the running mean of estimates (--optimiser momentum, replay, normalised, adam) or of the sum of gradients (--estimator sgd) [default: 0.9]
    #[arg(long, env = "CHIMERA_MOMENTUM", value_parser = share)]
    pub momentum: Option<f64>,
    /// Steps whose estimates are drawn again (--optimiser replay) [default: 50]
    #[arg(long, env = "CHIMERA_HISTORY", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub history: Option<u32>,
    /// Step scale of vectors (normalised) [default: 0.02]
    #[arg(long, env = "CHIMERA_VEC_SCALE", value_parser = positive)]
    pub vec_scale: Option<f64>,
    /// How probes reach ternary weights (mezo) [default: requantise]
    #[arg(long, env = "CHIMERA_MODE")]
    pub mode: Option<ModeName>,
    /// Directions of a step (mezo) [default: 1]
    #[arg(long, env = "CHIMERA_DIRECTIONS", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub directions: Option<u32>,
    /// Try directions forward only and compare with the weights as they are (mezo)
    #[arg(long, env = "CHIMERA_ONE_SIDED", num_args = 0..=1, default_missing_value = "true")]
    pub one_sided: Option<bool>,
    /// Divide steps by the spread of the losses, FZOO (mezo)
    #[arg(long, env = "CHIMERA_SCALED", num_args = 0..=1, default_missing_value = "true")]
    pub scaled: Option<bool>,
    /// Final norm and head follow their gradient, for one forward pass more, and all other weights the estimate (perseq-lowrank, mezo)
    #[arg(long, env = "CHIMERA_HYBRID_HEAD", num_args = 0..=1, default_missing_value = "true")]
    pub hybrid_head: Option<bool>,
    /// What directions of matrices are (mezo) [default: dense]
    #[arg(long, env = "CHIMERA_FAMILY")]
    pub family: Option<FamilyName>,
    /// Steps that share factors (mezo with --family lozo, subzero) [default: 50]
    #[arg(long, env = "CHIMERA_PERIOD", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub period: Option<u32>,
    /// What is probed and trained (mezo) [default: dense]
    #[arg(long, env = "CHIMERA_MASK")]
    pub mask: Option<MaskName>,
    /// Share of the entries that is probed (mezo with a --mask of a share) [default: 0.01]
    #[arg(long, env = "CHIMERA_SPARSITY", value_parser = positive_share)]
    pub sparsity: Option<f64>,
    /// File of tensors named like the weights, such as mean squares of gradients (mezo with --mask fisher)
    #[arg(long, env = "CHIMERA_FISHER", value_name = "FILE")]
    pub fisher: Option<PathBuf>,
    /// Steps that a choice of entries lasts (mezo with a --mask of a share) [default: 100]
    #[arg(long, env = "CHIMERA_MASK_REFRESH", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub mask_refresh: Option<u32>,
    /// Distance of neighbouring latents, a power of two (mezo with --mode integer) [default: 2^-10]
    #[arg(long, env = "CHIMERA_UNIT", value_parser = power_of_two)]
    pub unit: Option<f64>,
    /// Entries of directions (mezo with --family dense) [default: rademacher]
    #[arg(long, env = "CHIMERA_DISTRIBUTION")]
    pub distribution: Option<Entries>,
    /// Probe size (mezo) [default: 1e-3]
    #[arg(long, env = "CHIMERA_EPS", value_parser = positive)]
    pub eps: Option<f64>,
    /// Probe size on ternary matrices relative to their mean magnitude, instead of --eps (mezo)
    #[arg(long, env = "CHIMERA_EPS_REL", value_parser = positive)]
    pub eps_rel: Option<f64>,
    /// Weight decay of ternary matrices as a share of the learning rate [default: 0.1 adamw and chimera21, else 0]
    #[arg(long, env = "CHIMERA_WEIGHT_DECAY", value_parser = share)]
    pub weight_decay: Option<f64>,
    /// Decay of the running mean of gradients (adamw, chimera21) [default: 0.9]
    #[arg(long, env = "CHIMERA_BETA1", value_parser = share)]
    pub beta1: Option<f64>,
    /// Decay of the running mean of their squares (adamw, chimera21) [default: 0.95 adamw, 0.999 chimera21]
    #[arg(long, env = "CHIMERA_BETA2", value_parser = share)]
    pub beta2: Option<f64>,
    /// Added to the root of that mean (adamw, chimera21) [default: 1e-8]
    #[arg(long, env = "CHIMERA_ADAM_EPS", value_parser = positive)]
    pub adam_eps: Option<f64>,
    /// Most that the norm of the whole gradient may be; 0 leaves it as it is (adamw, sgd, chimera21) [default: 1]
    #[arg(long, env = "CHIMERA_CLIP", value_parser = not_negative)]
    pub clip: Option<f64>,
    /// Parts in which a batch goes through the model, for less memory (adamw, sgd, chimera21) [default: 1]
    #[arg(long, env = "CHIMERA_ACCUMULATE", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    pub accumulate: Option<u32>,
    /// What becomes of the agreement of a weight whose gradient is zero (chimera21) [default: standard]
    #[arg(long, env = "CHIMERA_ZERO_GRADIENT")]
    pub zero_gradient: Option<ZeroGradient>,
    /// What holds the agreement back where gradients are noise (chimera21) [default: none]
    #[arg(long, env = "CHIMERA_KAPPA_GATE")]
    pub kappa_gate: Option<KappaGate>,
    /// Keep the agreement in a byte for each weight (chimera21)
    #[arg(long, env = "CHIMERA_PSI_BYTES", num_args = 0..=1, default_missing_value = "true")]
    pub psi_bytes: Option<bool>,
    /// How the running means of matrices are kept (adamw) [default: 32bit]
    #[arg(long, env = "CHIMERA_STATE")]
    pub state: Option<StateName>,
    /// Train only the weights whose names match one of these patterns, separated by commas; `*` stands for any characters
    #[arg(long, env = "CHIMERA_ONLY", value_name = "PATTERN,...")]
    pub only: Option<String>,
    /// Seed of weights, directions and the order of the data [default: 0]
    #[arg(short, long, env = "CHIMERA_SEED")]
    pub seed: Option<u64>,
    /// Share of the data that is held out: whole documents, or the end of a file that is one [default: 0.05]
    #[arg(long, env = "CHIMERA_VAL_FRACTION", value_parser = share)]
    pub val_fraction: Option<f64>,
}

pub fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x > 0.0 => Ok(x),
        _ => Err("expected a number above 0".into()),
    }
}

fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x >= 0.0 => Ok(x),
        _ => Err("expected a number of at least 0".into()),
    }
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if (0.0..1.0).contains(&x) => Ok(x),
        _ => Err("expected a number from 0 to below 1".into()),
    }
}

pub fn positive_share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x > 0.0 && x <= 1.0 => Ok(x),
        _ => Err("expected a number above 0 and at most 1".into()),
    }
}

fn power_of_two(text: &str) -> Result<f64, String> {
    let exponent = text.strip_prefix("2^").and_then(|e| e.parse::<i32>().ok()).map(|e| 2f64.powi(e));
    match exponent.or_else(|| text.parse().ok()) {
        Some(x) if (1e-30..=1e30).contains(&x) && x.log2().fract() == 0.0 => Ok(x),
        _ => Err("expected a power of two such as 2^-10".into()),
    }
}

/// Everything that decides the bits of a run, budgets, configuration and data contents apart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hyper {
    pub seq_len: u32,
    pub batch: u32,
    pub lr: f64,
    pub lr_decay: String,
    pub lr_floor: f64,
    pub warmup: u64,
    pub estimator: EstimatorName,
    pub optimiser: Option<OptimiserName>,
    pub second: f64,
    pub rank: u32,
    /// Sequences that share a direction.
    pub group_size: u32,
    pub kappa: f64,
    pub sigma: f64,
    pub momentum: f64,
    /// Steps whose estimates are drawn again.
    #[serde(default)]
    pub history: u32,
    pub vec_scale: f64,
    pub mode: ModeName,
    pub directions: u32,
    pub one_sided: bool,
    pub scaled: bool,
    /// Whether final norm and head follow their gradient.
    #[serde(default)]
    pub hybrid_head: bool,
    pub family: FamilyName,
    pub period: u32,
    pub mask: MaskName,
    pub sparsity: f64,
    /// Scores of entries.
    pub fisher: Option<PathBuf>,
    pub mask_refresh: u32,
    pub unit: f64,
    pub distribution: Entries,
    pub eps: f64,
    pub eps_rel: Option<f64>,
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub adam_eps: f64,
    pub clip: f64,
    pub accumulate: u32,
    pub zero_gradient: ZeroGradient,
    pub kappa_gate: KappaGate,
    pub psi_bytes: bool,
    pub state: StateName,
    /// Patterns of the names of weights that are trained; all when absent.
    pub only: Option<String>,
    pub seed: u64,
    pub val_fraction: f64,
    /// Steps in all, if that is what ends the run.
    pub steps: Option<u64>,
    /// Seconds in all, if that is what ends the run.
    pub seconds: Option<f64>,
    /// Data files and folders.
    pub data: Vec<DataSpec>,
    /// Field of the records in them.
    pub field: Option<String>,
    /// Whether zero bytes are data.
    pub binary: bool,
    /// The plan that the run was started with, if it was not compiled for the run.
    pub plan: Option<PathBuf>,
    /// What the run is a phase of.
    #[serde(default)]
    pub phase: Phase,
    #[serde(default)]
    pub paradigms: Paradigms,
}

impl HyperArgs {
    /// Defaults, and over them what was given.
    pub fn fresh(&self) -> Hyper {
        let estimator = self.estimator.unwrap_or(EstimatorName::PerseqLowrank);
        let row = estimator.row();
        Hyper {
            seq_len: self.seq_len.unwrap_or(64),
            batch: self.batch.unwrap_or(row.batch),
            lr: self.lr.unwrap_or(row.lr),
            lr_decay: self.lr_decay.unwrap_or(Decay::Cosine).name().into(),
            lr_floor: self.lr_floor.unwrap_or(0.1),
            warmup: self.warmup.unwrap_or(row.warmup),
            estimator,
            optimiser: self.optimiser,
            second: self.second.unwrap_or(0.999),
            rank: self.rank.unwrap_or(1),
            group_size: self.group_size.unwrap_or(1),
            kappa: self.kappa.unwrap_or(0.1),
            sigma: self.sigma.unwrap_or(0.01),
            momentum: self.momentum.unwrap_or(0.9),
            history: self.history.unwrap_or(50),
            vec_scale: self.vec_scale.unwrap_or(0.02),
            mode: self.mode.unwrap_or(ModeName::Requantise),
            directions: self.directions.unwrap_or(1),
            one_sided: self.one_sided.unwrap_or(false),
            scaled: self.scaled.unwrap_or(false),
            hybrid_head: self.hybrid_head.unwrap_or(false),
            family: self.family.unwrap_or(FamilyName::Dense),
            period: self.period.unwrap_or(50),
            mask: self.mask.unwrap_or(MaskName::Dense),
            sparsity: self.sparsity.unwrap_or(0.01),
            fisher: self.fisher.clone(),
            mask_refresh: self.mask_refresh.unwrap_or(100),
            unit: self.unit.unwrap_or(1.0 / 1024.0),
            distribution: self.distribution.unwrap_or(Entries::Rademacher),
            eps: self.eps.unwrap_or(1e-3),
            eps_rel: self.eps_rel,
            weight_decay: self.weight_decay.unwrap_or(row.weight_decay),
            beta1: self.beta1.unwrap_or(0.9),
            beta2: self.beta2.unwrap_or(row.beta2),
            adam_eps: self.adam_eps.unwrap_or(1e-8),
            clip: self.clip.unwrap_or(1.0),
            accumulate: self.accumulate.unwrap_or(1),
            zero_gradient: self.zero_gradient.unwrap_or(ZeroGradient::Standard),
            kappa_gate: self.kappa_gate.unwrap_or(KappaGate::None),
            psi_bytes: self.psi_bytes.unwrap_or(false),
            state: self.state.unwrap_or(StateName::Full),
            only: self.only.clone(),
            seed: self.seed.unwrap_or(0),
            val_fraction: self.val_fraction.unwrap_or(0.05),
            steps: None,
            seconds: None,
            data: vec![],
            field: None,
            binary: false,
            plan: None,
            phase: Phase::Pretrain,
            paradigms: Paradigms::default(),
        }
    }

    /// What was given, by flag, as it would stand in [`Hyper`].
    pub(crate) fn given(&self) -> Vec<(&'static str, serde_json::Value)> {
        let mut out = vec![];
        macro_rules! put {
            ($($field:ident),*) => {
                $(if let Some(x) = &self.$field {
                    out.push((stringify!($field), serde_json::json!(x)));
                })*
            };
        }
        put!(seq_len, batch, lr, lr_floor, warmup, estimator, rank, kappa, sigma, momentum, vec_scale, mode);
        put!(
            group_size,
            optimiser,
            second,
            one_sided,
            scaled,
            family,
            period,
            mask,
            sparsity,
            fisher,
            mask_refresh,
            unit
        );
        put!(directions, distribution, eps, eps_rel, weight_decay, only, seed, val_fraction);
        put!(
            history,
            hybrid_head,
            beta1,
            beta2,
            adam_eps,
            clip,
            accumulate,
            zero_gradient,
            kappa_gate,
            psi_bytes,
            state
        );
        out.extend(self.lr_decay.map(|d| ("lr_decay", serde_json::json!(d.name()))));
        out
    }

    /// These options for `estimator`, without those that it does not have.
    pub fn of(&self, estimator: EstimatorName) -> HyperArgs {
        let mut out = HyperArgs { estimator: Some(estimator), ..self.clone() };
        macro_rules! keep {
            ($($field:ident)*) => {
                $(if !estimator.row().options.contains(&stringify!($field)) {
                    out.$field = None;
                })*
            };
        }
        keep!(optimiser momentum second vec_scale rank group_size kappa sigma mode directions one_sided scaled);
        keep!(history hybrid_head family period mask sparsity fisher mask_refresh unit distribution eps eps_rel);
        keep!(weight_decay beta1 beta2 adam_eps clip accumulate zero_gradient kappa_gate psi_bytes state);
        out
    }

    /// [`HyperArgs::fresh`], where every option that was given has a meaning.
    ///
    /// # Errors
    /// The first option that the estimator does not have.
    pub fn checked(&self) -> Result<Hyper, Failure> {
        let hyper = self.fresh();
        let row = hyper.estimator.row();
        let foreign = |key: &&str| of_some(key) && !row.options.contains(key);
        let Some(key) = self.given().into_iter().map(|(key, _)| key).find(foreign) else {
            let (batch, parts) = (hyper.batch, hyper.accumulate);
            // The update of an estimate has its decay built in.
            if hyper.lr_decay == Decay::TwoStage.name() && hyper.weight_decay > 0.0 && !row.gradients {
                return Err(Failure::usage(format!(
                    "--lr-decay two-stage ends the weight decay at half time, which the estimator {} cannot; give --weight-decay 0, or choose --estimator adamw, sgd or chimera21",
                    row.name.text()
                )));
            }
            return match batch % parts {
                0 => self.meaningful(&hyper).map(|()| hyper),
                _ => Err(Failure::usage(format!(
                    "--accumulate is {parts}, which does not divide the batch of {batch} rows; choose another --batch"
                ))),
            };
        };
        let owners = ESTIMATORS.iter().filter(|r| r.options.contains(&key)).map(|r| r.name.text());
        Err(Failure::usage(format!(
            "--{} has no meaning for the estimator {}; leave it out, or choose --estimator {}",
            key.replace('_', "-"),
            row.name.text(),
            owners.collect::<Vec<_>>().join(" or ")
        )))
    }

    /// Options of the checkpoint, if no given one says otherwise.
    ///
    /// # Errors
    /// The first option that contradicts.
    pub fn resumed(&self, saved: &str) -> Result<Hyper, Failure> {
        let damaged = |e| {
            Failure::corrupted(format!(
                "the options in the checkpoint cannot be read: {e}; use the program that wrote it"
            ))
        };
        let hyper: Hyper = serde_json::from_str(saved).map_err(damaged)?;
        hyper.agrees(&self.given(), "the run was started with")?;
        Ok(hyper)
    }
}

impl Hyper {
    fn agrees(&self, given: &[(&'static str, serde_json::Value)], whose: &str) -> Result<(), Failure> {
        let own = serde_json::to_value(self).unwrap_or_default();
        for (key, value) in given {
            if own.get(*key) != Some(value) {
                let flag = key.replace('_', "-");
                let found = own.get(*key).map_or(String::new(), ToString::to_string);
                return Err(Failure::usage(format!(
                    "--{flag} is {value}, but {whose} {found}; leave the option out or start another run"
                )));
            }
        }
        Ok(())
    }

    /// Takes the batch shape from a plan.
    ///
    /// # Errors
    /// When options ask for another shape, or for an estimator, which a plan has built in.
    pub fn shaped(mut self, rows: usize, tokens: usize, args: &HyperArgs) -> Result<Hyper, Failure> {
        (self.batch, self.seq_len) = (rows as u32, tokens as u32);
        for (key, _) in args.given() {
            if of_some(key) || ["estimator", "only"].contains(&key) {
                let flag = key.replace('_', "-");
                return Err(Failure::usage(format!(
                    "--{flag} is built into a compiled plan; name the configuration instead"
                )));
            }
        }
        self.agrees(&args.given(), "the plan has")?;
        Ok(self)
    }

    /// The names among `weights` that are trained; nothing for all.
    ///
    /// # Errors
    /// A pattern that no name matches.
    pub fn trainable<'a>(
        &self,
        weights: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<Option<HashSet<String>>, Failure> {
        let Some(only) = &self.only else { return Ok(None) };
        let mut out = HashSet::new();
        for pattern in only.split(',').map(str::trim) {
            let before = out.len();
            out.extend(weights.clone().filter(|name| matches(pattern, name)).map(str::to_owned));
            if out.len() == before && !weights.clone().any(|name| matches(pattern, name)) {
                return Err(Failure::usage(format!(
                    "--only: no weight matches {pattern:?}; the names are those of `chimerac inspect`"
                )));
            }
        }
        Ok(Some(out))
    }
}

/// Whether a name matches a pattern in which `*` stands for any characters.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, rest)) => name.strip_prefix(head).is_some_and(|name| {
            let starts = name.char_indices().map(|c| c.0).chain([name.len()]);
            starts.into_iter().any(|at| matches(rest, &name[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[test]
    fn a_resumed_run_keeps_its_options() {
        let started = HyperArgs { lr: Some(0.1), lr_decay: Some(Decay::Constant), ..HyperArgs::default() };
        let saved = serde_json::to_string(&started.fresh()).expect("JSON");
        assert_eq!(HyperArgs::default().resumed(&saved).expect("options"), started.fresh());
        assert_eq!(started.resumed(&saved).expect("the same options"), started.fresh());
        for (other, flag) in [
            (HyperArgs { lr: Some(0.2), ..HyperArgs::default() }, "--lr is 0.2, but the run was started with 0.1"),
            (HyperArgs { lr_decay: Some(Decay::Cosine), ..HyperArgs::default() }, "--lr-decay"),
            (HyperArgs { eps_rel: Some(0.2), ..HyperArgs::default() }, "--eps-rel"),
        ] {
            let failure = other.resumed(&saved).expect_err("a contradiction");
            assert!(failure.code == 2 && failure.message.contains(flag), "{}", failure.message);
        }
        assert_eq!(HyperArgs::default().resumed("{}").expect_err("no options").code, 5);
    }

    #[test]
    fn estimators_take_the_options_that_they_have() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            hyper: HyperArgs,
        }
        let keys: std::collections::BTreeSet<&str> = ESTIMATORS.iter().flat_map(|row| row.options).copied().collect();
        for key in keys {
            let flag = format!("--{}", key.replace('_', "-"));
            let parse = |value: &str| Line::try_parse_from(["line", "--lr", "1", &format!("{flag}={value}")]).ok();
            let values =
                ["0.5", "1", "true", "adam", "scales", "lozo", "random", "gaussian", "freeze", "noise-ratio", "8bit"];
            let line = values.into_iter().find_map(parse).unwrap_or_else(|| panic!("{flag} takes none of {values:?}"));
            for row in &ESTIMATORS {
                let given: Vec<&str> = line.hyper.of(row.name).given().into_iter().map(|(key, _)| key).collect();
                assert!(given.contains(&"lr") && given.contains(&"estimator"));
                assert_eq!(given.contains(&key), row.options.contains(&key), "{key} for {}", row.name.text());
            }
        }
    }

    #[test]
    fn a_plan_decides_its_shape() {
        let args = HyperArgs { batch: Some(4), ..HyperArgs::default() };
        let hyper = args.fresh().shaped(4, 32, &args).expect("the same batch");
        assert_eq!((hyper.batch, hyper.seq_len), (4, 32));
        assert!(args.fresh().shaped(8, 32, &args).is_err());
        let args = HyperArgs { rank: Some(1), ..HyperArgs::default() };
        assert!(args.fresh().shaped(8, 32, &args).expect_err("built in").message.contains("--rank"));
    }

    #[test]
    fn patterns_choose_weights() {
        let names = ["embed.weight", "layers.0.attn_norm.weight", "layers.10.attn_norm.weight", "norm.weight"];
        let chosen = |only: &str| {
            let hyper = HyperArgs { only: Some(only.into()), ..HyperArgs::default() }.fresh();
            let set = hyper.trainable(names.into_iter()).map_err(|e| e.code)?.expect("a choice");
            Ok::<_, u8>(names.map(|n| set.contains(n)))
        };
        assert_eq!(chosen("embed.weight, norm.weight"), Ok([true, false, false, true]));
        assert_eq!(chosen("*norm*"), Ok([false, true, true, true]));
        assert_eq!(chosen("layers.1*.weight"), Ok([false, false, true, false]));
        assert_eq!(chosen("layers.3.*"), Err(2));
        assert_eq!(HyperArgs::default().fresh().trainable(names.into_iter()).expect("no choice"), None);
    }

    #[test]
    fn numbers_are_checked() {
        assert_eq!((positive("1e-3"), share("0")), (Ok(1e-3), Ok(0.0)));
        assert!(["0", "-1", "nan", "inf", "x"].iter().all(|x| positive(x).is_err()));
        assert!(["1", "-0.1", "nan"].iter().all(|x| share(x).is_err()));
    }
}
