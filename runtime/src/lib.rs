//! Placeholder.
pub mod affinity;
pub mod call;
pub mod exec;
pub mod files;
pub mod generate;
pub mod pool;
pub mod rng;
pub mod text;
pub mod train;
