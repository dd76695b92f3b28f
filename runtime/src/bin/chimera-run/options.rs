//! What the subcommands share: the way a command fails, and the options for models and for execution.
//!
//! Invariant: exit codes are 0 ok, 1 failure, 2 usage, 3 invalid configuration, 4 resource, 5 corrupted file.

use crate::trace::TraceOptions;
use chimera_codegen::{Allowed, Target};
use chimera_compiler::Options;
use chimera_compiler::budget::parse_bytes;
use chimera_compiler::tuning::Table;
use chimera_frontends::config::{ConfigError, Overrides, Scale, Vocabulary, VocabularyError};
use chimera_ir::plan::PlanError;
use chimera_runtime::affinity::available_threads;
use chimera_runtime::exec::{ExecError, ExecOptions};
use chimera_runtime::files::{self, FileError};
use chimera_runtime::generate::GenerateError;
use chimera_runtime::text::{TextError, Vocab, VocabSpec};
use chimera_runtime::train::TrainError;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Larger files are not tuning tables.
const MAX_TABLE_BYTES: u64 = 1 << 26;

/// Why a command ends, and its exit code.
#[derive(Debug)]
pub struct Failure {
    /// Exit code of the process.
    pub code: u8,
    /// A sentence for stderr; nothing is printed when it is empty.
    pub message: String,
}

impl Failure {
    /// A failure that has no code of its own: 1.
    pub fn new(message: impl Into<String>) -> Failure {
        Failure { code: 1, message: message.into() }
    }

    /// Options that contradict one another or the model: 2.
    pub fn usage(message: impl Into<String>) -> Failure {
        Failure { code: 2, message: message.into() }
    }

    /// A model description that cannot be used: 3.
    pub fn config(message: impl Into<String>) -> Failure {
        Failure { code: 3, message: message.into() }
    }

    /// A file whose contents are damaged: 5.
    pub fn corrupted(message: impl Into<String>) -> Failure {
        Failure { code: 5, message: message.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Configuration errors bring their own heading with a code.
        if self.message.starts_with("error[") {
            return f.write_str(&self.message);
        }
        write!(f, "error: {}", self.message)
    }
}

impl From<ConfigError> for Failure {
    fn from(e: ConfigError) -> Failure {
        Failure::config(e.to_string())
    }
}

impl From<VocabularyError> for Failure {
    fn from(e: VocabularyError) -> Failure {
        match &e {
            VocabularyError::DataDecide => Failure::usage(e.to_string()),
            VocabularyError::Read(..) => Failure::new(e.to_string()),
            VocabularyError::Damaged { .. } => Failure::corrupted(e.to_string()),
        }
    }
}

impl From<FileError> for Failure {
    fn from(e: FileError) -> Failure {
        Failure { code: e.exit_code(), message: e.to_string() }
    }
}

impl From<ExecError> for Failure {
    fn from(e: ExecError) -> Failure {
        Failure { code: e.exit_code(), message: e.to_string() }
    }
}

impl From<GenerateError> for Failure {
    fn from(e: GenerateError) -> Failure {
        match e {
            GenerateError::Exec(e) => e.into(),
            GenerateError::Sample(_) => Failure::usage(e.to_string()),
            e => Failure::new(e.to_string()),
        }
    }
}

impl From<PlanError> for Failure {
    fn from(e: PlanError) -> Failure {
        Failure::corrupted(e.to_string())
    }
}

impl From<TextError> for Failure {
    fn from(e: TextError) -> Failure {
        let code = match &e {
            TextError::Io { error, .. } if is_full(error) => 4,
            TextError::BadVocab { .. } | TextError::BadCache { .. } | TextError::Damaged { .. } => 5,
            TextError::NoFiles | TextError::BadFraction(_) | TextError::BadSize { .. } => 2,
            _ => 1,
        };
        Failure { code, message: e.to_string() }
    }
}

impl From<TrainError> for Failure {
    fn from(e: TrainError) -> Failure {
        match e {
            TrainError::Text(e) => e.into(),
            TrainError::Io { path: None, source } => source.into(),
            e => Failure { code: e.exit_code(), message: e.to_string() },
        }
    }
}

/// Writing to stdout or a log. A closed pipe is the reader's wish and ends the command quietly.
impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Failure {
        match e.kind() {
            io::ErrorKind::BrokenPipe => Failure { code: 0, message: String::new() },
            _ => Failure { code: if is_full(&e) { 4 } else { 1 }, message: format!("cannot write the output: {e}") },
        }
    }
}

fn is_full(e: &io::Error) -> bool {
    files::is_full(e.kind()) || e.kind() == io::ErrorKind::OutOfMemory
}

/// Which model.
#[derive(clap::Args, Clone, Debug)]
pub struct ModelOptions {
    /// Configuration (JSON), compiled plan, folder of a training run, or weights (.b158)
    #[arg(value_name = "MODEL", env = "CHIMERA_MODEL")]
    pub model: Option<PathBuf>,
    /// The same as an option
    #[arg(short = 'm', long = "model", value_name = "MODEL", conflicts_with = "model")]
    pub model_option: Option<PathBuf>,
    /// Named scale laid over the configuration; alone, it stands for the defaults at that scale
    #[arg(long, env = "CHIMERA_SCALE", value_name = "test|pico|nano|tiny|small|medium|full")]
    pub scale: Option<Scale>,
    /// Override of one configuration key; may be given several times
    #[arg(long = "set", env = "CHIMERA_SET", value_name = "KEY.PATH=VALUE", value_delimiter = ';')]
    pub sets: Vec<String>,
    /// Vocabulary: bytes (257 ids), o200k (200073 ids), o200k restricted to the ids in the data (to N of them), or a saved vocabulary (`chimera-run tokenizer train` makes one of its own)
    #[arg(long, env = "CHIMERA_VOCAB", value_name = "bytes|o200k|o200k:restricted[=N]|FILE")]
    pub vocab: Option<Vocabulary>,
}

impl ModelOptions {
    /// The model that was named, by place or by option.
    pub fn path(&self) -> Option<&Path> {
        self.model_option.as_deref().or(self.model.as_deref())
    }

    /// The overrides for a vocabulary of `vocab_size` ids; nothing keeps the configuration's own number.
    pub fn overrides(&self, vocab_size: Option<usize>) -> Overrides {
        Overrides { scale: self.scale, sets: self.sets.clone(), vocab_size }
    }

    /// The vocabulary that was named.
    ///
    /// # Errors
    /// A mere number of ids, which gives text no meaning.
    pub fn vocab(&self) -> Result<Option<VocabSpec>, Failure> {
        Ok(match &self.vocab {
            None => None,
            Some(Vocabulary::Bytes) => Some(VocabSpec::Bytes),
            Some(Vocabulary::O200k) => Some(VocabSpec::O200k),
            Some(Vocabulary::Restricted(_)) => Some(VocabSpec::Restricted),
            Some(Vocabulary::File(path)) => Some(VocabSpec::File(path.clone())),
            Some(Vocabulary::Size(n)) => {
                return Err(Failure::usage(format!(
                    "--vocab {n} says how many ids there are and not what they mean; give bytes, o200k, o200k:restricted or a saved vocabulary"
                )));
            }
        })
    }

    /// Compares the vocabulary that was found with `o200k:restricted=N`.
    ///
    /// # Errors
    /// When it has another number of ids.
    pub fn check_vocab(&self, found: &Vocab) -> Result<(), Failure> {
        match self.vocab {
            Some(Vocabulary::Restricted(Some(n))) if n != found.size() => Err(Failure::usage(format!(
                "--vocab o200k:restricted={n}: the data need {} ids; leave the number out or give this one",
                found.size()
            ))),
            _ => Ok(()),
        }
    }

    /// Whether options change the configuration.
    pub fn overridden(&self) -> bool {
        self.scale.is_some() || !self.sets.is_empty()
    }
}

/// On what a plan runs.
#[derive(clap::Args, Clone, Debug)]
pub struct RunOptions {
    /// Threads; all that may run at once when absent
    #[arg(short, long, env = "CHIMERA_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Emitters that may serve kernels, separated by commas; all when absent
    #[arg(long, env = "CHIMERA_EMITTERS", value_parser = parse_emitters)]
    pub emitters: Option<Allowed>,
    /// Machine to generate code for, such as x86-64-v3
    #[arg(long, visible_alias = "isa", env = "CHIMERA_TARGET", default_value = "host")]
    pub target: Target,
    /// Choose the variants of kernels by this table, which chimerac tune has made on this machine; for configurations, not for plans
    #[arg(long, env = "CHIMERA_TUNING", value_name = "TABLE")]
    pub tuning: Option<PathBuf>,
    /// Most megabytes of memory for weights, states and intermediate results
    #[arg(long, env = "CHIMERA_MAX_MEMORY", value_name = "MB")]
    pub max_memory: Option<u64>,
    /// Memory of the whole process to keep to, such as 4G: gradients make parts of the forward pass again where all of it would take
    /// more; for configurations, not for plans
    #[arg(long, env = "CHIMERA_BUDGET", value_name = "BYTES", value_parser = parse_bytes)]
    pub budget: Option<u64>,
    #[command(flatten)]
    pub trace: TraceOptions,
    /// Folder that keeps machine code for the next start; that of the user when absent
    #[arg(long, env = "CHIMERA_CODE_CACHE", value_name = "DIR|off", value_parser = parse_code_cache)]
    pub code_cache: Option<CodeCache>,
}

/// Where machine code is kept.
#[derive(Clone, Debug)]
pub enum CodeCache {
    /// Nowhere.
    Off,
    /// In this folder.
    Folder(PathBuf),
}

/// `off`, or a folder.
fn parse_code_cache(text: &str) -> Result<CodeCache, String> {
    match text {
        "" => Err("the name is empty; give a folder, or off".to_owned()),
        "off" => Ok(CodeCache::Off),
        folder => Ok(CodeCache::Folder(folder.into())),
    }
}

/// The folder of the user for what can be made again, where the system says what is the user's.
pub fn user_cache() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    Some(caches?.join("chimera"))
}

fn parse_emitters(names: &str) -> Result<Allowed, String> {
    Allowed::parse(names).map_err(|e| e.to_string())
}

impl RunOptions {
    /// The same for the compiler, without entry points. A table from another machine or version is left out with a warning.
    ///
    /// # Errors
    /// When the table cannot be read or is damaged.
    pub fn compile(&self) -> Result<Options, Failure> {
        let target = self.target.to_string();
        let mut options = Options { target, ..Options::default() };
        let Some(path) = &self.tuning else { return Ok(options) };
        let unreadable = |e: io::Error| Failure::new(format!("cannot read {}: {e}", path.display()));
        let mut text = vec![];
        File::open(path).map_err(unreadable)?.take(MAX_TABLE_BYTES + 1).read_to_end(&mut text).map_err(unreadable)?;
        let corrupted = |why: &dyn fmt::Display| Failure::corrupted(format!("{}: {why}", path.display()));
        if text.len() as u64 > MAX_TABLE_BYTES {
            return Err(corrupted(&format!(
                "the file is larger than {MAX_TABLE_BYTES} bytes, expected a tuning table"
            )));
        }
        let table = Table::from_json(&String::from_utf8_lossy(&text)).map_err(|e| corrupted(&e))?;
        match table.fits(&options.target) {
            Ok(()) => options.tuning = Some(table),
            Err(why) => eprintln!("warning: {}: {why}; the cost model chooses", path.display()),
        }
        Ok(options)
    }

    /// Threads to run on.
    pub fn threads(&self) -> usize {
        self.threads.map_or_else(available_threads, usize::from)
    }

    /// The same for the executor.
    pub fn exec(&self) -> ExecOptions {
        ExecOptions {
            threads: self.threads(),
            emitters: self.emitters.unwrap_or_default(),
            target: self.target,
            max_bytes: self.max_memory.map_or(u64::MAX, |mb| mb.saturating_mul(1 << 20)),
            code_cache: match &self.code_cache {
                None => user_cache().map(|folder| folder.join("code")),
                Some(CodeCache::Off) => None,
                Some(CodeCache::Folder(folder)) => Some(folder.clone()),
            },
            pinned: false,
        }
    }
}
