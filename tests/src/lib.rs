//! What tests share: golden files, the reference evaluation of graphs, and the ways of running them.
//!
//! Nothing here knows of single emitters; a suite visits all of them through [`engine::Engine::all`].

pub mod clusters;
pub mod engine;
pub mod golden;
pub mod reference;
