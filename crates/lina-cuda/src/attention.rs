//! Causal grouped-query attention over fused rows of queries, keys and values, in tiles: on tensor cores for bf16, with
//! f32's own arithmetic for f32. Scores exist one tile at a time, and the backward pass recomputes probabilities from
//! the saved logsumexp.

use std::cmp::Reverse;

use lina_kernels::AttentionShape;

use crate::buffer::{Buffer, DType, Slice, SliceMut};
use crate::compile::Module;
use crate::device::DeviceFacts;
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Arg, LaunchShape};

/// A module that is compiled for heads of `$size` elements, which it knows as `$define`.
macro_rules! sized_module {
    ($name:literal, $define:literal, $size:literal, $($file:literal),+) => {
        Module::new(
            concat!($name, "_", $size),
            concat!("#define ", $define, " ", $size, "\n", $(include_str!($file)),+),
        )
    };
}
pub(crate) use sized_module;

macro_rules! bf16_module {
    ($size:literal) => {
        sized_module!(
            "attention",
            "HEAD_DIM",
            $size,
            "kernels/causal.cuh",
            "kernels/accumulators.cuh",
            "kernels/tensor.cuh",
            "kernels/tiles.cuh",
            "kernels/attention.cu"
        )
    };
}

/// The kernels of [`bf16_module`] with other products; empty for GPUs without Hopper's instructions.
macro_rules! hopper_module {
    ($size:literal) => {
        Module::new(
            concat!("attention_hopper_", $size),
            concat!(
                "#ifdef __CUDA_ARCH_FEAT_SM90_ALL\n",
                "#define HEAD_DIM ",
                $size,
                "\n",
                include_str!("kernels/causal.cuh"),
                include_str!("kernels/accumulators.cuh"),
                include_str!("kernels/hopper.cuh"),
                include_str!("kernels/tiles.cuh"),
                include_str!("kernels/attention.cu"),
                "#endif\n"
            ),
        )
    };
}

macro_rules! f32_module {
    ($size:literal) => {
        sized_module!(
            "attention_f32",
            "CAPACITY",
            $size,
            "kernels/causal.cuh",
            "kernels/simt.cuh",
            "kernels/attention_f32.cu"
        )
    };
}

/// Modules for f32, by [`F32_CAPACITIES`], for bf16, by [`BF16_HEAD_DIMS`], and for bf16 on Hopper, by
/// [`HOPPER_HEAD_DIMS`].
pub(crate) static ATTENTION_MODULES: [Module; 10] = [
    f32_module!(64),
    f32_module!(128),
    f32_module!(256),
    bf16_module!(16),
    bf16_module!(32),
    bf16_module!(64),
    bf16_module!(96),
    bf16_module!(128),
    hopper_module!(64),
    hopper_module!(128),
];

/// Largest heads that f32 modules are compiled for.
const F32_CAPACITIES: [usize; 3] = [64, 128, 256];
/// Heads that bf16 modules are compiled for.
const BF16_HEAD_DIMS: [usize; 5] = [16, 32, 64, 96, 128];
/// Heads that Hopper's modules are compiled for.
const HOPPER_HEAD_DIMS: [usize; 2] = [64, 128];

/// Threads of a block of the kernels that have a warp for each head of a token.
pub(crate) const WARP_ROWS_BLOCK: u32 = 128;
/// Threads of a block of the f32 kernels.
pub(crate) const F32_THREADS: u32 = 256;

/// Which of the sizes that modules are compiled for takes heads of a given size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadSize {
    /// Place in a set of modules like [`ATTENTION_MODULES`].
    pub index: usize,
    /// Rows of a tile of full height; of f32, since bf16 kernels have their own.
    pub f32_rows: usize,
    /// Bytes of a row of queries, keys or values in shared memory.
    pub row_bytes: usize,
    /// Bytes of a row of the weights that f32 kernels share.
    pub weight_bytes: usize,
}

impl HeadSize {
    pub fn new(dtype: DType, head_dim: usize) -> Result<Self, CudaError> {
        let unsupported = |kind: &str, sizes: &str| {
            CudaError::Unsupported(format!(
                "attention in {kind} has no kernel for heads of {head_dim} elements, expected {sizes}"
            ))
        };
        match dtype {
            DType::F32 => {
                let index = F32_CAPACITIES.iter().position(|&capacity| head_dim <= capacity);
                let index = index.ok_or_else(|| unsupported("f32", "256 at most"))?;
                let f32_rows = if F32_CAPACITIES[index] > 128 { 32 } else { 64 };
                let row_bytes = (F32_CAPACITIES[index] + 4) * 4;
                Ok(HeadSize { index, f32_rows, row_bytes, weight_bytes: (f32_rows + 4) * 4 })
            }
            DType::Bf16 => {
                let index = BF16_HEAD_DIMS.iter().position(|&size| head_dim == size);
                let index = index.ok_or_else(|| unsupported("bf16", "16, 32, 64, 96 or 128"))?;
                let row_bytes = (head_dim + 8) * 2;
                Ok(HeadSize { index: F32_CAPACITIES.len() + index, f32_rows: 0, row_bytes, weight_bytes: 0 })
            }
            DType::U32 => panic!("activations are floating-point numbers"),
        }
    }
}

/// A module, and what blocks of its kernels need.
#[derive(Clone, Copy, Debug)]
struct Kernels {
    module: &'static Module,
    /// Rows of a block.
    tile_rows: usize,
    forward: Block,
    grad_queries: Block,
    grad_keys: Block,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    threads: u32,
    shared_bytes: usize,
}

impl Kernels {
    /// # Errors
    /// If there is no kernel for such heads, or the GPU gives blocks too little shared memory.
    fn new(facts: &DeviceFacts, dtype: DType, head_dim: usize) -> Result<Self, CudaError> {
        let kernels = Kernels::of_heads(facts, dtype, head_dim)?;
        let [forward, grad_queries, grad_keys] =
            [kernels.forward, kernels.grad_queries, kernels.grad_keys].map(|block| block.shared_bytes);
        check_shared(facts, dtype, head_dim, forward.max(grad_queries).max(grad_keys))?;
        Ok(kernels)
    }

    fn of_heads(facts: &DeviceFacts, dtype: DType, head_dim: usize) -> Result<Self, CudaError> {
        let size = HeadSize::new(dtype, head_dim)?;
        if dtype == DType::F32 {
            let tile_rows = size.f32_rows;
            // Weights, beside queries, keys and values, and in the backward pass the outputs' gradients.
            let block = |tiles: usize| Block {
                threads: F32_THREADS,
                shared_bytes: tile_rows * (tiles * size.row_bytes + size.weight_bytes),
            };
            let (forward, backward) = (block(3), block(4));
            let module = &ATTENTION_MODULES[size.index];
            return Ok(Kernels { module, tile_rows, forward, grad_queries: backward, grad_keys: backward });
        }
        let tile_rows = 128;
        // Tiles of the block, and two stages of two tiles of what it goes over.
        let block = |threads: u32, row_bytes: usize, tiles: usize, stage_rows: usize| Block {
            threads,
            shared_bytes: (tiles * tile_rows + 2 * 2 * stage_rows) * row_bytes,
        };
        let hopper = HOPPER_HEAD_DIMS.iter().position(|&size| head_dim == size);
        let (index, row_bytes, threads, forward_keys, query_keys) = match hopper {
            Some(index) if facts.compute_capability == (9, 0) => {
                (F32_CAPACITIES.len() + BF16_HEAD_DIMS.len() + index, head_dim * 2, 256, 128, 128)
            }
            _ => (size.index, size.row_bytes, 128, 64, if head_dim > 64 { 32 } else { 64 }),
        };
        let mut grad_keys = block(256, row_bytes, 2, 64);
        // Two numbers of each query of a stage.
        grad_keys.shared_bytes += 2 * 2 * 64 * 4;
        Ok(Kernels {
            module: &ATTENTION_MODULES[index],
            tile_rows,
            forward: block(threads, row_bytes, 1, forward_keys),
            grad_queries: block(threads, row_bytes, 2, query_keys),
            grad_keys,
        })
    }
}

/// Refuses heads whose kernels have blocks with `needed` bytes of shared memory where a GPU gives a block less.
pub(crate) fn check_shared(facts: &DeviceFacts, dtype: DType, head_dim: usize, needed: usize) -> Result<(), CudaError> {
    if needed <= facts.shared_bytes_per_block {
        return Ok(());
    }
    Err(CudaError::Unsupported(format!(
        "attention with heads of {head_dim} elements in {} needs {} KiB of shared memory for a block, GPU {} ({}) has {}",
        dtype.suffix(),
        needed.div_ceil(1024),
        facts.ordinal,
        facts.name,
        facts.shared_bytes_per_block / 1024
    )))
}

pub(crate) fn number(value: usize) -> u32 {
    u32::try_from(value).expect("fewer than 2^32 rows, heads and elements of a row")
}

/// The kernels' `Layout`.
pub(crate) fn layout(
    tokens: usize,
    [heads_q, heads_kv, head_dim]: [usize; 3],
    row_stride: usize,
    offsets: [usize; 3],
    window: Option<usize>,
    scale: f32,
) -> Vec<u8> {
    let window = window.map_or(u32::MAX, |window| u32::try_from(window).unwrap_or(u32::MAX));
    let sizes = [tokens, heads_q, heads_kv, head_dim, row_stride, offsets[0], offsets[1], offsets[2]].map(number);
    sizes.into_iter().chain([window, scale.to_bits()]).flat_map(u32::to_ne_bytes).collect()
}

/// Checks what both kinds of attention ask of a fused row, and that bf16 rows can be read 16 bytes at a time.
pub(crate) fn check_row(
    dtype: DType,
    [heads_q, heads_kv, head_dim]: [usize; 3],
    row_stride: usize,
    [q, k, v]: [usize; 3],
    scale: f32,
) {
    assert!(heads_kv > 0 && heads_q.is_multiple_of(heads_kv), "{heads_q} query heads for {heads_kv} key-value heads");
    let ends = [q + heads_q * head_dim, k + heads_kv * head_dim, v + heads_kv * head_dim];
    assert!(ends.iter().all(|&end| end <= row_stride), "queries, keys and values go past rows of {row_stride}");
    assert!(scale > 0.0, "scores are scaled by a positive number");
    let aligned = [row_stride, q, k, v].iter().all(|offset| offset.is_multiple_of(8));
    assert!(dtype == DType::F32 || aligned, "queries, keys and values of bf16 start at multiples of 8 elements");
}

pub(crate) fn check_aligned(slice: Slice<'_>) {
    assert!(
        slice.dtype() == DType::F32 || slice.ptr().is_multiple_of(16),
        "rows of bf16 start at multiples of 16 bytes"
    );
}

/// Which tile of which sequence each block of an attention layer computes: the same for all layers of a batch.
#[derive(Debug)]
pub struct AttentionPlan {
    dtype: DType,
    kernels: Kernels,
    tokens: usize,
    heads: [usize; 3],
    row_stride: usize,
    layout: Vec<u8>,
    tiles: u32,
    /// Tiles of queries, then the same as tiles of keys, each `[tiles, 3]` and those with most work first.
    tables: Buffer,
    /// Of each token and query head, its output times the output's gradient: scratch of the backward pass.
    along: Buffer,
}

impl AttentionPlan {
    /// The plan for activations of `tokens` rows that are stored as `dtype`.
    ///
    /// # Errors
    /// If there is no kernel for heads of this size, they need more shared memory than the GPU gives a block, or the
    /// device's memory does not suffice.
    ///
    /// # Panics
    /// If a shape does not agree, or sequences are not in ascending order without overlap.
    pub fn new(gpu: &Gpu, shape: &AttentionShape<'_>, tokens: usize, dtype: DType) -> Result<Self, CudaError> {
        let &AttentionShape { sequences, heads_q, heads_kv, head_dim, row_stride, scale, window, .. } = shape;
        let (heads, offsets) = ([heads_q, heads_kv, head_dim], [shape.q_offset, shape.k_offset, shape.v_offset]);
        let kernels = Kernels::new(gpu.device().facts(), dtype, head_dim)?;
        check_row(dtype, heads, row_stride, offsets, scale);
        assert!(window != Some(0), "a window of no tokens");
        let mut free = 0;
        for sequence in sequences {
            assert!(sequence.start_row >= free, "{sequence:?} starts before the previous sequence ends");
            free = sequence.start_row + sequence.rows;
        }
        assert!(free <= tokens, "sequences go past {tokens} rows");

        let window = window.unwrap_or(usize::MAX);
        // Keys that a tile's queries see, and queries that see its keys.
        let mut tiles = Vec::new();
        for sequence in sequences {
            for first in (0..sequence.rows).step_by(kernels.tile_rows) {
                let end = sequence.rows.min(first + kernels.tile_rows);
                let keys = end - (first + 1).saturating_sub(window);
                let queries = sequence.rows.min((end - 1).saturating_add(window)) - first;
                tiles.push(([sequence.start_row, sequence.rows, first].map(number), keys, queries));
            }
        }
        let mut tables = Vec::with_capacity(2 * 3 * tiles.len());
        tiles.sort_by_key(|&(_, keys, _)| Reverse(keys));
        tables.extend(tiles.iter().flat_map(|&(tile, ..)| tile));
        tiles.sort_by_key(|&(_, _, queries)| Reverse(queries));
        tables.extend(tiles.iter().flat_map(|&(tile, ..)| tile));
        Ok(AttentionPlan {
            dtype,
            kernels,
            tokens,
            heads,
            row_stride,
            layout: layout(tokens, heads, row_stride, offsets, shape.window, scale),
            tiles: number(tiles.len()),
            tables: gpu.buffer_from(&tables, DType::U32)?,
            along: gpu.uninit(tokens * heads_q, DType::F32)?,
        })
    }

    /// Query heads of all tokens: elements of the logsumexp.
    fn query_heads(&self) -> usize {
        self.tokens * self.heads[0]
    }

    fn check(&self, rows: &[Slice<'_>], outputs: &[Slice<'_>], log_sum_exp: Slice<'_>) {
        let (fused, width) = (self.tokens * self.row_stride, self.query_heads() * self.heads[2]);
        let have = |slices: &[Slice<'_>], len: usize| slices.iter().all(|s| s.len() == len && s.dtype() == self.dtype);
        assert!(have(rows, fused) && have(outputs, width), "attention: shapes");
        assert!(log_sum_exp.len() == self.query_heads() && log_sum_exp.dtype() == DType::F32, "attention: logsumexp");
        rows.iter().chain(outputs).for_each(|&slice| check_aligned(slice));
    }

    /// Enqueues a kernel that has a block for each of `tiles` under each of `heads` heads.
    fn launch(&self, gpu: &Gpu, name: &str, heads: usize, block: Block, args: &[Arg<'_>]) -> Result<(), CudaError> {
        let shape = LaunchShape::linear(self.tiles * number(heads), block.threads).with_shared(block.shared_bytes);
        gpu.launch(self.kernels.module, &format!("attention_{name}_{}", self.dtype.suffix()), shape, args)
    }
}

/// output = softmax(scale · Q·Kᵀ, masked) · V per head.
///
/// `qkv`: `[tokens, row_stride]`; `output`: `[tokens, heads_q * head_dim]`, overwritten in the rows of sequences, other
/// rows are left alone; `log_sum_exp`: `[heads_q, tokens]`, f32, the logsumexp of each row of scores, for the backward
/// pass.
///
/// # Errors
/// If the device has failed.
///
/// # Panics
/// If shapes or types differ from the plan's.
pub fn attention_forward(
    gpu: &Gpu,
    plan: &AttentionPlan,
    qkv: Slice<'_>,
    output: SliceMut<'_>,
    log_sum_exp: SliceMut<'_>,
) -> Result<(), CudaError> {
    plan.check(&[qkv], &[output.as_slice()], log_sum_exp.as_slice());
    let args =
        [qkv.into(), (&output).into(), (&log_sum_exp).into(), plan.tables.whole().into(), Arg::Bytes(&plan.layout)];
    plan.launch(gpu, "forward", plan.heads[0], plan.kernels.forward, &args)
}

/// Backward of [`attention_forward`]: overwrites the query, key and value parts of `grad_qkv` (`[tokens, row_stride]`)
/// in the rows of sequences.
///
/// `output`, `log_sum_exp`: what the forward pass wrote; `grad_output`: `[tokens, heads_q * head_dim]`.
///
/// # Errors
/// If the device has failed.
///
/// # Panics
/// As [`attention_forward`].
pub fn attention_backward(
    gpu: &Gpu,
    plan: &AttentionPlan,
    qkv: Slice<'_>,
    output: Slice<'_>,
    log_sum_exp: Slice<'_>,
    grad_output: Slice<'_>,
    grad_qkv: SliceMut<'_>,
) -> Result<(), CudaError> {
    plan.check(&[qkv, grad_qkv.as_slice()], &[output, grad_output], log_sum_exp);
    let [heads_q, heads_kv, _] = plan.heads;
    let along = plan.along.whole();
    let warps = LaunchShape::covering(plan.query_heads() * 32, WARP_ROWS_BLOCK);
    let args = [output.into(), grad_output.into(), along.into(), Arg::Bytes(&plan.layout)];
    gpu.launch(plan.kernels.module, &format!("attention_along_{}", plan.dtype.suffix()), warps, &args)?;

    let tables = plan.tables.whole();
    let (query_tiles, key_tiles) = (tables.slice(0..tables.len() / 2), tables.slice(tables.len() / 2..tables.len()));
    let run = |name: &str, heads: usize, block: Block, tiles: Slice<'_>| {
        let args = [
            qkv.into(),
            grad_output.into(),
            log_sum_exp.into(),
            along.into(),
            (&grad_qkv).into(),
            tiles.into(),
            Arg::Bytes(&plan.layout),
        ];
        plan.launch(gpu, name, heads, block, &args)
    };
    run("grad_queries", heads_q, plan.kernels.grad_queries, query_tiles)?;
    run("grad_keys", heads_kv, plan.kernels.grad_keys, key_tiles)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(compute_capability: (u32, u32), shared_kib: usize) -> DeviceFacts {
        let (name, total_bytes) = ("a GPU".to_owned(), 1 << 30);
        let shared_bytes_per_block = shared_kib * 1024;
        DeviceFacts { ordinal: 2, name, compute_capability, multiprocessors: 1, shared_bytes_per_block, total_bytes }
    }

    #[test]
    fn heads_are_refused_where_blocks_have_too_little_shared_memory() {
        let [ampere, ada, hopper] = [((8, 0), 163), ((8, 9), 99), ((9, 0), 227)].map(|(cc, kib)| facts(cc, kib));
        let heads = [(DType::F32, 64), (DType::F32, 128), (DType::F32, 256), (DType::Bf16, 64), (DType::Bf16, 128)];
        for (dtype, head_dim) in heads {
            for facts in [&ampere, &hopper] {
                Kernels::new(facts, dtype, head_dim).unwrap();
            }
            assert_eq!(Kernels::new(&ada, dtype, head_dim).is_ok(), head_dim == 64, "{dtype:?}, {head_dim}");
        }
        let expected = "attention with heads of 128 elements in bf16 needs 137 KiB of shared memory for a block, GPU 2 (a \
                        GPU) has 99";
        assert_eq!(Kernels::new(&ada, DType::Bf16, 128).unwrap_err().to_string(), expected);
    }
}
