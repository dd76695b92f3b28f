//! `chimera-run vocab`: the vocabulary that data need, saved for whoever compiles or trains with it later.
//!
//! Stdout carries its number of ids and nothing else.

use crate::data::{DataArgs, Encoding};
use crate::options::Failure;
use chimera_runtime::text::{self, VocabSpec};
use std::io::Write;
use std::path::PathBuf;

/// Options of `vocab`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  chimera-run vocab --data corpus/ chats.jsonl.zst -o small.vocab\n  \
    chimera-run train nano.json --vocab small.vocab --data corpus/ chats.jsonl.zst")]
pub struct Args {
    #[command(flatten)]
    data: DataArgs,
    /// Write the vocabulary into this file, for --vocab
    #[arg(short, long, env = "CHIMERA_OUTPUT", value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Data that cannot be read or are not UTF-8, or a file that cannot be written.
pub fn run(args: &Args) -> Result<(), Failure> {
    let (data, cache) = (&args.data.data, args.data.cache());
    let encoding = Encoding::new(false);
    let (vocab, sources) =
        text::prepare(&VocabSpec::Restricted, data, &args.data.reading(), &cache, &mut encoding.hear())?;
    encoding.finish(&vocab, &sources);
    if let Some(path) = &args.output {
        vocab.save(path)?;
    }
    Ok(writeln!(std::io::stdout().lock(), "{}", vocab.size())?)
}
