//! Feed-forward networks: their nonlinearity, and the dense layers that stand between MoE layers.

use lina_comm::{CommError, SharedBuffer, WorkKind};
use lina_kernels::{self as kernels, Activation, Compute, Mat, MatMut};

use crate::config::{FfnKind, ModelConfig};
use crate::norm::Norm;
use crate::pass::{BackwardStream, Pass, grow, product_flops};

/// Hidden units from the input projection: `projected` is `[rows, 1 or 2 times inner]`, `hidden` `[rows, inner]`.
pub(crate) fn activate(compute: &Compute, kind: FfnKind, inner: usize, projected: &mut [f32], hidden: &mut [f32]) {
    match two_matrix(kind) {
        None => kernels::swiglu_forward(compute, projected, inner, hidden),
        Some(activation) => kernels::activation_forward(compute, activation, projected, None, hidden),
    }
}

/// Backward of [`activate`]; `hidden` is computed again on the way.
pub(crate) fn activate_backward(
    compute: &Compute,
    kind: FfnKind,
    inner: usize,
    projected: &mut [f32],
    grad_hidden: &[f32],
    grad_projected: &mut [f32],
    hidden: &mut [f32],
) {
    match two_matrix(kind) {
        None => kernels::swiglu_backward(compute, projected, inner, grad_hidden, grad_projected, Some(hidden)),
        Some(activation) => {
            kernels::activation_forward(compute, activation, projected, None, hidden);
            kernels::activation_backward(compute, activation, projected, grad_hidden, grad_projected);
        }
    }
}

/// The nonlinearity of a network of two matrices; `None` with a gate.
pub(crate) fn two_matrix(kind: FfnKind) -> Option<Activation> {
    match kind {
        FfnKind::SwiGlu => None,
        FfnKind::Relu => Some(Activation::Relu),
        FfnKind::Gelu => Some(Activation::GeluTanh),
    }
}

/// Buffers of one network at work, shared by all layers; they grow to the most rows seen.
#[derive(Debug, Default)]
pub(crate) struct FfnScratch {
    /// `[rows, inner]`.
    pub hidden: Vec<f32>,
    /// `[rows, inner]`.
    pub grad_hidden: Vec<f32>,
    /// `[rows, input width]`.
    pub grad_projected: Vec<f32>,
}

/// A dense layer's feed-forward network with its norm.
#[derive(Debug)]
pub(crate) struct DenseFfn {
    layer: usize,
    norm: Norm,
    /// `[max_tokens, input width]`.
    projected: Vec<f32>,
}

impl DenseFfn {
    pub fn new(config: &ModelConfig, layer: usize, max_tokens: usize) -> Self {
        DenseFfn { layer, norm: Norm::new(config, max_tokens), projected: vec![0.0; max_tokens * input_width(config)] }
    }

    /// Works for this layer from here on. If it is another one, what a forward left for its backward is lost.
    pub fn set_layer(&mut self, layer: usize) {
        self.layer = layer;
    }

    /// Elements held.
    pub fn elements(config: &ModelConfig, max_tokens: usize) -> usize {
        Norm::elements(config, max_tokens) + max_tokens * input_width(config)
    }

    /// `y = x + network(norm(x))`, both `[tokens, hidden]`.
    pub fn forward(
        &mut self,
        pass: &mut Pass<'_>,
        scratch: &mut FfnScratch,
        dense: &[f32],
        x: &[f32],
        y: &mut [f32],
    ) -> Result<(), CommError> {
        let (config, places) = (pass.config, &pass.layout.layers[self.layer].feed_forward);
        let (input, down) = places.dense_matrices();
        let (tokens, hidden, inner) = (pass.tokens(), config.hidden, config.dense_hidden);
        let width = input_width(config);
        pass.work(WorkKind::DenseFfn, Some(self.layer), product_flops(tokens, width + inner, hidden))?;
        self.norm.forward(pass, &places.norm, dense, x);
        grow(&mut scratch.hidden, tokens * inner);
        let projected = &mut self.projected[..tokens * width];
        let units = &mut scratch.hidden[..tokens * inner];

        let normed = Mat::new(self.norm.output(tokens), tokens, hidden);
        let input_weight = Mat::new(&dense[input.clone()], width, hidden);
        kernels::matmul(pass.compute, MatMut::new(projected, tokens, width), normed, input_weight.t(), false);
        activate(pass.compute, config.ffn, inner, projected, units);
        y.copy_from_slice(x);
        let down_weight = Mat::new(&dense[down.clone()], hidden, inner);
        let units = Mat::new(units, tokens, inner);
        kernels::matmul(pass.compute, MatMut::new(y, tokens, hidden), units, down_weight.t(), true);
        Ok(())
    }

    /// Takes the stream's gradient back through the network; finishes and hands over the layer's gradients.
    pub fn backward(
        &mut self,
        pass: &mut Pass<'_>,
        scratch: &mut FfnScratch,
        dense: &[f32],
        gradients: &mut SharedBuffer,
        stream: &mut BackwardStream<'_>,
    ) -> Result<(), CommError> {
        let (config, places) = (pass.config, &pass.layout.layers[self.layer].feed_forward);
        let (input, down) = places.dense_matrices();
        let (tokens, hidden, inner) = (pass.tokens(), config.hidden, config.dense_hidden);
        let width = input_width(config);
        pass.work(WorkKind::DenseFfn, Some(self.layer), 2 * product_flops(tokens, width + inner, hidden))?;
        grow(&mut scratch.hidden, tokens * inner);
        grow(&mut scratch.grad_hidden, tokens * inner);
        grow(&mut scratch.grad_projected, tokens * width);
        let units = &mut scratch.hidden[..tokens * inner];
        let grad_hidden = &mut scratch.grad_hidden[..tokens * inner];
        let grad_projected = &mut scratch.grad_projected[..tokens * width];
        let projected = &mut self.projected[..tokens * width];

        let grad_y = Mat::new(stream.grad, tokens, hidden);
        let down_weight = Mat::new(&dense[down.clone()], hidden, inner);
        kernels::matmul(pass.compute, MatMut::new(grad_hidden, tokens, inner), grad_y, down_weight, false);
        activate_backward(pass.compute, config.ffn, inner, projected, grad_hidden, grad_projected, units);

        let down_gradient = MatMut::new(gradients.range_mut(down.clone()), hidden, inner);
        let units = Mat::new(units, tokens, inner);
        kernels::matmul(pass.compute, down_gradient, grad_y.t(), units, pass.accumulate);
        let grad_projected = Mat::new(grad_projected, tokens, width);
        let normed = Mat::new(self.norm.output(tokens), tokens, hidden);
        let input_gradient = MatMut::new(gradients.range_mut(input.clone()), width, hidden);
        kernels::matmul(pass.compute, input_gradient, grad_projected.t(), normed, pass.accumulate);
        let input_weight = Mat::new(&dense[input.clone()], width, hidden);
        kernels::matmul(
            pass.compute,
            MatMut::new(stream.grad_normed, tokens, hidden),
            grad_projected,
            input_weight,
            false,
        );
        self.norm.backward(pass, &places.norm, dense, gradients, stream);
        pass.reduce_dense(gradients, &places.slice)
    }
}

pub(crate) fn input_width(config: &ModelConfig) -> usize {
    config.ffn.input_matrices() * config.dense_hidden
}
