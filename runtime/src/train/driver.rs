//! The loop around the steps: data, learning rate, measurement, checkpoints, and when to stop.
//!
//! Invariant: what a step does depends on the progress before it alone; stopping after any step and resuming from what is on disk
//! changes nothing. A step is in the journal before the next one begins.

use super::TrainError;
use super::agreement::Agreement;
use super::backprop::DECAY;
use super::checkpoint::{self, Meta};
use super::health::{Health, Inspection};
use super::journal::{Journal, Record, Rollback, StepRecord};
use super::metrics::{StepMetrics, Validation, moving_average, resident_bytes};
use super::paradigms::{Stage, Stages};
use super::quantiser::Codes;
use super::schedule::Schedule;
use super::step::{Probed, Trainer};
use super::watch::{MemoryWatch, explodes, is_calm};
use super::weights::WeightFile;
use crate::files::FileError;
use crate::generate::{Generator, Settings};
use crate::text::{Batch, Feed, HeldOut, LossTally, StreamDecoder, Vocab};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

/// Where no number of steps is given, checkpoints are so far apart.
const SAVE_EVERY: Duration = Duration::from_secs(600);
/// The learning rate of a run that went back to a checkpoint, as a share of the one before.
const CAUTION: f64 = 0.5;
/// Most returns to one checkpoint.
const MAX_RETURNS: u32 = 6;

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Tokens of data used.
    pub position: u64,
    /// Moving average of the loss.
    pub ema: Option<f64>,
    /// The lowest that this average was.
    pub lowest: Option<f64>,
    /// Time spent in steps.
    pub seconds: f64,
    /// Times that the run went back to a checkpoint; each one halves the learning rate of what follows.
    pub rollbacks: u32,
    /// The stage of the last step.
    pub stage: Stage,
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

/// When a run measures on held-out data. One that ever does, measures at the beginning and the end too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Never.
    Never,
    /// Behind every so many steps; at least 1.
    Every(u64),
    /// So much time behind the last measurement, and not before nine times what that one took has passed.
    Apart(Duration),
}

impl Measure {
    /// Whether it is time to measure behind `step`; the last measurement ended `ago` and took `took`.
    fn is_due(self, step: u64, ago: Duration, took: Duration) -> bool {
        match self {
            Measure::Never => false,
            Measure::Every(steps) => step.is_multiple_of(steps),
            Measure::Apart(time) => ago >= time.max(took.saturating_mul(9)),
        }
    }
}

/// `100` for steps, `30s` or `0.5s` for time, 0 for never.
impl FromStr for Measure {
    type Err = String;

    fn from_str(text: &str) -> Result<Measure, String> {
        let expected = || format!("found {text:?}, expected a number of steps such as 100, or a time such as 30s");
        if let Some(seconds) = text.strip_suffix('s') {
            let seconds = seconds.parse().ok().filter(|&s: &f64| s > 0.0).ok_or_else(expected)?;
            return Duration::try_from_secs_f64(seconds).map(Measure::Apart).map_err(|_| expected());
        }
        match text.parse().map_err(|_| expected())? {
            0 => Ok(Measure::Never),
            steps => Ok(Measure::Every(steps)),
        }
    }
}

/// What a run does besides steps.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// When it is over.
    pub budget: Budget,
    /// Learning rate.
    pub schedule: Schedule,
    /// What changes on the way.
    pub stages: Stages,
    /// When it measures.
    pub measure: Measure,
    /// Most rows to measure on.
    pub validation_rows: usize,
    /// Write a checkpoint every so many steps; 0 writes one every ten minutes. One is written at the end.
    pub save_every: u64,
    /// Checkpoints to keep, that of the beginning apart.
    pub keep: usize,
    /// Go back to a checkpoint when the moving average of the loss is so many nats above its lowest; 0 never does.
    pub explosion: f64,
    /// What it looks at besides losses.
    pub inspection: Inspection,
    /// Texts to write on the way.
    pub writing: Option<Writing>,
    /// Where checkpoints go; nothing keeps the run in memory.
    pub folder: Option<PathBuf>,
}

/// Texts that show what the model has learned.
#[derive(Clone, Debug)]
pub struct Writing {
    /// Steps from one to the next.
    pub every: u64,
    /// What they continue; not empty.
    pub prompt: String,
    /// How.
    pub settings: Settings,
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
    /// The loss exploded and the run went back.
    RolledBack(Rollback),
    /// From here on the run has another plan.
    Stage {
        /// Steps done.
        step: u64,
        /// What the stage is.
        sentence: &'a str,
    },
    /// A text that the model wrote behind a step: the prompt and what follows.
    Text {
        /// Steps done.
        step: u64,
        /// The text.
        text: &'a str,
    },
    /// Resident memory is beyond what the plan accounts for.
    Memory {
        /// Steps done.
        step: u64,
        /// Bytes found.
        found: u64,
        /// Bytes before the first step and those of the plan together.
        planned: u64,
    },
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
    pub batches: &'a dyn Feed,
    /// Held-out data.
    pub validation: &'a dyn HeldOut,
    /// Vocabulary of both.
    pub vocab: &'a Vocab,
    /// Where the run is.
    pub progress: Progress,
    /// What checkpoints hold besides weights; their progress is that of the run.
    pub meta: Meta,
    /// Where steps are recorded; a run that has none cannot go back.
    pub journal: Option<Journal>,
}

/// What a call of [`Run::train`] remembers between steps.
struct Loop<'h> {
    /// Ends where the running step began to count.
    clock: Instant,
    /// When the last checkpoint was written.
    saved_at: Instant,
    /// Steps behind which there is a checkpoint of this run.
    saved: Option<u64>,
    /// Latest measurement, its end, and how long it took.
    validation: Option<Validation>,
    measured: (Instant, Duration),
    memory: MemoryWatch,
    hear: &'h mut dyn FnMut(Event<'_>) -> Result<(), TrainError>,
}

impl Run<'_> {
    /// Train until the budget is spent or `stop` says so between two steps, and write a checkpoint at the end.
    ///
    /// # Errors
    /// A loss that explodes again and again, data without a row, a failed execution or write, or what `hear` returns. Checkpoints and
    /// journal on disk stay.
    pub fn train(
        &mut self,
        options: &RunOptions,
        stop: &dyn Fn() -> bool,
        hear: &mut dyn FnMut(Event<'_>) -> Result<(), TrainError>,
    ) -> Result<Outcome, TrainError> {
        let bytes = self.trainer.bytes();
        let memory = MemoryWatch::new(resident_bytes().unwrap_or(u64::MAX - bytes), bytes);
        let now = Instant::now();
        let mut on = Loop {
            clock: now,
            saved_at: now,
            saved: None,
            validation: None,
            measured: (now, Duration::ZERO),
            memory,
            hear,
        };
        if let Some(folder) = options.folder.as_deref() {
            let steps = checkpoint::steps(folder)?;
            on.saved = Some(self.progress.step).filter(|step| steps.contains(step));
            // The journal needs a checkpoint to begin with.
            if steps.is_empty() {
                self.save(options, &mut on)?;
            }
        }
        if options.measure != Measure::Never && !options.budget.is_spent(&self.progress) {
            self.measure(options, &mut on)?;
            if let Some(v) = on.validation {
                (on.hear)(Event::Start(v))?;
            }
        }
        while !options.budget.is_spent(&self.progress) {
            if stop() {
                self.save(options, &mut on)?;
                return Ok(Outcome::Stopped);
            }
            self.advance(options, &mut on)?;
        }
        self.save(options, &mut on)?;
        Ok(Outcome::Finished)
    }

    /// One step, or the return to a checkpoint.
    fn advance(&mut self, options: &RunOptions, on: &mut Loop<'_>) -> Result<(), TrainError> {
        self.change_stage(options, on)?;
        let (rows, tokens) = self.trainer.shape();
        let began = Instant::now();
        let before = self.progress;
        let over = options.budget.over(&before, options.schedule.warmup);
        let rate = options.schedule.at(before.step, over) * CAUTION.powi(before.rollbacks as i32);
        let lr = rate * self.batches.rate(before.position, rows, tokens);
        let (batch, position) = self.batches.next(before.position, rows, tokens);
        let (probed, ema) = match self.trainer.probe(&batch, before.step) {
            Ok(mut probed) => {
                if let (true, Some(share)) = (self.trainer.is_along_gradient(), probed.c.get_mut(DECAY)) {
                    *share = options.schedule.decay_share(over) as f32;
                }
                let ema = moving_average(before.ema, probed.loss);
                if explodes(ema, before.lowest, options.explosion) {
                    return self.roll_back(options, probed.loss, position, on);
                }
                (probed, ema)
            }
            Err(TrainError::Diverged { loss, .. }) if options.explosion > 0.0 => {
                return self.roll_back(options, loss, position, on);
            }
            Err(e) => return Err(e),
        };
        let step = before.step + 1;
        let (mut health, looked) = (Health::of(&probed), Instant::now());
        if Inspection::is_due(options.inspection.cosine, step) {
            self.trainer.compare(&batch, before.step, &probed, &mut health)?;
        }
        health.head_norm = self.trainer.head_norm(&probed);
        let aside = looked.elapsed();
        let counted = Inspection::is_due(options.inspection.flips, step);
        if counted {
            self.trainer.keep_codes()?;
        }
        self.trainer.apply(before.step, lr, &probed.c, &probed.loads)?;
        if counted {
            health.flips = self.trainer.flips()?;
        }
        let dt = began.elapsed().saturating_sub(aside);
        // The time behind the last step counts too: it went into measuring and saving.
        let seconds = before.seconds + on.clock.elapsed().as_secs_f64();
        on.clock = Instant::now();
        let lowest = Some(before.lowest.map_or(ema, |low| low.min(ema)));
        let (rollbacks, stage) = (before.rollbacks, self.trainer.stage());
        self.progress = Progress { step, position, ema: Some(ema), lowest, seconds, rollbacks, stage };
        if let Some(journal) = &mut self.journal {
            let (loss, c, loads) = (probed.loss, probed.c.clone(), probed.loads.clone());
            journal.add(&Record::Step(StepRecord { step, rollbacks, position, lr, loss, seconds, c, loads, stage }))?;
        }
        self.report(options, &batch, (&probed, health), [lr, ema], dt, on)?;
        let due = match options.save_every {
            0 => on.saved_at.elapsed() >= SAVE_EVERY,
            n => step.is_multiple_of(n),
        };
        if due { self.save(options, on) } else { Ok(()) }
    }

    /// Takes the plan of the stage that the next step belongs to.
    fn change_stage(&mut self, options: &RunOptions, on: &mut Loop<'_>) -> Result<(), TrainError> {
        let stage = options.stages.wanted(&self.progress, &options.budget).later(self.progress.stage);
        let Some(sentence) = self.trainer.enter(stage)? else { return Ok(()) };
        on.memory.plans(self.trainer.bytes());
        (on.hear)(Event::Stage { step: self.progress.step, sentence: &sentence })
    }

    /// Measures where it is time to, and tells what a step did.
    fn report(
        &mut self,
        options: &RunOptions,
        batch: &Batch,
        (probed, health): (&Probed, Health),
        [lr, ema]: [f64; 2],
        dt: Duration,
        on: &mut Loop<'_>,
    ) -> Result<(), TrainError> {
        let (step, last) = (self.progress.step, options.budget.is_spent(&self.progress));
        let (ended, took) = on.measured;
        let due = options.measure.is_due(step, ended.elapsed(), took);
        let validated = due || (last && options.measure != Measure::Never);
        if validated {
            self.measure(options, on)?;
        }
        let (agreement, codes) = match validated {
            true => (Agreement::of(self.trainer.exec(), step, lr)?, Codes::of(self.trainer.exec())?),
            false => (None, None),
        };
        let mut tally = LossTally::default();
        tally.add(probed.loss, batch, self.vocab);
        let resident = resident_bytes();
        (on.hear)(Event::Step(&StepMetrics {
            step,
            steps: options.budget.steps,
            share: options.budget.over(&self.progress, 0),
            loss: probed.loss,
            bits_per_byte: tally.bits_per_byte(),
            ema,
            spread: probed.spread(),
            norm: self.trainer.is_along_gradient().then(|| probed.c.first().map_or(0.0, |&x| f64::from(x))),
            agreement,
            codes,
            health,
            validation: on.validation,
            validated: validated && on.validation.is_some(),
            position: self.progress.position,
            data_tokens: (batch.batch * batch.seq - batch.padding) as u64,
            forward_tokens: self.trainer.forward_tokens(),
            dt,
            seconds: self.progress.seconds,
            lr,
            seq: batch.seq,
            memory: resident.unwrap_or_else(|| self.trainer.exec().bytes()),
            eta: remaining(options, &self.progress),
        }))?;
        if let Some((found, planned)) = resident.and_then(|found| Some((found, on.memory.exceeded(found)?))) {
            (on.hear)(Event::Memory { step, found, planned })?;
        }
        match &options.writing {
            Some(w) if last || step.is_multiple_of(w.every.max(1)) => {
                let text = self.write(w)?;
                (on.hear)(Event::Text { step, text: &text })
            }
            _ => Ok(()),
        }
    }

    /// Lets the model continue a prompt.
    fn write(&mut self, writing: &Writing) -> Result<String, TrainError> {
        let mut decoder = StreamDecoder::new(self.vocab);
        let mut text = writing.prompt.clone();
        let mut generator = Generator::new(self.trainer.exec_mut(), self.vocab)?;
        generator.reset();
        generator.feed(&self.vocab.encode(&writing.prompt))?;
        generator.generate(&writing.settings, &mut |id| {
            text.push_str(&decoder.push(id));
            ControlFlow::Continue(())
        })?;
        text.push_str(&decoder.flush());
        Ok(text)
    }

    /// Returns to the newest checkpoint from which the loss had not begun to rise. What follows has half the learning rate, and begins
    /// with the data behind those of the failed step.
    fn roll_back(
        &mut self,
        options: &RunOptions,
        loss: f64,
        position: u64,
        on: &mut Loop<'_>,
    ) -> Result<(), TrainError> {
        let failed = self.progress;
        let given_up = TrainError::Diverged { step: failed.step, loss };
        let (Some(folder), true) = (options.folder.as_deref(), self.journal.is_some()) else { return Err(given_up) };
        for to in checkpoint::steps(folder)?.into_iter().rev() {
            let path = checkpoint::path_of(folder, to);
            let file = WeightFile::open(&path)?;
            let saved = checkpoint::meta(&file)?.map(|meta| meta.progress);
            let calm = saved.filter(|p| to <= failed.step && is_calm(p.ema, p.lowest, options.explosion));
            if let Some(p) = calm {
                if failed.rollbacks >= p.rollbacks.saturating_add(MAX_RETURNS) {
                    return Err(given_up);
                }
                self.trainer.restore(&file, p.stage)?;
                let rollbacks = failed.rollbacks.saturating_add(1);
                let (rows, tokens) = self.trainer.shape();
                let position = self.batches.anew(position, rows, tokens);
                self.progress = Progress { position, rollbacks, seconds: failed.seconds, ..p };
                let rollback = Rollback { at: failed.step, to, position, rollbacks, loss };
                if let Some(journal) = &mut self.journal {
                    journal.add(&Record::Rollback(rollback))?;
                }
                on.saved = None;
                return (on.hear)(Event::RolledBack(rollback));
            }
            // Nothing may go on from there: the checkpoint is behind the explosion.
            std::fs::remove_file(&path).map_err(|source| FileError::io(&path, "remove", source))?;
        }
        Err(given_up)
    }

    /// Keeps the loss on the held-out data.
    fn measure(&mut self, options: &RunOptions, on: &mut Loop<'_>) -> Result<(), TrainError> {
        let began = Instant::now();
        on.validation = self.validate(options)?;
        on.measured = (Instant::now(), began.elapsed());
        Ok(())
    }

    /// Loss on the held-out data; `None` when there is none.
    ///
    /// # Errors
    /// When execution fails.
    pub fn validate(&mut self, options: &RunOptions) -> Result<Option<Validation>, TrainError> {
        self.trainer.validate(self.validation, options.validation_rows, self.vocab)
    }

    /// Writes a checkpoint unless the last one is of this step.
    fn save(&mut self, options: &RunOptions, on: &mut Loop<'_>) -> Result<(), TrainError> {
        let Some(folder) = options.folder.as_deref().filter(|_| on.saved != Some(self.progress.step)) else {
            return Ok(());
        };
        // The journal first: it must lead to every checkpoint.
        if let Some(journal) = &mut self.journal {
            journal.sync()?;
        }
        let meta = Meta { progress: self.progress, ..self.meta.clone() };
        let path = checkpoint::save(folder, self.trainer.exec(), &meta, options.keep)?;
        (on.saved, on.saved_at) = (Some(self.progress.step), Instant::now());
        (on.hear)(Event::Saved(&path))
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

    #[test]
    fn measurements_come_by_steps_or_by_time() {
        let s = Duration::from_secs;
        assert_eq!("0".parse(), Ok(Measure::Never));
        assert_eq!("100".parse(), Ok(Measure::Every(100)));
        assert_eq!("0.5s".parse(), Ok(Measure::Apart(Duration::from_millis(500))));
        for text in ["", "s", "0s", "-1s", "nans", "infs", "-1", "1.5", "1e300s"] {
            assert!(text.parse::<Measure>().is_err_and(|e| e.contains("30s")), "{text}");
        }
        assert!(Measure::Every(4).is_due(8, s(0), s(0)) && !Measure::Every(4).is_due(9, s(99), s(0)));
        let apart = Measure::Apart(s(10));
        assert!(apart.is_due(1, s(10), s(1)) && !apart.is_due(1, s(9), s(0)));
        assert!(!apart.is_due(1, s(17), s(2)) && apart.is_due(1, s(18), s(2)), "a tenth of the time at most");
        assert!(!Measure::Never.is_due(0, s(99), s(0)));
    }
}
