//! `chimera-run call`: run one entry point on given tensors.
//!
//! Invariant: the plan is compiled for the shapes of the inputs; names and shapes outside are those of the executable specification.

use crate::estimators::{EstimatorName, Way};
use crate::hyper::HyperArgs;
use crate::model::{Model, Source};
use crate::options::{Failure, ModelOptions, RunOptions};
use crate::probes::{Entries, ModeName};
use crate::weights::{self, WeightOptions};
use chimera_compiler::{EntryKind, EntrySpec};
use chimera_frontends::config::{self, Vocabulary};
use chimera_frontends::layers::Depth;
use chimera_ir::plan::Plan;
use chimera_runtime::call::{self, CallError, Tensors};
use chimera_runtime::exec::Executable;
use chimera_runtime::files::safetensors::{self, SafeTensors};
use chimera_runtime::files::{HostTensor, TensorView, npy};
use clap::ValueEnum;
use serde_json::json;
use std::collections::{BTreeMap, HashSet};
use std::io::{self, Write};
use std::path::PathBuf;

/// Ways into a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Entry {
    /// Logits of all tokens, in parallel
    Logits,
    /// Cross-entropy of labels
    Loss,
    /// Cross-entropy of labels and its gradients: `grad.NAME` for every weight
    Grad,
    /// Losses under all probes of an estimator
    DualLoss,
    /// Hidden states only, in parallel
    Prefill,
    /// Logits of all tokens, one token after another
    Decode,
}

/// The probes of `dual_loss`.
#[derive(clap::Args, Clone, Debug)]
struct Probes {
    /// Estimator whose probes are evaluated (dual_loss) [default: perseq-lowrank]
    #[arg(long, env = "CHIMERA_ESTIMATOR")]
    estimator: Option<EstimatorName>,
    /// Rank of the probes (perseq-lowrank) [default: 1]
    #[arg(long, env = "CHIMERA_RANK", value_parser = clap::value_parser!(u32).range(1..=256))]
    rank: Option<u32>,
    /// Probe size on matrices relative to their mean magnitude (perseq-lowrank) [default: 0.1]
    #[arg(long, env = "CHIMERA_KAPPA")]
    kappa: Option<f64>,
    /// Probe size on vectors (perseq-lowrank) [default: 0.01]
    #[arg(long, env = "CHIMERA_SIGMA")]
    sigma: Option<f64>,
    /// How probes reach ternary weights (mezo) [default: requantise]
    #[arg(long, env = "CHIMERA_MODE")]
    mode: Option<ModeName>,
    /// Directions (mezo) [default: 1]
    #[arg(long, env = "CHIMERA_DIRECTIONS", value_parser = clap::value_parser!(u32).range(1..=4096))]
    directions: Option<u32>,
    /// Entries of directions (mezo) [default: rademacher]
    #[arg(long, env = "CHIMERA_DISTRIBUTION")]
    distribution: Option<Entries>,
    /// Probe size (mezo) [default: 1e-3]
    #[arg(long, env = "CHIMERA_EPS")]
    eps: Option<f64>,
    /// Probe size on ternary matrices relative to their mean magnitude, instead of --eps (mezo)
    #[arg(long, env = "CHIMERA_EPS_REL")]
    eps_rel: Option<f64>,
    /// Seed of the directions; the input `seed` when absent, else 0
    #[arg(short, long, env = "CHIMERA_SEED")]
    seed: Option<u64>,
    /// Step of the directions; the input `step` when absent, else 0
    #[arg(long, env = "CHIMERA_STEP")]
    step: Option<u32>,
}

/// Run one entry point on given tensors.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    exec: RunOptions,
    /// Entry point
    #[arg(short, long, env = "CHIMERA_ENTRY")]
    entry: Entry,
    #[command(flatten)]
    weights: WeightOptions,
    /// Inputs: a .safetensors file, or a .npy file with the tokens
    #[arg(short, long, env = "CHIMERA_INPUTS", value_name = "FILE", required_unless_present = "input")]
    inputs: Option<PathBuf>,
    /// One input; may be given several times
    #[arg(long, value_name = "NAME=FILE.npy", value_parser = named_file)]
    input: Vec<(String, PathBuf)>,
    /// Outputs: a .safetensors file with all of them
    #[arg(short, long, env = "CHIMERA_OUTPUTS", value_name = "FILE", required_unless_present = "output")]
    outputs: Option<PathBuf>,
    /// One output; may be given several times
    #[arg(long, value_name = "NAME=FILE.npy", value_parser = named_file)]
    output: Vec<(String, PathBuf)>,
    /// Iterations of the looped layers; the configuration's number when absent
    #[arg(long, env = "CHIMERA_LOOPS", value_parser = clap::value_parser!(u16).range(1..))]
    loops: Option<u16>,
    /// Rows may leave the loop early, at most after --loops iterations or the input `depth`
    #[arg(long, env = "CHIMERA_ADAPTIVE")]
    adaptive: bool,
    #[command(flatten)]
    probes: Probes,
    /// Print names and shapes of the outputs, and small ones with their values, as one JSON object; tensors of the weight file that
    /// nothing reads are in its list `unused_weights`
    #[arg(long, env = "CHIMERA_JSON")]
    json: bool,
}

fn named_file(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => Ok((name.to_owned(), path.into())),
        _ => Err("expected NAME=FILE.npy".into()),
    }
}

impl From<CallError> for Failure {
    fn from(e: CallError) -> Failure {
        Failure { code: e.exit_code(), message: e.to_string() }
    }
}

/// Run the command.
///
/// # Errors
/// Files that cannot be read or written, tensors that do not fit, or a failed execution.
pub fn run(args: Args) -> Result<(), Failure> {
    let mut inputs = Tensors::new();
    if let Some(path) = &args.inputs {
        inputs = call::read_tensors(path)?;
    }
    for (name, path) in &args.input {
        inputs.insert(name.clone(), npy::read(path)?);
    }
    let scalar = |x: i64| HostTensor::from_i64(&[], &[x]).map_err(|e| Failure::new(e.to_string()));
    if let Some(seed) = args.probes.seed {
        inputs.insert("seed".into(), scalar(seed as i64)?);
    }
    if let Some(step) = args.probes.step {
        inputs.insert("step".into(), scalar(step.into())?);
    }
    let model = open(&args.model)?;
    model.warnings.iter().for_each(|w| eprintln!("warning: {w}"));
    let entry = spec(&args, &model, &mut inputs)?;
    let name = entry.kind.name();
    let file = weights::open(&args.weights, &model)?;
    let packed = weights::packed(&file, &model.config)?;
    let mut exe = Executable::new(plan(&args, &model, entry, packed)?, &args.exec.exec())?;
    let unused = weights::load(&file, &model.config, &mut exe, false)?;
    args.exec.trace.start(&mut exe);
    let outputs = call::run(&mut exe, name, &inputs)?;
    args.exec.trace.finish(&mut exe)?;
    write(&args, &outputs, &unused)
}

/// The model; a safetensors file may stand for the configuration in its header.
fn open(options: &ModelOptions) -> Result<Model, Failure> {
    let ids = options.vocab.as_ref().map(Vocabulary::size).transpose()?;
    let Some(path) = options.path().filter(|p| p.extension().is_some_and(|e| e == "safetensors")) else {
        return Model::open(options, ids);
    };
    let file = SafeTensors::open(path)?;
    let Some(text) = file.metadata().get("config") else {
        return Err(Failure::usage(format!(
            "{}: the header has no configuration, expected one under `config`",
            path.display()
        )));
    };
    let loaded = config::from_text(&path.display().to_string(), text, &options.overrides(ids))?;
    Ok(Model { config: loaded.model, source: Source::Config, phases: loaded.phases, warnings: loaded.warnings })
}

/// The entry point for the shapes of the inputs. Takes the inputs `depth` and `loops` away where all rows have one depth.
fn spec(args: &Args, model: &Model, inputs: &mut Tensors) -> Result<EntrySpec, Failure> {
    let [rows, tokens] = call::batch_shape(inputs)?;
    let hyper = HyperArgs {
        estimator: args.probes.estimator,
        rank: args.probes.rank,
        kappa: args.probes.kappa,
        sigma: args.probes.sigma,
        mode: args.probes.mode,
        directions: args.probes.directions,
        distribution: args.probes.distribution,
        eps: args.probes.eps,
        eps_rel: args.probes.eps_rel,
        ..HyperArgs::default()
    };
    let (kind, tokens) = match args.entry {
        Entry::Logits => (EntryKind::Logits, tokens),
        Entry::Loss => (EntryKind::Loss, tokens),
        Entry::Grad => (EntryKind::Grad, tokens),
        Entry::DualLoss => match hyper.checked()?.way() {
            Way::Probe(scheme) => (EntryKind::DualLoss(scheme), tokens),
            Way::Descend(_) => {
                return Err(Failure::usage(
                    "the entry point dual_loss needs an estimator that probes; choose --estimator perseq-lowrank or mezo, or --entry grad",
                ));
            }
        },
        Entry::Prefill => (EntryKind::Prefill, tokens),
        Entry::Decode => (EntryKind::Decode, 1),
    };
    let given = call::depths(inputs, rows)?;
    if matches!(model.source, Source::Plan(_)) {
        // The depth is part of the plan.
        return Ok(EntrySpec { kind, rows, tokens, depth: None });
    }
    let looping = model.config.looping.as_ref();
    if looping.is_none() && (given.is_some() || args.loops.is_some() || args.adaptive) {
        return Err(Failure::usage(
            "--loops, --adaptive and the input `depth` have no meaning for a model without looped layers",
        ));
    }
    let depth = match (given, args.loops, args.adaptive) {
        // A call draws nothing, also where training does.
        (None, None, false) => looping.map(|l| Depth::Fixed(l.default)),
        (None, Some(n), false) => Some(Depth::Fixed(n.into())),
        (None, n, true) => {
            let n = n.map_or(looping.map_or(1, |l| l.range[1]), usize::from);
            let all = HostTensor::from_i32(&[rows], &vec![n as i32; rows]).map_err(|e| Failure::new(e.to_string()))?;
            inputs.insert("depth".into(), all);
            Some(Depth::PerRow { max: n, adaptive: true })
        }
        (Some(depths), n, adaptive) => {
            let deepest = depths.iter().copied().max().unwrap_or(1) as usize;
            if !adaptive && n.is_none() && depths.iter().all(|&d| d as usize == deepest) {
                // The same for all rows: the loop needs no masks.
                inputs.retain(|name, _| name != "depth" && name != "loops");
                return Ok(EntrySpec { kind, rows, tokens, depth: Some(Depth::Fixed(deepest)) });
            }
            Some(Depth::PerRow { max: n.map_or(deepest, usize::from).max(deepest), adaptive })
        }
    };
    Ok(EntrySpec { kind, rows, tokens, depth })
}

/// The plan that was named, or one compiled for the inputs.
fn plan(args: &Args, model: &Model, entry: EntrySpec, packed: HashSet<String>) -> Result<Plan, Failure> {
    match &model.source {
        Source::Plan(_) if args.loops.is_some() || args.adaptive => {
            Err(Failure::usage("--loops and --adaptive are built into a compiled plan; name the configuration instead"))
        }
        _ => model.plan(vec![entry], packed, &args.exec),
    }
}

fn write(args: &Args, outputs: &Tensors, unused: &[String]) -> Result<(), Failure> {
    for (name, path) in &args.output {
        let Some(tensor) = outputs.get(name) else {
            let known: Vec<&str> = outputs.keys().map(String::as_str).collect();
            return Err(Failure::usage(format!("no output is called `{name}`, expected one of {}", known.join(", "))));
        };
        npy::write(path, tensor.view())?;
    }
    if let Some(path) = &args.outputs {
        let views: Vec<(&str, TensorView<'_>)> = outputs.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
        safetensors::write(path, &views, &BTreeMap::new())?;
    }
    if args.json {
        let mut all = serde_json::Map::new();
        for (name, t) in outputs {
            let mut row = json!({ "dtype": t.dtype().name(), "shape": t.shape() });
            if t.shape().iter().product::<usize>() <= 16 {
                row["values"] = t.to_i64().map_or_else(|_| json!(t.to_f32()), |ints| json!(ints));
            }
            all.insert(name.clone(), row);
        }
        if !unused.is_empty() {
            all.insert("unused_weights".into(), json!(unused));
        }
        writeln!(io::stdout().lock(), "{}", serde_json::Value::Object(all))?;
    }
    Ok(())
}
