//! The stages of compilation, in order.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::Path,
};

use chimera_frontends::{
    config::{ModelConfig, ParamKind, WeightScale, parameters},
    layers::{Depth, Form, Shape},
    models::chimera::{self, Head, Part},
};
use chimera_ir::{
    Graph,
    ops::{InferError, ScaleMode},
    plan::{AGREEMENT, CODES, ESTIMATOR, MASK_REFRESH, OWN, Plan, SCALES, WeightKind},
};

use crate::{
    CompileError, EntryKind, EntrySpec, Objective, Options,
    assemble::Assembler,
    budget, cosine, descend,
    estimators::{
        Mask, Scheme,
        mask::{self, masked},
    },
    fuse::{Decisions, fuse},
    passes::{Budget, COMBINE, Pass, SIMPLIFY, STAGES, dual, grad, head, hoist::Prepare},
    quantiser,
    rebuild::sweep,
    update::{self, Quantised, Target},
};

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
    if let Some(layer) = options.cut.filter(|&layer| chimera::cut(cfg, layer) != layer || layer == 0) {
        return Err(CompileError::Option(format!(
            "a cut in front of layer {layer} lies inside the loop or behind nothing; cut in front of layer {}",
            chimera::cut(cfg, layer).max(1)
        )));
    }
    if options.cut.is_some() && (options.carried || options.objective != Objective::Tokens) {
        return Err(CompileError::Option(
            "a cut is for losses of text that carry no states; leave the cut out, or the objective and the states"
                .into(),
        ));
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
            EntryKind::DualLoss(_)
            | EntryKind::Update(..)
            | EntryKind::Descend(_)
            | EntryKind::Mask(_)
            | EntryKind::Adapt => Some("changes"),
            EntryKind::Loss | EntryKind::Logits | EntryKind::Prefill | EntryKind::Decode | EntryKind::Prefix => None,
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
        // The states of a loss are not those of generating, and every entry point has rows of its own.
        let build_loss = || {
            let mut g = build(loss, Form::Chunked, options.carried)?;
            g.rename_states(&|state| format!("{name}{OWN}{state}"));
            Ok(g)
        };
        let part = |part| {
            let shape = shape(cfg, spec, Form::Chunked, false);
            chimera::part_graph(cfg, shape, Head::Loss, part).map_err(fail("build"))
        };
        let rest = || match options.cut {
            None => build_loss(),
            Some(layer) => part(Part::From(layer)),
        };
        let unrolled = |g: &Graph| {
            let half = cfg.looping.as_ref().is_some_and(|l| l.backward_half);
            grad::unroll(g, half).map_err(fail("build"))
        };
        let g = match &spec.kind {
            EntryKind::Loss | EntryKind::Head => build_loss()?,
            EntryKind::DualLoss(_) => rest()?,
            EntryKind::Prefix => match options.cut {
                Some(layer) => part(Part::To(layer))?,
                None => return Err(CompileError::Option(format!("entry point {name} needs a cut"))),
            },
            EntryKind::Grad => unrolled(&build_loss()?)?,
            EntryKind::Backward { .. } => unrolled(&rest()?)?,
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
    if let Objective::Preference { beta } = options.objective {
        plan.options.push(("objective".to_owned(), format!("preference beta={beta}")));
    }
    if let Some(d) = &cfg.quantization.dynamic {
        let strict = u8::from(d.strict);
        let numbers = format!(
            "{} {strict} {} {} {} {} {}",
            d.ema, d.alpha_min, d.alpha_target, d.warmup, d.target_bits, d.control_steps
        );
        plan.options.push(("quantiser".to_owned(), numbers));
    }
    if options.hybrid {
        plan.options.push(("hybrid".to_owned(), head::HEAD.join(" ")));
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
        (
            Some(l),
            EntryKind::DualLoss(_)
            | EntryKind::Backward { .. }
            | EntryKind::Prefix
            | EntryKind::Head
            | EntryKind::Cosine(_),
        ) if l.stochastic => Depth::PerRow { max: l.range[1], adaptive: false },
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
    // Selection biases are moved by loads, never along an estimate.
    let estimated = |name: &String| kinds.get(name) != Some(&WeightKind::Buffer);
    let trainable: HashSet<String> = match &options.trainable {
        Some(set) => set.iter().filter(|n| estimated(n)).cloned().collect(),
        None => kinds.keys().filter(|n| estimated(n)).cloned().collect(),
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
