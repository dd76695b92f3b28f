//! What the subcommands share: the way a command fails, and the options for models and for compilation.
//!
//! Every flag has an environment twin `CHIMERA_*`.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use chimera_codegen::Target;
use chimera_compiler::budget::parse_bytes;
use chimera_compiler::tuning::{THREADS, Table};
use chimera_compiler::{
    CompileError, EntryKind, EntrySpec, Family, MemoryBudget, Mode, Options, PerSequence, Scheme, Shared, UpdateRule,
};
use chimera_frontends::config::{
    ConfigError, ModelConfig, Overrides, ParamKind, Scale, Vocabulary, VocabularyError, expert_stack, parameters,
};
use chimera_frontends::layers::Depth;
use chimera_ir::ops::Distribution;
use clap::{ValueEnum, builder::FalseyValueParser};

use crate::input;
use crate::output::note;

/// Larger files are not tuning tables.
const MAX_TABLE_BYTES: u64 = 1 << 26;

/// Why a command ends, and its exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Exit code of the process.
    pub(crate) code: u8,
    /// A sentence for stderr; nothing is printed when it is empty.
    pub(crate) message: String,
}

impl Failure {
    /// A failure that has no code of its own: 1.
    pub(crate) fn new(message: impl Into<String>) -> Failure {
        Failure { code: 1, message: message.into() }
    }

    /// Options that contradict one another or the model: 2.
    pub(crate) fn usage(message: impl Into<String>) -> Failure {
        Failure { code: 2, message: message.into() }
    }

    /// A configuration that cannot be used: 3.
    pub(crate) fn config(message: impl Into<String>) -> Failure {
        Failure { code: 3, message: message.into() }
    }

    /// Something that does not fit: 4.
    pub(crate) fn resource(message: impl Into<String>) -> Failure {
        Failure { code: 4, message: message.into() }
    }

    /// A file whose contents are damaged: 5.
    pub(crate) fn corrupted(message: impl Into<String>) -> Failure {
        Failure { code: 5, message: message.into() }
    }

    /// A file that cannot be written.
    pub(crate) fn write(path: &Path, e: &io::Error) -> Failure {
        let message = format!("cannot write {}: {e}", path.display());
        if is_full(e) { Failure::resource(message) } else { Failure::new(message) }
    }
}

fn is_full(e: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, OutOfMemory, QuotaExceeded, StorageFull};
    matches!(e.kind(), StorageFull | QuotaExceeded | FileTooLarge | OutOfMemory)
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Configuration errors bring their own heading with a code.
        let heading = if self.message.starts_with("error[") { "" } else { "error: " };
        write!(f, "{heading}{}", self.message)
    }
}

impl From<ConfigError> for Failure {
    fn from(e: ConfigError) -> Failure {
        Failure::config(e.to_string())
    }
}

impl From<VocabularyError> for Failure {
    fn from(e: VocabularyError) -> Failure {
        match &e {
            VocabularyError::DataDecide => Failure::usage(e.to_string()),
            VocabularyError::Read(..) => Failure::new(e.to_string()),
            VocabularyError::Damaged { .. } => Failure::corrupted(e.to_string()),
        }
    }
}

impl From<CompileError> for Failure {
    fn from(e: CompileError) -> Failure {
        match &e {
            CompileError::Infer { .. } => Failure::config(e.to_string()),
            CompileError::Option(_) => Failure::usage(e.to_string()),
            CompileError::Dump(path, error) => Failure::write(path, error),
            CompileError::Budget { .. } => Failure::resource(e.to_string()),
            CompileError::Stopped(_) => Failure::new(e.to_string()),
        }
    }
}

/// Writing to stdout. A closed pipe is the reader's wish and ends the command quietly.
impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Failure {
        match e.kind() {
            io::ErrorKind::BrokenPipe => Failure { code: 0, message: String::new() },
            _ => Failure::write(Path::new("stdout"), &e),
        }
    }
}

/// Which model.
#[derive(clap::Args, Debug)]
pub(crate) struct ModelArgs {
    /// Configuration (JSON); `inspect` also takes a compiled plan
    #[arg(value_name = "CONFIG", env = "CHIMERA_MODEL")]
    pub(crate) model: Option<PathBuf>,
    /// Named scale laid over the configuration; alone, it stands for the defaults at that scale
    #[arg(long, env = "CHIMERA_SCALE", value_name = "test|pico|nano|tiny|small|medium|full")]
    pub(crate) scale: Option<Scale>,
    /// Override of one configuration key; may be given several times
    #[arg(long = "set", env = "CHIMERA_SET", value_name = "KEY.PATH=VALUE", value_delimiter = ';')]
    pub(crate) sets: Vec<String>,
    /// Vocabulary: bytes (257 ids), o200k (200073 ids), o200k restricted to N ids, a number of ids, or a saved vocabulary
    #[arg(long, env = "CHIMERA_VOCAB", value_name = "bytes|o200k|o200k:restricted=N|N|FILE")]
    pub(crate) vocab: Option<Vocabulary>,
}

impl ModelArgs {
    /// What the options change in a configuration.
    pub(crate) fn overrides(&self) -> Result<Overrides, Failure> {
        let vocab_size = self.vocab.as_ref().map(Vocabulary::size).transpose()?;
        Ok(Overrides { scale: self.scale, sets: self.sets.clone(), vocab_size })
    }

    /// Whether options change the configuration.
    pub(crate) fn overridden(&self) -> bool {
        self.scale.is_some() || !self.sets.is_empty() || self.vocab.is_some()
    }
}

/// An entry point by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum EntryName {
    /// Cross-entropy of each row
    Loss,
    /// Cross-entropy and its gradient with respect to every weight
    Grad,
    /// Logits of all tokens, states carried
    Logits,
    /// States of many tokens
    Prefill,
    /// Logits of one token, states carried
    Decode,
    /// The loss under all probes of the estimator
    DualLoss,
    /// The step of the estimator
    Update,
}

/// A zeroth-order estimator by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Estimator {
    /// Every sequence has a low-rank direction of its own
    PerseqLowrank,
    /// All sequences share each direction
    Mezo,
}

/// What probes of shared directions do to ternary weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Probing {
    /// Perturb the latents and quantise them again
    Latent,
    /// Perturb the scales, codes stay
    Scales,
    /// Add noise to the product
    Additive,
}

/// How the entries of a direction are distributed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Entries {
    /// +1 or -1
    Rademacher,
    /// Standard normal
    Gaussian,
}

/// What is compiled, and how.
#[derive(clap::Args, Debug)]
pub(crate) struct BuildArgs {
    /// Entry points, separated by commas
    #[arg(
        long,
        env = "CHIMERA_ENTRIES",
        value_enum,
        value_delimiter = ',',
        value_name = "ENTRY,...",
        default_value = "loss,logits,prefill,decode,dual_loss,update"
    )]
    pub(crate) entries: Vec<EntryName>,
    /// Sequences of a training batch: loss, dual_loss, update
    #[arg(long, env = "CHIMERA_ROWS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) rows: u32,
    /// Streams whose states are carried: logits, prefill, decode
    #[arg(long, env = "CHIMERA_STREAMS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) streams: u32,
    /// Tokens of a sequence, and of a prefill chunk
    #[arg(long, env = "CHIMERA_TOKENS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub(crate) tokens: u32,
    /// Iterations of the looped layers; the configuration's default when absent
    #[arg(long, env = "CHIMERA_LOOPS", value_name = "N")]
    pub(crate) loops: Option<usize>,
    /// Take the iterations of every row from an input `depth`; --loops is the most
    #[arg(long, env = "CHIMERA_LOOPS_PER_ROW", value_parser = FalseyValueParser::new())]
    pub(crate) loops_per_row: bool,
    /// As --loops-per-row, and rows stop early when their state settles
    #[arg(long, env = "CHIMERA_ADAPTIVE_LOOPS", value_parser = FalseyValueParser::new())]
    pub(crate) adaptive_loops: bool,
    /// Machine to compile for, such as host, x86-64-v3 or aarch64; for a plan its own when absent
    #[arg(long, visible_alias = "isa", env = "CHIMERA_TARGET")]
    pub(crate) target: Option<Target>,
    /// Zeroth-order estimator of dual_loss and update
    #[arg(long, env = "CHIMERA_ESTIMATOR", value_enum, default_value = "perseq-lowrank")]
    pub(crate) estimator: Estimator,
    /// perseq-lowrank: rank of the probes on matrices
    #[arg(long, env = "CHIMERA_RANK", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) rank: u32,
    /// perseq-lowrank: probe size on matrices relative to their mean magnitude
    #[arg(long, env = "CHIMERA_KAPPA", default_value_t = 0.1, value_parser = positive)]
    pub(crate) kappa: f32,
    /// perseq-lowrank: probe size on vectors
    #[arg(long, env = "CHIMERA_SIGMA_VEC", default_value_t = 0.01, value_parser = positive)]
    pub(crate) sigma_vec: f32,
    /// mezo: number of directions
    #[arg(long, env = "CHIMERA_DIRECTIONS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) directions: u32,
    /// mezo: what probes do to ternary weights
    #[arg(long, env = "CHIMERA_PROBING", value_enum, default_value = "latent")]
    pub(crate) probing: Probing,
    /// mezo: distribution of the entries of a direction
    #[arg(long, env = "CHIMERA_DISTRIBUTION", value_enum, default_value = "rademacher")]
    pub(crate) distribution: Entries,
    /// mezo: probe size
    #[arg(long, env = "CHIMERA_EPS", default_value_t = 1e-3, value_parser = positive)]
    pub(crate) eps: f32,
    /// mezo: probe size on ternary matrices relative to their mean magnitude, instead of --eps
    #[arg(long, env = "CHIMERA_EPS_REL", value_parser = positive)]
    pub(crate) eps_rel: Option<f32>,
    /// perseq-lowrank: decay of the running mean of estimates
    #[arg(long, env = "CHIMERA_MOMENTUM", default_value_t = 0.9, value_parser = below_one)]
    pub(crate) momentum: f32,
    /// perseq-lowrank: step size on vectors relative to the rate
    #[arg(long, env = "CHIMERA_VEC_SCALE", default_value_t = 0.02, value_parser = positive)]
    pub(crate) vec_scale: f32,
    /// mezo: decay of ternary weights
    #[arg(long, env = "CHIMERA_WEIGHT_DECAY", default_value_t = 0.0, value_parser = below_one)]
    pub(crate) weight_decay: f32,
    /// Rate of the expert balance, 0 leaves selection biases alone; the configuration's bias_update_rate when absent
    #[arg(long, env = "CHIMERA_BALANCE", value_parser = below_one)]
    pub(crate) balance: Option<f32>,
    /// Probe and train only weights whose names start so, separated by commas
    #[arg(long, env = "CHIMERA_TRAINABLE", value_delimiter = ',', value_name = "PREFIX,...")]
    pub(crate) trainable: Vec<String>,
    /// For packed ternary weights, as chimera-run pack writes them: codes in place of latents; forward passes only
    #[arg(long, env = "CHIMERA_PACKED", value_parser = FalseyValueParser::new())]
    pub(crate) packed: bool,
    /// Choose the variants of kernels by this table, which chimerac tune has made on this machine
    #[arg(long, env = "CHIMERA_TUNING", value_name = "TABLE")]
    pub(crate) tuning: Option<PathBuf>,
    /// Memory that the plan may take, such as 4G or 800M: grad makes parts of the forward pass again where it would take more
    #[arg(long, env = "CHIMERA_BUDGET", value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) budget: Option<u64>,
    /// Let the compiler do at most so many rewrites, to find a wrong one
    #[arg(long, env = "CHIMERA_MAX_REWRITES", value_name = "N", default_value_t = u64::MAX, hide_default_value = true)]
    pub(crate) max_rewrites: u64,
}

/// What every command about one model takes.
#[derive(clap::Args, Debug)]
pub(crate) struct CommonArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) build: BuildArgs,
    /// Print JSON
    #[arg(long, env = "CHIMERA_JSON", value_parser = FalseyValueParser::new())]
    pub(crate) json: bool,
}

fn number(text: &str, fits: impl Fn(f32) -> bool, expected: &str) -> Result<f32, String> {
    let value = text.parse().ok().filter(|x: &f32| x.is_finite() && fits(*x));
    value.ok_or_else(|| format!("expected {expected}"))
}

fn positive(text: &str) -> Result<f32, String> {
    number(text, |x| x > 0.0, "a positive number")
}

fn below_one(text: &str) -> Result<f32, String> {
    number(text, |x| (0.0..1.0).contains(&x), "a number from 0 to below 1")
}

impl BuildArgs {
    /// The target, the host when none is given.
    pub(crate) fn target(&self) -> Target {
        self.target.unwrap_or_else(chimera_codegen::host)
    }

    /// The most iterations of the looped layers of this model.
    pub(crate) fn iterations(&self, model: &ModelConfig) -> usize {
        self.loops.unwrap_or_else(|| model.looping.as_ref().map_or(1, |l| l.default))
    }

    /// The options of the compiler for this model.
    pub(crate) fn options(&self, model: &ModelConfig) -> Result<Options, Failure> {
        let depth = self.depth(model)?;
        let (rows, streams, tokens) = (self.rows as usize, self.streams as usize, self.tokens as usize);
        let spec = |entry: &EntryName| {
            let (kind, rows, tokens) = match entry {
                EntryName::Loss => (EntryKind::Loss, rows, tokens),
                EntryName::Grad => (EntryKind::Grad, rows, tokens),
                EntryName::Logits => (EntryKind::Logits, streams, tokens),
                EntryName::Prefill => (EntryKind::Prefill, streams, tokens),
                EntryName::Decode => (EntryKind::Decode, streams, 1),
                EntryName::DualLoss => (EntryKind::DualLoss(self.scheme()), rows, tokens),
                EntryName::Update => (EntryKind::Update(self.scheme(), self.rule(model)), rows, tokens),
            };
            EntrySpec { kind, rows, tokens, depth }
        };
        for (i, entry) in self.entries.iter().enumerate() {
            if self.entries[..i].contains(entry) {
                return Err(Failure::usage(format!("--entries names {} twice", spec(entry).kind.name())));
            }
        }
        Ok(Options {
            target: self.target().to_string(),
            entries: self.entries.iter().map(spec).collect(),
            trainable: self.trainable(model)?,
            packed: self.packed(model),
            max_rewrites: self.max_rewrites,
            tuning: self.table(&self.target())?,
            budget: self.budget.map(|bytes| MemoryBudget { bytes, outside: 0, threads: THREADS }),
            ..Options::default()
        })
    }

    /// The tuning table, if there is one and it is for this machine and target; another one is left out with a warning.
    pub(crate) fn table(&self, target: &Target) -> Result<Option<Table>, Failure> {
        let Some(path) = &self.tuning else { return Ok(None) };
        let text = input::read_text(path, MAX_TABLE_BYTES)?;
        let table = Table::from_json(&text).map_err(|e| Failure::corrupted(format!("{}: {e}", path.display())))?;
        if let Err(why) = table.fits(&target.to_string()) {
            note(&format!("warning: {}: {why}; the cost model chooses", path.display()));
            return Ok(None);
        }
        Ok(Some(table))
    }

    fn depth(&self, model: &ModelConfig) -> Result<Option<Depth>, Failure> {
        let per_row = self.loops_per_row || self.adaptive_loops;
        if self.loops.is_none() && !per_row {
            return Ok(None);
        }
        let Some(looping) = &model.looping else {
            return Err(Failure::usage("the model has no looped layers, expected no option about loops"));
        };
        let [least, most] = looping.range;
        let n = self.iterations(model);
        if !(least..=most).contains(&n) {
            return Err(Failure::usage(format!("--loops is {n}, the configuration allows {least} to {most}")));
        }
        let adaptive = self.adaptive_loops;
        Ok(Some(if per_row { Depth::PerRow { max: n, adaptive } } else { Depth::Fixed(n) }))
    }

    fn scheme(&self) -> Scheme {
        match self.estimator {
            Estimator::PerseqLowrank => Scheme::PerSequence(PerSequence {
                rank: self.rank as usize,
                kappa: self.kappa,
                sigma_vec: self.sigma_vec,
                group: 1,
            }),
            Estimator::Mezo => Scheme::Shared(Shared {
                mode: match self.probing {
                    Probing::Latent => Mode::Requantise,
                    Probing::Scales => Mode::Scales,
                    Probing::Additive => Mode::Additive,
                },
                directions: self.directions as usize,
                family: Family::Dense(match self.distribution {
                    Entries::Rademacher => Distribution::Rademacher,
                    Entries::Gaussian => Distribution::Gaussian,
                }),
                eps: self.eps,
                eps_rel: self.eps_rel,
                ..Shared::default()
            }),
        }
    }

    fn rule(&self, model: &ModelConfig) -> UpdateRule {
        let configured = model.moe.as_ref().map_or(0.0, |moe| moe.bias_update_rate as f32);
        UpdateRule {
            momentum: self.momentum,
            vec_scale: self.vec_scale,
            weight_decay: self.weight_decay,
            balance: self.balance.unwrap_or(configured),
            ..UpdateRule::default()
        }
    }

    /// All ternary weights when they are packed, experts by their stacks.
    fn packed(&self, model: &ModelConfig) -> HashSet<String> {
        if !self.packed {
            return HashSet::new();
        }
        let ternary = parameters(model).into_iter().filter(|p| p.kind == ParamKind::Ternary);
        ternary.map(|p| expert_stack(&p.name).map_or(p.name, |(stack, _)| stack)).collect()
    }

    fn trainable(&self, model: &ModelConfig) -> Result<Option<HashSet<String>>, Failure> {
        if self.trainable.is_empty() {
            return Ok(None);
        }
        let names: Vec<String> = parameters(model).into_iter().map(|p| p.name).collect();
        let mut chosen = HashSet::new();
        for prefix in &self.trainable {
            let before = chosen.len();
            chosen.extend(names.iter().filter(|n| n.starts_with(prefix.as_str())).cloned());
            if chosen.len() == before && !names.iter().any(|n| n.starts_with(prefix.as_str())) {
                return Err(Failure::usage(format!("--trainable: no weight has a name that starts with {prefix:?}")));
            }
        }
        Ok(Some(chosen))
    }
}
