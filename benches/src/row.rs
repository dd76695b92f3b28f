//! What a run reports: rows with stable identifiers, as a table for people and as JSON for programs.
//!
//! A share or a ratio compares figures of the same run only.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::machine;

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Stable identifier: what is measured, dot, its size.
    pub id: String,
    /// The figure.
    pub value: f64,
    /// Its unit.
    pub unit: Cow<'static, str>,
    /// Threads, the caller included.
    pub threads: usize,
    /// What the peaks of the same run would allow, in `unit`.
    pub peak: Option<f64>,
    /// `value / peak`.
    pub share: Option<f64>,
    /// The figure it is compared with, of the same run and in `unit`.
    pub peer: Option<f64>,
    /// `value / peer`.
    pub ratio: Option<f64>,
}

impl Row {
    /// A figure that is compared with nothing.
    pub fn plain(id: impl Into<String>, value: f64, unit: impl Into<Cow<'static, str>>, threads: usize) -> Row {
        Row { id: id.into(), value, unit: unit.into(), threads, peak: None, share: None, peer: None, ratio: None }
    }
}

/// Three significant digits, without an exponent where people read it.
fn short(x: f64) -> String {
    match x.abs() {
        a if a >= 100.0 => format!("{x:.0}"),
        a if a >= 10.0 => format!("{x:.1}"),
        a if a >= 1.0 || a == 0.0 => format!("{x:.2}"),
        _ => format!("{x:.4}"),
    }
}

/// The rows as a table.
pub fn table(rows: &[Row]) -> String {
    let width = rows.iter().map(|r| r.id.len()).max().unwrap_or(0);
    let cell = |x: Option<f64>| x.map_or(String::new(), short);
    let mut out = format!(
        "{:width$}  {:>10} {:16} {:>7} {:>10} {:>7} {:>10} {:>7}\n",
        "id", "value", "unit", "threads", "peak", "share", "peer", "ratio"
    );
    for r in rows {
        let share = r.share.map_or(String::new(), |s| format!("{:.1}%", 100.0 * s));
        let line = format!(
            "{:width$}  {:>10} {:16} {:>7} {:>10} {share:>7} {:>10} {:>7}",
            r.id,
            short(r.value),
            r.unit,
            r.threads,
            cell(r.peak),
            cell(r.peer),
            cell(r.ratio)
        );
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out
}

/// The rows as a JSON list with one row a line.
///
/// # Errors
/// When a figure is not a finite number.
pub fn json(rows: &[Row]) -> Result<String> {
    let lines: Vec<String> = rows
        .iter()
        .map(|r| {
            anyhow::ensure!(r.value.is_finite(), "{} is {}", r.id, r.value);
            Ok(serde_json::to_string(r)?)
        })
        .collect::<Result<_>>()?;
    Ok(format!("[\n{}\n]\n", lines.join(",\n")))
}

/// Write the rows with the machine and the command beside them into the folder of records; returns the file.
///
/// # Errors
/// When the file cannot be written.
pub fn record(suite: &str, threads: usize, target: &str, command: &str, rows: &[Row]) -> Result<PathBuf> {
    let cpu = machine::cpu_name();
    let slug: String = cpu.to_lowercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { ' ' }).collect();
    let slug = slug.split_whitespace().collect::<Vec<_>>().join("-");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("record");
    let path = folder.join(format!("{suite}-{slug}-{threads}t.json"));
    let head = serde_json::json!({
        "command": command,
        "cpu": cpu,
        "target": target,
        "threads": threads,
    });
    let head: Vec<String> = match head {
        serde_json::Value::Object(map) => map.iter().map(|(k, v)| format!("\"{k}\": {v},\n")).collect(),
        _ => vec![],
    };
    let text = format!("{{\n{}\"rows\": {}}}\n", head.concat(), json(rows)?);
    fs::create_dir_all(&folder)
        .and_then(|()| fs::write(&path, text))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}
