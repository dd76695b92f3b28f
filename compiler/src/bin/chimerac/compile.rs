//! `chimerac compile`: a configuration becomes a plan.
//!
//! The plan is written before anything is printed, and only when it verifies.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use chimera_compiler::{
    CompileError,
    inspect::{self, ModelReport, PlanReport},
};
use chimera_frontends::config::Loaded;
use chimera_ir::plan::{self, Plan};
use clap::builder::FalseyValueParser;
use serde::Serialize;

use crate::input;
use crate::options::{CommonArgs, Failure};
use crate::output::{note, print, print_json, replace};

const EXAMPLES: &str = "Examples:
  chimerac compile examples/configs/nano.json -o nano.plan
  chimerac compile --scale pico --entries loss,decode --tokens 64
  chimerac compile examples/configs/chimera-5.3.json --scale nano --vocab bytes --set looping.loop_default=3
  chimerac compile --scale pico --entries loss --stop-after fuse";

/// Arguments of `compile`.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    common: CommonArgs,
    /// Write the plan into this file
    #[arg(short, long, env = "CHIMERA_OUTPUT", value_name = "PLAN")]
    output: Option<PathBuf>,
    /// Write the text form; also chosen by a name that ends in .txt
    #[arg(long, env = "CHIMERA_TEXT", value_parser = FalseyValueParser::new())]
    text: bool,
    /// Stop behind this stage and print what it made
    #[arg(long, env = "CHIMERA_STOP_AFTER", value_name = "STAGE", conflicts_with = "output")]
    stop_after: Option<String>,
    /// Write the graph of every stage into this folder
    #[arg(long, env = "CHIMERA_DUMP_PHASES", value_name = "DIR")]
    dump_phases: Option<PathBuf>,
}

#[derive(Serialize)]
struct Written {
    path: String,
    form: &'static str,
    bytes: usize,
}

#[derive(Serialize)]
struct Report {
    model: ModelReport,
    plan: PlanReport,
    compile_seconds: f64,
    output: Option<Written>,
}

#[derive(Serialize)]
struct Stopped<'a> {
    stopped_after: &'a str,
    text: String,
}

/// Run the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let start = Instant::now();
    let (name, loaded) = input::load(&args.common.model)?;
    loaded.warnings.iter().for_each(|w| note(&format!("warning: {w}")));
    let plan = match compiled(&loaded, args) {
        Ok(plan) => plan,
        Err(Compiled::Stopped(stopped_after, text)) if args.common.json => {
            return print_json(&Stopped { stopped_after: &stopped_after, text });
        }
        Err(Compiled::Stopped(_, text)) => return print(&text),
        Err(Compiled::Failed(failure)) => return Err(failure),
    };
    let compile_seconds = start.elapsed().as_secs_f64();
    let output = args.output.as_ref().map(|path| write(path, &plan, args.text)).transpose()?;
    let iterations = args.common.build.iterations(&loaded.model);
    let model = inspect::model(&name, &loaded, iterations);
    let report = Report { model, plan: inspect::summary(&plan), compile_seconds, output };
    if args.common.json {
        return print_json(&report);
    }
    let mut out = format!("{}\n{}\ncompiled in {compile_seconds:.2} s\n", report.model, report.plan);
    if let Some(o) = &report.output {
        let _ = writeln!(out, "written to {} ({} form, {} bytes)", o.path, o.form, o.bytes);
    }
    print(&out)
}

enum Compiled {
    Stopped(String, String),
    Failed(Failure),
}

fn compiled(loaded: &Loaded, args: &Args) -> Result<Plan, Compiled> {
    let mut options = args.common.build.options(&loaded.model).map_err(Compiled::Failed)?;
    options.stop_after = args.stop_after.clone();
    options.dump = args.dump_phases.clone();
    match chimera_compiler::compile(&loaded.model, &options) {
        Ok(plan) => {
            check(&plan).map_err(Compiled::Failed)?;
            Ok(plan)
        }
        Err(CompileError::Stopped(text)) => Err(Compiled::Stopped(options.stop_after.unwrap_or_default(), text)),
        Err(e) => Err(Compiled::Failed(e.into())),
    }
}

/// A plan that does not verify: its sizes are beyond what plans may have.
pub(crate) fn check(plan: &Plan) -> Result<(), Failure> {
    plan::verify(plan)
        .map_err(|e| Failure::resource(format!("the model gives no valid plan: {e}; choose smaller sizes")))
}

fn write(path: &Path, plan: &Plan, text: bool) -> Result<Written, Failure> {
    let text = text || path.extension().is_some_and(|e| e == "txt");
    let (form, bytes) = match text {
        true => ("text", plan::to_text(plan).into_bytes()),
        false => ("binary", plan::to_bytes(plan)),
    };
    replace(path, &bytes)?;
    Ok(Written { path: path.display().to_string(), form, bytes: bytes.len() })
}
