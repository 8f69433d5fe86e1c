//! The gate of a Mixture-of-Experts layer: softmax over all experts, the k largest, and optionally weights renormalised over those k.

use crate::compute::{Compute, RowsMut};
use crate::isa::multiversion;
use crate::vector::{exp, exp_sum, max, sum};

/// Tokens of a unit of parallel work.
const TOKENS: usize = 128;

/// probs = softmax(logits) per token; the `k` most probable experts, most probable first and lower index first among equals; their probabilities as weights,
/// divided by their sum with `renormalise`.
///
/// `logits`, `probs`: `[tokens, experts]`; `expert_index`, `gate_weight`: `[tokens, k]`. All outputs are overwritten.
///
/// # Panics
/// If `k` is 0 or larger than the number of experts.
pub fn router_forward(
    ctx: &Compute,
    logits: &[f32],
    k: usize,
    renormalise: bool,
    probs: &mut [f32],
    expert_index: &mut [u32],
    gate_weight: &mut [f32],
) {
    let (tokens, experts) = shape(probs.len(), expert_index.len(), k);
    assert!(logits.len() == probs.len() && gate_weight.len() == expert_index.len(), "router_forward: shapes");
    let outputs = (RowsMut::new(probs, experts), RowsMut::new(expert_index, k), RowsMut::new(gate_weight, k));
    ctx.parallel_rows(tokens, TOKENS, outputs, |range, (probs, expert_index, gate_weight)| {
        forward_block(
            ctx.isa(),
            &logits[range.start * experts..range.end * experts],
            experts,
            k,
            renormalise,
            probs,
            expert_index,
            gate_weight,
        );
    });
}

/// Backward of [`router_forward`] with the auxiliary losses.
///
/// `probs`, `expert_index`, `gate_weight`, `k`, `renormalise`: as the forward pass had them; `grad_gate_weight`: `[tokens, k]`;
/// `extra_grad_probs`: `[experts]`, added to every token's gradient of probs: the load-balancing loss, whose gradient is the same for all tokens;
/// `z_loss_scale`: adds the gradient of `z_loss_scale` · logsumexp(logits)² per token (ST-MoE's router z-loss), with `logits` as in the forward pass;
/// `grad_logits`: `[tokens, experts]`, overwritten.
pub fn router_backward(
    ctx: &Compute,
    probs: &[f32],
    expert_index: &[u32],
    gate_weight: &[f32],
    k: usize,
    renormalise: bool,
    grad_gate_weight: &[f32],
    extra_grad_probs: Option<&[f32]>,
    z_loss_scale: f32,
    logits: &[f32],
    grad_logits: &mut [f32],
) {
    let (tokens, experts) = shape(probs.len(), expert_index.len(), k);
    let weights = gate_weight.len() == expert_index.len() && grad_gate_weight.len() == expert_index.len();
    assert!(weights && logits.len() == probs.len() && grad_logits.len() == probs.len(), "router_backward: shapes");
    assert!(
        extra_grad_probs.is_none_or(|extra| extra.len() == experts || tokens == 0),
        "router_backward: extra_grad_probs has one element per expert"
    );
    ctx.parallel_rows(tokens, TOKENS, RowsMut::new(grad_logits, experts), |range, grad_logits| {
        let (dense, sparse) = (range.start * experts..range.end * experts, range.start * k..range.end * k);
        backward_block(
            ctx.isa(),
            &probs[dense.clone()],
            &expert_index[sparse.clone()],
            &gate_weight[sparse.clone()],
            experts,
            k,
            renormalise,
            &grad_gate_weight[sparse],
            extra_grad_probs,
            z_loss_scale,
            &logits[dense],
            grad_logits,
        );
    });
}

/// Tokens and experts of `[tokens, experts]` and `[tokens, k]` buffers of these lengths.
fn shape(dense: usize, sparse: usize, k: usize) -> (usize, usize) {
    assert!(k > 0 && sparse.is_multiple_of(k), "router: {sparse} choices are not {k} per token");
    let tokens = sparse / k;
    let experts = dense.checked_div(tokens).unwrap_or(k);
    assert!(
        dense == tokens * experts && k <= experts,
        "router: {dense} probabilities for {tokens} tokens that choose {k} experts each"
    );
    (tokens, experts)
}

multiversion! {
    fn forward_block(
        logits: &[f32], experts: usize, k: usize, renormalise: bool, probs: &mut [f32], expert_index: &mut [u32], gate_weight: &mut [f32],
    ) {
        probs.copy_from_slice(logits);
        for ((probs, index), weight) in probs.chunks_exact_mut(experts).zip(expert_index.chunks_exact_mut(k)).zip(gate_weight.chunks_exact_mut(k)) {
            let largest = max(probs);
            let inverse = 1.0 / exp_sum::<FMA>(probs, largest);
            probs.iter_mut().for_each(|p| *p *= inverse);
            let mut last = (f32::INFINITY, 0);
            for (slot, (index, weight)) in index.iter_mut().zip(weight.iter_mut()).enumerate() {
                // The largest after `last` in the order (probability falling, index rising). NaN compares with nothing: such tokens keep their first k experts.
                let mut best: Option<(f32, usize)> = None;
                for (expert, &p) in probs.iter().enumerate() {
                    let after = p < last.0 || (p == last.0 && expert > last.1);
                    if after && best.is_none_or(|best| p > best.0) {
                        best = Some((p, expert));
                    }
                }
                let chosen = best.unwrap_or((f32::NAN, slot));
                (*weight, *index) = (chosen.0, chosen.1 as u32);
                last = chosen;
            }
            if renormalise {
                let inverse = 1.0 / sum(weight);
                weight.iter_mut().for_each(|weight| *weight *= inverse);
            }
        }
    }

    fn backward_block(
        probs: &[f32], expert_index: &[u32], gate_weight: &[f32], experts: usize, k: usize, renormalise: bool, grad_gate_weight: &[f32],
        extra_grad_probs: Option<&[f32]>, z_loss_scale: f32, logits: &[f32], grad_logits: &mut [f32],
    ) {
        let tokens = probs.chunks_exact(experts).zip(logits.chunks_exact(experts)).zip(grad_logits.chunks_exact_mut(experts));
        let choices = expert_index.chunks_exact(k).zip(gate_weight.chunks_exact(k)).zip(grad_gate_weight.chunks_exact(k));
        for (((probs, logits), grad), ((index, weight), grad_weight)) in tokens.zip(choices) {
            // `grad` holds the gradient of the probabilities first.
            match extra_grad_probs {
                Some(extra) => grad.copy_from_slice(extra),
                None => grad.fill(0.0),
            }
            let (mut inverse, mut mean) = (1.0, 0.0);
            if renormalise {
                let mut total = 0.0;
                for (expert, (weight, grad_weight)) in index.iter().zip(weight.iter().zip(grad_weight)) {
                    total += probs[*expert as usize];
                    mean += weight * grad_weight;
                }
                inverse = 1.0 / total;
            }
            for (expert, grad_weight) in index.iter().zip(grad_weight) {
                grad[*expert as usize] += (grad_weight - mean) * inverse;
            }
            let mut along = 0.0;
            for (p, grad) in probs.iter().zip(grad.iter()) {
                along += p * grad;
            }
            let mut shift = -along;
            if z_loss_scale != 0.0 {
                let largest = max(logits);
                let mut total = 0.0;
                for logit in logits {
                    total += exp::<FMA>(logit - largest);
                }
                shift += 2.0 * z_loss_scale * (largest + total.ln());
            }
            for (grad, p) in grad.iter_mut().zip(probs) {
                *grad = p * (*grad + shift);
            }
        }
    }
}
