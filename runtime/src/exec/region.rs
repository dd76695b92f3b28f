//! Memory from the system, in few large regions that blocks share.
//!
//! Regions are zeroed and never move. Large ones ask for huge pages: where every page of 4 KiB is looked up in the tables of two
//! systems, memory is read at less than half of its rate.

use super::memory::ALIGN;
use memmap2::MmapMut;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;

/// A huge page; mappings of a multiple of it start at one.
const HUGE: usize = 2 << 20;
/// Regions are at least as large once small ones have been filled. Pages that nobody touches cost no memory.
const GROWTH: usize = 16 * HUGE;

/// Who gave the memory.
#[derive(Debug)]
enum Owner {
    Allocator(Layout),
    /// Unmapped when dropped.
    System(#[expect(dead_code, reason = "kept for its drop")] MmapMut),
}

/// Zeroed memory at a multiple of [`ALIGN`].
#[derive(Debug)]
pub(super) struct Region {
    at: NonNull<u8>,
    bytes: usize,
    owner: Owner,
}

// SAFETY: a region owns its bytes; blocks that share it lie apart, and their access goes through the borrow rules of their owners.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// At least so many bytes; `None` when the system has no such memory.
    fn new(bytes: usize) -> Option<Region> {
        if bytes < HUGE {
            let layout = Layout::from_size_align(bytes.max(ALIGN), ALIGN).ok()?;
            // SAFETY: the size is not zero.
            let at = NonNull::new(unsafe { alloc_zeroed(layout) })?;
            return Some(Region { at, bytes: layout.size(), owner: Owner::Allocator(layout) });
        }
        let bytes = bytes.checked_next_multiple_of(HUGE)?;
        let mut map = MmapMut::map_anon(bytes).ok()?;
        // Small pages are right too, only slower.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Some(Region { at: NonNull::new(map.as_mut_ptr())?, bytes, owner: Owner::System(map) })
    }

    /// The address of byte `at`.
    ///
    /// # Panics
    /// When `at .. at + bytes` is not inside the region.
    pub(super) fn address(&self, at: usize, bytes: usize) -> NonNull<u8> {
        assert!(at.checked_add(bytes).is_some_and(|end| end <= self.bytes), "blocks lie inside their region");
        // SAFETY: inside the region by the assertion.
        unsafe { self.at.add(at) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if let Owner::Allocator(layout) = self.owner {
            // SAFETY: allocated with this layout, and freed once.
            unsafe { dealloc(self.at.as_ptr(), layout) }
        }
    }
}

/// Where the next block comes from.
#[derive(Debug, Default)]
pub(super) struct Regions {
    current: Option<Arc<Region>>,
    /// Bytes of it that are given away.
    used: usize,
}

impl Regions {
    /// Memory for blocks of these sizes, in one region; `None` when the system has no such memory.
    pub(super) fn with_room(sizes: impl Iterator<Item = u64>) -> Option<Regions> {
        let mut all = 0usize;
        for size in sizes {
            all = usize::try_from(size).ok()?.checked_next_multiple_of(ALIGN)?.checked_add(all)?;
        }
        Some(Regions { current: Some(Arc::new(Region::new(all)?)), used: 0 })
    }

    /// So many bytes that nobody else has, at a multiple of [`ALIGN`] of the region.
    pub(super) fn take(&mut self, bytes: usize) -> Option<(Arc<Region>, usize)> {
        let next = |used: usize| bytes.checked_next_multiple_of(ALIGN)?.checked_add(used);
        if let (Some(region), Some(end)) = (&self.current, next(self.used))
            && end <= region.bytes
        {
            let at = std::mem::replace(&mut self.used, end);
            return Some((Arc::clone(region), at));
        }
        let region = Arc::new(Region::new(next(0)?.max(GROWTH))?);
        self.used = next(0)?;
        self.current = Some(Arc::clone(&region));
        Some((region, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_a_region_lie_apart() {
        let mut regions = Regions::with_room([1, 64, 65].into_iter()).expect("some bytes");
        let taken: Vec<usize> = [1, 64, 65].map(|n| regions.take(n).expect("there is room").1).to_vec();
        assert_eq!(taken, [0, 64, 128]);
        let first = Arc::clone(regions.current.as_ref().expect("a region"));
        let (other, at) = regions.take(1).expect("a new region");
        assert!(!Arc::ptr_eq(&first, &other) && at == 0 && other.bytes == GROWTH);
        assert!(std::panic::catch_unwind(|| first.address(250, 10)).is_err());
        assert!(regions.take(usize::MAX).is_none());
        assert!(Regions::with_room([u64::MAX, 2].into_iter()).is_none());
    }

    #[test]
    fn large_regions_are_whole_huge_pages() {
        let region = Region::new(HUGE + 1).expect("four megabytes");
        assert_eq!((region.bytes, region.address(0, 1).addr().get() % ALIGN), (2 * HUGE, 0));
    }
}
