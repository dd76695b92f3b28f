//! The folder of a training run: checkpoints that are complete or absent, newest by name.
//!
//! Invariant: a checkpoint holds everything that the next step depends on, so a resumed run has the bits of an uninterrupted one.
//! Files are replaced atomically; older checkpoints are removed only after a newer one is on disk.

use super::TrainError;
use super::carried;
use super::driver::Progress;
use super::paradigms::Stage;
use super::weights::WeightFile;
use crate::exec::Executable;
use crate::files::b158::{self, Encoding, Entry};
use chimera_ir::DType;
use chimera_ir::plan::{WeightDecl, WeightKind};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The kind and version of the metadata.
const FORMAT: &str = "chimera-checkpoint 1";
/// Keys of the metadata.
const KEYS: [&str; 6] = ["format", "config", "vocab", "options", "data", "progress"];

/// What a checkpoint holds besides tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Meta {
    /// Canonical JSON of the model configuration.
    pub config: String,
    /// The vocabulary, see [`crate::text::Vocab::to_text`].
    pub vocab: String,
    /// Options of the run as JSON, for whoever resumes it.
    pub options: String,
    /// What identifies the training data.
    pub data: String,
    /// How far the run is.
    pub progress: Progress,
}

/// The checkpoint behind `step` steps.
pub fn path_of(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("step-{step:08}.b158"))
}

/// The steps behind which there are checkpoints, ascending. A folder that does not exist has none.
///
/// # Errors
/// When the folder cannot be listed.
pub fn steps(folder: &Path) -> Result<Vec<u64>, TrainError> {
    let error = |source| TrainError::Io { path: Some(folder.to_path_buf()), source };
    let listing = match fs::read_dir(folder) {
        Ok(listing) => listing,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(error(e)),
    };
    let mut steps = vec![];
    for entry in listing {
        let name = entry.map_err(error)?.file_name();
        let number = name.to_str().and_then(|n| n.strip_prefix("step-")?.strip_suffix(".b158"));
        steps.extend(number.and_then(|n| n.parse::<u64>().ok()));
    }
    steps.sort_unstable();
    Ok(steps)
}

/// The newest checkpoint of a folder.
///
/// # Errors
/// When the folder cannot be listed.
pub fn latest(folder: &Path) -> Result<Option<PathBuf>, TrainError> {
    Ok(steps(folder)?.last().map(|&step| path_of(folder, step)))
}

/// Writes the checkpoint of `meta.progress.step` and removes all but the oldest, with which the journal begins, and the newest `keep`.
///
/// # Errors
/// When it cannot be written; the checkpoints that were there are then unchanged.
pub fn save(folder: &Path, exec: &Executable, meta: &Meta, keep: usize) -> Result<PathBuf, TrainError> {
    fs::create_dir_all(folder).map_err(|source| TrainError::Io { path: Some(folder.to_path_buf()), source })?;
    let path = path_of(folder, meta.progress.step);
    write(&path, exec, meta)?;
    let steps = steps(folder)?;
    for step in steps.get(1..steps.len().saturating_sub(keep.max(1))).unwrap_or_default() {
        let old = path_of(folder, *step);
        if old != path {
            fs::remove_file(&old).map_err(|source| TrainError::Io { path: Some(old), source })?;
        }
    }
    Ok(path)
}

/// Writes a checkpoint to any place.
///
/// # Errors
/// When it cannot be written; a file that was there is then unchanged.
pub fn write(path: &Path, exec: &Executable, meta: &Meta) -> Result<(), TrainError> {
    let weights = &exec.plan().weights;
    let floats = |w: &WeightDecl| match w.ty.dtype.size() {
        1 => Ok(Cow::default()),
        _ => exec.weight_f32(&w.name),
    };
    let values: Vec<Cow<'_, [f32]>> = weights.iter().map(floats).collect::<Result<_, _>>()?;
    let states = carried::states(exec)?;
    let mut tensors: Vec<Entry<'_>> = vec![];
    for (w, values) in weights.iter().zip(&values) {
        let stored = |encoding| Ok(Entry::stored(&w.name, encoding, &w.ty.dims, exec.weight_bytes(&w.name)?));
        tensors.push(match w.ty.dtype {
            DType::I8 => stored(Encoding::I8),
            DType::U8 => stored(Encoding::U8),
            _ => Ok::<_, TrainError>(Entry::f32(&w.name, &w.ty.dims, values)),
        }?);
    }
    tensors
        .extend(states.iter().map(|(name, bytes)| Entry::stored(name, Encoding::I32, &[bytes.len() / 4], &bytes[..])));
    let p = &meta.progress;
    let progress = json!({
        "step": p.step, "position": p.position, "ema": p.ema, "lowest": p.lowest, "seconds": p.seconds, "rollbacks": p.rollbacks,
        "stage": p.stage.code()
    });
    let progress = progress.to_string();
    let values = [FORMAT, &meta.config, &meta.vocab, &meta.options, &meta.data, &progress];
    let metadata: BTreeMap<String, String> = KEYS.iter().zip(values).map(|(k, v)| ((*k).into(), v.into())).collect();
    Ok(b158::write(path, &tensors, &metadata)?)
}

/// The metadata of a weight file if it is a checkpoint; `None` for weights of another origin.
///
/// # Errors
/// A checkpoint whose metadata are incomplete.
pub fn meta(file: &WeightFile) -> Result<Option<Meta>, TrainError> {
    let bad = |reason: String| TrainError::Checkpoint { path: file.path().to_path_buf(), reason };
    let metadata = file.metadata();
    match metadata.get(KEYS[0]) {
        None => return Ok(None),
        Some(format) if format != FORMAT => {
            return Err(bad(format!(
                "found a checkpoint of format {format:?}, expected {FORMAT:?}; use the program that wrote it"
            )));
        }
        Some(_) => {}
    }
    let text = |key: &str| {
        metadata.get(key).cloned().ok_or_else(|| bad(format!("the metadata have no `{key}`; the file is damaged")))
    };
    let progress: Value = serde_json::from_str(&text("progress")?).unwrap_or_default();
    let number = |key: &str| progress.get(key).and_then(Value::as_u64);
    let (Some(step), Some(position)) = (number("step"), number("position")) else {
        return Err(bad("the progress has no numbers `step` and `position`; the file is damaged".into()));
    };
    let float = |key: &str| progress.get(key).and_then(Value::as_f64);
    let rollbacks = number("rollbacks").and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
    let (ema, lowest, seconds) = (float("ema"), float("lowest"), float("seconds").unwrap_or(0.0));
    let stage = Stage::of_code(number("stage").unwrap_or(0))
        .ok_or_else(|| bad("the progress has a `stage` that no run comes to; the file is damaged".into()))?;
    let progress = Progress { step, position, ema, lowest, seconds, rollbacks, stage };
    Ok(Some(Meta {
        config: text("config")?,
        vocab: text("vocab")?,
        options: text("options")?,
        data: text("data")?,
        progress,
    }))
}

/// Sets weights, optimizer memory and carried states of `exec` from a checkpoint. Returns the names of the tensors that nothing reads.
///
/// # Errors
/// As for [`WeightFile::assign`].
pub fn restore(file: &WeightFile, exec: &mut Executable) -> Result<Vec<String>, TrainError> {
    let optimizer = exec.plan().weights.iter().any(|w| w.kind == WeightKind::Optimizer);
    carried::restore(file, exec)?;
    file.assign(exec, optimizer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::ExecOptions;
    use chimera_ir::Type;
    use chimera_ir::plan::{BufferDecl, Place, Plan};

    fn executable() -> Executable {
        let kinds =
            [("a.weight", WeightKind::Ternary), ("b", WeightKind::Vector), ("optim.momentum.b", WeightKind::Optimizer)];
        let ty = Type::f32(&[2, 3]);
        let weight = |(name, kind): (&str, WeightKind)| WeightDecl { name: name.into(), ty: ty.clone(), kind };
        let buffer = |i: u32| BufferDecl { ty: ty.clone(), place: Place::Weight(i), name: format!("w{i}") };
        let plan = Plan { weights: kinds.map(weight).into(), buffers: (0..3).map(buffer).collect(), ..Plan::default() };
        Executable::new(plan, &ExecOptions { threads: 1, ..ExecOptions::default() }).expect("a plan of weights alone")
    }

    fn some_meta(step: u64) -> Meta {
        let (ema, lowest, stage) = (Some(0.1 + 0.2), Some(0.1), Stage { length: 2, thaw: 1 });
        let progress = Progress { step, position: 7 * step, ema, lowest, seconds: 1.5, rollbacks: 2, stage };
        let text = |s: &str| s.to_owned();
        Meta { config: text("{}"), vocab: text("v"), options: text("{\"lr\":0.1}"), data: text("d"), progress }
    }

    fn fill(exec: &mut Executable, x: f32) {
        for (i, name) in ["a.weight", "b", "optim.momentum.b"].into_iter().enumerate() {
            let values: Vec<f32> = (0..6).map(|j| x + i as f32 + 0.1 * j as f32).collect();
            exec.set_weight(name, &[2, 3], &values).expect("weight");
        }
    }

    #[test]
    fn a_checkpoint_gives_back_what_was_saved() {
        let folder = tempfile::tempdir().expect("folder");
        let at = folder.path().join("new/run");
        let (mut exec, mut other) = (executable(), executable());
        assert_eq!(latest(&at).expect("no folder, no checkpoint"), None);
        fill(&mut exec, 1.0);
        for step in [3, 10, 20] {
            save(&at, &exec, &some_meta(step), 2).expect("saved");
        }
        assert_eq!(steps(&at).expect("listed"), [3, 10, 20], "the oldest stays");
        save(&at, &exec, &some_meta(21), 1).expect("saved");
        assert_eq!(steps(&at).expect("listed"), [3, 21]);
        fs::remove_file(path_of(&at, 21)).expect("removed");
        save(&at, &exec, &some_meta(20), 1).expect("saved");
        let path = latest(&at).expect("listed").expect("there is one");
        assert!(path.ends_with("step-00000020.b158"), "{path:?}");
        let file = WeightFile::open(&path).expect("opened");
        assert_eq!(meta(&file).expect("metadata"), Some(some_meta(20)));
        restore(&file, &mut other).expect("restored");
        for name in ["a.weight", "b", "optim.momentum.b"] {
            assert_eq!(other.weight::<f32>(name).expect("set"), exec.weight::<f32>(name).expect("set"), "{name}");
        }
    }

    #[test]
    fn a_failed_save_leaves_the_old_checkpoint() {
        let folder = tempfile::tempdir().expect("folder");
        let mut exec = executable();
        fill(&mut exec, 1.0);
        let path = save(folder.path(), &exec, &some_meta(4), 1).expect("saved");
        let before = fs::read(&path).expect("read");
        // A folder in the way of the next checkpoint stands for every failure to write it.
        fs::create_dir(path_of(folder.path(), 5)).expect("folder");
        assert!(save(folder.path(), &exec, &some_meta(5), 1).is_err());
        assert_eq!(fs::read(&path).expect("read"), before);
    }

    #[test]
    fn weights_of_another_model_are_refused() {
        let folder = tempfile::tempdir().expect("folder");
        let (mut exec, path) = (executable(), folder.path().join("w.b158"));
        let (good, nan) = ([0.5f32; 6], [0.5, 0.5, 0.5, f32::NAN, 0.5, f32::INFINITY]);
        let mut check = |tensors: &[(&str, [usize; 2], &[f32])], code: u8, what: &str| {
            let tensors: Vec<Entry<'_>> = tensors.iter().map(|(n, dims, v)| Entry::f32(n, dims, v)).collect();
            b158::write(&path, &tensors, &BTreeMap::new()).expect("written");
            let file = WeightFile::open(&path).expect("opened");
            assert_eq!(meta(&file).expect("no metadata"), None);
            let error = file.assign(&mut exec, false).expect_err(what);
            assert_eq!(error.exit_code(), code, "{error}");
            assert!(error.to_string().contains(what), "{error}");
        };
        check(&[("a.weight", [2, 3], &good)], 1, "1 of 2 weights are missing: `b`;");
        let near = "weights are missing: `a.weight`; the file has `a.weigth`, which nothing reads";
        check(&[("a.weigth", [2, 3], &good), ("b", [2, 3], &good)], 1, near);
        check(&[("a.weight", [2, 3], &good), ("b", [3, 2], &good)], 1, "`b` has shape [3, 2], expected [2, 3]");
        check(&[("a.weight", [2, 3], &good), ("b", [2, 3], &nan)], 5, "`b` has the value NaN at element 3");
    }

    #[test]
    fn tensors_that_nothing_reads_are_reported() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("w.b158");
        let names = ["a.weight", "b", "c", "optim.momentum.b", "optim.momentum.d"];
        let tensors: Vec<Entry<'_>> = names.iter().map(|n| Entry::f32(n, &[2, 3], &[0.5; 6])).collect();
        b158::write(&path, &tensors, &BTreeMap::new()).expect("written");
        let unused = WeightFile::open(&path).expect("opened").assign(&mut executable(), false).expect("all is there");
        assert_eq!(unused, ["c"]);
    }
}
