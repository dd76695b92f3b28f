//! The phases of training: what a phase asks of its options, its data and the weights that it starts from.
//!
//! Invariant: an option on the command line goes before the configuration, the configuration before what a phase prefers, and that before
//! what an estimator prefers. What a resumed run is, its checkpoint says.

mod course;
pub mod reference;
mod start;

pub use course::Course;
pub use start::{Start, same_architecture, vocab_of};

use crate::estimators::EstimatorName;
use crate::hyper::{Hyper, HyperArgs, positive};
use crate::model::{Model, Source};
use crate::options::Failure;
use crate::train::Args;
use chimera_compiler::Objective;
use chimera_frontends::config::{self, PhaseKind};
use chimera_runtime::text::Stage;
use chimera_runtime::train::Decay;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Options that choose a phase.
#[derive(clap::Args, Clone, Debug, Default)]
#[command(next_help_heading = "Phases")]
pub struct PhaseArgs {
    /// Phase of training; what no option says is taken from training.phases of the configuration [default: pretrain, by options alone]
    #[arg(long, env = "CHIMERA_PHASE")]
    pub phase: Option<PhaseName>,
    /// Start from the weights of this checkpoint or folder of a run, which must have the architecture of the configuration
    #[arg(long, env = "CHIMERA_FROM", value_name = "CHECKPOINT")]
    pub from: Option<PathBuf>,
    /// Passes over the data, where no --steps or --seconds are given (sft, dpo) [default: 1]
    #[arg(long, env = "CHIMERA_EPOCHS", value_parser = positive, conflicts_with_all = ["steps", "seconds"])]
    pub epochs: Option<f64>,
    /// Lengths of sequences, each for so many steps, a segment of --seq-len tokens each, and with a learning rate of its own (ctx_extend)
    #[arg(long, env = "CHIMERA_STAGES", value_name = "TOKENS:STEPS[:LR],...", value_delimiter = ',', value_parser = stage)]
    pub stages: Vec<config::Stage>,
    /// How strongly a preference counts (dpo) [default: 0.1]
    #[arg(long, env = "CHIMERA_BETA", value_parser = positive)]
    pub beta: Option<f64>,
    /// File of the log-probabilities of the reference: used if it is there, else written (dpo) [default: reference.b158 in the folder of
    /// the run]
    #[arg(long, env = "CHIMERA_REFERENCE", value_name = "FILE")]
    pub reference: Option<PathBuf>,
}

/// A phase on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PhaseName {
    /// Text, every token
    Pretrain,
    /// Long text in segments, states carried from one to the next
    #[value(name = "ctx_extend", alias = "ctx-extend")]
    CtxExtend,
    /// Conversations, what the assistant says
    Sft,
    /// Pairs of answers, one of which is preferred
    Dpo,
}

impl PhaseName {
    fn kind(self) -> PhaseKind {
        match self {
            PhaseName::Pretrain => PhaseKind::Pretrain,
            PhaseName::CtxExtend => PhaseKind::ContextExtension,
            PhaseName::Sft => PhaseKind::Sft,
            PhaseName::Dpo => PhaseKind::Dpo,
        }
    }
}

/// What decides the bits of a phase and not of others.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum Phase {
    /// Text.
    #[default]
    Pretrain,
    /// Long text.
    CtxExtend {
        /// Lengths of sequences.
        stages: Vec<Stage>,
    },
    /// Conversations.
    Sft,
    /// Preferences.
    Dpo {
        /// How strongly a preference counts.
        beta: f64,
        /// The file of the reference, where it is not in the folder of the run.
        file: Option<PathBuf>,
        /// Checksum of the weights of the reference; empty before they are known.
        weights: String,
    },
}

impl Phase {
    /// The name in configurations and on command lines.
    pub fn word(&self) -> &'static str {
        match self {
            Phase::Pretrain => PhaseKind::Pretrain.word(),
            Phase::CtxExtend { .. } => PhaseKind::ContextExtension.word(),
            Phase::Sft => PhaseKind::Sft.word(),
            Phase::Dpo { .. } => PhaseKind::Dpo.word(),
        }
    }

    /// Whether its data are plain text.
    pub fn reads_text(&self) -> bool {
        matches!(self, Phase::Pretrain | Phase::CtxExtend { .. })
    }

    /// Whether states are carried from step to step.
    pub fn carries(&self) -> bool {
        matches!(self, Phase::CtxExtend { .. })
    }

    /// Whether rows are compared with one another.
    pub fn compares(&self) -> bool {
        matches!(self, Phase::Dpo { .. })
    }

    /// Notes the checksum of the weights of the reference.
    pub fn refer_to(&mut self, sum: String) {
        if let Phase::Dpo { weights, .. } = self {
            *weights = sum;
        }
    }

    /// What losses are of.
    pub fn objective(&self) -> Objective {
        match self {
            Phase::Dpo { beta, .. } => Objective::Preference { beta: *beta as f32 },
            Phase::Pretrain | Phase::CtxExtend { .. } | Phase::Sft => Objective::Tokens,
        }
    }
}

/// What the configuration says of the length of a phase.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Length {
    epochs: Option<f64>,
    tokens: Option<f64>,
}

impl Length {
    /// The steps that the data and a batch of `tokens` make of it; nothing where a phase has no length of its own.
    pub fn steps(self, course: &Course, hyper: &Hyper) -> Option<u64> {
        if let Phase::CtxExtend { stages } = &hyper.phase {
            return Some(stages.iter().fold(0, |sum, stage| sum.saturating_add(stage.steps)));
        }
        let batch = f64::from(hyper.batch);
        let passes = course.rows().map(|rows| self.epochs.unwrap_or(1.0) * rows as f64 / batch);
        let by_tokens = self.tokens.map(|n| n / (batch * f64::from(hyper.seq_len)));
        // The conversion saturates at the greatest number.
        passes.or(by_tokens).map(|steps| (steps.ceil() as u64).max(1))
    }
}

/// The options of a new run, and how long its phase is.
///
/// # Errors
/// A phase without its data, options without a meaning, or a configuration that cannot be read.
pub fn fresh(args: &Args, options: &HyperArgs) -> Result<(Hyper, Length), Failure> {
    let given = &args.phase;
    let name = given.phase.unwrap_or(PhaseName::Pretrain);
    given.refuse(name)?;
    let Some(_) = given.phase else { return Ok((options.checked()?, Length::default())) };
    let model = Model::open(&args.model, None)?;
    if matches!(model.source, Source::Plan(_)) && name != PhaseName::Pretrain {
        return Err(Failure::usage(format!(
            "a compiled plan is one for pretraining; name the configuration for --phase {}",
            name.kind().word()
        )));
    }
    let described = |kind| model.phases.iter().find(|p| p.kind == kind);
    let own = described(name.kind());
    if args.data.data.is_empty() {
        return Err(without_data(name, own));
    }
    if name == PhaseName::Dpo && (args.data.field.is_some() || args.data.binary) {
        return Err(Failure::usage(
            "--field and --binary have no meaning for --phase dpo, whose records have the fields prompt, chosen and rejected; leave them out",
        ));
    }
    let mut hyper = filled(options, name, own, described(PhaseKind::Pretrain)).checked()?;
    hyper.phase = match name {
        PhaseName::Pretrain => Phase::Pretrain,
        PhaseName::CtxExtend => {
            let described = own.map_or(&[][..], |p| &p.stages);
            long(&mut hyper, if given.stages.is_empty() { described } else { &given.stages })?
        }
        PhaseName::Sft => Phase::Sft,
        PhaseName::Dpo => {
            let parts = hyper.batch / hyper.accumulate;
            if !parts.is_multiple_of(2) {
                return Err(Failure::usage(format!(
                    "--batch is {} in {} parts, but a pair of answers is two rows of a part; choose a multiple of two rows for each part",
                    hyper.batch, hyper.accumulate
                )));
            }
            let beta = given.beta.or(own.and_then(|p| p.beta)).unwrap_or(0.1);
            let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
            Phase::Dpo { beta, file: given.reference.as_ref().map(absolute), weights: String::new() }
        }
    };
    let length = Length { epochs: given.epochs.or(own.and_then(|p| p.epochs)), tokens: own.and_then(|p| p.tokens) };
    Ok((hyper, length))
}

/// The phase of these stages; the learning rate of the run becomes the greatest of them.
fn long(hyper: &mut Hyper, stages: &[config::Stage]) -> Result<Phase, Failure> {
    let name = PhaseKind::ContextExtension.word();
    if !hyper.estimator.row().gradients {
        return Err(Failure::usage(format!(
            "--phase {name} goes along a gradient: the estimator {} tries other weights in every step, whose states nothing could continue; choose --estimator adamw, sgd or chimera21",
            hyper.estimator.text()
        )));
    }
    if hyper.accumulate > 1 {
        return Err(Failure::usage(format!(
            "--accumulate has no meaning for --phase {name}, where every row continues the row of the step before; choose a smaller --batch"
        )));
    }
    if stages.is_empty() {
        return Err(Failure::usage(format!(
            "--phase {name} has no stages; give them by --stages TOKENS:STEPS, or in training.phases of the configuration"
        )));
    }
    let seq = hyper.seq_len as usize;
    if let Some(bad) = stages.iter().find(|s| !s.tokens.is_multiple_of(seq) || s.tokens > 1 << 20 || s.steps == 0) {
        return Err(Failure::usage(format!(
            "a stage has {} steps on sequences of {} tokens, expected at least one step and a multiple of --seq-len, which is {seq}, up to {}",
            bad.steps,
            bad.tokens,
            1 << 20
        )));
    }
    let rates: Vec<f64> = stages.iter().map(|s| s.lr.unwrap_or(hyper.lr)).collect();
    hyper.lr = rates.iter().copied().fold(0.0, f64::max);
    if hyper.lr <= 0.0 {
        return Err(Failure::usage("every stage has the learning rate 0; give one above 0"));
    }
    let stage = |(s, rate): (&config::Stage, &f64)| Stage { tokens: s.tokens, steps: s.steps, rate: rate / hyper.lr };
    Ok(Phase::CtxExtend { stages: stages.iter().zip(&rates).map(stage).collect() })
}

/// `TOKENS:STEPS` or `TOKENS:STEPS:LR`.
fn stage(text: &str) -> Result<config::Stage, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let parsed = match parts[..] {
        [tokens, steps] => tokens.parse().ok().zip(steps.parse().ok()).map(|(t, s)| (t, s, None)),
        [tokens, steps, lr] => match (tokens.parse(), steps.parse(), positive(lr)) {
            (Ok(t), Ok(s), Ok(lr)) => Some((t, s, Some(lr))),
            _ => None,
        },
        _ => None,
    };
    let (tokens, steps, lr) = parsed
        .ok_or_else(|| format!("found {text:?}, expected tokens and steps such as 4096:1000, or 4096:1000:1e-5"))?;
    Ok(config::Stage { tokens, steps, lr })
}

fn without_data(name: PhaseName, own: Option<&config::Phase>) -> Failure {
    let wanted = match name {
        PhaseName::Pretrain | PhaseName::CtxExtend => "text files",
        PhaseName::Sft => "lines of JSON with messages",
        PhaseName::Dpo => "lines of JSON with prompt, chosen and rejected",
    };
    let named = own.filter(|p| !p.data.is_empty()).map_or(String::new(), |p| {
        format!("; the configuration names {}, whose files are not part of it", p.data.join(", "))
    });
    Failure::usage(format!("--phase {} has no data, expected {wanted} by --data{named}", name.kind().word()))
}

impl PhaseArgs {
    /// Refuses options that a phase does not have.
    fn refuse(&self, name: PhaseName) -> Result<(), Failure> {
        use PhaseName::{CtxExtend, Dpo, Sft};
        let options: [(&str, bool, &[PhaseName]); 4] = [
            ("stages", !self.stages.is_empty(), &[CtxExtend]),
            ("epochs", self.epochs.is_some(), &[Sft, Dpo]),
            ("beta", self.beta.is_some(), &[Dpo]),
            ("reference", self.reference.is_some(), &[Dpo]),
        ];
        match options.into_iter().find(|(_, given, phases)| *given && !phases.contains(&name)) {
            None => Ok(()),
            Some((option, _, phases)) => {
                let words: Vec<&str> = phases.iter().map(|p| p.kind().word()).collect();
                Err(Failure::usage(format!(
                    "--{option} has no meaning for the phase {}; leave it out, or choose --phase {}",
                    name.kind().word(),
                    words.join(" or ")
                )))
            }
        }
    }

    /// Refuses options that contradict those of a resumed run.
    ///
    /// # Errors
    /// The first option that does.
    pub fn resumed(&self, hyper: &Hyper) -> Result<(), Failure> {
        let contradiction = |option: &str, value: String, own: String| {
            Err(Failure::usage(format!(
                "--{option} is {value}, but the run was started with {own}; leave the option out or start another run"
            )))
        };
        if let Some(path) = &self.from {
            return Err(Failure::usage(format!(
                "--from {} has no meaning with --resume, which has weights of its own; leave one of them out",
                path.display()
            )));
        }
        match (self.phase.map(|p| p.kind().word()), hyper.phase.word()) {
            (Some(word), own) if word != own => return contradiction("phase", word.into(), own.into()),
            _ => {}
        }
        match (&hyper.phase, self.beta) {
            (Phase::Dpo { beta, .. }, Some(given)) if *beta != given => {
                return contradiction("beta", given.to_string(), beta.to_string());
            }
            (Phase::Dpo { .. }, _) | (_, None) => {}
            (phase, Some(given)) => {
                return contradiction("beta", given.to_string(), format!("--phase {}", phase.word()));
            }
        }
        if self.reference.is_some() || self.epochs.is_some() || !self.stages.is_empty() {
            return Err(Failure::usage(
                "--reference, --epochs and --stages are those that the run was started with; leave them out, or give --steps for a longer run",
            ));
        }
        Ok(())
    }
}

/// The options of a phase: those given, those of the configuration, and what the phase prefers.
fn filled(args: &HyperArgs, name: PhaseName, own: Option<&config::Phase>, main: Option<&config::Phase>) -> HyperArgs {
    let mut out = args.clone();
    // How a step is made is a matter of the whole training, so phases take after pretraining.
    let word = own.and_then(|p| p.optimizer.as_deref()).or(main.and_then(|p| p.optimizer.as_deref()));
    let configured = word.map(|word| match word {
        "SGD" => EstimatorName::Sgd,
        "Chimera21" => EstimatorName::Chimera21,
        "MeZO" => EstimatorName::Mezo,
        "perseq-lowrank" => EstimatorName::PerseqLowrank,
        _ => EstimatorName::Adamw,
    });
    let preferred = (name != PhaseName::Pretrain).then_some(EstimatorName::Adamw);
    out.estimator = out.estimator.or(configured).or(preferred);
    let row = out.estimator.unwrap_or(EstimatorName::PerseqLowrank).row();
    let has = |option: &str| row.options.contains(&option);
    let count = |n: f64, at_most: f64| n.round().clamp(1.0, at_most) as u32;
    let both = |read: fn(&config::Phase) -> Option<f64>| own.and_then(read).or(main.and_then(read));
    let tokens = own.and_then(|p| p.seq_len).map(|n| count(n as f64, f64::from(1 << 20)));
    let long = matches!(name, PhaseName::Sft | PhaseName::Dpo).then_some(256);
    out.seq_len = out.seq_len.or(tokens).or(long);
    let rows = own.and_then(|p| p.batch_tokens).map(|n| n / f64::from(out.seq_len.unwrap_or(64)));
    // A pair is two rows.
    let unit = if name == PhaseName::Dpo { 2.0 } else { 1.0 };
    let whole = |n: f64| unit as u32 * count(n / unit, f64::from(1 << 16) / unit);
    out.batch = out.batch.or(rows.map(whole));
    // Small steps keep what was learned before.
    let share = match name {
        PhaseName::Pretrain => None,
        PhaseName::CtxExtend | PhaseName::Sft => Some(0.1),
        PhaseName::Dpo => Some(0.02),
    };
    out.lr = out.lr.or(own.and_then(|p| p.lr)).or(share.map(|share| share * row.lr));
    // Stages say how the rate falls.
    let flat = (name == PhaseName::CtxExtend).then_some(Decay::Constant);
    out.lr_decay = out.lr_decay.or(own.and_then(|p| p.schedule.as_deref()).and_then(decay)).or(flat);
    out.warmup = out.warmup.or(own.and_then(|p| p.warmup_steps).map(|n| n as u64));
    if has("weight_decay") {
        out.weight_decay = out.weight_decay.or(both(|p| p.weight_decay));
    }
    if has("clip") {
        out.clip = out.clip.or(both(|p| p.grad_clip));
    }
    if name == PhaseName::Dpo && has("group_size") {
        // Both answers of a pair under one direction.
        out.group_size = out.group_size.or(Some(2));
    }
    out
}

fn decay(word: &str) -> Option<Decay> {
    match word {
        "cosine_warmup" => "cosine".parse().ok(),
        word => word.replace('_', "-").parse().ok(),
    }
}
