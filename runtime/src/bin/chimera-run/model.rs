//! From what a user names as a model to its configuration, plan, weights and vocabulary.
//!
//! Invariant: the kind of a file is decided by its first bytes, never by its name alone.

use crate::memory::compile_within;
use crate::options::{Failure, ModelOptions, RunOptions};
use chimera_compiler::{CompileError, EntrySpec, Options};
use chimera_frontends::config::{self, Loaded, ModelConfig, O200K_VOCABULARY, Overrides, Phase};
use chimera_ir::plan::{self, Plan};
use chimera_runtime::exec::PREPARE;
use chimera_runtime::files::b158;
use chimera_runtime::text::{Vocab, VocabSpec};
use chimera_runtime::train::checkpoint;
use chimera_runtime::train::weights::WeightFile;
use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::path::Path;

/// First bytes of plans: binary and text.
const PLAN_MAGIC: [&[u8]; 2] = [b"CHIMPLAN", b"chimera-plan"];
/// Most bytes of a plan that are read.
const MAX_PLAN_BYTES: u64 = 1 << 30;

/// Where a model came from.
#[derive(Debug)]
pub enum Source {
    /// A configuration: no weights yet.
    Config,
    /// A compiled plan: no weights yet.
    Plan(Box<Plan>),
    /// Weights that bring their configuration.
    Weights(WeightFile),
}

/// A model.
#[derive(Debug)]
pub struct Model {
    /// The configuration.
    pub config: ModelConfig,
    /// Where it came from.
    pub source: Source,
    /// The phases of training that its configuration describes.
    pub phases: Vec<Phase>,
    /// Sentences for the user about things that are allowed and doubtful.
    pub warnings: Vec<String>,
}

impl Model {
    /// Opens the model that `options` name. `vocab_size` replaces the vocabulary of a configuration; a plan or weights must agree.
    ///
    /// # Errors
    /// No such model, a damaged file (5), an invalid configuration (3), or options that do not apply (2).
    pub fn open(options: &ModelOptions, vocab_size: Option<usize>) -> Result<Model, Failure> {
        let overrides = options.overrides(vocab_size);
        let Some(path) = options.path() else {
            let scale =
                options.scale.ok_or_else(|| Failure::usage("no model is named; give a file or --scale pico"))?;
            return Ok(Model::of(config::preset(scale, &overrides)?, Source::Config));
        };
        if path.is_dir() {
            let newest = checkpoint::latest(path)?.ok_or_else(|| {
                Failure::new(format!(
                    "{}: the folder has no checkpoint; name a configuration or a folder of a training run",
                    path.display()
                ))
            })?;
            return Model::weights(&newest, options, vocab_size);
        }
        let head = head_of(path)?;
        if PLAN_MAGIC.iter().any(|m| head.starts_with(m)) {
            refuse_overrides(options, "a compiled plan")?;
            let plan = read_plan(path)?;
            let loaded = config::from_text(&path.display().to_string(), &plan.config, &Overrides::default())?;
            check_vocab(path, loaded.model.vocab_size, vocab_size)?;
            return Ok(Model::of(loaded, Source::Plan(Box::new(plan))));
        }
        if head.starts_with(&b158::MAGIC) || path.extension().is_some_and(|e| e == "safetensors") {
            return Model::weights(path, options, vocab_size);
        }
        Ok(Model::of(config::load(path, &overrides)?, Source::Config))
    }

    fn weights(path: &Path, options: &ModelOptions, vocab_size: Option<usize>) -> Result<Model, Failure> {
        refuse_overrides(options, "weights, which bring their own configuration")?;
        let file = WeightFile::open(path)?;
        let text = file.metadata().get("config").ok_or_else(|| {
            Failure::usage(format!(
                "{}: the weights bring no configuration; name the configuration and give the weights apart",
                path.display()
            ))
        })?;
        let loaded = config::from_text(&path.display().to_string(), text, &Overrides::default())?;
        check_vocab(path, loaded.model.vocab_size, vocab_size)?;
        Ok(Model::of(loaded, Source::Weights(file)))
    }

    fn of(loaded: Loaded, source: Source) -> Model {
        let mut warnings = loaded.warnings;
        for key in loaded.not_yet.iter().filter(|k| !k.off) {
            warnings.push(format!("{} is not implemented and has no effect: {}", key.path, key.reason));
        }
        Model { config: loaded.model, source, phases: loaded.phases, warnings }
    }

    /// The vocabulary without looking at data: `spec`, else the one saved with the weights, else the one of this size.
    ///
    /// # Errors
    /// When there is none, it cannot be read, or its size is not that of the model (3).
    pub fn vocab(&self, spec: Option<&VocabSpec>) -> Result<Vocab, Failure> {
        let saved = match &self.source {
            Source::Weights(file) => file.metadata().get("vocab").map(|text| Vocab::from_text(text)).transpose()?,
            Source::Config | Source::Plan(_) => None,
        };
        let vocab = match (spec, saved) {
            (None, Some(vocab)) | (Some(VocabSpec::Restricted), Some(vocab))
                if vocab.size() == self.config.vocab_size =>
            {
                vocab
            }
            (None | Some(VocabSpec::Restricted), _) => {
                let spec = spec.cloned().or_else(|| spec_of_size(self.config.vocab_size));
                match spec {
                    Some(VocabSpec::Bytes) => Vocab::bytes(),
                    Some(VocabSpec::O200k) => Vocab::o200k(),
                    _ => {
                        return Err(Failure::usage(format!(
                            "the vocabulary of the model with its {} tokens is not known; give --vocab FILE",
                            self.config.vocab_size
                        )));
                    }
                }
            }
            (Some(VocabSpec::Bytes), _) => Vocab::bytes(),
            (Some(VocabSpec::O200k), _) => Vocab::o200k(),
            (Some(VocabSpec::File(path)), saved) => {
                let vocab = Vocab::load(path)?;
                if saved.is_some_and(|saved| saved != vocab) {
                    return Err(other_vocab(path, &vocab));
                }
                vocab
            }
        };
        self.check(&vocab)?;
        Ok(vocab)
    }

    /// Compares sizes.
    ///
    /// # Errors
    /// When the model has another number of tokens than the vocabulary.
    pub fn check(&self, vocab: &Vocab) -> Result<(), Failure> {
        if vocab.size() == self.config.vocab_size {
            return Ok(());
        }
        Err(Failure::config(format!(
            "the vocabulary {} has {} tokens, the model has {}; give the vocabulary that the model was made with",
            vocab.name(),
            vocab.size(),
            self.config.vocab_size
        )))
    }

    /// A plan with the given entry points: compiled for the ternary weights `packed`, or the plan that was named, which must have them.
    ///
    /// # Errors
    /// When the configuration cannot be compiled, or the named plan lacks an entry point.
    pub fn plan(&self, entries: Vec<EntrySpec>, packed: HashSet<String>, run: &RunOptions) -> Result<Plan, Failure> {
        let Source::Plan(plan) = &self.source else {
            return compile_entries(&self.config, entries, packed, run);
        };
        for name in entries.iter().map(|e| e.kind.name()) {
            if plan.entry(name).is_none() {
                let known: Vec<&str> = plan.entries.iter().map(|e| e.name.as_str()).collect();
                return Err(Failure::usage(format!(
                    "the plan has no entry point `{name}`, it has {}; compile one that has it or name the configuration",
                    known.join(", ")
                )));
            }
        }
        let kinds: Vec<&str> = entries.iter().map(|e| e.kind.name()).collect();
        let plan = with_entries(plan, &kinds);
        let needed = plan.memory(run.threads()).total();
        match run.budget {
            Some(budget) if needed > budget => Err(Failure {
                code: 4,
                message: format!(
                    "the plan needs {needed} bytes, the budget is {budget}; compile it by chimerac compile --budget, or name the configuration"
                ),
            }),
            _ => Ok(plan),
        }
    }
}

/// A plan with those of the named entry points that it has, and what they need.
pub fn with_entries(plan: &Plan, names: &[&str]) -> Plan {
    let mut plan = plan.clone();
    plan.retain_entries(|name| name == PREPARE || names.contains(&name));
    plan
}

/// Compiles a configuration in process, with codes in place of the latents of the ternary weights `packed`.
///
/// # Errors
/// When it cannot be compiled.
pub fn compile_entries(
    config: &ModelConfig,
    entries: Vec<EntrySpec>,
    packed: HashSet<String>,
    run: &RunOptions,
) -> Result<Plan, Failure> {
    let options = Options { entries, packed, ..run.compile()? };
    Ok(compile_within(config, options, run.budget, run.threads())?)
}

/// The vocabulary that a number of tokens stands for, if it is one of the two without a file.
pub fn spec_of_size(tokens: usize) -> Option<VocabSpec> {
    match tokens {
        config::BYTE_VOCABULARY => Some(VocabSpec::Bytes),
        O200K_VOCABULARY => Some(VocabSpec::O200k),
        _ => None,
    }
}

impl From<CompileError> for Failure {
    fn from(e: CompileError) -> Failure {
        match e {
            CompileError::Infer { .. } => Failure::config(format!("the configuration cannot be compiled: {e}")),
            CompileError::Option(_) => Failure::usage(e.to_string()),
            CompileError::Budget { .. } => Failure { code: 4, message: e.to_string() },
            _ => Failure::new(e.to_string()),
        }
    }
}

/// A saved vocabulary that is not the one of the weights.
pub fn other_vocab(path: &Path, vocab: &Vocab) -> Failure {
    Failure::config(format!(
        "{}: this vocabulary ({}, {} ids) is not the one that the weights were made with; leave --vocab out",
        path.display(),
        vocab.name(),
        vocab.size()
    ))
}

/// Scale and `--set` change configurations only.
fn refuse_overrides(options: &ModelOptions, what: &str) -> Result<(), Failure> {
    match options.overridden() {
        false => Ok(()),
        true => Err(Failure::usage(format!("--scale and --set cannot change {what}; name a configuration instead"))),
    }
}

fn check_vocab(path: &Path, found: usize, wanted: Option<usize>) -> Result<(), Failure> {
    match wanted {
        Some(n) if n != found => Err(Failure::config(format!(
            "{}: the model has {found} tokens, the vocabulary has {n}; give the vocabulary that the model was made with",
            path.display()
        ))),
        _ => Ok(()),
    }
}

/// The first bytes of a file; none of a file that cannot be opened, whose reader will say why.
fn head_of(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut head = vec![];
    let is_file = fs::metadata(path).is_ok_and(|m| m.is_file());
    if let (true, Ok(file)) = (is_file, fs::File::open(path)) {
        let read = file.take(16).read_to_end(&mut head);
        read.map_err(|e| Failure::new(format!("{}: cannot read the file: {e}", path.display())))?;
    }
    Ok(head)
}

fn read_plan(path: &Path) -> Result<Plan, Failure> {
    let fail = |e| Failure::new(format!("{}: cannot read the plan: {e}", path.display()));
    let mut bytes = vec![];
    fs::File::open(path).map_err(fail)?.take(MAX_PLAN_BYTES).read_to_end(&mut bytes).map_err(fail)?;
    let damaged =
        |e: &dyn std::fmt::Display| Failure::corrupted(format!("{}: {e}; compile the plan again", path.display()));
    if bytes.starts_with(PLAN_MAGIC[0]) {
        return plan::from_bytes(&bytes).map_err(|e| damaged(&e));
    }
    plan::from_text(std::str::from_utf8(&bytes).map_err(|e| damaged(&e))?).map_err(|e| damaged(&e))
}
