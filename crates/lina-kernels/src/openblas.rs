//! The system's OpenBLAS, as the peer that benchmarks compare with (feature `openblas`; Debian's package is `libopenblas-dev`).

use crate::gemm::{Layout, Shape};
use std::ffi::{CStr, c_char, c_int};

#[link(name = "openblas")]
unsafe extern "C" {
    fn cblas_sgemm(
        order: c_int,
        trans_a: c_int,
        trans_b: c_int,
        m: c_int,
        n: c_int,
        k: c_int,
        alpha: f32,
        a: *const f32,
        lda: c_int,
        b: *const f32,
        ldb: c_int,
        beta: f32,
        c: *mut f32,
        ldc: c_int,
    );
    fn openblas_set_num_threads(threads: c_int);
    fn openblas_get_corename() -> *const c_char;
    fn openblas_get_config() -> *const c_char;
}

const ROW_MAJOR: c_int = 101;
const NO_TRANSPOSE: c_int = 111;
const TRANSPOSE: c_int = 112;

/// Sets OpenBLAS's number of threads, for the whole process.
pub fn set_threads(threads: usize) {
    // SAFETY: takes any number.
    unsafe { openblas_set_num_threads(c_int::try_from(threads).unwrap_or(1)) }
}

/// OpenBLAS's version and options, and the processor it chose kernels for.
pub fn describe() -> String {
    // SAFETY: both return static strings.
    let (config, core) = unsafe { (CStr::from_ptr(openblas_get_config()), CStr::from_ptr(openblas_get_corename())) };
    format!("{}, kernels for {}", config.to_string_lossy().trim(), core.to_string_lossy())
}

/// Runs a dense product of `shape`: `a` holds `m * k` elements, `b` `k * n` and `c` `m * n`, stored as `shape.layout` says. The batch is not looked at.
///
/// # Panics
/// If a slice has another length, or a size does not fit OpenBLAS's 32-bit integers.
pub fn matmul(shape: &Shape, a: &[f32], b: &[f32], c: &mut [f32]) {
    let Shape { m, n, k, layout, accumulate, .. } = *shape;
    assert!(a.len() == m * k && b.len() == k * n && c.len() == m * n, "{shape:?}: slices of other lengths");
    let int = |size: usize| c_int::try_from(size).unwrap_or_else(|_| panic!("{shape:?}: {size} is too large"));
    let (trans_a, lda) = if matches!(layout, Layout::TN | Layout::TT) { (TRANSPOSE, m) } else { (NO_TRANSPOSE, k) };
    let (trans_b, ldb) = if matches!(layout, Layout::NT | Layout::TT) { (TRANSPOSE, k) } else { (NO_TRANSPOSE, n) };
    let beta = if accumulate { 1.0 } else { 0.0 };
    // SAFETY: the slices have the lengths that the sizes ask for.
    unsafe {
        cblas_sgemm(
            ROW_MAJOR,
            trans_a,
            trans_b,
            int(m),
            int(n),
            int(k),
            1.0,
            a.as_ptr(),
            int(lda.max(1)),
            b.as_ptr(),
            int(ldb.max(1)),
            beta,
            c.as_mut_ptr(),
            int(n.max(1)),
        );
    }
}
