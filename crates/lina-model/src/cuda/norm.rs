//! Normalisation of the residual stream, with what its backward needs.

use lina_comm::SharedBuffer;
use lina_cuda::{self as cuda, Buffer as DeviceBuffer, CudaError, DType, Gpu, Slice};

use super::parameters::DeviceWeights;
use super::pass::{BackwardStream, Pass};
use crate::config::{ModelConfig, NormKind};
use crate::params::NormPlace;

/// One norm's output and statistics.
#[derive(Debug)]
pub(crate) struct Norm {
    /// `[max_tokens, hidden]`.
    output: DeviceBuffer,
    /// `[max_tokens]`, of LayerNorm.
    mean: DeviceBuffer,
    /// `[max_tokens]`: 1 / root mean square, or 1 / standard deviation.
    inverse: DeviceBuffer,
    hidden: usize,
}

impl Norm {
    pub fn new(gpu: &Gpu, config: &ModelConfig, dtype: DType, max_tokens: usize) -> Result<Self, CudaError> {
        let means = if config.norm == NormKind::Layer { max_tokens } else { 0 };
        Ok(Norm {
            output: gpu.uninit(max_tokens * config.hidden, dtype)?,
            mean: gpu.uninit(means, DType::F32)?,
            inverse: gpu.uninit(max_tokens, DType::F32)?,
            hidden: config.hidden,
        })
    }

    /// The last forward's result, `[tokens, hidden]`.
    pub fn output(&self, tokens: usize) -> Slice<'_> {
        self.output.slice(0..tokens * self.hidden)
    }

    /// Normalises `x` `[tokens, hidden]`.
    pub fn forward(
        &mut self,
        pass: &Pass<'_>,
        place: &NormPlace,
        weights: &DeviceWeights,
        x: Slice<'_>,
    ) -> Result<(), CudaError> {
        let vectors = (weights.vector(&place.weight), place.bias.as_ref().map(|bias| weights.vector(bias)));
        self.normalise(pass.gpu, vectors, pass.config.norm_epsilon, x)
    }

    /// Normalises `x` `[rows, hidden]` with `weight` and, for LayerNorm, `bias`.
    pub fn normalise(
        &mut self,
        gpu: &Gpu,
        (weight, bias): (Slice<'_>, Option<Slice<'_>>),
        epsilon: f32,
        x: Slice<'_>,
    ) -> Result<(), CudaError> {
        let rows = x.len() / self.hidden;
        let output = self.output.slice_mut(0..x.len());
        let inverse = self.inverse.slice_mut(0..rows);
        match bias {
            None => cuda::rms_norm_forward(gpu, x, weight, epsilon, output, inverse),
            Some(bias) => {
                let mean = self.mean.slice_mut(0..rows);
                cuda::layer_norm_forward(gpu, x, weight, bias, epsilon, output, mean, inverse)
            }
        }
    }

    /// Adds the gradient of the norm's input to the stream's, given that of its output.
    pub fn backward(
        &self,
        pass: &Pass<'_>,
        place: &NormPlace,
        weights: &DeviceWeights,
        gradients: &mut SharedBuffer,
        stream: &mut BackwardStream<'_>,
    ) -> Result<(), CudaError> {
        let BackwardStream { x, grad, grad_normed } = stream;
        let (gpu, tokens) = (pass.gpu, pass.tokens());
        let (grad, grad_normed) = (grad.reborrow(), grad_normed.as_slice());
        let inverse = self.inverse.slice(0..tokens);
        let weight = weights.vector(&place.weight);
        pass.begin_gradient(gradients.device_range_mut(place.whole()))?;
        let Some(bias) = &place.bias else {
            let grad_weight = gradients.device_range_mut(place.weight.clone());
            return cuda::rms_norm_backward(gpu, *x, weight, inverse, grad_normed, grad, grad_weight);
        };
        let mean = self.mean.slice(0..tokens);
        let mut grads = gradients.device_range_mut(place.whole());
        let (grad_weight, grad_bias) = grads.split_at_mut(bias.start - place.weight.start);
        cuda::layer_norm_backward(gpu, *x, weight, mean, inverse, grad_normed, grad, grad_weight, grad_bias)
    }
}
