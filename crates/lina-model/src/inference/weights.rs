//! What inference reads: all weights, once for all ranks of a process.

use std::path::Path;

use lina_kernels::advise_huge_pages;
use xxhash_rust::xxh3::Xxh3;

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::ModelConfig;
use crate::params::ParameterLayout;

/// Elements that are hashed at a time.
const HASHED_ELEMENTS: usize = 4096;

/// A model's weights in host memory, every expert included.
#[derive(Debug)]
pub struct InferenceWeights {
    config: ModelConfig,
    layout: ParameterLayout,
    /// `[dense_len]`.
    dense: Vec<f32>,
    /// `[experts_len]`.
    experts: Vec<f32>,
}

impl InferenceWeights {
    /// Reads the weights of a Hugging Face folder.
    ///
    /// # Errors
    /// If they are missing, do not fit the configuration, or hold an element that is no finite number.
    pub fn load(folder: &Path, config: ModelConfig) -> Result<Self, CheckpointError> {
        let mut weights = InferenceWeights::zeros(config);
        Checkpoint::open(folder)?.load_into(&weights.layout, &mut weights.dense, &mut weights.experts)?;
        Ok(weights)
    }

    /// The initial weights that training starts from with `seed`: for measurements of speed.
    pub fn initial(config: ModelConfig, seed: u64) -> Self {
        let mut weights = InferenceWeights::zeros(config);
        weights.layout.initialise_into(seed, &mut weights.dense, &mut weights.experts);
        weights
    }

    /// Bytes that the weights of `config` take.
    pub fn bytes_of(config: &ModelConfig) -> u64 {
        let layout = all_experts(config);
        ((layout.dense_len() + layout.experts_len()) * size_of::<f32>()) as u64
    }

    fn zeros(config: ModelConfig) -> Self {
        let layout = all_experts(&config);
        let (mut dense, mut experts) = (vec![0.0; layout.dense_len()], vec![0.0; layout.experts_len()]);
        advise_huge_pages(&mut dense);
        advise_huge_pages(&mut experts);
        InferenceWeights { config, layout, dense, experts }
    }

    /// The model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of one expert of one layer.
    pub fn expert_bytes(&self) -> u64 {
        (self.layout.expert_elements() * size_of::<f32>()) as u64
    }

    /// Bytes of all weights.
    pub fn bytes(&self) -> u64 {
        ((self.dense.len() + self.experts.len()) * size_of::<f32>()) as u64
    }

    /// Bytes of the weights that one token's pass reads: everything but the rows of the embeddings that are not the
    /// token's, and the experts that it does not choose.
    pub fn active_bytes(&self) -> u64 {
        let ModelConfig { vocab, hidden, top_k, max_positions, .. } = self.config;
        let untouched_embedding = if self.config.tied_embeddings { 0 } else { (vocab - 1) * hidden };
        let untouched_positions = if self.layout.positions.is_some() { (max_positions - 1) * hidden } else { 0 };
        let experts = self.config.moe_layers() * top_k * self.layout.expert_elements();
        ((self.dense.len() - untouched_embedding - untouched_positions + experts) * size_of::<f32>()) as u64
    }

    /// A hash of configuration and weights: what was learned of one model is of no use with another.
    pub fn fingerprint(&self) -> String {
        let mut hash = Xxh3::new();
        hash.update(self.config.to_json().to_string().as_bytes());
        let mut bytes = Vec::with_capacity(HASHED_ELEMENTS * size_of::<f32>());
        for elements in self.dense.chunks(HASHED_ELEMENTS).chain(self.experts.chunks(HASHED_ELEMENTS)) {
            bytes.clear();
            bytes.extend(elements.iter().flat_map(|element| element.to_le_bytes()));
            hash.update(&bytes);
        }
        format!("{:032x}", hash.digest128())
    }

    pub(crate) fn layout(&self) -> &ParameterLayout {
        &self.layout
    }

    pub(crate) fn dense(&self) -> &[f32] {
        &self.dense
    }

    /// A layer's experts, all of them, one block after another.
    pub(crate) fn layer_experts(&self, layer: usize) -> &[f32] {
        &self.experts[self.layout.layer_experts(layer)]
    }
}

/// The layout of a rank that holds every expert.
fn all_experts(config: &ModelConfig) -> ParameterLayout {
    let all: Vec<usize> = (0..config.experts).collect();
    ParameterLayout::new(config, &all)
}
