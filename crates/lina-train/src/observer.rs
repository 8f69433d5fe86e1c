//! What rank 0 writes down and shows while a run goes on.

use lina_plan::PolicySettings;
use lina_report::{LayerLoad, MetricsWriter, Progress, StepProgress, StepTime};
use serde::Serialize;

use crate::TrainError;
use crate::config::RunConfig;
use crate::worker::{StepOutcome, Worker};

/// A line of `metrics.jsonl`. Times are virtual where `emulated`.
#[derive(Clone, Debug, Serialize)]
struct MetricsLine {
    step: u64,
    loss: f64,
    router_loss: f64,
    grad_norm: f64,
    learning_rate: f64,
    tokens: u64,
    drop_rate: f64,
    step_ms: f64,
    tokens_per_s: f64,
    compute_ms: f64,
    expert_ms: f64,
    a2a_ms: f64,
    a2a_blocked_ms: f64,
    a2a_bytes: u64,
    allreduce_ms: f64,
    allreduce_blocked_ms: f64,
    /// Copies between host memory and an emulated device with too little memory for all experts.
    copy_ms: f64,
    copy_blocked_ms: f64,
    copy_bytes: u64,
    /// Wall-clock time of the brain's decisions on rank 0, in microseconds.
    deciding_us: f64,
    /// Largest over mean of the experts' assignments, worst layer.
    expert_imbalance: f64,
    /// Experts of an MoE layer on each rank, and the mean times of the micro-ops that packing weighs.
    experts_per_rank: usize,
    ffn_micro_op_ms: f64,
    a2a_micro_op_ms: f64,
    /// Sizes in force, which `lina-auto` changes.
    partition_bytes: usize,
    pipeline_chunks: usize,
    emulated: bool,
}

/// What a report is made of.
#[derive(Clone, Debug, Default)]
pub(crate) struct RunRecord {
    pub(crate) losses: Vec<(u64, f64)>,
    pub(crate) held_out: Vec<(u64, f64)>,
    pub(crate) step_times: Vec<StepTime>,
    /// Assignments to each expert over the last steps.
    pub(crate) expert_load: Vec<LayerLoad>,
    /// First and last step that `expert_load` sums over.
    pub(crate) load_steps: (u64, u64),
    step_ms: Vec<f64>,
    tokens: u64,
}

impl RunRecord {
    pub(crate) fn last_loss(&self) -> f64 {
        self.losses.last().map_or(f64::NAN, |(_, loss)| *loss)
    }

    pub(crate) fn first_held_out(&self) -> Option<f64> {
        self.held_out.first().map(|(_, loss)| *loss)
    }

    pub(crate) fn last_held_out(&self) -> Option<f64> {
        self.held_out.last().map(|(_, loss)| *loss)
    }

    pub(crate) fn step_ms_median(&self) -> f64 {
        crate::bench::median(&self.step_ms)
    }

    pub(crate) fn tokens_per_s(&self) -> f64 {
        self.tokens as f64 * 1e3 / self.step_ms.iter().sum::<f64>().max(f64::MIN_POSITIVE)
    }
}

pub(crate) struct Observer {
    metrics: Option<MetricsWriter>,
    progress: Progress,
    record: RunRecord,
    emulated: bool,
    /// Steps whose expert load is summed for the report: the last ones.
    load_from: u64,
}

/// How many of the last steps the report's expert load is summed over.
const LOAD_STEPS: u64 = 50;

impl Observer {
    pub(crate) fn new(config: &RunConfig, metrics: Option<MetricsWriter>, first_step: u64, quiet: bool) -> Self {
        let steps = config.train.steps;
        Observer {
            metrics,
            progress: if quiet { Progress::silent() } else { Progress::new(first_step, steps) },
            record: RunRecord::default(),
            emulated: config.is_emulated(),
            load_from: steps.saturating_sub(LOAD_STEPS).max(first_step),
        }
    }

    /// A step has been trained, under `settings`.
    pub(crate) fn step(
        &mut self,
        step: u64,
        outcome: &StepOutcome,
        settings: &PolicySettings,
        worker: &Worker<'_>,
    ) -> Result<(), TrainError> {
        let ms = |nanos: u64| nanos as f64 / 1e6;
        let stats = &outcome.stats;
        let step_ms = ms(stats.step);
        let tokens_per_s = outcome.tokens as f64 * 1e3 / step_ms.max(f64::MIN_POSITIVE);
        let record = &mut self.record;
        record.losses.push((step, outcome.loss));
        record.step_ms.push(step_ms);
        record.tokens += outcome.tokens;
        record.step_times.push(StepTime {
            step,
            compute_ms: ms(stats.compute),
            a2a_blocked_ms: ms(stats.all_to_all_blocked),
            other_blocked_ms: ms(stats.all_reduce_blocked + stats.copy_blocked),
        });
        let expert_imbalance = self.expert_load(step, worker);
        if let Some(metrics) = &mut self.metrics {
            metrics.append(&MetricsLine {
                step,
                loss: outcome.loss,
                router_loss: outcome.router_loss,
                grad_norm: outcome.grad_norm,
                learning_rate: outcome.learning_rate,
                tokens: outcome.tokens,
                drop_rate: outcome.drop_rate,
                step_ms,
                tokens_per_s,
                compute_ms: ms(stats.compute),
                expert_ms: ms(stats.expert),
                a2a_ms: ms(stats.all_to_all),
                a2a_blocked_ms: ms(stats.all_to_all_blocked),
                a2a_bytes: stats.all_to_all_bytes,
                allreduce_ms: ms(stats.all_reduce),
                allreduce_blocked_ms: ms(stats.all_reduce_blocked),
                copy_ms: ms(stats.copy),
                copy_blocked_ms: ms(stats.copy_blocked),
                copy_bytes: stats.copy_bytes,
                deciding_us: stats.deciding_wall as f64 / 1e3,
                expert_imbalance,
                experts_per_rank: worker.model.expert_layout().most_per_rank(),
                ffn_micro_op_ms: outcome.packing.ffn_micro_op_ns / 1e6,
                a2a_micro_op_ms: outcome.packing.all_to_all_micro_op_ns / 1e6,
                partition_bytes: settings.partition_bytes,
                pipeline_chunks: settings.pipeline_chunks,
                emulated: self.emulated,
            })?;
        }
        self.progress.step(&StepProgress {
            steps_done: step + 1,
            loss: outcome.loss,
            tokens_per_s,
            a2a_ms: ms(stats.all_to_all),
            emulated: self.emulated,
        });
        Ok(())
    }

    /// Adds the step's assignments up, and returns the worst layer's imbalance.
    fn expert_load(&mut self, step: u64, worker: &Worker<'_>) -> f64 {
        let config = worker.model.config();
        let mut worst = 1.0f64;
        let keep = step >= self.load_from;
        if keep && self.record.expert_load.is_empty() {
            let moe_layers = (0..config.layers).filter(|&layer| config.is_moe(layer));
            let empty = |layer| LayerLoad { layer: layer as u32, tokens: vec![0; config.experts] };
            self.record.expert_load = moe_layers.map(empty).collect();
            self.record.load_steps.0 = step;
        }
        let routings = (0..config.layers).filter_map(|layer| worker.routing(layer));
        for (number, routing) in routings.enumerate() {
            let (mut sum, mut largest) = (0, 0);
            for expert in 0..config.experts {
                let assignments = routing.global_assignments(expert);
                sum += assignments;
                largest = largest.max(assignments);
                if keep {
                    self.record.expert_load[number].tokens[expert] += assignments;
                }
            }
            worst = worst.max(largest as f64 * config.experts as f64 / (sum as f64).max(1.0));
        }
        self.record.load_steps.1 = step;
        worst
    }

    /// Says a sentence among the progress.
    pub(crate) fn note(&self, sentence: &str) {
        self.progress.note(sentence);
    }

    pub(crate) fn held_out(&mut self, step: u64, loss: f64) {
        self.record.held_out.push((step, loss));
        self.progress.note(&format!("step {step}: held-out loss {loss:.4}"));
    }

    pub(crate) fn finish(self) -> RunRecord {
        self.progress.finish();
        self.record
    }
}
