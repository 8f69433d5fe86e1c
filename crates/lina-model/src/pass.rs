//! What sub-layers share while a pass is under way.

use std::ops::Range;

use lina_comm::{Comm, CommError, GradientRegion, GroupId, SharedBuffer, Work, WorkKind};
use lina_kernels::{self as kernels, Compute, RotaryTable};

use crate::batch::{LoadedBatch, StepContext};
use crate::config::ModelConfig;
use crate::params::ParameterLayout;

/// A forward or backward pass under way on one rank.
pub(crate) struct Pass<'a> {
    pub compute: &'a Compute,
    pub config: &'a ModelConfig,
    pub layout: &'a ParameterLayout,
    /// With rotary positions.
    pub rotary: Option<&'a RotaryTable>,
    pub batch: &'a LoadedBatch,
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

    /// The batch's tokens and, where they are learned, positions as vectors: overwrites `embedded` `[tokens, hidden]`.
    pub fn embed(&mut self, dense: &[f32], embedded: &mut [f32]) -> Result<(), CommError> {
        self.work(WorkKind::Embedding, None, 0)?;
        kernels::embedding_forward(self.compute, &dense[self.layout.embedding.clone()], &self.batch.input, embedded);
        if let Some(positions) = &self.layout.positions {
            // With one row per token, the sum of a token's rows is its position's vector.
            let table = &dense[positions.clone()];
            kernels::gather_backward(self.compute, table, self.config.hidden, &self.batch.positions, embedded);
        }
        Ok(())
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
pub(crate) struct BackwardStream<'a> {
    /// What the sub-layer saw.
    pub x: &'a [f32],
    /// Gradient of the sub-layer's result, to which it adds what makes it the gradient of `x`.
    pub grad: &'a mut [f32],
    /// Scratch: gradient of the norm's output.
    pub grad_normed: &'a mut [f32],
}

/// A multiply-add is two operations.
pub(crate) fn product_flops(m: usize, n: usize, k: usize) -> u64 {
    2 * m as u64 * n as u64 * k as u64
}

/// Makes `values` at least `len` long. What is beyond an earlier length is zero; capacity grows by a quarter at least,
/// so that a slowly rising demand rarely allocates.
pub(crate) fn grow(values: &mut Vec<f32>, len: usize) {
    if values.len() < len {
        if values.capacity() < len {
            let target = len.max(values.capacity() + values.capacity() / 4);
            values.reserve_exact(target - values.len());
        }
        values.resize(len, 0.0);
    }
}
