//! Writing results: to stdout, and to files that are replaced as a whole.
//!
//! An error leaves the file that was there before as it was.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::options::Failure;

/// Write text to stdout.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Write a value to stdout as indented JSON.
pub(crate) fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Failure::new(format!("cannot write JSON: {e}")))?;
    print(&(text + "\n"))
}

/// Write to stderr, where losing a line is no failure.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Replace the contents of `path`. A device or pipe is written directly.
pub(crate) fn replace(path: &Path, contents: &[u8]) -> Result<(), Failure> {
    write(path, contents).map_err(|e| Failure::write(path, &e))
}

fn write(path: &Path, contents: &[u8]) -> io::Result<()> {
    let old = match fs::metadata(path) {
        Ok(old) => Some(old),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(e),
    };
    match &old {
        Some(old) if old.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
        Some(old) if !old.is_file() => return OpenOptions::new().write(true).open(path)?.write_all(contents),
        _ => {}
    }
    // A link keeps pointing at the file that is replaced.
    let target = if old.is_some() { fs::canonicalize(path)? } else { path.to_path_buf() };
    let partial = partial(&target)?;
    let written = fill(&partial, contents, old).and_then(|()| fs::rename(&partial, &target));
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written
}

/// A name next to `target` that no other process takes.
fn partial(target: &Path) -> io::Result<PathBuf> {
    let name = target.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    Ok(target.with_file_name(format!(".{}.{}.partial", name.to_string_lossy(), std::process::id())))
}

fn fill(partial: &Path, contents: &[u8], old: Option<fs::Metadata>) -> io::Result<()> {
    let mut file = File::create(partial)?;
    if let Some(old) = old {
        file.set_permissions(old.permissions())?;
    }
    file.write_all(contents)?;
    file.sync_all()
}
