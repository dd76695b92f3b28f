//! What happened to a run besides its steps, as JSON lines: begin and end, checkpoints, returns, texts.
//!
//! Invariant: lines are only ever added; one that is not whole is passed over by readers.

use super::TrainError;
use crate::files::FileError;
use serde_json::{Map, Value, json};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// The name of the file in the folder of a run.
pub const NAME: &str = "events.jsonl";

/// A history that is being written.
#[derive(Debug)]
pub struct History {
    path: PathBuf,
    file: File,
}

impl History {
    /// Opens the history in `folder`, which is made if need be.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn open(folder: &Path) -> Result<History, TrainError> {
        let path = folder.join(NAME);
        let error = |source| FileError::io(&path, "write", source);
        fs::create_dir_all(folder).map_err(error)?;
        // A line that a killed process left unfinished ends here.
        let is_file = fs::metadata(&path).is_ok_and(|m| m.is_file());
        let torn = is_file && fs::read(&path).is_ok_and(|old| old.last().is_some_and(|&b| b != b'\n'));
        let mut file = File::options().create(true).append(true).open(&path).map_err(error)?;
        if torn {
            file.write_all(b"\n").map_err(error)?;
        }
        Ok(History { path, file })
    }

    /// Adds what happened behind `step` steps: a word for its kind, a sentence, and further fields of a JSON object.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn add(&mut self, kind: &str, step: u64, sentence: &str, further: Value) -> Result<(), TrainError> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let mut line = Map::new();
        line.insert("event".into(), json!(kind));
        line.insert("step".into(), json!(step));
        line.insert("unix_seconds".into(), json!(now.as_secs()));
        line.insert("sentence".into(), json!(sentence));
        if let Value::Object(further) = further {
            line.extend(further);
        }
        let line = Value::Object(line).to_string() + "\n";
        Ok(self.file.write_all(line.as_bytes()).map_err(|source| FileError::io(&self.path, "write", source))?)
    }
}

/// The objects of a file of JSON lines in the folder of a run, which may be growing; none where there is no file.
///
/// # Errors
/// When the file cannot be read.
pub fn lines(folder: &Path, name: &str) -> Result<Vec<Value>, TrainError> {
    let path = folder.join(name);
    match fs::read(&path) {
        Ok(bytes) => Ok(bytes.split(|&b| b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(vec![]),
        Err(e) => Err(FileError::io(&path, "read", e).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_kept_and_torn_ones_passed_over() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(lines(folder.path(), NAME).expect("no file, no lines").is_empty());
        let mut history = History::open(folder.path()).expect("opened");
        history.add("start", 0, "begun", json!({ "n": 3 })).expect("written");
        history.file.write_all(b"{\"event\": \"sav").expect("half a line");
        let mut history = History::open(folder.path()).expect("opened");
        history.add("resume", 7, "went on", Value::Null).expect("written");
        let found = lines(folder.path(), NAME).expect("read");
        let kinds: Vec<_> = found.iter().map(|l| (l["event"].as_str(), l["step"].as_u64())).collect();
        assert_eq!(kinds, [(Some("start"), Some(0)), (Some("resume"), Some(7))]);
        assert_eq!((found[0]["n"].as_u64(), found[1]["sentence"].as_str()), (Some(3), Some("went on")));
    }
}
