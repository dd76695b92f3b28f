//! How soon AdamW is where PyTorch gets in a given time: nano on bytes of the embedded corpus, the same held-out documents.
//!
//! Both have the seconds of a run for warm-up and cosine; ours has a fifth of the peer's. Measuring is not counted as training.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use chimera_runtime::text::{self, Cache, DataSpec, Reading, TokenStream, Vocab};
use serde_json::Value;

use crate::measure::Setup;
use crate::outside::script;
use crate::paradigms::{command, write_corpus};
use crate::row::Row;

/// Seconds that the peer has.
const QUICK: u64 = 40;
const FULL: u64 = 600;
/// Our share of them.
const SHARE: u64 = 5;
/// What `chimera-run train` holds out unless told otherwise.
const HELD_OUT: f64 = 0.05;

/// Seconds of training, and the loss on held-out text in bits per byte.
type Point = (f64, f64);

/// Tokens of a stream as numbers of 16 bits.
fn write_tokens<'a>(path: &Path, streams: impl Iterator<Item = &'a TokenStream>) -> Result<()> {
    let bytes: Vec<u8> = streams.flat_map(TokenStream::tokens).flat_map(|id| (id as u16).to_le_bytes()).collect();
    std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// The points of lines of JSON that have both numbers.
fn points(lines: &str, [seconds, bits]: [&str; 2]) -> Vec<Point> {
    let values = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    values.filter_map(|v| Some((v[seconds].as_f64()?, v[bits].as_f64()?))).collect()
}

/// When a curve is at `bits` or below, between its points by a line; `None` if never.
fn reached(curve: &[Point], bits: f64) -> Option<f64> {
    let at = curve.iter().position(|p| p.1 <= bits)?;
    let (t, b) = curve[at];
    let Some(&(t0, b0)) = at.checked_sub(1).map(|before| &curve[before]) else { return Some(t) };
    Some(t0 + (t - t0) * ((b0 - bits) / (b0 - b)))
}

fn peer(python: &Path, folder: &Path, seconds: u64, setup: &Setup) -> Result<Vec<Point>> {
    let vocab = Vocab::bytes();
    let data = [DataSpec { path: folder.join("corpus.jsonl"), weight: 1.0 }];
    let reading = Reading { field: None, binary: false };
    let tokens = text::tokenise(&vocab, &data, &reading, &Cache::Off, &mut |_, _| {})?;
    let split = text::split(&tokens, HELD_OUT, vocab.end_of_document())?;
    let [train, held] = ["train.u16", "held.u16"].map(|name| folder.join(name));
    write_tokens(&train, split.train.iter().map(|(_, stream)| stream))?;
    write_tokens(&held, std::iter::once(&split.validation))?;
    let mut run = Command::new(python);
    run.arg("-B").arg(script("torch_curve.py")).args(["--threads", &setup.threads.to_string()]);
    run.args(["--seconds", &seconds.to_string()]).arg("--train").arg(&train).arg("--held").arg(&held);
    let out = run.stderr(Stdio::inherit()).output().with_context(|| format!("cannot start {}", python.display()))?;
    ensure!(out.status.success(), "torch_curve.py failed: {}", out.status);
    let lines = String::from_utf8(out.stdout).context("torch_curve.py wrote no text")?;
    let missing = lines.lines().filter(|line| line.contains("missing"));
    missing.for_each(|line| eprintln!("torch_curve.py: {line}"));
    Ok(points(&lines, ["seconds", "bits_per_byte"]))
}

fn ours(folder: &Path, seconds: u64, setup: &Setup) -> Result<Vec<Point>> {
    let (command, out) = (command()?, folder.join("run"));
    let every = format!("{}s", (seconds / 12).max(1));
    let status = Command::new(&command)
        .args(["train", "--quiet", "--scale", "nano", "--vocab", "bytes", "--estimator", "adamw", "--cache", "off"])
        .args(["--seconds", &seconds.to_string(), "--val-every", &every, "--val-tokens", "8192"])
        .args(["--threads", &setup.threads.to_string(), "--target", &setup.target.to_string()])
        .arg("--data")
        .arg(folder.join("corpus.jsonl"))
        .arg("--out")
        .arg(&out)
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .status()
        .with_context(|| format!("cannot start {}", command.display()))?;
    ensure!(status.success(), "{} ended with {status}", command.display());
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).context("the run left no metrics")?;
    Ok(points(&metrics, ["seconds", "val_bits_per_byte"]))
}

/// Both curves, and the time in which we reach the peer's last loss; `value / peer` of it is our share of the peer's time.
///
/// # Errors
/// When the command is not there, or a run fails.
pub fn run(setup: &Setup, quick: bool, python: Option<&PathBuf>, progress: &mut dyn FnMut(&str)) -> Result<Vec<Row>> {
    ensure!(!setup.processor_time, "seconds of a run are those of the clock; leave --processor-time out");
    let seconds = if quick { QUICK } else { FULL };
    let folder = tempfile::tempdir().context("cannot make a folder")?;
    write_corpus(&folder.path().join("corpus.jsonl"))?;
    let theirs = match python {
        Some(python) => {
            progress(&format!("PyTorch, {seconds} s"));
            peer(python, folder.path(), seconds, setup)?
        }
        None => vec![],
    };
    progress(&format!("chimera-run, {} s", seconds / SHARE));
    let ours = ours(folder.path(), seconds / SHARE, setup)?;
    let mut rows = vec![];
    for (name, curve) in [("curve.adamw.nano", &ours), ("torch.curve.adamw.nano", &theirs)] {
        let row = |&(at, bits): &Point| Row::plain(format!("{name}.{at:.0}s"), bits, "bits/byte", setup.threads);
        rows.extend(curve.iter().map(row));
    }
    if let Some(&(spent, bits)) = theirs.last() {
        match reached(&ours, bits) {
            Some(at) => rows.push(Row {
                peer: Some(spent),
                ratio: Some(at / spent),
                ..Row::plain("time_to_loss.nano".to_owned(), at, "s", setup.threads)
            }),
            None => eprintln!("{bits:.3} bits/byte were not reached in {} s", seconds / SHARE),
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_reached_between_points() {
        let curve = [(1.0, 5.0), (3.0, 4.0), (4.0, 4.5), (9.0, 3.0)];
        assert_eq!(reached(&curve, 4.5), Some(2.0));
        assert_eq!((reached(&curve, 6.0), reached(&curve, 3.0), reached(&curve, 2.9)), (Some(1.0), Some(9.0), None));
        let lines = "{\"a\": 1, \"b\": 2.5}\nno\n{\"a\": 1}\n";
        assert_eq!(points(lines, ["a", "b"]), [(1.0, 2.5)]);
    }
}
