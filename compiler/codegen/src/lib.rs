//! Kernel IR to machine code. Knows CPUs; knows nothing of graphs.
//!
//! Generated code is a function of the kernel, the [`Target`] and the emitter version, and all emitters agree with the interpreter
//! bit for bit (payloads of NaN excepted).

mod cache;
mod emitter;
mod host;
mod inspect;
mod interp;
mod memory;
mod module;
mod portable;
mod shape;
mod target;
mod trial;
mod walk;
mod x86;

pub use emitter::{Allowed, Code, Emitter, Refusal, emitters};
pub use host::{host, processor};
pub use inspect::{assemble, disassemble};
pub use module::{CodegenError, Compiled, Entry, Module, compile, compile_with};
pub use target::{Arch, Feature, Target, TargetError};
pub use trial::{Trial, TrialError};
