//! What people and programs see of a run: the progress line, JSON lines, TensorBoard events, and texts on the way.
//!
//! Invariant: nothing here changes a bit of the run.

use crate::estimators::EstimatorName;
use crate::options::Failure;
use chimera_compiler::{EntryKind, EntrySpec};
use chimera_runtime::generate::Settings;
use chimera_runtime::text::{Sampling, Vocab};
use chimera_runtime::train::history::History;
use chimera_runtime::train::metrics::{Log, Short, StepMetrics};
use chimera_runtime::train::tensorboard::EventFile;
use chimera_runtime::train::{Event, Inspection, TrainError, Writing};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// Lines of progress come no faster than this where stderr is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// Tokens of a prompt that are read at a time.
const CHUNK: usize = 16;

/// Options that show a run and guard it.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Watching")]
pub struct WatchArgs {
    /// Let the model write a text every so many steps; 0 never does
    #[arg(long, default_value_t = 0, env = "CHIMERA_SAMPLE_EVERY", value_name = "N")]
    pub sample_every: u64,
    /// What these texts continue
    #[arg(long, default_value = "The ", env = "CHIMERA_SAMPLE_PROMPT", value_name = "TEXT")]
    pub sample_prompt: String,
    /// Tokens of these texts
    #[arg(long, default_value_t = 64, env = "CHIMERA_SAMPLE_TOKENS", value_name = "N")]
    pub sample_tokens: u16,
    /// Count the ternary codes that a step changes, every so many steps; 0 never does
    #[arg(long, default_value_t = 1, env = "CHIMERA_FLIPS_EVERY", value_name = "N")]
    pub flips_every: u64,
    /// Compare the estimate with the gradient every so many steps, at the cost and with the memory of a backward pass; 0 never does
    #[arg(long, default_value_t = 0, env = "CHIMERA_GRADIENT_COSINE", value_name = "EVERY")]
    pub gradient_cosine: u64,
    /// Write TensorBoard event files into the folder of the run
    #[arg(long, env = "CHIMERA_TENSORBOARD")]
    pub tensorboard: bool,
    /// Go back to the last good checkpoint, and on with half the learning rate and the data that follow, when the moving average of the
    /// loss is so many nats above its lowest, or a loss is no number; 0 ends the run at such a loss
    #[arg(long, default_value_t = 2.0, env = "CHIMERA_EXPLOSION", value_name = "NATS", value_parser = nats)]
    pub explosion: f64,
}

fn nats(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x >= 0.0 => Ok(x),
        _ => Err("expected a number from 0".into()),
    }
}

impl WatchArgs {
    /// The texts to write, if any.
    ///
    /// # Errors
    /// A prompt without a token.
    pub fn writing(&self, vocab: &Vocab) -> Result<Option<Writing>, Failure> {
        if self.sample_every == 0 {
            return Ok(None);
        }
        if vocab.encode(&self.sample_prompt).is_empty() {
            return Err(Failure::usage("--sample-prompt is empty; give a text to continue"));
        }
        let sampling = Sampling { temperature: 0.8, top_p: 0.95, ..Sampling::default() };
        let settings = Settings { sampling, max_tokens: self.sample_tokens.into(), ..Settings::default() };
        Ok(Some(Writing { every: self.sample_every, prompt: self.sample_prompt.clone(), settings }))
    }

    /// These options for an estimator; what its steps follow is not compared with the gradient where it is the gradient.
    pub fn of(&self, estimator: EstimatorName) -> WatchArgs {
        let gradient_cosine = if estimator.row().gradients { 0 } else { self.gradient_cosine };
        WatchArgs { gradient_cosine, ..self.clone() }
    }

    /// What is looked at besides losses.
    pub fn inspection(&self) -> Inspection {
        Inspection { flips: self.flips_every, cosine: self.gradient_cosine }
    }

    /// The entry points that these texts need.
    pub fn entries(&self) -> Vec<EntrySpec> {
        let spec = |kind, tokens| EntrySpec { kind, rows: 1, tokens, depth: None };
        match self.sample_every {
            0 => vec![],
            _ => vec![spec(EntryKind::Prefill, CHUNK), spec(EntryKind::Decode, 1)],
        }
    }
}

/// The files that a run writes of itself.
pub struct Records {
    log: Log,
    history: History,
    tensorboard: Option<EventFile>,
}

impl Records {
    /// Opens them in `folder` for what follows `step`.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn open(folder: &Path, step: u64, tensorboard: bool) -> Result<Records, TrainError> {
        let tensorboard = tensorboard.then(|| EventFile::create(folder)).transpose()?;
        Ok(Records { log: Log::open(folder, step)?, history: History::open(folder)?, tensorboard })
    }
}

/// Shows events to people on stderr, and to programs as JSON lines.
pub struct Reporter {
    bar: ProgressBar,
    records: Option<Records>,
    json: bool,
    quiet: bool,
    last_line: Option<Instant>,
    step: u64,
}

impl Reporter {
    /// A reporter; `json` prints a line for each step on stdout, `quiet` shows no progress.
    pub fn new(records: Option<Records>, json: bool, quiet: bool) -> Reporter {
        let bar = ProgressBar::new_spinner()
            .with_style(ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_bar()));
        if quiet {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        Reporter { bar, records, json, quiet, last_line: None, step: 0 }
    }

    /// A line that stays.
    pub fn say(&self, line: &str) {
        if self.quiet {
            return;
        }
        match self.bar.is_hidden() {
            true => eprintln!("{line}"),
            false => self.bar.println(line),
        }
    }

    /// A line that stays and goes into the history of the run.
    ///
    /// # Errors
    /// When the history cannot be written.
    pub fn note(&mut self, kind: &str, step: u64, line: &str, further: Value) -> Result<(), TrainError> {
        self.say(line);
        match &mut self.records {
            Some(r) => r.history.add(kind, step, line, further),
            None => Ok(()),
        }
    }

    /// Hears an event of a run.
    ///
    /// # Errors
    /// When a file or stdout cannot be written.
    pub fn hear(&mut self, event: Event<'_>) -> Result<(), TrainError> {
        match event {
            Event::Start(v) => {
                let bits = v.bits_per_byte.map_or(String::new(), |b| format!(", {b:.3} bits/byte"));
                let unit = if v.preferred.is_some() { "pair" } else { "token" };
                self.say(&format!("held out at the start: {:.3} nats/{unit}{bits}", v.nats_per_token));
                Ok(())
            }
            Event::Step(m) => self.step(m),
            Event::Saved(path) => self.note("saved", self.step, &format!("saved {}", path.display()), Value::Null),
            Event::RolledBack(r) => {
                let line = format!(
                    "the loss is {:.3} in step {}: back to the checkpoint of step {}, and on with half the learning rate and the data that follow (return {})",
                    r.loss, r.at, r.to, r.rollbacks
                );
                if let Some(records) = &mut self.records {
                    records.log.go_back(r.to)?;
                }
                self.step = r.to;
                self.note("rollback", r.at, &line, json!({ "to": r.to, "rollbacks": r.rollbacks }))
            }
            Event::Stage { step, sentence } => {
                self.note("stage", step, &format!("behind step {step}: {sentence}"), Value::Null)
            }
            Event::Text { step, text } => self.note(
                "text",
                step,
                &format!("behind step {step} the model writes: {text:?}"),
                json!({ "text": text }),
            ),
            Event::Memory { step, found, planned } => {
                let line = format!(
                    "warning: {} MB of memory are in use, but the process had, and the plan needs, {} MB together",
                    found >> 20,
                    planned >> 20
                );
                self.note("memory", step, &line, json!({ "found": found, "planned": planned }))
            }
        }
    }

    fn step(&mut self, m: &StepMetrics) -> Result<(), TrainError> {
        self.step = m.step;
        if let Some(r) = &mut self.records {
            r.log.add(m)?;
            r.tensorboard.as_mut().map_or(Ok(()), |t| t.add(m))?;
        }
        if self.json {
            let line = writeln!(io::stdout().lock(), "{}", m.to_json());
            line.map_err(|source| TrainError::Io { path: None, source })?;
        }
        if self.quiet {
            return Ok(());
        }
        if !self.bar.is_hidden() {
            self.bar.set_message(m.to_string());
        }
        let due = self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY);
        let last = m.steps == Some(m.step);
        if m.validated || last || (due && self.bar.is_hidden()) {
            self.say(&m.to_string());
            self.last_line = Some(Instant::now());
        }
        Ok(())
    }

    /// Ends the progress line.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// A time in words.
pub fn time(seconds: f64) -> Short {
    Short(Duration::try_from_secs_f64(seconds).unwrap_or_default())
}
