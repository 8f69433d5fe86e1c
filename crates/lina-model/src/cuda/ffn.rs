//! Feed-forward networks on a device: their nonlinearity, and the dense layers that stand between MoE layers.

use lina_comm::{SharedBuffer, WorkKind};
use lina_cuda::{
    self as cuda, Addend, Buffer as DeviceBuffer, CudaError, DType, Gpu, Mat, MatMut, Slice, SliceMut, matmul,
};

use super::norm::Norm;
use super::parameters::DeviceWeights;
use super::pass::{BackwardStream, Pass};
use crate::batch::StepError;
use crate::config::{FfnKind, ModelConfig};
use crate::ffn::{input_width, two_matrix};
use crate::pass::product_flops;

/// Hidden units from the input projection: `projected` is `[rows, 1 or 2 times inner]`, `hidden` `[rows, inner]`.
pub(crate) fn activate(
    gpu: &Gpu,
    kind: FfnKind,
    inner: usize,
    projected: SliceMut<'_>,
    hidden: SliceMut<'_>,
) -> Result<(), CudaError> {
    match two_matrix(kind) {
        None => cuda::swiglu_forward(gpu, projected.as_slice(), inner, hidden),
        Some(activation) => cuda::activation_forward(gpu, activation, projected, None, hidden),
    }
}

/// Backward of [`activate`]; `hidden` is computed again on the way.
pub(crate) fn activate_backward(
    gpu: &Gpu,
    kind: FfnKind,
    inner: usize,
    mut projected: SliceMut<'_>,
    grad_hidden: Slice<'_>,
    grad_projected: SliceMut<'_>,
    hidden: SliceMut<'_>,
) -> Result<(), CudaError> {
    match two_matrix(kind) {
        None => cuda::swiglu_backward(gpu, projected.as_slice(), inner, grad_hidden, grad_projected, Some(hidden)),
        Some(activation) => {
            cuda::activation_forward(gpu, activation, projected.reborrow(), None, hidden)?;
            cuda::activation_backward(gpu, activation, projected.as_slice(), grad_hidden, grad_projected)
        }
    }
}

/// Buffers of one network at work, shared by all layers; they grow to the most rows seen.
#[derive(Debug)]
pub(crate) struct FfnScratch {
    /// `[rows, inner]`.
    pub hidden: DeviceBuffer,
    /// `[rows, inner]`.
    pub grad_hidden: DeviceBuffer,
    /// `[rows, input width]`.
    pub grad_projected: DeviceBuffer,
}

impl FfnScratch {
    pub fn new(gpu: &Gpu, dtype: DType) -> Result<Self, CudaError> {
        let empty = || gpu.uninit(0, dtype);
        Ok(FfnScratch { hidden: empty()?, grad_hidden: empty()?, grad_projected: empty()? })
    }
}

/// A dense layer's feed-forward network with its norm.
#[derive(Debug)]
pub(crate) struct DenseFfn {
    layer: usize,
    norm: Norm,
    /// `[max_tokens, input width]`.
    projected: DeviceBuffer,
}

impl DenseFfn {
    pub fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        layer: usize,
        dtype: DType,
        max_tokens: usize,
    ) -> Result<Self, CudaError> {
        let projected = gpu.uninit(max_tokens * input_width(config), dtype)?;
        Ok(DenseFfn { layer, norm: Norm::new(gpu, config, dtype, max_tokens)?, projected })
    }

    /// Works for this layer from here on. If it is another one, what a forward left for its backward is lost.
    pub fn set_layer(&mut self, layer: usize) {
        self.layer = layer;
    }

    /// `y = x + network(norm(x))`, both `[tokens, hidden]`.
    pub fn forward(
        &mut self,
        pass: &mut Pass<'_>,
        scratch: &mut FfnScratch,
        weights: &DeviceWeights,
        x: Slice<'_>,
        y: SliceMut<'_>,
    ) -> Result<(), StepError> {
        let (config, gpu, tokens) = (pass.config, pass.gpu, pass.tokens());
        let places = &pass.layout.layers[self.layer].feed_forward;
        let (input, down) = places.dense_matrices();
        let (hidden, inner, width) = (config.hidden, config.dense_hidden, input_width(config));
        pass.work(WorkKind::DenseFfn, Some(self.layer), product_flops(tokens, width + inner, hidden))?;
        self.norm.forward(pass, &places.norm, weights, x)?;
        gpu.grow(&mut scratch.hidden, tokens * inner)?;

        let normed = Mat::new(self.norm.output(tokens), tokens, hidden);
        let input = Mat::new(weights.matrix(input), width, hidden);
        let projected = MatMut::new(self.projected.slice_mut(0..tokens * width), tokens, width);
        matmul(gpu, projected, normed, input.t(), Addend::None)?;
        let units = scratch.hidden.slice_mut(0..tokens * inner);
        activate(gpu, config.ffn, inner, self.projected.slice_mut(0..tokens * width), units)?;
        let down = Mat::new(weights.matrix(down), hidden, inner);
        let units = Mat::new(scratch.hidden.slice(0..tokens * inner), tokens, inner);
        let x = Addend::Add(Mat::new(x, tokens, hidden));
        matmul(gpu, MatMut::new(y, tokens, hidden), units, down.t(), x)?;
        Ok(())
    }

    /// Takes the stream's gradient back through the network; finishes and hands over the layer's gradients.
    pub fn backward(
        &mut self,
        pass: &mut Pass<'_>,
        scratch: &mut FfnScratch,
        weights: &DeviceWeights,
        gradients: &mut SharedBuffer,
        stream: &mut BackwardStream<'_>,
    ) -> Result<(), StepError> {
        let (config, gpu, tokens) = (pass.config, pass.gpu, pass.tokens());
        let places = &pass.layout.layers[self.layer].feed_forward;
        let (input, down) = places.dense_matrices();
        let (hidden, inner, width) = (config.hidden, config.dense_hidden, input_width(config));
        pass.work(WorkKind::DenseFfn, Some(self.layer), 2 * product_flops(tokens, width + inner, hidden))?;
        gpu.grow(&mut scratch.hidden, tokens * inner)?;
        gpu.grow(&mut scratch.grad_hidden, tokens * inner)?;
        gpu.grow(&mut scratch.grad_projected, tokens * width)?;
        let (unit_range, projected_range) = (0..tokens * inner, 0..tokens * width);

        let grad_y = stream.grad.as_slice();
        let down_weight = Mat::new(weights.matrix(down), hidden, inner);
        let grad_hidden = MatMut::new(scratch.grad_hidden.slice_mut(unit_range.clone()), tokens, inner);
        matmul(gpu, grad_hidden, Mat::new(grad_y, tokens, hidden), down_weight, Addend::None)?;
        activate_backward(
            gpu,
            config.ffn,
            inner,
            self.projected.slice_mut(projected_range.clone()),
            scratch.grad_hidden.slice(unit_range.clone()),
            scratch.grad_projected.slice_mut(projected_range.clone()),
            scratch.hidden.slice_mut(unit_range.clone()),
        )?;

        let (units, grad_projected) = (scratch.hidden.slice(unit_range), scratch.grad_projected.slice(projected_range));
        pass.weight_gradient(gradients.device_range_mut(down.clone()), grad_y, hidden, units, inner)?;
        let normed = self.norm.output(tokens);
        pass.weight_gradient(gradients.device_range_mut(input.clone()), grad_projected, width, normed, hidden)?;
        let input_weight = Mat::new(weights.matrix(input), width, hidden);
        let grad_normed = MatMut::new(stream.grad_normed.reborrow(), tokens, hidden);
        matmul(gpu, grad_normed, Mat::new(grad_projected, tokens, width), input_weight, Addend::None)?;
        self.norm.backward(pass, &places.norm, weights, gradients, stream)?;
        pass.reduce_dense(gradients, &places.slice)?;
        Ok(())
    }
}
