//! Asking for memory before it is read, where the order of reading is one that the processor's own prefetchers do not follow.

/// Floats of a cache line.
pub(crate) const LINE: usize = 16;

/// Asks for the cache line at `address`, which need not be valid, to be read once.
#[inline(always)]
pub(crate) fn prefetch(address: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has the instruction, and it does nothing for an address that is not valid.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_NTA, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_NTA>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
