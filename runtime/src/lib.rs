//! Execution of plans: memory, threads, weights, random streams, training and generation.
//!
//! The library never sees a graph or a pass; its binary joins it with the compiler.

pub mod affinity;
pub mod call;
pub mod exec;
pub mod files;
pub mod generate;
pub mod pool;
pub mod rng;
pub mod text;
pub mod train;
