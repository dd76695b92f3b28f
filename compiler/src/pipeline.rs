//! The stages of compilation, in order.

use std::{
    collections::{HashMap, HashSet},
    error, fmt, fs, io,
    path::{Path, PathBuf},
};

use chimera_frontends::{
    config::{ModelConfig, ParamKind, WeightScale, parameters},
    layers::{Depth, Form, Shape},
    models::chimera::{self, Head},
};
use chimera_ir::{
    Graph,
    ops::{InferError, ScaleMode},
    plan::{AGREEMENT, CODES, ESTIMATOR, MASK_REFRESH, Plan, SCALES, WeightKind},
};

use crate::{
    assemble::Assembler,
    budget::{self, MemoryBudget},
    descend::{self, Descent},
    estimators::{
        Mask, Scheme,
        mask::{self, masked},
    },
    fuse::{Decisions, fuse},
    passes::{Budget, COMBINE, Pass, SIMPLIFY, STAGES, dual, grad, hoist::Prepare},
    quantiser,
    rebuild::sweep,
    tuning::{self, Table, Tuning},
    update::{self, Quantised, Target, UpdateRule},
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
            EntryKind::Loss | EntryKind::Grad | EntryKind::Adapt => Ok(()),
            EntryKind::Backward { accumulate } => write!(f, " accumulate={accumulate}"),
            EntryKind::Logits | EntryKind::Prefill | EntryKind::Decode => Ok(()),
            EntryKind::Descend(descent) => write!(f, " {descent:?}"),
            EntryKind::DualLoss(scheme) | EntryKind::Mask(scheme) => write!(f, " {scheme:?}"),
            EntryKind::Update(scheme, rule) => write!(f, " {scheme:?} {rule:?}"),
        }
    }
}

/// How to compile.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the target.
    pub target: String,
    /// Entry points.
    pub entries: Vec<EntrySpec>,
    /// Weights that probes reach and updates change; all that can be trained when absent.
    pub trainable: Option<HashSet<String>>,
    /// Ternary weights that are given as codes and scales instead of latents, by name; all experts of a layer together under the name
    /// of their stack. Forward passes only.
    pub packed: HashSet<String>,
    /// Stop behind the stage of that name, see [`STAGES`].
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
            trainable: None,
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

/// Compile a model.
///
/// # Errors
/// When an entry point cannot be built for the configuration, an option is unknown, or a dump cannot be written; and
/// [`CompileError::Stopped`] when `stop_after` names a stage before the last.
pub fn compile(cfg: &ModelConfig, options: &Options) -> Result<Plan, CompileError> {
    compile_observed(cfg, options, &mut |_, _, _| {})
}

/// Sees every graph: stage, entry point, graph.
pub type Observer<'a> = dyn FnMut(&'static str, &str, &Graph) + 'a;

/// Compile a model and show every stage to `observer`.
///
/// # Errors
/// See [`compile`].
pub fn compile_observed(
    cfg: &ModelConfig,
    options: &Options,
    observer: &mut Observer<'_>,
) -> Result<Plan, CompileError> {
    if let Some(stage) = options.stop_after.as_ref().filter(|s| !STAGES.contains(&s.as_str())) {
        return Err(CompileError::Option(format!("no stage is called {stage}; there are {}", STAGES.join(", "))));
    }
    let mut kinds = weight_kinds(cfg);
    for suffix in [CODES, SCALES] {
        kinds.extend(options.packed.iter().map(|name| (format!("{name}{suffix}"), WeightKind::Packed)));
    }
    let mut graphs = vec![];
    for spec in &options.entries {
        let name = spec.kind.name();
        let fail = |stage| move |error| CompileError::Infer { entry: name.to_owned(), stage, error };
        let verb = match spec.kind {
            EntryKind::Grad | EntryKind::Backward { .. } => Some("needs"),
            EntryKind::DualLoss(_)
            | EntryKind::Update(..)
            | EntryKind::Descend(_)
            | EntryKind::Mask(_)
            | EntryKind::Adapt => Some("changes"),
            EntryKind::Loss | EntryKind::Logits | EntryKind::Prefill | EntryKind::Decode => None,
        };
        if let Some(verb) = verb.filter(|_| !options.packed.is_empty()) {
            return Err(CompileError::Option(format!(
                "entry point {name} {verb} latents, which packed ternary weights have lost; leave it out or give float weights"
            )));
        }
        if let EntryKind::DualLoss(Scheme::PerSequence(s)) | EntryKind::Update(Scheme::PerSequence(s), _) = &spec.kind
            && (s.group == 0 || !spec.rows.is_multiple_of(s.group))
        {
            return Err(CompileError::Option(format!(
                "{} sequences of a batch cannot be divided into groups of {}; choose a multiple of it",
                spec.rows, s.group
            )));
        }
        let probes = matches!(spec.kind, EntryKind::DualLoss(_) | EntryKind::Update(..) | EntryKind::Mask(_));
        if probes && cfg.quantization.dynamic.is_some() {
            return Err(CompileError::Option(format!(
                "entry point {name} probes ternary weights, whose quantiser is dynamic (quantization.dynamic.mode); train along gradients, or set it to off"
            )));
        }
        let build = |head, form, carry| {
            let shape = shape(cfg, spec, form, carry);
            chimera::packed_graph(cfg, shape, head, &options.packed).map_err(fail("build"))
        };
        let g = match &spec.kind {
            EntryKind::Loss | EntryKind::DualLoss(_) => build(Head::Loss, Form::Chunked, false)?,
            EntryKind::Grad | EntryKind::Backward { .. } => {
                let half = cfg.looping.as_ref().is_some_and(|l| l.backward_half);
                grad::unroll(&build(Head::Loss, Form::Chunked, false)?, half).map_err(fail("build"))?
            }
            EntryKind::Logits => build(Head::Logits, Form::Chunked, true)?,
            EntryKind::Prefill => build(Head::Hidden, Form::Chunked, true)?,
            EntryKind::Decode => build(Head::Logits, Form::Recurrent, true)?,
            EntryKind::Update(scheme, rule) => {
                let targets = targets(cfg, options);
                let members = scheme.members(spec.rows);
                update::graph(scheme, rule, members, &targets, &quantised(cfg)).map_err(fail("build"))?
            }
            EntryKind::Mask(scheme) => {
                let masked = masked(scheme, &targets(cfg, options));
                let Mask::Kept { by, share, .. } = scheme.mask() else {
                    return Err(CompileError::Option(format!("entry point {name} has nothing to choose")));
                };
                mask::graph(by, share, &masked).map_err(fail("build"))?
            }
            EntryKind::Adapt => {
                // Weights that are not trained have scales too.
                let all = Options { trainable: None, ..options.clone() };
                quantiser::graph(&targets(cfg, &all)).map_err(fail("build"))?
            }
            EntryKind::Descend(descent) => descend::graph(descent, &targets(cfg, options)).map_err(fail("build"))?,
        };
        graphs.push((spec.kind.clone(), spec.rows, g));
    }
    let mut plan = Plan { config: cfg.to_json().to_string(), target: options.target.clone(), ..Plan::default() };
    if let Some(d) = &cfg.quantization.dynamic {
        let strict = u8::from(d.strict);
        let numbers = format!(
            "{} {strict} {} {} {} {} {}",
            d.ema, d.alpha_min, d.alpha_target, d.warmup, d.target_bits, d.control_steps
        );
        plan.options.push(("quantiser".to_owned(), numbers));
    }
    for spec in &options.entries {
        plan.options.push((spec.kind.name().to_owned(), spec.to_string()));
        if let EntryKind::Descend(descent) = &spec.kind {
            plan.options.extend(descent.agreement().map(|numbers| (AGREEMENT.to_owned(), numbers)));
        }
        if let EntryKind::DualLoss(scheme) = &spec.kind {
            plan.options.push((ESTIMATOR.to_owned(), scheme.comparison().name().to_owned()));
            if let Some(steps) = scheme.mask().refresh() {
                plan.options.push((MASK_REFRESH.to_owned(), steps.to_string()));
            }
        }
    }
    stages(plan, graphs, &kinds, options, observer)
}

fn shape(cfg: &ModelConfig, spec: &EntrySpec, form: Form, carry: bool) -> Shape {
    let depth = spec.depth.unwrap_or(match (&cfg.looping, &spec.kind) {
        (Some(l), EntryKind::DualLoss(_) | EntryKind::Backward { .. }) if l.stochastic => {
            Depth::PerRow { max: l.range[1], adaptive: false }
        }
        (Some(l), _) => Depth::Fixed(l.default),
        (None, _) => Depth::Fixed(1),
    });
    Shape { rows: spec.rows, tokens: spec.tokens, form, carry, depth }
}

fn quantised(cfg: &ModelConfig) -> Quantised {
    let q = &cfg.quantization;
    let mode = match q.weight_scale {
        WeightScale::Group => ScaleMode::PerGroup(q.group_size),
        WeightScale::Row => ScaleMode::PerRow,
        WeightScale::Tensor => ScaleMode::PerTensor,
    };
    Quantised { mode, ratio: q.threshold_ratio as f32 }
}

/// The kind of every weight of a model.
pub fn weight_kinds(cfg: &ModelConfig) -> HashMap<String, WeightKind> {
    parameters(cfg).into_iter().map(|p| (p.name, kind(p.kind))).collect()
}

fn kind(kind: ParamKind) -> WeightKind {
    match kind {
        ParamKind::Ternary => WeightKind::Ternary,
        ParamKind::Matrix => WeightKind::Matrix,
        ParamKind::Embedding => WeightKind::Embedding,
        ParamKind::Vector => WeightKind::Vector,
        ParamKind::Buffer => WeightKind::Buffer,
    }
}

fn targets(cfg: &ModelConfig, options: &Options) -> Vec<Target> {
    let wanted = |name: &str| options.trainable.as_ref().is_none_or(|set| set.contains(name));
    parameters(cfg)
        .into_iter()
        .filter(|p| wanted(&p.name))
        .map(|p| Target { name: p.name, dims: p.dims, kind: kind(p.kind) })
        .collect()
}

/// Compile graphs of any origin; `plan` gives what is known already.
///
/// # Errors
/// See [`compile`].
pub fn compile_graphs(
    plan: Plan,
    graphs: Vec<(EntryKind, usize, Graph)>,
    kinds: &HashMap<String, WeightKind>,
    options: &Options,
) -> Result<Plan, CompileError> {
    stages(plan, graphs, kinds, options, &mut |_, _, _| {})
}

fn stages(
    plan: Plan,
    graphs: Vec<(EntryKind, usize, Graph)>,
    kinds: &HashMap<String, WeightKind>,
    options: &Options,
    observer: &mut Observer<'_>,
) -> Result<Plan, CompileError> {
    let trainable: HashSet<String> = match &options.trainable {
        Some(set) => set.clone(),
        None => kinds.iter().filter(|(_, k)| **k != WeightKind::Buffer).map(|(n, _)| n.clone()).collect(),
    };
    let budget = Budget(options.max_rewrites);
    let mut stages = Stages { options, observer, budget, n: 0, text: String::new() };
    let mut prepare = Prepare::default();
    let mut entries = vec![];
    for (kind, rows, g) in graphs {
        let name = kind.name();
        stages.show("build", name, &g)?;
        let mut g = stages.all(&SIMPLIFY, name, g)?;
        let mut shared = (0, 0);
        let transformed = match &kind {
            EntryKind::DualLoss(scheme) => {
                let probed =
                    dual::probe(&g, scheme, rows, kinds, &trainable).map_err(Stages::error("transform", name))?;
                (g, shared) = (probed.graph, probed.shared);
                true
            }
            EntryKind::Grad => {
                g = grad::grad(&g, &trainable, None).map_err(Stages::error("transform", name))?;
                true
            }
            EntryKind::Backward { accumulate } => {
                let share = accumulate.then_some(descend::SHARE);
                let kept = grad::grad(&g, &trainable, share).and_then(|g| descend::keep(&g, *accumulate));
                g = kept.map_err(Stages::error("transform", name))?;
                true
            }
            _ => false,
        };
        if transformed {
            stages.show("transform", name, &g)?;
            for pass in &SIMPLIFY {
                g = stages.run(pass, name, g)?;
            }
        }
        stages.show("simplify", name, &g)?;
        g = stages.all(&COMBINE, name, g)?;
        // Duplicates that moving weights has made.
        for pass in &SIMPLIFY[2..] {
            g = stages.run(pass, name, g)?;
        }
        if !matches!(kind, EntryKind::Update(..) | EntryKind::Mask(_) | EntryKind::Descend(_) | EntryKind::Adapt) {
            g = sweep(&prepare.hoist(&g).map_err(Stages::error("hoist", name))?);
        }
        stages.show("hoist", name, &g)?;
        let differentiated = matches!(kind, EntryKind::Grad | EntryKind::Backward { .. });
        entries.push(Prepared { name, g, shared, differentiated });
    }
    let prepare = sweep(&prepare.finish());
    if !prepare.outputs.is_empty() {
        entries.insert(0, Prepared { name: "prepare", g: prepare, shared: (0, 0), differentiated: false });
    }
    stages.stop("hoist")?;
    let mut plan = plan;
    if let Some(allowed) = options.budget {
        let empty = Assembler::new(Plan::default(), kinds, options.tuning()?);
        for (name, policy) in budget::fit(&mut entries, &empty, stages.budget, allowed)? {
            plan.options.push((format!("recompute in {name}"), policy.text()));
        }
        plan.options.push(("budget".to_owned(), allowed.to_string()));
    }
    for entry in &entries {
        stages.show("recompute", entry.name, &entry.g)?;
    }
    stages.stop("recompute")?;
    let mut assembler = Assembler::new(plan, kinds, options.tuning()?);
    for Prepared { name, g, shared, .. } in entries {
        let mut decisions = Decisions::new();
        let items = fuse(&g, &mut stages.budget, &mut decisions);
        if options.stop_after.as_deref() == Some("fuse") {
            stages.text += &format!("entry {name}\n{items:#?}\n");
            continue;
        }
        assembler.entry(name, &g, &items, decisions, shared);
    }
    stages.stop("fuse")?;
    let plan = assembler.finish();
    Ok(plan)
}

/// An entry point whose graph is done.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub name: &'static str,
    pub g: Graph,
    /// Operations that probes have in common, and all of them.
    pub shared: (u64, u64),
    /// Whether it has gradients.
    pub differentiated: bool,
}

/// Runs passes with verification, dumps, and the wish to stop.
struct Stages<'a, 'o> {
    options: &'a Options,
    observer: &'a mut Observer<'o>,
    budget: Budget,
    n: usize,
    text: String,
}

impl Stages<'_, '_> {
    fn error(stage: &'static str, entry: &str) -> impl FnOnce(InferError) -> CompileError {
        let entry = entry.to_owned();
        move |error| CompileError::Infer { entry, stage, error }
    }

    fn run(&mut self, pass: &Pass, entry: &str, g: Graph) -> Result<Graph, CompileError> {
        let g = (pass.run)(&g, &mut self.budget).map_err(Self::error(pass.name, entry))?;
        g.verify().map_err(Self::error(pass.name, entry))?;
        Ok(g)
    }

    fn all(&mut self, passes: &[Pass], entry: &str, mut g: Graph) -> Result<Graph, CompileError> {
        for pass in passes {
            g = self.run(pass, entry, g)?;
            self.show(pass.name, entry, &g)?;
        }
        Ok(g)
    }

    /// Dump a graph if asked, and keep it if compilation stops here.
    fn show(&mut self, stage: &'static str, entry: &str, g: &Graph) -> Result<(), CompileError> {
        (self.observer)(stage, entry, g);
        if let Some(dir) = &self.options.dump {
            self.n += 1;
            write_dump(dir, &format!("{:03}-{entry}-{stage}.txt", self.n), &g.to_string())?;
        }
        if self.options.stop_after.as_deref() == Some(stage) {
            self.text += &format!("entry {entry}\n{g}\n");
        }
        Ok(())
    }

    fn stop(&mut self, last: &str) -> Result<(), CompileError> {
        let position = |name: &str| STAGES.iter().position(|s| *s == name);
        match &self.options.stop_after {
            Some(stage) if position(stage) <= position(last) => {
                Err(CompileError::Stopped(std::mem::take(&mut self.text)))
            }
            _ => Ok(()),
        }
    }
}

fn write_dump(dir: &Path, name: &str, text: &str) -> Result<(), CompileError> {
    let path = dir.join(name);
    fs::create_dir_all(dir).and_then(|()| fs::write(&path, text)).map_err(|e| CompileError::Dump(path, e))
}
