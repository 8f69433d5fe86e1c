//! A gate at work: the norm before a layer's experts, and which of them each token chooses.

use lina_cuda::{self as cuda, Buffer as DeviceBuffer, CudaError, DType, Gpu, Slice, SliceMut};

use super::step::Step;
use crate::config::ModelConfig;
use crate::cuda::norm::Norm;

/// Buffers; rows are tokens.
#[derive(Debug)]
pub(super) struct GateScratch {
    norm: Norm,
    /// `[max_tokens, experts]`, f32.
    logits: DeviceBuffer,
    probabilities: DeviceBuffer,
    /// `[max_tokens, top_k]`, f32.
    weight: DeviceBuffer,
}

impl GateScratch {
    pub fn new(gpu: &Gpu, config: &ModelConfig, dtype: DType, max_tokens: usize) -> Result<Self, CudaError> {
        let experts = max_tokens * config.experts;
        Ok(GateScratch {
            norm: Norm::new(gpu, config, dtype, max_tokens)?,
            logits: gpu.uninit(experts, DType::F32)?,
            probabilities: gpu.uninit(experts, DType::F32)?,
            weight: gpu.uninit(max_tokens * config.top_k, DType::F32)?,
        })
    }

    /// Has the gate of `layer` choose experts for `x` (`[tokens, hidden]`): `index` (u32 `[tokens, top_k]`), most probable first.
    pub fn choose(
        &mut self,
        step: &Step<'_>,
        layer: usize,
        x: Slice<'_>,
        index: SliceMut<'_>,
    ) -> Result<(), CudaError> {
        let (config, gpu, tokens) = (step.config, step.gpu, step.tokens);
        let (hidden, experts, top_k) = (config.hidden, config.experts, config.top_k);
        let places = &step.layout.layers[layer].feed_forward;
        step.normalise(&mut self.norm, &places.norm, x)?;
        let (normed, gate) = (self.norm.output(tokens), step.dense.matrix(places.gate()));
        step.product(self.logits.slice_mut(0..tokens * experts), normed, gate, [experts, hidden], None)?;
        cuda::router_forward(
            gpu,
            self.logits.slice(0..tokens * experts),
            top_k,
            config.renormalise,
            self.probabilities.slice_mut(0..tokens * experts),
            index,
            self.weight.slice_mut(0..tokens * top_k),
        )
    }

    /// What the experts are given: the last `x`, normed.
    pub fn normed(&self, tokens: usize) -> Slice<'_> {
        self.norm.output(tokens)
    }

    /// What the first `choices` choices count.
    pub fn weights(&self, choices: usize) -> Slice<'_> {
        self.weight.slice(0..choices)
    }
}
