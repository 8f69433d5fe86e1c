//! Moving token rows into expert order and back, and the weighted sum of the experts' outputs.
//!
//! `position[t * k + j]` is the row, among all rows in expert order, that holds token t's copy for its j-th expert; [`DROPPED`] where it has none.

use crate::compute::{Compute, RowsMut, SplitRows, block_rows};
use crate::isa::multiversion;
use crate::scratch;
use crate::vector::{dot, fma};

/// Stands for "no row".
pub const DROPPED: u32 = u32::MAX;

/// `dst[i] = src[index[i]]`, rows of `width`; zeros where the index is [`DROPPED`].
///
/// # Panics
/// If an index is not a row of `src`.
pub fn gather_rows(ctx: &Compute, src: &[f32], width: usize, index: &[u32], dst: &mut [f32]) {
    assert_eq!(dst.len(), index.len() * width, "gather_rows: shapes");
    ctx.parallel_rows(index.len(), block_rows(width), RowsMut::new(dst, width), |range, dst| {
        for (dst, &row) in dst.chunks_exact_mut(width).zip(&index[range]) {
            match row {
                DROPPED => dst.fill(0.0),
                row => dst.copy_from_slice(&src[row as usize * width..][..width]),
            }
        }
    });
}

/// Backward of [`gather_rows`] from tokens to expert order: `grad_x[t]` += the sum of `grad_rows[position[t][j]]` over j in order.
///
/// `grad_rows`: `[rows, width]`; `position`: `[tokens, k]`; `grad_x`: `[tokens, width]`.
pub fn gather_backward(ctx: &Compute, grad_rows: &[f32], width: usize, position: &[u32], grad_x: &mut [f32]) {
    let (tokens, k) = shape(grad_x.len(), width, position.len());
    ctx.parallel_rows(tokens, block_rows(width * k), RowsMut::new(grad_x, width), |range, grad_x| {
        combine_block(ctx.isa(), grad_rows, width, k, &position[range.start * k..range.end * k], None, grad_x);
    });
}

/// `out[t]` += the sum of `gate_weight[t][j]` · `expert_rows[position[t][j]]` over j in order; dropped ones count as zero.
///
/// `expert_rows`: `[rows, width]`; `position`, `gate_weight`: `[tokens, k]`; `out`: `[tokens, width]`, holds the residual.
pub fn combine_rows(
    ctx: &Compute,
    expert_rows: &[f32],
    width: usize,
    position: &[u32],
    gate_weight: &[f32],
    out: &mut [f32],
) {
    let (tokens, k) = shape(out.len(), width, position.len());
    assert_eq!(gate_weight.len(), position.len(), "combine_rows: shapes");
    ctx.parallel_rows(tokens, block_rows(width * k), RowsMut::new(out, width), |range, out| {
        let range = range.start * k..range.end * k;
        combine_block(ctx.isa(), expert_rows, width, k, &position[range.clone()], Some(&gate_weight[range]), out);
    });
}

/// Backward of [`combine_rows`].
///
/// `grad_out`: `[tokens, width]`; `grad_expert_rows`: `[rows, width]`, overwritten in the rows that `position` names and untouched elsewhere;
/// `grad_gate_weight`: `[tokens, k]`, overwritten, 0 for dropped ones.
///
/// # Panics
/// If a position names no row or a row that another one names.
pub fn combine_backward(
    ctx: &Compute,
    grad_out: &[f32],
    width: usize,
    expert_rows: &[f32],
    position: &[u32],
    gate_weight: &[f32],
    grad_expert_rows: &mut [f32],
    grad_gate_weight: &mut [f32],
) {
    let (tokens, k) = shape(grad_out.len(), width, position.len());
    let weights = gate_weight.len() == position.len() && grad_gate_weight.len() == position.len();
    assert!(
        weights
            && expert_rows.len() == grad_expert_rows.len()
            && (width == 0 || expert_rows.len().is_multiple_of(width)),
        "combine_backward: shapes"
    );
    if tokens == 0 {
        return;
    }
    assert_distinct(position, expert_rows.len() / width);
    let grad_rows = RowsMut::new(grad_expert_rows, width);
    ctx.parallel_rows(tokens, block_rows(width * k), RowsMut::new(grad_gate_weight, k), |range, grad_gate_weight| {
        for token in range.clone() {
            let grad_out = &grad_out[token * width..(token + 1) * width];
            for slot in 0..k {
                let grad_weight = &mut grad_gate_weight[(token - range.start) * k + slot];
                let row = position[token * k + slot];
                if row == DROPPED {
                    *grad_weight = 0.0;
                    continue;
                }
                let row = row as usize;
                // SAFETY: no other position names this row, so no other part of it is alive; it exists, as `assert_distinct` checked.
                let grad_row = unsafe { grad_rows.part(row..row + 1) };
                *grad_weight = combine_backward_row(
                    ctx.isa(),
                    grad_out,
                    &expert_rows[row * width..(row + 1) * width],
                    gate_weight[token * k + slot],
                    grad_row,
                );
            }
        }
    });
}

/// Tokens and choices per token.
fn shape(elements: usize, width: usize, positions: usize) -> (usize, usize) {
    let tokens = elements.checked_div(width).unwrap_or(0);
    let k = positions.checked_div(tokens).unwrap_or(0);
    assert!(
        tokens * width == elements && tokens * k == positions,
        "{elements} elements in rows of {width} and {positions} positions do not agree"
    );
    (tokens, k)
}

fn assert_distinct(position: &[u32], rows: usize) {
    // One bit per row, 32 in the room of an f32.
    scratch::with_f32(rows.div_ceil(32), |seen| {
        seen.fill(0.0);
        for &row in position.iter().filter(|&&row| row != DROPPED) {
            assert!((row as usize) < rows, "position {row} is not among {rows} rows");
            let word = &mut seen[row as usize / 32];
            let (bits, bit) = (word.to_bits(), 1 << (row % 32));
            assert!(bits & bit == 0, "row {row} belongs to two positions");
            *word = f32::from_bits(bits | bit);
        }
    });
}

multiversion! {
    fn combine_block(rows: &[f32], width: usize, k: usize, position: &[u32], gate_weight: Option<&[f32]>, out: &mut [f32]) {
        for (token, out) in out.chunks_exact_mut(width).enumerate() {
            for slot in token * k..(token + 1) * k {
                if position[slot] == DROPPED {
                    continue;
                }
                let row = &rows[position[slot] as usize * width..][..width];
                match gate_weight {
                    Some(weight) => out.iter_mut().zip(row).for_each(|(out, row)| *out = fma::<FMA>(*row, weight[slot], *out)),
                    None => out.iter_mut().zip(row).for_each(|(out, row)| *out += row),
                }
            }
        }
    }

    fn combine_backward_row(grad_out: &[f32], row: &[f32], weight: f32, grad_row: &mut [f32]) -> f32 {
        for (grad_row, grad_out) in grad_row.iter_mut().zip(grad_out) {
            *grad_row = grad_out * weight;
        }
        dot::<FMA>(grad_out, row)
    }
}
