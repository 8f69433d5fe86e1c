//! What sub-layers share while a pass on a device is under way.

use std::ops::Range;

use lina_comm::{Comm, CommError, GradientRegion, GroupId, SharedBuffer, Work, WorkKind};
use lina_cuda::{
    Addend, AttentionPlan, Buffer as DeviceBuffer, CudaError, DType, Gpu, Mat, MatMut, RotaryTable, Slice, SliceMut,
    matmul,
};
use lina_kernels::{AttentionShape, Sequence};

use crate::batch::{LoadedBatch, StepContext};
use crate::config::ModelConfig;
use crate::params::ParameterLayout;

/// A batch's numbers on the device.
#[derive(Debug)]
pub(crate) struct DeviceBatch {
    /// `[max_tokens]` each.
    pub input: DeviceBuffer,
    pub target: DeviceBuffer,
    pub positions: DeviceBuffer,
    pub attention: AttentionPlan,
}

/// A forward or backward pass under way on one rank.
pub(crate) struct Pass<'a> {
    pub gpu: &'a Gpu,
    pub dtype: DType,
    pub config: &'a ModelConfig,
    pub layout: &'a ParameterLayout,
    /// With rotary positions.
    pub rotary: Option<&'a RotaryTable>,
    pub batch: &'a LoadedBatch,
    pub on_device: &'a DeviceBatch,
    pub step: StepContext,
    pub comm: &'a mut Comm,
    /// Whether gradients are added to those of an earlier micro-batch, or replace what is there.
    pub accumulate: bool,
}

impl Pass<'_> {
    /// Number of local tokens.
    pub fn tokens(&self) -> usize {
        self.batch.tokens()
    }

    /// Announces the computation that follows.
    pub fn work(&mut self, kind: WorkKind, layer: Option<usize>, flops: u64) -> Result<(), CommError> {
        self.comm.work(Work { kind, layer: layer.map(|layer| layer as u32), flops })
    }

    /// Positions of the pass's tokens.
    pub fn positions(&self) -> Slice<'_> {
        self.on_device.positions.slice(0..self.tokens())
    }

    /// What a weight's gradient is added to.
    pub fn addend(&self) -> Addend<'static> {
        if self.accumulate { Addend::Accumulate } else { Addend::None }
    }

    /// The gradient of a matrix `[outputs, inputs]`, given that of its product's rows `[tokens, outputs]` and those rows'
    /// inputs `[tokens, inputs]`.
    pub fn weight_gradient(
        &self,
        gradient: SliceMut<'_>,
        grad_rows: Slice<'_>,
        outputs: usize,
        input_rows: Slice<'_>,
        inputs: usize,
    ) -> Result<(), CudaError> {
        let (grad_rows, input_rows) =
            (Mat::new(grad_rows, self.tokens(), outputs), Mat::new(input_rows, self.tokens(), inputs));
        matmul(self.gpu, MatMut::new(gradient, outputs, inputs), grad_rows.t(), input_rows, self.addend())
    }

    /// Sets gradients that kernels add to to zero, unless there are some of an earlier micro-batch.
    pub fn begin_gradient(&self, gradient: SliceMut<'_>) -> Result<(), CudaError> {
        if self.accumulate { Ok(()) } else { self.gpu.fill_zero(gradient) }
    }

    /// Hands a finished slice of the dense gradients over.
    pub fn reduce_dense(&mut self, gradients: &mut SharedBuffer, slice: &Range<usize>) -> Result<(), CommError> {
        self.comm.reduce_gradient(GradientRegion {
            group: GroupId::WORLD,
            elements: slice.len(),
            local: Some((gradients, slice.clone())),
        })
    }
}

/// The residual stream at one sub-layer, on the way back. All are `[tokens, hidden]`.
#[derive(Debug)]
pub(crate) struct BackwardStream<'a> {
    /// What the sub-layer saw.
    pub x: Slice<'a>,
    /// Gradient of the sub-layer's result, to which it adds what makes it the gradient of `x`.
    pub grad: SliceMut<'a>,
    /// Scratch: gradient of the norm's output.
    pub grad_normed: SliceMut<'a>,
}

/// How attention goes over `sequences`.
pub(crate) fn attention_plan(
    gpu: &Gpu,
    config: &ModelConfig,
    dtype: DType,
    sequences: &[Sequence],
) -> Result<AttentionPlan, CudaError> {
    let shape = AttentionShape {
        window: config.sliding_window,
        ..AttentionShape::fused(sequences, config.heads, config.kv_heads, config.head_dim)
    };
    let tokens = sequences.iter().map(|sequence| sequence.rows).sum();
    AttentionPlan::new(gpu, &shape, tokens, dtype)
}
