//! Microkernels: a small tile of C held in registers while k runs. All of an instruction set's tile sizes perform the same chain of multiply-adds per element.

use super::{Strided, pack};

/// Where a tile finds its rows of A.
#[derive(Clone, Copy)]
pub(super) enum TileRows {
    /// A packed strip.
    Packed(*const f32),
    /// Rows that are contiguous along k and this far apart.
    InPlace(*const f32, usize),
}

/// Packing and tiles of one instruction set.
pub(super) trait Kernel {
    /// Rows of a full tile.
    const ROWS: usize;
    /// Columns of a full tile.
    const COLS: usize;

    /// Up to this many rows, packing a row-major B costs more than it saves, and [`Kernel::direct_tile`] takes its place.
    const DIRECT_ROWS: usize = 0;
    /// Columns of such a tile.
    const DIRECT_COLS: usize = 1;
    /// The same for a B that is contiguous along its columns, and [`Kernel::direct_panel`].
    const PANEL_ROWS: usize = 0;
    /// Columns of a full panel.
    const PANEL_COLS: usize = 1;

    /// As [`Kernel::tile`] for `rows <= DIRECT_ROWS`, with nothing packed.
    ///
    /// # Safety
    /// As [`Kernel::tile`]. B's rows are contiguous.
    unsafe fn direct_tile(
        rows: usize,
        cols: usize,
        depth: usize,
        a: Strided,
        b: Strided,
        c: *mut f32,
        c_stride: usize,
        load_c: bool,
    ) {
        let _ = (cols, depth, a, b, c, c_stride, load_c);
        unreachable!("{rows} rows without packing");
    }

    /// Packs `rows <= PANEL_ROWS` rows of A for [`Kernel::direct_panel`]: element (row, p) goes to `to[p * rows.next_power_of_two() + row]`.
    ///
    /// # Safety
    /// As [`Kernel::pack_a`]. `to` has room for `pack::strip_floats` of that width.
    unsafe fn pack_rows(a: Strided, rows: usize, depth: usize, to: *mut f32) {
        let _ = (a, depth, to);
        unreachable!("{rows} rows without packing");
    }

    /// Computes `rows <= PANEL_ROWS` rows of C at `cols <= PANEL_COLS` columns through the whole depth, from packed rows of A (a single row is contiguous) and a B
    /// whose columns are contiguous and `b_stride` apart. `next` is what will be read after it, to be prefetched.
    ///
    /// # Safety
    /// The pointers are valid for these shapes, but for `next`, and the machine has the instructions.
    unsafe fn direct_panel(
        rows: usize,
        cols: usize,
        depth: usize,
        a: *const f32,
        b: *const f32,
        b_stride: usize,
        next: *const f32,
        c: *mut f32,
        c_stride: usize,
        accumulate: bool,
    ) {
        let _ = (cols, depth, a, b, b_stride, next, c, c_stride, accumulate);
        unreachable!("{rows} rows without packing");
    }

    /// Strips of a transposed A that [`Kernel::pack_a`] packs at once.
    const STRIPS: usize;

    /// Packs a strip of `rows <= ROWS` rows of A, or `STRIPS` of them if `row_stride` is 1; see [`pack`] for the layout.
    ///
    /// # Safety
    /// `from` is valid for `rows` rows of `depth` columns, `to` for the strips, and the machine has the instructions.
    unsafe fn pack_a(from: *const f32, row_stride: usize, col_stride: usize, rows: usize, depth: usize, to: *mut f32);

    /// Packs a panel of `cols <= COLS` columns of B.
    ///
    /// # Safety
    /// As [`Kernel::pack_a`].
    unsafe fn pack_b(from: *const f32, col_stride: usize, row_stride: usize, cols: usize, depth: usize, to: *mut f32);

    /// Up to this many columns, packing A costs more than it saves: [`Kernel::tile`] takes contiguous rows as they lie in memory.
    const IN_PLACE_COLS: usize;

    /// Computes a tile of `rows <= ROWS` by `cols <= COLS` and writes it to C, or adds it to C with `load_c`.
    ///
    /// # Safety
    /// `a` and `b` are valid for this `depth`, C is valid for the tile, and the machine has the instructions.
    unsafe fn tile(
        rows: usize,
        cols: usize,
        depth: usize,
        a: TileRows,
        b: *const f32,
        c: *mut f32,
        c_stride: usize,
        load_c: bool,
    );
}

/// Calls `$tile::<rows, $vectors>` for the run-time row count, one of those listed.
#[cfg(target_arch = "x86_64")]
macro_rules! for_rows {
    ($rows:expr, [$($count:literal)*], $tile:ident, $vectors:literal, ($cols:expr, $depth:expr, $a:expr, $b:expr, $c:expr, $c_stride:expr, $load_c:expr)) => {
        match $rows {
            $($count => $tile::<$count, $vectors>($cols, $depth, $a, $b, $c, $c_stride, $load_c),)*
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

/// No vector intrinsics; the compiler's target decides.
pub(super) struct Portable;

/// Stands in where the instruction set does not exist; never chosen there.
#[cfg(not(target_arch = "x86_64"))]
pub(super) type Avx2 = Portable;
/// Stands in where the instruction set does not exist; never chosen there.
#[cfg(not(target_arch = "x86_64"))]
pub(super) type Avx512 = Portable;

const PORTABLE_ROWS: usize = 4;
const PORTABLE_COLS: usize = 8;

impl Kernel for Portable {
    const ROWS: usize = PORTABLE_ROWS;
    const COLS: usize = PORTABLE_COLS;
    const IN_PLACE_COLS: usize = 0;
    const STRIPS: usize = 1;

    unsafe fn pack_a(from: *const f32, row_stride: usize, col_stride: usize, rows: usize, depth: usize, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { pack::portable::<PORTABLE_ROWS>(from, row_stride, col_stride, rows, depth, to) }
    }

    unsafe fn pack_b(from: *const f32, col_stride: usize, row_stride: usize, cols: usize, depth: usize, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { pack::portable::<PORTABLE_COLS>(from, col_stride, row_stride, cols, depth, to) }
    }

    unsafe fn tile(
        rows: usize,
        cols: usize,
        depth: usize,
        a: TileRows,
        b: *const f32,
        c: *mut f32,
        c_stride: usize,
        load_c: bool,
    ) {
        let TileRows::Packed(a) = a else { unreachable!("rows of A that are not packed") };
        let mut sums = [[0.0_f32; PORTABLE_COLS]; PORTABLE_ROWS];
        for p in 0..depth {
            // SAFETY: both are packed with this depth.
            let (a, b) = unsafe {
                (
                    &*a.add(p * PORTABLE_ROWS).cast::<[f32; PORTABLE_ROWS]>(),
                    &*b.add(p * PORTABLE_COLS).cast::<[f32; PORTABLE_COLS]>(),
                )
            };
            for (sums, a) in sums.iter_mut().zip(a) {
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum += a * b;
                }
            }
        }
        // SAFETY: C is valid for the tile.
        unsafe { write_tile(sums.as_flattened(), PORTABLE_COLS, rows, cols, c, c_stride, load_c) };
    }
}

/// Writes or adds a tile that was computed into memory, for widths that vector stores do not fit.
///
/// # Safety
/// C is valid for `rows` rows of `cols` elements.
#[inline]
unsafe fn write_tile(
    tile: &[f32],
    tile_stride: usize,
    rows: usize,
    cols: usize,
    c: *mut f32,
    c_stride: usize,
    load_c: bool,
) {
    for row in 0..rows {
        for col in 0..cols {
            // SAFETY: within the tile that the caller vouches for.
            unsafe {
                let target = c.add(row * c_stride + col);
                *target = if load_c { *target + tile[row * tile_stride + col] } else { tile[row * tile_stride + col] };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Kernel, Strided, TileRows, pack, write_tile};
    use crate::gemm::direct::{PANEL, direct_panel, direct_tile};
    use std::arch::x86_64::*;

    /// 28 of the 32 registers hold sums: two FMA units with a latency of 4 need 8 chains, the rest hides loads.
    const WIDE_ROWS: usize = 14;
    const WIDE_COLS: usize = 32;

    /// 512-bit vectors.
    pub(in super::super) struct Avx512;

    impl Kernel for Avx512 {
        const ROWS: usize = WIDE_ROWS;
        const COLS: usize = WIDE_COLS;
        const IN_PLACE_COLS: usize = 16;
        // A whole number of cache lines: 8 x 14 x 4 bytes.
        const STRIPS: usize = 8;

        const DIRECT_ROWS: usize = 4;
        const DIRECT_COLS: usize = 64;
        const PANEL_ROWS: usize = 16;
        const PANEL_COLS: usize = PANEL;

        unsafe fn direct_tile(
            rows: usize,
            cols: usize,
            depth: usize,
            a: Strided,
            b: Strided,
            c: *mut f32,
            c_stride: usize,
            load_c: bool,
        ) {
            // SAFETY: the caller's promise.
            unsafe {
                if cols > 32 {
                    for_rows!(rows, [1 2 3 4], direct_tile, 4, (cols, depth, a, b, c, c_stride, load_c));
                } else {
                    for_rows!(rows, [1 2 3 4], direct_tile, 2, (cols, depth, a, b, c, c_stride, load_c));
                }
            }
        }

        unsafe fn pack_rows(a: Strided, rows: usize, depth: usize, to: *mut f32) {
            let Strided { data, row_stride, col_stride } = a;
            // SAFETY: the caller's promise.
            unsafe {
                match rows {
                    1 => pack::pack_avx512::<1>(data, row_stride, col_stride, rows, depth, to),
                    2 => pack::pack_avx512::<2>(data, row_stride, col_stride, rows, depth, to),
                    3..=4 => pack::pack_avx512::<4>(data, row_stride, col_stride, rows, depth, to),
                    5..=8 => pack::pack_avx512::<8>(data, row_stride, col_stride, rows, depth, to),
                    _ => pack::pack_avx512::<16>(data, row_stride, col_stride, rows, depth, to),
                }
            }
        }

        unsafe fn direct_panel(
            rows: usize,
            cols: usize,
            depth: usize,
            a: *const f32,
            b: *const f32,
            b_stride: usize,
            next: *const f32,
            c: *mut f32,
            c_stride: usize,
            accumulate: bool,
        ) {
            macro_rules! panels {
                ($($count:literal)*) => {
                    match rows {
                        $($count => direct_panel::<$count>(
                            cols, depth, a, b, b_stride, next, c, c_stride, accumulate,
                        ),)*
                        rows => unreachable!("a panel of {rows} rows"),
                    }
                };
            }
            // SAFETY: the caller's promise.
            unsafe { panels!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16) }
        }

        unsafe fn pack_a(
            from: *const f32,
            row_stride: usize,
            col_stride: usize,
            rows: usize,
            depth: usize,
            to: *mut f32,
        ) {
            // SAFETY: the caller's promise.
            unsafe { pack::pack_avx512::<WIDE_ROWS>(from, row_stride, col_stride, rows, depth, to) }
        }

        unsafe fn pack_b(
            from: *const f32,
            col_stride: usize,
            row_stride: usize,
            cols: usize,
            depth: usize,
            to: *mut f32,
        ) {
            // SAFETY: the caller's promise.
            unsafe { pack::pack_avx512::<WIDE_COLS>(from, col_stride, row_stride, cols, depth, to) }
        }

        unsafe fn tile(
            rows: usize,
            cols: usize,
            depth: usize,
            a: TileRows,
            b: *const f32,
            c: *mut f32,
            c_stride: usize,
            load_c: bool,
        ) {
            // SAFETY: the caller's promise.
            unsafe {
                match a {
                    TileRows::Packed(a) if cols > 16 => {
                        for_rows!(rows, [1 2 3 4 5 6 7 8 9 10 11 12 13 14], packed_tile, 2, (cols, depth, a, b, c, c_stride, load_c));
                    }
                    TileRows::Packed(a) => {
                        for_rows!(rows, [1 2 3 4 5 6 7 8 9 10 11 12 13 14], packed_tile, 1, (cols, depth, a, b, c, c_stride, load_c));
                    }
                    TileRows::InPlace(a, stride) => {
                        for_rows!(rows, [1 2 3 4 5 6 7 8 9 10 11 12 13 14], in_place_tile, 1, (cols, depth, (a, stride), b, c, c_stride, load_c));
                    }
                }
            }
        }
    }

    /// # Safety
    /// As [`Kernel::tile`]; `cols` is within the last of `VECTORS` vectors.
    #[target_feature(enable = "avx512f")]
    unsafe fn packed_tile<const ROWS: usize, const VECTORS: usize>(
        cols: usize,
        depth: usize,
        mut a: *const f32,
        mut b: *const f32,
        c: *mut f32,
        c_stride: usize,
        load_c: bool,
    ) {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        // SAFETY: `a` and `b` are packed with this depth; prefetching any address is allowed.
        unsafe {
            prefetch_tile::<ROWS, VECTORS>(c, c_stride);
            for _ in 0..depth {
                let columns = load_columns::<VECTORS>(b);
                for (row, sums) in sums.iter_mut().enumerate() {
                    let value = _mm512_set1_ps(*a.add(row));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = _mm512_fmadd_ps(value, column, *sum);
                    }
                }
                a = a.add(WIDE_ROWS);
                b = b.add(WIDE_COLS);
            }
            store_tile(sums, cols, c, c_stride, load_c);
        }
    }

    /// # Safety
    /// As [`packed_tile`], with rows of A `stride` apart.
    #[target_feature(enable = "avx512f")]
    unsafe fn in_place_tile<const ROWS: usize, const VECTORS: usize>(
        cols: usize,
        depth: usize,
        (a, stride): (*const f32, usize),
        mut b: *const f32,
        c: *mut f32,
        c_stride: usize,
        load_c: bool,
    ) {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        // Five pointers and a stride reach 14 rows through the processor's address arithmetic (base, base + stride, base + 2 * stride); one pointer a row would not fit.
        // SAFETY: rows and depth lie within A, `b` is packed with this depth; prefetching any address is allowed.
        unsafe {
            prefetch_tile::<ROWS, VECTORS>(c, c_stride);
            let mut bases = [a; WIDE_ROWS.div_ceil(3)];
            for (third, base) in bases.iter_mut().enumerate() {
                *base = a.wrapping_add(3 * third * stride);
            }
            for _ in 0..depth {
                let columns = load_columns::<VECTORS>(b);
                for (row, sums) in sums.iter_mut().enumerate() {
                    let value = _mm512_set1_ps(*bases[row / 3].add(row % 3 * stride));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = _mm512_fmadd_ps(value, column, *sum);
                    }
                }
                for base in &mut bases {
                    *base = base.wrapping_add(1);
                }
                b = b.add(WIDE_COLS);
            }
            store_tile(sums, cols, c, c_stride, load_c);
        }
    }

    /// Fetches a tile of C while its sums are computed.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn prefetch_tile<const ROWS: usize, const VECTORS: usize>(c: *mut f32, c_stride: usize) {
        for row in 0..ROWS {
            for vector in 0..VECTORS {
                let address = c.wrapping_add(row * c_stride + 16 * vector).cast::<i8>();
                _mm_prefetch::<_MM_HINT_T0>(address);
            }
        }
    }

    /// # Safety
    /// `b` is valid for `VECTORS` vectors.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_columns<const VECTORS: usize>(b: *const f32) -> [__m512; VECTORS] {
        // SAFETY: the caller's promise.
        std::array::from_fn(|vector| unsafe { _mm512_loadu_ps(b.add(16 * vector)) })
    }

    /// # Safety
    /// C is valid for the tile, whose last vector holds the columns up to `cols`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_tile<const ROWS: usize, const VECTORS: usize>(
        sums: [[__m512; VECTORS]; ROWS],
        cols: usize,
        c: *mut f32,
        c_stride: usize,
        load_c: bool,
    ) {
        let last = u16::MAX >> (16 * VECTORS - cols);
        for (row, sums) in sums.into_iter().enumerate() {
            for (vector, sum) in sums.into_iter().enumerate() {
                let mask = if vector + 1 == VECTORS { last } else { u16::MAX };
                // SAFETY: the mask keeps to the tile of C.
                unsafe {
                    let target = c.add(row * c_stride + 16 * vector);
                    let sum = if load_c { _mm512_add_ps(_mm512_maskz_loadu_ps(mask, target), sum) } else { sum };
                    _mm512_mask_storeu_ps(target, mask, sum);
                }
            }
        }
    }

    const NARROW_ROWS: usize = 6;
    const NARROW_COLS: usize = 16;

    /// 256-bit vectors with fused multiply-add.
    pub(in super::super) struct Avx2;

    impl Kernel for Avx2 {
        const ROWS: usize = NARROW_ROWS;
        const COLS: usize = NARROW_COLS;
        const IN_PLACE_COLS: usize = 0;
        const STRIPS: usize = 1;

        unsafe fn pack_a(
            from: *const f32,
            row_stride: usize,
            col_stride: usize,
            rows: usize,
            depth: usize,
            to: *mut f32,
        ) {
            // SAFETY: the caller's promise.
            unsafe { pack::portable::<NARROW_ROWS>(from, row_stride, col_stride, rows, depth, to) }
        }

        unsafe fn pack_b(
            from: *const f32,
            col_stride: usize,
            row_stride: usize,
            cols: usize,
            depth: usize,
            to: *mut f32,
        ) {
            // SAFETY: the caller's promise.
            unsafe { pack::portable::<NARROW_COLS>(from, col_stride, row_stride, cols, depth, to) }
        }

        unsafe fn tile(
            rows: usize,
            cols: usize,
            depth: usize,
            a: TileRows,
            b: *const f32,
            c: *mut f32,
            c_stride: usize,
            load_c: bool,
        ) {
            let TileRows::Packed(a) = a else { unreachable!("rows of A that are not packed") };
            // SAFETY: the caller's promise.
            unsafe {
                if cols > 8 {
                    for_rows!(rows, [1 2 3 4 5 6], narrow_tile, 2, (cols, depth, a, b, c, c_stride, load_c));
                } else {
                    for_rows!(rows, [1 2 3 4 5 6], narrow_tile, 1, (cols, depth, a, b, c, c_stride, load_c));
                }
            }
        }
    }

    /// # Safety
    /// As [`Kernel::tile`]; `cols` is within the last of `VECTORS` vectors.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn narrow_tile<const ROWS: usize, const VECTORS: usize>(
        cols: usize,
        depth: usize,
        mut a: *const f32,
        mut b: *const f32,
        c: *mut f32,
        c_stride: usize,
        load_c: bool,
    ) {
        let mut sums = [[_mm256_setzero_ps(); VECTORS]; ROWS];
        // SAFETY: `a` and `b` are packed with this depth; full tiles are stored by vectors, others element by element.
        unsafe {
            for _ in 0..depth {
                let mut columns = [_mm256_setzero_ps(); VECTORS];
                for (vector, column) in columns.iter_mut().enumerate() {
                    *column = _mm256_loadu_ps(b.add(8 * vector));
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let value = _mm256_set1_ps(*a.add(row));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = _mm256_fmadd_ps(value, column, *sum);
                    }
                }
                a = a.add(NARROW_ROWS);
                b = b.add(NARROW_COLS);
            }
            if cols == 8 * VECTORS {
                for (row, sums) in sums.into_iter().enumerate() {
                    for (vector, sum) in sums.into_iter().enumerate() {
                        let target = c.add(row * c_stride + 8 * vector);
                        let sum = if load_c { _mm256_add_ps(_mm256_loadu_ps(target), sum) } else { sum };
                        _mm256_storeu_ps(target, sum);
                    }
                }
            } else {
                let mut tile = [[0.0_f32; NARROW_COLS]; ROWS];
                for (tile, sums) in tile.iter_mut().zip(sums) {
                    for (vector, sum) in sums.into_iter().enumerate() {
                        _mm256_storeu_ps(tile.as_mut_ptr().add(8 * vector), sum);
                    }
                }
                write_tile(tile.as_flattened(), NARROW_COLS, ROWS, cols, c, c_stride, load_c);
            }
        }
    }
}
