//! Causal grouped-query attention in tiles (Dao et al., "FlashAttention", 2022): scores exist one tile at a time, and the backward pass recomputes probabilities
//! from the saved logsumexp. Tiles that the mask hides are skipped.

use crate::compute::Compute;
use crate::gemm::{RawProduct, Strided, run_tile};
use crate::isa::{Isa, multiversion};
use crate::scratch;
use crate::vector::{dot, exp, exp_all, exp_sum, max};

/// Query rows of a tile.
const QUERY_ROWS: usize = 64;
/// Key rows of a tile. Part of the arithmetic: tiles start at multiples of this from the start of the sequence.
const KEY_ROWS: usize = 256;

/// Rows of one sequence within the batch. Tokens see only earlier tokens of their own sequence, and themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// First row.
    pub start_row: usize,
    /// Number of rows.
    pub rows: usize,
}

/// Geometry of an attention layer over a fused buffer whose rows hold queries, keys and values of one token. A batch of documents is a list of sequences; sequences
/// packed into one row range are kept apart by listing each.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape<'a> {
    /// Disjoint row ranges. Rows in none of them are left alone.
    pub sequences: &'a [Sequence],
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

impl<'a> AttentionShape<'a> {
    /// Rows of queries, keys and values one after the other, scale 1/√head_dim, no window.
    pub fn fused(sequences: &'a [Sequence], heads_q: usize, heads_kv: usize, head_dim: usize) -> Self {
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

    fn check(&self, qkv: usize) -> usize {
        let offsets = [self.q_offset, self.k_offset, self.v_offset];
        let rows = check_fused(qkv, self.row_stride, [self.heads_q, self.heads_kv], self.head_dim, offsets);
        assert!(self.window != Some(0), "a window of no tokens");
        for (index, sequence) in self.sequences.iter().enumerate() {
            assert!(sequence.start_row + sequence.rows <= rows, "{sequence:?} goes past {rows} rows");
            let sorted = index == 0
                || self.sequences[index - 1].start_row + self.sequences[index - 1].rows <= sequence.start_row;
            assert!(sorted, "{sequence:?} starts before the previous sequence ends");
        }
        rows
    }

    /// First key that the query at `row` of its sequence sees.
    fn first_key(&self, row: usize) -> usize {
        self.window.map_or(0, |window| (row + 1).saturating_sub(window))
    }
}

/// Checks the layout of a fused buffer of `qkv` elements (`heads`: of queries, of keys and values; `offsets`: of queries, keys and values) and returns its rows.
pub(crate) fn check_fused(
    qkv: usize,
    row_stride: usize,
    [heads_q, heads_kv]: [usize; 2],
    head_dim: usize,
    [q, k, v]: [usize; 3],
) -> usize {
    assert!(heads_kv > 0 && heads_q.is_multiple_of(heads_kv), "{heads_q} query heads for {heads_kv} key-value heads");
    assert!(row_stride > 0 && qkv.is_multiple_of(row_stride), "{qkv} elements are not rows of {row_stride}");
    let mut parts = [(q, heads_q), (k, heads_kv), (v, heads_kv)];
    parts.sort_unstable();
    for (index, (offset, heads)) in parts.into_iter().enumerate() {
        let end = parts.get(index + 1).map_or(row_stride, |next| next.0);
        assert!(offset + heads * head_dim <= end, "queries, keys and values overlap in rows of {row_stride}");
    }
    qkv / row_stride
}

/// out = softmax(scale · Q·Kᵀ, masked) · V per head.
///
/// `qkv`: `[rows, row_stride]`; `out`: `[rows, heads_q * head_dim]`, overwritten; `lse`: `[rows, heads_q]`, the logsumexp of each row of scores, for the
/// backward pass.
///
/// # Panics
/// If a shape does not agree, or sequences are not in ascending order without overlap.
pub fn attention_forward(ctx: &Compute, shape: &AttentionShape<'_>, qkv: &[f32], out: &mut [f32], lse: &mut [f32]) {
    let rows = shape.check(qkv.len());
    assert!(
        out.len() == rows * shape.heads_q * shape.head_dim && lse.len() == rows * shape.heads_q,
        "attention_forward: shapes"
    );
    let outputs = Outputs { first: out.as_mut_ptr(), second: lse.as_mut_ptr() };
    let outputs = &outputs;
    ctx.parallel_for(shape.sequences.len() * shape.heads_q, |task| {
        let (sequence, head) = (shape.sequences[task / shape.heads_q], task % shape.heads_q);
        // SAFETY: shapes were checked above; a task writes only its head's columns of its sequence's rows.
        unsafe { forward_head(ctx.isa(), shape, sequence, head, qkv.as_ptr(), outputs.first, outputs.second) };
    });
}

/// Backward of [`attention_forward`]: overwrites the query, key and value parts of `grad_qkv` (`[rows, row_stride]`) in the rows of the sequences.
///
/// `out`, `lse`: what the forward pass wrote; `grad_out`: `[rows, heads_q * head_dim]`.
///
/// # Panics
/// As [`attention_forward`].
pub fn attention_backward(
    ctx: &Compute,
    shape: &AttentionShape<'_>,
    qkv: &[f32],
    out: &[f32],
    lse: &[f32],
    grad_out: &[f32],
    grad_qkv: &mut [f32],
) {
    let rows = shape.check(qkv.len());
    let width = rows * shape.heads_q * shape.head_dim;
    assert!(
        out.len() == width
            && grad_out.len() == width
            && lse.len() == rows * shape.heads_q
            && grad_qkv.len() == qkv.len(),
        "attention_backward: shapes"
    );
    let outputs = Outputs { first: grad_qkv.as_mut_ptr(), second: std::ptr::null_mut() };
    let outputs = &outputs;
    ctx.parallel_for(shape.sequences.len() * shape.heads_kv, |task| {
        let (sequence, head) = (shape.sequences[task / shape.heads_kv], task % shape.heads_kv);
        // SAFETY: shapes were checked above; a task writes only the columns of its key-value head and of that head's query heads, in its sequence's rows.
        unsafe { backward_head(ctx.isa(), shape, sequence, head, qkv.as_ptr(), out, lse, grad_out, outputs.first) };
    });
}

/// Outputs that tasks write disjoint parts of.
struct Outputs {
    first: *mut f32,
    second: *mut f32,
}

// SAFETY: tasks write disjoint parts.
unsafe impl Sync for Outputs {}

/// One query head of one sequence.
///
/// # Safety
/// The pointers are valid for `shape` and nobody else touches this head's outputs in these rows.
unsafe fn forward_head(
    isa: Isa,
    shape: &AttentionShape<'_>,
    sequence: Sequence,
    head: usize,
    qkv: *const f32,
    out: *mut f32,
    lse: *mut f32,
) {
    let (dim, stride) = (shape.head_dim, shape.row_stride);
    let out_stride = shape.heads_q * dim;
    let columns = KEY_ROWS.min(sequence.rows);
    // SAFETY: offsets lie within the rows that the caller vouches for.
    let (keys, values) = unsafe {
        let row = qkv.add(sequence.start_row * stride + head / shape.group() * dim);
        (row.add(shape.k_offset), row.add(shape.v_offset))
    };
    scratch::with_f32(QUERY_ROWS * (2 * dim + columns + 2), |buffer| {
        let (queries, buffer) = buffer.split_at_mut(QUERY_ROWS * dim);
        let (sums, buffer) = buffer.split_at_mut(QUERY_ROWS * dim);
        let (largest, buffer) = buffer.split_at_mut(QUERY_ROWS);
        let (total, scores) = buffer.split_at_mut(QUERY_ROWS);
        for first in (0..sequence.rows).step_by(QUERY_ROWS) {
            let rows = QUERY_ROWS.min(sequence.rows - first);
            // SAFETY: as above.
            unsafe {
                let from = qkv.add((sequence.start_row + first) * stride + shape.q_offset + head * dim);
                copy_scaled(isa, from, stride, shape.scale, &mut queries[..rows * dim], dim);
            }
            sums[..rows * dim].fill(0.0);
            largest.fill(f32::NEG_INFINITY);
            total.fill(0.0);
            let first_tile = shape.first_key(first) / KEY_ROWS * KEY_ROWS;
            for key in (first_tile..first + rows).step_by(KEY_ROWS) {
                let width = KEY_ROWS.min(first + rows - key);
                let scores = &mut scores[..rows * width];
                // SAFETY: queries, scores and sums are our scratch, of these shapes; keys and values lie within the sequence.
                unsafe {
                    run_tile(
                        isa,
                        &product(
                            scores.as_mut_ptr(),
                            width,
                            Strided::rows(queries.as_ptr(), dim),
                            Strided::transposed(keys.add(key * stride), stride),
                            [rows, width, dim],
                            false,
                        ),
                    );
                    for row in 0..rows {
                        let seen = seen(shape, first + row, key, width);
                        let sums = &mut sums[row * dim..(row + 1) * dim];
                        online_softmax(
                            isa,
                            &mut scores[row * width..(row + 1) * width],
                            seen,
                            &mut largest[row],
                            &mut total[row],
                            sums,
                        );
                    }
                    run_tile(
                        isa,
                        &product(
                            sums.as_mut_ptr(),
                            dim,
                            Strided::rows(scores.as_ptr(), width),
                            Strided::rows(values.add(key * stride), stride),
                            [rows, dim, width],
                            true,
                        ),
                    );
                }
            }
            for row in 0..rows {
                let token = sequence.start_row + first + row;
                // SAFETY: this head's part of the token's row is ours alone.
                unsafe {
                    let out = std::slice::from_raw_parts_mut(out.add(token * out_stride + head * dim), dim);
                    scaled(isa, &sums[row * dim..(row + 1) * dim], 1.0 / total[row], out);
                    *lse.add(token * shape.heads_q + head) = largest[row] + total[row].ln();
                }
            }
        }
    });
}

/// One key-value head of one sequence, with the query heads that read it.
///
/// # Safety
/// The pointers are valid for `shape` and nobody else touches these heads' gradients in these rows.
unsafe fn backward_head(
    isa: Isa,
    shape: &AttentionShape<'_>,
    sequence: Sequence,
    head_kv: usize,
    qkv: *const f32,
    out: &[f32],
    lse: &[f32],
    grad_out: &[f32],
    grad_qkv: *mut f32,
) {
    let (dim, stride) = (shape.head_dim, shape.row_stride);
    let out_stride = shape.heads_q * dim;
    let columns = KEY_ROWS.min(sequence.rows);
    let base = sequence.start_row * stride + head_kv * dim;
    // SAFETY: offsets lie within the rows that the caller vouches for.
    let (keys, values, grad_keys, grad_values) = unsafe {
        (
            qkv.add(base + shape.k_offset),
            qkv.add(base + shape.v_offset),
            grad_qkv.add(base + shape.k_offset),
            grad_qkv.add(base + shape.v_offset),
        )
    };
    for row in 0..sequence.rows {
        // SAFETY: as above; these gradients are ours alone.
        unsafe {
            grad_keys.add(row * stride).write_bytes(0, dim);
            grad_values.add(row * stride).write_bytes(0, dim);
        }
    }
    scratch::with_f32(QUERY_ROWS * (2 * dim + 2 * columns), |buffer| {
        let (queries, buffer) = buffer.split_at_mut(QUERY_ROWS * dim);
        let (grad_queries, buffer) = buffer.split_at_mut(QUERY_ROWS * dim);
        let (probs, grads) = buffer.split_at_mut(QUERY_ROWS * columns);
        for head in head_kv * shape.group()..(head_kv + 1) * shape.group() {
            for first in (0..sequence.rows).step_by(QUERY_ROWS) {
                let rows = QUERY_ROWS.min(sequence.rows - first);
                let token = sequence.start_row + first;
                let query = token * stride + shape.q_offset + head * dim;
                // SAFETY: as above.
                unsafe { copy_scaled(isa, qkv.add(query), stride, shape.scale, &mut queries[..rows * dim], dim) };
                grad_queries[..rows * dim].fill(0.0);
                let upstream = grad_out[token * out_stride + head * dim..].as_ptr();
                let first_tile = shape.first_key(first) / KEY_ROWS * KEY_ROWS;
                for key in (first_tile..first + rows).step_by(KEY_ROWS) {
                    let width = KEY_ROWS.min(first + rows - key);
                    let (probs, grads) = (&mut probs[..rows * width], &mut grads[..rows * width]);
                    let shift = key * stride;
                    // SAFETY: queries, probabilities and their gradients are our scratch, of these shapes; keys and values lie within the sequence.
                    unsafe {
                        run_tile(
                            isa,
                            &product(
                                probs.as_mut_ptr(),
                                width,
                                Strided::rows(queries.as_ptr(), dim),
                                Strided::transposed(keys.add(shift), stride),
                                [rows, width, dim],
                                false,
                            ),
                        );
                        run_tile(
                            isa,
                            &product(
                                grads.as_mut_ptr(),
                                width,
                                Strided::rows(upstream, out_stride),
                                Strided::transposed(values.add(shift), stride),
                                [rows, width, dim],
                                false,
                            ),
                        );
                        for row in 0..rows {
                            let columns =
                                (token + row) * out_stride + head * dim..(token + row) * out_stride + (head + 1) * dim;
                            let seen = seen(shape, first + row, key, width);
                            let range = row * width..(row + 1) * width;
                            let lse = lse[(token + row) * shape.heads_q + head];
                            softmax_backward(
                                isa,
                                &mut probs[range.clone()],
                                &mut grads[range],
                                seen,
                                lse,
                                &out[columns.clone()],
                                &grad_out[columns],
                            );
                        }
                        run_tile(
                            isa,
                            &product(
                                grad_values.add(shift),
                                stride,
                                Strided::transposed(probs.as_ptr(), width),
                                Strided::rows(upstream, out_stride),
                                [width, dim, rows],
                                true,
                            ),
                        );
                        run_tile(
                            isa,
                            &product(
                                grad_keys.add(shift),
                                stride,
                                Strided::transposed(grads.as_ptr(), width),
                                Strided::rows(queries.as_ptr(), dim),
                                [width, dim, rows],
                                true,
                            ),
                        );
                        run_tile(
                            isa,
                            &product(
                                grad_queries.as_mut_ptr(),
                                dim,
                                Strided::rows(grads.as_ptr(), width),
                                Strided::rows(keys.add(shift), stride),
                                [rows, dim, width],
                                true,
                            ),
                        );
                    }
                }
                for row in 0..rows {
                    // SAFETY: this query head's gradient is ours alone.
                    let target = unsafe { std::slice::from_raw_parts_mut(grad_qkv.add(query + row * stride), dim) };
                    scaled(isa, &grad_queries[row * dim..(row + 1) * dim], shape.scale, target);
                }
            }
        }
    });
}

/// The columns of a tile of `width` keys from `key` on that the query at `row` of the sequence sees.
fn seen(shape: &AttentionShape<'_>, row: usize, key: usize, width: usize) -> (usize, usize) {
    let start = shape.first_key(row).saturating_sub(key).min(width);
    let end = (row + 1).saturating_sub(key).clamp(start, width);
    (start, end)
}

fn product(
    c: *mut f32,
    c_stride: usize,
    a: Strided,
    b: Strided,
    [m, n, k]: [usize; 3],
    accumulate: bool,
) -> RawProduct {
    RawProduct::tile(c, c_stride, a, b, m, n, k, accumulate)
}

/// Copies rows of `dim` that lie `stride` apart, times `scale`.
///
/// # Safety
/// `from` is valid for as many rows as `to` has.
unsafe fn copy_scaled(isa: Isa, from: *const f32, stride: usize, scale: f32, to: &mut [f32], dim: usize) {
    for (row, to) in to.chunks_exact_mut(dim).enumerate() {
        // SAFETY: the caller's promise.
        let from = unsafe { std::slice::from_raw_parts(from.add(row * stride), dim) };
        scaled(isa, from, scale, to);
    }
}

multiversion! {
    pub(crate) fn scaled(from: &[f32], factor: f32, to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from * factor;
        }
    }

    /// Turns a row of scores into unnormalised probabilities, zero outside `seen`, and rescales what earlier tiles left (Milakov & Gimelshein 2018).
    pub(crate) fn online_softmax(scores: &mut [f32], seen: (usize, usize), largest: &mut f32, total: &mut f32, sums: &mut [f32]) {
        scores[..seen.0].fill(0.0);
        scores[seen.1..].fill(0.0);
        let scores = &mut scores[seen.0..seen.1];
        if scores.is_empty() {
            return;
        }
        let previous = *largest;
        let tile_largest = max(scores);
        *largest = if tile_largest > previous { tile_largest } else { previous };
        let keep = exp::<FMA>(previous - *largest);
        *total = *total * keep + exp_sum::<FMA>(scores, *largest);
        if keep != 1.0 {
            for sum in sums {
                *sum *= keep;
            }
        }
    }

    /// `probs`: scores to probabilities; `grads`: gradient of the probabilities to that of the scores. Zero outside `seen`.
    fn softmax_backward(probs: &mut [f32], grads: &mut [f32], seen: (usize, usize), lse: f32, out: &[f32], grad_out: &[f32]) {
        probs[..seen.0].fill(0.0);
        probs[seen.1..].fill(0.0);
        grads[..seen.0].fill(0.0);
        grads[seen.1..].fill(0.0);
        let along = dot::<FMA>(out, grad_out);
        let (probs, grads) = (&mut probs[seen.0..seen.1], &mut grads[seen.0..seen.1]);
        exp_all::<FMA>(probs, lse);
        for (grad, prob) in grads.iter_mut().zip(probs) {
            *grad = *prob * (*grad - along);
        }
    }
}
