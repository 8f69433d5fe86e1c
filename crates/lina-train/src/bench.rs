//! Policies side by side in one run: the same model, the same data, interleaved rounds.

use lina_comm::{Comm, StepBound, StepStats};
use lina_plan::{ExpertLayout, Policy};
use lina_report::{PolicyRow, policy_table};
use serde::Serialize;

use crate::TrainError;
use crate::config::{BenchConfig, RunConfig};
use crate::data::load_data;
use crate::job::{JobOutcome, run_job};
use crate::worker::Worker;

/// What `lina bench train` is asked for.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Model, data and cluster.
    pub config: RunConfig,
    /// Policies, in the order of the table.
    pub policies: Vec<Policy>,
    /// Times that every policy has its turn.
    pub rounds: usize,
    /// No progress on stderr.
    pub quiet: bool,
}

/// The comparison.
#[derive(Clone, Debug, Serialize)]
pub struct BenchSummary {
    /// Engine of the configuration.
    pub engine: String,
    /// Number of ranks.
    pub ranks: usize,
    /// Whether times are virtual.
    pub emulated: bool,
    /// Bytes over rate of the busiest link, median step; `None` where links have no given rate.
    pub link_bound_ms: Option<f64>,
    /// Times that every policy had its turn.
    pub rounds: usize,
    /// Measured steps of a policy's turn.
    pub steps: u64,
    /// Share of the first policy's compute that is the experts' feed-forward, of its step.
    pub expert_share: f64,
    /// A row a policy.
    pub policies: Vec<PolicyRow>,
}

impl BenchSummary {
    /// The rows as a table for a terminal.
    pub fn table(&self) -> String {
        policy_table(&self.policies, self.emulated, self.link_bound_ms)
    }
}

/// One measured step on one rank.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    policy: usize,
    step: u64,
    stats: StepStats,
}

/// Turns and lengths of a comparison.
#[derive(Clone, Debug)]
pub(crate) struct BenchPlan {
    pub(crate) policies: Vec<Policy>,
    pub(crate) rounds: usize,
    pub(crate) warmup_steps: u64,
    pub(crate) steps: u64,
}

impl BenchPlan {
    pub(crate) fn new(bench: &BenchConfig) -> Self {
        BenchPlan {
            policies: bench.policies.clone(),
            rounds: bench.rounds,
            warmup_steps: bench.warmup_steps,
            steps: bench.steps,
        }
    }

    /// Runs the turns on one rank, as steps `first_step`, ...; a turn's first steps let the policy learn its plan.
    pub(crate) fn run(
        &self,
        worker: &mut Worker<'_>,
        comm: &mut Comm,
        config: &RunConfig,
        first_step: u64,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Vec<Sample>, TrainError> {
        let mut samples = Vec::new();
        let mut step = first_step;
        let turns = self.rounds * self.policies.len();
        for turn in 0..turns {
            let policy = turn % self.policies.len();
            comm.set_rules(config.policy_rules(self.policies[policy]));
            for i in 0..self.warmup_steps + self.steps {
                let outcome = worker.step(comm, step, false)?;
                if i >= self.warmup_steps {
                    samples.push(Sample { policy, step, stats: outcome.stats });
                }
                step += 1;
            }
            progress(turn + 1, turns);
        }
        Ok(samples)
    }

    /// The table's rows from every rank's samples and the steps' bounds.
    pub(crate) fn summarise(&self, config: &RunConfig, ranks: &[Vec<Sample>], bounds: &[StepBound]) -> BenchSummary {
        let emulated = config.is_emulated();
        let ms = |nanos: f64| nanos / 1e6;
        let mean = |of: &dyn Fn(&StepStats) -> u64, i: usize| {
            ranks.iter().map(|samples| of(&samples[i].stats) as f64).sum::<f64>() / ranks.len() as f64
        };
        let mut rows: Vec<PolicyRow> = Vec::new();
        let mut link_bounds = Vec::new();
        let mut expert_share = 0.0;
        for (number, policy) in self.policies.iter().enumerate() {
            let turns: Vec<usize> = (0..ranks[0].len()).filter(|&i| ranks[0][i].policy == number).collect();
            let over = |of: &dyn Fn(usize) -> f64| turns.iter().map(|&i| of(i)).collect::<Vec<f64>>();
            let step = |i: usize| ranks.iter().map(|samples| samples[i].stats.step).max().unwrap_or(0) as f64;
            let steps = over(&step);
            let backward = median(&over(&|i| mean(&|s| s.all_to_all_backward, i)));
            let alone = median(&over(&|i| mean(&|s| s.all_to_all_backward_alone, i)));
            let share = |of: &dyn Fn(&StepStats) -> u64| median(&over(&|i| mean(of, i) / step(i).max(1.0)));
            let bound = |of: &dyn Fn(&StepBound) -> f64| {
                let found = turns.iter().filter_map(|&i| bounds.iter().find(|b| b.step == ranks[0][i].step)).map(of);
                let found: Vec<f64> = found.collect();
                (!found.is_empty()).then(|| ms(median(&found)))
            };
            let step_ms_median = ms(median(&steps));
            let (bound_ms, link_bound_ms) = (bound(&|b| b.graph), bound(&|b| b.link));
            link_bounds.extend(link_bound_ms);
            let fair = rows.iter().find(|row| row.policy == Policy::Fair.name()).map(|row| row.step_ms_median);
            let fair = if *policy == Policy::Fair { Some(step_ms_median) } else { fair };
            if number == 0 {
                expert_share = share(&|s| s.expert);
            }
            rows.push(PolicyRow {
                policy: policy.name().to_owned(),
                step_ms_median,
                step_ms_p95: ms(percentile(&steps, 0.95)),
                speedup_vs_fair: fair.map(|fair| fair / step_ms_median),
                a2a_share: share(&|s| s.all_to_all_blocked),
                a2a_backward_ms_median: ms(backward),
                a2a_backward_alone_ms: emulated.then(|| ms(alone)),
                a2a_slowdown: (emulated && alone > 0.0).then(|| backward / alone),
                allreduce_share: share(&|s| if s.all_reduce_alone > 0 { s.all_reduce_alone } else { s.all_reduce }),
                blocked_ms_median: ms(median(&over(&|i| mean(&|s| s.all_to_all_blocked + s.all_reduce_blocked, i)))),
                bound_ms,
                ratio_to_bound: bound_ms.map(|bound| step_ms_median / bound.max(link_bound_ms.unwrap_or(0.0))),
            });
        }
        // A baseline that comes later in the list serves the rows before it too.
        if let Some(fair) = rows.iter().find(|row| row.policy == Policy::Fair.name()).map(|row| row.step_ms_median) {
            rows.iter_mut().for_each(|row| row.speedup_vs_fair = Some(fair / row.step_ms_median));
        }
        BenchSummary {
            engine: config.cluster.engine.name().to_owned(),
            ranks: ranks.len(),
            emulated,
            link_bound_ms: (!link_bounds.is_empty()).then(|| median(&link_bounds)),
            rounds: self.rounds,
            steps: self.steps,
            expert_share,
            policies: rows,
        }
    }
}

/// Compares policies on a model that starts from its initial or loaded weights.
///
/// # Errors
/// Bad configuration or data, or a lost rank.
pub fn bench_train(options: BenchOptions) -> Result<BenchSummary, TrainError> {
    let BenchOptions { config, policies, rounds, quiet } = options;
    let bench = config.bench_or_default();
    let settle_steps = bench.settle_steps;
    let plan = BenchPlan { policies, rounds, ..BenchPlan::new(&bench) };
    let loaded = load_data(&config)?;
    let experts = config.expert_layout().map_err(TrainError::input)?;
    crate::memory::MemoryPlan::new(&config, &experts, loaded.bytes).check(config.cluster.memory_limit_bytes())?;
    let job = |comm: &mut Comm| {
        let mut worker = prepared_worker(&config, &loaded.data, &experts, comm.rank())?;
        let rank = comm.rank();
        for step in 0..settle_steps {
            worker.step(comm, step, false)?;
        }
        plan.run(&mut worker, comm, &config, settle_steps, |turn, turns| {
            if rank == 0 && !quiet {
                eprintln!("bench: turn {turn} of {turns}");
            }
        })
    };
    let first = config.policy_rules(plan.policies[0]);
    let JobOutcome { ranks, bounds } = run_job(&config.cluster, &experts, first, job)?;
    Ok(plan.summarise(&config, &ranks, &bounds))
}

/// A worker with its first weights: those of the configuration's folder, or random ones.
pub(crate) fn prepared_worker<'a>(
    config: &'a RunConfig,
    data: &'a lina_data::TrainingData,
    experts: &ExpertLayout,
    rank: usize,
) -> Result<Worker<'a>, TrainError> {
    let mut worker = Worker::new(config, data, experts, rank)?;
    match &config.model_folder() {
        Some(folder) => crate::checkpoint::load(&mut worker, folder, false)?,
        None => {
            let (_, layout, parameters) = worker.model.for_update();
            parameters.initialise(layout, config.train.seed);
        }
    }
    Ok(worker)
}

pub(crate) fn median(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

/// The value below which `share` of the values lie, interpolated between neighbours.
fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let place = share * last as f64;
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_interpolate() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(percentile(&[0.0, 10.0], 0.95), 9.5);
        assert_eq!(median(&[]), 0.0);
    }
}
