//! Frontends: configuration text to typed models, and models to graphs.
//!
//! Model names stop here; the graphs know tensors and ops only.

pub mod config;
pub mod layers;
pub mod models;
