//! Products of a few rows, as in decoding one token at a time: B is read once, so packing it would cost more than multiplying.
//! The chain of multiply-adds per element is that of the packed tiles.
//!
//! A weight stored `[out, in]` is B transposed. A panel of 16 of its rows is read 16 x 16 elements at a time and transposed in registers. A KiB of it takes 64 shuffles,
//! and a row's chain of multiply-adds is 16 x 4 cycles long meanwhile: about 70 cycles if it lies in a cache, while a core gets it from memory in 100 to 150. So memory is
//! the bound for up to 8 rows or so; 16 rows multiply as long as they read. Sixteen rows that lie a power of two apart share a set of the first-level
//! cache, which holds 12 lines: panels twice as wide were half as fast there.

use super::pack::{mask_of, transpose};
use super::{DEPTH, Strided};
use std::arch::x86_64::*;

/// Rows of a row-major B to prefetch ahead.
const AHEAD_ROWS: usize = 8;
/// Columns of B, rows of a weight, in a panel.
pub(super) const PANEL: usize = 16;
/// Floats along a panel's rows to prefetch ahead, and how many of a row at once: whole stretches keep to the order of memory.
const AHEAD: usize = 512;
const STRETCH: usize = 256;

/// A tile of a product with a row-major B.
///
/// # Safety
/// `a` and `b` are valid for `ROWS` rows and `cols` columns of this depth, C for the tile; `cols` is at most 16 times `GROUPS`; B's rows are contiguous; the
/// machine has AVX-512F.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn direct_tile<const ROWS: usize, const GROUPS: usize>(
    cols: usize,
    depth: usize,
    a: Strided,
    b: Strided,
    c: *mut f32,
    c_stride: usize,
    load_c: bool,
) {
    let lanes: [usize; GROUPS] = std::array::from_fn(|group| cols.saturating_sub(16 * group).min(16));
    let mut sums = [[_mm512_setzero_ps(); GROUPS]; ROWS];
    // SAFETY: masks and lane counts keep to the operands that the caller vouches for.
    unsafe {
        for p in 0..depth {
            let from = b.data.wrapping_add(p * b.row_stride);
            let columns: [__m512; GROUPS] = std::array::from_fn(|group| {
                let from = from.wrapping_add(16 * group);
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD_ROWS * b.row_stride).cast());
                _mm512_maskz_loadu_ps(mask_of(lanes[group]), from)
            });
            for (row, sums) in sums.iter_mut().enumerate() {
                let value = _mm512_set1_ps(*a.data.add(row * a.row_stride + p * a.col_stride));
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = _mm512_fmadd_ps(value, column, *sum);
                }
            }
        }
        for (group, lanes) in lanes.into_iter().enumerate() {
            let sums: [__m512; ROWS] = std::array::from_fn(|row| sums[row][group]);
            store(sums, lanes, c.wrapping_add(16 * group), c_stride, load_c);
        }
    }
}

/// `ROWS` rows of C at up to 16 columns, through the whole depth `k`. A's element (row, p) is `a[p * ROWS.next_power_of_two() + row]`; column l of B is contiguous
/// from `b + l * b_stride` on, and `next` is where the panel that follows starts.
///
/// # Safety
/// `a`, `b` and C are valid for these shapes, and the machine has AVX-512F.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn direct_panel<const ROWS: usize>(
    lanes: usize,
    k: usize,
    a: *const f32,
    b: *const f32,
    b_stride: usize,
    next: *const f32,
    c: *mut f32,
    c_stride: usize,
    accumulate: bool,
) {
    let width = const { ROWS.next_power_of_two() };
    for first in (0..k).step_by(DEPTH) {
        let end = k.min(first + DEPTH);
        let mut sums = [_mm512_setzero_ps(); ROWS];
        for p in (first..end).step_by(16) {
            let stretch = p / STRETCH * STRETCH;
            let (ahead, position) =
                if stretch + AHEAD < k { (b, stretch + AHEAD) } else { (next, stretch.min(stretch + AHEAD - k)) };
            let ahead = ahead.wrapping_add((p - stretch) / 16 * b_stride + position);
            for line in 0..STRETCH / 16 {
                _mm_prefetch::<_MM_HINT_NTA>(ahead.wrapping_add(16 * line).cast());
            }
            let steps = end - p;
            // SAFETY: loads keep to the lanes and steps that B has; A has `width` elements for each of them.
            unsafe {
                let from = b.wrapping_add(p);
                if lanes == PANEL && steps >= 16 {
                    let rows = std::array::from_fn(|lane| _mm512_loadu_ps(from.wrapping_add(lane * b_stride)));
                    let columns = transpose(rows);
                    let a = a.wrapping_add(p * width);
                    // Written out, since the compiler keeps the columns of a loop in memory.
                    macro_rules! steps {
                        ($($step:literal)*) => {
                            $(for (row, sum) in sums.iter_mut().enumerate() {
                                let value = _mm512_set1_ps(*a.wrapping_add($step * width + row));
                                *sum = _mm512_fmadd_ps(value, columns[$step], *sum);
                            })*
                        };
                    }
                    steps!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
                } else {
                    let rows = std::array::from_fn(|lane| {
                        let mask = if lane < lanes { mask_of(steps) } else { 0 };
                        _mm512_maskz_loadu_ps(mask, from.wrapping_add(lane * b_stride))
                    });
                    for (step, column) in transpose(rows).into_iter().enumerate().take(steps) {
                        let a = a.wrapping_add((p + step) * width);
                        for (row, sum) in sums.iter_mut().enumerate() {
                            *sum = _mm512_fmadd_ps(_mm512_set1_ps(*a.wrapping_add(row)), column, *sum);
                        }
                    }
                }
            }
        }
        // SAFETY: C is valid for the panel.
        unsafe { store(sums, lanes, c, c_stride, accumulate || first > 0) };
    }
}

/// Writes sums of up to 16 columns to C, or adds them.
///
/// # Safety
/// C is valid for `ROWS` rows of `lanes` columns.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const ROWS: usize>(sums: [__m512; ROWS], lanes: usize, c: *mut f32, c_stride: usize, load_c: bool) {
    let mask = mask_of(lanes);
    for (row, sum) in sums.into_iter().enumerate() {
        let target = c.wrapping_add(row * c_stride);
        // SAFETY: the mask keeps to the columns that the caller vouches for.
        unsafe {
            let sum = if load_c { _mm512_add_ps(_mm512_maskz_loadu_ps(mask, target), sum) } else { sum };
            _mm512_mask_storeu_ps(target, mask, sum);
        }
    }
}
