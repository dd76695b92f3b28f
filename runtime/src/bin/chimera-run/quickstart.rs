//! `chimera-run quickstart`: without any file of the user's, train a small model on the embedded corpus, save it, load it and let it write.
//!
//! Invariant: every number that is shown was measured in this run, on text that was not trained on where it says held out.

use crate::hyper::{Hyper, HyperArgs};
use crate::model::compile_entries;
use crate::options::{Failure, RunOptions as ExecArgs};
use crate::session::{Interrupt, depths, training_plan};
use crate::watch::{Records, Reporter};
use chimera_compiler::{EntryKind, EntrySpec};
use chimera_frontends::config::{self, ModelConfig, Overrides, Scale};
use chimera_runtime::exec::Executable;
use chimera_runtime::generate::{Generator, Settings};
use chimera_runtime::text::{
    self, Batches, LossTally, Sampling, StreamDecoder, TokenSource, TokenStream, Vocab, corpus,
};
use chimera_runtime::train::checkpoint::{self, Meta};
use chimera_runtime::train::journal::{Header, Journal};
use chimera_runtime::train::weights::WeightFile;
use chimera_runtime::train::{Budget, Decay, Outcome, Progress, Run, RunOptions, Schedule, Trainer, init};
use std::collections::HashSet;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// The name of the folder where nobody asks for another.
const DEFAULT_OUT: &str = "chimera-quickstart";
/// Steps between measurements.
const VALIDATE_EVERY: u64 = 250;
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

/// Wider initial weights than the family's: steps are relative to the size of weights, and two minutes are too short to grow them.
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
    let hyper = hyper(&args);
    let vocab = Vocab::bytes();
    let sets = vec![INITIALIZER.to_owned()];
    let overrides = Overrides { vocab_size: Some(vocab.size()), sets, ..Overrides::default() };
    let model = config::preset(Scale::Pico, &overrides)?.model;
    let (batches, validation) = data(&vocab, &hyper)?;
    let reporter = Reporter::new(None, false, false);
    let entropy = text::unigram_bits_per_byte(&vocab, batches.tokens()).unwrap_or(f64::NAN);
    let mut exec = Executable::new(training_plan(&model, &hyper, vec![], &args.exec)?, &args.exec.exec())?;
    init::initialise(&mut exec, hyper.seed)?;
    reporter.say(&format!(
        "a byte-level model of {} parameters, trained on {} KB of this project's own text for {} s by comparing losses, without back-propagation",
        config::parameter_count(&model),
        batches.len() / 1000,
        args.seconds,
    ));
    reporter.say(&format!("the text has a unigram entropy of {entropy:.3} bits/byte; a uniform guess needs 8.0"));
    let meta = Meta {
        config: exec.plan().config.clone(),
        vocab: vocab.to_text(),
        options: serde_json::to_string(&hyper).map_err(|e| Failure::new(e.to_string()))?,
        data: "the embedded corpus".into(),
        progress: Progress::default(),
    };
    args.exec.trace.start(&mut exec);
    let mut trainer = Trainer::new(exec, hyper.seed)?.with_depths(depths(&model));
    let options = run_options(&hyper, folder.clone());
    let before = trainer.measure(&validation, options.validation_rows, &vocab)?;
    let journal = Some(Journal::create(&folder, &Header::new(0, &meta.config, &meta.data))?);
    let mut reporter = Reporter::new(Some(Records::open(&folder, 0, false)?), false, false);
    let mut run = Run {
        trainer: &mut trainer,
        batches: &batches,
        validation: &validation,
        vocab: &vocab,
        progress: Progress::default(),
        meta,
        journal,
    };
    let outcome = run.train(&options, &|| interrupt.requested(), &mut |event| reporter.hear(event));
    reporter.finish();
    let (outcome, progress) = (outcome?, run.progress);
    let after = trainer.measure(&validation, options.validation_rows, &vocab)?;
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

/// The options of the run: what the two minutes are best spent on, unless given.
fn hyper(args: &Args) -> Hyper {
    let given = &args.hyper;
    let tuned = HyperArgs {
        seq_len: given.seq_len.or(Some(12)),
        batch: given.batch.or(Some(128)),
        lr: given.lr.or(Some(0.012)),
        lr_decay: given.lr_decay.or(Some(Decay::Cosine)),
        lr_floor: given.lr_floor.or(Some(0.01)),
        kappa: given.kappa.or(Some(0.3)),
        sigma: given.sigma.or(Some(0.03)),
        val_fraction: given.val_fraction.or(Some(0.05)),
        ..given.clone()
    };
    Hyper { seconds: Some(args.seconds as f64), ..tuned.fresh() }
}

fn run_options(hyper: &Hyper, folder: PathBuf) -> RunOptions {
    let decay = hyper.lr_decay.parse().unwrap_or(Decay::Cosine);
    RunOptions {
        budget: Budget { steps: hyper.steps, seconds: hyper.seconds },
        schedule: Schedule { peak: hyper.lr, warmup: hyper.warmup, decay, floor: hyper.lr_floor },
        validate_every: VALIDATE_EVERY,
        validation_rows: (VALIDATION_TOKENS / hyper.seq_len as usize).max(1),
        save_every: 0,
        keep: 1,
        explosion: EXPLOSION,
        writing: None,
        folder: Some(folder),
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
    let source = TokenSource::of_documents("the embedded corpus", vocab, &corpus::documents())?;
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
