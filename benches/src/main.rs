//! `chimera-benches kernels|model|startup|train|paradigms`: measures this machine, the generated kernels, the entry points of plans, the
//! start of a model, training steps and what paradigms of training are worth, and checks answers.
//!
//! A wrong answer ends the run with an error; there is no figure without a check.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it is a command line program")]
#![allow(unreachable_pub, reason = "modules of a binary")]

mod gemv;
mod kernels;
mod machine;
mod measure;
mod model;
mod outside;
mod paradigms;
mod peaks;
mod peers;
mod profile;
mod row;
mod single;
mod stack;
mod startup;
mod subject;
mod time_to_loss;
mod train;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use chimera_codegen::Target;
use chimera_frontends::config::Scale;
use chimera_runtime::affinity::available_threads;
use clap::{Parser, ValueEnum};
use measure::Setup;
use model::Single;

/// Measures peaks, kernels and models; the table goes to stdout, progress to stderr.
#[derive(Debug, Parser)]
#[command(name = "chimera-benches", version)]
struct Args {
    /// What to measure
    suite: Suite,
    /// End within a minute on a small machine: fewer and shorter bursts
    #[arg(long)]
    quick: bool,
    /// Threads that execute; all that may run at once when absent
    #[arg(long, env = "CHIMERA_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Generate code for this machine, such as x86-64-v3; this one when absent
    #[arg(long, value_name = "TARGET")]
    isa: Option<Target>,
    /// Measure processor time, for machines that do other work too; with one thread only
    #[arg(long)]
    processor_time: bool,
    /// Print where the time of an entry point at that scale goes, kernel by kernel, and measure nothing else (model)
    #[arg(long, value_name = "SCALE")]
    profile: Option<Scale>,
    /// The entry point of the profile
    #[arg(long, value_name = "ENTRY", default_value = "dual_loss", requires = "profile")]
    entry: Single,
    /// Measure PyTorch and llama.cpp too, where that Python has them
    #[arg(long, value_name = "PYTHON", num_args = 0..=1, default_missing_value = "python3")]
    peers: Option<PathBuf>,
    /// Write the rows as a JSON list
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the rows with machine and command into the folder of records
    #[arg(long)]
    record: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Suite {
    /// Single operations: products, recurrences, loss, quantisation, random numbers
    Kernels,
    /// Entry points of whole models: loss, dual forward, update, prompt, decoding
    Model,
    /// Start of the largest model: machine code, and the first token from a file that is not in memory
    Startup,
    /// Whole training steps by each estimator
    Train,
    /// The time in which AdamW reaches the loss that PyTorch (--peers) reaches in ten minutes (40 s with --quick)
    TimeToLoss,
    /// Paradigms of training against runs without them, by `chimera-run train --benchmark`
    Paradigms,
}

/// Lines of progress come no faster than this where stderr is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows what is going on: one line that is overwritten on a terminal, else a line now and then.
fn progress() -> impl FnMut(&str) {
    let terminal = std::io::stderr().is_terminal();
    let mut last: Option<Instant> = None;
    move |what| {
        if terminal {
            eprint!("\r\x1b[K{what}");
        } else if last.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
            eprintln!("{what}");
            last = Some(Instant::now());
        }
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let threads = args.threads.map_or_else(available_threads, usize::from);
    ensure!(
        !args.processor_time || threads == 1,
        "--processor-time measures one thread, found {threads}: add --threads 1"
    );
    let target = args.isa.unwrap_or_else(chimera_codegen::host);
    let setup = Setup { threads, target, processor_time: args.processor_time };
    let mut show = progress();
    if let Some(scale) = args.profile {
        ensure!(matches!(args.suite, Suite::Model), "--profile belongs to `model`");
        ensure!(
            !args.record && args.json.is_none() && args.peers.is_none(),
            "--profile prints a table and has no rows"
        );
        let table = profile::run(scale, args.entry, &setup, args.quick, &mut show)?;
        clear_progress();
        return print(&table);
    }
    let (name, mut rows) = match args.suite {
        Suite::Kernels => ("kernels", kernels::run(&setup, args.quick, &mut show)?),
        Suite::Model => ("model", model::run(&setup, args.quick, &mut show)?),
        Suite::Startup => ("startup", startup::run(&setup, args.quick, &mut show)?),
        Suite::Train => ("train", train::run(&setup, args.quick, &mut show)?),
        Suite::TimeToLoss => ("time-to-loss", time_to_loss::run(&setup, args.quick, args.peers.as_ref(), &mut show)?),
        Suite::Paradigms => ("paradigms", paradigms::run(&setup, args.quick, &mut show)?),
    };
    if let Some(python) = &args.peers {
        outside::add(&mut rows, name, python, &setup, args.quick, &mut show)?;
    }
    clear_progress();
    if let Some(path) = &args.json {
        std::fs::write(path, row::json(&rows)?).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if args.record {
        let quick = if args.quick { " --quick" } else { "" };
        let peers = if args.peers.is_some() { " --peers" } else { "" };
        let isa = args.isa.map_or(String::new(), |isa| format!(" --isa {isa}"));
        let clock = if args.processor_time { " --processor-time" } else { "" };
        let options = format!("{quick} --threads {threads}{isa}{clock}{peers}");
        let command = format!("cargo run --release -p chimera-benches -- {name}{options} --record");
        eprintln!("recorded in {}", row::record(name, threads, &target.to_string(), &command, &rows)?.display());
    }
    print(&row::table(&rows))
}

fn clear_progress() {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
}

fn print(table: &str) -> Result<()> {
    match write!(std::io::stdout().lock(), "{table}") {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write the table"),
    }
}
