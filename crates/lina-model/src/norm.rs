//! Normalisation of the residual stream, with what its backward needs.

use lina_comm::SharedBuffer;
use lina_kernels as kernels;

use crate::config::{ModelConfig, NormKind};
use crate::params::NormPlace;
use crate::pass::{BackwardStream, Pass};

/// One norm's output and statistics.
#[derive(Debug)]
pub(crate) struct Norm {
    /// `[max_tokens, hidden]`.
    output: Vec<f32>,
    /// `[max_tokens]`, of LayerNorm.
    mean: Vec<f32>,
    /// `[max_tokens]`: 1 / root mean square, or 1 / standard deviation.
    inverse: Vec<f32>,
}

impl Norm {
    pub fn new(config: &ModelConfig, max_tokens: usize) -> Self {
        let means = if config.norm == NormKind::Layer { max_tokens } else { 0 };
        Norm { output: vec![0.0; max_tokens * config.hidden], mean: vec![0.0; means], inverse: vec![0.0; max_tokens] }
    }

    /// Elements held for `max_tokens` tokens.
    pub fn elements(config: &ModelConfig, max_tokens: usize) -> usize {
        max_tokens * (config.hidden + if config.norm == NormKind::Layer { 2 } else { 1 })
    }

    /// The last forward's result, `[tokens, hidden]`.
    pub fn output(&self, tokens: usize) -> &[f32] {
        let width = self.output.len() / self.inverse.len().max(1);
        &self.output[..tokens * width]
    }

    /// Normalises `x` `[tokens, hidden]`.
    pub fn forward(&mut self, pass: &Pass<'_>, place: &NormPlace, dense: &[f32], x: &[f32]) {
        self.forward_rows(pass, place, dense, x, pass.tokens());
    }

    /// Normalises `x` `[rows, hidden]`, rows of some other number than the pass's tokens.
    pub fn forward_rows(&mut self, pass: &Pass<'_>, place: &NormPlace, dense: &[f32], x: &[f32], rows: usize) {
        let output = &mut self.output[..x.len()];
        let inverse = &mut self.inverse[..rows];
        let weight = &dense[place.weight.clone()];
        let epsilon = pass.config.norm_epsilon;
        match &place.bias {
            None => kernels::rms_norm_forward(pass.compute, x, weight, epsilon, output, inverse),
            Some(bias) => {
                let (bias, mean) = (&dense[bias.clone()], &mut self.mean[..rows]);
                kernels::layer_norm_forward(pass.compute, x, weight, bias, epsilon, output, mean, inverse);
            }
        }
    }

    /// Adds the gradient of the norm's input to the stream's, given that of its output.
    pub fn backward(
        &self,
        pass: &Pass<'_>,
        place: &NormPlace,
        dense: &[f32],
        gradients: &mut SharedBuffer,
        stream: &mut BackwardStream<'_>,
    ) {
        let BackwardStream { x, grad, grad_normed } = stream;
        let tokens = pass.tokens();
        let inverse = &self.inverse[..tokens];
        let weight = &dense[place.weight.clone()];
        let grads = gradients.range_mut(place.whole());
        if !pass.accumulate {
            grads.fill(0.0);
        }
        if place.bias.is_none() {
            kernels::rms_norm_backward(pass.compute, x, weight, inverse, grad_normed, grad, grads);
        } else {
            let (grad_weight, grad_bias) = grads.split_at_mut(weight.len());
            let mean = &self.mean[..tokens];
            kernels::layer_norm_backward(
                pass.compute,
                x,
                weight,
                mean,
                inverse,
                grad_normed,
                grad,
                grad_weight,
                grad_bias,
            );
        }
    }
}
