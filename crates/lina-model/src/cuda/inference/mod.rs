//! Inference on a GPU: what [`InferenceModel`](crate::InferenceModel) computes, with weights, keys and values on a device.
//!
//! Which sequence has which pages, which slot holds which expert, where each row goes, and when an expert is copied is decided by
//! the code that serves processors (`inference`); here are the kernels' launches, and real copies behind the brain's decisions.
//! One set of activations serves all layers. The host waits for the device once in each layer with experts, for the gate's
//! choices, and once for the logits; in a step of few tokens on a job's only rank for the logits alone, and what it enqueued
//! before is then one launch (`few`, `recordings`).

mod attention;
mod costs;
mod exchange;
mod experts;
mod few;
mod ffn;
mod gate;
mod moe;
mod recordings;
mod step;
mod weights;

use std::sync::Arc;

use lina_comm::{Comm, WorkKind};
use lina_cuda::{self as cuda, Buffer as DeviceBuffer, CudaError, DType, Gpu, PagedMemory, PagedPlan, RotaryTable};
use lina_kernels::{Compute, PAGE_TOKENS, PagedSequence, PagedShape, page_elements};
use lina_plan::{ExpertScheduler, ExpertSchedulerSettings, PlacementError, PlacementPolicy};
use thiserror::Error;

use crate::batch::{LoadedBatch, StepError};
use crate::config::{ModelConfig, PositionKind};
use crate::inference::director::{ExpertDirector, Forecast};
use crate::inference::{
    ExpertOptions, Gate, InferenceBatch, InferenceLimits, InferenceStats, InferenceWeights, KvCache, LogitsOf,
    RoutingRecord, SequenceFeed, load_feeds, paged_sequences, visible_pairs,
};
use crate::pass::product_flops;

use attention::{Attention, CachedStep};
use experts::DeviceExperts;
use few::FewExperts;
use ffn::DenseFfn;
use moe::{Moe, MoeLayer};
use recordings::{Recordings, StepLaunches};
use step::Step;

use crate::cuda::norm::Norm;
use weights::DenseWeights;

pub use costs::measure_device_costs;
pub use exchange::RowRoute;
pub use experts::SharedExperts;

/// A model that a device cannot have.
#[derive(Clone, Debug, Error)]
pub enum CudaModelError {
    /// The experts do not fit the ranks' slots.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// The GPU has no kernel for the sizes, or not enough memory, or has failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// One rank of a job on GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRank {
    /// Which rank.
    pub rank: usize,
    /// Of how many.
    pub ranks: usize,
    /// How its rows travel to the others.
    pub route: RowRoute,
    /// How activations, weights, keys and values are stored.
    pub dtype: DType,
}

/// A decoder for inference on one rank's GPU.
pub struct CudaInferenceModel {
    /// Dropped before the kernels that are recorded.
    recordings: Recordings,
    gpu: Gpu,
    dtype: DType,
    weights: Arc<InferenceWeights>,
    dense: DenseWeights,
    limits: InferenceLimits,
    cache: KvCache,
    /// For each layer, `[pages, page_elements]`.
    pages: Vec<DeviceBuffer>,
    rotary: Option<RotaryTable>,
    batch: LoadedBatch,
    /// What attention computes in the step.
    paged: PagedPlan,
    /// Local rows whose logits are wanted.
    wanted: Vec<u32>,
    /// Tokens, positions and wanted rows, one after another.
    numbers: Vec<u32>,
    numbers_on_device: DeviceBuffer,
    attention: Attention,
    /// Of networks without experts, and the last one.
    norm: Norm,
    ffn: DenseFfn,
    moe: Moe,
    /// On a job's only rank.
    few: Option<FewExperts>,
    /// `[layers, tokens, top_k]`: what the last such step's layers chose.
    choices: Vec<u32>,
    director: Option<ExpertDirector<DeviceExperts>>,
    /// What the director's brain was told.
    scheduler: ExpertSchedulerSettings,
    gate: Gate,
    /// Every how many tokens are computed again, and with what.
    verify: Option<(u64, Compute)>,
    /// `[max_tokens, hidden]` each: the residual stream, and what the next sub-layer makes of it.
    x: DeviceBuffer,
    y: DeviceBuffer,
    /// `[wanted, hidden]`.
    last: DeviceBuffer,
    /// `[wanted, vocab]`, f32.
    logits: DeviceBuffer,
    logits_on_host: Vec<f32>,
    record: Option<RoutingRecord>,
}

impl CudaInferenceModel {
    /// A model on `gpu` for one rank. `shared` is the same for all ranks of a process.
    ///
    /// # Errors
    /// If the experts do not fit the ranks' slots, or the GPU has no kernel for the sizes or not enough memory.
    ///
    /// # Panics
    /// If sequences may be longer than the model has positions.
    pub fn new(
        gpu: Gpu,
        rank: DeviceRank,
        weights: Arc<InferenceWeights>,
        limits: InferenceLimits,
        experts: ExpertOptions,
        shared: &SharedExperts,
    ) -> Result<Self, CudaModelError> {
        let DeviceRank { rank, ranks, route, dtype } = rank;
        let (config, max_tokens) = (weights.config(), limits.max_tokens);
        assert!(limits.max_sequence_tokens <= config.max_positions, "callers bound sequences by the model's positions");
        let rotary = match config.position {
            PositionKind::Rotary { theta } => {
                Some(RotaryTable::new(&gpu, config.head_dim, limits.max_sequence_tokens, theta)?)
            }
            PositionKind::Learned => None,
        };
        let ExpertOptions { scheduler: settings, forecast, planning_flops, verify_every } = experts;
        let asks_next_gate = matches!(forecast, Forecast::NextGate);
        let director = match config.moe_layers() {
            0 => None,
            layers => {
                let scheduler = ExpertScheduler::new(settings, layers, config.experts, ranks)?;
                let copies = DeviceExperts::new(&gpu, &weights, &scheduler, rank, dtype, shared)?;
                let bytes = (weights.layout().expert_elements() * dtype.bytes()) as u64;
                Some(ExpertDirector::new(config, scheduler, forecast, planning_flops, bytes, ranks, copies))
            }
        };
        let few = match &director {
            // Choices of the next gate come to the host, and experts that move have no place to rely on.
            _ if ranks > 1 || asks_next_gate => None,
            Some(director) if !director.copies.stay() => None,
            director => {
                let slot_of =
                    |number, expert| director.as_ref().map_or(0, |director| director.slot_of(number, rank, expert));
                Some(FewExperts::new(&gpu, config, dtype, max_tokens, slot_of)?)
            }
        };
        let page = page_elements(config.kv_heads, config.head_dim);
        let pages = (0..config.layers).map(|_| gpu.zeros(limits.pages * page, dtype));
        let stream = || gpu.uninit(max_tokens * config.hidden, dtype);
        Ok(CudaInferenceModel {
            dtype,
            dense: DenseWeights::new(&gpu, &weights, dtype)?,
            cache: KvCache::without_memory(limits.pages),
            pages: pages.collect::<Result<_, CudaError>>()?,
            rotary,
            batch: LoadedBatch::with_capacity(max_tokens),
            // A batch that the kernels cannot take is better found now.
            paged: attention_plan(&gpu, config, &[], 0, dtype, PagedMemory::new(&gpu)?)?,
            wanted: Vec::new(),
            numbers: Vec::new(),
            numbers_on_device: gpu.uninit(3 * max_tokens, DType::U32)?,
            attention: Attention::new(&gpu, config, dtype, max_tokens)?,
            norm: Norm::new(&gpu, config, dtype, max_tokens)?,
            ffn: DenseFfn::new(&gpu, config, dtype, max_tokens)?,
            moe: Moe::new(&gpu, config, dtype, max_tokens, settings.slots, route, asks_next_gate)?,
            few,
            choices: Vec::new(),
            recordings: Recordings::default(),
            director,
            scheduler: settings,
            gate: Gate::Own,
            verify: verify_every.map(|every| (every, Compute::new(1))),
            x: stream()?,
            y: stream()?,
            last: gpu.uninit(0, dtype)?,
            logits: gpu.uninit(0, DType::F32)?,
            logits_on_host: Vec::new(),
            record: None,
            gpu,
            weights,
            limits,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        self.weights.config()
    }

    /// The weights on the host.
    pub fn weights(&self) -> &Arc<InferenceWeights> {
        &self.weights
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// How activations, weights, keys and values are stored.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sequences, and which pages are whose.
    pub fn cache(&mut self) -> &mut KvCache {
        &mut self.cache
    }

    /// Lets somebody else choose the experts from here on.
    pub fn set_gate(&mut self, gate: Gate) {
        self.gate = gate;
    }

    /// From here on, steps note what their tokens choose; [`take_record`](Self::take_record) tells.
    pub fn record_routing(&mut self) {
        self.record = Some(RoutingRecord::default());
    }

    /// What was noted since the last call.
    pub fn take_record(&mut self) -> RoutingRecord {
        self.record.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// What placements came to since the last call. Times in layers, and of a next gate, are not among it: the host enqueues them
    /// long before they run.
    pub fn take_stats(&mut self) -> InferenceStats {
        self.director.as_mut().map(|director| director.stats.take()).unwrap_or_default()
    }

    /// For each layer with experts, for each device, the experts in its slots.
    pub fn resident(&self) -> Vec<Vec<Vec<usize>>> {
        let Some(director) = &self.director else { return Vec::new() };
        (0..self.config().moe_layers()).map(|number| director.resident(number)).collect()
    }

    /// Logits of the last step, `[tokens whose logits were wanted, vocab]`, in the order of the feeds.
    pub fn logits(&self) -> &[f32] {
        &self.logits_on_host
    }

    /// As [`logits`](Self::logits), to change.
    pub fn logits_mut(&mut self) -> &mut [f32] {
        &mut self.logits_on_host
    }

    /// Runs a step of as many tokens as the limits allow, and one of a single token, and forgets them, so that libraries, kernels
    /// and buffers are there before anybody asks for a token. All ranks call it together, before their first step.
    ///
    /// # Errors
    /// If a kernel does not compile, memory does not suffice, the device fails or the job does.
    pub fn warm_up(&mut self, comm: &mut Comm) -> Result<(), StepError> {
        let (InferenceLimits { max_tokens, pages, .. }, weights) = (self.limits, Arc::clone(&self.weights));
        let config = weights.config();
        // Every sequence has a page, and may want one row.
        let rows = max_tokens.min(pages);
        self.gpu.grow(&mut self.last, rows * config.hidden)?;
        self.gpu.grow(&mut self.logits, rows * config.vocab)?;
        let verify = self.verify.take();
        let outcome = match self.director.take() {
            None => self.made_up_steps(comm),
            // Who places experts learns nothing from made-up tokens: another one leaves them where they are.
            Some(mut director) => {
                let settings = ExpertSchedulerSettings { placement: PlacementPolicy::Static, ..self.scheduler };
                let (layers, ranks) = (config.moe_layers(), comm.ranks());
                let scheduler = ExpertScheduler::new(settings, layers, config.experts, ranks);
                let scheduler = scheduler.expect("experts fit the slots, as they do already");
                let copies = director.copies;
                let still = ExpertDirector::new(config, scheduler, Forecast::None, 0, 0, ranks, copies);
                self.director = Some(still);
                let outcome = self.made_up_steps(comm);
                director.copies = self.director.take().expect("it was put there").copies;
                self.director = Some(director);
                outcome
            }
        };
        self.verify = verify;
        outcome
    }

    /// Runs a step, and waits for its logits. All ranks call it together.
    ///
    /// # Errors
    /// If the batch does not fit the model or the cache, a token's result fails its verification, the device fails or the
    /// job does.
    ///
    /// # Panics
    /// If a feed's sequence is not in the cache.
    pub fn forward(&mut self, comm: &mut Comm, batch: InferenceBatch<'_>) -> Result<(), StepError> {
        let weights = Arc::clone(&self.weights);
        let config = weights.config();
        load_feeds(batch.feeds, &self.cache, &self.limits, config, &mut self.batch, &mut self.wanted)?;
        self.load_attention(&batch)?;
        self.load_numbers()?;
        let tokens = self.batch.tokens();
        let (rows, hidden, vocab) = (self.wanted.len(), config.hidden, config.vocab);
        self.gpu.grow(&mut self.last, rows * hidden)?;
        self.gpu.grow(&mut self.logits, rows * vocab)?;
        if let Some(director) = &mut self.director {
            director.begin(comm, tokens, batch.truth)?;
        }
        let visible_pairs = visible_pairs(batch.feeds, &self.cache, config.sliding_window);
        let few = matches!(self.gate, Gate::Own) && self.few.as_ref().is_some_and(|few| few.takes(tokens));
        if few {
            self.run_few(comm, &batch, visible_pairs)?;
        } else {
            self.enqueue(comm, &batch, visible_pairs, false)?;
        }
        for feed in batch.feeds {
            self.cache.extend(feed.id, feed.tokens.len());
        }
        self.logits_on_host.resize(rows * vocab, 0.0);
        let logits = self.logits.slice(0..rows * vocab);
        match &self.few {
            Some(experts) if few => {
                let (layers, choices) = (config.moe_layers(), tokens * config.top_k);
                self.choices.resize(layers * choices, 0);
                let choices = (experts.choices(layers, choices), self.choices.as_mut_slice());
                self.gpu.download_both((logits, &mut self.logits_on_host), choices)?;
                self.report_choices(comm)
            }
            _ => {
                self.gpu.download(logits, &mut self.logits_on_host)?;
                Ok(comm.check()?)
            }
        }
    }

    /// Enqueues a step whose experts wait for nobody, in one launch if the like has been before.
    fn run_few(&mut self, comm: &mut Comm, batch: &InferenceBatch<'_>, visible_pairs: u64) -> Result<(), StepError> {
        // Who times launches wants to see each, and verification waits in every layer.
        if self.gpu.is_timed() || self.verify.is_some() {
            return self.enqueue(comm, batch, visible_pairs, true);
        }
        let step = StepLaunches {
            attention: self.paged.launches(),
            rows: self.wanted.len(),
            addresses: [&self.last, &self.logits].map(|buffer| buffer.whole().ptr()),
        };
        let mut recordings = std::mem::take(&mut self.recordings);
        let outcome = recordings.run(step, self, |model| model.enqueue(comm, batch, visible_pairs, true));
        self.recordings = recordings;
        outcome
    }

    /// Tells the director what the last step's layers chose.
    fn report_choices(&mut self, comm: &mut Comm) -> Result<(), StepError> {
        let CudaInferenceModel { weights, choices, moe, director, record, .. } = self;
        let (config, Some(director)) = (weights.config(), director) else { return Ok(()) };
        let layers = config.moe_layers();
        // Without tokens, layers of none.
        for number in 0..layers {
            let index = &choices[number * choices.len() / layers..(number + 1) * choices.len() / layers];
            moe.report(comm, config, director, (config.moe_layer(number), number), index)?;
            if let Some(record) = record {
                record.choices.extend_from_slice(index);
                record.forecasts.extend_from_slice(director.forecasts());
            }
        }
        Ok(())
    }

    /// Enqueues a step, up to its logits; with `alone`, nothing of it waits for the device, but for tokens that are verified.
    fn enqueue(
        &mut self,
        comm: &mut Comm,
        batch: &InferenceBatch<'_>,
        visible_pairs: u64,
        alone: bool,
    ) -> Result<(), StepError> {
        let tokens = self.batch.tokens();
        let CudaInferenceModel { gpu, dtype, weights, dense, moe, director, norm, pages, rotary, paged, .. } = self;
        let (config, layout) = (weights.config(), weights.layout());
        let gpu = &*gpu;
        let mut step = Step { gpu, dtype: *dtype, config, layout, dense, tokens, comm };
        let elements = tokens * config.hidden;
        step.work(WorkKind::Embedding, None, 0)?;
        let positions = self.numbers_on_device.slice(tokens..2 * tokens);
        let embedded = self.x.slice_mut(0..elements);
        let ids = self.numbers_on_device.slice(0..tokens);
        cuda::embedding_forward(gpu, dense.matrix(&layout.embedding), ids, embedded)?;
        if let Some(table) = &layout.positions {
            let embedded = self.x.slice_mut(0..elements);
            cuda::add_position_embedding(gpu, dense.matrix(table), positions, embedded)?;
        }

        let cached = CachedStep { positions, plan: paged, rotary: rotary.as_ref(), visible_pairs };
        let mut number = 0;
        for (layer, pages) in pages.iter_mut().enumerate() {
            let (x, y) = (self.x.slice(0..elements), self.y.slice_mut(0..elements));
            self.attention.forward(&mut step, &cached, layer, pages.whole_mut(), x, y)?;
            let (x, y) = (self.y.slice(0..elements), self.x.slice_mut(0..elements));
            if !config.is_moe(layer) {
                self.ffn.forward(&mut step, layer, norm, x, y)?;
                continue;
            }
            let director = director.as_mut().expect("a model with experts has a director");
            let verify = self.verify.as_ref().map(|(every, compute)| (*every, compute, &**weights));
            let place = MoeLayer { layer, number, gate: &self.gate, token_offset: batch.token_offset, verify };
            match &mut self.few {
                Some(experts) if alone => {
                    let weights = director.copies.layer(number);
                    experts.forward(&mut step, moe.gate(), (layer, number), weights, x, y)?;
                    if verify.is_some() {
                        let index: Vec<u32> = gpu.to_host(experts.choices_of(number, tokens * config.top_k))?;
                        moe.verify(&step, &place, &index, x, self.x.slice(0..elements))?;
                    }
                }
                _ => {
                    moe.forward(&mut step, director, &place, x, y)?;
                    if let Some(record) = &mut self.record {
                        record.choices.extend_from_slice(moe.index());
                        record.forecasts.extend_from_slice(director.forecasts());
                    }
                }
            }
            number += 1;
        }
        self.head(comm)
    }

    /// Enqueues the logits of the wanted rows.
    fn head(&mut self, comm: &mut Comm) -> Result<(), StepError> {
        let CudaInferenceModel { gpu, dtype, weights, dense, norm, last, logits, .. } = self;
        let (config, layout, tokens) = (weights.config(), weights.layout(), self.batch.tokens());
        let (rows, hidden, vocab) = (self.wanted.len(), config.hidden, config.vocab);
        let gpu = &*gpu;
        let mut step = Step { gpu, dtype: *dtype, config, layout, dense, tokens, comm };
        step.work(WorkKind::Head, None, product_flops(rows, vocab, hidden))?;
        let mut x = self.x.slice(0..tokens * hidden);
        // Rows are wanted in order: as many as there are tokens are all of them.
        if rows < tokens {
            let wanted = self.numbers_on_device.slice(2 * tokens..2 * tokens + rows);
            cuda::gather_rows(gpu, x, hidden, wanted, last.slice_mut(0..rows * hidden))?;
            x = last.slice(0..rows * hidden);
        }
        step.normalise(norm, &layout.final_norm, x)?;
        let logits = logits.slice_mut(0..rows * vocab);
        Ok(step.product(logits, norm.output(rows), dense.matrix(&layout.lm_head), [vocab, hidden], None)?)
    }

    fn made_up_steps(&mut self, comm: &mut Comm) -> Result<(), StepError> {
        self.made_up_step(comm, self.limits.max_tokens)?;
        self.made_up_step(comm, 1)
    }

    /// A step of `tokens` tokens of its own making, of sequences as long as can be.
    fn made_up_step(&mut self, comm: &mut Comm, tokens: usize) -> Result<(), StepError> {
        let max_sequence_tokens = self.limits.max_sequence_tokens;
        // A stride that shares no factor with usual sizes of vocabularies visits many tokens.
        let text: Vec<u32> = (0..tokens).map(|token| (token * 7919 % self.config().vocab) as u32).collect();
        let mut feeds = Vec::new();
        let mut rest = text.as_slice();
        while !rest.is_empty() && self.cache.free_pages() > 0 {
            let room = max_sequence_tokens.min(self.cache.free_pages() * PAGE_TOKENS);
            let (tokens, others) = rest.split_at(rest.len().min(room));
            let id = feeds.len() as u32;
            self.cache.admit(id, KvCache::pages_for(tokens.len()));
            feeds.push(SequenceFeed { id, tokens, logits: LogitsOf::Last });
            rest = others;
        }
        comm.begin_evaluation(0)?;
        self.forward(comm, InferenceBatch { feeds: &feeds, ..InferenceBatch::default() })?;
        // No rank goes on before all have come so far.
        comm.sum(&mut [0.0])?;
        comm.end_step();
        feeds.iter().for_each(|feed| self.cache.release(feed.id));
        Ok(())
    }

    /// Plans the step's attention, in the memory of the step before.
    fn load_attention(&mut self, batch: &InferenceBatch<'_>) -> Result<(), CudaError> {
        let (gpu, config, dtype, tokens) = (&self.gpu, self.weights.config(), self.dtype, self.batch.tokens());
        let sequences = paged_sequences(batch.feeds, self.cache.sequences());
        let memory = self.paged.take_memory(gpu)?;
        self.paged = attention_plan(gpu, config, &sequences, tokens, dtype, memory)?;
        Ok(())
    }

    /// Takes the batch's numbers to the device.
    fn load_numbers(&mut self) -> Result<(), CudaError> {
        let LoadedBatch { input, positions, .. } = &self.batch;
        self.numbers.clear();
        [input, positions, &self.wanted].into_iter().for_each(|numbers| self.numbers.extend_from_slice(numbers));
        let on_device = self.numbers_on_device.slice_mut(0..self.numbers.len());
        self.gpu.upload(&self.numbers, on_device)
    }
}

/// What attention computes in a step of `tokens` tokens.
fn attention_plan(
    gpu: &Gpu,
    config: &ModelConfig,
    sequences: &[PagedSequence<'_>],
    tokens: usize,
    dtype: DType,
    memory: PagedMemory,
) -> Result<PagedPlan, CudaError> {
    let shape = PagedShape {
        window: config.sliding_window,
        ..PagedShape::fused(sequences, config.heads, config.kv_heads, config.head_dim)
    };
    PagedPlan::with_memory(gpu, &shape, tokens, dtype, memory)
}
