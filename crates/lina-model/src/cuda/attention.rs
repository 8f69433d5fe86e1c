//! Self-attention with its norm, projections, query and key norms, clipping and rotary positions.

use lina_comm::{SharedBuffer, WorkKind};
use lina_cuda::{
    self as cuda, Addend, Buffer as DeviceBuffer, CudaError, DType, Gpu, Mat, MatMut, Slice, SliceMut, matmul,
};

use super::norm::Norm;
use super::parameters::DeviceWeights;
use super::pass::{BackwardStream, Pass};
use crate::attention::{normed_heads, optional_widths, rotated_heads};
use crate::batch::StepError;
use crate::config::ModelConfig;
use crate::params::AttentionPlaces;
use crate::pass::product_flops;

/// One layer's attention: what its forward leaves for its backward. Rows are tokens.
#[derive(Debug)]
pub(crate) struct Attention {
    layer: usize,
    norm: Norm,
    /// Queries and keys before their norm, in the columns that they have in `qkv`; empty without such a norm.
    raw: DeviceBuffer,
    /// 1 / root mean square of each normed group of queries.
    query_inverse: DeviceBuffer,
    key_inverse: DeviceBuffer,
    /// Queries, keys and values before clipping; empty without clipping.
    unclipped: DeviceBuffer,
    /// `[tokens, qkv_width]`, as attention sees them.
    qkv: DeviceBuffer,
    /// `[tokens, query_width]`.
    output: DeviceBuffer,
    /// `[tokens, heads]`: log-sum-exp of the scores.
    log_sum_exp: DeviceBuffer,
}

/// Gradients under way, shared by all layers.
#[derive(Debug)]
pub(crate) struct AttentionScratch {
    /// `[max_tokens, qkv_width]`.
    grad_qkv: DeviceBuffer,
    /// `[max_tokens, query_width]`.
    grad_output: DeviceBuffer,
    /// `[max_tokens, hidden]`: gradient of the layer's result, kept for weight gradients that wait.
    grad_result: DeviceBuffer,
}

impl AttentionScratch {
    pub fn new(gpu: &Gpu, config: &ModelConfig, dtype: DType, max_tokens: usize) -> Result<Self, CudaError> {
        Ok(AttentionScratch {
            grad_qkv: gpu.uninit(max_tokens * config.qkv_width(), dtype)?,
            grad_output: gpu.uninit(max_tokens * config.query_width(), dtype)?,
            grad_result: gpu.uninit(max_tokens * config.hidden, dtype)?,
        })
    }
}

impl Attention {
    pub fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        layer: usize,
        dtype: DType,
        max_tokens: usize,
    ) -> Result<Self, CudaError> {
        let [raw, query_inverses, key_inverses, unclipped] = optional_widths(config);
        let rows = |width: usize, dtype: DType| gpu.uninit(max_tokens * width, dtype);
        Ok(Attention {
            layer,
            norm: Norm::new(gpu, config, dtype, max_tokens)?,
            raw: rows(raw, dtype)?,
            query_inverse: rows(query_inverses, DType::F32)?,
            key_inverse: rows(key_inverses, DType::F32)?,
            unclipped: rows(unclipped, dtype)?,
            qkv: rows(config.qkv_width(), dtype)?,
            output: rows(config.query_width(), dtype)?,
            log_sum_exp: rows(config.heads, DType::F32)?,
        })
    }

    /// Works for this layer from here on. If it is another one, what a forward left for its backward is lost.
    pub fn set_layer(&mut self, layer: usize) {
        self.layer = layer;
    }

    /// `y = x + attention(norm(x))`, both `[tokens, hidden]`.
    pub fn forward(
        &mut self,
        pass: &mut Pass<'_>,
        weights: &DeviceWeights,
        x: Slice<'_>,
        y: SliceMut<'_>,
    ) -> Result<(), StepError> {
        let (config, tokens, gpu) = (pass.config, pass.tokens(), pass.gpu);
        let (hidden, width, query_width) = (config.hidden, config.qkv_width(), config.query_width());
        let projections = product_flops(tokens, width, hidden) + product_flops(tokens, hidden, query_width);
        let scores =
            2 * product_flops(config.heads, config.head_dim, 1) * pass.batch.visible_pairs(config.sliding_window);
        pass.work(WorkKind::Attention, Some(self.layer), projections + scores)?;
        let places = &pass.layout.layers[self.layer].attention;
        self.norm.forward(pass, &places.norm, weights, x)?;
        self.project(pass, places, weights)?;
        if let Some(limit) = config.clip_qkv {
            gpu.copy(self.qkv.slice(0..tokens * width), self.unclipped.slice_mut(0..tokens * width))?;
            cuda::clamp(gpu, self.qkv.slice_mut(0..tokens * width), limit)?;
        }
        if let Some(table) = pass.rotary {
            let qkv = self.qkv.slice_mut(0..tokens * width);
            cuda::rotary_forward(gpu, table, pass.positions(), rotated_heads(config), qkv)?;
        }
        cuda::attention_forward(
            gpu,
            &pass.on_device.attention,
            self.qkv.slice(0..tokens * width),
            self.output.slice_mut(0..tokens * query_width),
            self.log_sum_exp.slice_mut(0..tokens * config.heads),
        )?;
        let weight = Mat::new(weights.matrix(&places.output), hidden, query_width);
        let output = Mat::new(self.output.slice(0..tokens * query_width), tokens, query_width);
        let x = Addend::Add(Mat::new(x, tokens, hidden));
        matmul(gpu, MatMut::new(y, tokens, hidden), output, weight.t(), x)?;
        Ok(())
    }

    /// Queries, keys and values from the normed input, with their norm if there is one.
    fn project(&mut self, pass: &Pass<'_>, places: &AttentionPlaces, weights: &DeviceWeights) -> Result<(), CudaError> {
        let (config, gpu) = (pass.config, pass.gpu);
        let (tokens, hidden, width) = (pass.tokens(), config.hidden, config.qkv_width());
        let normed = Mat::new(self.norm.output(tokens), tokens, hidden);
        let weight = Mat::new(weights.matrix(&places.qkv), width, hidden);
        let (Some(query_norm), Some(key_norm)) = (&places.query_norm, &places.key_norm) else {
            let qkv = MatMut::new(self.qkv.slice_mut(0..tokens * width), tokens, width);
            return matmul(gpu, qkv, normed, weight.t(), Addend::None);
        };
        // One product for all; values, which have no norm, move to where attention reads beside the norms' results.
        let raw = MatMut::new(self.raw.slice_mut(0..tokens * width), tokens, width);
        matmul(gpu, raw, normed, weight.t(), Addend::None)?;
        let (queries, keys) = normed_heads(config);
        for (heads, weight, inverse) in
            [(queries, query_norm, &mut self.query_inverse), (keys, key_norm, &mut self.key_inverse)]
        {
            let inverse = inverse.slice_mut(0..tokens * heads.heads);
            let qkv = self.qkv.slice_mut(0..tokens * width);
            let raw = self.raw.slice(0..tokens * width);
            let weight = weights.vector(weight);
            cuda::head_rms_norm_forward(gpu, heads, raw, weight, config.norm_epsilon, qkv, inverse)?;
        }
        let values = config.query_width() + config.key_width()..width;
        let (raw, qkv) = (self.raw.slice(0..tokens * width), self.qkv.slice_mut(0..tokens * width));
        gpu.copy_columns(raw, qkv, width, values)
    }

    /// Takes the stream's gradient back through the layer's attention. Its gradients are finished and handed over by
    /// [`weight_gradients`](Self::weight_gradients), before the next layer's attention takes `scratch`.
    pub fn backward(
        &mut self,
        pass: &mut Pass<'_>,
        scratch: &mut AttentionScratch,
        weights: &DeviceWeights,
        gradients: &mut SharedBuffer,
        stream: &mut BackwardStream<'_>,
    ) -> Result<(), StepError> {
        let (config, gpu, tokens) = (pass.config, pass.gpu, pass.tokens());
        let places = &pass.layout.layers[self.layer].attention;
        let (hidden, width, query_width) = (config.hidden, config.qkv_width(), config.query_width());
        let projections = product_flops(tokens, width, hidden) + product_flops(tokens, hidden, query_width);
        // Scores are computed again; then the gradients of values, probabilities, queries and keys.
        let scores =
            5 * product_flops(config.heads, config.head_dim, 1) * pass.batch.visible_pairs(config.sliding_window);
        pass.work(WorkKind::Attention, Some(self.layer), projections + scores)?;

        let grad_y = stream.grad.as_slice();
        gpu.copy(grad_y, scratch.grad_result.slice_mut(0..tokens * hidden))?;
        let weight = Mat::new(weights.matrix(&places.output), hidden, query_width);
        let grad_output = MatMut::new(scratch.grad_output.slice_mut(0..tokens * query_width), tokens, query_width);
        matmul(gpu, grad_output, Mat::new(grad_y, tokens, hidden), weight, Addend::None)?;

        cuda::attention_backward(
            gpu,
            &pass.on_device.attention,
            self.qkv.slice(0..tokens * width),
            self.output.slice(0..tokens * query_width),
            self.log_sum_exp.slice(0..tokens * config.heads),
            scratch.grad_output.slice(0..tokens * query_width),
            scratch.grad_qkv.slice_mut(0..tokens * width),
        )?;
        if let Some(table) = pass.rotary {
            let grad_qkv = scratch.grad_qkv.slice_mut(0..tokens * width);
            cuda::rotary_backward(gpu, table, pass.positions(), rotated_heads(config), grad_qkv)?;
        }
        if let Some(limit) = config.clip_qkv {
            let grad_qkv = scratch.grad_qkv.slice_mut(0..tokens * width);
            cuda::clamp_backward(gpu, self.unclipped.slice(0..tokens * width), limit, grad_qkv)?;
        }
        if let (Some(query_norm), Some(key_norm)) = (&places.query_norm, &places.key_norm) {
            let (queries, keys) = normed_heads(config);
            for (heads, place, inverse) in
                [(queries, query_norm, &self.query_inverse), (keys, key_norm, &self.key_inverse)]
            {
                pass.begin_gradient(gradients.device_range_mut(place.clone()))?;
                let weight_gradient = gradients.device_range_mut(place.clone());
                let raw = self.raw.slice(0..tokens * width);
                let inverse = inverse.slice(0..tokens * heads.heads);
                let grad_qkv = scratch.grad_qkv.slice_mut(0..tokens * width);
                let weight = weights.vector(place);
                cuda::head_rms_norm_backward(gpu, heads, raw, weight, inverse, grad_qkv, weight_gradient)?;
            }
        }

        let grad_projected = Mat::new(scratch.grad_qkv.slice(0..tokens * width), tokens, width);
        let weight = Mat::new(weights.matrix(&places.qkv), width, hidden);
        let grad_normed = MatMut::new(stream.grad_normed.reborrow(), tokens, hidden);
        matmul(gpu, grad_normed, grad_projected, weight, Addend::None)?;
        self.norm.backward(pass, &places.norm, weights, gradients, stream)?;
        Ok(())
    }

    /// Weight gradients of the projections, from what [`backward`](Self::backward) left in `scratch`; hands over all
    /// of the layer's gradients.
    pub fn weight_gradients(
        &self,
        pass: &mut Pass<'_>,
        scratch: &AttentionScratch,
        gradients: &mut SharedBuffer,
    ) -> Result<(), StepError> {
        let (config, tokens) = (pass.config, pass.tokens());
        let places = &pass.layout.layers[self.layer].attention;
        let (hidden, width, query_width) = (config.hidden, config.qkv_width(), config.query_width());
        let flops = product_flops(tokens, width, hidden) + product_flops(tokens, hidden, query_width);
        pass.work(WorkKind::AttentionWeightGradient, Some(self.layer), flops)?;

        let (grad_y, output) =
            (scratch.grad_result.slice(0..tokens * hidden), self.output.slice(0..tokens * query_width));
        let gradient = gradients.device_range_mut(places.output.clone());
        pass.weight_gradient(gradient, grad_y, hidden, output, query_width)?;
        let (grad_projected, normed) = (scratch.grad_qkv.slice(0..tokens * width), self.norm.output(tokens));
        let gradient = gradients.device_range_mut(places.qkv.clone());
        pass.weight_gradient(gradient, grad_projected, width, normed, hidden)?;
        pass.reduce_dense(gradients, &places.slice)?;
        Ok(())
    }
}
