//! Self-attention of new tokens over cached keys and values; one set of buffers for all layers.

use lina_comm::WorkKind;
use lina_cuda::{self as cuda, Buffer as DeviceBuffer, CudaError, DType, Gpu, PagedPlan, RotaryTable, Slice, SliceMut};

use super::step::Step;
use crate::attention::{normed_heads, optional_widths, rotated_heads};
use crate::batch::StepError;
use crate::config::ModelConfig;
use crate::cuda::norm::Norm;
use crate::params::AttentionPlaces;
use crate::pass::product_flops;

/// What the layers of a step have in common.
pub(super) struct CachedStep<'a> {
    /// Positions of the tokens, `[tokens]`.
    pub positions: Slice<'a>,
    pub plan: &'a PagedPlan,
    /// With rotary positions.
    pub rotary: Option<&'a RotaryTable>,
    /// Pairs of a new token and one that it sees.
    pub visible_pairs: u64,
}

/// Buffers; rows are tokens.
#[derive(Debug)]
pub(super) struct Attention {
    norm: Norm,
    /// Queries, keys and values before the norms of queries and keys; empty without such norms.
    raw: DeviceBuffer,
    /// Statistics of those norms, of which nobody makes use.
    query_inverse: DeviceBuffer,
    key_inverse: DeviceBuffer,
    /// `[tokens, qkv_width]`, as attention sees them.
    qkv: DeviceBuffer,
    /// `[tokens, query_width]`.
    output: DeviceBuffer,
}

impl Attention {
    pub fn new(gpu: &Gpu, config: &ModelConfig, dtype: DType, max_tokens: usize) -> Result<Self, CudaError> {
        let [raw, query_inverses, key_inverses, _] = optional_widths(config);
        let rows = |width: usize, dtype: DType| gpu.uninit(max_tokens * width, dtype);
        Ok(Attention {
            norm: Norm::new(gpu, config, dtype, max_tokens)?,
            raw: rows(raw, dtype)?,
            query_inverse: rows(query_inverses, DType::F32)?,
            key_inverse: rows(key_inverses, DType::F32)?,
            qkv: rows(config.qkv_width(), dtype)?,
            output: rows(config.query_width(), dtype)?,
        })
    }

    /// `y = x + attention(norm(x))` of `layer`, both `[tokens, hidden]`; new keys and values join those in `cache`
    /// (`[pages, page_elements]`).
    pub fn forward(
        &mut self,
        step: &mut Step<'_>,
        cached: &CachedStep<'_>,
        layer: usize,
        mut cache: SliceMut<'_>,
        x: Slice<'_>,
        y: SliceMut<'_>,
    ) -> Result<(), StepError> {
        let (config, gpu, tokens) = (step.config, step.gpu, step.tokens);
        let (hidden, width, query_width) = (config.hidden, config.qkv_width(), config.query_width());
        let projections = product_flops(tokens, width, hidden) + product_flops(tokens, hidden, query_width);
        let scores = 2 * product_flops(config.heads, config.head_dim, 1) * cached.visible_pairs;
        step.work(WorkKind::Attention, Some(layer), projections + scores)?;
        let places = &step.layout.layers[layer].attention;
        step.normalise(&mut self.norm, &places.norm, x)?;
        self.project(step, places)?;
        if let Some(limit) = config.clip_qkv {
            cuda::clamp(gpu, self.qkv.slice_mut(0..tokens * width), limit)?;
        }
        if let Some(table) = cached.rotary {
            let qkv = self.qkv.slice_mut(0..tokens * width);
            cuda::rotary_forward(gpu, table, cached.positions, rotated_heads(config), qkv)?;
        }
        let qkv = self.qkv.slice(0..tokens * width);
        cuda::paged_append(gpu, cached.plan, qkv, cache.reborrow())?;
        let output = self.output.slice_mut(0..tokens * query_width);
        cuda::paged_attention(gpu, cached.plan, qkv, cache.as_slice(), output)?;
        let output = self.output.slice(0..tokens * query_width);
        Ok(step.product(y, output, step.dense.matrix(&places.output), [hidden, query_width], Some(x))?)
    }

    /// Queries, keys and values from the normed input, with their norm if there is one.
    fn project(&mut self, step: &Step<'_>, places: &AttentionPlaces) -> Result<(), CudaError> {
        let (config, gpu, tokens) = (step.config, step.gpu, step.tokens);
        let (hidden, width) = (config.hidden, config.qkv_width());
        let (normed, weight) = (self.norm.output(tokens), step.dense.matrix(&places.qkv));
        let (Some(query_norm), Some(key_norm)) = (&places.query_norm, &places.key_norm) else {
            return step.product(self.qkv.slice_mut(0..tokens * width), normed, weight, [width, hidden], None);
        };
        // One product for all; values, which have no norm, move to where attention reads beside the norms' results.
        step.product(self.raw.slice_mut(0..tokens * width), normed, weight, [width, hidden], None)?;
        let raw = self.raw.slice(0..tokens * width);
        let (queries, keys) = normed_heads(config);
        for (heads, weight, inverse) in
            [(queries, query_norm, &mut self.query_inverse), (keys, key_norm, &mut self.key_inverse)]
        {
            let inverse = inverse.slice_mut(0..tokens * heads.heads);
            let qkv = self.qkv.slice_mut(0..tokens * width);
            let weight = step.dense.vector(weight);
            cuda::head_rms_norm_forward(gpu, heads, raw, weight, config.norm_epsilon, qkv, inverse)?;
        }
        let values = config.query_width() + config.key_width()..width;
        gpu.copy_columns(raw, self.qkv.slice_mut(0..tokens * width), width, values)
    }
}
