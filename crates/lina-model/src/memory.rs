//! What a rank's model takes in memory, predicted without allocating it.

use lina_plan::ExpertLayout;

use crate::attention::{Attention, AttentionScratch};
use crate::config::{ModelConfig, PositionKind};
use crate::decoder::ModelLimits;
use crate::ffn::DenseFfn;
use crate::moe::Moe;
use crate::norm::Norm;
use crate::params::ParameterLayout;
use crate::purpose::Purpose;

/// One part of a rank's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPart {
    /// What it is for.
    pub name: &'static str,
    /// Its size.
    pub bytes: usize,
}

/// What a [`Model`](crate::Model) for `purpose` on `rank` holds when all ranks' passes have `max_tokens` tokens and routing is
/// balanced: assignments go evenly to experts. Optimizer state is not included.
pub fn memory_plan(
    config: &ModelConfig,
    experts: &ExpertLayout,
    rank: usize,
    limits: ModelLimits,
    purpose: Purpose,
) -> Vec<MemoryPart> {
    let layout = ParameterLayout::new(config, experts.held_by(rank));
    let parameters = layout.dense_len() + layout.experts_len();
    let [activations, logits, scratch] = fixed_elements(config, limits, purpose);
    let ranks = experts.ranks();
    let sent = if config.moe_layers() > 0 { limits.max_tokens * config.top_k } else { 0 };
    let served: usize = (0..ranks)
        .map(|source| (0..config.experts).filter(|&expert| experts.destination(source, expert) == rank).count())
        .sum();
    let received = (sent as u128 * served as u128).div_ceil(config.experts as u128) as usize;
    let (hidden, inner) = (config.hidden, config.expert_hidden);
    let input_width = config.ffn.input_matrices() * inner;
    let backward = usize::from(purpose == Purpose::Training);
    let [moe_layers, _] = buffered_layers(config, purpose);
    let saved = moe_layers * (received * (hidden + input_width) + sent * hidden);
    let dense_tokens = if config.dense_layers.is_empty() { 0 } else { limits.max_tokens };
    let units = (received * inner).max(dense_tokens * config.dense_hidden);
    // The hidden units; backward their gradients and those of their inputs.
    let network = (1 + backward * (1 + config.ffn.input_matrices())) * units;
    // Dispatch and combine take turns with the same exchanges, one for each chunk under way. One rank has none, and
    // needs a place for the gradients of the experts' inputs instead.
    let (grad_inputs, exchanged) =
        if ranks == 1 { (backward * received * hidden, 0) } else { (0, 2 * sent.max(received) * hidden) };
    [
        ("parameters", parameters),
        ("gradients", backward * parameters),
        ("activations", activations),
        ("expert activations", saved),
        ("logits", logits),
        ("scratch", scratch + network + backward * received * hidden + grad_inputs),
        ("exchange buffers", exchanged),
    ]
    .map(|(name, elements)| MemoryPart { name, bytes: elements * size_of::<f32>() })
    .to_vec()
}

/// How many MoE layers and how many dense ones have buffers.
fn buffered_layers(config: &ModelConfig, purpose: Purpose) -> [usize; 2] {
    let layers = purpose.buffered_layers(config);
    let moe_layers = layers.iter().filter(|&&layer| config.is_moe(layer)).count();
    [moe_layers, layers.len() - moe_layers]
}

/// Elements of the buffers that do not depend on routing: activations, logits, scratch.
fn fixed_elements(config: &ModelConfig, limits: ModelLimits, purpose: Purpose) -> [usize; 3] {
    let tokens = limits.max_tokens;
    let stream = tokens * config.hidden;
    let [moe_layers, dense_layers] = buffered_layers(config, purpose);
    let activations = purpose.streams(config) * stream
        + (moe_layers + dense_layers) * Attention::elements(config, tokens)
        + moe_layers * Moe::elements(config, tokens)
        + dense_layers * DenseFfn::elements(config, tokens)
        + Norm::elements(config, tokens);
    let jitter = if config.router.jitter > 0.0 { stream } else { 0 };
    let rotary = match config.position {
        PositionKind::Rotary { .. } => limits.max_sequence_tokens * config.head_dim,
        PositionKind::Learned => 0,
    };
    // Of every token its router's gradients, and its loss below.
    let router = tokens * (config.experts + config.top_k);
    // The gradients of the residual stream and of a norm's output.
    let backward = match purpose {
        Purpose::Training => 2 * stream + AttentionScratch::elements(config, tokens),
        Purpose::Evaluation => 0,
    };
    let scratch = backward + router + tokens + jitter + rotary;
    [activations, tokens * config.vocab, scratch]
}
