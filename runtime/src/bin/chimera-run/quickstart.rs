//! `chimera-run quickstart`: without any file of the user's, find the better estimator for a small model on the embedded corpus, train,
//! save, load, and let it write.
//!
//! Invariant: every number that is shown was measured in this run, on text that was not trained on where it says held out.

use crate::estimators::EstimatorName;
use crate::hyper::{Hyper, HyperArgs};
use crate::model::compile_entries;
use crate::options::{Failure, RunOptions as ExecArgs};
use crate::session::{Interrupt, depths, training_plan};
use crate::watch::{Records, Reporter};
use crate::weights;
use chimera_compiler::{EntryKind, EntrySpec};
use chimera_frontends::config::{self, ModelConfig, Overrides, Scale};
use chimera_runtime::exec::Executable;
use chimera_runtime::generate::{Generator, Settings};
use chimera_runtime::text::{
    self, Batches, LossTally, Sampling, StreamDecoder, TokenSource, TokenStream, Vocab, corpus,
};
use chimera_runtime::train::checkpoint::{self, Meta};
use chimera_runtime::train::journal::{Header, Journal};
use chimera_runtime::train::paradigms::Stages;
use chimera_runtime::train::weights::WeightFile;
use chimera_runtime::train::{
    Budget, Decay, Event, Inspection, Measure, Outcome, Progress, Run, RunOptions, Schedule, TrainError, Trainer, init,
};
use std::collections::HashSet;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// The name of the folder where nobody asks for another.
const DEFAULT_OUT: &str = "chimera-quickstart";
/// When the run measures.
const MEASURE: Measure = Measure::Every(250);
/// Tokens of held-out text in a measurement.
const VALIDATION_TOKENS: usize = 8192;
/// Nats by which the loss may rise before the run goes back.
const EXPLOSION: f64 = 2.0;
/// Tokens that a prompt takes at a time.
const CHUNK: usize = 16;
/// Most bytes of the sample.
const SAMPLE: usize = 400;
/// What the sample continues.
const PROMPT: &str = "/// The ";

/// What the data are called in checkpoints.
const DATA: &str = "the embedded corpus";
/// The estimators that are tried where nobody asks for one, and the share of the time that each of them gets.
const RIVALS: [EstimatorName; 2] = [EstimatorName::PerseqLowrank, EstimatorName::Adamw];
const TRIAL: f64 = 0.125;
/// Wider initial weights than the family's where losses are compared: steps are relative to the size of weights, and two minutes are too short to grow them.
const INITIALIZER: &str = "initializer_range=0.05";

/// Options of `quickstart`.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Seconds of training
    #[arg(long, default_value_t = 120, env = "CHIMERA_SECONDS", value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub seconds: u64,
    /// Folder of the run [default: chimera-quickstart, or the next free name]
    #[arg(long, env = "CHIMERA_OUT", value_name = "DIR")]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub hyper: HyperArgs,
    #[command(flatten)]
    pub exec: ExecArgs,
}

/// Runs the command.
///
/// # Errors
/// See the exit codes of [`Failure`].
pub fn run(args: Args) -> Result<(), Failure> {
    let interrupt = Interrupt::register()?;
    let folder = free_folder(args.out.as_deref())?;
    let vocab = Vocab::bytes();
    let reporter = Reporter::new(None, false, false);
    let (estimator, seconds) = match args.hyper.estimator {
        Some(given) => (given, args.seconds as f64),
        None => match compare(&args, &vocab, &interrupt, &reporter)? {
            Some(better) => better,
            None => return Ok(()),
        },
    };
    let hyper = hyper(&args, estimator, seconds)?;
    let mut start = Start::new(&args, &hyper, &vocab)?;
    let entropy = text::unigram_bits_per_byte(&vocab, start.batches.tokens()).unwrap_or(f64::NAN);
    reporter.say(&format!(
        "a byte-level model of {} parameters, trained on {} KB of this project's own text for {seconds:.0} s {}",
        config::parameter_count(&start.model),
        start.batches.len() / 1000,
        match estimator.row().gradients {
            true => "along the gradient",
            false => "by comparing losses, without back-propagation",
        },
    ));
    reporter.say(&format!("the text has a unigram entropy of {entropy:.3} bits/byte; a uniform guess needs 8.0"));
    args.exec.trace.start(start.trainer.exec_mut());
    let before = start.measure(&vocab)?;
    let config = start.trainer.exec().plan().config.clone();
    let journal = Journal::create(&folder, &Header::new(0, &config, DATA))?;
    let mut reporter = Reporter::new(Some(Records::open(&folder, 0, false)?), false, false);
    let trained = start.train(&hyper, &vocab, Some((&folder, journal)), &interrupt, &mut |event| reporter.hear(event));
    reporter.finish();
    let (outcome, progress) = trained?;
    let after = start.measure(&vocab)?;
    let Start { mut trainer, model, .. } = start;
    let forwards = progress.step * trainer.forward_tokens();
    args.exec.trace.finish(trainer.exec_mut())?;
    drop(trainer);
    let path = checkpoint::path_of(&folder, progress.step);
    reporter.say(&reached(&before, &after, entropy, &progress, forwards));
    if outcome == Outcome::Stopped {
        return finish(&path);
    }
    reporter.say(&format!("loaded {}; it continues {PROMPT:?}:", path.display()));
    sample(&model, &vocab, &path, &args.exec)?;
    reporter.say(&next_steps(&folder));
    Ok(())
}

/// A model with fresh weights and its data.
struct Start {
    model: ModelConfig,
    batches: Batches,
    validation: TokenStream,
    trainer: Trainer,
    /// Rows of a measurement.
    rows: usize,
}

impl Start {
    fn new(args: &Args, hyper: &Hyper, vocab: &Vocab) -> Result<Start, Failure> {
        let wide = (!hyper.estimator.row().gradients).then(|| INITIALIZER.to_owned());
        let overrides =
            Overrides { vocab_size: Some(vocab.size()), sets: wide.into_iter().collect(), ..Overrides::default() };
        let model = config::preset(Scale::Pico, &overrides)?.model;
        let (batches, validation) = data(vocab, hyper)?;
        let mut exec = Executable::new(training_plan(&model, hyper, vec![], &args.exec)?, &args.exec.exec())?;
        init::initialise(&mut exec, hyper.seed)?;
        if let Some(path) = &hyper.fisher {
            weights::read_scores(path, &mut exec)?;
        }
        let trainer = Trainer::new(exec, hyper.seed)?.with_depths(depths(&model)).in_parts(hyper.accumulate as usize);
        let rows = (VALIDATION_TOKENS / hyper.seq_len as usize).max(1);
        Ok(Start { model, batches, validation, trainer, rows })
    }

    fn measure(&mut self, vocab: &Vocab) -> Result<LossTally, Failure> {
        Ok(self.trainer.measure(&self.validation, self.rows, vocab)?)
    }

    /// Trains as long as `hyper` says; in memory alone where there is no folder.
    fn train(
        &mut self,
        hyper: &Hyper,
        vocab: &Vocab,
        disk: Option<(&Path, Journal)>,
        interrupt: &Interrupt,
        hear: &mut dyn FnMut(Event<'_>) -> Result<(), TrainError>,
    ) -> Result<(Outcome, Progress), Failure> {
        let meta = Meta {
            config: self.trainer.exec().plan().config.clone(),
            vocab: vocab.to_text(),
            options: serde_json::to_string(hyper).map_err(|e| Failure::new(e.to_string()))?,
            data: DATA.into(),
            progress: Progress::default(),
        };
        let (folder, journal) = match disk {
            Some((folder, journal)) => (Some(folder.to_path_buf()), Some(journal)),
            None => (None, None),
        };
        let options = run_options(hyper, self.rows, folder);
        let mut run = Run {
            trainer: &mut self.trainer,
            batches: &self.batches,
            validation: &self.validation,
            vocab,
            progress: Progress::default(),
            meta,
            journal,
        };
        let outcome = run.train(&options, &|| interrupt.requested(), hear)?;
        Ok((outcome, run.progress))
    }
}

/// Trains by each of [`RIVALS`] for a share of the time from the same text, and says which one was better and how many seconds are
/// left; nothing when it was interrupted.
fn compare(
    args: &Args,
    vocab: &Vocab,
    interrupt: &Interrupt,
    reporter: &Reporter,
) -> Result<Option<(EstimatorName, f64)>, Failure> {
    let seconds = args.seconds as f64 * TRIAL;
    let mut best: Option<(EstimatorName, f64)> = None;
    for estimator in RIVALS {
        let hyper = hyper(args, estimator, seconds)?;
        let mut start = Start::new(args, &hyper, vocab)?;
        let (outcome, progress) = start.train(&hyper, vocab, None, interrupt, &mut |_| Ok(()))?;
        if outcome == Outcome::Stopped {
            return Ok(None);
        }
        let bits = start.measure(vocab)?.bits_per_byte().unwrap_or(f64::INFINITY);
        reporter.say(&format!(
            "trial of {}: {bits:.3} bits/byte held out behind {} steps and {} K tokens of text in {:.0} s",
            estimator.text(),
            progress.step,
            progress.position / 1000,
            progress.seconds
        ));
        if best.is_none_or(|(_, least)| bits < least) {
            best = Some((estimator, bits));
        }
    }
    let left = args.seconds as f64 - seconds * RIVALS.len() as f64;
    Ok(best.map(|(estimator, _)| (estimator, left)))
}

/// The options of a run: what the time is best spent on, unless given.
///
/// # Errors
/// An option that the estimator does not have.
fn hyper(args: &Args, estimator: EstimatorName, seconds: f64) -> Result<Hyper, Failure> {
    let given = &args.hyper;
    let tuned = match estimator.row().gradients {
        true => HyperArgs {
            estimator: Some(estimator),
            lr_floor: given.lr_floor.or(Some(0.03)),
            val_fraction: given.val_fraction.or(Some(0.05)),
            ..given.clone()
        },
        false => HyperArgs {
            estimator: Some(estimator),
            seq_len: given.seq_len.or(Some(12)),
            batch: given.batch.or(Some(128)),
            lr: given.lr.or(Some(0.012)),
            lr_decay: given.lr_decay.or(Some(Decay::Cosine)),
            lr_floor: given.lr_floor.or(Some(0.01)),
            kappa: given.kappa.or((estimator == EstimatorName::PerseqLowrank).then_some(0.3)),
            sigma: given.sigma.or((estimator == EstimatorName::PerseqLowrank).then_some(0.03)),
            val_fraction: given.val_fraction.or(Some(0.05)),
            ..given.clone()
        },
    };
    Ok(Hyper { seconds: Some(seconds), ..tuned.checked()? })
}

fn run_options(hyper: &Hyper, validation_rows: usize, folder: Option<PathBuf>) -> RunOptions {
    let decay = hyper.lr_decay.parse().unwrap_or(Decay::Cosine);
    RunOptions {
        budget: Budget { steps: hyper.steps, seconds: hyper.seconds },
        schedule: Schedule { peak: hyper.lr, warmup: hyper.warmup, decay, floor: hyper.lr_floor },
        stages: Stages::default(),
        measure: if folder.is_some() { MEASURE } else { Measure::Never },
        validation_rows,
        save_every: 0,
        keep: 1,
        explosion: if folder.is_some() { EXPLOSION } else { 0.0 },
        inspection: Inspection::default(),
        writing: None,
        folder,
    }
}

/// The folder that was asked for if it holds no run, or the first free name.
fn free_folder(asked: Option<&Path>) -> Result<PathBuf, Failure> {
    if let Some(folder) = asked {
        return match checkpoint::latest(folder)? {
            None => Ok(folder.to_path_buf()),
            Some(run) => Err(Failure::usage(format!(
                "{}: there is a run already; choose another folder by --out",
                run.display()
            ))),
        };
    }
    let names = std::iter::once(DEFAULT_OUT.to_owned()).chain((2u32..).map(|n| format!("{DEFAULT_OUT}-{n}")));
    let free = names.map(PathBuf::from).find(|name| !name.exists());
    free.ok_or_else(|| Failure::usage("no folder name is free; choose one by --out"))
}

/// The embedded corpus, its documents in one source so that some of them are held out whole.
fn data(vocab: &Vocab, hyper: &Hyper) -> Result<(Batches, TokenStream), Failure> {
    let source = TokenSource::of_documents(DATA, vocab, &corpus::documents())?;
    let split = text::split(&[source], hyper.val_fraction, vocab.end_of_document())?;
    Ok((Batches::mixed(split.train, hyper.seq_len as usize, hyper.seed)?, split.validation))
}

fn reached(before: &LossTally, after: &LossTally, entropy: f64, progress: &Progress, forwards: u64) -> String {
    let bits = |t: &LossTally| t.bits_per_byte().unwrap_or(f64::NAN);
    let verdict = match bits(after) {
        b if b < entropy => "below the unigram entropy: the model has learned to use what came before",
        b if b < bits(before) => {
            "not below the unigram entropy: a model that knew only how often each byte occurs would do better; a longer run goes on from here"
        }
        _ => "no better than at the start: the run was too short for the estimator to find its direction",
    };
    format!(
        "held out: {:.3} bits/byte at the start, {:.3} behind {} steps and {:.1} M tokens of forward passes in {:.0} s; {verdict}",
        bits(before),
        bits(after),
        progress.step,
        forwards as f64 / 1e6,
        progress.seconds,
    )
}

/// Loads the checkpoint into a plan for generation and streams a sample to stdout.
fn sample(model: &ModelConfig, vocab: &Vocab, path: &Path, exec: &ExecArgs) -> Result<(), Failure> {
    let spec = |kind, tokens| EntrySpec { kind, rows: 1, tokens, depth: None };
    let entries = vec![spec(EntryKind::Prefill, CHUNK), spec(EntryKind::Decode, 1)];
    let mut exe = Executable::new(compile_entries(model, entries, HashSet::new(), exec)?, &exec.exec())?;
    WeightFile::open(path)?.assign(&mut exe, false)?;
    let mut generator = Generator::new(&mut exe, vocab)?;
    generator.feed(&vocab.encode(PROMPT))?;
    let sampling = Sampling { temperature: 0.8, top_p: 0.95, ..Sampling::default() };
    let settings = Settings { sampling, max_tokens: SAMPLE, ..Settings::default() };
    let mut out = io::stdout().lock();
    let mut decoder = StreamDecoder::new(vocab);
    let mut failed = None;
    write!(out, "{PROMPT}")?;
    generator.generate(
        &settings,
        &mut |id| match out.write_all(decoder.push(id).as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(e) => {
                failed = Some(e);
                ControlFlow::Break(())
            }
        },
    )?;
    if let Some(e) = failed {
        return Err(e.into());
    }
    writeln!(out, "{}", decoder.flush())?;
    Ok(())
}

fn finish(path: &Path) -> Result<(), Failure> {
    writeln!(io::stdout().lock(), "{}", path.display())?;
    Ok(())
}

fn next_steps(folder: &Path) -> String {
    let folder = folder.display();
    format!(
        "next:\n  chimera-run generate {folder} --prompt \"fn main\" -n 200\n  chimera-run train {folder} --data YOUR.txt --out my-run --steps 2000\n  chimera-run train --scale nano --vocab o200k:restricted --data YOUR.txt --out my-nano"
    )
}
