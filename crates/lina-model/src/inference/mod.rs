//! Inference: sequences go on from cached keys and values, and experts are wherever the brain puts them.
//!
//! | question | answered by |
//! |---|---|
//! | what does a step compute? | [`InferenceModel`] |
//! | where are the weights? | [`InferenceWeights`] (`weights`) |
//! | where are keys and values? | [`KvCache`] (`cache`) |
//! | what does a layer with experts do? | `moe`, with `dispatch` |
//! | who carries placements out? | `director`, over `slot_copies`, and `stats` counts |
//! | does a placement change an answer? | `verify` |
//! | what do rows and copies cost? | [`measure_placement_costs`] (`costs`) |
//!
//! The pieces of a layer are those of training, used for one layer after another; nothing is kept for a way back.

mod cache;
mod costs;
pub(crate) mod director;
pub(crate) mod dispatch;
mod gate;
pub(crate) mod moe;
pub(crate) mod slot_copies;
mod stats;
pub(crate) mod verify;
mod weights;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use lina_comm::{Comm, CommError, WorkKind};
use lina_kernels::{self as kernels, Compute, Mat, MatMut, PagedSequence, RotaryTable};
use lina_plan::{ExpertScheduler, ExpertSchedulerSettings, PlacementCosts, PlacementError, PlacementPolicy};

use crate::attention::{Attention, CachedLayer};
use crate::batch::{LoadedBatch, StepContext, StepError};
use crate::config::{ModelConfig, PositionKind};
use crate::ffn::{DenseFfn, FfnScratch};
use crate::norm::Norm;
use crate::pass::{Pass, grow, product_flops};

use cache::CachedSequence;
use director::ExpertDirector;
use moe::{MoeLayer, MoeScratch};
use slot_copies::HostCopies;

pub use cache::KvCache;
pub use costs::measure_placement_costs;
pub use director::Forecast;
pub use gate::{Chooser, Gate};
pub use stats::{InferenceStats, LayerStats};
pub use verify::VerificationError;
pub use weights::InferenceWeights;

/// Sizes that buffers are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InferenceLimits {
    /// Most local tokens of a step.
    pub max_tokens: usize,
    /// Longest sequence, what is cached included.
    pub max_sequence_tokens: usize,
    /// Pages of the cache.
    pub pages: usize,
}

/// How experts are placed.
#[derive(Clone, Debug)]
pub struct ExpertOptions {
    /// The brain's settings.
    pub scheduler: ExpertSchedulerSettings,
    /// What phase one goes by.
    pub forecast: Forecast,
    /// Operations of the emulated device that a plan for which a layer waits takes; 0 on a device that is not emulated.
    pub planning_flops: u64,
    /// Recomputes every n-th token of each layer on its own rank and compares.
    pub verify_every: Option<u64>,
}

impl ExpertOptions {
    /// Every expert of `config` on every rank, where it stays: for one rank.
    pub fn fixed(config: &ModelConfig) -> Self {
        let scheduler = ExpertSchedulerSettings {
            placement: PlacementPolicy::Static,
            estimation: false,
            fine_tuning: false,
            slots: config.experts,
            top_k: config.top_k,
            costs: PlacementCosts { row_ns: 1.0, wire_row_ns: 0.0, copy_ns: 0.0 },
            plan_every: 1,
            seed: 0,
        };
        ExpertOptions { scheduler, forecast: Forecast::None, planning_flops: 0, verify_every: None }
    }
}

/// Tokens that a sequence gets.
#[derive(Clone, Copy, Debug)]
pub struct SequenceFeed<'a> {
    /// A sequence of the cache.
    pub id: u32,
    /// After those that it has; at least one.
    pub tokens: &'a [u32],
    /// For which of them logits are wanted.
    pub logits: LogitsOf,
}

/// For which tokens of a feed logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsOf {
    /// None.
    Nothing,
    /// The last one.
    Last,
    /// All of them.
    All,
}

/// One rank's part of a step.
#[derive(Clone, Copy, Debug, Default)]
pub struct InferenceBatch<'a> {
    /// Each sequence at most once. None is ordinary: the rank takes part in every exchange all the same.
    pub feeds: &'a [SequenceFeed<'a>],
    /// Index of this rank's first token among all ranks' tokens, of this step or of all steps: which tokens are verified, and
    /// what a gate that is not the model's own chooses, goes by it.
    pub token_offset: u64,
    /// For [`Forecast::Oracle`]: what every layer's popularity, `[experts]` each, will turn out to be.
    pub truth: Option<&'a [Vec<f64>]>,
}

/// A decoder for inference on one rank.
pub struct InferenceModel {
    weights: Arc<InferenceWeights>,
    limits: InferenceLimits,
    compute: Compute,
    cache: KvCache,
    rotary: Option<RotaryTable>,
    batch: LoadedBatch,
    /// Local rows whose logits are wanted.
    wanted: Vec<u32>,
    attention: Attention,
    dense_ffn: Option<DenseFfn>,
    ffn: FfnScratch,
    moe: MoeScratch,
    director: Option<ExpertDirector<HostCopies>>,
    gate: Gate,
    verify_every: Option<u64>,
    /// `[max_tokens, hidden]` each: the residual stream, and what the next sub-layer makes of it.
    x: Vec<f32>,
    y: Vec<f32>,
    final_norm: Norm,
    /// `[wanted, hidden]`.
    last: Vec<f32>,
    /// `[wanted, vocab]`.
    logits: Vec<f32>,
    record: Option<RoutingRecord>,
}

/// What the local tokens of some steps chose, step by step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoutingRecord {
    /// `[MoE layers, tokens, top_k]` of each step.
    pub choices: Vec<u32>,
    /// What [`Forecast::Path`] or [`Forecast::NextGate`] expected of each layer but the first,
    /// `[MoE layers - 1, tokens, top_k]` of each step; empty under other forecasts.
    pub forecasts: Vec<u32>,
}

impl InferenceModel {
    /// A model for one of `ranks` ranks.
    ///
    /// # Errors
    /// If the experts do not fit the ranks' slots, or sequences may be longer than the model has positions.
    pub fn new(
        weights: Arc<InferenceWeights>,
        ranks: usize,
        compute: Compute,
        limits: InferenceLimits,
        experts: ExpertOptions,
    ) -> Result<Self, PlacementError> {
        let config = weights.config();
        assert!(limits.max_sequence_tokens <= config.max_positions, "callers bound sequences by the model's positions");
        let rotary = match config.position {
            PositionKind::Rotary { theta } => {
                Some(RotaryTable::new(config.head_dim, limits.max_sequence_tokens, theta))
            }
            PositionKind::Learned => None,
        };
        let ExpertOptions { scheduler, forecast, planning_flops, verify_every } = experts;
        let director = match config.moe_layers() {
            0 => None,
            layers => {
                let (bytes, free) = (weights.expert_bytes(), scheduler.costs.copy_ns == 0.0);
                let scheduler = ExpertScheduler::new(scheduler, layers, config.experts, ranks)?;
                let copies = HostCopies::new((0..layers).map(|number| config.moe_layer(number)), bytes, free);
                Some(ExpertDirector::new(config, scheduler, forecast, planning_flops, bytes, ranks, copies))
            }
        };
        let stream = || vec![0.0; limits.max_tokens * config.hidden];
        Ok(InferenceModel {
            cache: KvCache::new(config, limits.pages),
            rotary,
            batch: LoadedBatch::with_capacity(limits.max_tokens),
            wanted: Vec::new(),
            attention: Attention::new(config, 0, limits.max_tokens),
            dense_ffn: (!config.dense_layers.is_empty()).then(|| DenseFfn::new(config, 0, limits.max_tokens)),
            ffn: FfnScratch::default(),
            moe: MoeScratch::new(config, limits.max_tokens),
            director,
            gate: Gate::Own,
            verify_every,
            x: stream(),
            y: stream(),
            final_norm: Norm::new(config, limits.max_tokens),
            last: Vec::new(),
            logits: Vec::new(),
            record: None,
            weights,
            limits,
            compute,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        self.weights.config()
    }

    /// The weights.
    pub fn weights(&self) -> &Arc<InferenceWeights> {
        &self.weights
    }

    /// The threads that this rank computes with.
    pub fn compute(&self) -> &Compute {
        &self.compute
    }

    /// Sequences and their keys and values.
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

    /// What placements came to since the last call.
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
        &self.logits[..self.wanted.len() * self.config().vocab]
    }

    /// As [`logits`](Self::logits), to change.
    pub fn logits_mut(&mut self) -> &mut [f32] {
        let len = self.wanted.len() * self.config().vocab;
        &mut self.logits[..len]
    }

    /// Runs a step. All ranks call it together.
    ///
    /// # Errors
    /// If the batch does not fit the model or the cache, a token's result fails its verification, or the job fails.
    ///
    /// # Panics
    /// If a feed's sequence is not in the cache.
    pub fn forward(&mut self, comm: &mut Comm, batch: InferenceBatch<'_>) -> Result<(), StepError> {
        load_feeds(batch.feeds, &self.cache, &self.limits, self.weights.config(), &mut self.batch, &mut self.wanted)?;
        let InferenceModel {
            weights,
            compute,
            cache,
            rotary,
            batch: loaded,
            attention,
            dense_ffn,
            ffn,
            moe,
            director,
            gate,
            x,
            y,
            ..
        } = self;
        let (config, layout, dense) = (weights.config(), weights.layout(), weights.dense());
        let step = StepContext::evaluation();
        let rotary = rotary.as_ref();
        let mut pass = Pass { compute, config, layout, rotary, batch: loaded, step, comm, accumulate: false };
        let tokens = pass.tokens();
        let elements = tokens * config.hidden;
        let (mut x, mut y) = (&mut x[..elements], &mut y[..elements]);
        if let Some(director) = director {
            director.begin(pass.comm, tokens, batch.truth)?;
        }
        pass.embed(dense, x)?;

        let visible_pairs = visible_pairs(batch.feeds, cache, config.sliding_window);
        let mut number = 0;
        for layer in 0..config.layers {
            let (pages, cached) = cache.layer_mut(layer);
            let sequences = paged_sequences(batch.feeds, cached);
            attention.set_layer(layer);
            let cached = CachedLayer { sequences: &sequences, visible_pairs, pages };
            attention.forward_cached(&mut pass, dense, cached, x, y)?;
            std::mem::swap(&mut x, &mut y);
            if config.is_moe(layer) {
                let token_offset = batch.token_offset;
                let verify_every = self.verify_every;
                let place = MoeLayer { layer, number, weights, gate, token_offset, verify_every };
                let director = director.as_mut().expect("a model with experts has a director");
                moe.forward(&mut pass, director, &place, x, y)?;
                if let Some(record) = &mut self.record {
                    record.choices.extend_from_slice(moe.index());
                    record.forecasts.extend_from_slice(director.forecasts());
                }
                number += 1;
            } else {
                let dense_ffn = dense_ffn.as_mut().expect("a model with dense layers has a network for them");
                dense_ffn.set_layer(layer);
                dense_ffn.forward(&mut pass, ffn, dense, x, y)?;
            }
            std::mem::swap(&mut x, &mut y);
        }
        for feed in batch.feeds {
            cache.extend(feed.id, feed.tokens.len());
        }
        // Two swaps a layer: the stream is where it began.
        self.head(comm)?;
        Ok(())
    }

    /// Logits of the wanted rows.
    fn head(&mut self, comm: &mut Comm) -> Result<(), CommError> {
        let InferenceModel { weights, compute, batch, wanted, x, final_norm, last, logits, .. } = self;
        let (config, layout, dense) = (weights.config(), weights.layout(), weights.dense());
        let (rows, hidden, vocab) = (wanted.len(), config.hidden, config.vocab);
        grow(last, rows * hidden);
        grow(logits, rows * vocab);
        let (last, logits) = (&mut last[..rows * hidden], &mut logits[..rows * vocab]);
        let step = StepContext::evaluation();
        let mut pass = Pass { compute, config, layout, rotary: None, batch, step, comm, accumulate: false };
        pass.work(WorkKind::Head, None, product_flops(rows, vocab, hidden))?;
        kernels::gather_rows(compute, &x[..batch.tokens() * hidden], hidden, wanted, last);
        final_norm.forward_rows(&pass, &layout.final_norm, dense, last, rows);
        let normed = Mat::new(final_norm.output(rows), rows, hidden);
        let weight = Mat::new(&dense[layout.lm_head.clone()], vocab, hidden);
        kernels::matmul(compute, MatMut::new(logits, rows, vocab), normed, weight.t(), false);
        Ok(())
    }
}

/// Takes feeds in: `loaded` gets tokens and positions, `wanted` the rows whose logits are wanted.
pub(crate) fn load_feeds(
    feeds: &[SequenceFeed<'_>],
    cache: &KvCache,
    limits: &InferenceLimits,
    config: &ModelConfig,
    loaded: &mut LoadedBatch,
    wanted: &mut Vec<u32>,
) -> Result<(), StepError> {
    let error = |message: String| Err(StepError::Batch(message));
    let vocab = config.vocab;
    let LoadedBatch { input, positions, .. } = loaded;
    input.clear();
    positions.clear();
    wanted.clear();
    for feed in feeds {
        let sequence = cache.sequence(feed.id);
        let (first, end) = (sequence.tokens, sequence.tokens + feed.tokens.len());
        let room = (sequence.pages.len() * kernels::PAGE_TOKENS).min(limits.max_sequence_tokens);
        if feed.tokens.is_empty() || end > room {
            return error(format!(
                "sequence {} gets {} tokens after {first}, expected 1 to {}",
                feed.id,
                feed.tokens.len(),
                room - first
            ));
        }
        if let Some(id) = feed.tokens.iter().find(|&&id| id as usize >= vocab) {
            return error(format!("it has token id {id}, expected ids below vocab = {vocab}"));
        }
        let row = input.len();
        input.extend_from_slice(feed.tokens);
        positions.extend(first as u32..end as u32);
        let rows: Range<usize> = match feed.logits {
            LogitsOf::Nothing => 0..0,
            LogitsOf::Last => input.len() - 1..input.len(),
            LogitsOf::All => row..input.len(),
        };
        wanted.extend(rows.map(|row| row as u32));
    }
    if input.len() > limits.max_tokens {
        return error(format!("it has {} tokens, expected at most {}", input.len(), limits.max_tokens));
    }
    Ok(())
}

/// The sequences of a pass, whose rows follow each other in the order of the feeds.
pub(crate) fn paged_sequences<'a>(
    feeds: &[SequenceFeed<'_>],
    cached: &'a HashMap<u32, CachedSequence>,
) -> Vec<PagedSequence<'a>> {
    let mut next = 0;
    let sequence = |feed: &SequenceFeed<'_>| {
        let CachedSequence { pages, tokens } = &cached[&feed.id];
        let (start_row, rows) = (next, feed.tokens.len());
        next += rows;
        PagedSequence { start_row, rows, past: *tokens, pages }
    };
    feeds.iter().map(sequence).collect()
}

/// Pairs of a new token and one that it sees.
pub(crate) fn visible_pairs(feeds: &[SequenceFeed<'_>], cache: &KvCache, window: Option<usize>) -> u64 {
    let pairs = |feed: &SequenceFeed<'_>| -> u64 {
        let past = cache.sequence(feed.id).tokens;
        (past + 1..=past + feed.tokens.len()).map(|seen| seen.min(window.unwrap_or(seen)) as u64).sum()
    };
    feeds.iter().map(pairs).sum()
}
