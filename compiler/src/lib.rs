//! From a model configuration to an execution plan: a list of passes that can be read aloud.
//!
//! The result is data; nothing here runs a model, and nothing here generates machine code.

mod assemble;
pub mod budget;
pub mod cosine;
pub mod descend;
pub mod estimators;
mod fuse;
pub mod inspect;
pub mod memory;
pub mod optimisers;
mod options;
pub mod passes;
pub mod pipeline;
pub mod quantiser;
mod rebuild;
pub mod tuning;
pub mod update;

pub use budget::MemoryBudget;
pub use descend::{Descent, StateForm};
pub use estimators::{FISHER, Family, Mask, Mode, PerSequence, Scheme, Score, Shared};
pub use fuse::Decisions;
pub use optimisers::Optimiser;
pub use options::{CompileError, EntryKind, EntrySpec, Objective, Options};
pub use pipeline::{compile, compile_graphs, compile_observed};
pub use update::UpdateRule;
