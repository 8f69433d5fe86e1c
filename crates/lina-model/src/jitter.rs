//! Multiplicative noise on the gate's input (Fedus et al., "Switch Transformers", 2021), computed again in backward
//! rather than kept: each factor is a hash of where it belongs.

use lina_kernels::{Compute, RowsMut};

use crate::batch::StepContext;

/// Rows per parallel task.
const BLOCK_ROWS: usize = 32;

/// Multiplies each element of `values` (`[tokens, width]`) by a number in `1 - amplitude ..= 1 + amplitude` that depends
/// on the run's seed, the step, the layer, the token's index in the step and the column.
pub(crate) fn apply(
    compute: &Compute,
    values: &mut [f32],
    width: usize,
    amplitude: f32,
    step: &StepContext,
    layer: usize,
) {
    let stream = stream(step, layer);
    let rows = values.len() / width;
    compute.parallel_rows(rows, BLOCK_ROWS, RowsMut::new(values, width), |range, block| {
        for (row, values) in range.zip(block.chunks_exact_mut(width)) {
            let token = mix(stream ^ (step.token_offset + row as u64));
            for (column, value) in values.iter_mut().enumerate() {
                let bits = mix(token.wrapping_add(column as u64)) >> 40;
                let unit = bits as f32 / (1u32 << 24) as f32;
                *value *= 1.0 + amplitude * (2.0 * unit - 1.0);
            }
        }
    });
}

/// What a layer's factors of one step are drawn from.
pub(crate) fn stream(step: &StepContext, layer: usize) -> u64 {
    mix(mix(mix(step.seed) ^ step.step) ^ layer as u64)
}

/// The output function of SplitMix64 (Steele et al., 2014).
fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_within_bounds_and_follow_the_token() {
        let compute = Compute::new(1);
        let step = |token_offset| StepContext { token_offset, ..StepContext::evaluation() };
        let mut whole = vec![1.0; 100 * 8];
        apply(&compute, &mut whole, 8, 0.1, &step(0), 3);
        assert!(whole.iter().all(|factor| (0.9..=1.1).contains(factor)));
        let mean = whole.iter().sum::<f32>() / 800.0;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        let mut part = vec![1.0; 40 * 8];
        apply(&compute, &mut part, 8, 0.1, &step(60), 3);
        assert_eq!(part, whole[60 * 8..]);
        let mut other_layer = vec![1.0; 100 * 8];
        apply(&compute, &mut other_layer, 8, 0.1, &step(0), 4);
        assert_ne!(other_layer, whole);
    }
}
