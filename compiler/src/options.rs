//! What is asked of the compiler, and why it may refuse.

use std::{collections::HashSet, error, fmt, io, path::PathBuf};

use chimera_frontends::layers::Depth;
use chimera_ir::ops::InferError;

use crate::{
    budget::MemoryBudget,
    descend::Descent,
    estimators::Scheme,
    tuning::{self, Table, Tuning},
    update::UpdateRule,
};

/// A way into the plan.
#[derive(Clone, Debug, PartialEq)]
pub enum EntryKind {
    /// `loss`: mean cross-entropy of each row, from fresh states.
    Loss,
    /// `grad`: the loss, and its gradient with respect to every weight that can be trained.
    Grad,
    /// `backward`: the loss; its gradient stays for `update`.
    Backward {
        /// Whether the gradient, times an input `share`, adds to the one that is there.
        accumulate: bool,
    },
    /// `logits`: all logits, states carried.
    Logits,
    /// `prefill`: states only, in chunks.
    Prefill,
    /// `decode`: one token, states carried.
    Decode,
    /// `dual_loss`: the loss under all probes of a scheme.
    DualLoss(Scheme),
    /// `update`: the step of a scheme.
    Update(Scheme, UpdateRule),
    /// `update`: the step of a descent along the gradient that `backward` has left.
    Descend(Descent),
    /// `adapt`: scales and threshold of a dynamic quantiser follow the weights.
    Adapt,
    /// `mask`: the choice of what a scheme probes, where it keeps one.
    Mask(Scheme),
    /// `head`: the gradient of final norm and head, for an `update` with [`Options::hybrid`].
    Head,
    /// `cosine`: inner products of the estimate of a scheme and the gradient.
    Cosine(Scheme),
    /// `prefix`: what goes into the layer of [`Options::cut`].
    Prefix,
}

impl EntryKind {
    /// The name of the entry point in the plan.
    pub fn name(&self) -> &'static str {
        match self {
            EntryKind::Loss => "loss",
            EntryKind::Grad => "grad",
            EntryKind::Backward { .. } => "backward",
            EntryKind::Logits => "logits",
            EntryKind::Prefill => "prefill",
            EntryKind::Decode => "decode",
            EntryKind::DualLoss(_) => "dual_loss",
            EntryKind::Update(..) | EntryKind::Descend(_) => "update",
            EntryKind::Adapt => "adapt",
            EntryKind::Mask(_) => "mask",
            EntryKind::Head => "head",
            EntryKind::Cosine(_) => "cosine",
            EntryKind::Prefix => "prefix",
        }
    }
}

/// One entry point and its shape.
#[derive(Clone, Debug, PartialEq)]
pub struct EntrySpec {
    /// Which.
    pub kind: EntryKind,
    /// Batch rows.
    pub rows: usize,
    /// Tokens of a row.
    pub tokens: usize,
    /// Loop depth. When absent that of the configuration: its default, and for [`EntryKind::DualLoss`] and [`EntryKind::Backward`] a
    /// depth for each row if training draws it.
    pub depth: Option<Depth>,
}

/// What plans say about how they were compiled: `rows=2 tokens=64 loops=3 PerSequence { rank: 1, .. }`.
impl fmt::Display for EntrySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rows={} tokens={}", self.rows, self.tokens)?;
        match self.depth {
            None => {}
            Some(Depth::Fixed(n)) => write!(f, " loops={n}")?,
            Some(Depth::PerRow { max, adaptive }) => write!(f, " loops<={max} adaptive={adaptive}")?,
        }
        match &self.kind {
            EntryKind::Loss | EntryKind::Grad | EntryKind::Adapt | EntryKind::Head => Ok(()),
            EntryKind::Backward { accumulate } => write!(f, " accumulate={accumulate}"),
            EntryKind::Logits | EntryKind::Prefill | EntryKind::Decode | EntryKind::Prefix => Ok(()),
            EntryKind::Descend(descent) => write!(f, " {descent:?}"),
            EntryKind::DualLoss(scheme) | EntryKind::Mask(scheme) | EntryKind::Cosine(scheme) => {
                write!(f, " {scheme:?}")
            }
            EntryKind::Update(scheme, rule) => write!(f, " {scheme:?} {rule:?}"),
        }
    }
}

/// What losses are of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Objective {
    /// Tokens: cross-entropy.
    #[default]
    Tokens,
    /// Pairs of rows, the first of which is preferred (semantics 12.3).
    Preference {
        /// How strongly a difference counts.
        beta: f32,
    },
}

/// How to compile.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the target.
    pub target: String,
    /// Entry points.
    pub entries: Vec<EntrySpec>,
    /// What the losses of entry points are of.
    pub objective: Objective,
    /// Whether `loss` and `backward` carry states from call to call, those of an entry point as `ENTRY:NAME`; gradients end where a call
    /// begins (semantics 12.4).
    pub carried: bool,
    /// Whether final norm and head follow the gradient that `head` leaves, and probes leave them alone.
    pub hybrid: bool,
    /// Weights that probes reach and updates change; all that can be trained when absent.
    pub trainable: Option<HashSet<String>>,
    /// The layer in front of which [`EntryKind::DualLoss`] and [`EntryKind::Backward`] begin: they take what goes into it, which
    /// [`EntryKind::Prefix`] gives, as an input `prefix`. No weight in front of it may be trainable; nothing for whole models.
    pub cut: Option<usize>,
    /// Ternary weights that are given as codes and scales instead of latents, by name; all experts of a layer together under the name
    /// of their stack. Forward passes only.
    pub packed: HashSet<String>,
    /// Stop behind the stage of that name, see [`STAGES`](crate::passes::STAGES).
    pub stop_after: Option<String>,
    /// Write every stage's graph into this folder.
    pub dump: Option<PathBuf>,
    /// The number of rewrites that passes may do.
    pub max_rewrites: u64,
    /// What was measured; it counts only where it [fits](Table::fits).
    pub tuning: Option<Table>,
    /// Threads that kernels are laid out for; any number may run them.
    pub threads: usize,
    /// Memory to keep to: gradients make parts of the forward pass again where all of it would take more.
    pub budget: Option<MemoryBudget>,
}

impl Options {
    /// What decides among the variants of kernels.
    ///
    /// # Errors
    /// A target that nobody knows.
    pub fn tuning(&self) -> Result<Tuning, CompileError> {
        let target: chimera_codegen::Target =
            self.target.parse().map_err(|e: chimera_codegen::TargetError| CompileError::Option(e.to_string()))?;
        let table = self.tuning.clone().filter(|t| t.fits(&target.to_string()).is_ok());
        let threads = table.as_ref().map_or(self.threads, |t| t.threads);
        Ok(Tuning { table, target, threads })
    }
}

impl Default for Options {
    fn default() -> Options {
        Options {
            target: "host".to_owned(),
            entries: vec![],
            objective: Objective::Tokens,
            carried: false,
            hybrid: false,
            trainable: None,
            cut: None,
            packed: HashSet::new(),
            stop_after: None,
            dump: None,
            max_rewrites: u64::MAX,
            tuning: None,
            threads: tuning::THREADS,
            budget: None,
        }
    }
}

/// Why there is no plan.
#[derive(Debug)]
pub enum CompileError {
    /// An operation refused its operands: the configuration asks for something that does not fit together.
    Infer {
        /// Entry point.
        entry: String,
        /// Stage.
        stage: &'static str,
        /// The refusal.
        error: InferError,
    },
    /// An option has no meaning.
    Option(String),
    /// No choice of what gradients make again keeps to the budget.
    Budget {
        /// Bytes that are allowed.
        budget: u64,
        /// Bytes that would do.
        least: u64,
    },
    /// A dump could not be written.
    Dump(PathBuf, io::Error),
    /// Compilation ended early because it was asked to; the graphs as text.
    Stopped(String),
}

impl fmt::Display for CompileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CompileError::Infer { entry, stage, error } => write!(f, "entry point {entry}, stage {stage}: {error}"),
            CompileError::Option(why) => f.write_str(why),
            CompileError::Budget { budget, least } => write!(
                f,
                "the budget is {budget} bytes, expected at least {least} ({} MiB): gradients make again all that they can and need so much; give that, smaller batches or shorter rows",
                least.div_ceil(1 << 20)
            ),
            CompileError::Dump(path, error) => write!(f, "cannot write {}: {error}", path.display()),
            CompileError::Stopped(_) => f.write_str("stopped as asked"),
        }
    }
}

impl error::Error for CompileError {}
