//! `chimerac tune`: measures the variants of the kernels of a plan and writes a table.
//!
//! The table is written as a whole, also when the work ends early: it then has what was measured completely.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use chimera_codegen::{Target, host};
use chimera_compiler::tuning::{self, Progress, Table, TuneError};
use clap::builder::FalseyValueParser;

use crate::input::{self, Input};
use crate::options::{BuildArgs, Failure, ModelArgs};
use crate::output::{note, print, print_json, replace};

const EXAMPLES: &str = "Examples:
  chimerac tune nano.plan -o tuning.json
  chimerac tune --scale tiny --entries dual_loss --rows 2 -o tuning.json --threads 2 --seconds 120
  chimerac compile --scale tiny --entries dual_loss --rows 2 --tuning tuning.json -o tiny.plan";

/// Arguments of `tune`.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    build: BuildArgs,
    /// Write the table into this file
    #[arg(short, long, env = "CHIMERA_OUTPUT", value_name = "TABLE")]
    output: PathBuf,
    /// Threads that share the grid of a kernel
    #[arg(long, env = "CHIMERA_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Time for all operations together
    #[arg(long, env = "CHIMERA_SECONDS", default_value_t = 60.0, value_parser = seconds)]
    seconds: f64,
    /// Print the table as JSON
    #[arg(long, env = "CHIMERA_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|x: &f64| (0.0..=1e6).contains(x));
    value.ok_or_else(|| "expected a number of seconds from 0 to a million".to_owned())
}

/// Lines of progress come no faster than this where stderr is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Run the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let plan = match input::read(&args.model)? {
        Input::Plan(plan) => *plan,
        Input::Model(_, loaded) => {
            loaded.warnings.iter().for_each(|w| note(&format!("warning: {w}")));
            chimera_compiler::compile(&loaded.model, &args.build.options(&loaded.model)?)?
        }
    };
    let target = target(&plan.target, args)?;
    if !target.runs_on(&host()) {
        let why = format!("code for {target} does not run on this machine, which is {}", host());
        return Err(Failure::usage(format!(
            "{why}; tune on the machine that plans are for, or choose another --target"
        )));
    }
    let subjects = tuning::subjects(&plan);
    let threads = args.threads.map_or_else(available, usize::from);
    // The first Ctrl-C ends the work in order, the second the process.
    let stop = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register_conditional_default(signal_hook::consts::SIGINT, stop.clone())
        .and_then(|_| signal_hook::flag::register(signal_hook::consts::SIGINT, stop.clone()))
        .map_err(|e| Failure::new(format!("cannot catch signals: {e}")))?;
    let mut show = progress(args.seconds);
    let table = tuning::tune(&subjects, &target, threads, args.seconds, &mut |p| {
        show(p);
        !stop.load(Ordering::Relaxed)
    });
    if io::stderr().is_terminal() {
        let _ = write!(io::stderr(), "\r\x1b[K");
    }
    let table = table.map_err(|e| match e {
        TuneError::Infer(_) => Failure::corrupted(e.to_string()),
        TuneError::Trial(..) => Failure::new(e.to_string()),
    })?;
    if table.entries.len() < subjects.len() {
        note(&format!("stopped after {} of {} operations", table.entries.len(), subjects.len()));
    }
    replace(&args.output, table.to_json().as_bytes())?;
    match args.json {
        true => print_json(&table),
        false => print(&(summary(&table) + &format!("written to {}\n", args.output.display()))),
    }
}

fn available() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn target(plan: &str, args: &Args) -> Result<Target, Failure> {
    match args.build.target {
        Some(target) => Ok(target),
        None => plan.parse().map_err(|e| Failure::corrupted(format!("the target of the plan: {e}"))),
    }
}

/// Shows what is done, how fast, and how long the rest takes at most: one line that is overwritten on a terminal, else one now and then.
fn progress(seconds: f64) -> impl FnMut(Progress<'_>) {
    let terminal = io::stderr().is_terminal();
    let mut last: Option<Instant> = None;
    move |p| {
        let every = if terminal { Duration::from_millis(100) } else { LINE_EVERY };
        if last.is_some_and(|at| at.elapsed() < every) {
            return;
        }
        last = Some(Instant::now());
        let spent = p.elapsed.as_secs_f64();
        let (rate, left) = (p.bursts as f64 / spent.max(1e-3), (seconds - spent).max(0.0));
        let short: String = p.contract.chars().take(60).collect();
        let line = format!("{} of {}, {rate:.0} bursts/s, at most {left:.0} s left: {short}", p.done, p.all);
        match terminal {
            true => drop(write!(io::stderr(), "\r\x1b[K{line}")),
            false => note(&line),
        }
    }
}

fn summary(table: &Table) -> String {
    let Table { processor, target, threads, .. } = table;
    let mut out = format!("{processor}, {target}, {threads} threads\n");
    for e in &table.entries {
        let best = e.candidates.iter().find(|c| c.variant == e.chosen).map_or(0.0, |c| c.measured);
        let _ = writeln!(out, "{}\n  {} in {best:.1} us, best of {}", e.contract, e.chosen, e.candidates.len());
        if e.model != e.chosen {
            let _ = writeln!(out, "  the cost model chooses {}, {:.1} % slower", e.model, e.regret * 100.0);
        }
    }
    let (n, regret) = (table.entries.len(), table.regret * 100.0);
    let _ = writeln!(out, "{n} operations; the cost model is {regret:.1} % slower than the best in the mean");
    out
}
