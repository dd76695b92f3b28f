//! Blocks of an execution's memory, zeroed and at multiples of 64, and the typed views on them.
//!
//! A block never moves and never changes size, so addresses taken from it stay valid as long as it lives.

use super::region::{Region, Regions};
use crate::files::MappedSlice;
use chimera_ir::DType;
use std::sync::Arc;

/// Alignment of every block and of every buffer inside it.
pub(super) const ALIGN: usize = 64;

/// A type of array elements in memory. Sealed: every bit pattern of an implementor is a value.
pub trait Element: sealed::Plain {
    /// The element type in plans.
    const DTYPE: DType;
}

mod sealed {
    /// # Safety
    /// Every bit pattern is a value and there is no padding.
    pub unsafe trait Plain: Copy {}
}

macro_rules! elements {
    ($($T:ty => $D:ident),*) => {$(
        // SAFETY: a number of fixed width.
        unsafe impl sealed::Plain for $T {}
        impl Element for $T {
            const DTYPE: DType = DType::$D;
        }
    )*};
}

elements!(f32 => F32, f64 => F64, half::bf16 => BF16, i8 => I8, u8 => U8, i16 => I16, i32 => I32);

/// The bytes of a slice of elements.
pub(super) fn bytes_of<T: Element>(values: &[T]) -> &[u8] {
    // SAFETY: `Plain` has no padding, so all bytes are initialised; the size is that of the slice.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Zeroed bytes of a region. Pages of large regions that are never touched cost no memory where the system maps them lazily.
#[derive(Debug)]
pub(super) struct Block {
    /// First byte in the region, a multiple of [`ALIGN`].
    at: usize,
    bytes: usize,
    region: Arc<Region>,
}

impl Block {
    /// A block of at least one byte; `None` when the system has no such memory.
    pub(super) fn zeroed(regions: &mut Regions, bytes: u64) -> Option<Block> {
        let bytes = usize::try_from(bytes.max(1)).ok()?;
        let (region, at) = regions.take(bytes)?;
        Some(Block { at, bytes, region })
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The address of byte `at`.
    ///
    /// # Panics
    /// When `at .. at + bytes` is not inside the block.
    pub(super) fn address(&self, at: usize, bytes: usize) -> *mut u8 {
        assert!(
            at.checked_add(bytes).is_some_and(|end| end <= self.bytes()),
            "a verified plan stays inside its memory"
        );
        self.region.address(self.at + at, bytes).as_ptr()
    }

    /// `len` elements from byte `at`.
    ///
    /// # Panics
    /// When they are not inside the block, or `at` is not a multiple of their alignment.
    pub(super) fn slice<T: Element>(&self, at: usize, len: usize) -> &[T] {
        let address = self.address(at, len * size_of::<T>()).cast::<T>();
        assert!(address.is_aligned(), "buffers start at multiples of {ALIGN}");
        // SAFETY: in bounds and aligned; initialised since the block was zeroed and every bit pattern is a value; nothing writes
        // while `self` is borrowed, because execution borrows the owner of the block mutably.
        unsafe { std::slice::from_raw_parts(address, len) }
    }

    /// [`Block::slice`] for writing.
    pub(super) fn slice_mut<T: Element>(&mut self, at: usize, len: usize) -> &mut [T] {
        let address = self.address(at, len * size_of::<T>()).cast::<T>();
        assert!(address.is_aligned(), "buffers start at multiples of {ALIGN}");
        // SAFETY: as in `slice`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(address, len) }
    }
}

/// Where the bytes of a weight lie.
#[derive(Debug)]
pub(super) enum WeightMemory {
    /// Nowhere: it has no values yet and no entry point writes it.
    Unset,
    /// In memory of its own.
    Own(Block),
    /// In a file or memory shared with others; at a multiple of [`ALIGN`], and no entry point writes it.
    Mapped(MappedSlice),
}

impl WeightMemory {
    /// The address of the first of at least `bytes` bytes; null when there are none. What is mapped must not be written.
    ///
    /// # Panics
    /// When there are fewer.
    pub(super) fn address(&self, bytes: usize) -> *mut u8 {
        match self {
            WeightMemory::Unset => std::ptr::null_mut(),
            WeightMemory::Own(block) => block.address(0, bytes),
            WeightMemory::Mapped(slice) => {
                assert!(slice.len() >= bytes, "a bound weight has the size that the plan declares");
                slice.as_ptr().cast_mut()
            }
        }
    }

    /// The first `len` elements; none of an unset weight.
    ///
    /// # Panics
    /// When there are fewer.
    pub(super) fn slice<T: Element>(&self, len: usize) -> Option<&[T]> {
        match self {
            WeightMemory::Unset => None,
            WeightMemory::Own(block) => Some(block.slice(0, len)),
            WeightMemory::Mapped(slice) => {
                let bytes = &slice[..len * size_of::<T>()];
                assert!(bytes.as_ptr().cast::<T>().is_aligned(), "bound weights start at multiples of {ALIGN}");
                // SAFETY: in bounds by the slice, aligned by the assertion, every bit pattern is a value; nothing writes what is shared.
                Some(unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), len) })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn untouched_pages_cost_no_memory() {
        let resident = || crate::train::metrics::resident_bytes().expect("statistics of the process");
        let (size, before) = (1usize << 28, resident());
        let mut block = Block::zeroed(&mut Regions::default(), size as u64).expect("256 megabytes");
        assert!(resident() < before + size as u64 / 4, "{} bytes more are resident", resident() - before);
        assert_eq!(block.slice::<u8>(size - 1, 1), [0]);
        block.slice_mut::<u8>(0, size / 2).fill(1);
        assert!(resident() > before + size as u64 / 4);
    }

    #[test]
    fn blocks_are_zeroed_aligned_and_bounded() {
        let mut regions = Regions::default();
        let mut block = Block::zeroed(&mut regions, 100).expect("100 bytes");
        let mut other = Block::zeroed(&mut regions, 64).expect("64 bytes");
        other.slice_mut::<u8>(0, 64).fill(9);
        assert_eq!(block.address(0, 100) as usize % ALIGN, 0);
        assert!(block.slice::<u8>(0, 100).iter().all(|&x| x == 0));
        block.slice_mut::<f32>(64, 2)[1] = 1.0;
        assert_eq!(bytes_of(block.slice::<f32>(64, 2)), [0, 0, 0, 0, 0, 0, 0x80, 0x3F]);
        assert!(std::panic::catch_unwind(|| block.slice::<u8>(1, 100).len()).is_err());
        assert!(std::panic::catch_unwind(|| block.slice::<i32>(2, 1).len()).is_err());
        assert!(Block::zeroed(&mut regions, u64::MAX).is_none());
    }
}
