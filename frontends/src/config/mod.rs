//! Configuration files: from JSON text to a typed, validated [`ModelConfig`].
//!
//! Every key of a document is covered by exactly one row of [`TABLE`]; a key without a row is an error,
//! so that nothing a user writes is ever ignored in silence.

mod canonical;
mod error;
mod json;
mod keys;
mod load;
mod model;
mod phases;
mod presets;
mod read;
mod schema;
mod sizes;
mod table;
mod vocabulary;

#[cfg(test)]
mod tests;

pub use error::{Code, ConfigError, Place, Report};
pub use json::{MAX_BYTES, MAX_DEPTH};
pub use keys::{Disposition, Kind, Row};
pub use load::{Declared, Loaded, NotYet, Overrides, from_text, load, preset};
pub use model::{
    Activation, Dynamic, GatedDeltaConfig, GenerationConfig, KnotConfig, LoopConfig, MixerKind, MlstmConfig,
    ModelConfig, MoeConfig, Quantization, StepRule, TitansConfig, TitansCore, WeightScale,
};
pub use phases::{Phase, PhaseKind, Stage};
pub use presets::{BYTE_VOCABULARY, O200K_VOCABULARY, Scale};
pub use schema::schema;
pub use sizes::{
    Claim, ParamKind, Parameter, Part, StateRow, Unit, active_parameters, claims, expert_stack, parameter_count,
    parameters, parts, state_memory,
};
pub use table::TABLE;
pub use vocabulary::{Vocabulary, VocabularyError};
