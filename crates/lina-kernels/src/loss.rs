//! Cross entropy of next-token predictions.

use crate::compute::{Compute, RowsMut, block_rows};
use crate::isa::multiversion;
use crate::scratch;
use crate::vector::{exp, exp_sum, max};

/// Stands for "no target": such a row has loss 0 and gradient 0.
pub const IGNORED: u32 = u32::MAX;

/// −log softmax(logits)\[target\] per row in `losses`, and `scale` · (softmax − one-hot) in place of the logits.
///
/// `logits`: `[rows, vocabulary]`, overwritten with the gradient; `targets`: `[rows]`, [`IGNORED`] for none; `losses`: `[rows]`, overwritten, not scaled.
///
/// # Panics
/// If a target is not in the vocabulary.
pub fn cross_entropy_forward_backward(
    ctx: &Compute,
    logits: &mut [f32],
    targets: &[u32],
    scale: f32,
    losses: &mut [f32],
) {
    let vocabulary = vocabulary(logits.len(), targets, losses.len());
    let outputs = (RowsMut::new(logits, vocabulary), RowsMut::new(losses, 1));
    ctx.parallel_rows(targets.len(), block_rows(vocabulary), outputs, |range, (logits, losses)| {
        for ((logits, &target), loss) in logits.chunks_exact_mut(vocabulary).zip(&targets[range]).zip(losses) {
            if target == IGNORED {
                logits.fill(0.0);
                *loss = 0.0;
            } else {
                *loss = forward_backward_row(ctx.isa(), logits, target as usize, scale);
            }
        }
    });
}

/// The losses of [`cross_entropy_forward_backward`] alone.
pub fn cross_entropy_forward(ctx: &Compute, logits: &[f32], targets: &[u32], losses: &mut [f32]) {
    let vocabulary = vocabulary(logits.len(), targets, losses.len());
    ctx.parallel_rows(targets.len(), block_rows(vocabulary), RowsMut::new(losses, 1), |range, losses| {
        let logits = &logits[range.start * vocabulary..range.end * vocabulary];
        scratch::with_f32(vocabulary, |row| {
            for ((logits, &target), loss) in logits.chunks_exact(vocabulary).zip(&targets[range]).zip(losses) {
                row.copy_from_slice(logits);
                *loss = if target == IGNORED { 0.0 } else { forward_row(ctx.isa(), row, target as usize) };
            }
        });
    });
}

fn vocabulary(logits: usize, targets: &[u32], losses: usize) -> usize {
    let vocabulary = logits.checked_div(targets.len()).unwrap_or(1);
    assert!(
        vocabulary * targets.len() == logits && losses == targets.len(),
        "cross_entropy: {logits} logits, {} targets, {losses} losses",
        targets.len()
    );
    if let Some(target) = targets.iter().find(|&&target| target != IGNORED && target as usize >= vocabulary) {
        panic!("cross_entropy: target {target} is not in a vocabulary of {vocabulary}");
    }
    vocabulary
}

multiversion! {
    fn forward_backward_row(logits: &mut [f32], target: usize, scale: f32) -> f32 {
        let (largest, chosen) = (max(logits), logits[target]);
        let total = exp_sum::<FMA>(logits, largest);
        let factor = scale / total;
        for logit in logits.iter_mut() {
            *logit *= factor;
        }
        // With 1 - p as the sum of the others' share, not a difference, a sure prediction would keep its small gradient; f32 logits do not carry that much.
        logits[target] = scale * (exp::<FMA>(chosen - largest) / total - 1.0);
        total.ln() + (largest - chosen)
    }

    fn forward_row(logits: &mut [f32], target: usize) -> f32 {
        let (largest, chosen) = (max(logits), logits[target]);
        exp_sum::<FMA>(logits, largest).ln() + (largest - chosen)
    }
}
