//! `lina train`: from a configuration to a run directory.

use std::path::{Path, PathBuf};
use std::time::Instant;

use lina_comm::{Comm, Span};
use lina_report::MetricsWriter;
use serde::Serialize;

use crate::TrainError;
use crate::bench::{BenchPlan, BenchSummary, Sample, prepared_worker};
use crate::checkpoint::{self, TrainerState};
use crate::config::RunConfig;
use crate::data::{LoadedData, load_data};
use crate::job::{JobOutcome, run_job};
use crate::memory::{MemoryPlan, peak_rss_bytes};
use crate::observer::{Observer, RunRecord};
use crate::outputs::write_outputs;
use crate::stop::StopFlag;
use crate::worker::Worker;

/// What `lina train` is asked for.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// The run.
    pub config: RunConfig,
    /// Run directory; nothing is written without one.
    pub out: Option<PathBuf>,
    /// Checkpoint to go on from.
    pub resume: Option<PathBuf>,
    /// No progress on stderr.
    pub quiet: bool,
}

/// What a run came to.
#[derive(Clone, Debug, Serialize)]
pub struct TrainSummary {
    /// Steps that are done, those before a resume included.
    pub steps: u64,
    /// Loss of the last step's batch.
    pub final_loss: f64,
    /// Loss on held-out text before the first step of this run.
    pub eval_loss_start: Option<f64>,
    /// Loss on held-out text at the end.
    pub eval_loss: Option<f64>,
    /// Median step time, virtual where emulated.
    pub step_ms_median: f64,
    /// Wall-clock time of the run, start-up and evaluation included.
    pub wall_s: f64,
    /// Training tokens over step time, virtual where emulated.
    pub tokens_per_s: f64,
    /// The process's peak resident set.
    pub peak_rss_bytes: Option<u64>,
    /// What was predicted of it.
    pub memory: MemoryPlan,
    /// The last checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// Whether times are virtual.
    pub emulated: bool,
    /// The policies side by side, where the configuration asks for it.
    pub bench: Option<BenchSummary>,
}

/// What one rank brings home.
struct RankOutcome {
    spans: Vec<Span>,
    samples: Vec<Sample>,
    record: Option<RunRecord>,
    steps: u64,
    checkpoint: Option<PathBuf>,
    interrupted: bool,
}

/// Trains.
///
/// # Errors
/// Bad configuration, data, checkpoint or environment; a lost rank; a stop on request.
pub fn train(options: TrainOptions, stop: &StopFlag) -> Result<TrainSummary, TrainError> {
    let started = Instant::now();
    let TrainOptions { config, out, resume, quiet } = options;
    let loaded = load_data(&config)?;
    let experts = config.expert_layout().map_err(TrainError::input)?;
    let memory = MemoryPlan::new(&config, &experts, loaded.bytes);
    memory.check(config.cluster.memory_limit_bytes())?;
    let train_sequences = loaded.data.train.sequences();
    let resume = match &resume {
        Some(folder) => Some((folder.as_path(), TrainerState::read(folder, &config, train_sequences)?)),
        None => None,
    };
    let first_step = resume.as_ref().map_or(0, |(_, state)| state.step);
    let metrics = match &out {
        Some(out) => Some(prepare_out(out, &config, first_step)?),
        None => None,
    };
    // Rank 0 takes them into its thread.
    let metrics = std::sync::Mutex::new(metrics);

    let job = |comm: &mut Comm| {
        let mut worker = prepared_worker(&config, &loaded.data, &experts, comm.rank())?;
        if let Some((folder, _)) = &resume {
            checkpoint::load(&mut worker, folder, true)?;
        }
        let observer = (comm.rank() == 0).then(|| {
            let metrics = metrics.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
            Observer::new(&config, metrics, first_step, quiet)
        });
        let run = Run { config: &config, loaded: &loaded, out: out.as_deref(), stop, first_step };
        run.rank(&mut worker, comm, observer)
    };
    let rules = config.policy_rules(config.policy.name);
    let JobOutcome { mut ranks, bounds } = run_job(&config.cluster, &experts, rules, job)?;

    let bench = bench_plan(&config).filter(|_| !ranks[0].samples.is_empty()).map(|plan| {
        let samples: Vec<Vec<Sample>> = ranks.iter_mut().map(|rank| std::mem::take(&mut rank.samples)).collect();
        plan.summarise(&config, &samples, &bounds)
    });
    let spans: Vec<Span> = ranks.iter_mut().flat_map(|rank| std::mem::take(&mut rank.spans)).collect();
    let RankOutcome { record, steps, checkpoint, interrupted, .. } = ranks.swap_remove(0);
    let record = record.unwrap_or_default();
    if let Some(out) = &out {
        write_outputs(out, &config, &experts, &record, &spans, bench.as_ref())?;
    }
    if interrupted {
        return Err(TrainError::Interrupted { step: steps, checkpoint });
    }
    Ok(TrainSummary {
        steps,
        final_loss: record.last_loss(),
        eval_loss_start: record.first_held_out(),
        eval_loss: record.last_held_out(),
        step_ms_median: record.step_ms_median(),
        wall_s: started.elapsed().as_secs_f64(),
        tokens_per_s: record.tokens_per_s(),
        peak_rss_bytes: peak_rss_bytes(),
        memory,
        checkpoint,
        emulated: config.is_emulated(),
        bench,
    })
}

/// Makes the run directory, with the resolved configuration and the metrics file.
fn prepare_out(out: &Path, config: &RunConfig, first_step: u64) -> Result<MetricsWriter, TrainError> {
    let error =
        |path: &Path, e: std::io::Error| TrainError::Input(format!("{}: cannot be written: {e}", path.display()));
    std::fs::create_dir_all(out).map_err(|e| error(out, e))?;
    let path = out.join("config.toml");
    std::fs::write(&path, config.to_toml().map_err(TrainError::input)?).map_err(|e| error(&path, e))?;
    let metrics = out.join("metrics.jsonl");
    Ok(if first_step > 0 && metrics.exists() {
        MetricsWriter::resume(&metrics, first_step)?
    } else {
        MetricsWriter::create(&metrics)?
    })
}

/// The comparison at the end of a run, where the configuration asks for one.
fn bench_plan(config: &RunConfig) -> Option<BenchPlan> {
    config.bench.as_ref().filter(|bench| !bench.policies.is_empty()).map(BenchPlan::new)
}

/// What every rank of a run shares.
struct Run<'a> {
    config: &'a RunConfig,
    loaded: &'a LoadedData,
    out: Option<&'a Path>,
    stop: &'a StopFlag,
    first_step: u64,
}

impl Run<'_> {
    fn rank(
        &self,
        worker: &mut Worker<'_>,
        comm: &mut Comm,
        mut observer: Option<Observer>,
    ) -> Result<RankOutcome, TrainError> {
        let train = &self.config.train;
        let mut checkpoint = None;
        let mut interrupted = false;
        let mut done = self.first_step;
        let record_from = train.steps.saturating_sub(train.trace_steps);
        self.evaluate(worker, comm, done, &mut observer)?;
        while done < train.steps && !interrupted {
            if self.out.is_some() && done == record_from.max(self.first_step) {
                comm.record(true);
            }
            let outcome = worker.step(comm, done, self.stop.requested())?;
            done += 1;
            if let Some(observer) = &mut observer {
                observer.step(done - 1, &outcome, &worker.model)?;
            }
            interrupted = outcome.stop && done < train.steps;
            let last = done == train.steps || interrupted;
            if last || (train.eval_every > 0 && done.is_multiple_of(train.eval_every)) {
                self.evaluate(worker, comm, done, &mut observer)?;
            }
            if last || (train.checkpoint_every > 0 && done.is_multiple_of(train.checkpoint_every)) {
                checkpoint = self.save(worker, comm, done)?.or(checkpoint);
            }
        }
        let spans = comm.record(false);
        let record = observer.map(Observer::finish);
        let mut samples = Vec::new();
        if let Some(plan) = bench_plan(self.config).filter(|_| !interrupted) {
            samples = plan.run(worker, comm, self.config, done, |_, _| {})?;
        }
        Ok(RankOutcome { spans, samples, record, steps: done, checkpoint, interrupted })
    }

    fn evaluate(
        &self,
        worker: &mut Worker<'_>,
        comm: &mut Comm,
        step: u64,
        observer: &mut Option<Observer>,
    ) -> Result<(), TrainError> {
        let loss = worker.evaluate(comm, step)?;
        if let (Some(observer), Some(loss)) = (observer, loss) {
            observer.held_out(step, loss);
        }
        Ok(())
    }

    fn save(&self, worker: &Worker<'_>, comm: &mut Comm, step: u64) -> Result<Option<PathBuf>, TrainError> {
        let Some(out) = self.out else { return Ok(None) };
        let state = TrainerState::new(self.config, self.loaded.data.train.sequences(), step);
        let tokenizer = self.loaded.tokenizer_file.as_deref();
        checkpoint::save(worker, comm, out, &state, tokenizer).map(Some)
    }
}
