//! What a way of lowering has to do, in counts that do not depend on the machine.

use super::Flops;

/// Bytes that are gone through again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Bytes of one pass, with what is used beside them: what a memory must hold to serve the next pass.
    pub bytes: u64,
    /// Passes of all instances together.
    pub times: u64,
}

/// Counts of one execution of a kernel, all instances together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Ternary multiply-accumulates.
    pub macs: u64,
    /// Float operations.
    pub flops: u64,
    /// Packed codes that become bytes, each time they do.
    pub unpacked: u64,
    /// Vectors that the innermost loops load: activations for all lanes, unpacked codes.
    pub loads: u64,
    /// Integer sums that enter a float chain.
    pub combined: u64,
    /// Vectors of activations that are summed beforehand.
    pub summed: u64,
    /// What is gone through again and again.
    pub passes: Vec<Pass>,
    /// Bytes of weights, which come from outside.
    pub outside: u64,
    /// Whether the kernel asks for them ahead of their use.
    pub ahead: bool,
    /// Independent instances.
    pub instances: u64,
}

impl Work {
    /// An operation of which only arithmetic and traffic are known.
    pub fn plain(flops: Flops, bytes: usize) -> Work {
        Work { macs: flops.ternary, flops: flops.float, outside: bytes as u64, instances: 1, ..Work::default() }
    }
}
