//! A rank's part of the comparison: every batch goes through every scheduler's model in turn.

use std::sync::Arc;

use lina_comm::{Comm, StepStats};
use lina_data::EvalWindows;
use lina_kernels::Compute;
use lina_model::{
    ExpertOptions, Forecast, Gate, InferenceBatch, InferenceLimits, InferenceModel, InferenceStats, InferenceWeights,
    KvCache, LogitsOf, SequenceFeed, measure_placement_costs,
};
use lina_plan::{Estimator, ExpertSchedulerSettings, PathTables, PlacementCosts, PlacementPolicy, share_range};
use lina_report::Progress;
use lina_train::TrainError;

use super::config::InferBenchConfig;
use super::scheduler::Scheduler;
use super::synthetic::SyntheticRouting;
use crate::job::{HISTORY_DECAY, job_error};
use crate::ranks::step_error;

/// What every rank is told.
pub(super) struct Comparison<'a> {
    pub config: &'a InferBenchConfig,
    pub weights: &'a Arc<InferenceWeights>,
    pub windows: &'a EvalWindows<'a>,
    pub schedulers: &'a [Scheduler],
    pub tables: Option<&'a Arc<PathTables>>,
    /// Hottest over coldest expert, where routing is synthetic.
    pub skew: Option<f64>,
    pub quiet: bool,
}

/// What one scheduler made of one batch, over all ranks.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct BatchSample {
    /// From the moment when all ranks begin to the last one's end.
    pub batch_ms: f64,
    /// Longest time of a rank in MoE layers, gate to sum.
    pub moe_ms: f64,
    /// Mean time that ranks waited for all-to-alls.
    pub blocked_ms: f64,
    /// Mean time that ranks waited for copies.
    pub copy_blocked_ms: f64,
    /// Mean over layers of the largest device's rows over the mean.
    pub imbalance: f64,
    /// Hottest over coldest expert, the mean over layers; at least one row each.
    pub skew: f64,
    /// Of this rank.
    pub stats: InferenceStats,
}

/// One rank's results.
pub(super) struct RankOutcome {
    pub costs: PlacementCosts,
    /// `[schedulers][batches]`.
    pub samples: Vec<Vec<BatchSample>>,
    /// Tokens that were predicted, and how many of them rightly, of all ranks: `[schedulers][MoE layers]`.
    pub tokens: Vec<Vec<[f64; 2]>>,
}

pub(super) fn run_rank(comm: &mut Comm, comparison: &Comparison<'_>) -> Result<RankOutcome, TrainError> {
    let Comparison { config, weights, windows, schedulers, skew, quiet, .. } = *comparison;
    let (rank, ranks, infer) = (comm.rank(), comm.ranks(), &config.infer);
    if let Some(device) = &config.cluster.device {
        comm.emulate_copies(device.copy_gbps());
    }
    let threads = config.cluster.threads_of(ranks);
    let costs = measure_placement_costs(comm, &Compute::new(threads), weights)?;
    let mut models = schedulers
        .iter()
        .map(|scheduler| model(comparison, scheduler, costs, ranks, threads))
        .collect::<Result<Vec<_>, _>>()?;
    let sequences = share_range(infer.batch_sequences, ranks, rank);
    let all_batches = infer.warmup_batches + infer.batches;
    let layers = weights.config().moe_layers();
    let mut samples = vec![Vec::with_capacity(infer.batches); schedulers.len()];
    let mut tokens = vec![vec![[0.0; 2]; layers]; schedulers.len()];
    let mut progress = if rank == 0 && !quiet { Progress::new(0, all_batches as u64) } else { Progress::silent() };
    for batch in 0..all_batches {
        let (group, step) = (batch / infer.batches_of_sequences(), batch % infer.batches_of_sequences());
        let first = group * infer.batch_sequences;
        let texts: Vec<&[u32]> = sequences.clone().map(|s| windows.window((first + s) % windows.windows()).0).collect();
        let start = infer.prompt_tokens() + step * infer.step_tokens();
        let tokens_of_batch = start..start + infer.step_tokens();
        let token_offset = (sequences.start * infer.step_tokens()) as u64;
        let mut truth: Option<Vec<Vec<f64>>> = None;
        for (number, (scheduler, model)) in schedulers.iter().zip(&mut models).enumerate() {
            if let (Some(skew), false) = (skew, *scheduler == Scheduler::Ideal) {
                let experts = weights.config().experts;
                let routing = SyntheticRouting { experts, skew, seed: infer.seed, batch: batch as u64 };
                model.set_gate(Gate::Given(routing.chooser().into()));
            }
            if step == 0 {
                begin_sequences(comm, model, &texts, infer.prompt_tokens())?;
            }
            let texts: Vec<&[u32]> = texts.iter().map(|text| &text[tokens_of_batch.clone()]).collect();
            let sample = run_batch(comm, model, &texts, token_offset, truth.as_deref())?;
            // Where experts are changes nothing of what tokens choose: the first scheduler's batch tells the others'.
            truth.get_or_insert_with(|| popularity(&sample.stats));
            if batch >= infer.warmup_batches {
                for (sums, layer) in tokens[number].iter_mut().zip(&sample.stats.layers) {
                    sums[0] += layer.accuracy.tokens as f64;
                    sums[1] += layer.accuracy.right_tokens as f64;
                }
                samples[number].push(sample);
            }
        }
        progress.reached("batch", batch as u64 + 1);
    }
    progress.finish();
    let mut sums: Vec<f64> = tokens.iter().flatten().flatten().copied().collect();
    comm.sum(&mut sums)?;
    let per_scheduler = sums.chunks_exact(2 * layers.max(1));
    let tokens = per_scheduler.map(|sums| sums.chunks_exact(2).map(|pair| [pair[0], pair[1]]).collect()).collect();
    Ok(RankOutcome { costs, samples, tokens })
}

fn popularity(stats: &InferenceStats) -> Vec<Vec<f64>> {
    stats.layers.iter().map(|layer| layer.expert_rows.iter().map(|&rows| rows as f64).collect()).collect()
}

/// A scheduler's model on this rank.
fn model(
    comparison: &Comparison<'_>,
    scheduler: &Scheduler,
    costs: PlacementCosts,
    ranks: usize,
    threads: usize,
) -> Result<InferenceModel, TrainError> {
    let Comparison { config, weights, tables, .. } = comparison;
    let infer = &config.infer;
    let local_sequences = infer.batch_sequences.div_ceil(ranks);
    let limits = InferenceLimits {
        max_tokens: local_sequences * infer.sequence_tokens,
        max_sequence_tokens: infer.sequence_tokens,
        pages: local_sequences * KvCache::pages_for(infer.sequence_tokens),
    };
    let (placement, estimator, fine_tuning) = match *scheduler {
        Scheduler::Ideal => (PlacementPolicy::Static, None, false),
        Scheduler::Placed { placement, estimator, fine_tuning } => (placement, estimator, fine_tuning),
    };
    let forecast = match estimator {
        None => Forecast::None,
        Some(Estimator::Path) => Forecast::Path(tables.expect("who names the estimator gives its tables").clone()),
        Some(Estimator::NextGate) => Forecast::NextGate,
        Some(Estimator::History) => Forecast::History(HISTORY_DECAY),
        Some(Estimator::Oracle) => Forecast::Oracle,
    };
    // The reference copies for nothing and plans in no time.
    let free = placement == PlacementPolicy::Best;
    let gflops = config.cluster.device.map_or(0.0, |device| device.gflops);
    let experts = ExpertOptions {
        scheduler: ExpertSchedulerSettings {
            placement,
            estimation: estimator.is_some(),
            fine_tuning,
            slots: infer.slots,
            top_k: weights.config().top_k,
            costs: PlacementCosts { copy_ns: if free { 0.0 } else { costs.copy_ns }, ..costs },
            plan_every: infer.plan_every,
            seed: infer.seed,
        },
        forecast,
        planning_flops: if free { 0 } else { (infer.plan_us * 1e3 * gflops) as u64 },
        verify_every: (infer.verify_every > 0).then_some(infer.verify_every),
    };
    let mut model = InferenceModel::new((*weights).clone(), ranks, Compute::new(threads), limits, experts)
        .map_err(|error| TrainError::Input(format!("infer.slots is {}: {error}", infer.slots)))?;
    if *scheduler == Scheduler::Ideal {
        model.set_gate(Gate::Even);
    }
    Ok(model)
}

/// Other sequences take the place of those that `model` holds, with their first `prompt_tokens` tokens.
fn begin_sequences(
    comm: &mut Comm,
    model: &mut InferenceModel,
    texts: &[&[u32]],
    prompt_tokens: usize,
) -> Result<(), TrainError> {
    for (id, text) in (0..).zip(texts) {
        if model.cache().holds(id) {
            model.cache().release(id);
        }
        model.cache().admit(id, KvCache::pages_for(text.len()));
    }
    if prompt_tokens > 0 {
        let prompts: Vec<&[u32]> = texts.iter().map(|text| &text[..prompt_tokens]).collect();
        run_batch(comm, model, &prompts, 0, None)?;
    }
    Ok(())
}

/// One batch through one model, from a moment at which all ranks begin: every sequence gets its tokens of `texts`.
fn run_batch(
    comm: &mut Comm,
    model: &mut InferenceModel,
    texts: &[&[u32]],
    token_offset: u64,
    truth: Option<&[Vec<f64>]>,
) -> Result<BatchSample, TrainError> {
    let (rank, ranks) = (comm.rank(), comm.ranks());
    let feeds: Vec<SequenceFeed<'_>> = texts
        .iter()
        .enumerate()
        .map(|(id, tokens)| SequenceFeed { id: id as u32, tokens, logits: LogitsOf::Last })
        .collect();
    comm.sum(&mut [0.0])?;
    let begun = comm.now();
    comm.begin_evaluation(0)?;
    let batch = InferenceBatch { feeds: &feeds, token_offset, truth };
    model.forward(comm, batch).map_err(|error| job_error(step_error(rank, error)))?;
    let took = comm.now() - begun;
    let StepStats { all_to_all_blocked, copy_blocked, .. } = comm.end_step();
    let stats = model.take_stats();
    // A rank's own numbers, each in its own place of the sum.
    let own = [took, stats.moe_ns, all_to_all_blocked, copy_blocked];
    let mut all = vec![0.0; own.len() * ranks];
    all.iter_mut().skip(rank).step_by(ranks).zip(own).for_each(|(place, value)| *place = value as f64 / 1e6);
    comm.sum(&mut all)?;
    let largest = |number: usize| all[number * ranks..][..ranks].iter().copied().fold(0.0, f64::max);
    let mean = |number: usize| all[number * ranks..][..ranks].iter().sum::<f64>() / ranks as f64;
    let passes = stats.total(|layer| layer.passes).max(1) as f64;
    let skews = stats.layers.iter().map(|layer| {
        let (hottest, coldest) = (layer.expert_rows.iter().max(), layer.expert_rows.iter().min());
        hottest.map_or(1.0, |&rows| rows as f64) / coldest.map_or(1.0, |&rows| rows.max(1) as f64)
    });
    Ok(BatchSample {
        batch_ms: largest(0),
        moe_ms: largest(1),
        blocked_ms: mean(2),
        copy_blocked_ms: mean(3),
        imbalance: stats.layers.iter().map(|layer| layer.imbalance_sum).sum::<f64>() / passes,
        skew: skews.sum::<f64>() / stats.layers.len().max(1) as f64,
        stats,
    })
}
