//! Policies side by side in one run: the same model, the same data, interleaved rounds.

mod candidates;
mod output;
mod sample;
mod summary;
mod turns;

use std::path::PathBuf;

use lina_comm::Comm;
use lina_plan::{ExpertLayout, Schedule};

use crate::TrainError;
use crate::config::{BenchConfig, RunConfig};
use crate::data::load_data;
use crate::diagnose::network_sentence;
use crate::gather::gather_samples;
use crate::job::{JobOutcome, run_job};
use crate::memory::MemoryPlan;
use crate::worker::Worker;

pub use candidates::Studies;
pub(crate) use sample::Sample;
pub use summary::BenchSummary;
pub(crate) use turns::BenchPlan;

/// What `lina bench train` is asked for.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Model, data and cluster.
    pub config: RunConfig,
    /// Policies with or without packing, in the order of the table.
    pub policies: Vec<Schedule>,
    /// Times that every policy has its turn.
    pub rounds: usize,
    /// What is measured in the same rounds.
    pub studies: Studies,
    /// Folder for the report and the figures; nothing is written without one.
    pub out: Option<PathBuf>,
    /// No progress on stderr.
    pub quiet: bool,
}

impl BenchOptions {
    /// What `config` asks for, without studies, silently.
    pub fn new(config: RunConfig) -> Self {
        let BenchConfig { policies, rounds, .. } = config.bench_or_default();
        BenchOptions { config, policies, rounds, studies: Studies::default(), out: None, quiet: true }
    }
}

/// Compares policies on a model that starts from its initial or loaded weights.
///
/// # Errors
/// Bad configuration or data, a folder that cannot be written, or a lost rank.
pub fn bench_train(options: BenchOptions) -> Result<BenchSummary, TrainError> {
    let BenchOptions { config, policies, rounds, studies, out, quiet } = options;
    let out = out.filter(|_| config.cluster.leads());
    if let Some(out) = &out {
        output::prepare(out)?;
    }
    let bench = BenchConfig { policies, rounds, ..config.bench_or_default() };
    let settle_steps = bench.settle_steps;
    let loaded = load_data(&config)?;
    let experts = config.expert_layout().map_err(TrainError::input)?;
    MemoryPlan::new(&config, &experts, loaded.bytes).check(config.cluster.memory_limit_bytes())?;
    let plan = BenchPlan::with_studies(&config, &bench, &studies, loaded.bytes)?;
    let job = |comm: &mut Comm| {
        let mut worker = prepared_worker(&config, &loaded.data, &experts, comm)?;
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
        let samples = samples_of_ranks(&config, comm, samples.unwrap_or_default())?;
        Ok((samples, network_sentence(&config, comm)?))
    };
    let first = config.policy_rules();
    let JobOutcome { ranks, bounds } =
        run_job(&config.cluster, &experts, first, &config.to_toml().map_err(TrainError::input)?, job)?;
    let (samples, networks): (Vec<_>, Vec<_>) = ranks.into_iter().unzip();
    let network = networks.into_iter().flatten().next();
    let summary = BenchSummary { network, ..plan.summarise(&config, &samples.concat(), &bounds) };
    if let Some(out) = &out {
        output::write(out, &config, &summary)?;
    }
    Ok(summary)
}

/// What the ranks that this one speaks for have measured: all of them on rank 0 where ranks are processes, else its
/// own.
pub(crate) fn samples_of_ranks(
    config: &RunConfig,
    comm: &mut Comm,
    own: Vec<Sample>,
) -> Result<Vec<Vec<Sample>>, TrainError> {
    if config.cluster.engine.has_processes() { Ok(gather_samples(comm, own)?) } else { Ok(vec![own]) }
}

/// A worker with its first weights: those of the configuration's folder, or random ones.
pub(crate) fn prepared_worker<'a>(
    config: &'a RunConfig,
    data: &'a lina_data::TrainingData,
    experts: &ExpertLayout,
    comm: &mut Comm,
) -> Result<Worker<'a>, TrainError> {
    comm.busy(|comm| {
        let mut worker = Worker::new(config, data, experts, comm)?;
        match &config.model_folder() {
            Some(folder) => crate::checkpoint::load(&mut worker, folder, false)?,
            None => {
                let (_, layout, parameters) = worker.model.for_update();
                parameters.initialise(layout, config.train.seed);
            }
        }
        worker.load_device()?;
        Ok(worker)
    })
}

/// The middle value, between the middle two of an even number; 0 of none.
pub fn median(values: &[f64]) -> f64 {
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
