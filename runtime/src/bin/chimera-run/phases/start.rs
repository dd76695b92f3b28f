//! The weights that a run starts from, by `--from`.
//!
//! Invariant: weights of another architecture are refused before anything is written.

use super::{Phase, PhaseArgs};
use crate::model::{Model, Source};
use crate::options::Failure;
use chimera_frontends::config::{self, Overrides};
use chimera_runtime::text::{Vocab, VocabSpec};
use chimera_runtime::train::checkpoint;
use chimera_runtime::train::weights::WeightFile;
use serde_json::Value;

/// Weights to start from.
#[derive(Debug)]
pub struct Start {
    /// The file.
    pub file: WeightFile,
    /// The vocabulary that it brings.
    pub vocab: Option<Vocab>,
}

impl Start {
    /// Opens what `--from` names, if anything.
    ///
    /// # Errors
    /// A folder without a checkpoint, or a file that cannot be read.
    pub fn open(args: &PhaseArgs) -> Result<Option<Start>, Failure> {
        let Some(path) = &args.from else { return Ok(None) };
        let newest = match path.is_dir() {
            true => checkpoint::latest(path)?.ok_or_else(|| {
                Failure::new(format!("{}: the folder has no checkpoint to start from", path.display()))
            })?,
            false => path.clone(),
        };
        let file = WeightFile::open(&newest)?;
        let vocab = file.metadata().get("vocab").map(|text| Vocab::from_text(text)).transpose()?;
        Ok(Some(Start { file, vocab }))
    }
}

/// Refuses weights of another architecture than that of the model, and a model that has weights itself.
///
/// # Errors
/// The first key of the configurations that differs.
pub fn same_architecture(start: &Start, model: &Model) -> Result<(), Failure> {
    let path = start.file.path().display();
    if let Source::Weights(own) = &model.source {
        return Err(Failure::usage(format!(
            "--from {path}: the model {} has weights itself; name its configuration, or leave --from out",
            own.path().display()
        )));
    }
    let Some(text) = start.file.metadata().get("config") else { return Ok(()) };
    let theirs = config::from_text(&path.to_string(), text, &Overrides::default())?.model.to_json();
    match difference(&theirs, &model.config.to_json(), "") {
        None => Ok(()),
        Some((key, found, wanted)) => Err(Failure::config(format!(
            "--from {path}: the checkpoint has another architecture: its {key} is {found}, that of the configuration {wanted}; name the configuration that it was trained with"
        ))),
    }
}

/// The first key whose values differ; how texts are generated is no part of an architecture.
fn difference(a: &Value, b: &Value, path: &str) -> Option<(String, String, String)> {
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            let keys = x.keys().chain(y.keys().filter(|k| !x.contains_key(*k)));
            keys.filter(|k| !(path.is_empty() && *k == "generation")).find_map(|key| {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let of = |map: &serde_json::Map<String, Value>| map.get(key).cloned().unwrap_or_default();
                difference(&of(x), &of(y), &path)
            })
        }
        _ if a == b => None,
        _ => Some((path.to_owned(), a.to_string(), b.to_string())),
    }
}

/// The vocabulary of a new model for a phase whose data are no plain text.
///
/// # Errors
/// A vocabulary that would have to be counted, or one that cannot be read.
pub fn vocab_of(spec: &VocabSpec, phase: &Phase) -> Result<Vocab, Failure> {
    match spec {
        VocabSpec::Bytes => Ok(Vocab::bytes()),
        VocabSpec::O200k => Ok(Vocab::o200k()),
        VocabSpec::File(path) => Ok(Vocab::load(path)?),
        VocabSpec::Restricted => Err(Failure::usage(format!(
            "--phase {} does not count a vocabulary; start from weights, which have one, by --from, or give --vocab bytes, o200k or a file",
            phase.word()
        ))),
    }
}
