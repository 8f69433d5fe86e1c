//! Causal attention of new tokens over keys and values that live in pages (Kwon et al., "Efficient Memory Management for Large Language Model Serving with
//! PagedAttention", 2023), for inference.
//!
//! A token's result must not depend on how its sequence was cut into calls, on what else is in the batch or on threads, so everything that is rounded is cut
//! at fixed places: scores are turned into probabilities one page at a time, pages from the start of the sequence are summed up in spans of
//! [`SPAN_TOKENS`], and spans are merged in ascending order ("flash decoding"). A span can then run on any thread. All query heads of a key-value head
//! go over a page together, so decoding reads the cache once.

use std::cell::RefCell;
use std::ops::Range;

use crate::attention::{check_fused, online_softmax, scaled};
use crate::compute::Compute;
use crate::gemm::{RawProduct, Strided, run_tile};
use crate::isa::{Isa, multiversion};
use crate::prefetch::{LINE, prefetch};
use crate::scratch;
use crate::vector::{exp, fma};

/// Tokens of a page of keys and values; also a tile of keys.
pub const PAGE_TOKENS: usize = 64;
/// Tokens whose pages are summed up before they are merged with earlier ones. Part of the arithmetic.
const SPAN_TOKENS: usize = 8 * PAGE_TOKENS;
/// Rows of queries (tokens times query heads of a key-value head) that go over a page together.
const QUERY_ROWS: usize = 128;
/// Rows of the next page's keys and values that are asked for ahead of time: what products of a few rows do not ask for themselves, since pages lie anywhere.
const AHEAD_ROWS: usize = 16;
/// Elements below which appending is not worth another thread.
const SERIAL_ELEMENTS: usize = 32 * 1024;

/// Elements of a page of one layer: `[2 (keys, values), heads_kv, PAGE_TOKENS, head_dim]`.
pub fn page_elements(heads_kv: usize, head_dim: usize) -> usize {
    2 * heads_kv * PAGE_TOKENS * head_dim
}

/// New tokens of one sequence, and the pages that hold it.
#[derive(Clone, Copy, Debug)]
pub struct PagedSequence<'a> {
    /// First row of the new tokens in the fused buffer.
    pub start_row: usize,
    /// New tokens, at least 1.
    pub rows: usize,
    /// Tokens that the cache holds before them.
    pub past: usize,
    /// Pages of the sequence, in order: page p holds the tokens from `p * PAGE_TOKENS` on. Pages that no new token sees any more, because of the window, are
    /// not read; their numbers do not matter.
    pub pages: &'a [u32],
}

/// Geometry of a paged attention layer; the fused buffer is laid out as [`crate::AttentionShape`]'s.
#[derive(Clone, Copy, Debug)]
pub struct PagedShape<'a> {
    /// In ascending order of their rows, without overlap. Rows in none of them are left alone.
    pub sequences: &'a [PagedSequence<'a>],
    /// Query heads, a multiple of `heads_kv`; query head h reads key-value head h · heads_kv / heads_q.
    pub heads_q: usize,
    /// Key-value heads.
    pub heads_kv: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of a row of the fused buffer.
    pub row_stride: usize,
    /// Where the queries start within a row.
    pub q_offset: usize,
    /// Where the keys start within a row.
    pub k_offset: usize,
    /// Where the values start within a row.
    pub v_offset: usize,
    /// Scores are multiplied by this before the softmax.
    pub scale: f32,
    /// A token sees this many tokens at most, itself included; all earlier ones without a window.
    pub window: Option<usize>,
}

impl<'a> PagedShape<'a> {
    /// Rows of queries, keys and values one after the other, scale 1/√head_dim, no window.
    pub fn fused(sequences: &'a [PagedSequence<'a>], heads_q: usize, heads_kv: usize, head_dim: usize) -> Self {
        Self {
            sequences,
            heads_q,
            heads_kv,
            head_dim,
            row_stride: (heads_q + 2 * heads_kv) * head_dim,
            q_offset: 0,
            k_offset: heads_q * head_dim,
            v_offset: (heads_q + heads_kv) * head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            window: None,
        }
    }

    fn group(&self) -> usize {
        self.heads_q / self.heads_kv
    }

    /// Checks everything but page numbers, which are checked where they are used; returns the rows of the fused buffer.
    fn check(&self, qkv: usize, cache: usize) -> usize {
        let offsets = [self.q_offset, self.k_offset, self.v_offset];
        let rows = check_fused(qkv, self.row_stride, [self.heads_q, self.heads_kv], self.head_dim, offsets);
        assert!(self.heads_q > 0 && self.head_dim > 0, "{} query heads of {} elements", self.heads_q, self.head_dim);
        assert!(self.window != Some(0), "a window of no tokens");
        let elements = page_elements(self.heads_kv, self.head_dim);
        assert!(cache.is_multiple_of(elements), "a cache of {cache} elements is not pages of {elements}");
        let mut free = 0;
        for sequence in self.sequences {
            let &PagedSequence { start_row, rows: new, past, pages } = sequence;
            assert!(new > 0, "a sequence without new tokens at row {start_row}");
            assert!(start_row + new <= rows, "{new} rows from row {start_row} on go past {rows} rows");
            assert!(start_row >= free, "rows from {start_row} on overlap the previous sequence");
            free = start_row + new;
            assert!(
                pages.len() * PAGE_TOKENS >= past + new,
                "{} pages do not hold {past} tokens and {new} new ones",
                pages.len()
            );
        }
        rows
    }

    /// First token that the token at `position` sees.
    fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Where a head's keys (`part` 0) or values (1) start in page number `page`.
    fn in_cache(&self, page: u32, part: usize, head: usize) -> usize {
        let tile = PAGE_TOKENS * self.head_dim;
        page as usize * page_elements(self.heads_kv, self.head_dim) + (part * self.heads_kv + head) * tile
    }
}

/// Copies the new rows' keys and values from the fused rows (`[rows, row_stride]`) into their pages of `cache`
/// (`[pages, page_elements]`).
///
/// # Panics
/// If a shape does not agree, a page that is written lies outside the cache, or sequences are not in ascending order of rows without overlap.
pub fn paged_append(ctx: &Compute, shape: &PagedShape<'_>, qkv: &[f32], cache: &mut [f32]) {
    shape.check(qkv.len(), cache.len());
    let (dim, elements) = (shape.head_dim, cache.len());
    let cache = Shared(cache.as_mut_ptr());
    let cache = &cache;
    let copy = |task: usize| {
        let (part, head) = (task / shape.heads_kv, task % shape.heads_kv);
        let offset = [shape.k_offset, shape.v_offset][part] + head * dim;
        for sequence in shape.sequences {
            for row in 0..sequence.rows {
                let position = sequence.past + row;
                let start =
                    shape.in_cache(sequence.pages[position / PAGE_TOKENS], part, head) + position % PAGE_TOKENS * dim;
                assert!(start + dim <= elements, "page {} is not in the cache", position / PAGE_TOKENS);
                let from = &qkv[(sequence.start_row + row) * shape.row_stride + offset..][..dim];
                // SAFETY: within the cache, as just checked; a task writes only its part and head of any page, and no two tasks have the same.
                unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), cache.0.add(start), dim) };
            }
        }
    };
    let rows: usize = shape.sequences.iter().map(|sequence| sequence.rows).sum();
    if rows * 2 * shape.heads_kv * dim < SERIAL_ELEMENTS {
        (0..2 * shape.heads_kv).for_each(copy);
    } else {
        ctx.parallel_for(2 * shape.heads_kv, copy);
    }
}

/// Each new token attends to the tokens of its sequence up to itself, within the window; all of them are in the cache already ([`paged_append`]).
///
/// `qkv`: `[rows, row_stride]`, of which the queries are read; `cache`: `[pages, page_elements]`; `out`: `[rows, heads_q * head_dim]`, overwritten in the rows
/// of the sequences. A token's result has the same bits whatever else the call computes.
///
/// # Panics
/// As [`paged_append`], for pages that are read.
pub fn paged_attention(ctx: &Compute, shape: &PagedShape<'_>, qkv: &[f32], cache: &[f32], out: &mut [f32]) {
    let rows = shape.check(qkv.len(), cache.len());
    assert!(out.len() == rows * shape.heads_q * shape.head_dim, "paged_attention: shapes");
    let call = Call { isa: ctx.isa(), shape, qkv, cache, out: Shared(out.as_mut_ptr()) };
    let mut tasks = TASKS.take();
    tasks.clear();
    list_tiles(shape, &mut tasks);
    if tasks.len() >= 2 * ctx.threads() || ctx.threads() == 1 {
        ctx.parallel_for(tasks.len(), |index| call.whole(&tasks[index]));
    } else {
        call.in_spans(ctx, &mut tasks);
    }
    TASKS.set(tasks);
}

thread_local! {
    static TASKS: RefCell<Vec<Task>> = const { RefCell::new(Vec::new()) };
}

/// A pointer to what tasks write disjoint parts of.
struct Shared(*mut f32);

// SAFETY: tasks write disjoint parts.
unsafe impl Sync for Shared {}

/// Some new tokens of a sequence under one key-value head.
#[derive(Clone)]
struct Task {
    sequence: usize,
    head: usize,
    /// Rows of the sequence.
    rows: Range<usize>,
    /// Spans that the rows see.
    spans: Range<usize>,
    /// Where the states of the spans start, if they are kept.
    state: usize,
}

/// One task per tile of queries and key-value head, those that see most first, so that a thread does not get a long one last.
fn list_tiles(shape: &PagedShape<'_>, tasks: &mut Vec<Task>) {
    let tile_rows = (QUERY_ROWS / shape.group()).max(1);
    for (index, sequence) in shape.sequences.iter().enumerate() {
        for tile in (0..sequence.rows.div_ceil(tile_rows)).rev() {
            let rows = tile * tile_rows..sequence.rows.min((tile + 1) * tile_rows);
            let first = shape.first_seen(sequence.past + rows.start) / SPAN_TOKENS;
            let spans = first..(sequence.past + rows.end).div_ceil(SPAN_TOKENS);
            for head in 0..shape.heads_kv {
                tasks.push(Task { sequence: index, head, rows: rows.clone(), spans: spans.clone(), state: 0 });
            }
        }
    }
}

/// What a call's tasks read and write.
struct Call<'a> {
    isa: Isa,
    shape: &'a PagedShape<'a>,
    qkv: &'a [f32],
    cache: &'a [f32],
    out: Shared,
}

/// Sums over some keys for rows of queries.
struct State<'s> {
    /// Largest score of each row, -infinity if it saw no key.
    largest: &'s mut [f32],
    /// Sum of the row's exponentials of its scores less the largest.
    total: &'s mut [f32],
    /// Values weighted by those, `[rows, head_dim]`.
    sums: &'s mut [f32],
}

impl<'s> State<'s> {
    fn elements(rows: usize, dim: usize) -> usize {
        rows * (dim + 2)
    }

    fn new(buffer: &'s mut [f32], rows: usize) -> Self {
        let (largest, buffer) = buffer.split_at_mut(rows);
        let (total, sums) = buffer.split_at_mut(rows);
        Self { largest, total, sums }
    }

    fn clear(&mut self) {
        self.largest.fill(f32::NEG_INFINITY);
        self.total.fill(0.0);
        self.sums.fill(0.0);
    }

    /// Adds the sums over later keys.
    fn merge(&mut self, isa: Isa, later: &State<'_>, dim: usize) {
        for row in 0..self.largest.len() {
            let columns = row * dim..(row + 1) * dim;
            let (sums, more) = (&mut self.sums[columns.clone()], &later.sums[columns]);
            // What saw nothing must not count: not even its rounding, since a row alone would not have met it.
            if later.largest[row] == f32::NEG_INFINITY {
                continue;
            }
            if self.largest[row] == f32::NEG_INFINITY {
                (self.largest[row], self.total[row]) = (later.largest[row], later.total[row]);
                sums.copy_from_slice(more);
                continue;
            }
            let more = (later.largest[row], later.total[row], more);
            merge_row(isa, &mut self.largest[row], &mut self.total[row], sums, more.0, more.1, more.2);
        }
    }
}

impl Call<'_> {
    /// All spans of a task, one after another.
    fn whole(&self, task: &Task) {
        let (count, dim) = (task.rows.len() * self.shape.group(), self.shape.head_dim);
        let state = State::elements(count, dim);
        scratch::with_f32(2 * state, |buffer| {
            let (merged, span) = buffer.split_at_mut(state);
            let (mut merged, mut span) = (State::new(merged, count), State::new(span, count));
            merged.clear();
            for index in task.spans.clone() {
                if task.spans.len() == 1 {
                    self.attend(task, index, &mut merged);
                } else {
                    self.attend(task, index, &mut span);
                    merged.merge(self.isa, &span, dim);
                }
            }
            self.write(task, &merged);
        });
    }

    /// All spans of all tasks side by side, for a few rows that see much.
    fn in_spans(&self, ctx: &Compute, tasks: &mut [Task]) {
        let (group, dim) = (self.shape.group(), self.shape.head_dim);
        let (mut elements, mut most) = (0, 0);
        for task in tasks.iter_mut() {
            task.state = elements;
            elements += task.spans.len() * State::elements(task.rows.len() * group, dim);
            most = most.max(task.spans.len());
        }
        let tasks = &*tasks;
        scratch::with_f32(elements, |buffer| {
            let states = Shared(buffer.as_mut_ptr());
            let states = &states;
            ctx.parallel_for(tasks.len() * most, |index| {
                let (task, nth) = (&tasks[index % tasks.len()], index / tasks.len());
                if nth < task.spans.len() {
                    let count = task.rows.len() * group;
                    let size = State::elements(count, dim);
                    // SAFETY: room for every span of every task was counted above, and each is computed once.
                    let state = unsafe { std::slice::from_raw_parts_mut(states.0.add(task.state + nth * size), size) };
                    self.attend(task, task.spans.start + nth, &mut State::new(state, count));
                }
            });
            for task in tasks {
                let count = task.rows.len() * group;
                let size = State::elements(count, dim);
                let (merged, later) = buffer[task.state..][..task.spans.len() * size].split_at_mut(size);
                let mut merged = State::new(merged, count);
                for span in later.chunks_exact_mut(size) {
                    merged.merge(self.isa, &State::new(span, count), dim);
                }
                self.write(task, &merged);
            }
        });
    }

    /// Overwrites `state` with the sums of a task's rows over the span's keys.
    fn attend(&self, task: &Task, span: usize, state: &mut State<'_>) {
        let (shape, isa) = (self.shape, self.isa);
        let (group, dim) = (shape.group(), shape.head_dim);
        let sequence = &shape.sequences[task.sequence];
        let count = task.rows.len() * group;
        state.clear();
        scratch::with_f32(count * (dim + PAGE_TOKENS), |buffer| {
            let (queries, scores) = buffer.split_at_mut(count * dim);
            for (row, query) in task.rows.clone().zip(queries.chunks_exact_mut(group * dim)) {
                let offset = (sequence.start_row + row) * shape.row_stride + shape.q_offset + task.head * group * dim;
                scaled(isa, &self.qkv[offset..][..group * dim], shape.scale, query);
            }
            let (first, end) = (sequence.past + task.rows.start, sequence.past + task.rows.end);
            let start = (span * SPAN_TOKENS).max(shape.first_seen(first) / PAGE_TOKENS * PAGE_TOKENS);
            for key in (start..end.min((span + 1) * SPAN_TOKENS)).step_by(PAGE_TOKENS) {
                let width = PAGE_TOKENS.min(end - key);
                // Rows before the page see none of it, nor do those whose window starts behind it.
                let from = key.saturating_sub(first);
                let to = shape
                    .window
                    .map_or(task.rows.len(), |window| (key + width - 1).saturating_add(window).min(end) - first);
                let (rows, height) = (from * group..to * group, (to - from) * group);
                let page = sequence.pages[key / PAGE_TOKENS];
                let keys = &self.cache[shape.in_cache(page, 0, task.head)..][..PAGE_TOKENS * dim];
                let values = &self.cache[shape.in_cache(page, 1, task.head)..][..PAGE_TOKENS * dim];
                let (queries, scores) = (&queries[rows.start * dim..rows.end * dim], &mut scores[..height * width]);
                let product = RawProduct::tile(
                    scores.as_mut_ptr(),
                    width,
                    Strided::rows(queries.as_ptr(), dim),
                    Strided::transposed(keys.as_ptr(), dim),
                    height,
                    width,
                    dim,
                    false,
                );
                self.ask_for(task, key + PAGE_TOKENS, end, 1);
                // SAFETY: the slices have these shapes, and scores overlap neither operand.
                unsafe { run_tile(isa, &product) };
                for (row, scores) in rows.clone().zip(scores.chunks_exact_mut(width)) {
                    let position = first + row / group;
                    let begin = shape.first_seen(position).saturating_sub(key).min(width);
                    let seen = (begin, (position + 1).saturating_sub(key).clamp(begin, width));
                    let sums = &mut state.sums[row * dim..(row + 1) * dim];
                    online_softmax(isa, scores, seen, &mut state.largest[row], &mut state.total[row], sums);
                }
                let product = RawProduct::tile(
                    state.sums[rows.start * dim..rows.end * dim].as_mut_ptr(),
                    dim,
                    Strided::rows(scores.as_ptr(), width),
                    Strided::rows(values.as_ptr(), dim),
                    height,
                    dim,
                    width,
                    true,
                );
                self.ask_for(task, key + PAGE_TOKENS, end, 0);
                // SAFETY: as above; the sums overlap neither operand.
                unsafe { run_tile(isa, &product) };
            }
        });
    }

    /// Prefetches the beginning of a page's keys (`part` 0) or values (1), if `key` is before `end`.
    fn ask_for(&self, task: &Task, key: usize, end: usize, part: usize) {
        if key >= end {
            return;
        }
        let page = self.shape.sequences[task.sequence].pages[key / PAGE_TOKENS];
        let start = self.cache.as_ptr().wrapping_add(self.shape.in_cache(page, part, task.head));
        for line in (0..AHEAD_ROWS * self.shape.head_dim).step_by(LINE) {
            prefetch(start.wrapping_add(line));
        }
    }

    /// Writes a task's results.
    fn write(&self, task: &Task, state: &State<'_>) {
        let (group, dim) = (self.shape.group(), self.shape.head_dim);
        let first = self.shape.sequences[task.sequence].start_row + task.rows.start;
        for (row, sums) in state.sums.chunks_exact(dim).enumerate() {
            let offset = ((first + row / group) * self.shape.heads_q + task.head * group + row % group) * dim;
            // SAFETY: rows of sequences lie within the output, do not overlap, and this head's part of them belongs to this task alone.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.0.add(offset), dim) };
            normalise(self.isa, sums, 1.0 / state.total[row], out);
        }
    }
}

multiversion! {
    /// Merges sums over earlier and later keys of one row (Dao et al., "Flash-Decoding for long-context inference", 2023).
    fn merge_row(largest: &mut f32, total: &mut f32, sums: &mut [f32], later_largest: f32, later_total: f32, later_sums: &[f32]) {
        let highest = if later_largest > *largest { later_largest } else { *largest };
        let (keep, add) = (exp::<FMA>(*largest - highest), exp::<FMA>(later_largest - highest));
        *largest = highest;
        *total = fma::<FMA>(later_total, add, *total * keep);
        for (sum, later) in sums.iter_mut().zip(later_sums) {
            *sum = fma::<FMA>(*later, add, *sum * keep);
        }
    }

    /// Masked keys add zeros, which can turn -0 into 0: adding 0 makes all zeros alike.
    fn normalise(sums: &[f32], factor: f32, out: &mut [f32]) {
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = sum * factor + 0.0;
        }
    }
}
