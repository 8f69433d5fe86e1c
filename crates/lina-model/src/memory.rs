//! What a rank's model takes in memory, predicted without allocating it.

use lina_plan::ExpertLayout;

use crate::attention::{Attention, AttentionScratch};
use crate::config::ModelConfig;
use crate::decoder::ModelLimits;
use crate::ffn::DenseFfn;
use crate::moe::Moe;
use crate::norm::Norm;
use crate::params::ParameterLayout;

/// One part of a rank's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPart {
    /// What it is for.
    pub name: &'static str,
    /// Its size.
    pub bytes: usize,
}

/// What a [`Model`](crate::Model) on `rank` holds when all ranks' passes have `max_tokens` tokens and routing is
/// balanced: assignments go evenly to experts. Optimizer state is not included.
pub fn memory_plan(config: &ModelConfig, experts: &ExpertLayout, rank: usize, limits: ModelLimits) -> Vec<MemoryPart> {
    let layout = ParameterLayout::new(config, experts.held_by(rank));
    let parameters = layout.dense_len() + layout.experts_len();
    let [activations, logits, scratch] = fixed_elements(config, limits);
    let ranks = experts.ranks();
    let sent = limits.max_tokens * config.top_k;
    let served: f64 = (0..ranks)
        .map(|source| (0..config.experts).filter(|&e| experts.destination(source, e) == rank).count() as f64)
        .sum();
    let received = (served / config.experts as f64 * sent as f64).ceil() as usize;
    let input_width = config.ffn.input_matrices() * config.expert_hidden;
    let (hidden, inner) = (config.hidden, config.expert_hidden);
    let saved = config.moe_layers() * (received * (hidden + input_width) + sent * hidden);
    let work = received * (hidden + 2 * inner + input_width);
    // On one rank, gradients of inputs; on several, one buffer each way for dispatch and one for combine.
    let travelling = if ranks == 1 { received * hidden } else { 2 * (sent + received) * hidden };
    let dense_work = if config.dense_layers.is_empty() || config.moe_layers() > 0 {
        0
    } else {
        limits.max_tokens * config.dense_hidden * (2 + config.ffn.input_matrices())
    };
    [
        ("parameters", parameters),
        ("gradients", parameters),
        ("activations", activations),
        ("expert activations", saved),
        ("logits", logits),
        ("scratch", scratch + work + dense_work),
        ("exchange buffers", travelling),
    ]
    .map(|(name, elements)| MemoryPart { name, bytes: elements * size_of::<f32>() })
    .to_vec()
}

/// Elements of the buffers that do not depend on routing: activations, logits, scratch.
fn fixed_elements(config: &ModelConfig, limits: ModelLimits) -> [usize; 3] {
    let tokens = limits.max_tokens;
    let stream = tokens * config.hidden;
    let dense_layers = config.dense_layers.len();
    let activations = (2 * config.layers + 1) * stream
        + config.layers * Attention::elements(config, tokens)
        + config.moe_layers() * Moe::elements(config, tokens)
        + dense_layers * DenseFfn::elements(config, tokens)
        + Norm::elements(config, tokens);
    let jitter = if config.router.jitter > 0.0 { stream } else { 0 };
    let scratch =
        2 * stream + AttentionScratch::elements(config, tokens) + tokens * (config.experts + config.top_k + 1) + jitter;
    [activations, tokens * config.vocab, scratch]
}
