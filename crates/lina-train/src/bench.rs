//! Policies side by side in one run: the same model, the same data, interleaved rounds.

use lina_comm::{Comm, StepBound, StepStats};
use lina_plan::{ExpertLayout, Policy, Schedule};
use lina_report::{PolicyRow, policy_table};
use serde::Serialize;

use crate::TrainError;
use crate::adaptation::Adaptation;
use crate::config::{BenchConfig, Engine, RunConfig};
use crate::data::load_data;
use crate::gather::gather_samples;
use crate::job::{JobOutcome, run_job};
use crate::memory::MemoryPlan;
use crate::packing::{Packing, PackingPlan};
use crate::worker::Worker;

/// What `lina bench train` is asked for.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Model, data and cluster.
    pub config: RunConfig,
    /// Policies with or without packing, in the order of the table.
    pub policies: Vec<Schedule>,
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
    experts_per_rank: usize,
}

impl Sample {
    /// The sample as words, to send it to another process.
    pub(crate) fn words(&self) -> Vec<u64> {
        let Sample { policy, step, stats, experts_per_rank } = self;
        let mut words = vec![*policy as u64, *step, *experts_per_rank as u64];
        words.extend(stats.to_words());
        words
    }

    /// The sample that [`words`](Self::words) made words of.
    pub(crate) fn from_words(words: &[u64]) -> Self {
        let (head, stats) = words.split_at(3);
        let &[policy, step, experts_per_rank] = head else { unreachable!("3 words") };
        let (policy, experts_per_rank) = (policy as usize, experts_per_rank as usize);
        Sample { policy, step, stats: StepStats::from_words(stats), experts_per_rank }
    }
}

/// Turns and lengths of a comparison.
#[derive(Clone, Debug)]
pub(crate) struct BenchPlan {
    policies: Vec<Schedule>,
    rounds: usize,
    warmup_steps: u64,
    steps: u64,
    /// For the policies with packing.
    packing: Option<PackingPlan>,
    /// For the others.
    layout: ExpertLayout,
}

impl BenchPlan {
    /// What `bench` asks for, with `data_bytes` of data.
    ///
    /// # Errors
    /// If the configured layout of the experts cannot be.
    pub(crate) fn new(config: &RunConfig, bench: &BenchConfig, data_bytes: u64) -> Result<Self, TrainError> {
        let packs = bench.policies.iter().any(|policy| policy.packing);
        Ok(BenchPlan {
            policies: bench.policies.clone(),
            rounds: bench.rounds,
            warmup_steps: bench.warmup_steps,
            steps: bench.steps,
            packing: packs.then(|| PackingPlan::new(config, data_bytes, None)).transpose()?,
            layout: config.expert_layout().map_err(TrainError::input)?,
        })
    }

    /// Runs the turns on one rank, as steps `first_step`, ...; a turn's first steps let the policy learn its plan. In the
    /// first turn of a policy that packs or tunes itself, more steps before them let it decide; later ones begin with
    /// what it came to.
    /// `None` if `stop` asked for an end.
    pub(crate) fn run(
        &self,
        worker: &mut Worker<'_>,
        comm: &mut Comm,
        config: &RunConfig,
        first_step: u64,
        stop: impl Fn() -> bool,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Option<Vec<Sample>>, TrainError> {
        let mut samples = Vec::new();
        let mut step = first_step;
        let turns = self.rounds * self.policies.len();
        let start = |comm: &mut Comm| self.packing.as_ref().map(|plan| plan.start(comm, first_step)).transpose();
        let ladder = start(comm)?;
        let adaptation = |schedule: &Schedule| {
            Adaptation::new(config, schedule.policy, ladder.clone().filter(|_| schedule.packing), None)
        };
        let mut adaptations: Vec<Adaptation> = self.policies.iter().map(adaptation).collect();
        for turn in 0..turns {
            let policy = turn % self.policies.len();
            let adaptation = &mut adaptations[policy];
            let layout = adaptation.packing().map_or(&self.layout, Packing::layout).clone();
            comm.set_rules(adaptation.rules());
            worker.repack(comm, &layout, step)?;
            if turn == policy {
                for _ in 0..adaptation.longest_search_steps() {
                    if adaptation.settled() {
                        break;
                    }
                    let outcome = worker.step(comm, step, stop())?;
                    if outcome.stop {
                        return Ok(None);
                    }
                    step += 1;
                    adaptation.after_step(worker, comm, &outcome, step)?;
                }
            }
            let layout = worker.model.expert_layout().clone();
            for i in 0..self.warmup_steps + self.steps {
                let outcome = worker.step(comm, step, stop())?;
                if outcome.stop {
                    return Ok(None);
                }
                if i >= self.warmup_steps {
                    let experts_per_rank = layout.most_per_rank();
                    samples.push(Sample { policy, step, stats: outcome.stats, experts_per_rank });
                }
                step += 1;
            }
            progress(turn + 1, turns);
        }
        Ok(Some(samples))
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
            let fair = if *policy == Policy::Fair.into() { Some(step_ms_median) } else { fair };
            if number == 0 {
                expert_share = share(&|s| s.expert);
            }
            rows.push(PolicyRow {
                policy: policy.to_string(),
                experts_per_rank: turns.first().map_or(0, |&i| ranks[0][i].experts_per_rank),
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
    let bench = BenchConfig { policies, rounds, ..config.bench_or_default() };
    let settle_steps = bench.settle_steps;
    let loaded = load_data(&config)?;
    let experts = config.expert_layout().map_err(TrainError::input)?;
    MemoryPlan::new(&config, &experts, loaded.bytes).check(config.cluster.memory_limit_bytes())?;
    let plan = BenchPlan::new(&config, &bench, loaded.bytes)?;
    let job = |comm: &mut Comm| {
        let mut worker = prepared_worker(&config, &loaded.data, &experts, comm.rank())?;
        let rank = comm.rank();
        for step in 0..settle_steps {
            worker.step(comm, step, false)?;
        }
        let progress = |turn, turns| {
            if rank == 0 && !quiet {
                eprintln!("bench: turn {turn} of {turns}");
            }
        };
        // Nobody asks for a stop here: nothing would be lost without one.
        let samples = plan.run(&mut worker, comm, &config, settle_steps, || false, progress)?;
        samples_of_ranks(&config, comm, samples.unwrap_or_default())
    };
    let first = config.policy_rules(plan.policies[0].policy);
    let JobOutcome { ranks, bounds } =
        run_job(&config.cluster, &experts, first, &config.to_toml().map_err(TrainError::input)?, job)?;
    Ok(plan.summarise(&config, &ranks.concat(), &bounds))
}

/// What the ranks that this one speaks for have measured: all of them on rank 0 where ranks are processes, else its
/// own.
pub(crate) fn samples_of_ranks(
    config: &RunConfig,
    comm: &mut Comm,
    own: Vec<Sample>,
) -> Result<Vec<Vec<Sample>>, TrainError> {
    if config.cluster.engine == Engine::Mpi { Ok(gather_samples(comm, own)?) } else { Ok(vec![own]) }
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
