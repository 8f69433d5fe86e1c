//! Token and learned position embeddings.

use crate::compute::{Compute, RowsMut, block_rows};
use crate::elementwise;

/// Parts of a table that gradients are scattered to in parallel; each reads all ids and owns its rows, so additions keep the order of the ids.
const PARTS: usize = 16;

/// `out[i] = table[ids[i]]`. `table`: `[vocabulary, width]`; `out`: `[ids, width]`, overwritten; `width` is `out`'s length over that of `ids`.
///
/// # Panics
/// If an id is not in the table.
pub fn embedding_forward(ctx: &Compute, table: &[f32], ids: &[u32], out: &mut [f32]) {
    let width = width(out.len(), ids.len());
    ctx.parallel_rows(ids.len(), block_rows(width), RowsMut::new(out, width), |range, out| {
        for (out, &id) in out.chunks_exact_mut(width).zip(&ids[range]) {
            out.copy_from_slice(&table[id as usize * width..][..width]);
        }
    });
}

/// Backward of [`embedding_forward`]: `grad_table[ids[i]] += grad_out[i]`, in the order of i.
///
/// # Panics
/// If an id is not in the table.
pub fn embedding_backward(ctx: &Compute, grad_out: &[f32], ids: &[u32], grad_table: &mut [f32]) {
    let width = width(grad_out.len(), ids.len());
    if ids.is_empty() || width == 0 {
        return;
    }
    let rows = grad_table.len() / width;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= rows) {
        panic!("embedding_backward: id {id} is not in a table of {rows} rows");
    }
    ctx.parallel_rows(rows, rows.div_ceil(PARTS), RowsMut::new(grad_table, width), |range, grad_table| {
        for (&id, grad_out) in ids.iter().zip(grad_out.chunks_exact(width)) {
            if range.contains(&(id as usize)) {
                let row = id as usize - range.start;
                elementwise::add_block(ctx.isa(), &mut grad_table[row * width..(row + 1) * width], grad_out);
            }
        }
    });
}

fn width(elements: usize, ids: usize) -> usize {
    let width = elements.checked_div(ids).unwrap_or(0);
    assert_eq!(width * ids, elements, "embedding: {elements} elements are not rows for {ids} ids");
    width
}
