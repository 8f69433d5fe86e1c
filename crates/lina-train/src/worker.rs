//! One rank's share of the training: its model, its optimizer, its part of every batch.

use lina_comm::{Comm, StepStats, Work, WorkKind};
use lina_data::{Dataset, TrainingData};
use lina_kernels::Compute;
use lina_model::{Batch, ForwardOutput, Model, ModelLimits, StepContext};
use lina_plan::{ExpertLayout, share_range};

use crate::TrainError;
use crate::config::RunConfig;
use crate::optimizer::{AdamW, learning_rate};

/// What a step came to: the same on all ranks, except `stats`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepOutcome {
    /// Mean cross-entropy of the step's targets.
    pub(crate) loss: f64,
    /// Router losses, coefficients included.
    pub(crate) router_loss: f64,
    /// Norm of the whole gradient before clipping.
    pub(crate) grad_norm: f64,
    pub(crate) learning_rate: f64,
    /// Targets.
    pub(crate) tokens: u64,
    /// Share of assignments that exceeded their expert's capacity.
    pub(crate) drop_rate: f64,
    pub(crate) stats: StepStats,
    /// Rank 0 was asked to stop.
    pub(crate) stop: bool,
}

pub(crate) struct Worker<'a> {
    config: &'a RunConfig,
    data: &'a TrainingData,
    rank: usize,
    ranks: usize,
    pub(crate) model: Model,
    pub(crate) optimizer: AdamW,
    input: Vec<u32>,
    target: Vec<u32>,
    sequences: Vec<usize>,
    message: Vec<f64>,
}

/// Largest number of sequences that a rank gets of a micro-batch.
pub(crate) fn local_sequences(config: &RunConfig, ranks: usize) -> usize {
    config.train.batch_sequences.div_ceil(config.train.micro_batches).div_ceil(ranks)
}

/// Sizes of a rank's buffers.
pub(crate) fn model_limits(config: &RunConfig, ranks: usize) -> ModelLimits {
    let sequence = config.train.sequence_tokens;
    ModelLimits {
        max_tokens: local_sequences(config, ranks) * sequence,
        max_sequence_tokens: sequence,
        max_expert_rows: None,
    }
}

impl<'a> Worker<'a> {
    pub(crate) fn new(
        config: &'a RunConfig,
        data: &'a TrainingData,
        experts: &ExpertLayout,
        rank: usize,
    ) -> Result<Self, TrainError> {
        let ranks = experts.ranks();
        let compute = Compute::new(config.cluster.threads_of(ranks));
        let limits = model_limits(config, ranks);
        let model =
            Model::new(config.model.clone(), experts.clone(), rank, compute, limits).map_err(TrainError::input)?;
        let optimizer = AdamW::new(&model, rank);
        let message = Vec::with_capacity(STATIC_VALUES + optimizer.squares_len());
        Ok(Worker {
            config,
            data,
            rank,
            ranks,
            model,
            optimizer,
            input: Vec::with_capacity(limits.max_tokens),
            target: Vec::with_capacity(limits.max_tokens),
            sequences: Vec::with_capacity(limits.max_tokens),
            message,
        })
    }

    /// Fills in this rank's part of `batch`, which has `n` sequences of `dataset`. Returns the first token's index
    /// within it.
    fn load(&mut self, dataset: &Dataset, n: usize, batch: impl Iterator<Item = usize>) -> u64 {
        self.input.clear();
        self.target.clear();
        self.sequences.clear();
        let mine = share_range(n, self.ranks, self.rank);
        for index in batch.skip(mine.start).take(mine.len()) {
            let (input, target) = dataset.sequence(index);
            self.input.extend(input);
            self.target.extend(target);
            if self.config.train.document_masking {
                let mut start = 0;
                for next in dataset.document_starts(index).filter(|&at| at > 0).chain([input.len()]) {
                    self.sequences.push(next - start);
                    start = next;
                }
            } else {
                self.sequences.push(input.len());
            }
        }
        (mine.start * dataset.sequence_tokens()) as u64
    }

    /// Trains on the batch of `step`. `stop` is rank 0's wish to end the run.
    pub(crate) fn step(&mut self, comm: &mut Comm, step: u64, stop: bool) -> Result<StepOutcome, TrainError> {
        let train = &self.config.train;
        let dataset = &self.data.train;
        let (batch, micro_batches) = (train.batch_sequences, train.micro_batches);
        let global_tokens = (batch * train.sequence_tokens) as u64;
        comm.begin_step(step)?;
        let mut sum = ForwardOutput::default();
        for micro in 0..micro_batches {
            comm.begin_micro_batch(micro + 1 == micro_batches)?;
            let part = share_range(batch, micro_batches, micro);
            let indices = dataset.batch(step, batch).skip(part.start).take(part.len());
            let offset = self.load(dataset, part.len(), indices);
            let context = StepContext {
                training: true,
                global_tokens,
                micro_batches,
                seed: train.seed,
                step,
                token_offset: (part.start * train.sequence_tokens) as u64 + offset,
            };
            let batch = Batch { input: &self.input, target: &self.target, sequences: &self.sequences };
            let output = self.model.forward(comm, batch, context)?;
            sum.loss_sum += output.loss_sum;
            sum.target_tokens += output.target_tokens;
            sum.router_loss += output.router_loss;
            sum.dropped_assignments += output.dropped_assignments;
            self.model.backward(comm, micro > 0)?;
        }
        comm.finish_gradients()?;

        comm.work(Work { kind: WorkKind::Optimizer, layer: None, flops: 0 })?;
        let message = &mut self.message;
        message.clear();
        let stop = f64::from(u8::from(stop && self.rank == 0));
        message.extend([sum.loss_sum, sum.target_tokens as f64, sum.router_loss, sum.dropped_assignments as f64, stop]);
        self.optimizer.squares(self.model.compute(), self.model.parameters(), message);
        comm.agree(message)?;
        let [loss_sum, tokens, router_loss, dropped, stop] = message[..STATIC_VALUES] else { unreachable!() };
        // In the order of the tensors: the same bits whatever the ranks.
        let grad_norm = message[STATIC_VALUES..].iter().sum::<f64>().sqrt();
        let clip = f64::from(train.clip_norm);
        let grad_scale = if clip > 0.0 && grad_norm > clip { clip / grad_norm } else { 1.0 };
        if !grad_norm.is_finite() {
            return Err(TrainError::Input(format!(
                "step {step}: the gradient's norm is {grad_norm}, expected a finite number; lower \
                 train.learning_rate or set train.clip_norm"
            )));
        }

        comm.work(Work { kind: WorkKind::Optimizer, layer: None, flops: 0 })?;
        self.optimizer.update(self.model.for_update(), train, step, grad_scale as f32);
        let assignments = tokens * (self.config.model.top_k * self.config.model.moe_layers()) as f64;
        Ok(StepOutcome {
            loss: loss_sum / tokens,
            router_loss,
            grad_norm,
            learning_rate: learning_rate(train, step),
            tokens: tokens as u64,
            drop_rate: dropped / assignments.max(1.0),
            stats: comm.end_step(),
            stop: stop > 0.0,
        })
    }

    /// Mean cross-entropy on held-out text; `None` where nothing is held out.
    pub(crate) fn evaluate(&mut self, comm: &mut Comm, step: u64) -> Result<Option<f64>, TrainError> {
        let Some(dataset) = &self.data.held_out else { return Ok(None) };
        let available = dataset.sequences();
        let wanted = self.config.train.eval_sequences.min(available);
        let round = local_sequences(self.config, self.ranks) * self.ranks;
        let mut sums = [0.0, 0.0];
        comm.begin_evaluation(step)?;
        for first in (0..wanted).step_by(round) {
            let n = round.min(wanted - first);
            // Spread over all that is held out.
            let indices = (first..first + n).map(|i| i * available / wanted);
            self.load(dataset, n, indices);
            let batch = Batch { input: &self.input, target: &self.target, sequences: &self.sequences };
            let output = self.model.forward(comm, batch, StepContext::evaluation())?;
            sums[0] += output.loss_sum;
            sums[1] += output.target_tokens as f64;
        }
        comm.sum(&mut sums)?;
        comm.end_step();
        Ok(Some(sums[0] / sums[1]))
    }
}

/// Values of a step's closing sum before the squares.
const STATIC_VALUES: usize = 5;
