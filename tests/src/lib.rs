//! What tests share: golden files and the reference evaluation of graphs.
//!
//! Nothing here knows of emitters; a suite that runs on several passes them in.

pub mod golden;
pub mod reference;
