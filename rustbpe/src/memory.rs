//! Memory for large tables: zeroed arrays on huge pages, and prefetching.
//!
//! A table that is probed at random misses the TLB on almost every probe when it lies on 4 KiB pages.
//! The advice to use 2 MiB pages has to come before the memory is first touched, which the global
//! allocator does not promise for zeroed memory: so large arrays are mapped here.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Types for which zero bytes are a value.
///
/// # Safety
///
/// Memory that holds only zero bytes must be a valid value of the type.
pub unsafe trait Zero: Copy {}

// SAFETY: zero bytes are the number 0.
unsafe impl Zero for u32 {}
// SAFETY: as above.
unsafe impl Zero for u64 {}

/// An array that starts out as zero bytes.
pub struct ZeroedArray<T: Zero> {
    start: NonNull<T>,
    length: usize,
    origin: Origin,
}

enum Origin {
    Nowhere,
    Allocator(Layout),
    #[cfg(target_os = "linux")]
    Mapping {
        _unmaps_when_dropped: mapping::Mapping,
    },
}

// SAFETY: the array owns its memory alone, as a `Vec` does.
unsafe impl<T: Zero + Send> Send for ZeroedArray<T> {}
// SAFETY: as above.
unsafe impl<T: Zero + Sync> Sync for ZeroedArray<T> {}

impl<T: Zero> ZeroedArray<T> {
    /// `length` zeros. Ends the process when there is no memory, as every Rust collection does.
    pub fn new(length: usize) -> Self {
        let layout = Layout::array::<T>(length).expect("an array is smaller than the address space");
        if layout.size() == 0 {
            return Self { start: NonNull::dangling(), length, origin: Origin::Nowhere };
        }
        #[cfg(target_os = "linux")]
        if layout.size() >= mapping::HUGE_PAGE && layout.align() <= mapping::HUGE_PAGE {
            let mapping = mapping::Mapping::new(layout);
            return Self {
                start: mapping.start().cast(),
                length,
                origin: Origin::Mapping { _unmaps_when_dropped: mapping },
            };
        }
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) });
        let start = start.unwrap_or_else(|| handle_alloc_error(layout));
        Self { start: start.cast(), length, origin: Origin::Allocator(layout) }
    }
}

impl<T: Zero> Deref for ZeroedArray<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `start` is aligned and holds `length` values, zero at first, which `T: Zero` allows.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl<T: Zero> DerefMut for ZeroedArray<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and the array owns the memory alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl<T: Zero> Drop for ZeroedArray<T> {
    fn drop(&mut self) {
        if let Origin::Allocator(layout) = self.origin {
            // SAFETY: allocated in `new` with this layout.
            unsafe { dealloc(self.start.as_ptr().cast(), layout) }
        }
    }
}

/// A hint to the processor that `slice[index]` will be read soon. Nothing happens where it has no such
/// hint, or outside of the slice.
#[inline(always)]
pub fn prefetch<T>(slice: &[T], index: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let address = slice.as_ptr().wrapping_add(index);
        // SAFETY: the instruction is part of every x86-64; it reads nothing the program could see, and an
        // address that cannot be read is ignored.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (slice, index);
}

#[cfg(target_os = "linux")]
mod mapping {
    use std::alloc::{Layout, handle_alloc_error};
    use std::ptr::NonNull;

    pub const HUGE_PAGE: usize = 2 << 20;

    /// Private anonymous memory, all zero, that starts on a huge page.
    pub struct Mapping {
        base: NonNull<u8>,
        size: usize,
    }

    impl Mapping {
        pub fn new(layout: Layout) -> Self {
            // One huge page more than asked for, so that a start on a huge page lies inside.
            let size = layout.size().next_multiple_of(HUGE_PAGE) + HUGE_PAGE;
            // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
            let base = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    size,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
            if base == libc::MAP_FAILED {
                handle_alloc_error(layout);
            }
            let base = NonNull::new(base.cast()).expect("the kernel maps nothing at address 0");
            let mapping = Self { base, size };
            // SAFETY: the range is inside the mapping. A refusal leaves ordinary pages: no error.
            unsafe {
                libc::madvise(mapping.start().as_ptr().cast(), size - HUGE_PAGE, libc::MADV_HUGEPAGE);
            }
            mapping
        }

        pub fn start(&self) -> NonNull<u8> {
            let skipped = self.base.as_ptr().align_offset(HUGE_PAGE);
            // SAFETY: less than one huge page is skipped, and the mapping is larger by one.
            unsafe { self.base.add(skipped) }
        }
    }

    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: mapped in `new`, and whoever owns the mapping has no use for it any more.
            unsafe { libc::munmap(self.base.as_ptr().cast(), self.size) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_of_every_size_are_zero_at_first_and_keep_what_is_put_in() {
        for length in [0, 1, 1000, (2 << 20) / 8, (5 << 20) / 8 + 1] {
            let mut array = ZeroedArray::<u64>::new(length);
            assert_eq!(array.len(), length);
            assert!(array.iter().all(|number| *number == 0));
            for (number, place) in (1..).zip(array.iter_mut()) {
                *place = number;
            }
            assert!(array.iter().copied().eq(1..=length as u64));
        }
    }
}
