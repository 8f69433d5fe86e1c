//! Products of a few rows, as in decoding one token at a time: B is read once, so packing it would cost more than multiplying.
//! The chain of multiply-adds per element is that of the packed tiles.

use super::Strided;
use super::pack::{load_transposed, mask_of};
use std::arch::x86_64::*;

/// Rows of B to prefetch ahead.
const AHEAD: usize = 8;

/// # Safety
/// `a` and `b` are valid for `ROWS` rows and `cols` columns of this depth, C for the tile; `cols` is at most 16 times `GROUPS`; one of B's strides is 1; the machine has
/// AVX-512F.
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
        if b.col_stride == 1 {
            for p in 0..depth {
                let from = b.data.wrapping_add(p * b.row_stride);
                let columns: [__m512; GROUPS] = std::array::from_fn(|group| {
                    let from = from.wrapping_add(16 * group);
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD * b.row_stride).cast());
                    _mm512_maskz_loadu_ps(mask_of(lanes[group]), from)
                });
                for (row, sums) in sums.iter_mut().enumerate() {
                    let value = _mm512_set1_ps(*a.data.add(row * a.row_stride + p * a.col_stride));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = _mm512_fmadd_ps(value, column, *sum);
                    }
                }
            }
        } else {
            for start in (0..depth).step_by(16) {
                let steps = 16.min(depth - start);
                for group in 0..GROUPS {
                    let from = b.data.wrapping_add(16 * group * b.col_stride + start);
                    let columns = load_transposed(from, b.col_stride, lanes[group], steps);
                    for (step, column) in columns.into_iter().enumerate() {
                        if step >= steps {
                            break;
                        }
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let value = *a.data.add(row * a.row_stride + (start + step) * a.col_stride);
                            sums[group] = _mm512_fmadd_ps(_mm512_set1_ps(value), column, sums[group]);
                        }
                    }
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            for (group, sum) in sums.into_iter().enumerate() {
                let (mask, target) = (mask_of(lanes[group]), c.wrapping_add(row * c_stride + 16 * group));
                let before = if load_c { _mm512_maskz_loadu_ps(mask, target) } else { _mm512_setzero_ps() };
                let sum = if load_c { _mm512_add_ps(before, sum) } else { sum };
                _mm512_mask_storeu_ps(target, mask, sum);
            }
        }
    }
}
