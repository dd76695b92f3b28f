//! Models: which layers, in which order, with which ways in.

pub mod chimera;
