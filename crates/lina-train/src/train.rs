//! `lina train`: from a configuration to a run directory.

use std::path::{Path, PathBuf};
use std::time::Instant;

use lina_comm::{Comm, Span};
use lina_plan::{ExpertLayout, PolicySettings};
use serde::Serialize;

use crate::TrainError;
use crate::adaptation::Adaptation;
use crate::bench::{BenchPlan, BenchSummary, Sample, prepared_worker, samples_of_ranks};
use crate::checkpoint::{self, TrainerState};
use crate::config::RunConfig;
use crate::data::{LoadedData, load_data};
use crate::diagnose::network_sentence;
use crate::gather::gather_spans;
use crate::job::{JobOutcome, run_job};
use crate::memory::{MemoryPlan, peak_rss_bytes};
use crate::observer::{Observer, RunRecord};
use crate::outputs::write_outputs;
use crate::packing::{Packing, PackingPlan};
use crate::residency;
use crate::run_folder;
use crate::stop::StopFlag;
use crate::worker::Worker;

/// What `lina train` is asked for.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// The run.
    pub config: RunConfig,
    /// Run directory, without checkpoints unless they are of the run that goes on; nothing is written without one.
    pub out: Option<PathBuf>,
    /// Checkpoint to go on from, or the folder of a run, whose latest one it is then.
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
    /// What was predicted of it, with the experts as they are at the end.
    pub memory: MemoryPlan,
    /// Experts of an MoE layer on each rank at the end.
    pub experts_per_rank: usize,
    /// Sizes of the policy at the end.
    pub settings: PolicySettings,
    /// The run directory.
    pub out: Option<PathBuf>,
    /// The last checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// Whether times are virtual.
    pub emulated: bool,
    /// What ranks measured of each other after the last step, where they are processes and there is a run directory.
    pub network: Option<String>,
    /// The policies side by side, where the configuration asks for it.
    pub bench: Option<BenchSummary>,
}

/// What one rank brings home.
struct RankOutcome {
    /// Of every rank that this one speaks for.
    spans: Vec<Span>,
    /// By rank, of every rank that this one speaks for.
    samples: Vec<Vec<Sample>>,
    /// At the end of the training.
    layout: ExpertLayout,
    settings: PolicySettings,
    network: Option<String>,
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
    let resume = resume.as_deref().map(run_folder::checkpoint_of).transpose()?;
    if let (Some(out), None) = (&out, &resume) {
        run_folder::check_free(out, None)?;
    }
    let loaded = load_data(&config)?;
    let train_sequences = loaded.data.train.sequences();
    let resume = match &resume {
        Some(folder) => Some((folder.as_path(), TrainerState::read(folder, &config, train_sequences)?)),
        None => None,
    };
    let packing = if config.policy.packing {
        let resumed = resume.as_ref().and_then(|(_, state)| state.packing.as_ref());
        Some(PackingPlan::new(&config, loaded.bytes, resumed)?)
    } else {
        None
    };
    let experts = match &packing {
        Some(packing) => packing.layout().clone(),
        None => config.expert_layout().map_err(TrainError::input)?,
    };
    let memory = MemoryPlan::new(&config, &experts, loaded.bytes);
    memory.check(config.cluster.memory_limit_bytes())?;
    let bench = bench_plan(&config, loaded.bytes)?;
    let first_step = resume.as_ref().map_or(0, |(_, state)| state.step);
    if let (Some(out), Some(_)) = (&out, &resume) {
        run_folder::check_free(out, Some(first_step))?;
    }

    let job = |comm: &mut Comm| {
        let mut worker = prepared_worker(&config, &loaded.data, &experts, comm)?;
        if let Some((folder, _)) = &resume {
            comm.busy(|_| checkpoint::load(&mut worker, folder, true).and_then(|()| worker.load_device()))?;
        }
        // A checkpoint that some rank cannot read must not leave a run's folder behind.
        comm.begin_evaluation(first_step)?;
        comm.sum(&mut [0.0])?;
        comm.end_step();
        let mut observer = None;
        if comm.rank() == 0 {
            let metrics = out.as_deref().map(|out| run_folder::prepare(out, &config, first_step)).transpose()?;
            let started = Observer::new(&config, metrics, first_step, quiet);
            started.note(&memory.sentence());
            if let Some(waiting) = residency::sentence(&config, &experts) {
                started.note(&waiting);
            }
            observer = Some(started);
        }
        let packing = packing.as_ref().map(|plan| plan.start(&worker, comm, first_step)).transpose()?;
        let resumed = resume.as_ref().and_then(|(_, state)| state.tuning.as_ref());
        let adaptation = Adaptation::new(&config, config.policy.name, packing, resumed);
        comm.set_rules(adaptation.rules());
        let bench = bench.as_ref();
        let run = Run { config: &config, loaded: &loaded, out: out.as_deref(), stop, first_step, bench };
        run.rank(&mut worker, comm, observer, adaptation)
    };
    let rules = config.policy_rules();
    let identity = format!("{}done = {first_step}", config.to_toml().map_err(TrainError::input)?);
    let JobOutcome { mut ranks, bounds } = run_job(&config.cluster, &experts, rules, &identity, job)?;

    let samples: Vec<Vec<Sample>> = ranks.iter_mut().flat_map(|rank| std::mem::take(&mut rank.samples)).collect();
    let bench = bench
        .as_ref()
        .filter(|_| samples.iter().any(|of_rank| !of_rank.is_empty()))
        .map(|plan| plan.summarise(&config, &samples, &bounds));
    let spans: Vec<Span> = ranks.iter_mut().flat_map(|rank| std::mem::take(&mut rank.spans)).collect();
    let RankOutcome { record, steps, checkpoint, interrupted, layout, settings, network, .. } = ranks.swap_remove(0);
    let record = record.unwrap_or_default();
    if let Some(out) = out.as_ref().filter(|_| config.cluster.leads()) {
        write_outputs(out, &config, &experts, &record, &spans, bench.as_ref(), network.as_deref())?;
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
        memory: if layout == experts { memory } else { MemoryPlan::new(&config, &layout, loaded.bytes) },
        experts_per_rank: layout.most_per_rank(),
        settings,
        out,
        checkpoint,
        emulated: config.is_emulated(),
        network,
        bench,
    })
}

/// The comparison at the end of a run, where the configuration asks for one.
fn bench_plan(config: &RunConfig, data_bytes: u64) -> Result<Option<BenchPlan>, TrainError> {
    let bench = config.bench.as_ref().filter(|bench| !bench.policies.is_empty());
    bench.map(|bench| BenchPlan::new(config, bench, data_bytes)).transpose()
}

/// What every rank of a run shares.
struct Run<'a> {
    config: &'a RunConfig,
    loaded: &'a LoadedData,
    out: Option<&'a Path>,
    stop: &'a StopFlag,
    first_step: u64,
    bench: Option<&'a BenchPlan>,
}

impl Run<'_> {
    fn rank(
        &self,
        worker: &mut Worker<'_>,
        comm: &mut Comm,
        mut observer: Option<Observer>,
        mut adaptation: Adaptation,
    ) -> Result<RankOutcome, TrainError> {
        let train = &self.config.train;
        let mut checkpoint = None;
        let mut interrupted = false;
        let mut spans = Vec::new();
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
                observer.step(done - 1, &outcome, adaptation.settings(), worker)?;
            }
            interrupted = outcome.stop && done < train.steps;
            let last = done == train.steps || interrupted;
            if last {
                // Evaluation and checkpoint are no part of the steps that the trace shows.
                spans = comm.record(false);
            }
            if let Some(change) = adaptation.after_step(worker, comm, &outcome, done)?
                && let Some(observer) = &observer
            {
                observer.note(&change);
            }
            if last || (train.eval_every > 0 && done.is_multiple_of(train.eval_every)) {
                self.evaluate(worker, comm, done, &mut observer)?;
            }
            if last || (train.checkpoint_every > 0 && done.is_multiple_of(train.checkpoint_every)) {
                checkpoint = self.save(worker, comm, &adaptation, done)?.or(checkpoint);
            }
        }
        let record = observer.map(Observer::finish);
        let mut samples = vec![Vec::new()];
        let layout = worker.model.expert_layout().clone();
        if let Some(plan) = self.bench.filter(|_| !interrupted) {
            let measured = plan.run(worker, comm, self.config, done, || self.stop.requested(), |_, _| {})?;
            interrupted = measured.is_none();
            samples = samples_of_ranks(self.config, comm, measured.unwrap_or_default())?;
        }
        if self.config.cluster.engine.has_processes() {
            spans = gather_spans(comm, spans)?;
        }
        let settings = *adaptation.settings();
        let network = if self.out.is_some() && !interrupted { network_sentence(self.config, comm)? } else { None };
        Ok(RankOutcome { network, spans, samples, layout, settings, record, steps: done, checkpoint, interrupted })
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

    fn save(
        &self,
        worker: &mut Worker<'_>,
        comm: &mut Comm,
        adaptation: &Adaptation,
        step: u64,
    ) -> Result<Option<PathBuf>, TrainError> {
        let Some(out) = self.out else { return Ok(None) };
        worker.store_device()?;
        let state = TrainerState {
            packing: adaptation.packing().map(Packing::state),
            tuning: adaptation.tuning_state(comm.ranks()),
            ..TrainerState::new(self.config, self.loaded.data.train.sequences(), step)
        };
        let tokenizer = self.loaded.tokenizer_file.as_deref();
        checkpoint::save(worker, comm, out, &state, tokenizer).map(Some)
    }
}
