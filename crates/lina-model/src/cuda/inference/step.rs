//! What sub-layers share while a step on a device is under way, and the norm that most of them begin with.

use lina_comm::{Comm, CommError, Work, WorkKind};
use lina_cuda::{self as cuda, Buffer as DeviceBuffer, CudaError, DType, Gpu, Slice};

use super::weights::DenseWeights;
use crate::config::{ModelConfig, NormKind};
use crate::params::{NormPlace, ParameterLayout};

/// A step under way on one rank.
pub(super) struct Step<'a> {
    pub gpu: &'a Gpu,
    pub dtype: DType,
    pub config: &'a ModelConfig,
    pub layout: &'a ParameterLayout,
    pub dense: &'a DenseWeights,
    /// Local tokens.
    pub tokens: usize,
    pub comm: &'a mut Comm,
}

impl Step<'_> {
    /// Announces the computation that follows.
    pub fn work(&mut self, kind: WorkKind, layer: Option<usize>, flops: u64) -> Result<(), CommError> {
        self.comm.work(Work { kind, layer: layer.map(|layer| layer as u32), flops })
    }
}

/// The output of a norm; one is used by all layers in turn.
#[derive(Debug)]
pub(super) struct Norm {
    /// `[max_tokens, hidden]`.
    output: DeviceBuffer,
    /// `[max_tokens]` each, f32: statistics, of which nobody makes use.
    mean: DeviceBuffer,
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

    /// The last result, `[rows, hidden]`.
    pub fn output(&self, rows: usize) -> Slice<'_> {
        self.output.slice(0..rows * self.hidden)
    }

    /// Normalises `x` `[rows, hidden]`.
    pub fn forward(&mut self, step: &Step<'_>, place: &NormPlace, x: Slice<'_>) -> Result<(), CudaError> {
        let (gpu, dense, epsilon) = (step.gpu, step.dense, step.config.norm_epsilon);
        let rows = x.len() / self.hidden;
        let output = self.output.slice_mut(0..x.len());
        let inverse = self.inverse.slice_mut(0..rows);
        let weight = dense.vector(&place.weight);
        match &place.bias {
            None => cuda::rms_norm_forward(gpu, x, weight, epsilon, output, inverse),
            Some(bias) => {
                let (bias, mean) = (dense.vector(bias), self.mean.slice_mut(0..rows));
                cuda::layer_norm_forward(gpu, x, weight, bias, epsilon, output, mean, inverse)
            }
        }
    }
}
