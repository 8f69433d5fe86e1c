//! Operations on whole buffers, one pass each.

use crate::compute::{Compute, RowsMut, block_rows};
use crate::isa::multiversion;
use crate::scratch;

/// Elements whose squares are summed before they join the rest; part of the arithmetic.
const SQUARES_BLOCK: usize = 16_384;

/// x *= factor.
pub fn scale(ctx: &Compute, x: &mut [f32], factor: f32) {
    ctx.parallel_rows(x.len(), block_rows(1), RowsMut::new(x, 1), |_, x| scale_block(ctx.isa(), x, factor));
}

/// y += x.
pub fn add(ctx: &Compute, y: &mut [f32], x: &[f32]) {
    assert_eq!(y.len(), x.len(), "add: shapes");
    ctx.parallel_rows(x.len(), block_rows(1), RowsMut::new(y, 1), |range, y| add_block(ctx.isa(), y, &x[range]));
}

/// Limits every element to −limit..=limit (`clip_qkv`).
pub fn clamp(ctx: &Compute, x: &mut [f32], limit: f32) {
    ctx.parallel_rows(x.len(), block_rows(1), RowsMut::new(x, 1), |_, x| clamp_block(ctx.isa(), x, limit));
}

/// Backward of [`clamp`], in place: `grad` becomes 0 where the clamp changed the element. `x` is the input of [`clamp`].
pub fn clamp_backward(ctx: &Compute, x: &[f32], limit: f32, grad: &mut [f32]) {
    assert_eq!(grad.len(), x.len(), "clamp_backward: shapes");
    ctx.parallel_rows(x.len(), block_rows(1), RowsMut::new(grad, 1), |range, grad| {
        clamp_backward_block(ctx.isa(), &x[range], limit, grad)
    });
}

/// `dst = ((sources[0] + sources[1]) + sources[2]) + ...`, element by element, overwritten; zeros without sources. All have one length.
pub fn sum_into(ctx: &Compute, dst: &mut [f32], sources: &[&[f32]]) {
    assert!(sources.iter().all(|source| source.len() == dst.len()), "sum_into: shapes");
    // Blocks small enough that the destination stays in L1 while each source streams past.
    ctx.parallel_rows(dst.len(), SUM_BLOCK, RowsMut::new(dst, 1), |range, dst| match sources {
        [] => dst.fill(0.0),
        [first, rest @ ..] => {
            dst.copy_from_slice(&first[range.clone()]);
            for source in rest {
                add_block(ctx.isa(), dst, &source[range.clone()]);
            }
        }
    });
}

/// Elements of [`sum_into`]'s blocks: 16 KiB.
const SUM_BLOCK: usize = 4096;

/// Sum of squares in f64, block by block in order: the same bits whatever the number of threads.
pub fn sum_of_squares(ctx: &Compute, x: &[f32]) -> f64 {
    let blocks = x.len().div_ceil(SQUARES_BLOCK);
    // An f64 partial takes the room of two f32.
    scratch::with_f32(2 * blocks, |partials| {
        ctx.parallel_rows(blocks, 1, RowsMut::new(partials, 2), |block, partial| {
            let start = block.start * SQUARES_BLOCK;
            let sum = squares_block(ctx.isa(), &x[start..x.len().min(start + SQUARES_BLOCK)]).to_bits();
            (partial[0], partial[1]) = (f32::from_bits((sum >> 32) as u32), f32::from_bits(sum as u32));
        });
        partials
            .chunks_exact(2)
            .map(|partial| f64::from_bits(u64::from(partial[0].to_bits()) << 32 | u64::from(partial[1].to_bits())))
            .sum()
    })
}

multiversion! {
    fn scale_block(x: &mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }

    pub(crate) fn add_block(y: &mut [f32], x: &[f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += x;
        }
    }

    fn clamp_block(x: &mut [f32], limit: f32) {
        for x in x {
            let value = if *x > limit { limit } else { *x };
            *x = if value < -limit { -limit } else { value };
        }
    }

    fn clamp_backward_block(x: &[f32], limit: f32, grad: &mut [f32]) {
        for (grad, x) in grad.iter_mut().zip(x) {
            *grad = if x.abs() > limit { 0.0 } else { *grad };
        }
    }

    fn squares_block(x: &[f32]) -> f64 {
        const LANES: usize = 32;
        let mut lanes = [0.0_f64; LANES];
        let chunks = x.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane += f64::from(*x) * f64::from(*x);
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(*x) * f64::from(*x);
        }
        lanes.iter().sum()
    }
}
