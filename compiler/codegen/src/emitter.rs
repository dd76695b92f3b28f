//! The interface of emitters and the one list of them.
//!
//! Legality only: an emitter says whether it can serve a kernel, never whether it is the best choice.

use std::fmt;

use chimera_ir::loops::Kernel;

use crate::{CodegenError, Target};

/// Why an emitter does not serve a kernel: one sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal(pub String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What an emitter makes of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Code {
    /// Position-independent, self-contained machine code whose first byte is the entry; it is placed at a multiple of 64.
    ///
    /// The entry takes the table of argument pointers, the scratch pointer, and the first and past-the-last grid instance, by the System V
    /// (x86-64) or AAPCS64 (aarch64) convention.
    Machine(Vec<u8>),
    /// The interpreter runs the kernel.
    Interpreted,
}

/// One way of turning kernels into code.
pub trait Emitter: Sync {
    /// The name used on command lines, in plans, logs and tests.
    fn name(&self) -> &'static str;

    /// Changes whenever the same kernel and target would give other bytes.
    fn version(&self) -> u32;

    /// Can this emitter serve `kernel` on `target`? Pure and cheap.
    ///
    /// # Errors
    /// The reason why not.
    fn accepts(&self, kernel: &Kernel, target: &Target) -> Result<(), Refusal>;

    /// Code for one kernel that was accepted.
    ///
    /// # Errors
    /// A reason that only shows during the work; the next emitter is tried then.
    fn emit(&self, kernel: &Kernel, target: &Target) -> Result<Code, Refusal>;
}

/// Every emitter, most specific first. The one list that dispatch walks.
pub fn emitters() -> &'static [&'static dyn Emitter] {
    &[&crate::x86::Wide, &crate::portable::Portable, &crate::interp::Interp]
}

/// A choice of emitters; their order is always that of [`emitters`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Allowed(u32);

impl Default for Allowed {
    fn default() -> Allowed {
        Allowed::all()
    }
}

impl Allowed {
    /// Every emitter.
    pub fn all() -> Allowed {
        Allowed((1 << emitters().len()) - 1)
    }

    /// The emitters with these names, separated by commas.
    ///
    /// # Errors
    /// A name that no emitter has.
    pub fn parse(names: &str) -> Result<Allowed, CodegenError> {
        let mut bits = 0;
        for name in names.split(',').map(str::trim) {
            let at = emitters().iter().position(|e| e.name() == name);
            bits |= 1 << at.ok_or_else(|| CodegenError::UnknownEmitter { found: name.to_owned() })?;
        }
        Ok(Allowed(bits))
    }

    /// The chosen emitters in order.
    pub fn emitters(self) -> impl Iterator<Item = &'static dyn Emitter> {
        emitters().iter().enumerate().filter(move |(n, _)| self.0 & (1 << n) != 0).map(|(_, e)| *e)
    }
}
