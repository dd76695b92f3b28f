//! `chimera-run train --benchmark`: a run without paradigms and one for each of them, for the same time, and the factors between them.
//!
//! Invariant: every run is what `train` makes of the same options, and every factor is measured, also where it is below 1.

use crate::compare;
use crate::estimators::EstimatorName;
use crate::hyper::HyperArgs;
use crate::model::Model;
use crate::options::Failure;
use crate::paradigms::{FormName, ParadigmArgs};
use crate::probes::ModeName;
use crate::report::comparison::{Comparison, Subject};
use crate::report::factors::{Factors, Paradigm};
use crate::resume;
use crate::session::Interrupt;
use crate::train::Args;
use crate::watch::Reporter;
use chimera_runtime::files::atomic::write_atomic;
use chimera_runtime::train::Measure;
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The name of the page in the folder.
const PAGE: &str = "benchmark.html";
/// Seconds of each run where none are given.
const SECONDS: u64 = 60;
/// Measurements of a run.
const MEASUREMENTS: f64 = 20.0;
/// The folder where none is given.
const DEFAULT_OUT: &str = "chimera-benchmark";
/// The run without paradigms.
const BASELINE: &str = "baseline";
/// Probes that change codes, against which sparse probes and shared codes are measured where the baseline is no such run.
const MEZO: &str = "mezo";

/// Runs the command.
///
/// # Errors
/// See the exit codes of [`Failure`]. What was done before is on the page and on stdout nevertheless.
pub fn run(args: &Args) -> Result<(), Failure> {
    let interrupt = Interrupt::register()?;
    if args.resume.is_some() || args.steps.is_some() {
        return Err(Failure::usage(
            "--benchmark compares fresh runs of the same time; give --seconds, and neither --steps nor --resume",
        ));
    }
    if args.paradigms.any() {
        return Err(Failure::usage("--benchmark measures every paradigm against runs without it; name none of them"));
    }
    let reporter = Reporter::new(None, false, args.quiet);
    let seconds = args.seconds.unwrap_or(SECONDS);
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_OUT));
    let (runs, paradigms, left) = runs(args, &out, seconds)?;
    for (_, run) in &runs {
        if let Some(folder) = &run.out {
            resume::refuse_run(folder, "choose another folder by --out")?;
        }
    }
    let (contenders, failure) =
        compare::race(runs, seconds, u32::from(args.turns.unwrap_or(1)), &interrupt, &reporter)?;
    let seed = args.hyper.fresh().seed;
    let runs = Comparison { subject: Subject::Paradigms, contenders, seconds, seed };
    if !runs.contenders.is_empty() {
        let factors = Factors { runs, paradigms, left };
        let path = out.join(PAGE);
        let page = factors.page();
        write_atomic(&path, |w| w.write_all(page.as_bytes()))?;
        reporter.say(&format!("curves: {}", path.display()));
        let mut stdout = std::io::stdout().lock();
        match args.json {
            true => {
                let mut value = factors.to_json();
                value["page"] = json!(path.display().to_string());
                writeln!(stdout, "{value}")?;
            }
            false => write!(stdout, "{}", factors.table())?,
        }
    }
    failure.map_or(Ok(()), Err)
}

type Runs = Vec<(String, Args)>;

/// All runs by name, what is measured by which of them, and sentences about paradigms that the model or its options rule out.
fn runs(args: &Args, out: &Path, seconds: u64) -> Result<(Runs, Vec<Paradigm>, Vec<String>), Failure> {
    let apart = Measure::Apart(Duration::from_secs(seconds).div_f64(MEASUREMENTS));
    let run = |name: &str, hyper: &HyperArgs, paradigms: ParadigmArgs| {
        let run = Args {
            hyper: hyper.clone(),
            paradigms,
            seconds: Some(seconds),
            steps: None,
            val_every: apart,
            out: Some(out.join(name)),
            benchmark: false,
            json: false,
            keep: 1,
            ..args.clone()
        };
        (name.to_owned(), run)
    };
    let none = ParadigmArgs::default;
    let yes = Some(true);
    let estimator = args.hyper.fresh().estimator;
    let is_requantise = |hyper: &HyperArgs| hyper.mode.is_none_or(|m| m == ModeName::Requantise);
    let own = estimator == EstimatorName::Mezo && is_requantise(&args.hyper);
    let mut all = vec![run(BASELINE, &args.hyper, none())];
    let mut paradigms: Vec<Paradigm> = vec![];
    let mut put = |name: &str, with: &str, without: &str| {
        paradigms.push(Paradigm { name: name.into(), with: with.into(), without: without.into() });
    };
    let model = Model::open(&args.model, None)?.config;
    let hyper = args.hyper.checked()?;
    let mut left = vec![];
    for (name, chosen) in [
        ("growlength", ParadigmArgs { growlength: yes, ..none() }),
        ("reservoir", ParadigmArgs { reservoir: yes, ..none() }),
        ("pipeline", ParadigmArgs { pipeline: yes, ..none() }),
        ("progressive-unfreeze", ParadigmArgs { progressive_unfreeze: yes, ..none() }),
    ] {
        match chosen.chosen(&hyper, &model) {
            Ok(_) => {
                all.push(run(name, &args.hyper, chosen));
                put(name, name, BASELINE);
            }
            Err(e) => left.push(format!("not measured: {}", e.message)),
        }
    }
    let kept = ParadigmArgs { progressive_unfreeze: yes, prefix_cache: Some(FormName::F32), ..none() };
    if kept.chosen(&hyper, &model).is_ok() {
        all.push(run("prefix-cache", &args.hyper, kept));
        put("prefix-cache", "prefix-cache", "progressive-unfreeze");
    }
    all.push(run("packing=false", &args.hyper, ParadigmArgs { packing: Some(false), ..none() }));
    put("packing", BASELINE, "packing=false");
    // Rates of another estimator mean nothing to this one.
    let lr = args.hyper.lr.filter(|_| estimator == EstimatorName::Mezo);
    let mezo = HyperArgs { mode: None, mask: None, sparsity: None, lr, ..args.hyper.of(EstimatorName::Mezo) };
    let other = if own { BASELINE } else { MEZO };
    if !own {
        all.push(run(MEZO, &mezo, none()));
    }
    let sparse = ParadigmArgs { sparse_mezo: yes, ..none() };
    all.push(run("sparse-mezo", &mezo, sparse));
    put("sparse-mezo", "sparse-mezo", other);
    let additive = HyperArgs { mode: Some(ModeName::Additive), ..mezo.clone() };
    all.push(run("fused-cache", &additive, ParadigmArgs { fused_cache: yes, ..none() }));
    put("fused-cache", "fused-cache", other);
    all.push(run("all", &args.hyper, ParadigmArgs { all: true, ..none() }));
    put("all", "all", BASELINE);
    Ok((all, paradigms, left))
}
