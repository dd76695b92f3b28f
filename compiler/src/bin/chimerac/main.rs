//! `chimerac`: compile model configurations to plans, and look at both.
//!
//! Results go to stdout and everything else to stderr. Exit codes: 0 ok, 1 failure, 2 usage, 3 invalid configuration, 4 resource,
//! 5 corrupted file. A closed pipe ends the command quietly.

mod compile;
mod input;
mod inspect;
mod keys;
mod options;
mod output;
mod tune;

use clap::{Parser, Subcommand};
use options::Failure;
use std::io::{self, Write};
use std::process::ExitCode;

const EXAMPLES: &str = "Examples:
  chimerac compile examples/configs/nano.json -o nano.plan
  chimerac inspect nano.plan --section memory,fusion
  chimerac inspect nano.plan --asm 0
  chimerac keys quantization";

/// Compiles Chimera models to execution plans, and shows what is in them.
#[derive(Parser, Debug)]
#[command(name = "chimerac", version, about, after_help = EXAMPLES, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Compile a configuration to a plan
    Compile(Box<compile::Args>),
    /// Show what is in a plan, or in the plan of a configuration
    Inspect(Box<inspect::Args>),
    /// Measure the variants of the kernels of a plan or configuration
    Tune(Box<tune::Args>),
    /// Print the JSON Schema of configurations
    Schema(keys::SchemaArgs),
    /// List all configuration keys: type, default, and what becomes of them
    Keys(keys::KeysArgs),
}

fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Compile(args) => compile::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Tune(args) => tune::run(&args),
        Command::Schema(args) => keys::schema(&args),
        Command::Keys(args) => keys::run(&args),
    }
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are results, wrong usage is not; nobody may be listening to either.
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { 2 } else { 0 });
        }
    };
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                let _ = writeln!(io::stderr(), "{failure}");
            }
            ExitCode::from(failure.code)
        }
    }
}
