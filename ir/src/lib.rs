//! The intermediate representations of Chimera, and nothing else.
//!
//! This crate performs no I/O, spawns no threads, reads no clock and knows no CPU: everything in it is a value.

pub mod graph;
pub mod loops;
pub mod lower;
pub mod ops;
pub mod plan;
pub mod sexpr;
pub mod types;

pub use graph::{Graph, Value};
pub use ops::Op;
pub use types::{DType, Data, Tensor, Type};
