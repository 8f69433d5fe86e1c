//! Host side of the grouped kernel for Hopper: whether it takes the operands, how it cuts them, and its arguments.
//! Tensor maps and groups are arguments by value, so a launch copies and allocates nothing on the device.

use cudarc::driver::sys::{
    self, CUtensorMap, CUtensorMapDataType as MapType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle,
};

use super::{BLayout, GroupedB, GroupedKernel, GroupedReduction, GroupedRows, TileWidth};
use crate::buffer::{DType, Slice, SliceMut};
use crate::compile::Module;
use crate::error::{CudaError, check};
use crate::gpu::Gpu;
use crate::launch::{Arg, LaunchShape};

/// The grouped kernels; for other GPUs than Hopper the module is empty.
pub static GROUPED_HOPPER: Module = Module::new("grouped_hopper", include_str!("../kernels/grouped_hopper.cu"));

// As in the kernel.
const TILE_ROWS: usize = 128;
const DEPTH: u32 = 64;
const MAX_GROUPS: usize = 224;
const THREADS: u32 = 288;
/// Barriers, stages, and boxes.
const SHARED_BYTES: usize = (1 + 192 + 4 * 8) << 10;

/// Bytes that addresses and distances of rows and matrices have to be multiples of for the copy engine.
const MAP_ALIGNMENT_BYTES: u64 = 16;
/// Time of a narrow tile, where a wide one takes 1: more than half, as it loads more for each of its elements. On an
/// H200 three of four products were below this, and half of them below 0.545.
const NARROW_TILE_TIME: f64 = 0.58;

/// What is best for [`super::grouped_matmul`].
pub(super) fn choose_for_rows(
    gpu: &Gpu,
    groups: &[GroupedRows],
    a: Slice<'_>,
    b: &GroupedB<'_>,
    c: Slice<'_>,
) -> GroupedKernel {
    let one_slot = groups.iter().all(|group| group.slot == 0);
    let matrices = b.data.ptr() + (b.offset * b.data.dtype().bytes()) as u64;
    let taken = [b.k, b.n, if one_slot { 0 } else { b.stride }].iter().all(|&elements| elements % 8 == 0)
        && [a.ptr(), matrices, c.ptr()].iter().all(|&address| is_aligned(address));
    choose(gpu, a.dtype(), taken, b.n, tile_rows(&merge(groups)))
}

/// What is best for [`super::grouped_weight_gradient`].
pub(super) fn choose_for_gradient(
    gpu: &Gpu,
    groups: &[GroupedReduction],
    a: Slice<'_>,
    m: usize,
    b: Slice<'_>,
    n: usize,
    c: Slice<'_>,
    offset: usize,
    stride: usize,
) -> GroupedKernel {
    let one_slot = groups.iter().all(|group| group.slot == 0);
    let gradients = c.ptr() + (offset * c.dtype().bytes()) as u64;
    let taken = [m, n, if one_slot { 0 } else { stride }].iter().all(|&elements| elements % 8 == 0)
        && [a.ptr(), b.ptr(), gradients].iter().all(|&address| is_aligned(address));
    let filled = groups.iter().filter(|group| group.rows > 0).count();
    choose(gpu, a.dtype(), taken, n, filled * m.div_ceil(TILE_ROWS))
}

fn is_aligned(address: u64) -> bool {
    address.is_multiple_of(MAP_ALIGNMENT_BYTES)
}

/// The tiles that take the least time, for `tile_rows` rows of tiles and `n` columns. A multiprocessor has one tile at
/// a time, so tiles come in rounds, and in the last one multiprocessors may be idle.
fn choose(gpu: &Gpu, dtype: DType, taken: bool, n: usize, tile_rows: usize) -> GroupedKernel {
    if !taken || dtype != DType::Bf16 || gpu.compute_capability() != (9, 0) {
        return GroupedKernel::Blas;
    }
    let multiprocessors = gpu.multiprocessors() as usize;
    let rounds = |width: TileWidth| (tile_rows * width.tiles(n)).div_ceil(multiprocessors) as f64;
    let narrow = NARROW_TILE_TIME * rounds(TileWidth::Narrow) < rounds(TileWidth::Wide);
    GroupedKernel::Hopper(if narrow { TileWidth::Narrow } else { TileWidth::Wide })
}

/// Products whose operands are of sizes that [`choose_for_rows`] accepts, and not empty.
pub(super) fn multiply(
    gpu: &Gpu,
    width: TileWidth,
    groups: &[GroupedRows],
    a: Slice<'_>,
    b: &GroupedB<'_>,
    c: SliceMut<'_>,
) -> Result<(), CudaError> {
    let (n, k) = (b.n, b.k);
    let list = merge(groups);
    let Some(slots) = list.iter().map(|group| group.slot as usize + 1).max() else { return Ok(()) };
    let matrices = Matrices { data: b.data, offset: b.offset, stride: b.stride, slots };
    let maps = [
        dense(a, k).map([DEPTH, TILE_ROWS as u32])?,
        match b.layout {
            BLayout::Nk => matrices.shaped(n, k).map([DEPTH, width.columns()])?,
            BLayout::Kn => matrices.shaped(k, n).map([64, DEPTH])?,
        },
        dense(c.as_slice(), n).map([64, 64])?,
    ];
    let name = match b.layout {
        BLayout::Nk => "nk",
        BLayout::Kn => "kn",
    };
    for groups in list.chunks(MAX_GROUPS) {
        let count = tile_rows(groups) * width.tiles(n);
        launch(gpu, width, name, count, &maps, groups, [0, n, k], c.ptr(), false)?;
    }
    Ok(())
}

/// Gradients whose operands are of sizes that [`choose_for_gradient`] accepts, and not empty; groups without rows are
/// left out.
pub(super) fn weight_gradient(
    gpu: &Gpu,
    width: TileWidth,
    groups: &[GroupedReduction],
    a: Slice<'_>,
    m: usize,
    b: Slice<'_>,
    n: usize,
    c: SliceMut<'_>,
    offset: usize,
    stride: usize,
    accumulate: bool,
) -> Result<(), CudaError> {
    let filled = groups.iter().filter(|group| group.rows > 0);
    let list: Vec<GroupedRows> =
        filled.map(|group| GroupedRows { slot: group.slot, a_row: group.row, c_row: 0, rows: group.rows }).collect();
    let Some(slots) = list.iter().map(|group| group.slot as usize + 1).max() else { return Ok(()) };
    let maps = [
        dense(a, m).map([64, DEPTH])?,
        dense(b, n).map([64, DEPTH])?,
        Matrices { data: c.as_slice(), offset, stride, slots }.shaped(m, n).map([32, 64])?,
    ];
    for groups in list.chunks(MAX_GROUPS) {
        let count = groups.len() * m.div_ceil(TILE_ROWS) * width.tiles(n);
        launch(gpu, width, "gradient", count, &maps, groups, [m, n, 0], c.ptr(), accumulate)?;
    }
    Ok(())
}

impl TileWidth {
    /// Tiles side by side in `n` columns.
    fn tiles(self, n: usize) -> usize {
        n.div_ceil(self.columns() as usize)
    }
}

/// Rows of tiles of the products of `groups`.
fn tile_rows(groups: &[GroupedRows]) -> usize {
    groups.iter().map(|group| (group.rows as usize).div_ceil(TILE_ROWS)).sum()
}

/// Groups with rows, and neighbours of one slot as one.
fn merge(groups: &[GroupedRows]) -> Vec<GroupedRows> {
    let mut list: Vec<GroupedRows> = Vec::with_capacity(groups.len());
    for group in groups.iter().filter(|group| group.rows > 0) {
        match list.last_mut() {
            Some(last)
                if last.slot == group.slot
                    && last.a_row + last.rows == group.a_row
                    && last.c_row + last.rows == group.c_row =>
            {
                last.rows += group.rows;
            }
            _ => list.push(*group),
        }
    }
    list
}

/// Enqueues `tile_count` tiles.
fn launch(
    gpu: &Gpu,
    width: TileWidth,
    name: &str,
    tile_count: usize,
    maps: &[CUtensorMap; 3],
    groups: &[GroupedRows],
    sizes: [usize; 3],
    c_rows: u64,
    accumulate: bool,
) -> Result<(), CudaError> {
    // The kernel's `Groups`: their number and as many places as there can be.
    let mut table = vec![0u32; 1 + 4 * MAX_GROUPS];
    table[0] = groups.len() as u32;
    for (group, place) in groups.iter().zip(table[1..].chunks_exact_mut(4)) {
        place.copy_from_slice(&[group.slot, group.a_row, group.c_row, group.rows]);
    }
    let sizes = sizes.map(|size| u32::try_from(size).expect("matrices have less than 2^32 rows and columns"));
    let grid = tile_count.min(gpu.multiprocessors() as usize) as u32;
    let shape = LaunchShape::linear(grid, THREADS).with_shared(SHARED_BYTES);
    let [a, b, c] = maps;
    let args = [
        Arg::Bytes(bytes_of(&a.opaque)),
        Arg::Bytes(bytes_of(&b.opaque)),
        Arg::Bytes(bytes_of(&c.opaque)),
        Arg::Bytes(bytes_of(&table)),
        Arg::Bytes(bytes_of(&sizes)),
        Arg::Pointer(c_rows),
        Arg::U32(accumulate.into()),
    ];
    gpu.launch(&GROUPED_HOPPER, &format!("grouped_{name}_{}", width.columns()), shape, &args)
}

fn bytes_of<T: Copy + Into<u64>>(values: &[T]) -> &[u8] {
    // SAFETY: numbers have no padding, and any byte is a `u8`.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Matrices in one buffer, the first after `offset` elements and each `stride` elements after the one before.
struct Matrices<'a> {
    data: Slice<'a>,
    offset: usize,
    stride: usize,
    slots: usize,
}

impl<'a> Matrices<'a> {
    fn shaped(self, rows: usize, columns: usize) -> Tensor<'a> {
        let stride = if self.slots > 1 { self.stride } else { rows * columns };
        let data = self.data.slice(self.offset..self.data.len());
        Tensor { data, rows, columns, slots: self.slots, stride }
    }
}

/// A buffer of rows of `columns` elements as one matrix.
fn dense(data: Slice<'_>, columns: usize) -> Tensor<'_> {
    let rows = data.len() / columns;
    Tensor { data, rows, columns, slots: 1, stride: rows * columns }
}

/// Row-major matrices `stride` elements apart, as the copy engine sees them.
struct Tensor<'a> {
    data: Slice<'a>,
    rows: usize,
    columns: usize,
    slots: usize,
    stride: usize,
}

impl Tensor<'_> {
    /// A map for boxes of `[columns, rows]` of one matrix, 128 bytes wide and swizzled. What lies beyond a matrix reads
    /// as zeros and is not written.
    fn map(&self, [columns, rows]: [u32; 2]) -> Result<CUtensorMap, CudaError> {
        let dtype = match self.data.dtype() {
            DType::Bf16 => MapType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::F32 => MapType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            DType::U32 => unreachable!("products are of floats"),
        };
        let bytes = self.data.dtype().bytes();
        let sizes = [self.columns as u64, self.rows as u64, self.slots as u64];
        let strides = [(self.columns * bytes) as u64, (self.stride * bytes) as u64];
        let mut map = CUtensorMap { opaque: [0; 16] };
        // SAFETY: the out-parameter is valid and aligned, the arrays have as many elements as three dimensions need,
        // and the driver reads them and not the tensor.
        let code = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                dtype,
                3,
                self.data.ptr() as *mut _,
                sizes.as_ptr(),
                strides.as_ptr(),
                [columns, rows, 1].as_ptr(),
                [1; 3].as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", code).map_err(|error| match error {
            CudaError::Call { call, reason } => {
                CudaError::Call { call, reason: format!("{reason} ({dtype:?}, sizes {sizes:?}, strides {strides:?})") }
            }
            error => error,
        })?;
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_one_slot_are_one_group() {
        let group = |slot, a_row, c_row, rows| GroupedRows { slot, a_row, c_row, rows };
        let groups = [
            group(0, 0, 10, 5),
            group(0, 5, 15, 7),
            group(0, 12, 22, 0),
            // Not below each other in C, in A, and of another slot.
            group(0, 12, 30, 1),
            group(0, 20, 31, 1),
            group(1, 21, 32, 2),
            group(1, 23, 34, 3),
        ];
        let merged = [group(0, 0, 10, 12), group(0, 12, 30, 1), group(0, 20, 31, 1), group(1, 21, 32, 5)];
        assert_eq!(merge(&groups), merged);
    }
}
