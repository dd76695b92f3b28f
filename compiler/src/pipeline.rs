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
    plan::{CODES, ESTIMATOR, MASK_REFRESH, OWN, Plan, SCALES, WeightKind},
};

use crate::{
    assemble::Assembler,
    cosine,
    descend::{self, Descent},
    estimators::{
        Mask, Scheme,
        mask::{self, masked},
    },
    fuse::{Decisions, fuse},
    passes::{Budget, COMBINE, Pass, SIMPLIFY, STAGES, dual, grad, head, hoist::Prepare},
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
    /// `mask`: the choice of what a scheme probes, where it keeps one.
    Mask(Scheme),
    /// `head`: the gradient of final norm and head, for an `update` with [`Options::hybrid`].
    Head,
    /// `cosine`: inner products of the estimate of a scheme and the gradient.
    Cosine(Scheme),
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
            EntryKind::Mask(_) => "mask",
            EntryKind::Head => "head",
            EntryKind::Cosine(_) => "cosine",
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
    /// Loop depth. When absent that of the configuration: its default, and for [`EntryKind::DualLoss`], [`EntryKind::Backward`],
    /// [`EntryKind::Head`] and [`EntryKind::Cosine`] a depth for each row if training draws it.
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
            EntryKind::Loss | EntryKind::Grad | EntryKind::Head => Ok(()),
            EntryKind::Backward { accumulate } => write!(f, " accumulate={accumulate}"),
            EntryKind::Logits | EntryKind::Prefill | EntryKind::Decode => Ok(()),
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
            packed: HashSet::new(),
            stop_after: None,
            dump: None,
            max_rewrites: u64::MAX,
            tuning: None,
            threads: tuning::THREADS,
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
            EntryKind::Grad | EntryKind::Backward { .. } | EntryKind::Head | EntryKind::Cosine(_) => Some("needs"),
            EntryKind::DualLoss(_) | EntryKind::Update(..) | EntryKind::Descend(_) | EntryKind::Mask(_) => {
                Some("changes")
            }
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
        let loss = match options.objective {
            Objective::Tokens => Head::Loss,
            Objective::Preference { beta } => Head::Preference { beta },
        };
        let build = |head, form, carry| {
            let shape = shape(cfg, spec, form, carry);
            chimera::packed_graph(cfg, shape, head, &options.packed).map_err(fail("build"))
        };
        // The states of a loss are not those of generating, and every entry point has rows of its own.
        let build_loss = || {
            let mut g = build(loss, Form::Chunked, options.carried)?;
            g.rename_states(&|state| format!("{name}{OWN}{state}"));
            Ok(g)
        };
        let g = match &spec.kind {
            EntryKind::Loss | EntryKind::DualLoss(_) | EntryKind::Head => build_loss()?,
            EntryKind::Grad | EntryKind::Backward { .. } => {
                let half = cfg.looping.as_ref().is_some_and(|l| l.backward_half);
                grad::unroll(&build_loss()?, half).map_err(fail("build"))?
            }
            EntryKind::Cosine(scheme) => {
                let (members, targets) = (scheme.members(spec.rows), targets(cfg, options));
                let unrolled = grad::unroll(&build_loss()?, false).map_err(fail("build"))?;
                cosine::estimates(&unrolled, scheme, members, &targets, &quantised(cfg)).map_err(fail("build"))?
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
            EntryKind::Descend(descent) => descend::graph(descent, &targets(cfg, options)).map_err(fail("build"))?,
        };
        graphs.push((spec.kind.clone(), spec.rows, g));
    }
    let mut plan = Plan { config: cfg.to_json().to_string(), target: options.target.clone(), ..Plan::default() };
    if let Objective::Preference { beta } = options.objective {
        plan.options.push(("objective".to_owned(), format!("preference beta={beta}")));
    }
    if options.hybrid {
        plan.options.push(("hybrid".to_owned(), head::HEAD.join(" ")));
    }
    for spec in &options.entries {
        plan.options.push((spec.kind.name().to_owned(), spec.to_string()));
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
        (Some(l), EntryKind::DualLoss(_) | EntryKind::Backward { .. } | EntryKind::Head | EntryKind::Cosine(_))
            if l.stochastic =>
        {
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
        .map(|p| {
            let exact = options.hybrid && head::HEAD.contains(&p.name.as_str());
            Target { name: p.name, dims: p.dims, kind: kind(p.kind), exact }
        })
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
    let probed = if options.hybrid { head::below(&trainable) } else { trainable.clone() };
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
                let dual = dual::probe(&g, scheme, rows, kinds, &probed).map_err(Stages::error("transform", name))?;
                (g, shared) = (dual.graph, dual.shared);
                true
            }
            EntryKind::Grad => {
                g = grad::grad(&g, &trainable, None).map_err(Stages::error("transform", name))?;
                true
            }
            EntryKind::Cosine(_) => {
                let compared = grad::grad(&g, &probed, None).and_then(|g| cosine::compared(&g));
                g = compared.map_err(Stages::error("transform", name))?;
                true
            }
            EntryKind::Head => {
                g = head::graph(&g, &trainable).map_err(Stages::error("transform", name))?;
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
        if !matches!(kind, EntryKind::Update(..) | EntryKind::Mask(_) | EntryKind::Descend(_)) {
            g = sweep(&prepare.hoist(&g).map_err(Stages::error("hoist", name))?);
        }
        stages.show("hoist", name, &g)?;
        entries.push((name, g, shared));
    }
    let prepare = sweep(&prepare.finish());
    if !prepare.outputs.is_empty() {
        entries.insert(0, ("prepare", prepare, (0, 0)));
    }
    stages.stop("hoist")?;
    let mut assembler = Assembler::new(plan, kinds, options.tuning()?);
    for (name, g, shared) in entries {
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
