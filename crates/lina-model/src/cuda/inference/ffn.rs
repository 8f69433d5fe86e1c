//! The networks of layers without experts; one set of buffers for all of them.

use lina_comm::WorkKind;
use lina_cuda::{Buffer as DeviceBuffer, CudaError, DType, Gpu, Slice, SliceMut};

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
        let projected = self.projected.slice_mut(0..tokens * width);
        step.product(projected, norm.output(tokens), dense.matrix(input), [width, hidden], None)?;
        let units = self.units.slice_mut(0..tokens * inner);
        activate(gpu, config.ffn, inner, self.projected.slice_mut(0..tokens * width), units)?;
        step.product(y, self.units.slice(0..tokens * inner), dense.matrix(down), [hidden, inner], Some(x))?;
        Ok(())
    }
}
