//! Where a run stands on disk: a checkpoint and the trail of the journal behind it.
//!
//! Invariant: restoring a standing gives the bits of the run that wrote it at that step. Files are chosen by the steps in their names
//! and contents, never by times.

use super::TrainError;
use super::checkpoint::{self, Meta};
use super::driver::Progress;
use super::journal::{self, Header, Journal, StepRecord, Trail};
use super::metrics::moving_average;
use super::step::Trainer;
use super::weights::WeightFile;
use crate::files::FileError;
use crate::text::Feed;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A state of a run.
#[derive(Debug)]
pub struct Standing {
    /// The checkpoint.
    pub file: WeightFile,
    /// What it holds besides tensors.
    pub meta: Meta,
    /// The steps behind it.
    pub trail: Trail,
    /// Whether the folder of the checkpoint has a journal.
    pub journal: bool,
}

impl Standing {
    /// The newest state in a folder; nothing where there is no checkpoint.
    ///
    /// # Errors
    /// A folder that cannot be read, a damaged checkpoint, or a journal of another run.
    pub fn newest(folder: &Path) -> Result<Option<Standing>, TrainError> {
        checkpoint::latest(folder)?.map(|path| Standing::behind(folder, &path)).transpose()
    }

    /// The state of a run behind `step` steps.
    ///
    /// # Errors
    /// As for [`Standing::newest`], or when the folder does not lead to that step.
    pub fn at(folder: &Path, step: u64) -> Result<Standing, TrainError> {
        let mut reached = None;
        for from in checkpoint::steps(folder)?.into_iter().rev().filter(|&s| s <= step) {
            let mut found = Standing::behind(folder, &checkpoint::path_of(folder, from))?;
            let end = found.progress().step;
            if end >= step {
                found.cut(step);
                return Ok(found);
            }
            reached = reached.max(Some(end));
        }
        let path = folder.join(journal::NAME);
        let reason = match reached {
            Some(n) => format!("found steps up to {n}, expected {step}; name a step that the run has"),
            None => format!("the folder has no checkpoint behind {step} steps or fewer; name a later step"),
        };
        Err(TrainError::Journal { path, reason, damaged: false })
    }

    /// The checkpoint of `step` steps and everything behind it.
    ///
    /// # Errors
    /// As for [`Standing::newest`], or when there is no such checkpoint.
    pub fn whole(folder: &Path, step: u64) -> Result<Standing, TrainError> {
        Standing::behind(folder, &checkpoint::path_of(folder, step))
    }

    /// A checkpoint alone.
    ///
    /// # Errors
    /// A file that cannot be read or is no checkpoint.
    pub fn alone(path: &Path) -> Result<Standing, TrainError> {
        let file = WeightFile::open(path)?;
        let reason = "the file is no checkpoint, so no run can be resumed from it";
        let meta = checkpoint::meta(&file)?
            .ok_or_else(|| TrainError::Weights { path: path.to_path_buf(), reason: reason.into() })?;
        Ok(Standing { file, meta, trail: Trail::default(), journal: false })
    }

    fn behind(folder: &Path, path: &Path) -> Result<Standing, TrainError> {
        let mut found = Standing::alone(path)?;
        let path = folder.join(journal::NAME);
        let Some(bytes) = bytes_of(&path)? else { return Ok(found) };
        let error = |reason: String| TrainError::Journal { path: path.clone(), reason, damaged: true };
        let (header, items) = journal::read(&bytes)
            .map_err(|e| error(format!("{e}; without the file the run goes on from its newest checkpoint")))?;
        let (meta, p) = (&found.meta, &found.meta.progress);
        if header != Header::new(header.from, &meta.config, &meta.data) {
            return Err(error("the journal is that of another run; move it out of the folder".into()));
        }
        found.trail = journal::trail(items, p.step, p.rollbacks);
        found.journal = true;
        Ok(found)
    }

    /// Forgets what lies behind `step`, which the standing reaches.
    fn cut(&mut self, step: u64) {
        let from = self.meta.progress;
        self.trail.steps.truncate((step - from.step) as usize);
        self.trail.rollback = self.trail.rollback.filter(|r| r.to < step);
        self.trail.rollbacks = self.trail.steps.last().map_or(from.rollbacks, |s| s.rollbacks);
    }

    /// How far the run is.
    pub fn progress(&self) -> Progress {
        let mut at = self.meta.progress;
        for s in &self.trail.steps {
            let ema = moving_average(at.ema, s.loss);
            let lowest = Some(at.lowest.map_or(ema, |low| low.min(ema)));
            let (step, position, seconds, rollbacks, stage) = (s.step, s.position, s.seconds, s.rollbacks, s.stage);
            at = Progress { step, position, ema: Some(ema), lowest, seconds, rollbacks, stage };
        }
        if let Some(r) = self.trail.rollback.filter(|r| r.to == at.step) {
            (at.position, at.rollbacks) = (r.position, r.rollbacks);
        }
        at
    }

    /// Sets weights and optimizer memory: those of the checkpoint, then one update for each step of the trail. Gradients that steps
    /// follow are computed again from `data`, and must be those of the journal. Returns the tensors of the checkpoint that nothing reads.
    ///
    /// # Errors
    /// A checkpoint or a journal of another plan, damage, steps that need data where there are none, or a failure to execute.
    pub fn restore(&self, trainer: &mut Trainer, data: Option<&dyn Feed>) -> Result<Vec<String>, TrainError> {
        let unused = trainer.restore(&self.file, self.meta.progress.stage)?;
        for s in &self.trail.steps {
            trainer.enter(s.stage)?;
            if trainer.needs_data() {
                self.differentiate(trainer, s, data)?;
            }
            trainer.apply(s.step - 1, s.lr, &s.c, &s.loads)?;
        }
        Ok(unused)
    }

    /// Leaves the gradient of a recorded step.
    fn differentiate(&self, trainer: &mut Trainer, s: &StepRecord, data: Option<&dyn Feed>) -> Result<(), TrainError> {
        let error = |reason| TrainError::Journal { path: self.file.path().to_path_buf(), reason, damaged: false };
        let data = data.ok_or_else(|| {
            error(format!(
                "step {} behind this checkpoint goes along a gradient, which only the data of the run give again; name the step of a checkpoint, or go on by `train --resume`",
                s.step
            ))
        })?;
        let (rows, tokens) = trainer.shape();
        let begin = s.position.checked_sub((rows * tokens) as u64);
        let begin = begin.ok_or_else(|| error(format!("step {} is recorded with a batch of another size", s.step)))?;
        let (batch, _) = data.next(begin, rows, tokens);
        if trainer.is_hybrid() {
            let (norm, recorded) = (trainer.head_gradient(&batch, s.step - 1)?, s.c.last().copied());
            if recorded.map(f32::to_bits) == Some(norm.to_bits()) {
                return Ok(());
            }
            return Err(error(format!(
                "step {} has a gradient of the head of norm {norm} when it is computed again, the journal has {recorded:?}; resume with the program and the kind of processor that wrote it, or from a checkpoint without the journal",
                s.step
            )));
        }
        let again = trainer.probe(&batch, s.step - 1)?;
        if again.loss.to_bits() == s.loss.to_bits() && again.c.first() == s.c.first() && again.loads == s.loads {
            return Ok(());
        }
        Err(error(format!(
            "step {} has the loss {} when it is computed again, the journal has {}; resume with the program and the kind of processor that wrote it, or from a checkpoint without the journal",
            s.step, again.loss, s.loss
        )))
    }

    /// The journal to go on with in `folder`: that of this standing where it lies there, else a new one.
    ///
    /// # Errors
    /// When it cannot be written, or another process writes it.
    pub fn continue_in(&self, folder: &Path) -> Result<Journal, TrainError> {
        let beside = self.file.path().parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf);
        let same = match (fs::canonicalize(&beside), fs::canonicalize(folder)) {
            (Ok(a), Ok(b)) => a == b,
            _ => false,
        };
        match self.journal && same {
            true => Journal::resume(folder, &self.trail),
            false => Journal::create(folder, &Header::new(self.progress().step, &self.meta.config, &self.meta.data)),
        }
    }
}

/// The bytes of a journal, if there is one.
fn bytes_of(path: &Path) -> Result<Option<Vec<u8>>, TrainError> {
    if fs::metadata(path).is_ok_and(|m| !m.is_file()) {
        return Ok(None);
    }
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(FileError::io(path, "read", e).into()),
    }
}
