//! What a model is: one struct of orthogonal switches that the decoder reads.
//!
//! Families (Mixtral, Qwen3-MoE, OLMoE, the paper's own kind) are no more than ways to fill the struct in. Two readers
//! do so: `huggingface` for `config.json`, `section` for the `[model]` section of a training configuration.

mod huggingface;
mod section;

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use section::ModelSection;

/// More layers than any model has; lists of layers are made before a configuration is checked.
const MAX_LAYERS: usize = 1 << 16;
/// More experts in all layers together than any model has; each has names of its own.
const MAX_ALL_EXPERTS: usize = 1 << 20;
/// Larger models fit no machine, and the sizes of their buffers would not fit 64 bits.
const MAX_PARAMETERS: f64 = 1e13;
/// Activations of one token, for the same reason.
const MAX_TOKEN_ACTIVATIONS: f64 = 1e8;

/// A model that cannot be, or that this crate would compute wrongly. One sentence: where, what was found, what is
/// expected.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{place}: {message}")]
pub struct ConfigError {
    /// File or section that says so.
    pub place: String,
    /// What is wrong with it.
    pub message: String,
}

/// The family: names of weights and keys of `config.json`. The decoder does not read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelKind {
    /// Mixtral 8x7B's (Jiang et al., 2024).
    Mixtral,
    /// Qwen3-30B-A3B's (Yang et al., 2025).
    Qwen3Moe,
    /// OLMoE-1B-7B's (Muennighoff et al., 2024).
    Olmoe,
    /// The Lina paper's GPT-2 and Transformer-XL shapes: LayerNorm with bias, learned positions, two-matrix experts,
    /// plain causal attention, and no biases in linear layers.
    LinaMoe,
}

impl ModelKind {
    /// `model_type` in `config.json` and `kind` in a training configuration.
    pub fn name(self) -> &'static str {
        match self {
            ModelKind::Mixtral => "mixtral",
            ModelKind::Qwen3Moe => "qwen3_moe",
            ModelKind::Olmoe => "olmoe",
            ModelKind::LinaMoe => "lina_moe",
        }
    }
}

impl fmt::Display for ModelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Normalisation of the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm: a weight, no mean, no bias.
    Rms,
    /// LayerNorm with weight and bias.
    Layer,
}

/// How a token's position enters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PositionKind {
    /// Rotation of queries and keys (Su et al., 2021), Hugging Face's half-split convention.
    Rotary {
        /// Base of the frequencies.
        theta: f32,
    },
    /// A learned vector per position, added to the embedding.
    Learned,
}

/// RMSNorm of queries and keys before the rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Over each head, one weight of `head_dim` for all heads (Qwen3).
    PerHead,
    /// Over all heads of the projection at once (OLMoE).
    WholeProjection,
}

/// The experts' feed-forward network; dense layers have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FfnKind {
    /// `down(silu(gate(x)) * up(x))`.
    SwiGlu,
    /// `down(relu(up(x)))`.
    Relu,
    /// `down(gelu(up(x)))` with GPT-2's tanh form of GELU.
    Gelu,
}

impl FfnKind {
    /// Rows of the fused input projection per hidden unit: gate and up, or up alone.
    pub fn input_matrices(self) -> usize {
        match self {
            FfnKind::SwiGlu => 2,
            FfnKind::Relu | FfnKind::Gelu => 1,
        }
    }
}

/// Which load-balancing loss the routers get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuxLoss {
    /// No loss.
    None,
    /// Switch Transformer's as Hugging Face generalises it to top-k: `E * sum_e f_e * P_e`, `f_e` all assignments to
    /// expert e over the number of tokens, `P_e` its mean probability.
    Switch,
    /// GShard's: the same with first choices only.
    Gshard,
}

/// How routers train; nothing here changes inference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterConfig {
    /// Load-balancing loss.
    pub aux_loss: AuxLoss,
    /// Its coefficient, for each MoE layer; the layers' losses are summed. (Hugging Face pools all layers into one
    /// value instead.)
    pub aux_loss_coefficient: f32,
    /// Coefficient of the router z-loss (Zoph et al., 2022), the mean of squared log-sum-exp, for each MoE layer.
    pub z_loss_coefficient: f32,
    /// In training the gate's input is multiplied by uniform noise in `1 - jitter ..= 1 + jitter` (Fedus et al., 2021).
    /// Unlike Mixtral in transformers, the experts see the clean input.
    pub jitter: f32,
    /// Each expert keeps its first `ceil(capacity_factor * top_k * tokens / experts)` assignments, counted over all
    /// ranks in (rank, token, slot) order; the others are dropped. In training only. `None`: dropless.
    pub capacity_factor: Option<f32>,
}

/// Token ids with a meaning of their own, kept from one `config.json` to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins a text.
    pub begin: Option<u32>,
    /// Each of these ends a text.
    pub end: Vec<u32>,
    /// Fills batches up. As in PyTorch's embedding with a padding index, its embedding gets no gradient from where it
    /// is an input.
    pub padding: Option<u32>,
}

/// A decoder with MoE layers.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family, for names only.
    pub kind: ModelKind,
    /// Token ids.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, each shared by `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Experts of each MoE layer.
    pub experts: usize,
    /// Experts of each token.
    pub top_k: usize,
    /// Hidden width of an expert.
    pub expert_hidden: usize,
    /// Layers with a dense feed-forward network instead of experts, ascending.
    pub dense_layers: Vec<usize>,
    /// Hidden width of the dense layers' network.
    pub dense_hidden: usize,
    /// Normalisation of the residual stream.
    pub norm: NormKind,
    /// Added to the variance.
    pub norm_epsilon: f32,
    /// Positions.
    pub position: PositionKind,
    /// Longest sequence.
    pub max_positions: usize,
    /// Norm of queries and keys.
    pub qk_norm: QkNorm,
    /// Feed-forward networks.
    pub ffn: FfnKind,
    /// Whether the top-k probabilities are divided by their sum.
    pub renormalise: bool,
    /// Whether the output projection is the embedding.
    pub tied_embeddings: bool,
    /// Bound on queries', keys' and values' absolute elements (OLMoE).
    pub clip_qkv: Option<f32>,
    /// Tokens that a query sees, itself included.
    pub sliding_window: Option<usize>,
    /// Standard deviation of initial matrices.
    pub initializer_range: f32,
    /// Token ids with a meaning of their own.
    pub special_tokens: SpecialTokens,
    /// Routers in training.
    pub router: RouterConfig,
}

impl ModelConfig {
    /// A family's switches with the given sizes; every other field at the family's default: as many key heads as
    /// query heads, head width `hidden / heads`, no dense layers, dropless.
    pub fn family(kind: ModelKind, sizes: Sizes) -> Self {
        let Sizes { vocab, hidden, layers, heads, experts, top_k, expert_hidden } = sizes;
        let lina = kind == ModelKind::LinaMoe;
        ModelConfig {
            kind,
            vocab,
            hidden,
            layers,
            heads,
            kv_heads: heads,
            head_dim: hidden.checked_div(heads).unwrap_or(0),
            experts,
            top_k,
            expert_hidden,
            dense_layers: Vec::new(),
            dense_hidden: expert_hidden,
            norm: if lina { NormKind::Layer } else { NormKind::Rms },
            norm_epsilon: if kind == ModelKind::Qwen3Moe { 1e-6 } else { 1e-5 },
            position: match kind {
                ModelKind::LinaMoe => PositionKind::Learned,
                ModelKind::Mixtral => PositionKind::Rotary { theta: 1e6 },
                ModelKind::Qwen3Moe | ModelKind::Olmoe => PositionKind::Rotary { theta: 1e4 },
            },
            max_positions: 2048,
            qk_norm: match kind {
                ModelKind::Qwen3Moe => QkNorm::PerHead,
                ModelKind::Olmoe => QkNorm::WholeProjection,
                ModelKind::Mixtral | ModelKind::LinaMoe => QkNorm::None,
            },
            ffn: if lina { FfnKind::Gelu } else { FfnKind::SwiGlu },
            renormalise: matches!(kind, ModelKind::Mixtral | ModelKind::LinaMoe),
            tied_embeddings: false,
            clip_qkv: None,
            sliding_window: None,
            initializer_range: 0.02,
            special_tokens: SpecialTokens::default(),
            router: RouterConfig {
                aux_loss: if lina { AuxLoss::Gshard } else { AuxLoss::Switch },
                aux_loss_coefficient: match kind {
                    ModelKind::Mixtral | ModelKind::Qwen3Moe => 0.001,
                    ModelKind::Olmoe | ModelKind::LinaMoe => 0.01,
                },
                z_loss_coefficient: 0.0,
                jitter: 0.0,
                capacity_factor: None,
            },
        }
    }

    /// Whether `layer` has experts.
    pub fn is_moe(&self, layer: usize) -> bool {
        self.dense_layers.binary_search(&layer).is_err()
    }

    /// Number of MoE layers.
    pub fn moe_layers(&self) -> usize {
        self.layers - self.dense_layers.len()
    }

    /// Index in the model of the MoE layer `number`, counted from 0 among such layers.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn moe_layer(&self, number: usize) -> usize {
        (0..self.layers).filter(|&layer| self.is_moe(layer)).nth(number).expect("a layer with experts")
    }

    /// Width of the queries of all heads.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the keys (or values) of all heads.
    pub fn key_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Width of the fused projection: queries, keys, values.
    pub fn qkv_width(&self) -> usize {
        self.query_width() + 2 * self.key_width()
    }

    /// Refuses impossible sizes and switches that the family's `config.json` cannot express. `place` is the file or
    /// section to name.
    ///
    /// # Errors
    /// The first contradiction found.
    pub fn validate(&self, place: &str) -> Result<(), ConfigError> {
        self.check().map_err(|message| ConfigError { place: place.to_string(), message })
    }

    fn check(&self) -> Result<(), String> {
        let sizes = [
            ("vocab", self.vocab),
            ("hidden", self.hidden),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("experts", self.experts),
            ("top_k", self.top_k),
            ("expert_hidden", self.expert_hidden),
            ("max_positions", self.max_positions),
        ];
        for (key, value) in sizes {
            // Products of two sizes index memory, and token ids are 32 bits wide.
            require((1..=1 << 28).contains(&value), key, value, "a number from 1 to 268435456")?;
        }
        let layers = 1..=MAX_LAYERS;
        require(layers.contains(&self.layers), "layers", self.layers, &format!("a number from 1 to {MAX_LAYERS}"))?;
        let most = MAX_ALL_EXPERTS / self.layers;
        require(
            self.experts <= most,
            "experts",
            self.experts,
            &format!("at most {most} in each of {} layers", self.layers),
        )?;
        self.check_total()?;
        require(
            self.heads.is_multiple_of(self.kv_heads),
            "heads",
            self.heads,
            &format!("a multiple of kv_heads = {}", self.kv_heads),
        )?;
        require(self.top_k <= self.experts, "top_k", self.top_k, &format!("at most experts = {}", self.experts))?;
        if let PositionKind::Rotary { theta } = self.position {
            require(
                self.head_dim.is_multiple_of(2),
                "head_dim",
                self.head_dim,
                "an even number, for rotary positions",
            )?;
            require(theta.is_finite() && theta > 0.0, "rope_theta", theta, "a positive number")?;
        }
        if let Some(&layer) = self.dense_layers.iter().find(|&&layer| layer >= self.layers) {
            require(false, "dense_layers", layer, &format!("layers below layers = {}", self.layers))?;
        }
        if !self.dense_layers.is_sorted_by(|a, b| a < b) {
            require(false, "dense_layers", format!("{:?}", self.dense_layers), "ascending layers, each once")?;
        }
        require(
            self.dense_layers.is_empty() || self.dense_hidden > 0,
            "dense_hidden",
            self.dense_hidden,
            "at least 1",
        )?;
        require(
            self.norm_epsilon > 0.0 && self.norm_epsilon < 1.0,
            "norm_epsilon",
            self.norm_epsilon,
            "a number between 0 and 1",
        )?;
        require(
            self.initializer_range >= 0.0 && self.initializer_range.is_finite(),
            "initializer_range",
            self.initializer_range,
            "a number from 0",
        )?;
        if let Some(clip) = self.clip_qkv {
            require(clip > 0.0 && clip.is_finite(), "clip_qkv", clip, "a positive number")?;
        }
        if let Some(window) = self.sliding_window {
            require(window > 0, "sliding_window", window, "at least 1")?;
        }
        if let Some(padding) = self.special_tokens.padding {
            let expected = format!("a token id below vocab = {}", self.vocab);
            require((padding as usize) < self.vocab, "pad_token_id", padding, &expected)?;
        }
        self.router.check()?;
        self.check_family()
    }

    /// Sizes that are possible one by one and not together.
    fn check_total(&self) -> Result<(), String> {
        let [vocab, hidden, layers, experts, inner] =
            [self.vocab, self.hidden, self.layers, self.experts, self.expert_hidden.max(self.dense_hidden)]
                .map(|size| size as f64);
        let heads = (self.heads as f64 + 2.0 * self.kv_heads as f64) * self.head_dim as f64;
        let parameters = 2.0 * vocab * hidden + layers * hidden * (2.0 * heads + experts * (3.0 * inner + 1.0));
        let activations =
            vocab + layers * (8.0 * hidden + 2.0 * heads + experts + self.top_k as f64 * (hidden + 3.0 * inner));
        for (found, what, most) in [
            (parameters, "parameters", MAX_PARAMETERS),
            (activations, "activations of each token", MAX_TOKEN_ACTIVATIONS),
        ] {
            if found > most {
                return Err(format!("the sizes make {found:.1e} {what}, expected at most {most:.0e}"));
            }
        }
        Ok(())
    }

    /// Switches that would be lost in the family's `config.json`.
    fn check_family(&self) -> Result<(), String> {
        let kind = self.kind;
        let lacks = |key: &str| Err(format!("`{key}` is set, but models of kind {kind} do not have it"));
        if kind == ModelKind::Mixtral && !self.renormalise {
            return Err("`renormalise` is false, but models of kind mixtral always renormalise".to_string());
        }
        if !self.dense_layers.is_empty() && matches!(kind, ModelKind::Mixtral | ModelKind::Olmoe) {
            return lacks("dense_layers");
        }
        if self.clip_qkv.is_some() && matches!(kind, ModelKind::Mixtral | ModelKind::Qwen3Moe) {
            return lacks("clip_qkv");
        }
        if self.sliding_window.is_some() && kind == ModelKind::Olmoe {
            return lacks("sliding_window");
        }
        if kind == ModelKind::Olmoe {
            require(
                self.query_width() == self.hidden,
                "head_dim",
                self.head_dim,
                &format!("hidden / heads = {}, for kind olmoe", self.hidden as f64 / self.heads as f64),
            )?;
        }
        Ok(())
    }
}

impl RouterConfig {
    fn check(&self) -> Result<(), String> {
        for (key, value) in
            [("aux_loss_coefficient", self.aux_loss_coefficient), ("z_loss_coefficient", self.z_loss_coefficient)]
        {
            require(value >= 0.0 && value.is_finite(), key, value, "a number from 0")?;
        }
        require((0.0..1.0).contains(&self.jitter), "jitter", self.jitter, "a number from 0 and below 1")?;
        if let Some(factor) = self.capacity_factor {
            require(factor > 0.0 && factor.is_finite(), "capacity_factor", factor, "a positive number")?;
        }
        Ok(())
    }
}

/// The sizes that every family needs; fields as in [`ModelConfig`].
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "documented on ModelConfig")]
pub struct Sizes {
    pub vocab: usize,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub experts: usize,
    pub top_k: usize,
    pub expert_hidden: usize,
}

fn require(holds: bool, key: &str, found: impl fmt::Display, expected: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(format!("`{key}` is {found}, expected {expected}")) }
}
