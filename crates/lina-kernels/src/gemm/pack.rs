//! Packing: A's rows are copied in strips and B's columns in panels, a few lanes wide each, so that the microkernel reads both in sequence.
//!
//! Lane l at depth p of a strip goes to `to[p * WIDTH + l]`; lanes that the strip lacks are zero.

/// Floats that a strip takes: its lanes, and what vector stores may touch past them.
pub(super) const fn strip_floats(width: usize, depth: usize) -> usize {
    depth * width + if width.is_multiple_of(16) { 0 } else { 16 }
}

/// Packs a strip of `lanes <= WIDTH` lanes of `depth` elements, the element at lane l and depth p being `from[l * lane_stride + p * depth_stride]`.
///
/// # Safety
/// `from` is valid for those reads and `to` for the strip.
pub(super) unsafe fn portable<const WIDTH: usize>(
    from: *const f32,
    lane_stride: usize,
    depth_stride: usize,
    lanes: usize,
    depth: usize,
    to: *mut f32,
) {
    for p in 0..depth {
        for lane in 0..WIDTH {
            // SAFETY: the caller's promise; lanes beyond `lanes` are not read.
            unsafe {
                let value = if lane < lanes { *from.add(lane * lane_stride + p * depth_stride) } else { 0.0 };
                *to.add(p * WIDTH + lane) = value;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use avx512::{mask_of, pack as pack_avx512, transpose};

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::strip_floats;
    use std::arch::x86_64::*;

    /// Rows of memory to prefetch ahead: strided rows are too far apart for the processor's own prefetchers.
    const AHEAD: usize = 16;

    /// As [`super::portable`], for strips of up to 32 lanes. With a `lane_stride` of 1, `lanes` may go on over several strips, which are packed together, one after
    /// the other in `to`, so that every cache line is read once.
    ///
    /// # Safety
    /// As [`super::portable`], on a machine with AVX-512F. One of the strides is 1.
    #[target_feature(enable = "avx512f")]
    pub(in super::super) unsafe fn pack<const WIDTH: usize>(
        from: *const f32,
        lane_stride: usize,
        depth_stride: usize,
        lanes: usize,
        depth: usize,
        to: *mut f32,
    ) {
        let groups = const { WIDTH.div_ceil(16) };
        // SAFETY: masked loads read only lanes below `lanes` and depths below `depth`. A store may reach past its step into the next one, which is written later, or
        // past the last one into the spill.
        unsafe {
            if lane_stride == 1 {
                let (whole, rest) = (lanes / WIDTH, lanes % WIDTH);
                for p in 0..depth {
                    let from = from.wrapping_add(p * depth_stride);
                    for line in (0..lanes).step_by(16) {
                        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD * depth_stride + line).cast());
                    }
                    for strip in 0..whole {
                        let to = to.add(strip * strip_floats(WIDTH, depth) + p * WIDTH);
                        for group in 0..groups {
                            let mask = mask_of(WIDTH - 16 * group);
                            let row = _mm512_maskz_loadu_ps(mask, from.wrapping_add(strip * WIDTH + 16 * group));
                            _mm512_storeu_ps(to.add(16 * group), row);
                        }
                    }
                    if rest > 0 {
                        let to = to.add(whole * strip_floats(WIDTH, depth) + p * WIDTH);
                        for group in 0..groups {
                            let mask = mask_of(rest.saturating_sub(16 * group));
                            let row = _mm512_maskz_loadu_ps(mask, from.wrapping_add(whole * WIDTH + 16 * group));
                            _mm512_storeu_ps(to.add(16 * group), row);
                        }
                    }
                }
                return;
            }
            for start in (0..depth).step_by(16) {
                let steps = 16.min(depth - start);
                let mut columns = [[_mm512_setzero_ps(); 16]; 2];
                for (group, columns) in columns.iter_mut().enumerate().take(groups) {
                    let from = from.wrapping_add(16 * group * lane_stride + start);
                    *columns = load_transposed(from, lane_stride, lanes.saturating_sub(16 * group), steps);
                }
                for step in 0..steps {
                    for (group, columns) in columns.iter().enumerate().take(groups) {
                        _mm512_storeu_ps(to.add((start + step) * WIDTH + 16 * group), columns[step]);
                    }
                }
            }
        }
    }

    /// Vectors of 16 lanes for up to 16 steps from lanes that are contiguous along the depth; missing lanes are zero.
    ///
    /// # Safety
    /// `from` is valid for `steps` elements of `lanes` lanes, on a machine with AVX-512F.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_transposed(from: *const f32, lane_stride: usize, lanes: usize, steps: usize) -> [__m512; 16] {
        let mut rows = [_mm512_setzero_ps(); 16];
        for (lane, row) in rows.iter_mut().enumerate() {
            if lane < lanes {
                let from = from.wrapping_add(lane * lane_stride);
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(32).cast());
                // SAFETY: the mask keeps to the steps that the caller vouches for.
                *row = unsafe { _mm512_maskz_loadu_ps(mask_of(steps), from) };
            }
        }
        transpose(rows)
    }

    /// The first `lanes` of 16 lanes.
    #[inline]
    pub(in super::super) fn mask_of(lanes: usize) -> u16 {
        if lanes >= 16 { u16::MAX } else { (1 << lanes) - 1 }
    }

    /// Transposes a 16 x 16 matrix: within 128-bit lanes first, then across them.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in super::super) fn transpose(rows: [__m512; 16]) -> [__m512; 16] {
        let mut quads = [_mm512_setzero_ps(); 16];
        for group in 0..4 {
            let [a, b, c, d] = [rows[4 * group], rows[4 * group + 1], rows[4 * group + 2], rows[4 * group + 3]];
            let ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
            let ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
            let cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
            let cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
            quads[4 * group] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low));
            quads[4 * group + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low));
            quads[4 * group + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high));
            quads[4 * group + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high));
        }
        // `quads[4 g + j]`, 128-bit lane q, holds rows 4g..4g+4 of column 4q + j.
        let mut columns = [_mm512_setzero_ps(); 16];
        for j in 0..4 {
            let [a, b, c, d] = [quads[j], quads[4 + j], quads[8 + j], quads[12 + j]];
            let ab_even = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
            let ab_odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
            let cd_even = _mm512_shuffle_f32x4::<0b10_00_10_00>(c, d);
            let cd_odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d);
            columns[j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_even, cd_even);
            columns[8 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_even, cd_even);
            columns[4 + j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_odd, cd_odd);
            columns[12 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_odd, cd_odd);
        }
        columns
    }
}
