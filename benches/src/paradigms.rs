//! What paradigms of training are worth: the figures of `chimera-run train --benchmark` as rows.
//!
//! The command beside this one measures; whoever builds both has the same figures from both.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use chimera_runtime::text::corpus;
use serde_json::Value;

use crate::measure::Setup;
use crate::row::Row;

/// Seconds of a run.
const QUICK: u64 = 3;
const FULL: u64 = 60;
/// What is trained: wide initial weights, from which probes learn within minutes.
const MODEL: [&str; 6] = ["--scale", "nano", "--set", "initializer_range=0.05", "--vocab", "bytes"];

/// The command, which is built into the same folder.
pub fn command() -> Result<PathBuf> {
    let own = std::env::current_exe().context("where this program lies is not known")?;
    let path = own.with_file_name(format!("chimera-run{}", std::env::consts::EXE_SUFFIX));
    ensure!(path.is_file(), "{} is not there; build it by: cargo build --release -p chimera-runtime", path.display());
    Ok(path)
}

/// The embedded corpus as lines of JSON.
pub fn write_corpus(path: &Path) -> Result<()> {
    let lines: Vec<String> = corpus::documents().iter().map(|d| serde_json::json!({ "text": d }).to_string()).collect();
    std::fs::write(path, lines.join("\n")).context("cannot write the corpus")
}

/// Rows of the JSON of a benchmark.
fn rows(value: &Value, threads: usize) -> Result<Vec<Row>> {
    let unit = value["unit"].as_str().context("the benchmark says no unit")?;
    let mut out = vec![];
    for row in value["paradigms"].as_array().context("the benchmark has no paradigms")? {
        let name = row["paradigm"].as_str().context("a paradigm has no name")?;
        let number = |key: &str| row[key].as_f64();
        let mut put = |id: String, value: Option<f64>, unit: &str, peer: Option<f64>| {
            if let Some(value) = value {
                let ratio = peer.map(|peer| value / peer);
                out.push(Row { peer, ratio, ..Row::plain(id, value, unit.to_owned(), threads) });
            }
        };
        let rate = number("data_tokens_per_second");
        put(format!("paradigm.{name}"), rate, "data token/s", number("data_tokens_per_second_without"));
        put(format!("paradigm.{name}.loss"), number("held_out"), unit, number("held_out_without"));
    }
    Ok(out)
}

/// Measure every paradigm, on the embedded corpus.
///
/// # Errors
/// When the command is not there or fails.
pub fn run(setup: &Setup, quick: bool, progress: &mut dyn FnMut(&str)) -> Result<Vec<Row>> {
    ensure!(
        !setup.processor_time,
        "runs of the same time have no processor time of their own; leave --processor-time out"
    );
    let command = command()?;
    let folder = tempfile::tempdir().context("cannot make a folder")?;
    let data = folder.path().join("corpus.jsonl");
    write_corpus(&data)?;
    let seconds = if quick { QUICK } else { FULL };
    progress(&format!("every paradigm, {seconds} s each"));
    let output = Command::new(&command)
        .args(["train", "--benchmark", "--json", "--quiet", "--cache", "off"])
        .args(MODEL)
        .args(["--threads", &setup.threads.to_string(), "--target", &setup.target.to_string()])
        .args(["--seconds", &seconds.to_string()])
        .arg("--data")
        .arg(&data)
        .arg("--out")
        .arg(folder.path().join("runs"))
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", command.display()))?;
    ensure!(output.status.success(), "{} ended with {}", command.display(), output.status);
    rows(&serde_json::from_slice(&output.stdout).context("the benchmark is no JSON")?, setup.threads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_the_figures_of_the_benchmark() {
        let value = serde_json::json!({ "unit": "bits/byte", "paradigms": [
            { "paradigm": "packing", "data_tokens_per_second": 30.0, "data_tokens_per_second_without": 20.0,
              "held_out": 4.0, "held_out_without": 5.0 },
            { "paradigm": "all", "data_tokens_per_second": null },
        ] });
        let found = rows(&value, 2).expect("rows");
        let flat: Vec<_> = found.iter().map(|r| (r.id.as_str(), r.value, r.peer, r.ratio)).collect();
        assert_eq!(
            flat,
            [("paradigm.packing", 30.0, Some(20.0), Some(1.5)), ("paradigm.packing.loss", 4.0, Some(5.0), Some(0.8)),]
        );
        assert!(rows(&serde_json::json!({}), 1).is_err());
    }
}
