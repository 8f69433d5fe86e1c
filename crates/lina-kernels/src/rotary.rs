//! Rotary position embedding (Su et al. 2021) in Hugging Face's convention: element i of a head is rotated together with element i + head_dim / 2.

use crate::compute::{Compute, RowsMut, block_rows};
use crate::isa::multiversion;
use crate::layout::HeadLayout;
use crate::vector::fma;

/// Cosines and sines for every position.
#[derive(Clone, Debug)]
pub struct RotaryTable {
    half: usize,
    /// `[positions, 2, half]`: cosines, then sines.
    table: Vec<f32>,
}

impl RotaryTable {
    /// For heads of `head_dim` (even) elements and positions below `max_positions`; frequency i is theta^(−2i / head_dim). Angles are rounded to f32 as
    /// transformers does, or long contexts would differ from it.
    ///
    /// # Panics
    /// If `head_dim` is odd.
    pub fn new(head_dim: usize, max_positions: usize, theta: f32) -> Self {
        assert!(head_dim.is_multiple_of(2), "heads of {head_dim} elements have no two halves to rotate");
        let half = head_dim / 2;
        let frequencies: Vec<f32> = (0..half).map(|i| 1.0 / theta.powf(2.0 * i as f32 / head_dim as f32)).collect();
        let mut table = Vec::with_capacity(max_positions * head_dim);
        for position in 0..max_positions {
            let angle = |frequency: &f32| f64::from(position as f32 * frequency);
            table.extend(frequencies.iter().map(|frequency| angle(frequency).cos() as f32));
            table.extend(frequencies.iter().map(|frequency| angle(frequency).sin() as f32));
        }
        Self { half, table }
    }

    /// Positions that the table has.
    pub fn max_positions(&self) -> usize {
        self.table.len().checked_div(2 * self.half).unwrap_or(usize::MAX)
    }
}

/// Rotates the heads of `layout` in every row of `x` (`[tokens, row_stride]`, in place) by the row's position (`positions`: `[tokens]`).
/// Queries and keys that lie side by side can be rotated as one layout.
///
/// # Panics
/// If a position is not in the table.
pub fn rotary_forward(ctx: &Compute, table: &RotaryTable, positions: &[u32], layout: HeadLayout, x: &mut [f32]) {
    rotate(ctx, table, positions, layout, x, 1.0);
}

/// Backward of [`rotary_forward`], in place: the gradient of the rotated heads becomes that of the heads.
pub fn rotary_backward(ctx: &Compute, table: &RotaryTable, positions: &[u32], layout: HeadLayout, grad: &mut [f32]) {
    rotate(ctx, table, positions, layout, grad, -1.0);
}

fn rotate(ctx: &Compute, table: &RotaryTable, positions: &[u32], layout: HeadLayout, x: &mut [f32], direction: f32) {
    let rows = layout.rows(x.len());
    assert!(layout.head_dim == 2 * table.half && positions.len() == rows, "rotary: shapes");
    if let Some(position) = positions.iter().find(|&&position| position as usize >= table.max_positions()) {
        panic!("rotary: position {position} is not among the table's {}", table.max_positions());
    }
    let block = block_rows(layout.heads * layout.head_dim);
    ctx.parallel_rows(rows, block, RowsMut::new(x, layout.row_stride), |range, x| {
        rotate_block(ctx.isa(), &table.table, table.half, &positions[range], layout, x, direction);
    });
}

multiversion! {
    fn rotate_block(table: &[f32], half: usize, positions: &[u32], layout: HeadLayout, x: &mut [f32], direction: f32) {
        for (row, &position) in x.chunks_exact_mut(layout.row_stride).zip(positions) {
            let (cosines, sines) = table[position as usize * 2 * half..][..2 * half].split_at(half);
            for head in row[layout.columns()].chunks_exact_mut(2 * half) {
                let (first, second) = head.split_at_mut(half);
                for (((first, second), cosine), sine) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
                    let sine = sine * direction;
                    let (a, b) = (*first, *second);
                    *first = fma::<FMA>(a, *cosine, -(b * sine));
                    *second = fma::<FMA>(b, *cosine, a * sine);
                }
            }
        }
    }
}
