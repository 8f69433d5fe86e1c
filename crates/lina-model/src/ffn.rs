//! Feed-forward networks: their nonlinearity, and the dense layers that stand between MoE layers.

use lina_comm::{CommError, SharedBuffer, WorkKind};
use lina_kernels::{self as kernels, Activation, Compute, Mat, MatMut};

use crate::config::{FfnKind, ModelConfig};
use crate::norm::Norm;
use crate::params::NormPlace;
use crate::pass::{Pass, grow, product_flops};

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

fn two_matrix(kind: FfnKind) -> Option<Activation> {
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

/// Its parameters.
#[derive(Clone, Debug)]
pub(crate) struct DenseFfnPlaces<'a> {
    /// `[input width, hidden]`.
    pub input: &'a std::ops::Range<usize>,
    /// `[hidden, inner]`.
    pub down: &'a std::ops::Range<usize>,
    pub norm: &'a NormPlace,
    pub slice: &'a std::ops::Range<usize>,
}

impl DenseFfn {
    pub fn new(config: &ModelConfig, layer: usize, max_tokens: usize) -> Self {
        DenseFfn { layer, norm: Norm::new(config, max_tokens), projected: vec![0.0; max_tokens * input_width(config)] }
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
        places: &DenseFfnPlaces<'_>,
        dense: &[f32],
        x: &[f32],
        y: &mut [f32],
    ) -> Result<(), CommError> {
        let config = pass.config;
        let (tokens, hidden, inner) = (pass.tokens(), config.hidden, config.dense_hidden);
        let width = input_width(config);
        pass.work(WorkKind::DenseFfn, Some(self.layer), product_flops(tokens, width + inner, hidden))?;
        self.norm.forward(pass, places.norm, dense, x);
        grow(&mut scratch.hidden, tokens * inner);
        let projected = &mut self.projected[..tokens * width];
        let units = &mut scratch.hidden[..tokens * inner];

        let normed = Mat::new(self.norm.output(tokens), tokens, hidden);
        let input = Mat::new(&dense[places.input.clone()], width, hidden);
        kernels::matmul(pass.compute, MatMut::new(projected, tokens, width), normed, input.t(), false);
        activate(pass.compute, config.ffn, inner, projected, units);
        y.copy_from_slice(x);
        let down = Mat::new(&dense[places.down.clone()], hidden, inner);
        let units = Mat::new(units, tokens, inner);
        kernels::matmul(pass.compute, MatMut::new(y, tokens, hidden), units, down.t(), true);
        Ok(())
    }

    /// Adds to `grad` `[tokens, hidden]`, the gradient of `y`, what makes it the gradient of `x`; finishes and hands
    /// over the layer's gradients.
    #[expect(clippy::too_many_arguments, reason = "the operands of one sub-layer's backward")]
    pub fn backward(
        &mut self,
        pass: &mut Pass<'_>,
        scratch: &mut FfnScratch,
        grad_normed: &mut [f32],
        places: &DenseFfnPlaces<'_>,
        dense: &[f32],
        gradients: &mut SharedBuffer,
        x: &[f32],
        grad: &mut [f32],
    ) -> Result<(), CommError> {
        let config = pass.config;
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

        let grad_y = Mat::new(grad, tokens, hidden);
        let down = Mat::new(&dense[places.down.clone()], hidden, inner);
        kernels::matmul(pass.compute, MatMut::new(grad_hidden, tokens, inner), grad_y, down, false);
        activate_backward(pass.compute, config.ffn, inner, projected, grad_hidden, grad_projected, units);

        let down_gradient = MatMut::new(gradients.range_mut(places.down.clone()), hidden, inner);
        let units = Mat::new(units, tokens, inner);
        kernels::matmul(pass.compute, down_gradient, grad_y.t(), units, pass.accumulate);
        let grad_projected = Mat::new(grad_projected, tokens, width);
        let normed = Mat::new(self.norm.output(tokens), tokens, hidden);
        let input_gradient = MatMut::new(gradients.range_mut(places.input.clone()), width, hidden);
        kernels::matmul(pass.compute, input_gradient, grad_projected.t(), normed, pass.accumulate);
        let input = Mat::new(&dense[places.input.clone()], width, hidden);
        kernels::matmul(pass.compute, MatMut::new(grad_normed, tokens, hidden), grad_projected, input, false);
        self.norm.backward(pass, places.norm, dense, gradients, x, grad_normed, grad);
        pass.reduce_dense(gradients, places.slice)
    }
}

fn input_width(config: &ModelConfig) -> usize {
    config.ffn.input_matrices() * config.dense_hidden
}
