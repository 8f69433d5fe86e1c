//! The weights that every token needs, on a device: once, in the type that products read.

use std::collections::HashMap;
use std::ops::Range;

use lina_cuda::{Buffer as DeviceBuffer, CudaError, DType, Gpu, Slice};

use crate::inference::InferenceWeights;
use crate::params::{NormPlace, ParameterLayout};

/// All weights but those of experts.
#[derive(Debug)]
pub(super) struct DenseWeights {
    /// `[dense_len]`.
    matrices: DeviceBuffer,
    /// Norms' vectors in f32 by the first of their elements, where `matrices` are of another type.
    vectors: HashMap<usize, DeviceBuffer>,
}

impl DenseWeights {
    pub fn new(gpu: &Gpu, weights: &InferenceWeights, dtype: DType) -> Result<Self, CudaError> {
        let matrices = gpu.buffer_from(weights.dense(), dtype)?;
        let mut vectors = HashMap::new();
        if dtype != DType::F32 {
            for range in norm_vectors(weights.layout()) {
                vectors.insert(range.start, gpu.buffer_from(&weights.dense()[range], DType::F32)?);
            }
        }
        Ok(DenseWeights { matrices, vectors })
    }

    /// Elements of a matrix, as products read them.
    pub fn matrix(&self, range: &Range<usize>) -> Slice<'_> {
        self.matrices.slice(range.clone())
    }

    /// A norm's vector, f32.
    pub fn vector(&self, range: &Range<usize>) -> Slice<'_> {
        self.vectors.get(&range.start).map_or_else(|| self.matrix(range), DeviceBuffer::whole)
    }
}

/// Where norms' weights and biases are.
fn norm_vectors(layout: &ParameterLayout) -> Vec<Range<usize>> {
    fn of_norm(place: &NormPlace) -> impl Iterator<Item = &Range<usize>> {
        std::iter::once(&place.weight).chain(&place.bias)
    }
    let layers = layout.layers.iter().flat_map(|layer| {
        let attention = &layer.attention;
        let heads = attention.query_norm.iter().chain(&attention.key_norm);
        of_norm(&attention.norm).chain(of_norm(&layer.feed_forward.norm)).chain(heads)
    });
    layers.chain(of_norm(&layout.final_norm)).cloned().collect()
}
