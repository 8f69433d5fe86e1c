//! Self-attention with its norm, projections, query and key norms, clipping and rotary positions.

use lina_comm::{CommError, SharedBuffer, WorkKind};
use lina_kernels::{self as kernels, AttentionShape, HeadLayout, Mat, MatMut, PagedSequence, PagedShape, Product};

use crate::config::{ModelConfig, QkNorm};
use crate::norm::Norm;
use crate::params::AttentionPlaces;
use crate::pass::{BackwardStream, Pass, product_flops};

/// One layer's attention: what its forward leaves for its backward. Rows are tokens.
#[derive(Debug)]
pub(crate) struct Attention {
    layer: usize,
    norm: Norm,
    /// Queries and keys before their norm, in the columns that they have in `qkv`; empty without such a norm.
    raw: Vec<f32>,
    /// 1 / root mean square of each normed group of queries.
    query_inverse: Vec<f32>,
    key_inverse: Vec<f32>,
    /// Queries, keys and values before clipping; empty without clipping.
    unclipped: Vec<f32>,
    /// `[tokens, qkv_width]`, as attention sees them.
    qkv: Vec<f32>,
    /// `[tokens, query_width]`.
    output: Vec<f32>,
    /// `[tokens, heads]`: log-sum-exp of the scores.
    log_sum_exp: Vec<f32>,
}

/// One layer's cached keys and values, and the sequences of a pass that go on from them.
#[derive(Debug)]
pub(crate) struct CachedLayer<'a> {
    pub sequences: &'a [PagedSequence<'a>],
    /// Pairs of a new token and one that it sees.
    pub visible_pairs: u64,
    /// `[pages, page_elements]`.
    pub pages: &'a mut [f32],
}

/// Gradients under way, shared by all layers.
#[derive(Debug)]
pub(crate) struct AttentionScratch {
    /// `[max_tokens, qkv_width]`.
    grad_qkv: Vec<f32>,
    /// `[max_tokens, query_width]`.
    grad_output: Vec<f32>,
    /// `[max_tokens, hidden]`: gradient of the layer's result, kept for weight gradients that wait.
    grad_result: Vec<f32>,
}

impl AttentionScratch {
    pub fn new(config: &ModelConfig, max_tokens: usize) -> Self {
        AttentionScratch {
            grad_qkv: vec![0.0; max_tokens * config.qkv_width()],
            grad_output: vec![0.0; max_tokens * config.query_width()],
            grad_result: vec![0.0; max_tokens * config.hidden],
        }
    }

    /// Elements held.
    pub fn elements(config: &ModelConfig, max_tokens: usize) -> usize {
        max_tokens * (config.qkv_width() + config.query_width() + config.hidden)
    }
}

/// Numbers per token of the optional buffers: raw projections, inverses of queries and of keys, unclipped.
pub(crate) fn optional_widths(config: &ModelConfig) -> [usize; 4] {
    let (query_inverses, key_inverses) = match config.qk_norm {
        QkNorm::None => (0, 0),
        QkNorm::PerHead => (config.heads, config.kv_heads),
        QkNorm::WholeProjection => (1, 1),
    };
    let raw = if config.qk_norm == QkNorm::None { 0 } else { config.qkv_width() };
    let unclipped = if config.clip_qkv.is_none() { 0 } else { config.qkv_width() };
    [raw, query_inverses, key_inverses, unclipped]
}

impl Attention {
    pub fn new(config: &ModelConfig, layer: usize, max_tokens: usize) -> Self {
        let zeros = |width: usize| vec![0.0; max_tokens * width];
        let [raw, query_inverses, key_inverses, unclipped] = optional_widths(config).map(zeros);
        Attention {
            layer,
            norm: Norm::new(config, max_tokens),
            raw,
            query_inverse: query_inverses,
            key_inverse: key_inverses,
            unclipped,
            qkv: zeros(config.qkv_width()),
            output: zeros(config.query_width()),
            log_sum_exp: zeros(config.heads),
        }
    }

    /// Works for this layer from here on. If it is another one, what a forward left for its backward is lost.
    pub fn set_layer(&mut self, layer: usize) {
        self.layer = layer;
    }

    /// Elements held.
    pub fn elements(config: &ModelConfig, max_tokens: usize) -> usize {
        let per_token = config.qkv_width() + config.query_width() + config.heads;
        let optional: usize = optional_widths(config).iter().sum();
        Norm::elements(config, max_tokens) + max_tokens * (per_token + optional)
    }

    /// `y = x + attention(norm(x))`, both `[tokens, hidden]`.
    pub fn forward(&mut self, pass: &mut Pass<'_>, dense: &[f32], x: &[f32], y: &mut [f32]) -> Result<(), CommError> {
        self.announce(pass, pass.batch.visible_pairs(pass.config.sliding_window))?;
        self.queries_keys_values(pass, dense, x);
        let (config, tokens) = (pass.config, pass.tokens());
        let qkv = &self.qkv[..tokens * config.qkv_width()];
        let output = &mut self.output[..tokens * config.query_width()];
        let log_sum_exp = &mut self.log_sum_exp[..tokens * config.heads];
        kernels::attention_forward(pass.compute, &shape(pass), qkv, output, log_sum_exp);
        self.add_output(pass, dense, x, y);
        Ok(())
    }

    /// As [`forward`](Self::forward), for sequences that go on: their keys and values join those that are cached, and
    /// tokens attend to all of them.
    pub fn forward_cached(
        &mut self,
        pass: &mut Pass<'_>,
        dense: &[f32],
        cached: CachedLayer<'_>,
        x: &[f32],
        y: &mut [f32],
    ) -> Result<(), CommError> {
        let CachedLayer { sequences, visible_pairs, pages: cache } = cached;
        self.announce(pass, visible_pairs)?;
        self.queries_keys_values(pass, dense, x);
        let (config, tokens) = (pass.config, pass.tokens());
        let shape = PagedShape {
            window: config.sliding_window,
            ..PagedShape::fused(sequences, config.heads, config.kv_heads, config.head_dim)
        };
        let qkv = &self.qkv[..tokens * config.qkv_width()];
        kernels::paged_append(pass.compute, &shape, qkv, cache);
        kernels::paged_attention(pass.compute, &shape, qkv, cache, &mut self.output[..tokens * config.query_width()]);
        self.add_output(pass, dense, x, y);
        Ok(())
    }

    /// Announces the layer's products over the pass's tokens.
    fn announce(&self, pass: &mut Pass<'_>, visible_pairs: u64) -> Result<(), CommError> {
        let (config, tokens) = (pass.config, pass.tokens());
        let projections = product_flops(tokens, config.qkv_width(), config.hidden)
            + product_flops(tokens, config.hidden, config.query_width());
        let scores = 2 * product_flops(config.heads, config.head_dim, 1) * visible_pairs;
        pass.work(WorkKind::Attention, Some(self.layer), projections + scores)
    }

    /// Norm, projections, clipping and rotation: `qkv` as attention sees it.
    fn queries_keys_values(&mut self, pass: &Pass<'_>, dense: &[f32], x: &[f32]) {
        let (config, places) = (pass.config, &pass.layout.layers[self.layer].attention);
        self.norm.forward(pass, &places.norm, dense, x);
        self.project(pass, places, dense);
        let qkv = &mut self.qkv[..pass.tokens() * config.qkv_width()];
        if let Some(limit) = config.clip_qkv {
            self.unclipped[..qkv.len()].copy_from_slice(qkv);
            kernels::clamp(pass.compute, qkv, limit);
        }
        if let Some(table) = pass.rotary {
            kernels::rotary_forward(pass.compute, table, &pass.batch.positions, rotated_heads(config), qkv);
        }
    }

    /// `y = x + ` the output projection of what attention found.
    fn add_output(&self, pass: &Pass<'_>, dense: &[f32], x: &[f32], y: &mut [f32]) {
        let (config, tokens) = (pass.config, pass.tokens());
        y.copy_from_slice(x);
        let weight = &dense[pass.layout.layers[self.layer].attention.output.clone()];
        let weight = Mat::new(weight, config.hidden, config.query_width());
        let output = Mat::new(&self.output[..tokens * config.query_width()], tokens, config.query_width());
        kernels::matmul(pass.compute, MatMut::new(y, tokens, config.hidden), output, weight.t(), true);
    }

    /// Queries, keys and values from the normed input, with their norm if there is one.
    fn project(&mut self, pass: &Pass<'_>, places: &AttentionPlaces, dense: &[f32]) {
        let config = pass.config;
        let (tokens, hidden, width) = (pass.tokens(), config.hidden, config.qkv_width());
        let normed = Mat::new(self.norm.output(tokens), tokens, hidden);
        let weight = &dense[places.qkv.clone()];
        let qkv = &mut self.qkv[..tokens * width];
        let (Some(query_norm), Some(key_norm)) = (&places.query_norm, &places.key_norm) else {
            let weight = Mat::new(weight, width, hidden);
            kernels::matmul(pass.compute, MatMut::new(qkv, tokens, width), normed, weight.t(), false);
            return;
        };
        // Values have no norm: their product writes where attention reads, beside the norms' results.
        let raw = &mut self.raw[..tokens * width];
        let normed_width = config.query_width() + config.key_width();
        let (normed_weight, value_weight) = weight.split_at(normed_width * hidden);
        let values = qkv.get_mut(normed_width..).unwrap_or_default();
        kernels::matmul_grouped(
            pass.compute,
            [
                Product {
                    c: MatMut::with_stride(raw, tokens, normed_width, width),
                    a: normed,
                    b: Mat::new(normed_weight, normed_width, hidden).t(),
                    accumulate: false,
                },
                Product {
                    c: MatMut::with_stride(values, tokens, config.key_width(), width),
                    a: normed,
                    b: Mat::new(value_weight, config.key_width(), hidden).t(),
                    accumulate: false,
                },
            ],
        );
        let (queries, keys) = normed_heads(config);
        for (heads, weight, inverse) in
            [(queries, query_norm, &mut self.query_inverse), (keys, key_norm, &mut self.key_inverse)]
        {
            let inverse = &mut inverse[..tokens * heads.heads];
            let weight = &dense[weight.clone()];
            kernels::head_rms_norm_forward(pass.compute, heads, raw, weight, config.norm_epsilon, qkv, inverse);
        }
    }

    /// Takes the stream's gradient back through the layer's attention. Its gradients are finished and handed over by
    /// [`weight_gradients`](Self::weight_gradients), before the next layer's attention takes `scratch`.
    pub fn backward(
        &mut self,
        pass: &mut Pass<'_>,
        scratch: &mut AttentionScratch,
        dense: &[f32],
        gradients: &mut SharedBuffer,
        stream: &mut BackwardStream<'_>,
    ) -> Result<(), CommError> {
        let (config, places) = (pass.config, &pass.layout.layers[self.layer].attention);
        let (tokens, hidden, width) = (pass.tokens(), config.hidden, config.qkv_width());
        let query_width = config.query_width();
        let projections = product_flops(tokens, width, hidden) + product_flops(tokens, hidden, query_width);
        // Scores are computed again; then the gradients of values, probabilities, queries and keys.
        let scores =
            5 * product_flops(config.heads, config.head_dim, 1) * pass.batch.visible_pairs(config.sliding_window);
        pass.work(WorkKind::Attention, Some(self.layer), projections + scores)?;

        let qkv = &self.qkv[..tokens * width];
        let output = &self.output[..tokens * query_width];
        let log_sum_exp = &self.log_sum_exp[..tokens * config.heads];
        let grad_output = &mut scratch.grad_output[..tokens * query_width];
        let grad_qkv = &mut scratch.grad_qkv[..tokens * width];

        let grad_y = Mat::new(stream.grad, tokens, hidden);
        scratch.grad_result[..tokens * hidden].copy_from_slice(stream.grad);
        let weight = Mat::new(&dense[places.output.clone()], hidden, query_width);
        kernels::matmul(pass.compute, MatMut::new(grad_output, tokens, query_width), grad_y, weight, false);

        kernels::attention_backward(pass.compute, &shape(pass), qkv, output, log_sum_exp, grad_output, grad_qkv);
        if let Some(table) = pass.rotary {
            kernels::rotary_backward(pass.compute, table, &pass.batch.positions, rotated_heads(config), grad_qkv);
        }
        if let Some(limit) = config.clip_qkv {
            kernels::clamp_backward(pass.compute, &self.unclipped[..grad_qkv.len()], limit, grad_qkv);
        }
        if let (Some(query_norm), Some(key_norm)) = (&places.query_norm, &places.key_norm) {
            let raw = &self.raw[..tokens * width];
            let (queries, keys) = normed_heads(config);
            for (heads, weight, inverse) in
                [(queries, query_norm, &self.query_inverse), (keys, key_norm, &self.key_inverse)]
            {
                let weight_gradient = gradients.range_mut(weight.clone());
                if !pass.accumulate {
                    weight_gradient.fill(0.0);
                }
                let inverse = &inverse[..tokens * heads.heads];
                let weight = &dense[weight.clone()];
                kernels::head_rms_norm_backward(pass.compute, heads, raw, weight, inverse, grad_qkv, weight_gradient);
            }
        }

        let grad_projected = Mat::new(grad_qkv, tokens, width);
        let weight = Mat::new(&dense[places.qkv.clone()], width, hidden);
        kernels::matmul(pass.compute, MatMut::new(stream.grad_normed, tokens, hidden), grad_projected, weight, false);
        self.norm.backward(pass, &places.norm, dense, gradients, stream);
        Ok(())
    }

    /// Weight gradients of the projections, from what [`backward`](Self::backward) left in `scratch`; hands over all
    /// of the layer's gradients.
    pub fn weight_gradients(
        &self,
        pass: &mut Pass<'_>,
        scratch: &AttentionScratch,
        gradients: &mut SharedBuffer,
    ) -> Result<(), CommError> {
        let (config, places) = (pass.config, &pass.layout.layers[self.layer].attention);
        let (tokens, hidden, width, query_width) =
            (pass.tokens(), config.hidden, config.qkv_width(), config.query_width());
        let flops = product_flops(tokens, width, hidden) + product_flops(tokens, hidden, query_width);
        pass.work(WorkKind::AttentionWeightGradient, Some(self.layer), flops)?;

        let grad_y = Mat::new(&scratch.grad_result[..tokens * hidden], tokens, hidden);
        let output = Mat::new(&self.output[..tokens * query_width], tokens, query_width);
        let weight_gradient = MatMut::new(gradients.range_mut(places.output.clone()), hidden, query_width);
        kernels::matmul(pass.compute, weight_gradient, grad_y.t(), output, pass.accumulate);

        let grad_projected = Mat::new(&scratch.grad_qkv[..tokens * width], tokens, width);
        let normed = Mat::new(self.norm.output(tokens), tokens, hidden);
        let weight_gradient = MatMut::new(gradients.range_mut(places.qkv.clone()), width, hidden);
        kernels::matmul(pass.compute, weight_gradient, grad_projected.t(), normed, pass.accumulate);
        pass.reduce_dense(gradients, &places.slice)
    }
}

fn shape<'a>(pass: &Pass<'a>) -> AttentionShape<'a> {
    let config = pass.config;
    let sequences = &pass.batch.sequences;
    AttentionShape {
        window: config.sliding_window,
        ..AttentionShape::fused(sequences, config.heads, config.kv_heads, config.head_dim)
    }
}

/// Queries and keys lie side by side and turn alike.
pub(crate) fn rotated_heads(config: &ModelConfig) -> HeadLayout {
    HeadLayout {
        offset: 0,
        heads: config.heads + config.kv_heads,
        head_dim: config.head_dim,
        row_stride: config.qkv_width(),
    }
}

/// What is normed as one: each head, or the whole projection.
pub(crate) fn normed_heads(config: &ModelConfig) -> (HeadLayout, HeadLayout) {
    let layout = |offset: usize, heads: usize| match config.qk_norm {
        QkNorm::WholeProjection => {
            HeadLayout { offset, heads: 1, head_dim: heads * config.head_dim, row_stride: config.qkv_width() }
        }
        QkNorm::None | QkNorm::PerHead => {
            HeadLayout { offset, heads, head_dim: config.head_dim, row_stride: config.qkv_width() }
        }
    };
    (layout(0, config.heads), layout(config.query_width(), config.kv_heads))
}
