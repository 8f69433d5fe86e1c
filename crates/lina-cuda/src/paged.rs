//! Causal attention of new tokens over keys and values that live in pages, for inference.
//!
//! A token has the same bits however its sequence was cut into calls, and whatever else is in the batch: what is
//! rounded is cut at pages and at spans of pages from the start of the sequence, and spans are merged in ascending
//! order, by the block that computed them or, where there would be too few blocks to keep the device busy, by a kernel
//! of its own.

use std::cmp::Reverse;
use std::ops::Range;

use lina_kernels::{PAGE_TOKENS, PagedSequence, PagedShape, page_elements};

use crate::attention::{
    F32_THREADS, HeadSize, WARP_ROWS_BLOCK, check_aligned, check_row, check_shared, layout, number, sized_module,
};
use crate::buffer::{Buffer, DType, Slice, SliceMut};
use crate::compile::Module;
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Arg, LaunchShape};

macro_rules! bf16_module {
    ($size:literal) => {
        sized_module!(
            "paged",
            "HEAD_DIM",
            $size,
            "kernels/causal.cuh",
            "kernels/accumulators.cuh",
            "kernels/tensor.cuh",
            "kernels/tiles.cuh",
            "kernels/paged.cuh",
            "kernels/paged.cu"
        )
    };
}

macro_rules! f32_module {
    ($size:literal) => {
        sized_module!(
            "paged_f32",
            "CAPACITY",
            $size,
            "kernels/causal.cuh",
            "kernels/simt.cuh",
            "kernels/paged.cuh",
            "kernels/paged_f32.cu"
        )
    };
}

/// Modules by [`HeadSize::index`].
pub(crate) static PAGED_MODULES: [Module; 8] = [
    f32_module!(64),
    f32_module!(128),
    f32_module!(256),
    bf16_module!(16),
    bf16_module!(32),
    bf16_module!(64),
    bf16_module!(96),
    bf16_module!(128),
];

/// Tokens whose pages are summed up before they are merged with earlier ones. Part of the arithmetic.
const SPAN_TOKENS: usize = 8 * PAGE_TOKENS;
/// Rows of a block that has a few rows.
const FEW_ROWS: usize = 16;
/// Blocks for each multiprocessor from which on blocks merge their spans themselves.
const BUSY_BLOCKS: usize = 8;
/// Numbers of a task in the kernels' tables.
const TASK_WORDS: usize = 8;
/// The place of sums that are not kept.
const NO_STATE: u32 = u32::MAX;

/// What each block of a paged attention layer computes: the same for all layers of a step.
#[derive(Debug)]
pub struct PagedPlan {
    dtype: DType,
    module: &'static Module,
    tokens: usize,
    heads: [usize; 3],
    row_stride: usize,
    offsets: [usize; 3],
    layout: Vec<u8>,
    /// Pages that the cache needs to have.
    needed_pages: usize,
    /// New tokens.
    new_tokens: usize,
    few: Pass,
    many: Pass,
    memory: PagedMemory,
    /// Where the pages start in the tables.
    pages: usize,
}

/// Device memory of plans, which can have it one after the other.
#[derive(Debug)]
pub struct PagedMemory {
    /// Slots of the new tokens, `[new_tokens, 2]`, then the passes' tasks, then the sequences' pages.
    tables: Buffer,
    few: SpanMemory,
    many: SpanMemory,
}

/// What spans leave to be merged.
#[derive(Debug)]
struct SpanMemory {
    /// Their sums, `[states, heads_kv, rows, head_dim]`.
    sums: Buffer,
    /// Their softmax, `[states, heads_kv, rows, 2]`.
    states: Buffer,
}

impl PagedMemory {
    /// None yet.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn new(gpu: &Gpu) -> Result<Self, CudaError> {
        let spans = || Ok(SpanMemory { sums: gpu.uninit(0, DType::F32)?, states: gpu.uninit(0, DType::F32)? });
        Ok(PagedMemory { tables: gpu.uninit(0, DType::U32)?, few: spans()?, many: spans()? })
    }
}

/// What the launches of a model's plans depend on, apart from their operands: plans that have the same may follow each other
/// in launches that were recorded.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PagedLaunches {
    tokens: usize,
    new_tokens: usize,
    /// Tasks and merges of each pass: where they start in the tables, and their number.
    passes: [[(usize, usize); 2]; 2],
    /// Where the pages start in the tables.
    pages: usize,
    tables: u64,
    /// Sums and states of each pass.
    spans: [[u64; 2]; 2],
}

/// Blocks of one height.
#[derive(Debug)]
struct Pass {
    name: &'static str,
    /// Rows of a block.
    rows: usize,
    threads: u32,
    shared_bytes: usize,
    /// Where the tasks start in the tables, and their number.
    tasks: (usize, usize),
    /// Likewise for tasks whose spans are to be merged.
    merges: (usize, usize),
}

/// Some rows of a sequence, as the kernels number them: new tokens times query heads of a key-value head.
struct Task {
    sequence: usize,
    first: usize,
    /// Spans that the rows see.
    spans: Range<usize>,
}

impl PagedPlan {
    /// The plan for activations of `tokens` rows; activations and cache are stored as `dtype`.
    ///
    /// # Errors
    /// If there is no kernel for heads of this size, they need more shared memory than the GPU gives a block, or the
    /// device's memory does not suffice.
    ///
    /// # Panics
    /// If a shape does not agree, or sequences are not in ascending order of rows without overlap.
    pub fn new(gpu: &Gpu, shape: &PagedShape<'_>, tokens: usize, dtype: DType) -> Result<Self, CudaError> {
        PagedPlan::with_memory(gpu, shape, tokens, dtype, PagedMemory::new(gpu)?)
    }

    /// As [`new`](Self::new), in the `memory` of an earlier plan whose launches have been enqueued, and in more if that does
    /// not suffice.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn with_memory(
        gpu: &Gpu,
        shape: &PagedShape<'_>,
        tokens: usize,
        dtype: DType,
        mut memory: PagedMemory,
    ) -> Result<Self, CudaError> {
        let &PagedShape { sequences, heads_q, heads_kv, head_dim, row_stride, scale, window, .. } = shape;
        let (heads, offsets) = ([heads_q, heads_kv, head_dim], [shape.q_offset, shape.k_offset, shape.v_offset]);
        let size = HeadSize::new(dtype, head_dim)?;
        let shared_bytes = |rows: usize| match dtype {
            // Queries, keys, values, and the queries' weights.
            DType::F32 => (rows + 2 * size.f32_rows) * size.row_bytes + rows * size.weight_bytes,
            // Queries, and two stages of keys and values.
            _ => (rows + 2 * 2 * PAGE_TOKENS) * size.row_bytes,
        };
        let (many_rows, few_threads, many_threads) = match dtype {
            DType::F32 => (size.f32_rows, F32_THREADS, F32_THREADS),
            _ => (64, 32, 128),
        };
        check_shared(gpu.device().facts(), dtype, head_dim, shared_bytes(many_rows))?;
        check_row(dtype, heads, row_stride, offsets, scale);
        assert!(window != Some(0), "a window of no tokens");
        let group = heads_q / heads_kv;
        let mut free = 0;
        for sequence in sequences {
            let &PagedSequence { start_row, rows, past, pages } = sequence;
            assert!(rows > 0 && start_row >= free, "{rows} rows from {start_row} on, after row {free}");
            assert!(pages.len() * PAGE_TOKENS >= past + rows, "{} pages for {past} tokens and {rows}", pages.len());
            free = start_row + rows;
        }
        assert!(free <= tokens, "sequences go past {tokens} rows");

        let mut words = Vec::new();
        for sequence in sequences {
            for row in 0..sequence.rows {
                let position = sequence.past + row;
                let page = sequence.pages[position / PAGE_TOKENS] as usize;
                words.extend([sequence.start_row + row, page * PAGE_TOKENS + position % PAGE_TOKENS].map(number));
            }
        }
        let new_tokens = words.len() / 2;

        // Where each sequence's pages start, counted from the first sequence's.
        let mut first_pages = Vec::with_capacity(sequences.len());
        let mut page_count = 0;
        for sequence in sequences {
            first_pages.push(page_count);
            page_count += sequence.pages.len();
        }
        let busy = gpu.multiprocessors() as usize * BUSY_BLOCKS;
        let mut pass = |name: &'static str, rows: usize, threads: u32, few: bool, spans_memory: &mut SpanMemory| {
            let list = list_tasks(shape, rows, |sequence| (sequence.rows * group <= FEW_ROWS) == few);
            let split = list.len() * heads_kv < busy;
            let (mut tasks, mut merges, mut states) = (Vec::new(), Vec::new(), 0);
            for Task { sequence: index, first, spans } in list {
                let sequence = &sequences[index];
                let push = |to: &mut Vec<u32>, spans: Range<usize>, state: Option<usize>| {
                    let task = [
                        sequence.start_row,
                        sequence.past,
                        sequence.rows,
                        first,
                        first_pages[index],
                        spans.start,
                        spans.end,
                    ];
                    to.extend(task.map(number).into_iter().chain([state.map_or(NO_STATE, number)]));
                };
                if split && spans.len() > 1 {
                    push(&mut merges, spans.clone(), Some(states));
                    for span in spans {
                        push(&mut tasks, span..span + 1, Some(states));
                        states += 1;
                    }
                } else {
                    push(&mut tasks, spans, None);
                }
            }
            let mut place = |tasks: Vec<u32>| {
                let start = words.len();
                words.extend(&tasks);
                // Rounded up, with tasks of no tokens, so that a step's launches are mostly those of the step before.
                let count = rounded_up(tasks.len() / TASK_WORDS);
                words.resize(start + count * TASK_WORDS, 0);
                (start, count)
            };
            let kept = states * heads_kv * rows;
            gpu.grow(&mut spans_memory.sums, kept * head_dim)?;
            gpu.grow(&mut spans_memory.states, kept * 2)?;
            let (tasks, merges) = (place(tasks), place(merges));
            Ok(Pass { name, rows, threads, shared_bytes: shared_bytes(rows), tasks, merges })
        };
        let few = pass("few", FEW_ROWS, few_threads, true, &mut memory.few)?;
        let many = pass("many", many_rows, many_threads, false, &mut memory.many)?;
        let pages = words.len();
        words.extend(sequences.iter().flat_map(|sequence| sequence.pages));
        gpu.grow(&mut memory.tables, words.len())?;
        gpu.upload(&words, memory.tables.slice_mut(0..words.len()))?;
        Ok(PagedPlan {
            dtype,
            module: &PAGED_MODULES[size.index],
            tokens,
            heads,
            row_stride,
            offsets,
            layout: layout(tokens, heads, row_stride, offsets, window, scale),
            needed_pages: seen_pages(shape),
            new_tokens,
            few,
            many,
            memory,
            pages,
        })
    }

    /// The memory, for another plan; this one is of no use any more.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn take_memory(&mut self, gpu: &Gpu) -> Result<PagedMemory, CudaError> {
        Ok(std::mem::replace(&mut self.memory, PagedMemory::new(gpu)?))
    }

    /// What the plan's launches depend on.
    pub fn launches(&self) -> PagedLaunches {
        let passes = [(&self.few, &self.memory.few), (&self.many, &self.memory.many)];
        PagedLaunches {
            tokens: self.tokens,
            new_tokens: self.new_tokens,
            passes: passes.map(|(pass, _)| [pass.tasks, pass.merges]),
            pages: self.pages,
            tables: self.memory.tables.whole().ptr(),
            spans: passes.map(|(pass, memory)| match pass.tasks {
                // Nothing is launched: where the memory is does not matter.
                (_, 0) => [0; 2],
                _ => [&memory.sums, &memory.states].map(|buffer| buffer.whole().ptr()),
            }),
        }
    }

    fn check(&self, qkv: Slice<'_>, cache: Slice<'_>) {
        let [_, heads_kv, head_dim] = self.heads;
        let page = page_elements(heads_kv, head_dim);
        assert!(qkv.len() == self.tokens * self.row_stride, "{} elements for {} rows", qkv.len(), self.tokens);
        assert!(qkv.dtype() == self.dtype && cache.dtype() == self.dtype, "activations and cache have the plan's type");
        assert!(cache.len().is_multiple_of(page), "a cache of {} elements is not pages of {page}", cache.len());
        assert!(cache.len() / page >= self.needed_pages, "a page is not in the cache");
        [qkv, cache].into_iter().for_each(check_aligned);
    }

    fn table(&self, (start, count): (usize, usize)) -> Slice<'_> {
        self.memory.tables.slice(start..start + count * TASK_WORDS)
    }
}

/// A number of tasks that few numbers are rounded up to: at most a quarter more.
fn rounded_up(tasks: usize) -> usize {
    tasks.next_multiple_of((tasks.next_power_of_two() / 8).max(1))
}

/// One more than the largest number of a page that a new token sees.
fn seen_pages(shape: &PagedShape<'_>) -> usize {
    let of_sequence = |sequence: &PagedSequence<'_>| {
        let first = shape.window.map_or(0, |window| (sequence.past + 1).saturating_sub(window)) / PAGE_TOKENS;
        let end = (sequence.past + sequence.rows).div_ceil(PAGE_TOKENS);
        sequence.pages[first..end].iter().max().map_or(0, |&page| page as usize + 1)
    };
    shape.sequences.iter().map(of_sequence).max().unwrap_or(0)
}

/// Tasks of `rows` rows of the sequences that `is_meant` picks, those that see most first.
fn list_tasks(shape: &PagedShape<'_>, rows: usize, is_meant: impl Fn(&PagedSequence<'_>) -> bool) -> Vec<Task> {
    let group = shape.heads_q / shape.heads_kv;
    let mut tasks = Vec::new();
    for (index, sequence) in shape.sequences.iter().enumerate().filter(|(_, sequence)| is_meant(sequence)) {
        let count = sequence.rows * group;
        for first in (0..count).step_by(rows) {
            let position = |row: usize| sequence.past + row / group;
            let seen = shape.window.map_or(0, |window| (position(first) + 1).saturating_sub(window));
            let end = position(count.min(first + rows) - 1) + 1;
            tasks.push(Task { sequence: index, first, spans: seen / SPAN_TOKENS..end.div_ceil(SPAN_TOKENS) });
        }
    }
    tasks.sort_by_key(|task| Reverse(task.spans.len()));
    tasks
}

/// Copies the new rows' keys and values from the fused rows (`[tokens, row_stride]`) into their pages of `cache`
/// (`[pages, 2 (keys, values), heads_kv, PAGE_TOKENS, head_dim]`).
///
/// # Errors
/// If the device has failed.
///
/// # Panics
/// If shapes or types differ from the plan's, or a page lies outside the cache.
pub fn paged_append(gpu: &Gpu, plan: &PagedPlan, qkv: Slice<'_>, cache: SliceMut<'_>) -> Result<(), CudaError> {
    plan.check(qkv, cache.as_slice());
    let [_, heads_kv, head_dim] = plan.heads;
    // bf16 rows and heads are whole words, since their sizes are multiples of 8.
    let words = |elements: usize| number(elements * plan.dtype.bytes() / 4);
    let slots = plan.memory.tables.slice(0..2 * plan.new_tokens);
    let args = [
        qkv.into(),
        (&cache).into(),
        slots.into(),
        number(heads_kv).into(),
        words(head_dim).into(),
        words(plan.row_stride).into(),
        words(plan.offsets[1]).into(),
        words(plan.offsets[2]).into(),
    ];
    gpu.launch(plan.module, "paged_append", LaunchShape::linear(number(plan.new_tokens), 256), &args)
}

/// Each new token attends to the tokens of its sequence up to itself, within the window; all of them are in the cache
/// already ([`paged_append`]).
///
/// `qkv`: `[tokens, row_stride]`, of which the queries are read; `cache`: as [`paged_append`]'s; `output`: `[tokens,
/// heads_q * head_dim]`, overwritten in the rows of sequences.
///
/// # Errors
/// If the device has failed.
///
/// # Panics
/// As [`paged_append`].
pub fn paged_attention(
    gpu: &Gpu,
    plan: &PagedPlan,
    qkv: Slice<'_>,
    cache: Slice<'_>,
    output: SliceMut<'_>,
) -> Result<(), CudaError> {
    plan.check(qkv, cache);
    let [heads_q, heads_kv, head_dim] = plan.heads;
    assert!(
        output.len() == plan.tokens * heads_q * head_dim && output.dtype() == plan.dtype,
        "paged_attention: output"
    );
    check_aligned(output.as_slice());
    let pages = plan.memory.tables.slice(plan.pages..plan.memory.tables.len());
    let suffix = plan.dtype.suffix();
    for (pass, memory) in [(&plan.few, &plan.memory.few), (&plan.many, &plan.memory.many)] {
        let shape = LaunchShape::linear(number(pass.tasks.1 * heads_kv), pass.threads).with_shared(pass.shared_bytes);
        let args = [
            qkv.into(),
            cache.into(),
            (&output).into(),
            memory.sums.whole().into(),
            memory.states.whole().into(),
            plan.table(pass.tasks).into(),
            pages.into(),
            Arg::Bytes(&plan.layout),
        ];
        gpu.launch(plan.module, &format!("paged_attention_{}_{suffix}", pass.name), shape, &args)?;
        let shape = LaunchShape::covering(pass.merges.1 * heads_kv * pass.rows * 32, WARP_ROWS_BLOCK);
        let args = [
            (&output).into(),
            memory.sums.whole().into(),
            memory.states.whole().into(),
            plan.table(pass.merges).into(),
            number(pass.merges.1).into(),
            number(pass.rows).into(),
            Arg::Bytes(&plan.layout),
        ];
        gpu.launch(plan.module, &format!("paged_merge_{suffix}"), shape, &args)?;
    }
    Ok(())
}
