//! What can go wrong between a plan and its results.
//!
//! Every message says what was found, what was expected and, where there is one, the cure.

use chimera_codegen::CodegenError;
use chimera_ir::plan::PlanError;
use std::fmt;
use std::io;

/// Why a plan could not be made executable or run.
#[derive(Debug)]
pub enum ExecError {
    /// The plan contradicts itself.
    Plan(PlanError),
    /// A kernel could not be compiled for the target.
    Compile(CodegenError),
    /// The memory that the plan needs is not to be had.
    Memory {
        /// What it is for.
        what: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes allowed by the options; nothing when the system refused.
        allowed: Option<u64>,
    },
    /// A thread could not be started.
    Threads(io::Error),
    /// A name that the plan does not have.
    Unknown {
        /// What was looked for: entry point, input, output, weight, state.
        what: &'static str,
        /// The name.
        name: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// Values of another shape or element type than the plan declares.
    Shape {
        /// What was set or read.
        what: &'static str,
        /// Its name.
        name: String,
        /// What was given or asked for.
        found: String,
        /// What the plan declares.
        expected: String,
    },
    /// An entry point reads weights that were never set.
    MissingWeights {
        /// The entry point.
        entry: String,
        /// Their names.
        names: Vec<String>,
    },
    /// The values of a weight were asked for that has none yet.
    Unset {
        /// Its name.
        name: String,
    },
    /// An entry point reads inputs that were never set.
    MissingInputs {
        /// The entry point.
        entry: String,
        /// Their names.
        names: Vec<String>,
    },
    /// An output was asked for that later work has overwritten.
    Stale {
        /// The entry point.
        entry: String,
        /// The output.
        name: String,
    },
}

impl ExecError {
    /// Exit code of a command that ends with this error: 1 failure, 4 resource (memory, threads), 5 corrupted plan.
    pub fn exit_code(&self) -> u8 {
        match self {
            ExecError::Memory { .. } | ExecError::Threads(_) | ExecError::Compile(CodegenError::Memory(_)) => 4,
            ExecError::Plan(_) => 5,
            _ => 1,
        }
    }
}

/// The first names of a list.
fn few(names: &[String]) -> String {
    const SHOWN: usize = 12;
    let mut text = names.iter().take(SHOWN).map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more", names.len() - SHOWN);
    }
    text
}

impl fmt::Display for ExecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExecError::Plan(e) => write!(f, "plan: {e}; compile it again"),
            ExecError::Compile(why) => write!(f, "cannot compile the kernels of the plan: {why}"),
            ExecError::Memory { what, needed, allowed: Some(allowed) } => {
                write!(
                    f,
                    "{what} needs {needed} bytes of memory, allowed are {allowed}; raise the limit or compile for a smaller batch"
                )
            }
            ExecError::Memory { what, needed, allowed: None } => {
                write!(
                    f,
                    "{what} needs {needed} bytes of memory, which the system refused; free memory or compile for a smaller batch"
                )
            }
            ExecError::Threads(e) => write!(f, "{e}"),
            ExecError::Unknown { what, name, known } if known.is_empty() => {
                write!(f, "no {what} is called `{name}`, there is none at all")
            }
            ExecError::Unknown { what, name, known } => {
                write!(f, "no {what} is called `{name}`, expected one of {}", few(known))
            }
            ExecError::Shape { what, name, found, expected } => {
                write!(f, "{what} `{name}`: found {found}, expected {expected}")
            }
            ExecError::MissingWeights { entry, names } => {
                write!(
                    f,
                    "entry point `{entry}` reads {} weights that were never set: {}; load them first",
                    names.len(),
                    few(names)
                )
            }
            ExecError::Unset { name } => write!(f, "weight `{name}` was never set; load it first"),
            ExecError::MissingInputs { entry, names } => {
                write!(
                    f,
                    "entry point `{entry}` reads {} inputs that were never set: {}; set them first",
                    names.len(),
                    few(names)
                )
            }
            ExecError::Stale { entry, name } => {
                write!(
                    f,
                    "output `{name}` of entry point `{entry}` is not there; read it after running `{entry}` and before running another"
                )
            }
        }
    }
}

impl std::error::Error for ExecError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ExecError::Plan(e) => Some(e),
            ExecError::Threads(e) => Some(e),
            ExecError::Compile(e) => Some(e),
            _ => None,
        }
    }
}

impl From<PlanError> for ExecError {
    fn from(e: PlanError) -> ExecError {
        ExecError::Plan(e)
    }
}
