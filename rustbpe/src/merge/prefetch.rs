//! A hint to the processor that an element will be read soon.

/// Start loading `slice[index]` into the cache. Nothing happens where the processor has no such hint, or
/// outside of the slice.
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
