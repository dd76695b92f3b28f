//! `chimera-run train`: a model, text files, a budget; checkpoints, journal and metrics in a folder.
//!
//! Invariant: the same options, data and seed give the same checkpoint, however often the run was interrupted and resumed, unless
//! seconds bound it.

use crate::benchmark;
use crate::data::{DataArgs, Encoding};
use crate::fused;
use crate::hyper::{Hyper, HyperArgs};
use crate::memory::Prediction;
use crate::model::{Model, Source, other_vocab, spec_of_size};
use crate::options::{Failure, ModelOptions, RunOptions as ExecArgs};
use crate::paradigms::{self, ParadigmArgs};
use crate::phases::{self, Course, Length, Phase, PhaseArgs, Start, reference, same_architecture};
use crate::resume::{found, model_of, resumed, resuming, same_run};
use crate::session::{Interrupt, Planner, cosine_entry, stage_plan, training_entries};
use crate::watch::{Records, Reporter, WatchArgs, time};
use crate::weights;
use chimera_compiler::EntrySpec;
use chimera_ir::plan::Plan;
use chimera_runtime::text::{self, Cache, Reading, TokenSource, Vocab, VocabSpec};
use chimera_runtime::train::checkpoint::{self, Meta};
use chimera_runtime::train::journal::{Header, Journal};
use chimera_runtime::train::paradigms::{Stage, Stages};
use chimera_runtime::train::standing::Standing;
use chimera_runtime::train::{Budget, Measure, Outcome, Progress, Run, RunOptions, Schedule, Trainer, Writing, init};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Steps of a run that nothing else bounds.
const DEFAULT_STEPS: u64 = 1000;

const EXAMPLES: &str = "Examples:
  chimera-run train examples/configs/nano.json --vocab bytes --data my.txt --steps 500 --out runs/first
  chimera-run train examples/configs/nano.json --vocab o200k:restricted --data corpus/ chats.jsonl.zst=2
  chimera-run train --resume runs/first
  chimera-run train --resume runs/first/step-00000200.b158 --out runs/branch
  chimera-run train --scale pico --data my.txt --out runs/second --sample-every 100 --tensorboard
  chimera-run train model.json --phase sft --from runs/first --data chats.jsonl --out runs/sft
  chimera-run train model.json --phase dpo --from runs/sft --data preferences.jsonl --out runs/dpo";

/// Options of `train`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub data: DataArgs,
    /// Steps in all [default: 1000]
    #[arg(long, env = "CHIMERA_STEPS")]
    pub steps: Option<u64>,
    /// Seconds in all; the learning rate decays over them
    #[arg(long, env = "CHIMERA_SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: Option<u64>,
    #[command(flatten)]
    pub hyper: HyperArgs,
    #[command(flatten)]
    pub phase: PhaseArgs,
    #[command(flatten)]
    pub paradigms: ParadigmArgs,
    /// Measure on held-out data every so many steps, or seconds with an s (30s), a tenth of the time at most; 0 never does
    #[arg(long, default_value = "100", env = "CHIMERA_VAL_EVERY", value_name = "STEPS|SECONDSs")]
    pub val_every: Measure,
    /// Most held-out tokens to measure on
    #[arg(long, default_value_t = 32768, env = "CHIMERA_VAL_TOKENS", value_name = "N")]
    pub val_tokens: u64,
    /// Write a checkpoint every so many steps; 0 writes one every ten minutes. The journal leads to every step in between
    #[arg(long, default_value_t = 0, env = "CHIMERA_SAVE_EVERY", value_name = "N")]
    pub save_every: u64,
    /// Checkpoints to keep, that of the beginning apart
    #[arg(long, default_value_t = 2, env = "CHIMERA_KEEP", value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub keep: u16,
    /// Folder of the run
    #[arg(long, env = "CHIMERA_OUT", value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Go on where --out was left if there is a run, or with the run of a folder, or from a checkpoint
    #[arg(long, num_args = 0..=1, default_missing_value = "auto", value_name = "auto|PATH", env = "CHIMERA_RESUME")]
    pub resume: Option<PathBuf>,
    #[command(flatten)]
    pub watch: WatchArgs,
    #[command(flatten)]
    pub exec: ExecArgs,
    /// Train without paradigms and with each of them, --seconds each [default: 60], and print what each of them is worth
    #[arg(long, env = "CHIMERA_BENCHMARK")]
    pub benchmark: bool,
    /// Turns in which the time of each run is spent, so that a machine which others use too is fast and slow for all of them (--benchmark)
    /// [default: 1]
    #[arg(long, requires = "benchmark", env = "CHIMERA_TURNS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub turns: Option<u16>,
    /// Print one line of JSON for each step on stdout
    #[arg(long, env = "CHIMERA_JSON")]
    pub json: bool,
    /// Show no progress
    #[arg(short, long, env = "CHIMERA_QUIET")]
    pub quiet: bool,
}

/// The folder of a run that was given none.
pub const DEFAULT_OUT: &str = "chimera-run";

/// Runs the command.
///
/// # Errors
/// See the exit codes of [`Failure`].
pub fn run(args: &Args) -> Result<(), Failure> {
    if args.benchmark {
        return benchmark::run(args);
    }
    let (_, path) = train(args, &Interrupt::register()?)?;
    if !args.json {
        writeln!(std::io::stdout().lock(), "{}", path.display())?;
    }
    Ok(())
}

/// Trains until the end or the first interrupt, and says which it was and what the last checkpoint is.
///
/// # Errors
/// See the exit codes of [`Failure`].
pub fn train(args: &Args, interrupt: &Interrupt) -> Result<(Outcome, PathBuf), Failure> {
    let (saved, folder) = resumed(args)?;
    let given = args.paradigms.shape(&args.hyper, args.steps.or(args.seconds.is_none().then_some(DEFAULT_STEPS)))?;
    let (mut hyper, length) = match &saved {
        Some(standing) => (args.paradigms.resumed(given, &standing.meta.options)?, Length::default()),
        None => phases::fresh(args, &given)?,
    };
    if saved.is_some() {
        args.phase.resumed(&hyper)?;
    }
    set_budget(&mut hyper, args, saved.is_some());
    args.data.overlay(&mut hyper);
    let start = Start::open(&args.phase)?;
    let model_options = match &saved {
        Some(standing) if args.model.path().is_none() => model_of(standing, &hyper, &args.model),
        _ => args.model.clone(),
    };
    let reporter = Reporter::new(None, args.json, args.quiet);
    let fixed = match (&saved, &start) {
        (Some(standing), _) => Some(Vocab::from_text(&standing.meta.vocab)?),
        (None, start) => start.as_ref().and_then(|s| s.vocab.clone()),
    };
    let (model, vocab, tokens) = model_and_tokens(&model_options, &hyper, args, fixed)?;
    model.warnings.iter().for_each(|w| reporter.say(&format!("warning: {w}")));
    refuse_packed(&model)?;
    if let Some(start) = &start {
        same_architecture(start, &model)?;
    }
    if saved.is_none() {
        if args.paradigms.any() && hyper.phase != Phase::Pretrain {
            return Err(Failure::usage(
                "paradigms are for training on text; leave them out, or choose --phase pretrain",
            ));
        }
        let left = paradigms::choose(&args.paradigms, &mut hyper, &model)?;
        left.iter().for_each(|line| reporter.say(line));
    }
    let stage = saved.as_ref().map_or(Stage::default(), |s| s.meta.progress.stage);
    let plan = plan_of(&model, &mut hyper, stage, args)?;
    if hyper.paradigms.fused_cache {
        reporter.say(&fused::shared_codes(&plan)?);
    }
    let mut course = Course::of(&hyper, &vocab, &tokens)?;
    if let (None, None, None, Some(steps)) = (&saved, args.steps, args.seconds, length.steps(&course, &hyper)) {
        hyper.steps = Some(steps);
        if args.hyper.warmup.is_none() {
            hyper.warmup = hyper.warmup.min(steps / 10);
        }
    }
    let stages = hyper.paradigms.stages(&hyper, &model.config);
    if args.exec.trace.trace.is_some() && stages != Stages::default() {
        return Err(Failure::usage(
            "--trace is about one plan, and the run has one for each stage; leave --growlength and --progressive-unfreeze out",
        ));
    }
    if let Some(standing) = &saved {
        same_run(standing, &plan, &course.data())?;
    }
    let writing = args.watch.writing(&vocab)?;
    let planner = Planner {
        config: model.config.clone(),
        hyper: hyper.clone(),
        further: further(&model, &hyper, args)?,
        run: args.exec.clone(),
    };
    let predicted = Prediction::of(&plan, &args.exec);
    let mut trainer = planner.trainer_of(plan)?;
    let mut meta = Meta {
        config: trainer.exec().plan().config.clone(),
        vocab: vocab.to_text(),
        options: String::new(),
        data: course.data(),
        progress: Progress::default(),
    };
    args.exec.trace.start(trainer.exec_mut());
    trainer = trainer.in_stages(Box::new(planner), stage);
    // The folder is taken before it is filled: a second process finds it locked.
    let journal = Some(match &saved {
        Some(standing) => standing.continue_in(&folder)?,
        None => Journal::create(&folder, &Header::new(0, &meta.config, &meta.data))?,
    });
    if let Some(standing) = &saved {
        let beside = standing.file.path().parent().unwrap_or(Path::new(".")).to_path_buf();
        reference::Place { hyper: &hyper, folder: &beside }.resume(&mut course, &mut trainer)?;
    }
    let loaded = match (&saved, &start, &model.source) {
        (Some(standing), ..) => Some((&standing.file, standing.restore(&mut trainer, Some(course.feed()))?)),
        (None, Some(Start { file, .. }), _) | (None, None, Source::Weights(file)) => {
            Some((file, file.assign(trainer.exec_mut(), false)?))
        }
        (None, None, _) => {
            init::initialise(trainer.exec_mut(), hyper.seed)?;
            if hyper.phase != Phase::Pretrain {
                reporter.say(
                    "warning: this phase starts from random weights; name those that it is to go on with by --from",
                );
            }
            for (name, dims, values) in hyper.paradigms.reservoir(&model.config, hyper.seed) {
                trainer.exec_mut().set_weight(&name, &dims, &values)?;
            }
            None
        }
    };
    if saved.is_none() {
        let place = reference::Place { hyper: &hyper, folder: &folder };
        if let Some((sum, line)) = place.begin(&mut course, &mut trainer)? {
            reporter.say(&line);
            hyper.phase.refer_to(sum);
        }
    }
    meta.options = serde_json::to_string(&hyper).map_err(|e| Failure::new(e.to_string()))?;
    if let Some((file, unused)) = loaded {
        weights::report_unused(file, &model.config, &unused).iter().for_each(|line| reporter.say(line));
    }
    let progress = saved.as_ref().map_or(Progress::default(), Standing::progress);
    let records = Records::open(&folder, progress.step, args.watch.tensorboard)?;
    let mut reporter = Reporter::new(Some(records), args.json, args.quiet);
    let line = introduction(&model, &vocab, &course, &trainer, &hyper);
    reporter.note("start", progress.step, &line, summary(&trainer, &hyper, &vocab, &predicted))?;
    if let Some(standing) = &saved {
        let lines = found(standing).into_iter().chain([("resume", resuming(standing))]);
        lines.into_iter().try_for_each(|(kind, line)| reporter.note(kind, progress.step, &line, Value::Null))?;
    }
    let options = run_options(args, &hyper, stages, folder, writing)?;
    let mut run = Run {
        trainer: &mut trainer,
        batches: course.feed(),
        validation: course.held(),
        vocab: &vocab,
        progress,
        meta,
        journal,
    };
    let outcome = run.train(&options, &|| interrupt.requested(), &mut |event| reporter.hear(event));
    reporter.finish();
    let progress = run.progress;
    if let Some((found, all)) = trainer.found() {
        let line = format!("{found} of {all} rows of frozen layers were found in memory");
        reporter.note("prefix", progress.step, &line, json!({ "found": found, "rows": all }))?;
    }
    args.exec.trace.finish(trainer.exec_mut())?;
    if let Err(e) = &outcome {
        // A full disk takes no more lines; what ended the run is said in any case.
        drop(reporter.note("failure", progress.step, "the run ended by an error", json!({ "error": e.to_string() })));
    }
    let outcome = outcome?;
    predicted.compare(progress.step, &mut reporter)?;
    conclude(&options, outcome, &progress, &mut reporter)
}

/// A budget on the command line replaces that of the checkpoint.
fn set_budget(hyper: &mut Hyper, args: &Args, resumed: bool) {
    if args.steps.is_some() || args.seconds.is_some() {
        (hyper.steps, hyper.seconds) = (args.steps, args.seconds.map(|s| s as f64));
    } else if !resumed {
        hyper.steps = Some(DEFAULT_STEPS);
    }
}

/// The model, its vocabulary and the data in tokens of it.
fn model_and_tokens(
    options: &ModelOptions,
    hyper: &Hyper,
    args: &Args,
    saved: Option<Vocab>,
) -> Result<(Model, Vocab, Vec<TokenSource>), Failure> {
    let mut model = Model::open(options, None)?;
    let is_text = hyper.phase.reads_text();
    let reading = Reading { field: hyper.field.clone(), binary: hyper.binary };
    let (cache, encoding): (Cache, Encoding) = (args.data.cache(), Encoding::new(args.quiet));
    let named = options.vocab()?;
    let fixed = match (&model.source, saved) {
        (_, Some(vocab)) => Some(vocab),
        (Source::Weights(..), None) => Some(model.vocab(named.as_ref())?),
        _ => None,
    };
    if let Some(vocab) = fixed {
        match &named {
            Some(VocabSpec::File(path)) => {
                let other = Vocab::load(path)?;
                if other != vocab {
                    return Err(other_vocab(path, &other));
                }
            }
            Some(spec) if name_of(spec) != vocab.name() => {
                return Err(Failure::config(format!(
                    "the weights were made with the vocabulary {}; leave --vocab out",
                    vocab.name()
                )));
            }
            _ => {}
        }
        options.check_vocab(&vocab)?;
        if matches!(model.source, Source::Config) && vocab.size() != model.config.vocab_size {
            model = Model::open(options, Some(vocab.size()))?;
        }
        model.check(&vocab)?;
        if !is_text {
            return Ok((model, vocab, vec![]));
        }
        let tokens = text::tokenise(&vocab, &hyper.data, &reading, &cache, &mut encoding.hear())?;
        encoding.finish(&vocab, &tokens);
        return Ok((model, vocab, tokens));
    }
    let spec = match named {
        Some(spec) => spec,
        None if options.scale.is_some() && matches!(model.source, Source::Config) => VocabSpec::Bytes,
        None => spec_of_size(model.config.vocab_size).ok_or_else(|| {
            let n = model.config.vocab_size;
            Failure::usage(format!(
                "which vocabulary of {n} tokens is not known; give --vocab bytes, o200k, o200k:restricted or a file"
            ))
        })?,
    };
    if !is_text {
        let vocab = phases::vocab_of(&spec, &hyper.phase)?;
        model = Model::open(options, Some(vocab.size()))?;
        return Ok((model, vocab, vec![]));
    }
    let (vocab, tokens) = text::prepare(&spec, &hyper.data, &reading, &cache, &mut encoding.hear())?;
    encoding.finish(&vocab, &tokens);
    options.check_vocab(&vocab)?;
    if vocab.size() != model.config.vocab_size {
        // A configuration takes the size of the vocabulary; a plan cannot.
        model = Model::open(options, Some(vocab.size()))?;
    }
    Ok((model, vocab, tokens))
}

fn name_of(spec: &VocabSpec) -> &'static str {
    match spec {
        VocabSpec::Bytes => "bytes",
        VocabSpec::O200k => "o200k",
        VocabSpec::Restricted => "o200k:restricted",
        VocabSpec::File(_) => "",
    }
}

/// Training changes latents, which packed weights have lost.
fn refuse_packed(model: &Model) -> Result<(), Failure> {
    match &model.source {
        Source::Weights(file) if !file.packed().is_empty() => Err(Failure::usage(format!(
            "{}: packed ternary weights cannot be trained, they have lost their latents; name the checkpoint that they were packed from",
            file.path().display()
        ))),
        _ => Ok(()),
    }
}

/// The plan of the run; a plan that was named decides shape and estimator.
fn plan_of(model: &Model, hyper: &mut Hyper, stage: Stage, args: &Args) -> Result<Plan, Failure> {
    if let (Source::Plan(_), Some(path)) = (&model.source, args.model.path()) {
        hyper.plan = Some(std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()));
    }
    plan_with(model, hyper, &args.hyper, stage, further(model, hyper, args)?, &args.exec)
}
/// Entry points that do not train.
fn further(model: &Model, hyper: &Hyper, args: &Args) -> Result<Vec<EntrySpec>, Failure> {
    let mut further = args.watch.entries();
    if args.watch.gradient_cosine > 0 {
        further.push(cosine_entry(&model.config, hyper)?);
    }
    Ok(further)
}

pub fn plan_with(
    model: &Model,
    hyper: &mut Hyper,
    given: &HyperArgs,
    stage: Stage,
    further: Vec<EntrySpec>,
    run: &ExecArgs,
) -> Result<Plan, Failure> {
    let Source::Plan(plan) = &model.source else {
        return stage_plan(&model.config, hyper, stage, further, run);
    };
    let first = plan.entry("dual_loss").or(plan.entry("backward"));
    let port = first.and_then(|e| e.inputs.iter().find(|p| p.0 == "tokens"));
    if let Some(&[rows, tokens]) = port.map(|p| &plan.buffer(p.1).ty.dims[..]) {
        *hyper = hyper.clone().shaped(rows, tokens, given)?;
    }
    let entries = [training_entries(&model.config, hyper), further].concat();
    model.plan(entries, HashSet::new(), run)
}

fn introduction(model: &Model, vocab: &Vocab, course: &Course, trainer: &Trainer, hyper: &Hyper) -> String {
    let parameters = chimera_frontends::config::parameter_count(&model.config);
    format!(
        "{parameters} parameters, vocabulary {} ({}); {}; batch {} x {}, {} threads, {} MB",
        vocab.name(),
        vocab.size(),
        course.describe(vocab),
        hyper.batch,
        hyper.seq_len,
        trainer.exec().threads(),
        trainer.bytes() >> 20,
    )
}

/// What the report of a run says of its plan.
fn summary(trainer: &Trainer, hyper: &Hyper, vocab: &Vocab, predicted: &Prediction) -> Value {
    let (exec, plan) = (trainer.exec(), trainer.exec().plan());
    let entries: Vec<String> = plan.entries.iter().map(|e| format!("{} {}", e.name, e.steps.len())).collect();
    let weights: usize = plan.weights.iter().map(|w| w.ty.bytes()).sum();
    let shared = plan.entry("dual_loss").filter(|e| e.shared.1 > 0).map(|e| e.shared.0 as f64 / e.shared.1 as f64);
    json!({
        "plan": {
            "vocabulary": format!("{} ({})", vocab.name(), vocab.size()),
            "batch": hyper.batch,
            "tokens of a row": hyper.seq_len,
            "forward tokens a step": trainer.forward_tokens(),
            "share of work that all probes have in common": shared,
            "threads": exec.threads(),
            "tensors": plan.weights.len(),
            "bytes of weights and optimizer memory": weights,
            "bytes allocated": exec.bytes(),
            "predicted peak of memory in bytes": predicted.total(),
            "of it outside of the plan": predicted.outside,
            "made again for gradients": plan.option("recompute in backward"),
            "kernels": plan.kernels.len(),
            "entry points and their steps": entries.join(", "),
        },
        "options": hyper,
    })
}

fn run_options(
    args: &Args,
    hyper: &Hyper,
    stages: Stages,
    folder: PathBuf,
    writing: Option<Writing>,
) -> Result<RunOptions, Failure> {
    let decay = hyper.lr_decay.parse().map_err(Failure::corrupted)?;
    Ok(RunOptions {
        budget: Budget { steps: hyper.steps, seconds: hyper.seconds },
        schedule: Schedule { peak: hyper.lr, warmup: hyper.warmup, decay, floor: hyper.lr_floor },
        stages,
        measure: args.val_every,
        validation_rows: usize::try_from(args.val_tokens / u64::from(hyper.seq_len)).unwrap_or(usize::MAX).max(1),
        save_every: args.save_every,
        keep: usize::from(args.keep),
        explosion: args.watch.explosion,
        inspection: args.watch.inspection(),
        writing,
        folder: Some(folder),
    })
}

/// How the run ended, and its last checkpoint.
fn conclude(
    options: &RunOptions,
    outcome: Outcome,
    progress: &Progress,
    reporter: &mut Reporter,
) -> Result<(Outcome, PathBuf), Failure> {
    let folder = options.folder.as_deref().unwrap_or(Path::new("."));
    let path = checkpoint::path_of(folder, progress.step);
    let (step, time) = (progress.step, time(progress.seconds));
    let (kind, line) = match outcome {
        Outcome::Finished => ("finish", format!("finished {step} steps in {time}")),
        Outcome::Stopped => (
            "stop",
            format!(
                "stopped behind step {step} after {time}; go on with: chimera-run train --resume {}",
                folder.display()
            ),
        ),
    };
    reporter.note(kind, step, &line, Value::Null)?;
    Ok((outcome, path))
}
