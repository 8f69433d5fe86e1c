//! The networks of layers without experts; one set of buffers for all of them.

use lina_comm::WorkKind;
use lina_cuda::{Addend, Buffer as DeviceBuffer, CudaError, DType, Gpu, Mat, MatMut, Slice, SliceMut, matmul};

use super::step::Step;
use crate::batch::StepError;
use crate::config::ModelConfig;
use crate::cuda::ffn::activate;
use crate::cuda::norm::Norm;
use crate::ffn::input_width;
use crate::pass::product_flops;

/// Buffers; rows are tokens. Empty in a model whose layers all have experts.
#[derive(Debug)]
pub(super) struct DenseFfn {
    /// `[max_tokens, input width]`.
    projected: DeviceBuffer,
    /// `[max_tokens, dense_hidden]`.
    units: DeviceBuffer,
}

impl DenseFfn {
    pub fn new(gpu: &Gpu, config: &ModelConfig, dtype: DType, max_tokens: usize) -> Result<Self, CudaError> {
        let rows = if config.dense_layers.is_empty() { 0 } else { max_tokens };
        Ok(DenseFfn {
            projected: gpu.uninit(rows * input_width(config), dtype)?,
            units: gpu.uninit(rows * config.dense_hidden, dtype)?,
        })
    }

    /// `y = x + network(norm(x))` of `layer`, both `[tokens, hidden]`.
    pub fn forward(
        &mut self,
        step: &mut Step<'_>,
        layer: usize,
        norm: &mut Norm,
        x: Slice<'_>,
        y: SliceMut<'_>,
    ) -> Result<(), StepError> {
        let (config, gpu, dense, tokens) = (step.config, step.gpu, step.dense, step.tokens);
        let places = &step.layout.layers[layer].feed_forward;
        let (input, down) = places.dense_matrices();
        let (hidden, inner, width) = (config.hidden, config.dense_hidden, input_width(config));
        step.work(WorkKind::DenseFfn, Some(layer), product_flops(tokens, width + inner, hidden))?;
        step.normalise(norm, &places.norm, x)?;
        let normed = Mat::new(norm.output(tokens), tokens, hidden);
        let input = Mat::new(dense.matrix(input), width, hidden);
        let projected = MatMut::new(self.projected.slice_mut(0..tokens * width), tokens, width);
        matmul(gpu, projected, normed, input.t(), Addend::None)?;
        let units = self.units.slice_mut(0..tokens * inner);
        activate(gpu, config.ffn, inner, self.projected.slice_mut(0..tokens * width), units)?;
        let down = Mat::new(dense.matrix(down), hidden, inner);
        let units = Mat::new(self.units.slice(0..tokens * inner), tokens, inner);
        let x = Addend::Add(Mat::new(x, tokens, hidden));
        matmul(gpu, MatMut::new(y, tokens, hidden), units, down.t(), x)?;
        Ok(())
    }
}
