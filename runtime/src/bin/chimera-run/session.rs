//! What training commands share: signals, progress on the terminal, metrics on disk, and the plan of a run.
//!
//! Invariant: the first interrupt lets the running step end and its checkpoint be written; the second ends the process at once.

use crate::hyper::Hyper;
use crate::options::Failure;
use chimera_codegen::Target;
use chimera_compiler::{EntryKind, EntrySpec, Options, compile};
use chimera_frontends::config::{ModelConfig, parameters};
use chimera_ir::plan::Plan;
use chimera_runtime::train::metrics::{Log, StepMetrics};
use chimera_runtime::train::{Depths, Event, TrainError};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Rows that one measurement takes at a time.
const MEASURED_ROWS: usize = 16;
/// Exit code of a process that an interrupt ends: 128 and the number of the signal.
const INTERRUPTED: i32 = 130;
/// Lines of progress come no faster than this where stderr is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// A flag that the first interrupt sets.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From here on, the first SIGINT or SIGTERM sets the flag and the second ends the process.
    ///
    /// # Errors
    /// When the system refuses the handlers.
    pub fn register() -> Result<Interrupt, Failure> {
        let flag = Arc::new(AtomicBool::new(false));
        let fail = |e| Failure::new(format!("cannot listen to signals: {e}"));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag unset, the second finds it set.
            signal_hook::flag::register_conditional_shutdown(signal, INTERRUPTED, flag.clone()).map_err(fail)?;
            signal_hook::flag::register(signal, flag.clone()).map_err(fail)?;
        }
        Ok(Interrupt(flag))
    }

    /// Whether the first interrupt came.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// From here on, a write beyond the limit of file sizes is an error like that of a full disk and does not end the process.
///
/// # Errors
/// When the system refuses the handler.
#[cfg(unix)]
pub fn survive_large_files() -> Result<(), Failure> {
    let nobody = Arc::new(AtomicBool::new(false));
    let refused = |e| Failure::new(format!("cannot listen to signals: {e}"));
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, nobody).map(drop).map_err(refused)
}

/// The plan of a run.
///
/// # Errors
/// When the configuration cannot be compiled, or a pattern of `--only` matches nothing.
pub fn training_plan(config: &ModelConfig, hyper: &Hyper, target: &Target) -> Result<Plan, Failure> {
    let parameters = parameters(config);
    let trainable = hyper.trainable(parameters.iter().map(|p| p.name.as_str()))?;
    let entries = training_entries(config, hyper);
    Ok(compile(config, &Options { target: target.to_string(), entries, trainable, ..Options::default() })?)
}

/// The entry points of a training plan.
pub fn training_entries(config: &ModelConfig, hyper: &Hyper) -> Vec<EntrySpec> {
    let (rows, tokens) = (hyper.batch as usize, hyper.seq_len as usize);
    let balance = config.moe.as_ref().map_or(0.0, |moe| moe.bias_update_rate);
    let spec = |kind, rows| EntrySpec { kind, rows, tokens, depth: None };
    vec![
        spec(EntryKind::DualLoss(hyper.scheme()), rows),
        spec(EntryKind::Update(hyper.scheme(), hyper.rule(balance)), rows),
        spec(EntryKind::Loss, MEASURED_ROWS),
    ]
}

/// How the loop depths of training are drawn, if the configuration asks for that.
pub fn depths(config: &ModelConfig) -> Option<Depths> {
    let drawn = config.looping.as_ref().filter(|l| l.stochastic);
    drawn.map(|l| Depths { mean: l.default as f64, least: l.range[0] as u32, most: l.range[1] as u32 })
}

/// Shows events to people on stderr, and to programs as JSON lines.
pub struct Reporter {
    bar: ProgressBar,
    log: Option<Log>,
    json: bool,
    quiet: bool,
    last_line: Option<Instant>,
}

impl Reporter {
    /// A reporter; `json` prints a line for each step on stdout, `quiet` shows no progress.
    pub fn new(log: Option<Log>, json: bool, quiet: bool) -> Reporter {
        let bar = ProgressBar::new_spinner()
            .with_style(ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_bar()));
        if quiet {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        Reporter { bar, log, json, quiet, last_line: None }
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

    /// Hears an event of a run.
    ///
    /// # Errors
    /// When the log or stdout cannot be written.
    pub fn hear(&mut self, event: Event<'_>) -> Result<(), TrainError> {
        match event {
            Event::Start(v) => {
                let bits = v.bits_per_byte.map_or(String::new(), |b| format!(", {b:.3} bits/byte"));
                self.say(&format!("held out at the start: {:.3} nats/token{bits}", v.nats_per_token));
            }
            Event::Step(m) => self.step(m)?,
            Event::Saved(path) => self.say(&format!("saved {}", path.display())),
        }
        Ok(())
    }

    fn step(&mut self, m: &StepMetrics) -> Result<(), TrainError> {
        if let Some(log) = &mut self.log {
            log.add(m)?;
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
