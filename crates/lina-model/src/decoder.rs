//! The decoder: embedding, layers of attention and feed-forward, head and loss, and the way back.

use lina_comm::{Comm, CommError, SharedBuffer, WeightGradients, WorkKind};
use lina_kernels::{self as kernels, Compute, IGNORED, Mat, MatMut, RotaryTable};
use lina_plan::{ExpertLayout, Residency};

use crate::attention::{Attention, AttentionScratch};
use crate::batch::{Batch, ForwardOutput, LoadedBatch, StepContext, StepError};
use crate::config::{ConfigError, ModelConfig, PositionKind};
use crate::ffn::DenseFfn;
use crate::moe::{LayerRouting, Moe, MoeShared};
use crate::norm::Norm;
use crate::params::{ParameterLayout, Parameters};
use crate::pass::{BackwardStream, Pass, product_flops};
use crate::purpose::Purpose;
use crate::waiting::WaitingExperts;

/// Sizes that buffers are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelLimits {
    /// Most local tokens of a pass.
    pub max_tokens: usize,
    /// Longest sequence.
    pub max_sequence_tokens: usize,
    /// Most rows that routing may send to this rank's experts in one layer. Without a limit, the worst case is every
    /// assignment of every rank: `ranks * max_tokens * top_k` rows.
    pub max_expert_rows: Option<usize>,
}

/// One rank's part of a decoder: its weights, their gradients, and the activations of the pass under way.
///
/// Gradients are of the mean cross-entropy over the step's targets plus the router losses: each rank computes its
/// tokens' part, and the reduction sums. A first micro-batch overwrites them, later ones add.
pub struct Model {
    purpose: Purpose,
    config: ModelConfig,
    experts: ExpertLayout,
    layout: ParameterLayout,
    limits: ModelLimits,
    compute: Compute,
    parameters: Parameters,
    batch: LoadedBatch,
    step: StepContext,
    rotary: Option<RotaryTable>,
    /// Those that have [buffers](Purpose::buffered_layers).
    layers: Vec<Layer>,
    /// `[max_tokens, hidden]` each: the residual stream before each sub-layer and at the end, as far as it is
    /// [kept](Purpose::streams).
    residual: Vec<Vec<f32>>,
    final_norm: Norm,
    /// `[max_tokens, vocab]`: logits, or in training their gradient.
    logits: Vec<f32>,
    /// `[max_tokens]`.
    losses: Vec<f32>,
    /// `[max_tokens, hidden]`: gradient of the residual stream.
    grad: Vec<f32>,
    /// `[max_tokens, hidden]`: gradient of a norm's output.
    grad_normed: Vec<f32>,
    attention: AttentionScratch,
    moe: MoeShared,
}

struct Layer {
    attention: Attention,
    feed_forward: FeedForward,
}

enum FeedForward {
    Moe(Box<Moe>),
    Dense(DenseFfn),
}

impl Model {
    /// A model of zeros for `purpose` on `rank` of `experts`' ranks; initialise or load its
    /// [`parameters`](Self::parameters_mut).
    ///
    /// # Errors
    /// If the configuration is not valid, the layout is for another number of experts, or sequences may be longer
    /// than the model has positions.
    pub fn new(
        purpose: Purpose,
        config: ModelConfig,
        experts: ExpertLayout,
        rank: usize,
        compute: Compute,
        limits: ModelLimits,
    ) -> Result<Self, ConfigError> {
        check_model(&config, &experts, rank, &limits)?;
        let layout = ParameterLayout::new(&config, experts.held_by(rank));
        let max_tokens = limits.max_tokens;
        let rows_limit = limits.max_expert_rows.unwrap_or(usize::MAX);
        let rotary = match config.position {
            PositionKind::Rotary { theta } => {
                Some(RotaryTable::new(config.head_dim, limits.max_sequence_tokens, theta))
            }
            PositionKind::Learned => None,
        };
        let layers = purpose.buffered_layers(&config).into_iter().map(|layer| Layer {
            attention: Attention::new(&config, layer, max_tokens),
            feed_forward: if config.is_moe(layer) {
                FeedForward::Moe(Box::new(Moe::new(&config, layer, max_tokens)))
            } else {
                FeedForward::Dense(DenseFfn::new(&config, layer, max_tokens))
            },
        });
        let (parameters, backward_tokens) = match purpose {
            Purpose::Training => (Parameters::zeros(&layout), max_tokens),
            Purpose::Evaluation => (Parameters::without_gradients(&layout), 0),
        };
        let stream = |tokens: usize| vec![0.0; tokens * config.hidden];
        Ok(Model {
            parameters,
            batch: LoadedBatch::with_capacity(max_tokens),
            step: StepContext::evaluation(),
            rotary,
            layers: layers.collect(),
            residual: (0..purpose.streams(&config)).map(|_| stream(max_tokens)).collect(),
            final_norm: Norm::new(&config, max_tokens),
            logits: vec![0.0; max_tokens * config.vocab],
            losses: vec![0.0; max_tokens],
            grad: stream(backward_tokens),
            grad_normed: stream(backward_tokens),
            attention: AttentionScratch::new(&config, backward_tokens),
            moe: MoeShared::new(&config, &experts, rank, max_tokens, rows_limit),
            purpose,
            config,
            experts,
            layout,
            limits,
            compute,
        })
    }

    /// Gives the rank other experts between two passes: those of `experts`, with the weights `weights`
    /// (`[experts_len]` of the new [`layout`](Self::layout)). Dense parameters and their gradients stay where they are;
    /// gradients of experts are zeros.
    ///
    /// # Panics
    /// If the layout is for another number of ranks or experts, `weights` has another length, or the model is for
    /// evaluation.
    pub fn set_experts(&mut self, experts: ExpertLayout, weights: Vec<f32>) {
        assert_eq!(self.purpose, Purpose::Training, "experts move while they are trained");
        let (old, rank) = (&self.experts, self.moe.rank());
        assert_eq!((old.ranks(), old.experts()), (experts.ranks(), experts.experts()), "ranks and experts stay");
        self.layout = ParameterLayout::new(&self.config, experts.held_by(rank));
        assert_eq!(weights.len(), self.layout.experts_len(), "weights of every expert that the rank holds");
        self.parameters.expert_gradients = SharedBuffer::zeros(weights.len());
        self.parameters.experts = weights;
        self.moe.set_layout(&experts);
        self.experts = experts;
    }

    /// Says, between two passes, which layers' experts wait in host memory from now on; at first none do. On a device
    /// whose copies are emulated ([`Comm::emulate_copies`]) passes then take the time of those copies, or hide it.
    pub fn set_residency(&mut self, residency: Residency) {
        self.moe.waiting = WaitingExperts::new(residency);
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Which rank holds which experts.
    pub fn expert_layout(&self) -> &ExpertLayout {
        &self.experts
    }

    /// Where parameters lie in [`parameters`](Self::parameters).
    pub fn layout(&self) -> &ParameterLayout {
        &self.layout
    }

    /// The threads that this rank computes with.
    pub fn compute(&self) -> &Compute {
        &self.compute
    }

    /// This rank's parameters and gradients.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// As [`parameters`](Self::parameters), to write.
    pub fn parameters_mut(&mut self) -> &mut Parameters {
        &mut self.parameters
    }

    /// Everything that an update of the parameters needs.
    pub fn for_update(&mut self) -> (&Compute, &ParameterLayout, &mut Parameters) {
        (&self.compute, &self.layout, &mut self.parameters)
    }

    /// How `layer` routed the last forward's tokens; `None` if it has no experts, or the model is for evaluation.
    ///
    /// # Panics
    /// If there is no such layer in a model for training.
    pub fn routing(&self, layer: usize) -> Option<LayerRouting<'_>> {
        if self.purpose == Purpose::Evaluation {
            return None;
        }
        match &self.layers[layer].feed_forward {
            FeedForward::Moe(moe) => Some(moe.routing(&self.moe.routes)),
            FeedForward::Dense(_) => None,
        }
    }

    /// Logits of the last forward, `[tokens, vocab]`; `None` if it was for training, which replaces them.
    pub fn logits(&self) -> Option<&[f32]> {
        (!self.step.training).then(|| &self.logits[..self.batch.tokens() * self.config.vocab])
    }

    /// Runs a batch: losses, and in training everything that [`backward`](Self::backward) needs. All ranks call it
    /// together, those without tokens too.
    ///
    /// # Errors
    /// If the batch does not fit the model, routing exceeds the limit of rows, or the job fails.
    ///
    /// # Panics
    /// If the pass is for training and the model is not.
    pub fn forward(
        &mut self,
        comm: &mut Comm,
        batch: Batch<'_>,
        step: StepContext,
    ) -> Result<ForwardOutput, StepError> {
        assert!(!step.training || self.purpose == Purpose::Training, "the model is for evaluation");
        self.batch.load(batch, &self.config, self.limits.max_tokens, self.limits.max_sequence_tokens)?;
        self.step = step;
        let Model { config, layout, compute, parameters, batch, residual, layers, moe, rotary, .. } = self;
        let purpose = self.purpose;
        let mut output = ForwardOutput::default();
        let mut pass = Pass { compute, config, layout, rotary: rotary.as_ref(), batch, step, comm, accumulate: false };
        let elements = pass.tokens() * config.hidden;
        let dense = &parameters.dense;

        moe.waiting.begin(pass.comm, layout);
        pass.embed(dense, &mut residual[0][..elements])?;

        for number in 0..config.layers {
            let layer = &mut layers[purpose.buffers_of(config, number)];
            let first = purpose.stream_of(number);
            let [x, middle, y] = &mut residual[first..first + 3] else { unreachable!("three of a slice") };
            let (x, middle, y) = (&x[..elements], &mut middle[..elements], &mut y[..elements]);
            layer.attention.set_layer(number);
            layer.attention.forward(&mut pass, dense, x, middle)?;
            match &mut layer.feed_forward {
                FeedForward::Moe(layer) => {
                    layer.set_layer(number);
                    layer.forward(&mut pass, moe, parameters, middle, y)?;
                    output.add_routing(layer.outcome(config), &step);
                }
                FeedForward::Dense(layer) => {
                    layer.set_layer(number);
                    layer.forward(&mut pass, &mut moe.ffn, dense, middle, y)?;
                }
            }
            if purpose == Purpose::Evaluation {
                residual.swap(0, 2);
            }
        }
        self.forward_head(comm, output)
    }

    fn forward_head(&mut self, comm: &mut Comm, mut output: ForwardOutput) -> Result<ForwardOutput, StepError> {
        let Model { config, layout, compute, parameters, batch, residual, step, .. } = self;
        let (tokens, hidden, vocab) = (batch.tokens(), config.hidden, config.vocab);
        let mut pass = Pass { compute, config, layout, rotary: None, batch, step: *step, comm, accumulate: false };
        pass.work(WorkKind::Head, None, product_flops(tokens, vocab, hidden))?;
        let x = &residual[self.purpose.stream_of(config.layers)][..tokens * hidden];
        self.final_norm.forward(&pass, &layout.final_norm, &parameters.dense, x);
        let normed = Mat::new(self.final_norm.output(tokens), tokens, hidden);
        let weight = Mat::new(&parameters.dense[layout.lm_head.clone()], vocab, hidden);
        let logits = &mut self.logits[..tokens * vocab];
        kernels::matmul(compute, MatMut::new(logits, tokens, vocab), normed, weight.t(), false);
        let (target, losses) = (&pass.batch.target, &mut self.losses[..tokens]);
        if step.training {
            let scale = step.loss_scale() as f32;
            kernels::cross_entropy_forward_backward(compute, logits, target, scale, losses);
        } else {
            kernels::cross_entropy_forward(compute, logits, target, losses);
        }

        output.loss_sum = losses.iter().map(|&loss| f64::from(loss)).sum();
        output.target_tokens = target.iter().filter(|&&target| target != IGNORED).count() as u64;
        Ok(output)
    }

    /// Gradients of the last training forward; each sub-layer's are handed to `comm` as soon as they are final. With
    /// `accumulate` they are added to what is there, else they replace it.
    ///
    /// # Errors
    /// If the job fails.
    ///
    /// # Panics
    /// If the last forward was not for training: its logits are no gradient.
    pub fn backward(&mut self, comm: &mut Comm, accumulate: bool) -> Result<(), CommError> {
        assert!(self.step.training, "backward follows a forward for training");
        let Model { config, layout, compute, parameters, batch, residual, layers, moe, rotary, step, .. } = self;
        let (tokens, hidden, vocab) = (batch.tokens(), config.hidden, config.vocab);
        let elements = tokens * hidden;
        let mut pass = Pass { compute, config, layout, rotary: rotary.as_ref(), batch, step: *step, comm, accumulate };
        let mut stream = BackwardStream {
            x: &residual[2 * config.layers][..elements],
            grad: &mut self.grad[..elements],
            grad_normed: &mut self.grad_normed[..elements],
        };

        pass.work(WorkKind::Head, None, 2 * product_flops(tokens, vocab, hidden))?;
        let Parameters { dense, dense_gradients, .. } = parameters;
        let grad_logits = Mat::new(&self.logits[..tokens * vocab], tokens, vocab);
        let normed = Mat::new(self.final_norm.output(tokens), tokens, hidden);
        let weight_gradient = MatMut::new(dense_gradients.range_mut(layout.lm_head.clone()), vocab, hidden);
        kernels::matmul(compute, weight_gradient, grad_logits.t(), normed, accumulate);
        let weight = Mat::new(&dense[layout.lm_head.clone()], vocab, hidden);
        kernels::matmul(compute, MatMut::new(stream.grad_normed, tokens, hidden), grad_logits, weight, false);
        stream.grad.fill(0.0);
        self.final_norm.backward(&pass, &layout.final_norm, dense, dense_gradients, &mut stream);
        pass.reduce_dense(dense_gradients, &layout.head_slice)?;

        let deferring =
            pass.comm.ranks() > 1 && pass.comm.moe_shape().attention_gradients == WeightGradients::AfterSend;
        // Whether weight gradients of the attention above wait.
        let mut waiting = false;
        for number in (0..layers.len()).rev() {
            let (below, above) = layers.split_at_mut(number + 1);
            let layer = &mut below[number];
            stream.x = &residual[2 * number + 1][..elements];
            if let FeedForward::Moe(moe_layer) = &mut layer.feed_forward {
                let scratch = &self.attention;
                let above = above.first().filter(|_| std::mem::take(&mut waiting));
                let cover = |pass: &mut Pass<'_>, parameters: &mut Parameters| match above {
                    Some(above) => above.attention.weight_gradients(pass, scratch, &mut parameters.dense_gradients),
                    None => Ok(()),
                };
                moe_layer.backward(&mut pass, moe, parameters, &mut stream, cover)?;
            }
            let Parameters { dense, dense_gradients, .. } = &mut *parameters;
            if let FeedForward::Dense(layer) = &mut layer.feed_forward {
                layer.backward(&mut pass, &mut moe.ffn, dense, dense_gradients, &mut stream)?;
            }
            stream.x = &residual[2 * number][..elements];
            layer.attention.backward(&mut pass, &mut self.attention, dense, dense_gradients, &mut stream)?;
            waiting = deferring && number > 0 && config.is_moe(number - 1);
            if !waiting {
                layer.attention.weight_gradients(&mut pass, &self.attention, dense_gradients)?;
            }
        }

        pass.work(WorkKind::Embedding, None, 0)?;
        let gradients = &mut parameters.dense_gradients;
        if let Some(positions) = &layout.positions {
            let table = gradients.range_mut(positions.clone());
            if !accumulate {
                table.fill(0.0);
            }
            kernels::embedding_backward(compute, stream.grad, &pass.batch.positions, table);
        }
        if let Some(padding) = config.special_tokens.padding {
            let rows = stream.grad.chunks_exact_mut(hidden).zip(&pass.batch.input);
            rows.filter(|(_, id)| **id == padding).for_each(|(row, _)| row.fill(0.0));
        }
        let table = gradients.range_mut(layout.embedding.clone());
        if !accumulate && !config.tied_embeddings {
            table.fill(0.0);
        }
        kernels::embedding_backward(compute, stream.grad, &pass.batch.input, table);
        pass.reduce_dense(gradients, &layout.embedding_slice)
    }
}

/// Whether a model can be made for such a rank.
pub(crate) fn check_model(
    config: &ModelConfig,
    experts: &ExpertLayout,
    rank: usize,
    limits: &ModelLimits,
) -> Result<(), ConfigError> {
    config.validate("model")?;
    let error = |message: String| Err(ConfigError { place: "model".to_string(), message });
    if experts.experts() != config.experts {
        return error(format!("a layout of {} experts, expected {}", experts.experts(), config.experts));
    }
    if rank >= experts.ranks() {
        return error(format!("rank {rank}, expected one below {}", experts.ranks()));
    }
    if limits.max_sequence_tokens > config.max_positions {
        return error(format!(
            "sequences of {} tokens, expected at most max_positions = {}",
            limits.max_sequence_tokens, config.max_positions
        ));
    }
    Ok(())
}
