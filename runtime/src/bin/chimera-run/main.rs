//! `chimera-run`: train models and run them.
//!
//! Invariant: stdout carries results only, everything else goes to stderr; failures have a sentence and an exit code.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the command line program talks to people")]
#![allow(unreachable_pub, reason = "modules of a binary")]

mod benchmark;
mod call;
mod compare;
mod data;
mod estimators;
mod fused;
mod generate;
mod hyper;
mod memory;
mod model;
mod options;
mod pack;
mod paradigms;
mod phases;
mod probes;
mod quickstart;
mod replay;
mod report;
mod resume;
mod session;
mod tokenizer;
mod trace;
mod train;
mod vocab;
mod watch;
mod weights;

use clap::{Parser, Subcommand};
use options::Failure;
use std::process::ExitCode;

/// Train ternary language models, with or without back-propagation, and run them.
#[derive(Parser)]
#[command(name = "chimera-run", version, propagate_version = true)]
#[command(
    after_help = "Exit codes: 0 ok, 1 failure, 2 usage, 3 invalid configuration, 4 memory or disk, 5 corrupted file."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a model on text files
    Train(Box<train::Args>),
    /// Train one fresh model by each of several estimators, and show loss against time, data and memory
    Compare(Box<compare::Args>),
    /// Write the weights of any step of a run, from its checkpoints and its journal
    Replay(replay::ReplayArgs),
    /// Compare two runs bit for bit
    VerifyRun(replay::VerifyArgs),
    /// Make one page about a run: losses, speed, texts, events; also while it goes on
    Report(report::Args),
    /// Continue a prompt
    Generate(Box<generate::Args>),
    /// Run one entry point on given tensors
    Call(Box<call::Args>),
    /// Pack the ternary weights of a model: 2 bits a weight instead of 32
    Pack(Box<pack::Args>),
    /// Count and save the vocabulary o200k:restricted of text files
    Vocab(vocab::Args),
    /// Make a vocabulary of one's own from text files
    Tokenizer(tokenizer::Args),
    /// Train a small model on the embedded corpus and let it write
    Quickstart(Box<quickstart::Args>),
}

fn run(command: Command) -> Result<(), Failure> {
    #[cfg(unix)]
    session::survive_large_files()?;
    match command {
        Command::Train(args) => train::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Replay(args) => replay::replay(&args),
        Command::VerifyRun(args) => replay::verify(&args),
        Command::Report(args) => report::run(&args),
        Command::Generate(args) => generate::run(*args),
        Command::Call(args) => call::run(*args),
        Command::Pack(args) => pack::run(*args),
        Command::Vocab(args) => vocab::run(&args),
        Command::Tokenizer(args) => tokenizer::run(&args),
        Command::Quickstart(args) => quickstart::run(*args),
    }
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fail(&failure),
    }
}

fn fail(failure: &Failure) -> ExitCode {
    if !failure.message.is_empty() {
        eprintln!("{failure}");
    }
    ExitCode::from(failure.code)
}
