//! All tests of the emitters through the public interface.
//!
//! Suites know nothing of emitters beyond their names; whatever [`emitters`](chimera_codegen::emitters) lists can be put through them.

mod agree;
mod emitted;
mod random;
mod support;
