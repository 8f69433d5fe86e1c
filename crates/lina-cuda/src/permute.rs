//! Moving token rows into expert order and back, and the weighted sum of the experts' outputs.
//!
//! An *assignment* is a (token, slot) pair: a token makes `top_k` of them, which follow each other. Assignments come in
//! chunks, the ranges of tokens of a pipeline. `position[t * top_k + j]` is the row, among its chunk's rows in expert
//! order, that holds token t's copy for its j-th expert; [`DROPPED`] where it has none.
//!
//! Rows are given out by a stable counting sort: blocks count their assignments per expert, the counts become each
//! block's first rows, and within a block warps rank their assignments in order. So rows do not depend on what runs
//! first.

use std::ops::Range;

use lina_kernels::DROPPED;

use crate::buffer::{Buffer, DType, Slice, SliceMut};
use crate::compile::Module;
use crate::elementwise::{THREADS, kernel_name, number, pack_len};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Arg, LaunchShape};
use crate::limits::check_experts;

pub(crate) static PERMUTE: Module =
    Module::new("permute", concat!(include_str!("kernels/pack.cuh"), include_str!("kernels/permute.cu")));

const WARP: usize = 32;
/// Assignments of a block.
const BLOCK_ITEMS: usize = 1024;
/// Chunks that kernels know.
const MAX_CHUNKS: usize = 128;
/// Parts of a gathered row's slab that a lane of a warp copies, as in the kernel.
const SLAB_PARTS: usize = 2;
/// Values of a digit in a pass of [`stable_order`], and its bits.
const DIGITS: usize = 1 << DIGIT_BITS;
const DIGIT_BITS: u32 = 10;

// The kernels know it too.
const _: () = assert!(DROPPED == u32::MAX);

/// The chunks as kernels take them: their number, that of their blocks, and for each its first and last item, first
/// block and first row.
struct Chunks {
    count: usize,
    blocks: usize,
    bytes: Vec<u8>,
}

impl Chunks {
    fn new(chunks: &[Range<usize>], top_k: usize, first_rows: impl Fn(usize) -> u32) -> Result<Self, CudaError> {
        if chunks.len() > MAX_CHUNKS {
            let message = format!("{} pipeline chunks: at most {MAX_CHUNKS} on a GPU", chunks.len());
            return Err(CudaError::Unsupported(message));
        }
        let word = |number: usize| u32::try_from(number).expect("less than 2^32 assignments");
        let mut words = vec![0u32; 2 + 4 * MAX_CHUNKS];
        let mut blocks = 0;
        for (number, chunk) in chunks.iter().enumerate() {
            let items = chunk.start * top_k..chunk.end * top_k;
            let fields = [word(items.start), word(items.end), word(blocks), first_rows(number)];
            words[2 + 4 * number..][..4].copy_from_slice(&fields);
            blocks += items.len().div_ceil(BLOCK_ITEMS);
        }
        (words[0], words[1]) = (word(chunks.len()), word(blocks));
        let bytes = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        Ok(Chunks { count: chunks.len(), blocks, bytes })
    }

    /// A block of threads for each block of assignments, with that many counters.
    fn shape(&self, counters: usize) -> LaunchShape {
        LaunchShape::linear(self.blocks as u32, THREADS).with_shared(counters * size_of::<u32>())
    }
}

/// Counts the assignments of `expert_index` (u32 `[tokens, top_k]`) in each of `chunks` (ranges of tokens) per expert,
/// then, over all chunks, the tokens whose first choice an expert is. `counts`: u32 `[chunks + 1, experts]`,
/// overwritten.
///
/// # Errors
/// If there are more chunks or experts than the kernels take, or the device has failed.
pub fn count_assignments(
    gpu: &Gpu,
    expert_index: Slice<'_>,
    top_k: usize,
    chunks: &[Range<usize>],
    experts: usize,
    mut counts: SliceMut<'_>,
) -> Result<(), CudaError> {
    check_assignments(expert_index, top_k, chunks, experts)?;
    assert!(counts.len() == (chunks.len() + 1) * experts && counts.dtype() == DType::U32, "count_assignments: shapes");
    gpu.fill_zero(counts.reborrow())?;
    let chunks = Chunks::new(chunks, top_k, |_| 0)?;
    let args = [expert_index.into(), number(top_k), number(experts), Arg::Bytes(&chunks.bytes), (&counts).into()];
    gpu.launch(&PERMUTE, "count_assignments", chunks.shape(2 * experts), &args)
}

/// Gives every assignment its row, in (token, slot) order.
///
/// `expert_index`, `top_k`, `chunks`, `experts`: as for [`count_assignments`]; `row_starts`, `row_ends`: u32
/// `[chunks, experts]`, the rows that each expert has among its chunk's: when they are used up, assignments are
/// [`DROPPED`]; `chunk_starts`: the first entry of each chunk in `token_of_row`; `position`: u32 `[tokens, top_k]`,
/// overwritten for the tokens of the chunks; `token_of_row`: u32, the token of each row given out, chunk after chunk.
///
/// # Errors
/// As [`count_assignments`].
pub fn place_rows(
    gpu: &Gpu,
    expert_index: Slice<'_>,
    top_k: usize,
    chunks: &[Range<usize>],
    experts: usize,
    row_starts: Slice<'_>,
    row_ends: Slice<'_>,
    chunk_starts: &[u32],
    position: SliceMut<'_>,
    token_of_row: SliceMut<'_>,
) -> Result<(), CudaError> {
    check_assignments(expert_index, top_k, chunks, experts)?;
    let per_expert = chunks.len() * experts;
    let shapes = row_starts.len() == per_expert && row_ends.len() == per_expert && position.len() == expert_index.len();
    assert!(shapes && chunk_starts.len() == chunks.len(), "place_rows: shapes");
    let types = [row_starts.dtype(), row_ends.dtype(), position.dtype(), token_of_row.dtype()];
    assert!(types.iter().all(|&dtype| dtype == DType::U32), "place_rows: types");
    let chunks = Chunks::new(chunks, top_k, |chunk| chunk_starts[chunk])?;
    let mut block_starts = gpu.uninit(chunks.blocks * experts, DType::U32)?;
    let block_starts = Arg::from(&block_starts.whole_mut());
    let (index, top_k, count) = (Arg::from(expert_index), number(top_k), number(experts));
    let table = Arg::Bytes(&chunks.bytes);
    gpu.launch(&PERMUTE, "count_blocks", chunks.shape(experts), &[index, count, table, block_starts])?;
    let shape = LaunchShape::covering(chunks.count * experts, THREADS);
    gpu.launch(&PERMUTE, "start_blocks", shape, &[count, table, row_starts.into(), block_starts])?;
    let counters = (1 + THREADS as usize / WARP) * experts;
    let outputs = [(&position).into(), (&token_of_row).into()];
    let [position, token_of_row] = outputs;
    let args = [index, top_k, count, table, block_starts, row_ends.into(), position, token_of_row];
    gpu.launch(&PERMUTE, "place_rows", chunks.shape(counters), &args)
}

fn check_assignments(
    expert_index: Slice<'_>,
    top_k: usize,
    chunks: &[Range<usize>],
    experts: usize,
) -> Result<(), CudaError> {
    assert!(
        chunks.iter().all(|chunk| chunk.start <= chunk.end && chunk.end * top_k <= expert_index.len()),
        "chunks are ranges of tokens"
    );
    assert!(top_k > 0 && expert_index.dtype() == DType::U32, "assignments are numbers of experts");
    check_experts(experts)
}

/// The rows of `ids` (u32, below `limit`) sorted by id, those of one id in order.
pub(crate) fn stable_order(gpu: &Gpu, ids: Slice<'_>, limit: usize) -> Result<Buffer, CudaError> {
    let count = ids.len();
    let chunk = 0..count;
    let chunks = std::slice::from_ref(&chunk);
    let shape = LaunchShape::covering(count, THREADS);
    let bits = usize::BITS - limit.saturating_sub(1).leading_zeros();
    let mut digits = gpu.uninit(count, DType::U32)?;
    let mut counts = gpu.uninit(2 * DIGITS, DType::U32)?;
    let (mut starts, mut ends) = (gpu.uninit(DIGITS, DType::U32)?, gpu.uninit(DIGITS, DType::U32)?);
    let mut position = gpu.uninit(count, DType::U32)?;
    let mut order: Option<Buffer> = None;
    for pass in 0..bits.div_ceil(DIGIT_BITS).max(1) {
        let so_far = Arg::Pointer(order.as_ref().map_or(0, |order| order.whole().ptr()));
        let args = [ids.into(), so_far, Arg::U32(pass * DIGIT_BITS), number(count), (&digits.whole_mut()).into()];
        gpu.launch(&PERMUTE, "sort_digits", shape, &args)?;
        count_assignments(gpu, digits.whole(), 1, chunks, DIGITS, counts.whole_mut())?;
        let args = [counts.whole().into(), (&starts.whole_mut()).into(), (&ends.whole_mut()).into()];
        gpu.launch(&PERMUTE, "sort_starts", LaunchShape::linear(1, DIGITS as u32), &args)?;
        let mut sorted = gpu.uninit(count, DType::U32)?;
        let (starts, ends) = (starts.whole(), ends.whole());
        let position = position.whole_mut();
        place_rows(gpu, digits.whole(), 1, chunks, DIGITS, starts, ends, &[0], position, sorted.whole_mut())?;
        order = Some(match order {
            None => sorted,
            Some(order) => {
                let mut composed = gpu.uninit(count, DType::U32)?;
                let args = [order.whole().into(), sorted.whole().into(), number(count), (&composed.whole_mut()).into()];
                gpu.launch(&PERMUTE, "sort_compose", shape, &args)?;
                composed
            }
        });
    }
    Ok(order.expect("there is at least one pass"))
}

/// `dst[i] = src[index[i]]`, rows of `width`; zeros where the index is [`DROPPED`]. `index`: u32, each a row of `src`.
///
/// # Errors
/// If the device has failed.
pub fn gather_rows(
    gpu: &Gpu,
    src: Slice<'_>,
    width: usize,
    index: Slice<'_>,
    dst: SliceMut<'_>,
) -> Result<(), CudaError> {
    assert!(dst.len() == index.len() * width && dst.dtype() == src.dtype(), "gather_rows: shapes");
    assert_eq!(index.dtype(), DType::U32, "gather_rows: types");
    let pack = pack_len(src.dtype(), width, &[src.ptr(), dst.ptr()]);
    let parts = width / pack;
    let args = [src.into(), index.into(), number(index.len()), number(parts), (&dst).into()];
    let [rows, ..] = LaunchShape::covering(index.len() * WARP, THREADS).grid;
    let slabs = parts.div_ceil(SLAB_PARTS * WARP) as u32;
    let shape = LaunchShape { grid: [rows, slabs, 1], block: THREADS, shared_bytes: 0 };
    gpu.launch(&PERMUTE, &format!("gather_rows_{}", pack * src.dtype().bytes()), shape, &args)
}

/// Backward of [`gather_rows`] from tokens to expert order: `grad_x[t]` += the sum of `grad_rows[position[t][j]]` over
/// j in order.
///
/// `grad_rows`: `[rows, width]`; `position`: u32 `[tokens, k]`; `grad_x`: `[tokens, width]`.
///
/// # Errors
/// If the device has failed.
pub fn gather_backward(
    gpu: &Gpu,
    grad_rows: Slice<'_>,
    width: usize,
    position: Slice<'_>,
    grad_x: SliceMut<'_>,
) -> Result<(), CudaError> {
    let x = grad_x.ptr();
    combine(gpu, grad_rows, width, position, None, x, grad_x)
}

/// `y[t]` = `x[t]` + the sum of `gate_weight[t][j]` · `expert_rows[position[t][j]]` over j in order; dropped ones count
/// as zero.
///
/// `expert_rows`: `[rows, width]`; `position` (u32), `gate_weight` (f32): `[tokens, k]`; `x`, `y`: `[tokens, width]`;
/// `x` is the residual, `y` is overwritten.
///
/// # Errors
/// If the device has failed.
pub fn combine_rows(
    gpu: &Gpu,
    expert_rows: Slice<'_>,
    width: usize,
    position: Slice<'_>,
    gate_weight: Slice<'_>,
    x: Slice<'_>,
    y: SliceMut<'_>,
) -> Result<(), CudaError> {
    assert!((x.len(), x.dtype()) == (y.len(), y.dtype()), "combine_rows: shapes");
    combine(gpu, expert_rows, width, position, Some(gate_weight), x.ptr(), y)
}

/// `x` is an address, as it may be that of `y`.
fn combine(
    gpu: &Gpu,
    rows: Slice<'_>,
    width: usize,
    position: Slice<'_>,
    gate_weight: Option<Slice<'_>>,
    x: u64,
    y: SliceMut<'_>,
) -> Result<(), CudaError> {
    let (_, k) = token_shape(y.as_slice(), width, position);
    let weights = gate_weight.is_none_or(|weight| (weight.len(), weight.dtype()) == (position.len(), DType::F32));
    assert!(weights && rows.dtype() == y.dtype(), "combine_rows: shapes");
    let pack = pack_len(y.dtype(), width, &[rows.ptr(), x, y.ptr()]);
    let packs = y.len() / pack;
    let args = [
        rows.into(),
        position.into(),
        Arg::Pointer(gate_weight.map_or(0, |weight| weight.ptr())),
        number(k),
        Arg::Pointer(x),
        (&y).into(),
        number(width / pack),
        number(packs),
    ];
    let kernel = kernel_name("combine_rows", y.dtype(), pack);
    gpu.launch(&PERMUTE, &kernel, LaunchShape::covering(packs, THREADS), &args)
}

/// Backward of [`combine_rows`].
///
/// `grad_out`: `[tokens, width]`; `position`: u32 `[tokens, k]`, in which no row may come twice; `grad_expert_rows`:
/// `[rows, width]`, overwritten in the rows that `position` names and untouched elsewhere; `grad_gate_weight`: f32
/// `[tokens, k]`, overwritten, 0 for dropped ones.
///
/// # Errors
/// If the device has failed.
pub fn combine_backward(
    gpu: &Gpu,
    grad_out: Slice<'_>,
    width: usize,
    expert_rows: Slice<'_>,
    position: Slice<'_>,
    gate_weight: Slice<'_>,
    grad_expert_rows: SliceMut<'_>,
    grad_gate_weight: SliceMut<'_>,
) -> Result<(), CudaError> {
    let (_, k) = token_shape(grad_out, width, position);
    let weights = gate_weight.len() == position.len() && grad_gate_weight.len() == position.len();
    let dtype = grad_out.dtype();
    assert!(weights && expert_rows.len() == grad_expert_rows.len(), "combine_backward: shapes");
    assert!(
        expert_rows.dtype() == dtype
            && grad_expert_rows.dtype() == dtype
            && gate_weight.dtype() == DType::F32
            && grad_gate_weight.dtype() == DType::F32,
        "combine_backward: types"
    );
    let pack = pack_len(dtype, width, &[grad_out.ptr(), expert_rows.ptr(), grad_expert_rows.ptr()]);
    let args = [
        grad_out.into(),
        expert_rows.into(),
        position.into(),
        gate_weight.into(),
        number(position.len()),
        number(k),
        number(width),
        (&grad_expert_rows).into(),
        (&grad_gate_weight).into(),
    ];
    let shape = LaunchShape::covering(position.len() * WARP, THREADS);
    gpu.launch(&PERMUTE, &kernel_name("combine_backward", dtype, pack), shape, &args)
}

/// Moves blocks of rows. `blocks`: u32 `[n, 3]`, each a first source row, a first destination row and a number of rows,
/// in the order of their source rows, which follow each other without gaps; `total_rows`: all their rows; `source`,
/// `destination`: rows of `width`.
///
/// # Errors
/// If the device has failed.
pub fn copy_blocks(
    gpu: &Gpu,
    blocks: Slice<'_>,
    total_rows: usize,
    width: usize,
    source: Slice<'_>,
    destination: SliceMut<'_>,
) -> Result<(), CudaError> {
    assert!(blocks.len().is_multiple_of(3) && blocks.dtype() == DType::U32, "copy_blocks: blocks are three numbers");
    assert!(total_rows == 0 || !blocks.is_empty(), "copy_blocks: rows belong to blocks");
    assert!(
        total_rows * width <= source.len().min(destination.len()) && source.dtype() == destination.dtype(),
        "copy_blocks: shapes"
    );
    let pack = pack_len(source.dtype(), width, &[source.ptr(), destination.ptr()]);
    let args = [
        blocks.into(),
        number(blocks.len() / 3),
        number(total_rows),
        number(width),
        source.into(),
        (&destination).into(),
    ];
    let shape = LaunchShape::covering(total_rows * WARP, THREADS);
    gpu.launch(&PERMUTE, &kernel_name("copy_blocks", source.dtype(), pack), shape, &args)
}

/// Tokens and choices per token.
fn token_shape(tokens: Slice<'_>, width: usize, position: Slice<'_>) -> (usize, usize) {
    let count = tokens.len().checked_div(width).unwrap_or(0);
    let k = position.len().checked_div(count).unwrap_or(0);
    assert!(
        count * width == tokens.len() && count * k == position.len() && position.dtype() == DType::U32,
        "{} elements in rows of {width} and {} positions do not agree",
        tokens.len(),
        position.len()
    );
    (count, k)
}
