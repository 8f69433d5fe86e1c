//! What a comparison came to.

use lina_model::{InferenceStats, InferenceWeights, LayerStats};
use lina_plan::{LayerAccuracy, PathTables, PlacementCosts};
use lina_report::{Align, LayerAccuracyNumbers, SchedulerResult, Table};
use serde::Serialize;

use super::InferBenchOptions;
use super::config::{BatchKind, InferBenchConfig};
use super::run::{BatchSample, RankOutcome};
use super::scheduler::Scheduler;

/// The comparison, as JSON has it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct InferBenchSummary {
    /// Number of ranks.
    pub ranks: usize,
    /// Whether compute, links and copies are emulated.
    pub emulated: bool,
    /// Hottest over coldest expert of routing that no model chose, where it was asked for.
    pub synthetic_skew: Option<f64>,
    /// What a batch is.
    pub batch: BatchKind,
    /// Measured batches.
    pub batches: usize,
    /// Tokens of a batch, over all ranks.
    pub batch_tokens: usize,
    /// Experts that a device holds of a layer at most.
    pub slots: usize,
    /// Bytes of one expert.
    pub expert_bytes: u64,
    /// What an expert takes for one row, in ns.
    pub row_ns: f64,
    /// What one row takes over a device's link, one way, in ns.
    pub wire_row_ns: f64,
    /// What one expert takes from host memory into a slot, in us.
    pub copy_us: f64,
    /// The MoE layers' share of an ideal batch.
    pub w: f64,
    /// Largest device's rows over the mean under `static`: the 95th percentile over batches, and the median.
    pub r_static: f64,
    /// The median.
    pub r_static_median: f64,
    /// w (r - 1): how much longer than ideal a static batch is expected to take.
    pub w_r_minus_1: f64,
    /// Time that ranks of an ideal batch wait for all-to-alls, over the batch.
    pub a2a_share: f64,
    /// Hottest over coldest expert, the mean over layers and batches.
    pub skew: f64,
    /// Layers that a path of the estimator `path` covers, where a scheduler goes by it.
    pub path_length: Option<usize>,
    /// One by one.
    pub schedulers: Vec<SchedulerResult>,
    /// `[MoE layers][experts]`: each expert's share of the rows that its layer computed under `static`, 0 to 1.
    pub expert_load: Vec<Vec<f64>>,
}

impl InferBenchSummary {
    pub(super) fn new(
        options: &InferBenchOptions,
        config: &InferBenchConfig,
        schedulers: &[Scheduler],
        weights: &InferenceWeights,
        tables: Option<&PathTables>,
        outcome: RankOutcome,
    ) -> Self {
        let RankOutcome { costs, samples, tokens } = outcome;
        let PlacementCosts { row_ns, wire_row_ns, copy_ns } = costs;
        let of = |wanted: Scheduler| {
            let number = schedulers.iter().position(|&scheduler| scheduler == wanted);
            &samples[number.expect("static and ideal are always measured")]
        };
        let (ideal, fixed) = (of(Scheduler::Ideal), of(Scheduler::STATIC));
        let w = ideal.iter().map(|sample| sample.moe_ms / sample.batch_ms).sum::<f64>() / ideal.len() as f64;
        let r_static = percentile(fixed, 0.95, |sample| sample.imbalance);
        let baselines = Baselines {
            ideal_p50_ms: percentile(ideal, 0.5, |sample| sample.batch_ms),
            ideal_p95_ms: percentile(ideal, 0.95, |sample| sample.batch_ms),
            static_p95_ms: percentile(fixed, 0.95, |sample| sample.batch_ms),
        };
        InferBenchSummary {
            ranks: config.cluster.ranks,
            emulated: config.cluster.is_emulated(),
            synthetic_skew: options.synthetic_skew,
            batch: config.infer.batch,
            batches: config.infer.batches,
            batch_tokens: config.infer.batch_sequences * config.infer.step_tokens(),
            slots: config.infer.slots,
            expert_bytes: weights.expert_bytes(),
            row_ns,
            wire_row_ns,
            copy_us: copy_ns / 1e3,
            w,
            r_static,
            r_static_median: percentile(fixed, 0.5, |sample| sample.imbalance),
            w_r_minus_1: w * (r_static - 1.0),
            a2a_share: ideal.iter().map(|sample| sample.blocked_ms / sample.batch_ms).sum::<f64>() / ideal.len() as f64,
            skew: fixed.iter().map(|sample| sample.skew).sum::<f64>() / fixed.len() as f64,
            path_length: tables.map(PathTables::length),
            expert_load: expert_load(fixed),
            schedulers: schedulers
                .iter()
                .zip(&samples)
                .zip(&tokens)
                .map(|((scheduler, samples), tokens)| baselines.result(scheduler, samples, tokens, weights))
                .collect(),
        }
    }

    /// As a person reads it.
    pub fn table(&self) -> String {
        let right = Align::Right;
        let mut table = Table::new([
            ("scheduler", Align::Left),
            ("median ms", right),
            ("95% ms", right),
            ("/ ideal", right),
            ("95% / ideal", right),
            ("over static", right),
            ("MoE ms", right),
            ("a2a ms", right),
            ("copies ms", right),
            ("accuracy", right),
            ("tokens", right),
            ("re-plans", right),
            ("plan us", right),
            ("moved MiB", right),
            ("imbalance", right),
        ]);
        let share =
            |share: Option<f64>| share.map_or_else(|| "-".to_owned(), |share| format!("{:.1} %", 100.0 * share));
        for result in &self.schedulers {
            table.row([
                result.scheduler.clone(),
                format!("{:.3}", result.p50_ms),
                format!("{:.3}", result.p95_ms),
                format!("{:.2}", result.p50_vs_ideal),
                format!("{:.2}", result.p95_vs_ideal),
                format!("{:.2}x", result.p95_speedup_vs_static),
                format!("{:.3}", result.moe_ms),
                format!("{:.3}", result.a2a_ms),
                format!("{:.3}", result.copy_wait_ms),
                share(result.accuracy),
                share(result.token_accuracy),
                share(Some(result.replan_rate)),
                result.plan_us_median.map_or_else(|| "-".to_owned(), |us| format!("{us:.0}")),
                format!("{:.2}", result.moved_bytes / f64::from(1 << 20)),
                format!("{:.2}", result.imbalance),
            ]);
        }
        let clock = if self.emulated { "emulated: virtual time of given rates" } else { "measured on the wall clock" };
        let routing = match self.synthetic_skew {
            Some(skew) => format!("synthetic, hottest over coldest expert {skew}"),
            None => "the model's own".to_owned(),
        };
        format!(
            "{}\n{} ranks, {} batches of {} tokens ({clock}); routing: {routing}; hottest over coldest expert measured \
             {:.2}\nMoE layers' share of an ideal batch w = {:.3}, of which all-to-all waits are {:.1} % of the batch; \
             largest device over the mean under static r = {:.2} (95%; median {:.2}); w(r - 1) = {:.2}\n\
             an expert's row {:.2} us, a row on the wire {:.2} us, a copy of an expert ({} KiB) {:.1} us, {} slots\n\
             plan us: wall clock of this machine; accuracy: layers whose 2k most popular experts were the estimated ones",
            table.render(),
            self.ranks,
            self.batches,
            self.batch_tokens,
            self.skew,
            self.w,
            100.0 * self.a2a_share,
            self.r_static,
            self.r_static_median,
            self.w_r_minus_1,
            self.row_ns / 1e3,
            self.wire_row_ns / 1e3,
            self.expert_bytes >> 10,
            self.copy_us,
            self.slots,
        )
    }
}

/// What others are compared with.
struct Baselines {
    ideal_p50_ms: f64,
    ideal_p95_ms: f64,
    static_p95_ms: f64,
}

impl Baselines {
    fn result(
        &self,
        scheduler: &Scheduler,
        samples: &[BatchSample],
        tokens: &[[f64; 2]],
        weights: &InferenceWeights,
    ) -> SchedulerResult {
        let config = weights.config();
        let p50_ms = percentile(samples, 0.5, |sample| sample.batch_ms);
        let p95_ms = percentile(samples, 0.95, |sample| sample.batch_ms);
        let layers: Vec<LayerAccuracy> = (0..config.moe_layers())
            .map(|number| {
                let mut accuracy = LayerAccuracy::default();
                samples.iter().for_each(|sample| accuracy.merge(&sample.stats.layers[number].accuracy));
                accuracy
            })
            .collect();
        let mut all = LayerAccuracy::default();
        layers.iter().for_each(|layer| all.merge(layer));
        let token_share = |[predicted, right]: [f64; 2]| (predicted > 0.0).then(|| right / predicted);
        let all_tokens = tokens.iter().fold([0.0; 2], |sum, layer| [sum[0] + layer[0], sum[1] + layer[1]]);
        let total =
            |of: fn(&LayerStats) -> u64| -> f64 { samples.iter().map(|sample| sample.stats.total(of) as f64).sum() };
        let moves = *scheduler != Scheduler::Ideal && *scheduler != Scheduler::STATIC;
        let estimates = tokens.len().saturating_sub(1).max(1) as f64;
        SchedulerResult {
            scheduler: scheduler.to_string(),
            estimator: scheduler.estimator().map(|estimator| estimator.to_string()),
            p50_ms,
            p95_ms,
            p50_vs_ideal: p50_ms / self.ideal_p50_ms,
            p95_vs_ideal: p95_ms / self.ideal_p95_ms,
            p95_speedup_vs_static: self.static_p95_ms / p95_ms,
            moe_ms: percentile(samples, 0.5, |sample| sample.moe_ms),
            a2a_ms: percentile(samples, 0.5, |sample| sample.blocked_ms),
            copy_wait_ms: percentile(samples, 0.5, |sample| sample.copy_blocked_ms),
            accuracy: all.same_share(),
            overlap: all.mean_overlap(),
            token_accuracy: token_share(all_tokens),
            replan_rate: total(|layer| layer.replans) / total(|layer| layer.passes).max(1.0),
            plan_us_median: moves.then(|| {
                percentile(samples, 0.5, |sample| {
                    sample.stats.planning.as_secs_f64() * 1e6 / sample.stats.plans.max(1) as f64
                })
            }),
            estimate_us_median: (all_tokens[0] > 0.0)
                .then(|| percentile(samples, 0.5, |sample| sample.stats.estimating.as_secs_f64() * 1e6 / estimates)),
            moved_bytes: total(|layer| layer.moved_bytes) / samples.len().max(1) as f64,
            imbalance: samples.iter().map(|sample| sample.imbalance).sum::<f64>() / samples.len().max(1) as f64,
            layers: layers
                .iter()
                .zip(tokens)
                .enumerate()
                .skip(1)
                .map(|(number, (accuracy, tokens))| LayerAccuracyNumbers {
                    layer: config.moe_layer(number),
                    accuracy: accuracy.same_share(),
                    overlap: accuracy.mean_overlap(),
                    token_accuracy: token_share(*tokens),
                })
                .collect(),
        }
    }
}

/// `[MoE layers][experts]`: each expert's share of its layer's rows over all batches; zeros where there were none.
fn expert_load(samples: &[BatchSample]) -> Vec<Vec<f64>> {
    let mut sums = InferenceStats::default();
    samples.iter().for_each(|sample| sums.add(&sample.stats));
    let share = |layer: &LayerStats| {
        let all = layer.expert_rows.iter().sum::<u64>().max(1) as f64;
        layer.expert_rows.iter().map(|&rows| rows as f64 / all).collect()
    };
    sums.layers.iter().map(share).collect()
}

/// The value below which `share` of the batches lie: the nearest rank.
fn percentile(samples: &[BatchSample], share: f64, of: impl Fn(&BatchSample) -> f64) -> f64 {
    let mut values: Vec<f64> = samples.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    let rank = (share * values.len() as f64).ceil() as usize;
    values[rank.clamp(1, values.len()) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(expert_rows: Vec<u64>) -> BatchSample {
        let mut stats = InferenceStats { layers: vec![LayerStats::default()], ..InferenceStats::default() };
        stats.layers[0].expert_rows = expert_rows;
        BatchSample {
            batch_ms: 1.0,
            moe_ms: 0.5,
            blocked_ms: 0.0,
            copy_blocked_ms: 0.0,
            imbalance: 1.0,
            skew: 1.0,
            stats,
        }
    }

    #[test]
    fn the_load_of_experts_is_over_all_batches() {
        assert_eq!(expert_load(&[sample(vec![1, 3, 0]), sample(vec![3, 0, 1])]), [[0.5, 0.375, 0.125]]);
        assert_eq!(expert_load(&[sample(vec![0, 0])]), [[0.0, 0.0]]);
    }
}
