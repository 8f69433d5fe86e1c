//! Whether a placement of experts changed an answer: tokens computed again from the host's own experts.

use thiserror::Error;

use crate::experts::Experts;
use crate::routing::ChunkPlan;

/// A token whose result over the ranks differs from what its rank computes alone: an answer that a placement changed.
#[derive(Clone, Copy, Debug, Error, PartialEq)]
#[error(
    "layer {layer}: token {token} of the step differs by {difference:e} from the same computed on one rank, expected \
     at most {tolerance:e}: a placement of experts changed an answer"
)]
pub struct VerificationError {
    /// Layer index.
    pub layer: usize,
    /// Local token of the step.
    pub token: usize,
    /// Largest difference of an element, over the largest element or 1.
    pub difference: f32,
    /// Largest difference that is allowed.
    pub tolerance: f32,
}

impl VerificationError {
    /// Largest difference that is allowed where results are f32.
    pub const TOLERANCE: f32 = 1e-5;

    /// Compares what the ranks found with what one `alone` computes.
    pub(crate) fn check(
        layer: usize,
        token: usize,
        tolerance: f32,
        alone: &[f32],
        found: &[f32],
    ) -> Result<(), VerificationError> {
        let largest = alone.iter().fold(1.0f32, |largest, value| largest.max(value.abs()));
        let difference = alone.iter().zip(found).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max) / largest;
        // A result that is no number is a difference too, which a maximum would pass over.
        if found.iter().any(|value| value.is_nan()) || difference.is_nan() || difference > tolerance {
            return Err(VerificationError { layer, token, difference, tolerance });
        }
        Ok(())
    }
}

/// What a layer makes of one token: `x` and the weighted results of the experts that `index` names, whose input is `normed`.
/// `experts` are all of the layer's.
pub(crate) fn recompute(
    experts: &Experts<'_>,
    normed: &[f32],
    x: &[f32],
    index: &[u32],
    gate_weight: &[f32],
) -> Vec<f32> {
    let shape = experts.shape;
    let (mut projected, mut units) = (vec![0.0; shape.input_width], vec![0.0; shape.inner]);
    let mut output = vec![0.0; shape.hidden];
    let mut y = x.to_vec();
    for (&expert, &weight) in index.iter().zip(gate_weight) {
        let chunk = ChunkPlan::of_one_expert(expert as usize, 1);
        experts.forward(&chunk, normed, &mut projected, &mut units, &mut output);
        y.iter_mut().zip(&output).for_each(|(sum, value)| *sum += weight * value);
    }
    y
}
