//! Large pages for what is read from end to end: a product of few rows reads 16 rows of a weight side by side, each on pages of its own, and with small
//! ones looks addresses up more often than it waits for data.

/// Asks the system to back `values` by large pages, best before anything is written to them. It may do so or not.
pub fn advise_huge_pages(values: &mut [f32]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE_BYTES: usize = 4096;
        let start = values.as_mut_ptr() as usize;
        let first = start.next_multiple_of(PAGE_BYTES);
        let end = (start + size_of_val(values)) / PAGE_BYTES * PAGE_BYTES;
        if first < end {
            // SAFETY: whole pages within `values`, whose contents the advice does not change. That it is refused changes nothing either.
            unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = values;
}
