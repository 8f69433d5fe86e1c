//! The decoder on a device: embedding, layers of attention and feed-forward, head and loss, and the way back.

use lina_comm::{Comm, SharedBuffer, WeightGradients, WorkKind};
use lina_cuda::{
    self as cuda, Addend, Buffer as DeviceBuffer, CudaError, DType, Gpu, Mat, MatMut, RotaryTable, matmul,
};
use lina_kernels::IGNORED;
use lina_plan::ExpertLayout;

use super::attention::{Attention, AttentionScratch};
use super::ffn::DenseFfn;
use super::moe::{Moe, MoeShared};
use super::norm::Norm;
use super::parameters::{DeviceGradients, DeviceWeights};
use super::pass::{BackwardStream, DeviceBatch, Pass, attention_plan};
use crate::batch::{Batch, ForwardOutput, LoadedBatch, StepContext, StepError};
use crate::config::{ModelConfig, PositionKind, QkNorm};
use crate::decoder::{ModelLimits, check_model};
use crate::moe::LayerRouting;
use crate::params::{ParameterLayout, Parameters};
use crate::pass::product_flops;
use crate::purpose::Purpose;

/// One rank's part of a decoder on its GPU: as [`Model`](crate::Model), with parameters, gradients and activations in device
/// memory.
pub struct CudaModel {
    gpu: Gpu,
    dtype: DType,
    purpose: Purpose,
    config: ModelConfig,
    experts: ExpertLayout,
    layout: ParameterLayout,
    limits: ModelLimits,
    weights: DeviceWeights,
    gradients: DeviceGradients,
    batch: LoadedBatch,
    on_device: DeviceBatch,
    step: StepContext,
    rotary: Option<RotaryTable>,
    /// Those that have [buffers](Purpose::buffered_layers).
    layers: Vec<Layer>,
    /// `[max_tokens, hidden]` each: the residual stream before each sub-layer and at the end, as far as it is
    /// [kept](Purpose::streams).
    residual: Vec<DeviceBuffer>,
    final_norm: Norm,
    /// `[max_tokens, vocab]`: logits, or in training their gradient.
    logits: DeviceBuffer,
    /// `[max_tokens]`, f32.
    losses: DeviceBuffer,
    /// Their sum.
    loss_sum: DeviceBuffer,
    /// `[max_tokens, hidden]`: gradient of the residual stream.
    grad: DeviceBuffer,
    /// `[max_tokens, hidden]`: gradient of a norm's output.
    grad_normed: DeviceBuffer,
    attention: AttentionScratch,
    moe: MoeShared,
}

struct Layer {
    attention: Attention,
    feed_forward: FeedForward,
}

enum FeedForward {
    Moe(Box<Moe>),
    Dense(DenseFfn),
}

impl CudaModel {
    /// A model of zeros for `purpose` on `rank` of `experts`' ranks, whose activations and products are of `dtype`; give it
    /// [parameters](Self::load).
    ///
    /// # Errors
    /// If the configuration is not valid, the layout is for another number of experts, sequences may be longer than the
    /// model has positions, or the GPU has no kernel for the sizes or not enough memory.
    pub fn new(
        purpose: Purpose,
        gpu: Gpu,
        config: ModelConfig,
        experts: ExpertLayout,
        rank: usize,
        dtype: DType,
        limits: ModelLimits,
    ) -> Result<Self, StepError> {
        check_model(&config, &experts, rank, &limits)?;
        check_sizes(&config)?;
        let layout = ParameterLayout::new(&config, experts.held_by(rank));
        let max_tokens = limits.max_tokens;
        let rows_limit = limits.max_expert_rows.unwrap_or(usize::MAX);
        let rotary = match config.position {
            PositionKind::Rotary { theta } => {
                Some(RotaryTable::new(&gpu, config.head_dim, limits.max_sequence_tokens, theta)?)
            }
            PositionKind::Learned => None,
        };
        let mut layers = Vec::with_capacity(config.layers);
        for layer in purpose.buffered_layers(&config) {
            layers.push(Layer {
                attention: Attention::new(&gpu, &config, layer, dtype, max_tokens)?,
                feed_forward: if config.is_moe(layer) {
                    FeedForward::Moe(Box::new(Moe::new(&gpu, &config, layer, dtype, max_tokens)?))
                } else {
                    FeedForward::Dense(DenseFfn::new(&gpu, &config, layer, dtype, max_tokens)?)
                },
            });
        }
        let backward_tokens = if purpose == Purpose::Training { max_tokens } else { 0 };
        let stream = |tokens: usize| gpu.uninit(tokens * config.hidden, dtype);
        let numbers = || gpu.uninit(max_tokens, DType::U32);
        let on_device = DeviceBatch {
            input: numbers()?,
            target: numbers()?,
            positions: numbers()?,
            attention: attention_plan(&gpu, &config, dtype, &[])?,
        };
        Ok(CudaModel {
            weights: DeviceWeights::zeros(&gpu, &layout, dtype, purpose)?,
            gradients: DeviceGradients::zeros(&gpu, &layout, purpose)?,
            batch: LoadedBatch::with_capacity(max_tokens),
            on_device,
            step: StepContext::evaluation(),
            rotary,
            layers,
            residual: (0..purpose.streams(&config)).map(|_| stream(max_tokens)).collect::<Result<_, CudaError>>()?,
            final_norm: Norm::new(&gpu, &config, dtype, max_tokens)?,
            logits: gpu.uninit(max_tokens * config.vocab, dtype)?,
            losses: gpu.uninit(max_tokens, DType::F32)?,
            loss_sum: gpu.uninit(1, DType::F32)?,
            grad: stream(backward_tokens)?,
            grad_normed: stream(backward_tokens)?,
            attention: AttentionScratch::new(&gpu, &config, dtype, backward_tokens)?,
            moe: MoeShared::new(&gpu, &config, &experts, rank, dtype, max_tokens, rows_limit)?,
            gpu,
            dtype,
            purpose,
            config,
            experts,
            layout,
            limits,
        })
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// How activations are stored and products are computed.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Which rank holds which experts.
    pub fn expert_layout(&self) -> &ExpertLayout {
        &self.experts
    }

    /// Where parameters lie in the device's buffers.
    pub fn layout(&self) -> &ParameterLayout {
        &self.layout
    }

    /// The gradients.
    pub fn gradients(&self) -> &DeviceGradients {
        &self.gradients
    }

    /// Everything that an update of the parameters needs.
    pub fn for_update(&mut self) -> (&Gpu, &ParameterLayout, &mut DeviceWeights, &DeviceGradients) {
        (&self.gpu, &self.layout, &mut self.weights, &self.gradients)
    }

    /// Takes parameters from the host.
    ///
    /// # Errors
    /// If the device has failed.
    ///
    /// # Panics
    /// If they are laid out for other experts.
    pub fn load(&mut self, parameters: &Parameters) -> Result<(), CudaError> {
        self.weights.load(&self.gpu, parameters)
    }

    /// Copies the parameters to the host.
    ///
    /// # Errors
    /// If the device has failed.
    ///
    /// # Panics
    /// If there they are laid out for other experts.
    pub fn store(&self, parameters: &mut Parameters) -> Result<(), CudaError> {
        self.weights.store(&self.gpu, parameters)
    }

    /// Gives the rank other experts between two passes: those of `experts`. Parameters are zeros until they are
    /// [loaded](Self::load).
    ///
    /// # Errors
    /// If the device's memory does not suffice.
    ///
    /// # Panics
    /// If the layout is for another number of ranks or experts, or the model is for evaluation.
    pub fn set_experts(&mut self, experts: ExpertLayout) -> Result<(), CudaError> {
        assert_eq!(self.purpose, Purpose::Training, "experts move while they are trained");
        let (old, rank) = (&self.experts, self.moe.rank());
        assert_eq!((old.ranks(), old.experts()), (experts.ranks(), experts.experts()), "ranks and experts stay");
        self.layout = ParameterLayout::new(&self.config, experts.held_by(rank));
        // The old ones first: both may not fit.
        self.weights = DeviceWeights::none(&self.gpu)?;
        self.gradients = DeviceGradients::none(&self.gpu)?;
        self.weights = DeviceWeights::zeros(&self.gpu, &self.layout, self.dtype, self.purpose)?;
        self.gradients = DeviceGradients::zeros(&self.gpu, &self.layout, self.purpose)?;
        self.moe.set_layout(&experts);
        self.experts = experts;
        Ok(())
    }

    /// How `layer` routed the last forward's tokens; `None` if it has no experts, or the model is for evaluation.
    ///
    /// # Panics
    /// If there is no such layer in a model for training.
    pub fn routing(&self, layer: usize) -> Option<LayerRouting<'_>> {
        if self.purpose == Purpose::Evaluation {
            return None;
        }
        match &self.layers[layer].feed_forward {
            FeedForward::Moe(moe) => Some(moe.routing(&self.moe.routes)),
            FeedForward::Dense(_) => None,
        }
    }

    /// Logits of the last forward, `[tokens, vocab]`, copied to the host; `None` if it was for training, which replaces
    /// them.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn logits(&self) -> Result<Option<Vec<f32>>, CudaError> {
        if self.step.training {
            return Ok(None);
        }
        self.gpu.to_host(self.logits.slice(0..self.batch.tokens() * self.config.vocab)).map(Some)
    }

    /// A parameter's gradient, copied to the host; `None` if this rank does not hold the parameter.
    ///
    /// # Errors
    /// If the device has failed.
    ///
    /// # Panics
    /// If it is being reduced, or the model is for evaluation.
    pub fn gradient(&self, place: &crate::Place) -> Result<Option<Vec<f32>>, CudaError> {
        let Some((buffer, range)) = self.layout.place_range(place) else { return Ok(None) };
        self.gpu.to_host(self.gradients.buffer(buffer).device_range(range)).map(Some)
    }

    /// Runs a batch: losses, and in training everything that [`backward`](Self::backward) needs. All ranks call it
    /// together, those without tokens too. Waits for the losses.
    ///
    /// # Errors
    /// If the batch does not fit the model, routing exceeds the limit of rows, the device fails or the job does.
    ///
    /// # Panics
    /// If the pass is for training and the model is not.
    pub fn forward(
        &mut self,
        comm: &mut Comm,
        batch: Batch<'_>,
        step: StepContext,
    ) -> Result<ForwardOutput, StepError> {
        assert!(!step.training || self.purpose == Purpose::Training, "the model is for evaluation");
        self.load_batch(batch)?;
        self.step = step;
        let Self { gpu, dtype, config, layout, weights, batch, on_device, residual, layers, moe, rotary, .. } = self;
        let (gpu, dtype, rotary, purpose) = (&*gpu, *dtype, rotary.as_ref(), self.purpose);
        let mut pass = Pass { gpu, dtype, config, layout, rotary, batch, on_device, step, comm, accumulate: false };
        let (tokens, hidden) = (pass.tokens(), config.hidden);
        let mut output = ForwardOutput::default();
        let elements = tokens * hidden;

        moe.begin(gpu)?;
        pass.work(WorkKind::Embedding, None, 0)?;
        let embedded = residual[0].slice_mut(0..elements);
        let input = on_device.input.slice(0..tokens);
        cuda::embedding_forward(gpu, weights.matrix(&layout.embedding), input, embedded)?;
        if let Some(positions) = &layout.positions {
            let embedded = residual[0].slice_mut(0..elements);
            let table = weights.matrix(positions);
            cuda::add_position_embedding(gpu, table, on_device.positions.slice(0..tokens), embedded)?;
        }

        for number in 0..config.layers {
            let layer = &mut layers[purpose.buffers_of(config, number)];
            let first = purpose.stream_of(number);
            let [x, middle, y] = &mut residual[first..first + 3] else { unreachable!("three of a slice") };
            layer.attention.set_layer(number);
            layer.attention.forward(&mut pass, weights, x.slice(0..elements), middle.slice_mut(0..elements))?;
            let (middle, y) = (middle.slice(0..elements), y.slice_mut(0..elements));
            match &mut layer.feed_forward {
                FeedForward::Moe(layer) => {
                    layer.set_layer(config, number);
                    layer.forward(&mut pass, moe, weights, middle, y)?;
                    if purpose == Purpose::Evaluation {
                        // The next layer's routing replaces this one's.
                        moe.fetch_sums(gpu)?;
                        output.add_routing(layer.finish(moe, config), &step);
                    }
                }
                FeedForward::Dense(layer) => {
                    layer.set_layer(number);
                    layer.forward(&mut pass, &mut moe.ffn, weights, middle, y)?;
                }
            }
            if purpose == Purpose::Evaluation {
                residual.swap(0, 2);
            }
        }

        pass.work(WorkKind::Head, None, product_flops(tokens, config.vocab, hidden))?;
        let x = residual[purpose.stream_of(config.layers)].slice(0..elements);
        self.final_norm.forward(&pass, &layout.final_norm, weights, x)?;
        let normed = Mat::new(self.final_norm.output(tokens), tokens, hidden);
        let weight = Mat::new(weights.matrix(&layout.lm_head), config.vocab, hidden);
        let logits = MatMut::new(self.logits.slice_mut(0..tokens * config.vocab), tokens, config.vocab);
        matmul(gpu, logits, normed, weight.t(), Addend::None)?;
        let logits = self.logits.slice_mut(0..tokens * config.vocab);
        let (target, losses) = (on_device.target.slice(0..tokens), self.losses.slice_mut(0..tokens));
        if step.training {
            cuda::cross_entropy_forward_backward(gpu, logits, target, step.loss_scale() as f32, losses)?;
        } else {
            cuda::cross_entropy_forward(gpu, logits.as_slice(), target, losses)?;
        }
        cuda::sum_into(gpu, self.losses.slice(0..tokens), self.loss_sum.whole_mut())?;
        self.outcome(output)
    }

    /// Waits for the pass's sums, and adds them to those of layers that are there already.
    fn outcome(&mut self, mut output: ForwardOutput) -> Result<ForwardOutput, StepError> {
        if self.purpose == Purpose::Training {
            self.moe.fetch_sums(&self.gpu)?;
            for layer in &mut self.layers {
                if let FeedForward::Moe(moe) = &mut layer.feed_forward {
                    output.add_routing(moe.finish(&self.moe, &self.config), &self.step);
                }
            }
        }
        let mut loss_sum = [0.0f32];
        self.gpu.download(self.loss_sum.whole(), &mut loss_sum)?;
        output.loss_sum = f64::from(loss_sum[0]);
        output.target_tokens = self.batch.target.iter().filter(|&&target| target != IGNORED).count() as u64;
        Ok(output)
    }

    /// Takes a batch to the device.
    fn load_batch(&mut self, batch: Batch<'_>) -> Result<(), StepError> {
        let ModelLimits { max_tokens, max_sequence_tokens, .. } = self.limits;
        let before = std::mem::take(&mut self.batch.sequences);
        self.batch.load(batch, &self.config, max_tokens, max_sequence_tokens)?;
        let on_device = &mut self.on_device;
        for (values, buffer) in [
            (&self.batch.input, &mut on_device.input),
            (&self.batch.target, &mut on_device.target),
            (&self.batch.positions, &mut on_device.positions),
        ] {
            self.gpu.upload(values, buffer.slice_mut(0..values.len()))?;
        }
        if self.batch.sequences != before {
            on_device.attention = attention_plan(&self.gpu, &self.config, self.dtype, &self.batch.sequences)?;
        }
        Ok(())
    }

    /// Gradients of the last training forward; each sub-layer's are handed to `comm` in order, to be reduced as soon as the
    /// device has computed them. With `accumulate` they are added to what is there, else they replace it.
    ///
    /// # Errors
    /// If the device or the job fails.
    ///
    /// # Panics
    /// If the last forward was not for training: its logits are no gradient.
    pub fn backward(&mut self, comm: &mut Comm, accumulate: bool) -> Result<(), StepError> {
        assert!(self.step.training, "backward follows a forward for training");
        let Self { gpu, dtype, config, layout, weights, gradients, batch, on_device, step, .. } = self;
        let Self { residual, layers, moe, rotary, .. } = self;
        let (gpu, dtype, step, rotary) = (&*gpu, *dtype, *step, rotary.as_ref());
        let (tokens, hidden, vocab) = (batch.tokens(), config.hidden, config.vocab);
        let elements = tokens * hidden;
        let mut pass = Pass { gpu, dtype, config, layout, rotary, batch, on_device, step, comm, accumulate };
        let mut stream = BackwardStream {
            x: residual[2 * config.layers].slice(0..elements),
            grad: self.grad.slice_mut(0..elements),
            grad_normed: self.grad_normed.slice_mut(0..elements),
        };

        pass.work(WorkKind::Head, None, 2 * product_flops(tokens, vocab, hidden))?;
        let grad_logits = self.logits.slice(0..tokens * vocab);
        let gradient = gradients.dense.device_range_mut(layout.lm_head.clone());
        pass.weight_gradient(gradient, grad_logits, vocab, self.final_norm.output(tokens), hidden)?;
        let weight = Mat::new(weights.matrix(&layout.lm_head), vocab, hidden);
        let grad_normed = MatMut::new(stream.grad_normed.reborrow(), tokens, hidden);
        matmul(gpu, grad_normed, Mat::new(grad_logits, tokens, vocab), weight, Addend::None)?;
        gpu.fill_zero(stream.grad.reborrow())?;
        self.final_norm.backward(&pass, &layout.final_norm, weights, &mut gradients.dense, &mut stream)?;
        pass.reduce_dense(&mut gradients.dense, &layout.head_slice)?;

        let deferring =
            pass.comm.ranks() > 1 && pass.comm.moe_shape().attention_gradients == WeightGradients::AfterSend;
        // Whether weight gradients of the attention above wait.
        let mut waiting = false;
        for number in (0..layers.len()).rev() {
            let (below, above) = layers.split_at_mut(number + 1);
            let layer = &mut below[number];
            stream.x = residual[2 * number + 1].slice(0..elements);
            match &mut layer.feed_forward {
                FeedForward::Moe(moe_layer) => {
                    let scratch = &self.attention;
                    let above = above.first().filter(|_| std::mem::take(&mut waiting));
                    let cover = |pass: &mut Pass<'_>, gradients: &mut DeviceGradients| match above {
                        Some(above) => above.attention.weight_gradients(pass, scratch, &mut gradients.dense),
                        None => Ok(()),
                    };
                    moe_layer.backward(&mut pass, moe, weights, gradients, &mut stream, cover)?;
                }
                FeedForward::Dense(layer) => {
                    layer.backward(&mut pass, &mut moe.ffn, weights, &mut gradients.dense, &mut stream)?;
                }
            }
            stream.x = residual[2 * number].slice(0..elements);
            let dense = &mut gradients.dense;
            layer.attention.backward(&mut pass, &mut self.attention, weights, dense, &mut stream)?;
            waiting = deferring && number > 0 && config.is_moe(number - 1);
            if !waiting {
                layer.attention.weight_gradients(&mut pass, &self.attention, dense)?;
            }
        }
        embedding_backward(&mut pass, &mut gradients.dense, &stream)
    }
}

/// Whether kernels take the model's sizes.
fn check_sizes(config: &ModelConfig) -> Result<(), CudaError> {
    if config.moe_layers() > 0 {
        cuda::check_routing(config.experts, config.top_k)?;
    }
    cuda::check_norm_width(config.hidden)?;
    if config.qk_norm == QkNorm::WholeProjection {
        cuda::check_norm_width(config.query_width().max(config.key_width()))?;
    }
    Ok(())
}

/// Gradients of the embeddings; hands them over.
fn embedding_backward(
    pass: &mut Pass<'_>,
    gradients: &mut SharedBuffer,
    stream: &BackwardStream<'_>,
) -> Result<(), StepError> {
    let (config, layout, gpu, tokens) = (pass.config, pass.layout, pass.gpu, pass.tokens());
    pass.work(WorkKind::Embedding, None, 0)?;
    let grad = stream.grad.as_slice();
    if let Some(positions) = &layout.positions {
        pass.begin_gradient(gradients.device_range_mut(positions.clone()))?;
        let table = gradients.device_range_mut(positions.clone());
        cuda::embedding_backward(gpu, grad, pass.positions(), None, table)?;
    }
    if !config.tied_embeddings {
        pass.begin_gradient(gradients.device_range_mut(layout.embedding.clone()))?;
    }
    let input = pass.on_device.input.slice(0..tokens);
    let table = gradients.device_range_mut(layout.embedding.clone());
    cuda::embedding_backward(gpu, grad, input, config.special_tokens.padding, table)?;
    pass.reduce_dense(gradients, &layout.embedding_slice)?;
    Ok(())
}
