//! `chimera-run compare`: one fresh model for each of several estimators, trained for the same time on the same data, and what became of
//! them side by side.
//!
//! Invariant: every run is what `train` makes of the same options, in a folder of its own that `report`, `replay` and `train --resume`
//! take.

use crate::data::DataArgs;
use crate::estimators::{ESTIMATORS, EstimatorName, of_some};
use crate::hyper::{HyperArgs, positive};
use crate::options::{Failure, ModelOptions, RunOptions as ExecArgs};
use crate::paradigms::ParadigmArgs;
use crate::phases::PhaseArgs;
use crate::report::comparison::{Comparison, Contender, Ending, Subject};
use crate::resume;
use crate::session::Interrupt;
use crate::train;
use crate::watch::{Reporter, WatchArgs};
use chimera_runtime::files::atomic::write_atomic;
use chimera_runtime::train::metrics::Log;
use chimera_runtime::train::{Measure, Outcome, history};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The name of the page in the folder.
const PAGE: &str = "compare.html";
/// Seconds of each run where none are given.
const SECONDS: u64 = 60;
/// Measurements of a run where nothing is said of them.
const MEASUREMENTS: f64 = 20.0;

const EXAMPLES: &str = "Examples:
  chimera-run compare --estimators adamw,perseq-lowrank,mezo --minutes 5 --scale nano --data my.txt --out runs/compared
  chimera-run compare --estimators adamw,sgd --seconds 30 examples/configs/nano.json --vocab bytes --data my.txt --lr 1e-3 --json

An option that only some of the estimators have is given to these; one for all is given to all, and each has its own default otherwise.
Of both figures of memory, that of the plan is of the run alone; resident memory is that of the process, with what earlier runs left.";

/// Options of `compare`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = EXAMPLES, mut_arg("estimator", |arg| arg.hide(true)))]
pub struct Args {
    /// Estimators to compare, separated by commas
    #[arg(long, required = true, value_delimiter = ',', value_name = "NAME,...", env = "CHIMERA_ESTIMATORS")]
    pub estimators: Vec<EstimatorName>,
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub data: DataArgs,
    /// Seconds for each estimator; the learning rate decays over them [default: 60]
    #[arg(long, env = "CHIMERA_SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: Option<u64>,
    /// Minutes for each estimator, instead
    #[arg(long, conflicts_with = "seconds", env = "CHIMERA_MINUTES", value_parser = positive)]
    pub minutes: Option<f64>,
    #[command(flatten)]
    pub hyper: HyperArgs,
    /// Measure on held-out data every so many steps, or seconds with an s (30s), a tenth of the time at most [default: twenty times]
    #[arg(long, env = "CHIMERA_VAL_EVERY", value_name = "STEPS|SECONDSs")]
    pub val_every: Option<Measure>,
    /// Most held-out tokens to measure on
    #[arg(long, default_value_t = 8192, env = "CHIMERA_VAL_TOKENS", value_name = "N")]
    pub val_tokens: u64,
    /// Folder of the comparison: a run in it for each estimator, and compare.html
    #[arg(long, env = "CHIMERA_OUT", value_name = "DIR", default_value = "chimera-compare")]
    pub out: PathBuf,
    #[command(flatten)]
    pub watch: WatchArgs,
    #[command(flatten)]
    pub exec: ExecArgs,
    /// Print the result as JSON on stdout
    #[arg(long, env = "CHIMERA_JSON")]
    pub json: bool,
    /// Show no progress
    #[arg(short, long, env = "CHIMERA_QUIET")]
    pub quiet: bool,
}

/// Runs the command.
///
/// # Errors
/// See the exit codes of [`Failure`]. What was done before is on the page and on stdout nevertheless.
pub fn run(args: &Args) -> Result<(), Failure> {
    let interrupt = Interrupt::register()?;
    refuse(args)?;
    let runs: Vec<train::Args> = args.estimators.iter().map(|&name| args.of(name)).collect();
    for run in &runs {
        run.hyper.checked()?;
        if let Some(folder) = &run.out {
            resume::refuse_run(folder, "choose another folder by --out")?;
        }
    }
    let reporter = Reporter::new(None, false, args.quiet);
    let (seconds, seed) = (args.duration(), args.hyper.fresh().seed);
    let names = args.estimators.iter().map(|name| name.text());
    let (contenders, failure) = race(names.zip(runs).collect(), seconds, 1, &interrupt, &reporter)?;
    let all = Comparison { subject: Subject::Estimators, contenders, seconds, seed };
    if !all.contenders.is_empty() {
        show(args, &all, &reporter)?;
    }
    failure.map_or(Ok(()), Err)
}

/// Trains each run for so many seconds: in so many turns of equal time, all runs in each turn one behind the other, until one is
/// interrupted. Returned are those that did a step, and the first failure. Every run has a folder.
///
/// # Errors
/// Records that cannot be read.
pub fn race(
    runs: Vec<(String, train::Args)>,
    seconds: u64,
    turns: u32,
    interrupt: &Interrupt,
    reporter: &Reporter,
) -> Result<(Vec<Contender>, Option<Failure>), Failure> {
    let (mut failure, count, mut endings) = (None, runs.len(), vec![None; runs.len()]);
    'turns: for turn in 1..=turns {
        for (i, (name, run)) in runs.iter().enumerate() {
            if turn > 1 && endings[i] != Some(Ending::Stopped) {
                continue;
            }
            let (place, share) = (i + 1, seconds as f64 / f64::from(turns));
            match turns {
                1 => reporter.say(&format!("{place} of {count}: {name} for {seconds} s")),
                _ => reporter.say(&format!("turn {turn} of {turns}, {place} of {count}: {name} for {share:.1} s")),
            }
            // The last turn ends with the time of the run, which its records know better than a clock here.
            let until = Instant::now() + Duration::from_secs_f64(share);
            let stop = if turn == turns { interrupt.clone() } else { interrupt.or_at(until) };
            let outcome = match turn {
                1 => train::train(run, &stop),
                _ => train::train(&continued(run), &stop),
            };
            let ending = match outcome {
                Ok((Outcome::Finished, _)) => Ending::Finished,
                Ok((Outcome::Stopped, _)) => Ending::Stopped,
                Err(f) => {
                    let ending = Ending::Failed(f.message.clone());
                    failure.get_or_insert(f);
                    ending
                }
            };
            let begun = !history::lines(&run.out.clone().unwrap_or_default(), Log::NAME)?.is_empty();
            if let (true, Ending::Failed(why)) = (begun, &ending) {
                reporter.say(&format!("{name}: {why}"));
            }
            // A loss that explodes says something of its run; what fails before the first step fails for all of them.
            let fatal = matches!(ending, Ending::Failed(_)) && !begun;
            endings[i] = Some(ending);
            if fatal || interrupt.requested() {
                break 'turns;
            }
        }
    }
    let mut contenders = vec![];
    for ((name, run), ending) in runs.into_iter().zip(endings) {
        let folder = run.out.unwrap_or_default();
        let (steps, events) = (history::lines(&folder, Log::NAME)?, history::lines(&folder, history::NAME)?);
        if let Some(ending) = ending.filter(|_| !steps.is_empty()) {
            contenders.push(Contender { name, folder, steps, events, ending });
        }
    }
    Ok((contenders, failure))
}

/// The options by which a run goes on.
fn continued(run: &train::Args) -> train::Args {
    let model = ModelOptions { model: None, model_option: None, scale: None, sets: vec![], vocab: None };
    train::Args {
        model,
        hyper: HyperArgs::default(),
        paradigms: ParadigmArgs::default(),
        resume: Some("auto".into()),
        ..run.clone()
    }
}

/// Refuses what has no meaning in a comparison.
fn refuse(args: &Args) -> Result<(), Failure> {
    let names = &args.estimators;
    if let Some((i, name)) = names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)) {
        return Err(Failure::usage(format!(
            "--estimators: {} is in places {} and {}, expected each estimator once; leave one out",
            name.text(),
            names.iter().position(|n| n == name).unwrap_or(0) + 1,
            i + 1
        )));
    }
    if args.hyper.estimator.is_some() {
        return Err(Failure::usage("--estimator has no meaning here; name all of them by --estimators"));
    }
    if args.exec.trace.trace.is_some() {
        return Err(Failure::usage("--trace is about one run; give it to train with one of the estimators"));
    }
    let has = |key: &str| names.iter().any(|name| name.row().options.contains(&key));
    let given = args.hyper.given().into_iter().map(|(key, _)| key);
    if let Some(key) = given.into_iter().find(|key| of_some(key) && !has(key)) {
        let owners = ESTIMATORS.iter().filter(|r| r.options.contains(&key)).map(|r| r.name.text());
        return Err(Failure::usage(format!(
            "--{} has no meaning for any of the estimators; leave it out, or compare with {}",
            key.replace('_', "-"),
            owners.collect::<Vec<_>>().join(" or ")
        )));
    }
    Ok(())
}

impl Args {
    /// Seconds of each run.
    fn duration(&self) -> u64 {
        let minutes = self.minutes.map(|m| (m * 60.0).round().max(1.0) as u64);
        minutes.or(self.seconds).unwrap_or(SECONDS)
    }

    fn folder(&self, name: EstimatorName) -> PathBuf {
        self.out.join(name.text())
    }

    /// The options of the run of one estimator.
    fn of(&self, name: EstimatorName) -> train::Args {
        let apart = Measure::Apart(Duration::from_secs(self.duration()).div_f64(MEASUREMENTS));
        train::Args {
            model: self.model.clone(),
            data: self.data.clone(),
            steps: None,
            seconds: Some(self.duration()),
            hyper: self.hyper.of(name),
            phase: PhaseArgs::default(),
            paradigms: ParadigmArgs::default(),
            val_every: self.val_every.unwrap_or(apart),
            val_tokens: self.val_tokens,
            save_every: 0,
            keep: 1,
            out: Some(self.folder(name)),
            resume: None,
            watch: self.watch.of(name),
            exec: self.exec.clone(),
            benchmark: false,
            turns: None,
            json: false,
            quiet: self.quiet,
        }
    }
}

/// The page into the folder, the table or its JSON to stdout.
fn show(args: &Args, all: &Comparison, reporter: &Reporter) -> Result<(), Failure> {
    let path = args.out.join(PAGE);
    let page = all.page(|_| {});
    write_atomic(&path, |w| w.write_all(page.as_bytes()))?;
    reporter.say(&format!("curves: {}", path.display()));
    let mut out = std::io::stdout().lock();
    match args.json {
        true => {
            let mut value = all.to_json();
            value["page"] = json!(path.display().to_string());
            writeln!(out, "{value}")?;
        }
        false => write!(out, "{}", all.table())?,
    }
    Ok(())
}
