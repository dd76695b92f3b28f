//! Gathers the embedded corpus of `text::corpus` from the workspace's documents and library sources.
//!
//! The result depends on the tree alone: sorted paths, whole files, a fixed cap.
#![allow(clippy::print_stdout, reason = "a build script talks to cargo on stdout")]

use std::error::Error;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Most bytes of the corpus, separators included.
const CAP: usize = 600_000;
/// Sources of crates that this crate is built from, so that watching them causes no extra builds.
const FOLDERS: [&str; 5] = ["compiler/codegen/src", "compiler/src", "frontends/src", "ir/src", "runtime/src"];

fn main() -> Result<(), Box<dyn Error>> {
    let var = |name: &str| std::env::var_os(name).map(PathBuf::from).ok_or(format!("{name} is not set"));
    let here = var("CARGO_MANIFEST_DIR")?;
    let root = here.parent().ok_or("the crate lies at the root of the file system")?;
    println!("cargo:rerun-if-changed=build.rs");

    let mut files = entries(root)?;
    files.retain(|path| path.is_file() && has_extension(path, "md"));
    for path in &files {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    for folder in FOLDERS.map(|folder| root.join(folder)).iter().filter(|folder| folder.is_dir()) {
        println!("cargo:rerun-if-changed={}", folder.display());
        collect(folder, &mut files)?;
    }

    let mut texts = Vec::new();
    for path in &files {
        let text = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?.replace('\0', "");
        if !text.trim().is_empty() {
            texts.push(text);
        }
    }
    fs::write(var("OUT_DIR")?.join("corpus.txt"), thin(&texts).join("\0"))?;
    Ok(())
}

/// All texts if they fit, otherwise an even selection: each is taken if the share taken so far leaves room for it.
fn thin(texts: &[String]) -> Vec<&str> {
    let total: usize = texts.iter().map(|t| t.len() + 1).sum();
    let (mut seen, mut taken, mut kept) = (0, 0, Vec::new());
    for text in texts {
        let size = text.len() + 1;
        seen += size;
        if total <= CAP || (taken + size) as u64 * total as u64 <= seen as u64 * CAP as u64 {
            taken += size;
            kept.push(text.as_str());
        }
    }
    kept
}

/// Appends the Rust files under `folder`, depth first in sorted order.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for path in entries(folder)? {
        if path.is_dir() {
            collect(&path, files)?;
        } else if has_extension(&path, "rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|e| e == extension)
}
