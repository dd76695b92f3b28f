//! `chimera-run vocab`: the vocabulary that data need, saved for whoever compiles or trains with it later.
//!
//! Stdout carries its number of ids and nothing else.

use crate::options::Failure;
use chimera_runtime::text::{self, VocabSpec};
use std::io::Write;
use std::path::PathBuf;

/// Options of `vocab`.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Text files whose ids of o200k make the vocabulary
    #[arg(long, num_args = 1.., required = true, value_name = "FILE", env = "CHIMERA_DATA", value_delimiter = ';')]
    data: Vec<PathBuf>,
    /// Write the vocabulary into this file, for --vocab
    #[arg(short, long, env = "CHIMERA_OUTPUT", value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Data that cannot be read or are not UTF-8, or a file that cannot be written.
pub fn run(args: &Args) -> Result<(), Failure> {
    let sources = text::read_files(&args.data)?;
    let (vocab, _) = text::prepare(&VocabSpec::Restricted, &sources, &mut |_, _| {})?;
    if let Some(path) = &args.output {
        vocab.save(path)?;
    }
    Ok(writeln!(std::io::stdout().lock(), "{}", vocab.size())?)
}
