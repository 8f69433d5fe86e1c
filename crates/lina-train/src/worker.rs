//! One rank's share of the training: its model, its optimizer, its part of every batch.

use lina_comm::{Comm, StepStats, Work, WorkKind};
use lina_data::{Dataset, TrainingData};
use lina_kernels::Compute;
use lina_model::{Batch, ForwardOutput, LayerRouting, Model, ModelLimits, Purpose, StepContext};
use lina_plan::{ExpertLayout, Nanos, PACKING_VALUES, PackingSample, share_range};

use crate::TrainError;
use crate::config::RunConfig;
use crate::optimizer::{AdamW, Update, learning_rate};
use crate::replica::Replica;
use crate::residency::residency;

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
    /// What the step says of expert packing.
    pub(crate) packing: PackingSample,
    /// Rank 0 was asked to stop.
    pub(crate) stop: bool,
}

pub(crate) struct Worker<'a> {
    pub(crate) config: &'a RunConfig,
    data: &'a TrainingData,
    rank: usize,
    ranks: usize,
    pub(crate) model: Model,
    pub(crate) optimizer: AdamW,
    /// What it trains on, if not on the processor; weights and moments above are not up to date then.
    device: Option<Replica>,
    input: Vec<u32>,
    target: Vec<u32>,
    sequences: Vec<usize>,
    message: Vec<f64>,
    /// How long the last parameter update took.
    update: Nanos,
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
        comm: &mut Comm,
    ) -> Result<Self, TrainError> {
        let (rank, ranks) = (comm.rank(), experts.ranks());
        let device = Replica::new(config, experts, comm)?;
        let compute = Compute::new(config.cluster.threads_of(ranks));
        let limits = model_limits(config, ranks);
        // Activations are where it trains.
        let host_limits = ModelLimits { max_tokens: if device.is_some() { 0 } else { limits.max_tokens }, ..limits };
        let residency = residency(config, experts, rank)?;
        let mut model =
            Model::new(Purpose::Training, config.model.clone(), experts.clone(), rank, compute, host_limits)
                .map_err(TrainError::input)?;
        model.set_residency(residency);
        let optimizer = AdamW::new(&model, rank);
        let message = Vec::with_capacity(TOTALS + PACKING_VALUES + optimizer.squares_len());
        Ok(Worker {
            config,
            data,
            rank,
            ranks,
            model,
            optimizer,
            device,
            input: Vec::with_capacity(limits.max_tokens),
            target: Vec::with_capacity(limits.max_tokens),
            sequences: Vec::with_capacity(limits.max_tokens),
            message,
            update: 0,
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
            let output = match &mut self.device {
                Some(device) => device.forward(comm, batch, context)?,
                None => self.model.forward(comm, batch, context)?,
            };
            sum.loss_sum += output.loss_sum;
            sum.target_tokens += output.target_tokens;
            sum.router_loss += output.router_loss;
            sum.dropped_assignments += output.dropped_assignments;
            match &mut self.device {
                Some(device) => device.backward(comm, micro > 0)?,
                None => self.model.backward(comm, micro > 0)?,
            }
        }
        comm.finish_gradients()?;

        comm.work(Work { kind: WorkKind::Optimizer, layer: None, flops: 0 })?;
        let message = &mut self.message;
        message.clear();
        let stop = f64::from(u8::from(stop && self.rank == 0));
        message.extend([sum.loss_sum, sum.target_tokens as f64, sum.router_loss, sum.dropped_assignments as f64, stop]);
        let stats = comm.stats();
        // The update is still to come: the last one took as long.
        let step_time = stats.step + self.update;
        let packing: [Nanos; PACKING_VALUES] = [
            step_time,
            stats.ffn,
            stats.ffn_micro_ops,
            stats.token_exchange,
            stats.token_exchange_micro_ops,
            stats.all_to_all_blocked,
        ];
        message.extend(packing.map(|value| value as f64));
        match &self.device {
            Some(device) => device.squares(&self.optimizer, message)?,
            None => self.optimizer.squares(self.model.compute(), self.model.parameters(), message),
        }
        comm.agree(message)?;
        let Some((&[loss_sum, tokens, router_loss, dropped, stop], rest)) = message.split_first_chunk::<TOTALS>()
        else {
            unreachable!("as many values come back as were sent")
        };
        let Some((packing, squares)) = rest.split_first_chunk::<PACKING_VALUES>() else {
            unreachable!("as many values come back as were sent")
        };
        let packing = PackingSample::agreed(*packing, self.ranks);
        // In the order of the tensors: the same bits whatever the ranks.
        let grad_norm = squares.iter().sum::<f64>().sqrt();
        let clip = f64::from(train.clip_norm);
        let grad_scale = if clip > 0.0 && grad_norm > clip { clip / grad_norm } else { 1.0 };
        if !grad_norm.is_finite() {
            return Err(TrainError::Input(format!(
                "step {step}: the gradient's norm is {grad_norm}, expected a finite number; lower train.learning_rate = \
                 {} or train.clip_norm = {}",
                train.learning_rate, train.clip_norm
            )));
        }

        comm.work(Work { kind: WorkKind::Optimizer, layer: None, flops: 0 })?;
        let agreed_at = comm.now();
        let update = Update { config: train, step, grad_scale: grad_scale as f32 };
        match &mut self.device {
            Some(device) => device.update(&self.optimizer, &update)?,
            None => self.optimizer.update(self.model.for_update(), &update),
        }
        // A device has done what it was given only then.
        let stats = comm.end_step();
        self.update = comm.now() - agreed_at;
        let assignments = tokens * (self.config.model.top_k * self.config.model.moe_layers()) as f64;
        Ok(StepOutcome {
            loss: loss_sum / tokens,
            router_loss,
            grad_norm,
            learning_rate: learning_rate(train, step),
            tokens: tokens as u64,
            drop_rate: dropped / assignments.max(1.0),
            stats,
            packing,
            stop: stop > 0.0,
        })
    }

    /// Whether what it trains on has the memory for the experts of `layout`.
    pub(crate) fn device_fits(&self, layout: &ExpertLayout) -> Result<bool, TrainError> {
        match &self.device {
            Some(device) => device.fits(self.config, layout, self.rank),
            None => Ok(true),
        }
    }

    /// Takes the host's weights and moments to where it trains.
    pub(crate) fn load_device(&mut self) -> Result<(), TrainError> {
        match &mut self.device {
            Some(device) => device.load(&self.model, &self.optimizer),
            None => Ok(()),
        }
    }

    /// Brings the host's weights and moments up to date.
    pub(crate) fn store_device(&mut self) -> Result<(), TrainError> {
        match &self.device {
            Some(device) => device.store(&mut self.model, &mut self.optimizer),
            None => Ok(()),
        }
    }

    /// Takes the experts that the host holds now to where it trains.
    pub(crate) fn set_device_experts(&mut self) -> Result<(), TrainError> {
        match &mut self.device {
            Some(device) => device.set_experts(&self.model, &self.optimizer),
            None => Ok(()),
        }
    }

    /// What it trains on, if that is a GPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn gpu(&self) -> Option<&lina_cuda::Gpu> {
        self.device.as_ref().map(Replica::gpu)
    }

    /// How `layer` routed the last forward's tokens; `None` if it has no experts.
    pub(crate) fn routing(&self, layer: usize) -> Option<LayerRouting<'_>> {
        match &self.device {
            Some(device) => device.routing(layer),
            None => self.model.routing(layer),
        }
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
            let output = match &mut self.device {
                Some(device) => device.forward(comm, batch, StepContext::evaluation())?,
                None => self.model.forward(comm, batch, StepContext::evaluation())?,
            };
            sums[0] += output.loss_sum;
            sums[1] += output.target_tokens as f64;
        }
        comm.sum(&mut sums)?;
        comm.end_step();
        Ok(Some(sums[0] / sums[1]))
    }
}

/// Values at the beginning of a step's closing sum; what packing wants to know and the gradients' squares follow.
const TOTALS: usize = 5;

#[cfg(test)]
mod tests {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::path::Path;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::alone::{is_alone, run_alone};
    use crate::bench::prepared_worker;
    use crate::config::Override;
    use crate::data::load_data;

    /// Counts the process's allocations over 4 KiB.
    struct Counting;

    static LARGE: AtomicUsize = AtomicUsize::new(0);

    // SAFETY: every call goes to the system's allocator unchanged; counting does not allocate.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            LARGE.fetch_add(usize::from(layout.size() > 4096), Ordering::Relaxed);
            // SAFETY: the caller keeps the contract of `alloc`.
            unsafe { System.alloc(layout) }
        }

        unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
            LARGE.fetch_add(usize::from(layout.size() > 4096), Ordering::Relaxed);
            // SAFETY: the caller keeps the contract of `alloc_zeroed`.
            unsafe { System.alloc_zeroed(layout) }
        }

        unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
            LARGE.fetch_add(usize::from(new_size > 4096), Ordering::Relaxed);
            // SAFETY: the caller keeps the contract of `realloc`.
            unsafe { System.realloc(pointer, layout, new_size) }
        }

        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            // SAFETY: the caller keeps the contract of `dealloc`.
            unsafe { System.dealloc(pointer, layout) }
        }
    }

    #[global_allocator]
    static ALLOCATOR: Counting = Counting;

    /// The model of `examples/compute.toml`, narrower, with accumulation and without.
    const RUN: &str = r#"
[model]
kind = "mixtral"
layers = 8
hidden = 64
heads = 4
experts = 8
top_k = 2
expert_hidden = 128
aux_loss = "switch"
aux_loss_coefficient = 0.02

[train]
steps = 40
sequence_tokens = 64
batch_sequences = 8

[cluster]
threads = 2
"#;

    #[test]
    fn after_the_first_steps_a_step_allocates_nothing_over_4_kib() {
        const TEST: &str = "worker::tests::after_the_first_steps_a_step_allocates_nothing_over_4_kib";
        if !is_alone(TEST) {
            let output = run_alone(TEST);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            return;
        }
        for micro_batches in [1, 2] {
            let overrides = [
                format!("data.files={}/src/*.rs", env!("CARGO_MANIFEST_DIR")),
                format!("train.micro_batches={micro_batches}"),
            ]
            .map(|assignment| Override::set(&assignment).unwrap());
            let config = RunConfig::parse(Path::new("test.toml"), RUN, &overrides).unwrap();
            let loaded = load_data(&config).unwrap();
            let experts = config.expert_layout().unwrap();
            let mut comm = Comm::solo();
            let mut worker = prepared_worker(&config, &loaded.data, &experts, &mut comm).unwrap();
            // Which thread takes which part of a product is a matter of chance, so the threads' own buffers are not all
            // there after the same step; but once they are, nothing is allocated any more.
            let mut quiet_steps = 0;
            for step in 0..40 {
                let before = LARGE.load(Ordering::Relaxed);
                worker.step(&mut comm, step, false).unwrap();
                let large = LARGE.load(Ordering::Relaxed) - before;
                assert!(step > 0 || large > 0, "the counter counts");
                quiet_steps = if large == 0 { quiet_steps + 1 } else { 0 };
                if quiet_steps == 4 {
                    break;
                }
            }
            assert_eq!(quiet_steps, 4, "{micro_batches} micro-batches: steps go on allocating");
        }
    }
}
