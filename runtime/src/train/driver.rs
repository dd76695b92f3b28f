//! The loop around the steps: data, learning rate, measurement, checkpoints, and when to stop.
//!
//! Invariant: what a step does depends on the progress before it alone; stopping after any step and resuming from the checkpoint
//! changes nothing.

use super::TrainError;
use super::checkpoint::{self, Meta};
use super::metrics::{StepMetrics, Validation, moving_average, resident_bytes};
use super::schedule::Schedule;
use super::step::Trainer;
use crate::text::{Batches, TokenStream, Vocab};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Rows of data used.
    pub position: u64,
    /// Moving average of the loss.
    pub ema: Option<f64>,
    /// Time spent in steps.
    pub seconds: f64,
}

/// When a run is over: at whichever comes first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Steps in all.
    pub steps: Option<u64>,
    /// Seconds in all, validation included; the learning rate then depends on the clock.
    pub seconds: Option<f64>,
}

impl Budget {
    /// The share of the run that is over, from 0 to 1, counted from behind the warm-up.
    fn over(&self, progress: &Progress, warmup: u64) -> f64 {
        let steps = self
            .steps
            .map_or(0.0, |n| progress.step.saturating_sub(warmup) as f64 / n.saturating_sub(warmup).max(1) as f64);
        steps.max(self.seconds.map_or(0.0, |s| progress.seconds / s)).min(1.0)
    }

    fn is_spent(&self, progress: &Progress) -> bool {
        self.steps.is_some_and(|n| progress.step >= n) || self.seconds.is_some_and(|s| progress.seconds >= s)
    }
}

/// What a run does besides steps.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// When it is over.
    pub budget: Budget,
    /// Learning rate.
    pub schedule: Schedule,
    /// Measure every so many steps, and at the beginning and the end; 0 never measures.
    pub validate_every: u64,
    /// Most rows to measure on.
    pub validation_rows: usize,
    /// Write a checkpoint every so many steps; 0 writes one at the end only.
    pub save_every: u64,
    /// Checkpoints to keep.
    pub keep: usize,
    /// Where checkpoints go; nothing keeps the run in memory.
    pub folder: Option<PathBuf>,
}

/// What the caller hears.
#[derive(Debug)]
pub enum Event<'a> {
    /// Held-out loss before the first step.
    Start(Validation),
    /// Behind every step.
    Step(&'a StepMetrics),
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The budget is spent.
    Finished,
    /// The caller asked for it.
    Stopped,
}

/// A training run.
#[derive(Debug)]
pub struct Run<'a> {
    /// Entry points and weights.
    pub trainer: &'a mut Trainer,
    /// Training data.
    pub batches: &'a Batches,
    /// Held-out data.
    pub validation: &'a TokenStream,
    /// Vocabulary of both.
    pub vocab: &'a Vocab,
    /// Where the run is.
    pub progress: Progress,
    /// What checkpoints hold besides weights; their progress is that of the run.
    pub meta: Meta,
}

impl Run<'_> {
    /// Train until the budget is spent or `stop` says so between two steps, and write a checkpoint at the end.
    ///
    /// # Errors
    /// A loss that is not finite, data without a row, a failed execution or write, or what `hear` returns. Checkpoints on disk stay.
    pub fn train(
        &mut self,
        options: &RunOptions,
        stop: &dyn Fn() -> bool,
        hear: &mut dyn FnMut(Event<'_>) -> Result<(), TrainError>,
    ) -> Result<Outcome, TrainError> {
        let (rows, tokens) = self.trainer.shape();
        let mut validation = None;
        let mut saved = None;
        let mut clock = Instant::now();
        if options.validate_every > 0 && !options.budget.is_spent(&self.progress) {
            validation = self.validate(options)?;
            if let Some(v) = validation {
                hear(Event::Start(v))?;
            }
        }
        while !options.budget.is_spent(&self.progress) {
            if stop() {
                self.save(options, &mut saved, hear)?;
                return Ok(Outcome::Stopped);
            }
            let began = Instant::now();
            let before = self.progress;
            let over = options.budget.over(&before, options.schedule.warmup);
            let lr = options.schedule.at(before.step, over);
            let (batch, position) = self.batches.next(before.position, rows, tokens)?;
            let probed = self.trainer.step(&batch, before.step, lr)?;
            let dt = began.elapsed();
            let step = before.step + 1;
            let ema = moving_average(before.ema, probed.loss);
            // The time behind the last step counts too: it went into measuring and saving.
            let seconds = before.seconds + clock.elapsed().as_secs_f64();
            clock = Instant::now();
            self.progress = Progress { step, position, ema: Some(ema), seconds };
            let last = options.budget.is_spent(&self.progress);
            let validated = options.validate_every > 0 && (last || step.is_multiple_of(options.validate_every));
            if validated {
                validation = self.validate(options)?;
            }
            let share = options.budget.over(&self.progress, 0);
            hear(Event::Step(&StepMetrics {
                step,
                steps: options.budget.steps,
                share,
                loss: probed.loss,
                ema,
                validation,
                validated: validated && validation.is_some(),
                data_tokens: (rows * tokens) as u64,
                forward_tokens: self.trainer.forward_tokens(),
                dt,
                lr,
                seq: tokens,
                memory: resident_bytes().unwrap_or_else(|| self.trainer.exec().bytes()),
                eta: remaining(options, &self.progress),
            }))?;
            if options.save_every > 0 && step.is_multiple_of(options.save_every) {
                self.save(options, &mut saved, hear)?;
            }
        }
        self.save(options, &mut saved, hear)?;
        Ok(Outcome::Finished)
    }

    /// Loss on the held-out data; `None` when there is none.
    ///
    /// # Errors
    /// When execution fails.
    pub fn validate(&mut self, options: &RunOptions) -> Result<Option<Validation>, TrainError> {
        let tally = self.trainer.measure(self.validation, options.validation_rows, self.vocab)?;
        let nats = tally.nats_per_token();
        Ok(nats.map(|nats_per_token| Validation { nats_per_token, bits_per_byte: tally.bits_per_byte() }))
    }

    /// Writes a checkpoint unless the last one is of this step.
    fn save(
        &self,
        options: &RunOptions,
        saved: &mut Option<u64>,
        hear: &mut dyn FnMut(Event<'_>) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        let Some(folder) = options.folder.as_deref().filter(|_| *saved != Some(self.progress.step)) else {
            return Ok(());
        };
        let meta = Meta { progress: self.progress, ..self.meta.clone() };
        let path = checkpoint::save(folder, self.trainer.exec(), &meta, options.keep)?;
        *saved = Some(self.progress.step);
        hear(Event::Saved(&path))
    }
}

/// Time to the end at the speed so far.
fn remaining(options: &RunOptions, progress: &Progress) -> Duration {
    let budget = &options.budget;
    let per_step = progress.seconds / progress.step.max(1) as f64;
    let steps = budget.steps.map(|n| n.saturating_sub(progress.step) as f64 * per_step);
    let seconds = budget.seconds.map(|s| s - progress.seconds);
    let left = steps.into_iter().chain(seconds).fold(f64::INFINITY, f64::min);
    Duration::try_from_secs_f64(left.max(0.0)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_budget_to_be_spent_ends_the_run() {
        let at = |step, seconds| Progress { step, seconds, ..Progress::default() };
        let both = Budget { steps: Some(100), seconds: Some(10.0) };
        assert_eq!(both.over(&at(20, 5.0), 0), 0.5);
        assert_eq!(both.over(&at(60, 5.0), 20), 0.5);
        assert_eq!(both.over(&at(10, 0.0), 20), 0.0);
        assert!(!both.is_spent(&at(99, 9.9)));
        assert!(both.is_spent(&at(100, 0.0)) && both.is_spent(&at(0, 10.0)));
        let none = Budget { steps: None, seconds: None };
        assert!(!none.is_spent(&at(u64::MAX, 1e9)));
    }
}
