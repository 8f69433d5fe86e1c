//! Token and learned position embeddings.

use crate::buffer::{DType, Slice, SliceMut};
use crate::compile::Module;
use crate::elementwise::{THREADS, kernel_name, number, pack_len};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Arg, LaunchShape};
use crate::permute::stable_order;

pub(crate) static EMBEDDING: Module =
    Module::new("embedding", concat!(include_str!("kernels/pack.cuh"), include_str!("kernels/embedding.cu")));

/// Sorted ids that a block sums.
const CHUNK: usize = 32;

/// `out[i] = table[ids[i]]`. `table`: `[vocabulary, width]`; `ids`: u32, each of which must be in the table; `out`:
/// `[ids, width]`, overwritten; `width` is `out`'s length over that of `ids`.
///
/// # Errors
/// If the device has failed.
pub fn embedding_forward(gpu: &Gpu, table: Slice<'_>, ids: Slice<'_>, out: SliceMut<'_>) -> Result<(), CudaError> {
    look_up(gpu, "embedding_forward", table, ids, out)
}

/// `out[i] += table[positions[i]]`, as [`embedding_forward`].
///
/// # Errors
/// If the device has failed.
pub fn add_position_embedding(
    gpu: &Gpu,
    table: Slice<'_>,
    positions: Slice<'_>,
    out: SliceMut<'_>,
) -> Result<(), CudaError> {
    look_up(gpu, "embedding_add", table, positions, out)
}

fn look_up(gpu: &Gpu, operation: &str, table: Slice<'_>, ids: Slice<'_>, out: SliceMut<'_>) -> Result<(), CudaError> {
    let width = width(out.as_slice(), ids);
    assert_eq!(table.dtype(), out.dtype(), "embedding: types");
    let pack = pack_len(out.dtype(), width, &[table.ptr(), out.ptr()]);
    let packs = out.len() / pack;
    let args = [table.into(), ids.into(), (&out).into(), number(width / pack), number(packs)];
    let kernel = kernel_name(operation, out.dtype(), pack);
    gpu.launch(&EMBEDDING, &kernel, LaunchShape::covering(packs, THREADS), &args)
}

/// Backward of [`embedding_forward`] and [`add_position_embedding`]: `grad_table[ids[i]] += grad_out[i]`, for each id
/// in the order of i. The id `padding` has no gradient. `grad_out`: `[ids, width]`; `grad_table`: f32 `[vocabulary,
/// width]`.
///
/// # Errors
/// If the device's memory does not suffice, or it has failed.
pub fn embedding_backward(
    gpu: &Gpu,
    grad_out: Slice<'_>,
    ids: Slice<'_>,
    padding: Option<u32>,
    grad_table: SliceMut<'_>,
) -> Result<(), CudaError> {
    let width = width(grad_out, ids);
    if ids.is_empty() || width == 0 {
        return Ok(());
    }
    assert!(
        grad_table.len().is_multiple_of(width) && grad_table.dtype() == DType::F32,
        "embedding_backward: the table has rows of {width} f32"
    );
    let order = stable_order(gpu, ids, grad_table.len() / width)?;
    let chunks = ids.len().div_ceil(CHUNK);
    let mut partials = gpu.uninit(2 * chunks * width, DType::F32)?;
    let dtype = grad_out.dtype();
    let pack = pack_len(dtype, width, &[grad_out.ptr(), grad_table.ptr()]);
    // At least as many threads as read a chunk's ids and the next one.
    let block = (width / pack).next_multiple_of(32).clamp(2 * CHUNK, THREADS as usize);
    let columns = (width / pack).div_ceil(block);
    let shape = LaunchShape { grid: [chunks as u32, columns as u32, 1], block: block as u32, shared_bytes: 0 };
    let ids_args = [ids.into(), order.whole().into(), number(ids.len()), Arg::U32(padding.unwrap_or(u32::MAX))];
    let [ids, order, count, padding] = ids_args;
    let (table, partials) = (Arg::from(&grad_table), Arg::from(&partials.whole_mut()));
    let args = [grad_out.into(), ids, order, count, padding, number(width), table, partials];
    gpu.launch(&EMBEDDING, &kernel_name("embedding_backward", dtype, pack), shape, &args)?;
    gpu.launch(&EMBEDDING, &kernel_name("embedding_spanning", dtype, pack), shape, &args[1..])
}

fn width(rows: Slice<'_>, ids: Slice<'_>) -> usize {
    assert_eq!(ids.dtype(), DType::U32, "embedding: types");
    let width = rows.len().checked_div(ids.len()).unwrap_or(0);
    assert_eq!(width * ids.len(), rows.len(), "embedding: {} elements are not rows for {} ids", rows.len(), ids.len());
    width
}
