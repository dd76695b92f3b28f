//! `chimera-run pack`: latents of ternary weights to packed codes and scales.
//!
//! Invariant: a model runs with the packed file bit for bit as with the latents; what is not ternary is copied.

use crate::model::Model;
use crate::options::{Failure, ModelOptions};
use crate::weights::{self, WeightOptions};
use chimera_frontends::config::{Activation, ModelConfig, ParamKind, WeightScale, expert_stack, parameters};
use chimera_runtime::files::b158::{self, Entry, ScaleEncoding, ScaleMode, Ternary, ternarise};
use chimera_runtime::train::weights::WeightFile;
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use serde_json::json;
use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::PathBuf;

const EXAMPLES: &str = "Examples:
  chimera-run pack runs/first -o first.b158
  chimera-run pack config.json --weights model.safetensors -o model.b158
  chimera-run generate first.b158 --prompt \"Once upon\"

The file is about a sixteenth of its latents and needs no preparation when it is opened. It brings its configuration and, if known, its
vocabulary. It can be run, not trained. Experts of a layer are stored together, under one name with * for the expert.";

/// Pack the ternary weights of a model: 2 bits a weight instead of 32, for running it
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    weights: WeightOptions,
    /// The file to write
    #[arg(short, long, env = "CHIMERA_OUTPUT", value_name = "FILE.b158")]
    output: PathBuf,
    /// Print one JSON object instead of the path
    #[arg(long, env = "CHIMERA_JSON")]
    json: bool,
    /// No progress and no report on stderr
    #[arg(short, long, env = "CHIMERA_QUIET")]
    quiet: bool,
}

/// One tensor of the new file.
struct Item {
    name: String,
    dims: Vec<usize>,
    /// Names of the latents, in order; none of a tensor that is copied.
    latents: Vec<String>,
}

/// Run the command.
///
/// # Errors
/// A model that cannot be opened or is packed already, damaged weights, or a file that cannot be written.
pub fn run(args: Args) -> Result<(), Failure> {
    let model = Model::open(&args.model, None)?;
    if !args.quiet {
        model.warnings.iter().for_each(|w| eprintln!("warning: {w}"));
    }
    let config = &model.config;
    let file = weights::open(&args.weights, &model)?;
    if let Some(tensor) = file.packed().first() {
        return Err(Failure::usage(format!(
            "{}: tensor `{}` is packed already; name the checkpoint or file that has its latents",
            file.path().display(),
            tensor.name
        )));
    }
    if config.quantization.activation == Activation::Float {
        return Err(Failure::usage(
            "the model has float activations, which meet its ternary weights as floats; packed weights cannot serve it",
        ));
    }
    if config.quantization.dynamic.is_some() {
        return Err(Failure::usage(
            "the model has a dynamic quantiser (quantization.dynamic.mode), whose threshold is beside its weights; packed weights are for quantisers without a state",
        ));
    }
    let mut metadata = BTreeMap::from([("config".to_owned(), config.to_json().to_string())]);
    match args.model.vocab()? {
        Some(spec) => {
            let vocab = model.vocab(Some(&spec))?;
            args.model.check_vocab(&vocab)?;
            metadata.insert("vocab".into(), vocab.to_text());
        }
        None => metadata.extend(file.metadata().get("vocab").map(|text| ("vocab".to_owned(), text.clone()))),
    }
    let (items, absent) = items(config, &file)?;
    if !args.quiet {
        let read: HashSet<&str> = items.iter().flat_map(Item::sources).collect();
        let left = |n: &&str| !read.contains(n) && !n.starts_with("optim.") && !n.starts_with("state.");
        let left: Vec<String> = file.names().into_iter().filter(left).map(str::to_owned).collect();
        weights::report_unused(&file, config, &left).iter().for_each(|line| eprintln!("{line}"));
        absent.iter().for_each(|name| eprintln!("note: {}: no tensor `{name}`", file.path().display()));
    }
    b158::write(&args.output, &pack(config, &file, &items, args.quiet)?, &metadata)?;
    report(&args, &items)
}

impl Item {
    /// The tensors that it is made of.
    fn sources(&self) -> impl Iterator<Item = &str> {
        let own = self.latents.is_empty().then_some(self.name.as_str());
        self.latents.iter().map(String::as_str).chain(own)
    }
}

/// What the file becomes, and the parameters that it lacks; a plan that reads those will say so.
fn items(config: &ModelConfig, file: &WeightFile) -> Result<(Vec<Item>, Vec<String>), Failure> {
    let names: HashSet<&str> = file.names().into_iter().collect();
    let (mut items, mut absent) = (BTreeMap::<String, Item>::new(), vec![]);
    for p in parameters(config) {
        if !names.contains(p.name.as_str()) {
            absent.push(p.name);
            continue;
        }
        let name = match (p.kind, expert_stack(&p.name)) {
            (ParamKind::Ternary, Some((stack, _))) => stack,
            _ => p.name.clone(),
        };
        let new = || Item { name: name.clone(), dims: p.dims.clone(), latents: vec![] };
        let item = items.entry(name.clone()).or_insert_with(new);
        if p.kind == ParamKind::Ternary {
            item.latents.push(p.name);
        }
    }
    for name in absent.iter().filter_map(|n| expert_stack(n)).map(|s| s.0) {
        if items.contains_key(&name) {
            return Err(Failure::new(format!(
                "{}: some experts of `{name}` are missing; check that the file belongs to this configuration",
                file.path().display()
            )));
        }
    }
    Ok((items.into_values().collect(), absent))
}

/// Reads and packs all items, on all threads.
fn pack<'a>(
    config: &ModelConfig,
    file: &WeightFile,
    items: &'a [Item],
    quiet: bool,
) -> Result<Vec<Entry<'a>>, Failure> {
    let total: usize = items.iter().map(|i| i.dims.iter().product::<usize>() * i.latents.len().max(1)).sum();
    let style = ProgressStyle::with_template("packing {bar:30} {percent} % {eta}");
    let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(total as u64) };
    let bar = bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let read = |name: &str, dims: &[usize]| -> Result<Vec<f32>, Failure> {
        let (shape, values) = file.floats(name)?;
        if shape != dims {
            return Err(Failure::new(format!(
                "{}: tensor `{name}` has shape {shape:?}, expected {dims:?}; check that the file belongs to this configuration",
                file.path().display()
            )));
        }
        bar.inc(values.len() as u64);
        Ok(values)
    };
    let one = |item: &'a Item| -> Result<Entry<'a>, Failure> {
        if item.latents.is_empty() {
            return Ok(Entry::f32_owned(&item.name, &item.dims, read(&item.name, &item.dims)?));
        }
        let [n, k] = item.dims[..] else {
            return Err(Failure::new(format!("ternary weight `{}` is no matrix", item.name)));
        };
        let parts: Result<Vec<Ternary>, Failure> =
            item.latents.iter().map(|name| Ok(quantise(config, &read(name, &item.dims)?, n, k))).collect();
        let parts = parts?;
        Ok(match expert_stack(&item.latents[0]) {
            Some(_) => Entry::ternary_stack(&item.name, n, k, &parts, ScaleEncoding::F32),
            None => Entry::ternary(&item.name, n, k, &parts[0], ScaleEncoding::F32),
        })
    };
    let packed = items.par_iter().map(one).collect();
    bar.finish_and_clear();
    packed
}

/// What the operations of the graph make of a latent.
fn quantise(config: &ModelConfig, latent: &[f32], n: usize, k: usize) -> Ternary {
    let q = &config.quantization;
    let mode = match q.weight_scale {
        WeightScale::Group => ScaleMode::PerGroup,
        WeightScale::Row => ScaleMode::PerRow,
        WeightScale::Tensor => ScaleMode::PerTensor,
    };
    ternarise(latent, n, k, weights::group_size(config, k), q.threshold_ratio as f32, mode)
}

fn report(args: &Args, items: &[Item]) -> Result<(), Failure> {
    let path = args.output.display();
    let bytes = std::fs::metadata(&args.output)
        .map_err(|e| Failure::new(format!("{path}: cannot look at the file that was written: {e}")))?
        .len();
    let matrices: usize = items.iter().map(|i| i.latents.len()).sum();
    let weights: usize = items.iter().map(|i| i.latents.len() * i.dims.iter().product::<usize>()).sum();
    let floats: Vec<usize> = items.iter().filter(|i| i.latents.is_empty()).map(|i| i.dims.iter().product()).collect();
    if !args.quiet {
        eprintln!(
            "{matrices} ternary matrices of {weights} weights packed, {} other tensors of {} numbers copied, {bytes} bytes",
            floats.len(),
            floats.iter().sum::<usize>()
        );
    }
    let mut out = std::io::stdout().lock();
    match args.json {
        true => writeln!(
            out,
            "{}",
            json!({ "path": args.output, "bytes": bytes, "tensors": items.len(), "ternary_matrices": matrices,
                    "ternary_weights": weights, "float_tensors": floats.len() })
        )?,
        false => writeln!(out, "{path}")?,
    }
    Ok(())
}
