//! What sub-layers share while a step on a device is under way, and the norm that most of them begin with.

use lina_comm::{Comm, CommError, Work, WorkKind};
use lina_cuda::{Addend, CudaError, DType, Gpu, MAX_FEW_TOKENS, Mat, MatMut, Slice, SliceMut, few_matmul, matmul};

use super::weights::DenseWeights;
use crate::config::ModelConfig;
use crate::cuda::norm::Norm;
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
    /// Normalises `x` `[rows, hidden]` into `norm`, which all layers use in turn.
    pub fn normalise(&self, norm: &mut Norm, place: &NormPlace, x: Slice<'_>) -> Result<(), CudaError> {
        let vectors = (self.dense.vector(&place.weight), place.bias.as_ref().map(|bias| self.dense.vector(bias)));
        norm.normalise(self.gpu, vectors, self.config.norm_epsilon, x)
    }

    /// `y = x · weightᵀ`, plus `addend` (`[rows, n]`) if there is one: `x` is `[rows, k]`, `weight` `[n, k]`, `y` `[rows, n]`.
    pub fn product(
        &self,
        y: SliceMut<'_>,
        x: Slice<'_>,
        weight: Slice<'_>,
        [n, k]: [usize; 2],
        addend: Option<Slice<'_>>,
    ) -> Result<(), CudaError> {
        let rows = x.len() / k;
        // Of the step, not of these rows: a token's logits have the same bits whether or not others' are wanted.
        if self.tokens <= MAX_FEW_TOKENS {
            return few_matmul(self.gpu, x, weight, [n, k], addend, y);
        }
        let addend = addend.map_or(Addend::None, |addend| Addend::Add(Mat::new(addend, rows, n)));
        matmul(self.gpu, MatMut::new(y, rows, n), Mat::new(x, rows, k), Mat::new(weight, n, k).t(), addend)
    }

    /// Announces the computation that follows.
    pub fn work(&mut self, kind: WorkKind, layer: Option<usize>, flops: u64) -> Result<(), CommError> {
        self.comm.work(Work { kind, layer: layer.map(|layer| layer as u32), flops })
    }
}
