//! `chimerac inspect`: what is in a plan, or in the plan that a configuration would give.
//!
//! A plan holds no tensor graph, so the graph section needs a configuration.

use std::fmt::Write;

use chimera_codegen::{Target, disassemble};
use chimera_compiler::tuning::{self, Tuning};
use chimera_compiler::{compile_observed, inspect};
use chimera_frontends::config::Loaded;
use chimera_ir::plan::{Entry, Plan};
use clap::{ValueEnum, builder::FalseyValueParser};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::compile::check;
use crate::input::{self, Input};
use crate::options::{CommonArgs, Failure};
use crate::output::{note, print, print_json};

const EXAMPLES: &str = "Examples:
  chimerac inspect nano.plan
  chimerac inspect nano.plan --section fusion,memory --json
  chimerac inspect examples/configs/nano.json --section graph --entries dual_loss
  chimerac inspect nano.plan --asm 3 --target x86-64-v3
  chimerac inspect nano.plan --why --tuning tuning.json
  chimerac inspect nano.plan --dot=decode | dot -Tsvg > decode.svg";

/// A section of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Section {
    /// Sizes and entry points on one page
    Summary,
    /// Tensor graphs by stage of compilation
    Graph,
    /// Fusion decisions, with the reason for each candidate left apart
    Fusion,
    /// Memory map over time
    Memory,
    /// Kernels, and who makes code for them
    Kernels,
    /// Entry points: inputs, outputs, steps, shared work
    Entries,
    /// Work and traffic by layer
    Groups,
    /// All of them
    All,
}

impl Section {
    const EACH: [Section; 7] = [
        Section::Summary,
        Section::Graph,
        Section::Fusion,
        Section::Memory,
        Section::Kernels,
        Section::Entries,
        Section::Groups,
    ];
}

/// Arguments of `inspect`.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    common: CommonArgs,
    /// Sections to show, separated by commas
    #[arg(long, env = "CHIMERA_SECTION", value_enum, value_delimiter = ',', default_value = "summary")]
    section: Vec<Section>,
    /// Only this entry point, in the sections that go by entry point
    #[arg(long, env = "CHIMERA_ENTRY", value_name = "ENTRY")]
    entry: Option<String>,
    /// Print the machine code of a kernel (name or index) instead
    #[arg(long, env = "CHIMERA_ASM", value_name = "KERNEL", conflicts_with = "dot")]
    asm: Option<String>,
    /// Print why each kernel is lowered the way it is instead: candidates, predicted and measured times, refusals
    #[arg(long, env = "CHIMERA_WHY", value_parser = FalseyValueParser::new(), conflicts_with_all = ["asm", "dot"])]
    why: bool,
    /// Print the steps of an entry point (of all when none is named) in the DOT language instead
    #[arg(long, env = "CHIMERA_DOT", value_name = "ENTRY", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    dot: Option<String>,
    /// Show everything: all buffers of the memory map, kernels as kernel IR
    #[arg(short, long, env = "CHIMERA_VERBOSE", value_parser = FalseyValueParser::new())]
    verbose: bool,
}

/// What there is to look at.
struct Subject {
    model: Option<(String, Box<Loaded>)>,
    graphs: Option<inspect::GraphReport>,
    plan: Plan,
}

/// Run the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let mut subject = subject(args)?;
    if let Some(kernel) = &args.asm {
        return asm(&subject.plan, kernel, args);
    }
    if let Some(name) = &args.dot {
        return dot(&subject.plan, name, args.common.json);
    }
    if args.why {
        return why(&subject.plan, args);
    }
    if let Some(name) = &args.entry {
        entry(&subject.plan, name)?;
        subject.plan.entries.retain(|e| e.name == *name);
        subject.plan.decisions.retain(|d| d.entry == *name);
        if let Some(graphs) = &mut subject.graphs {
            graphs.stages.retain(|s| s.entry == *name);
        }
    }
    sections(&subject, args)
}

fn subject(args: &Args) -> Result<Subject, Failure> {
    match input::read(&args.common.model)? {
        Input::Plan(plan) => Ok(Subject { model: None, graphs: None, plan: *plan }),
        Input::Model(name, loaded) => {
            loaded.warnings.iter().for_each(|w| note(&format!("warning: {w}")));
            let options = args.common.build.options(&loaded.model)?;
            let mut stages = inspect::Stages::default();
            let plan = compile_observed(&loaded.model, &options, &mut |stage, entry, g| stages.see(stage, entry, g))?;
            check(&plan)?;
            Ok(Subject { model: Some((name, loaded)), graphs: Some(stages.report()), plan })
        }
    }
}

/// The entry point of that name, or which there are.
fn entry<'a>(plan: &'a Plan, name: &str) -> Result<&'a Entry, Failure> {
    plan.entry(name).ok_or_else(|| {
        let names: Vec<&str> = plan.entries.iter().map(|e| e.name.as_str()).collect();
        Failure::usage(format!("the plan has no entry point {name:?}, expected one of {}", names.join(", ")))
    })
}

/// The target that was asked for, else that of the plan.
fn target(plan: &Plan, args: &Args) -> Result<Target, Failure> {
    match args.common.build.target {
        Some(target) => Ok(target),
        None => plan.target.parse().map_err(|e| Failure::corrupted(format!("the target of the plan: {e}"))),
    }
}

fn asm(plan: &Plan, wanted: &str, args: &Args) -> Result<(), Failure> {
    let target = target(plan, args)?;
    let kernel = inspect::find_kernel(plan, wanted).map_err(|e| Failure::usage(e.to_string()))?;
    let text = disassemble(kernel, &target).map_err(|e| Failure::new(e.to_string()))?;
    match args.common.json {
        true => print_json(&json!({ "kernel": kernel.name, "target": target.to_string(), "text": text })),
        false => print(&text),
    }
}

fn why(plan: &Plan, args: &Args) -> Result<(), Failure> {
    let target = target(plan, args)?;
    let table = args.common.build.table(&target)?;
    let threads = table.as_ref().map_or(tuning::THREADS, |t| t.threads);
    let report = inspect::why(plan, &Tuning { table, target, threads });
    let (text, value) = both(&report, args.verbose)?;
    if args.common.json { print_json(&value) } else { print(&text) }
}

fn dot(plan: &Plan, name: &str, json: bool) -> Result<(), Failure> {
    let entries: Vec<&Entry> = match name {
        "" => plan.entries.iter().collect(),
        _ => vec![entry(plan, name)?],
    };
    let texts = entries.into_iter().map(|e| (e.name.clone(), inspect::dot(plan, e)));
    match json {
        true => print_json(&texts.map(|(name, text)| (name, Value::from(text))).collect::<Map<_, _>>()),
        false => print(&texts.map(|(_, text)| text).collect::<String>()),
    }
}

/// A report in both forms.
fn both(report: &(impl Serialize + std::fmt::Display), verbose: bool) -> Result<(String, Value), Failure> {
    let value = serde_json::to_value(report).map_err(|e| Failure::new(format!("cannot write JSON: {e}")))?;
    Ok((if verbose { format!("{report:#}") } else { report.to_string() }, value))
}

/// Reports that stand below one another.
fn list(reports: &[impl Serialize + std::fmt::Display], verbose: bool) -> Result<(String, Value), Failure> {
    let parts: Vec<(String, Value)> = reports.iter().map(|r| both(r, verbose)).collect::<Result<_, _>>()?;
    let (texts, values): (Vec<String>, Vec<Value>) = parts.into_iter().unzip();
    Ok((texts.join("\n"), values.into()))
}

fn sections(subject: &Subject, args: &Args) -> Result<(), Failure> {
    let all = args.section.contains(&Section::All);
    let wanted: Vec<Section> = match all {
        true => Section::EACH.into_iter().filter(|s| *s != Section::Graph || subject.graphs.is_some()).collect(),
        false => args.section.clone(),
    };
    let (mut text, mut values) = (String::new(), Map::new());
    for section in wanted {
        let (part, value) = report(subject, section, args)?;
        let separator = if text.is_empty() { "" } else { "\n" };
        let _ = write!(text, "{separator}{part}");
        let name = section.to_possible_value().map_or(String::new(), |v| v.get_name().to_owned());
        values.insert(name, value);
    }
    match args.common.json {
        true => print_json(&values),
        false => print(&text),
    }
}

fn report(subject: &Subject, section: Section, args: &Args) -> Result<(String, Value), Failure> {
    let (plan, verbose) = (&subject.plan, args.verbose);
    match section {
        Section::Summary => {
            let (text, value) = both(&inspect::summary(plan), verbose)?;
            let Some((name, loaded)) = &subject.model else {
                return Ok((text, json!({ "plan": value })));
            };
            let model = inspect::model(name, loaded, args.common.build.iterations(&loaded.model));
            let (model_text, model) = both(&model, verbose)?;
            Ok((format!("{model_text}\n{text}"), json!({ "model": model, "plan": value })))
        }
        Section::Graph => match &subject.graphs {
            Some(graphs) => both(graphs, verbose),
            None => Err(Failure::usage("a plan holds no tensor graph; inspect the configuration it was compiled from")),
        },
        Section::Fusion => both(&inspect::decisions(plan), verbose),
        Section::Memory => both(&inspect::memory(plan), verbose),
        Section::Kernels => both(&inspect::kernels(plan, &target(plan, args)?, verbose), verbose),
        Section::Entries => list(&inspect::entries(plan), verbose),
        Section::Groups => list(&inspect::groups(plan), verbose),
        Section::All => unreachable!("all sections were taken apart"),
    }
}
