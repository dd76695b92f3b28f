//! Peers outside of this process: PyTorch and llama.cpp, measured by scripts in `peers/` in the same run.
//!
//! A peer that is not installed is named on stderr and has no rows.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::measure::Setup;
use crate::row::Row;

/// Scripts and the suites that they belong to.
const SCRIPTS: [(&str, &str); 4] = [
    ("kernels", "torch_products.py"),
    ("model", "torch_dual_forward.py"),
    ("model", "llama_dense.py"),
    ("train", "torch_steps.py"),
];

/// A line of a script: a figure, or why there is none.
#[derive(Debug, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Line {
    Figure {
        id: String,
        value: f64,
        unit: String,
        /// The row of ours that it stands beside.
        beside: String,
    },
    Missing {
        missing: String,
    },
}

/// Where a script lies.
pub fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("peers").join(name)
}

/// Run the scripts of a suite: their figures become rows, and the peers of ours.
///
/// # Errors
/// When Python is absent, or a script fails.
pub fn add(
    rows: &mut Vec<Row>,
    suite: &str,
    python: &Path,
    setup: &Setup,
    quick: bool,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    for (_, script) in SCRIPTS.iter().filter(|s| s.0 == suite) {
        progress(script);
        let path = self::script(script);
        let mut command = Command::new(python);
        command.arg("-B").arg(&path).args(["--threads", &setup.threads.to_string()]).stderr(Stdio::inherit());
        if quick {
            command.arg("--quick");
        }
        let out = command.output().with_context(|| format!("cannot start {}", python.display()))?;
        ensure!(out.status.success(), "{script} failed: {}", out.status);
        for line in String::from_utf8(out.stdout).with_context(|| format!("{script} wrote no text"))?.lines() {
            match serde_json::from_str(line).with_context(|| format!("{script} wrote {line:?}"))? {
                Line::Missing { missing } => eprintln!("{script}: {missing}"),
                Line::Figure { id, value, unit, beside } => {
                    place(rows, Row::plain(id, value, unit, setup.threads), &beside)
                }
            }
        }
    }
    Ok(())
}

/// Append a figure, and compare the row beside it if it has the same unit and no peer.
fn place(rows: &mut Vec<Row>, figure: Row, beside: &str) {
    let ours = rows.iter_mut().find(|r| r.id == beside && r.unit == figure.unit && r.peer.is_none());
    if let Some(ours) = ours {
        (ours.peer, ours.ratio) = (Some(figure.value), Some(ours.value / figure.value));
    }
    rows.push(figure);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_stand_beside_ours() {
        let mut rows = vec![Row::plain("a", 6.0, "GB/s", 1), Row::plain("b", 6.0, "token/s", 1)];
        place(&mut rows, Row::plain("x.a", 2.0, "GB/s", 1), "a");
        place(&mut rows, Row::plain("x.b", 2.0, "GB/s", 1), "b");
        place(&mut rows, Row::plain("y.a", 3.0, "GB/s", 1), "a");
        assert_eq!((rows[0].peer, rows[0].ratio), (Some(2.0), Some(3.0)));
        assert_eq!((rows[1].peer, rows.len()), (None, 5));
    }

    #[test]
    fn lines_are_figures_or_reasons() {
        let figure = r#"{"id": "x", "value": 1.5, "unit": "GB/s", "beside": "y"}"#;
        assert!(matches!(serde_json::from_str(figure), Ok(Line::Figure { value: 1.5, .. })));
        assert!(matches!(serde_json::from_str(r#"{"missing": "no torch"}"#), Ok(Line::Missing { .. })));
        assert!(serde_json::from_str::<Line>(r#"{"id": "x"}"#).is_err());
    }
}
