//! `chimera-run tokenizer`: vocabularies of one's own.
//!
//! Stdout carries the number of ids and nothing else.

use crate::data::{DataArgs, Encoding};
use crate::options::Failure;
use chimera_runtime::text;
use std::io::Write;
use std::path::PathBuf;

const EXAMPLE: &str = "Example:
  chimera-run tokenizer train --data corpus/ chats.jsonl.zst --size 4096 -o own.vocab
  chimera-run train nano.json --vocab own.vocab --data corpus/ chats.jsonl.zst";

/// Options of `tokenizer`.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Clone, Debug)]
enum Command {
    /// Learn byte pairs from text: ids for the 256 bytes, for the most frequent neighbours, and for the end of a document
    #[command(after_help = EXAMPLE)]
    Train(Train),
}

#[derive(clap::Args, Clone, Debug)]
struct Train {
    #[command(flatten)]
    data: DataArgs,
    /// Number of ids
    #[arg(long, default_value_t = 4096, env = "CHIMERA_SIZE", value_name = "N")]
    size: usize,
    /// Write the vocabulary into this file, for --vocab
    #[arg(short, long, env = "CHIMERA_OUTPUT", value_name = "FILE")]
    output: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// Data that cannot be read or are not UTF-8, a size that cannot be had, or a file that cannot be written.
pub fn run(args: &Args) -> Result<(), Failure> {
    let Command::Train(args) = &args.command;
    let encoding = Encoding::new(false);
    let vocab = text::train_vocab(&args.data.data, &args.data.reading(), args.size, &mut encoding.hear())?;
    encoding.finish(&vocab, &[]);
    if vocab.size() < args.size {
        eprintln!("no more pairs occur twice: the vocabulary has {} ids instead of {}", vocab.size(), args.size);
    }
    vocab.save(&args.output)?;
    Ok(writeln!(std::io::stdout().lock(), "{}", vocab.size())?)
}
