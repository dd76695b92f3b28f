//! Placeholder.
pub mod text;
pub mod affinity;
pub mod exec;
pub mod files;
pub mod pool;
pub mod rng;
