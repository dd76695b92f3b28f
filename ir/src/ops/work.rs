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
    /// Words of activations that are brought to all lanes.
    pub broadcasts: u64,
    /// Integer sums that enter a float chain.
    pub combined: u64,
    /// Elements that are copied or summed one by one: scales in lane order, sums of activations.
    pub moved: u64,
    /// What is read in order.
    pub passes: Vec<Pass>,
    /// Bytes that come from outside and are read ahead of their use by the kernel itself.
    pub ahead: bool,
    /// Independent instances.
    pub instances: u64,
}

impl Work {
    /// An operation of which only arithmetic and traffic are known.
    pub fn plain(flops: Flops, bytes: usize) -> Work {
        let passes = vec![Pass { bytes: bytes as u64, times: 1 }];
        Work { macs: flops.ternary, flops: flops.float, passes, instances: 1, ..Work::default() }
    }
}
