//! Where every parameter lives.
//!
//! Dense parameters lie in one flat buffer in the order in which backward finishes their gradients, so that each
//! sub-layer's gradients are one slice that can be reduced while backward goes on:
//!
//! ```text
//! [lm_head, final norm] [layer L-1: gate, norm] [layer L-1: o, q/k norms, qkv, norm] ... [layer 0: ...] [embeddings]
//! ```
//!
//! The experts that a rank holds lie in a second one, layer by layer from last to first, each expert's matrices side
//! by side. Gradients have the layouts of their parameters. Hugging Face's separate query, key and value matrices (and
//! gate and up) are ranges of one fused matrix here: a parameter's [`Place`] is where its own rows are.

use std::ops::Range;

use lina_comm::SharedBuffer;

use crate::config::{ModelConfig, ModelKind, NormKind, PositionKind, QkNorm};
use crate::initial::Initial;

/// Where a parameter's elements are, row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the dense buffer, on every rank.
    Dense(Range<usize>),
    /// In an expert's block ([`ParameterLayout::expert_block`]), on the ranks that hold the expert.
    Expert {
        /// Layer index.
        layer: usize,
        /// Expert index.
        expert: usize,
        /// Elements within the block.
        range: Range<usize>,
    },
}

/// One parameter under its Hugging Face key.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Hugging Face key.
    pub key: String,
    /// Shape; matrices are `[outputs, inputs]`.
    pub shape: Vec<usize>,
    /// Where it lives.
    pub place: Place,
    /// Whether weight decay applies: to matrices, not to norms and biases.
    pub decay: bool,
    pub(crate) initial: Initial,
}

impl Parameter {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Weight and, for LayerNorm, bias.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NormPlace {
    pub weight: Range<usize>,
    pub bias: Option<Range<usize>>,
}

impl NormPlace {
    /// Weight and bias together.
    pub fn whole(&self) -> Range<usize> {
        self.weight.start..self.bias.as_ref().unwrap_or(&self.weight).end
    }
}

/// Dense parameters of one layer's attention.
#[derive(Clone, Debug)]
pub(crate) struct AttentionPlaces {
    /// `[hidden, query_width]`.
    pub output: Range<usize>,
    pub query_norm: Option<Range<usize>>,
    pub key_norm: Option<Range<usize>>,
    /// `[qkv_width, hidden]`: queries, keys, values.
    pub qkv: Range<usize>,
    pub norm: NormPlace,
    /// All of the above.
    pub slice: Range<usize>,
}

/// Dense parameters of one layer's second half.
#[derive(Clone, Debug)]
pub(crate) struct FeedForwardPlaces {
    matrices: FeedForwardMatrices,
    pub norm: NormPlace,
    /// All of the above.
    pub slice: Range<usize>,
}

impl FeedForwardPlaces {
    /// An MoE layer's gate.
    pub fn gate(&self) -> &Range<usize> {
        match &self.matrices {
            FeedForwardMatrices::Moe { gate } => gate,
            FeedForwardMatrices::Dense { .. } => unreachable!("a layer with experts has a gate"),
        }
    }

    /// A dense layer's input projection and down matrix.
    pub fn dense_matrices(&self) -> (&Range<usize>, &Range<usize>) {
        match &self.matrices {
            FeedForwardMatrices::Dense { input, down } => (input, down),
            FeedForwardMatrices::Moe { .. } => unreachable!("a layer without experts has dense matrices"),
        }
    }
}

#[derive(Clone, Debug)]
enum FeedForwardMatrices {
    /// Router gate, `[experts, hidden]`.
    Moe { gate: Range<usize> },
    /// Input projection `[1 or 2 times dense_hidden, hidden]` and `down` `[hidden, dense_hidden]`.
    Dense { input: Range<usize>, down: Range<usize> },
}

#[derive(Clone, Debug)]
pub(crate) struct LayerPlaces {
    pub attention: AttentionPlaces,
    pub feed_forward: FeedForwardPlaces,
}

/// Where every parameter of a model lives, on a rank that holds some of the experts.
#[derive(Clone, Debug)]
pub struct ParameterLayout {
    parameters: Vec<Parameter>,
    held: Vec<usize>,
    pub(crate) layers: Vec<LayerPlaces>,
    /// `[vocab, hidden]`; the embedding itself where tied.
    pub(crate) lm_head: Range<usize>,
    pub(crate) final_norm: NormPlace,
    /// Gradients that the head's backward finishes.
    pub(crate) head_slice: Range<usize>,
    /// `[vocab, hidden]`.
    pub(crate) embedding: Range<usize>,
    /// `[max_positions, hidden]`.
    pub(crate) positions: Option<Range<usize>>,
    /// Gradients that the embedding's backward finishes.
    pub(crate) embedding_slice: Range<usize>,
    dense_len: usize,
    expert_elements: usize,
    /// For each layer, its number among MoE layers counted from the last.
    moe_number: Vec<Option<usize>>,
    moe_layers: usize,
}

impl ParameterLayout {
    /// The layout of `config` on a rank that holds the experts `held` (ascending) of every MoE layer.
    pub fn new(config: &ModelConfig, held: &[usize]) -> Self {
        Builder::new(config).build(held)
    }

    /// Every parameter of the model, those of experts that this rank does not hold included, in the order of the
    /// dense buffer, then of the experts.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Elements of the dense buffer.
    pub fn dense_len(&self) -> usize {
        self.dense_len
    }

    /// Elements of this rank's expert buffer.
    pub fn experts_len(&self) -> usize {
        self.moe_layers * self.held.len() * self.expert_elements
    }

    /// Elements of one expert's block.
    pub fn expert_elements(&self) -> usize {
        self.expert_elements
    }

    /// Experts that this rank holds, ascending.
    pub fn held(&self) -> &[usize] {
        &self.held
    }

    /// Where this rank's expert buffer holds an expert's block; `None` if it does not hold the expert.
    ///
    /// # Panics
    /// If `layer` has no experts.
    pub fn expert_block(&self, layer: usize, expert: usize) -> Option<Range<usize>> {
        let slot = self.held.binary_search(&expert).ok()?;
        let start = self.layer_experts(layer).start + slot * self.expert_elements;
        Some(start..start + self.expert_elements)
    }

    /// Where this rank's expert buffer holds a layer's blocks.
    ///
    /// # Panics
    /// If `layer` has no experts.
    pub fn layer_experts(&self, layer: usize) -> Range<usize> {
        let number = self.moe_number[layer].expect("a layer with experts");
        let elements = self.held.len() * self.expert_elements;
        number * elements..(number + 1) * elements
    }
}

/// A rank's parameters and their gradients, laid out by a [`ParameterLayout`].
#[derive(Debug)]
pub struct Parameters {
    /// `[dense_len]`.
    pub dense: Vec<f32>,
    /// `[experts_len]`.
    pub experts: Vec<f32>,
    /// `[dense_len]`; ranges are in flight between backward and `Comm::finish_gradients`.
    pub dense_gradients: SharedBuffer,
    /// `[experts_len]`, likewise.
    pub expert_gradients: SharedBuffer,
}

impl Parameters {
    /// Zeros for `layout`.
    pub fn zeros(layout: &ParameterLayout) -> Self {
        Parameters {
            dense_gradients: SharedBuffer::zeros(layout.dense_len()),
            expert_gradients: SharedBuffer::zeros(layout.experts_len()),
            ..Self::without_gradients(layout)
        }
    }

    /// Zeros for `layout`, without gradients.
    pub fn without_gradients(layout: &ParameterLayout) -> Self {
        Parameters {
            dense: vec![0.0; layout.dense_len()],
            experts: vec![0.0; layout.experts_len()],
            dense_gradients: SharedBuffer::zeros(0),
            expert_gradients: SharedBuffer::zeros(0),
        }
    }

    /// Fills parameters with the initial values that `seed` gives. Each parameter has its own random numbers, drawn
    /// by its key, so that they do not depend on ranks or on what a rank holds.
    pub fn initialise(&mut self, layout: &ParameterLayout, seed: u64) {
        layout.initialise_into(seed, &mut self.dense, &mut self.experts);
    }

    /// A parameter's elements; `None` if this rank does not hold it.
    pub fn get(&self, layout: &ParameterLayout, place: &Place) -> Option<&[f32]> {
        match place {
            Place::Dense(range) => Some(&self.dense[range.clone()]),
            Place::Expert { .. } => layout.expert_range(place).map(|range| &self.experts[range]),
        }
    }

    /// As [`get`](Self::get), to write.
    pub fn get_mut(&mut self, layout: &ParameterLayout, place: &Place) -> Option<&mut [f32]> {
        match place {
            Place::Dense(range) => Some(&mut self.dense[range.clone()]),
            Place::Expert { .. } => layout.expert_range(place).map(|range| &mut self.experts[range]),
        }
    }

    /// A parameter's gradient; `None` if this rank does not hold it.
    ///
    /// # Panics
    /// If it is being reduced.
    pub fn gradient(&self, layout: &ParameterLayout, place: &Place) -> Option<&[f32]> {
        match place {
            Place::Dense(range) => Some(self.dense_gradients.range(range.clone())),
            Place::Expert { .. } => layout.expert_range(place).map(|range| self.expert_gradients.range(range)),
        }
    }
}

/// One of a rank's two flat buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffer {
    /// Dense parameters, `[dense_len]`.
    Dense,
    /// Experts' parameters, `[experts_len]`.
    Experts,
}

impl ParameterLayout {
    /// Fills buffers `[dense_len]` and `[experts_len]` with the initial values that `seed` gives.
    pub(crate) fn initialise_into(&self, seed: u64, dense: &mut [f32], experts: &mut [f32]) {
        for parameter in &self.parameters {
            let values = match self.place_range(&parameter.place) {
                Some((Buffer::Dense, range)) => &mut dense[range],
                Some((Buffer::Experts, range)) => &mut experts[range],
                None => continue,
            };
            parameter.initial.fill(values, seed, &parameter.key);
        }
    }

    /// In which of this rank's buffers a parameter lies, and where; `None` if the rank does not hold it.
    pub fn place_range(&self, place: &Place) -> Option<(Buffer, Range<usize>)> {
        match place {
            Place::Dense(range) => Some((Buffer::Dense, range.clone())),
            Place::Expert { .. } => self.expert_range(place).map(|range| (Buffer::Experts, range)),
        }
    }

    /// Where this rank's expert buffer holds an expert's parameter.
    fn expert_range(&self, place: &Place) -> Option<Range<usize>> {
        let Place::Expert { layer, expert, range } = place else { return None };
        let block = self.expert_block(*layer, *expert)?;
        Some(block.start + range.start..block.start + range.end)
    }
}

/// Keys of one family's weights.
struct Names {
    moe: &'static str,
    gate: &'static str,
    up: &'static str,
    down: &'static str,
}

impl Names {
    fn of(kind: ModelKind) -> Self {
        match kind {
            ModelKind::Mixtral => Names { moe: "block_sparse_moe", gate: "w1", up: "w3", down: "w2" },
            _ => Names { moe: "mlp", gate: "gate_proj", up: "up_proj", down: "down_proj" },
        }
    }
}

/// Hands out ranges of the dense buffer in order.
struct Builder<'a> {
    config: &'a ModelConfig,
    parameters: Vec<Parameter>,
    next: usize,
}

impl<'a> Builder<'a> {
    fn new(config: &'a ModelConfig) -> Self {
        Builder { config, parameters: Vec::new(), next: 0 }
    }

    fn build(mut self, held: &[usize]) -> ParameterLayout {
        let config = self.config;
        let (vocab, hidden) = (config.vocab, config.hidden);
        let tied = config.tied_embeddings;
        let lm_head = (!tied).then(|| self.matrix("lm_head.weight", vocab, hidden));
        let final_norm = self.norm("model.norm");
        let head_slice = 0..self.next;

        let mut layers: Vec<LayerPlaces> = (0..config.layers)
            .rev()
            .map(|layer| LayerPlaces { feed_forward: self.feed_forward(layer), attention: self.attention(layer) })
            .collect();
        layers.reverse();

        let embedding_start = self.next;
        let positions = (config.position == PositionKind::Learned)
            .then(|| self.matrix("model.embed_positions.weight", config.max_positions, hidden));
        let embedding = self.matrix("model.embed_tokens.weight", vocab, hidden);
        let dense_len = self.next;

        let mut moe_number = vec![None; config.layers];
        for (number, layer) in (0..config.layers).rev().filter(|&layer| config.is_moe(layer)).enumerate() {
            moe_number[layer] = Some(number);
        }
        let expert_input_elements = config.ffn.input_matrices() * config.expert_hidden * hidden;
        for layer in (0..config.layers).rev().filter(|&layer| config.is_moe(layer)) {
            for expert in 0..config.experts {
                self.expert(layer, expert);
            }
        }
        ParameterLayout {
            parameters: self.parameters,
            held: held.to_vec(),
            layers,
            lm_head: lm_head.unwrap_or_else(|| embedding.clone()),
            final_norm,
            head_slice,
            embedding,
            positions,
            embedding_slice: embedding_start..dense_len,
            dense_len,
            expert_elements: expert_input_elements + hidden * config.expert_hidden,
            moe_number,
            moe_layers: config.moe_layers(),
        }
    }

    fn feed_forward(&mut self, layer: usize) -> FeedForwardPlaces {
        let config = self.config;
        let (hidden, start) = (config.hidden, self.next);
        let names = Names::of(config.kind);
        let matrices = if config.is_moe(layer) {
            let key = format!("model.layers.{layer}.{}.gate.weight", names.moe);
            FeedForwardMatrices::Moe { gate: self.matrix(&key, config.experts, hidden) }
        } else {
            let prefix = format!("model.layers.{layer}.mlp");
            let inner = config.dense_hidden;
            let down = self.output_matrix(&format!("{prefix}.down_proj.weight"), hidden, inner);
            let input = self.next;
            if config.ffn.input_matrices() == 2 {
                self.matrix(&format!("{prefix}.gate_proj.weight"), inner, hidden);
            }
            self.matrix(&format!("{prefix}.up_proj.weight"), inner, hidden);
            FeedForwardMatrices::Dense { input: input..self.next, down }
        };
        let norm = self.norm(&format!("model.layers.{layer}.post_attention_layernorm"));
        FeedForwardPlaces { matrices, norm, slice: start..self.next }
    }

    fn attention(&mut self, layer: usize) -> AttentionPlaces {
        let config = self.config;
        let (hidden, start) = (config.hidden, self.next);
        let (query, key) = (config.query_width(), config.key_width());
        let prefix = format!("model.layers.{layer}.self_attn");
        let output = self.output_matrix(&format!("{prefix}.o_proj.weight"), hidden, query);
        let norm_widths = match config.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some((config.head_dim, config.head_dim)),
            QkNorm::WholeProjection => Some((query, key)),
        };
        let query_norm = norm_widths.map(|(width, _)| self.vector(&format!("{prefix}.q_norm.weight"), width, 1.0));
        let key_norm = norm_widths.map(|(_, width)| self.vector(&format!("{prefix}.k_norm.weight"), width, 1.0));
        let qkv = self.next;
        self.matrix(&format!("{prefix}.q_proj.weight"), query, hidden);
        self.matrix(&format!("{prefix}.k_proj.weight"), key, hidden);
        self.matrix(&format!("{prefix}.v_proj.weight"), key, hidden);
        let qkv = qkv..self.next;
        let norm = self.norm(&format!("model.layers.{layer}.input_layernorm"));
        AttentionPlaces { output, query_norm, key_norm, qkv, norm, slice: start..self.next }
    }

    fn norm(&mut self, key: &str) -> NormPlace {
        let hidden = self.config.hidden;
        let weight = self.vector(&format!("{key}.weight"), hidden, 1.0);
        let bias = (self.config.norm == NormKind::Layer).then(|| self.vector(&format!("{key}.bias"), hidden, 0.0));
        NormPlace { weight, bias }
    }

    fn vector(&mut self, key: &str, width: usize, value: f32) -> Range<usize> {
        self.dense(key, vec![width], Initial::Constant(value))
    }

    fn matrix(&mut self, key: &str, rows: usize, columns: usize) -> Range<usize> {
        self.dense(key, vec![rows, columns], self.normal())
    }

    /// A projection back into the residual stream.
    fn output_matrix(&mut self, key: &str, rows: usize, columns: usize) -> Range<usize> {
        self.dense(key, vec![rows, columns], self.residual())
    }

    fn dense(&mut self, key: &str, shape: Vec<usize>, initial: Initial) -> Range<usize> {
        let range = self.next..self.next + shape.iter().product::<usize>();
        self.next = range.end;
        let decay = shape.len() > 1;
        self.parameters.push(Parameter {
            key: key.to_string(),
            shape,
            place: Place::Dense(range.clone()),
            decay,
            initial,
        });
        range
    }

    fn expert(&mut self, layer: usize, expert: usize) {
        let (hidden, inner) = (self.config.hidden, self.config.expert_hidden);
        let names = Names::of(self.config.kind);
        let (normal, residual) = (self.normal(), self.residual());
        let mut next = 0;
        let mut add = |name: &str, shape: [usize; 2], initial: Initial| {
            let range = next..next + shape[0] * shape[1];
            next = range.end;
            self.parameters.push(Parameter {
                key: format!("model.layers.{layer}.{}.experts.{expert}.{name}.weight", names.moe),
                shape: shape.to_vec(),
                place: Place::Expert { layer, expert, range },
                decay: true,
                initial,
            });
        };
        if self.config.ffn.input_matrices() == 2 {
            add(names.gate, [inner, hidden], normal);
        }
        add(names.up, [inner, hidden], normal);
        add(names.down, [hidden, inner], residual);
    }

    fn normal(&self) -> Initial {
        Initial::Normal { deviation: self.config.initializer_range }
    }

    /// GPT-2's scaling: the variance of the residual stream does not grow with depth.
    fn residual(&self) -> Initial {
        Initial::Normal { deviation: self.config.initializer_range / (2.0 * self.config.layers as f32).sqrt() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Sizes;

    fn config(kind: ModelKind) -> ModelConfig {
        let sizes = Sizes { vocab: 50, hidden: 32, layers: 3, heads: 4, experts: 6, top_k: 2, expert_hidden: 24 };
        let mut config = ModelConfig::family(kind, sizes);
        if kind == ModelKind::Qwen3Moe {
            config.dense_layers = vec![1];
        }
        config
    }

    #[test]
    fn the_dense_buffer_is_covered_once_in_order() {
        for kind in [ModelKind::Mixtral, ModelKind::Qwen3Moe, ModelKind::Olmoe, ModelKind::LinaMoe] {
            let mut config = config(kind);
            config.tied_embeddings = kind == ModelKind::Olmoe;
            let layout = ParameterLayout::new(&config, &[1, 4]);
            let mut next = 0;
            for parameter in layout.parameters() {
                if let Place::Dense(range) = &parameter.place {
                    assert_eq!(range.start, next, "{}", parameter.key);
                    assert_eq!(range.len(), parameter.elements(), "{}", parameter.key);
                    next = range.end;
                }
            }
            assert_eq!(next, layout.dense_len());
            let slices = std::iter::once(layout.head_slice.clone())
                .chain(
                    layout.layers.iter().rev().flat_map(|l| [l.feed_forward.slice.clone(), l.attention.slice.clone()]),
                )
                .chain([layout.embedding_slice.clone()]);
            assert_eq!(slices.fold(0, |end, slice| if slice.start == end { slice.end } else { usize::MAX }), next);
        }
    }

    #[test]
    fn held_experts_are_side_by_side_from_the_last_layer() {
        let layout = ParameterLayout::new(&config(ModelKind::Qwen3Moe), &[1, 4]);
        let elements = 3 * 24 * 32;
        assert_eq!(layout.expert_block(2, 1), Some(0..elements));
        assert_eq!(layout.expert_block(2, 4), Some(elements..2 * elements));
        assert_eq!(layout.expert_block(0, 1), Some(2 * elements..3 * elements));
        assert_eq!(layout.expert_block(0, 0), None);
        assert_eq!(layout.experts_len(), 4 * elements);
    }

    #[test]
    fn initial_values_depend_on_seed_and_key_alone() {
        let config = config(ModelKind::Mixtral);
        let values = |held: &[usize], seed: u64| {
            let layout = ParameterLayout::new(&config, held);
            let mut parameters = Parameters::zeros(&layout);
            parameters.initialise(&layout, seed);
            let key = "model.layers.1.block_sparse_moe.experts.4.w2.weight";
            let parameter = layout.parameters().iter().find(|p| p.key == key).unwrap();
            (parameters.get(&layout, &parameter.place).unwrap().to_vec(), parameters.dense)
        };
        let (expert, dense) = values(&[0, 1, 2, 3, 4, 5], 7);
        assert_eq!(values(&[4], 7), (expert.clone(), dense));
        assert_ne!(values(&[4], 8).0, expert);
        let deviation = (expert.iter().map(|x| x * x).sum::<f32>() / expert.len() as f32).sqrt();
        let expected = 0.02 / 6f32.sqrt();
        assert!((deviation - expected).abs() < 0.1 * expected, "{deviation} {expected}");
    }
}
