//! Which weights a model runs with: the file, what is packed in it, and a word about tensors that nothing reads.
//!
//! Invariant: a plan takes codes in place of latents exactly where the file has codes that fit the configuration.

use crate::model::{Model, Source};
use crate::options::Failure;
use chimera_compiler::FISHER;
use chimera_frontends::config::{ModelConfig, ParamKind, WeightScale, expert_stack, parameters};
use chimera_runtime::exec::Executable;
use chimera_runtime::train::TrainError;
use chimera_runtime::train::weights::WeightFile;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Deref;
use std::path::{Path, PathBuf};

/// The most names that stderr lists; JSON has them all.
const LISTED: usize = 16;

/// Which weights.
#[derive(clap::Args, Clone, Debug)]
pub struct WeightOptions {
    /// Weights: .safetensors or .b158, float or packed; those that the model brings when absent
    #[arg(short, long, env = "CHIMERA_WEIGHTS", value_name = "FILE")]
    pub weights: Option<PathBuf>,
    /// Compare packed weights with their checksums before use, which reads all of them; others are always compared
    #[arg(long, env = "CHIMERA_VERIFY")]
    pub verify: bool,
}

/// An open weight file: one of its own, or that of the model.
pub enum Weights<'a> {
    /// Named by an option.
    Own(WeightFile),
    /// What the model was named by.
    Model(&'a WeightFile),
}

impl Deref for Weights<'_> {
    type Target = WeightFile;

    fn deref(&self) -> &WeightFile {
        match self {
            Weights::Own(file) => file,
            Weights::Model(file) => file,
        }
    }
}

/// Opens the weights of a model.
///
/// # Errors
/// When there are none, or the file is damaged.
pub fn open<'a>(options: &WeightOptions, model: &'a Model) -> Result<Weights<'a>, Failure> {
    let file = match (&options.weights, &model.source) {
        (Some(path), _) => Weights::Own(WeightFile::open(path)?),
        (None, Source::Weights(file)) => Weights::Model(file),
        (None, _) => {
            return Err(Failure::usage(
                "the model has no weights; name a folder of a training run or a .b158 file, or give --weights FILE",
            ));
        }
    };
    if options.verify {
        file.verify()?;
    }
    Ok(file)
}

/// The shape of every ternary weight, and of the stacks that experts can be stored in.
pub fn ternary_shapes(config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
    let mut shapes = BTreeMap::new();
    for p in parameters(config).into_iter().filter(|p| p.kind == ParamKind::Ternary) {
        if let Some((stack, _)) = expert_stack(&p.name) {
            let dims = || [&[0], &p.dims[..]].concat();
            shapes.entry(stack).or_insert_with(dims)[0] += 1;
        }
        shapes.insert(p.name, p.dims);
    }
    shapes
}

/// Columns of a ternary weight of `k` columns that share a scale.
pub fn group_size(config: &ModelConfig, k: usize) -> usize {
    match config.quantization.weight_scale {
        WeightScale::Group => config.quantization.group_size,
        WeightScale::Row | WeightScale::Tensor => k,
    }
}

/// The ternary weights that the file has as codes.
///
/// # Errors
/// A packed tensor that the configuration wants as floats, in another shape, or with other scales.
pub fn packed(file: &WeightFile, config: &ModelConfig) -> Result<HashSet<String>, Failure> {
    let ternary = ternary_shapes(config);
    let all: HashMap<String, Vec<usize>> = parameters(config).into_iter().map(|p| (p.name, p.dims)).collect();
    let mut packed = HashSet::new();
    for tensor in file.packed() {
        let wrong = |why: String| {
            Err(Failure::new(format!("{}: tensor `{}` is packed ternary {why}", file.path().display(), tensor.name)))
        };
        let Some(dims) = ternary.get(tensor.name) else {
            match all.contains_key(tensor.name) {
                true => return wrong("and the model reads it as floats; only ternary matrices can be packed".into()),
                false => continue,
            }
        };
        if dims != tensor.shape {
            return wrong(format!(
                "of shape {:?}, expected {dims:?}; check that the file belongs to this configuration",
                tensor.shape
            ));
        }
        let (k, group) = (tensor.shape[tensor.shape.len() - 1], tensor.group);
        let wanted = group_size(config, k);
        if group.min(k) != wanted.min(k) {
            return wrong(format!(
                "with a scale for each {group} columns, the configuration has one for each {wanted}; pack its latents again"
            ));
        }
        packed.insert(tensor.name.to_owned());
    }
    Ok(packed)
}

/// Sets the weights of `exe`. Returns the names of the tensors that the plan does not read, which stderr hears about unless `quiet`.
///
/// # Errors
/// Tensors that are missing, misshapen or damaged.
pub fn load(
    file: &WeightFile,
    config: &ModelConfig,
    exe: &mut Executable,
    quiet: bool,
) -> Result<Vec<String>, Failure> {
    let unused = file.assign(exe, false)?;
    if !quiet {
        report_unused(file, config, &unused).iter().for_each(|line| eprintln!("{line}"));
    }
    Ok(unused)
}

/// Sentences about tensors that nothing reads: weights of the model that this plan can do without, and others.
pub fn report_unused(file: &WeightFile, config: &ModelConfig, unused: &[String]) -> Vec<String> {
    let mut known: HashSet<String> = parameters(config).into_iter().map(|p| p.name).collect();
    known.extend(ternary_shapes(config).into_keys());
    let (known, unknown): (Vec<&String>, Vec<&String>) = unused.iter().partition(|n| known.contains(*n));
    let path = file.path().display();
    let line = |names: &[&String], what: &str| {
        let shown: Vec<String> = names.iter().take(LISTED).map(|n| format!("`{n}`")).collect();
        let more = names.len().saturating_sub(LISTED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        (!names.is_empty()).then(|| format!("{path}: {} tensors {what}: {}{more}", names.len(), shown.join(", ")))
    };
    let known = line(&known, "of the model are not read here").map(|l| format!("note: {l}"));
    let unknown = line(&unknown, "are no weights of this model and have no effect").map(|l| format!("warning: {l}"));
    known.into_iter().chain(unknown).collect()
}

/// Sets the scores by which a mask chooses, from a file that has one tensor for each weight by its name.
///
/// # Errors
/// A file that cannot be read, or that lacks one of them.
pub fn read_scores(path: &Path, exec: &mut Executable) -> Result<(), Failure> {
    let file = WeightFile::open(path)?;
    for weight in exec.plan().weights.clone() {
        let Some(name) = weight.name.strip_prefix(FISHER) else { continue };
        let (dims, values) = file.floats(name)?;
        exec.set_weight(&weight.name, &dims, &values).map_err(TrainError::from)?;
    }
    Ok(())
}
