//! One MoE layer by itself, to measure it.

use lina_comm::Comm;
use lina_cuda::{Buffer as DeviceBuffer, DType, Gpu};
use lina_plan::ExpertLayout;

use super::moe::{Moe, MoeShared};
use super::parameters::{DeviceGradients, DeviceWeights};
use super::pass::{BackwardStream, DeviceBatch, Pass, attention_plan};
use crate::batch::{LoadedBatch, StepContext, StepError};
use crate::config::ModelConfig;
use crate::params::{ParameterLayout, Parameters};
use crate::purpose::Purpose;

/// An MoE layer on one GPU: norm, gate, permutation, experts and weighted sum, and all of it backward, gradients of weights
/// included. The first layer of a model, without the rest.
pub struct CudaMoeLayer {
    gpu: Gpu,
    dtype: DType,
    config: ModelConfig,
    layout: ParameterLayout,
    comm: Comm,
    weights: DeviceWeights,
    gradients: DeviceGradients,
    batch: LoadedBatch,
    on_device: DeviceBatch,
    moe: Moe,
    shared: MoeShared,
    /// `[tokens, hidden]` each.
    x: DeviceBuffer,
    y: DeviceBuffer,
    grad: DeviceBuffer,
    grad_normed: DeviceBuffer,
}

impl CudaMoeLayer {
    /// The layer of `config` with random weights, for `tokens` random tokens.
    ///
    /// # Errors
    /// If the GPU has no kernel for the sizes or not enough memory.
    pub fn new(gpu: Gpu, config: ModelConfig, dtype: DType, tokens: usize) -> Result<Self, StepError> {
        config.validate("layer")?;
        let experts = ExpertLayout::new(config.experts, 1, None).expect("one rank holds all experts");
        let layout = ParameterLayout::new(&config, experts.held_by(0));
        let mut parameters = Parameters::zeros(&layout);
        // The products' time does not depend on how random their operands are beyond a few megabytes.
        let block: Vec<f32> = lina_cuda::testing::random(1, 1 << 20).iter().map(|value| 0.05 * value).collect();
        for buffer in [&mut parameters.dense, &mut parameters.experts] {
            buffer.chunks_mut(block.len()).for_each(|chunk| chunk.copy_from_slice(&block[..chunk.len()]));
        }
        let mut weights = DeviceWeights::zeros(&gpu, &layout, dtype, Purpose::Training)?;
        weights.load(&gpu, &parameters)?;
        let mut batch = LoadedBatch::with_capacity(0);
        batch.input.resize(tokens, 0);
        let numbers = || gpu.uninit(0, DType::U32);
        let on_device = DeviceBatch {
            input: numbers()?,
            target: numbers()?,
            positions: numbers()?,
            attention: attention_plan(&gpu, &config, dtype, &[])?,
        };
        let random = |seed| gpu.buffer_from(&lina_cuda::testing::random(seed, tokens * config.hidden), dtype);
        Ok(CudaMoeLayer {
            moe: Moe::new(&gpu, &config, 0, dtype, tokens)?,
            shared: MoeShared::new(&gpu, &config, &experts, 0, dtype, tokens, usize::MAX)?,
            gradients: DeviceGradients::zeros(&gpu, &layout, Purpose::Training)?,
            x: random(2)?,
            y: gpu.uninit(tokens * config.hidden, dtype)?,
            grad: random(3)?,
            grad_normed: gpu.uninit(tokens * config.hidden, dtype)?,
            comm: Comm::solo(),
            weights,
            batch,
            on_device,
            gpu,
            dtype,
            config,
            layout,
        })
    }

    /// The GPU, whose stream the passes are enqueued on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Floating-point operations of the experts' products in a forward pass; a backward pass has twice as many.
    pub fn forward_flops(&self) -> u64 {
        let ModelConfig { hidden, expert_hidden, top_k, ffn, .. } = self.config;
        2 * (self.batch.tokens() * top_k) as u64 * (hidden * expert_hidden * (ffn.input_matrices() + 1)) as u64
    }

    /// Enqueues a forward pass, and with `backward` a backward pass. Waits for the counts of its routing.
    ///
    /// # Errors
    /// If the device fails.
    pub fn run(&mut self, backward: bool) -> Result<(), StepError> {
        let Self { gpu, dtype, config, layout, comm, weights, gradients, batch, on_device, moe, shared, .. } = self;
        let step = StepContext { training: true, global_tokens: batch.tokens() as u64, ..StepContext::evaluation() };
        let (gpu, dtype) = (&*gpu, *dtype);
        let mut pass =
            Pass { gpu, dtype, config, layout, rotary: None, batch, on_device, step, comm, accumulate: false };
        moe.forward(&mut pass, shared, weights, self.x.whole(), self.y.whole_mut())?;
        if backward {
            let mut stream = BackwardStream {
                x: self.x.whole(),
                grad: self.grad.whole_mut(),
                grad_normed: self.grad_normed.whole_mut(),
            };
            moe.backward(&mut pass, shared, weights, gradients, &mut stream, |_, _| Ok(()))?;
        }
        Ok(())
    }
}
