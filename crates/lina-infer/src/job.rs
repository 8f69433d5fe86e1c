//! A job that serves requests: ranks start, hold the model, and end when nobody asks any more.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use lina_comm::Comm;
use lina_kernels::PAGE_TOKENS;
use lina_model::{ExpertOptions, Forecast, InferenceLimits, InferenceWeights, KvCache, ModelConfig};
use lina_plan::{
    Estimator, ExpertLayout, ExpertSchedulerSettings, PlacementCosts, PlacementPolicy, Policy, PolicyRules,
    PolicySettings,
};
use lina_train::{ClusterConfig, Engine, MemoryPlan, TrainError, launched_ranks_here, run_job};

use crate::device::{ModelParts, ProcessShared, StepModel};
use crate::ranks::{RankWorker, Ranks};
use crate::{
    Arithmetic, BackendLimits, Device, EngineHandle, EngineOptions, InferError, engine_channel, load_profile,
    serve_requests,
};

/// Tokens of the longest sequence, unless more are asked for: keys and values take memory.
const DEFAULT_SEQUENCE_TOKENS: usize = 4096;
/// Tokens that a rank computes in a step unless told otherwise.
const DEFAULT_STEP_TOKENS: usize = 512;
/// Memory for keys and values of all ranks of a process unless told otherwise.
const DEFAULT_CACHE_GIB: f64 = 1.0;
/// Most ranks of a job, and most threads of a rank.
const MAX_RANKS: usize = 1024;
/// What a batch counts beside the next one in the moving averages of [`Estimator::History`].
pub(crate) const HISTORY_DECAY: f64 = 0.7;
/// Batches between two placements of `eplb`.
pub(crate) const PLAN_EVERY: usize = 32;

/// A model, the ranks that run it, and how they place its experts.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// Hugging Face folder.
    pub model: PathBuf,
    /// Number of ranks.
    pub ranks: usize,
    /// What carries their messages.
    pub engine: Engine,
    /// What they compute on.
    pub arithmetic: Arithmetic,
    /// Compute threads of a rank; 0 for an even share of the cores.
    pub threads: usize,
    /// Longest sequence, prompt and answer together; by default the model's positions, at most 4096.
    pub max_sequence_tokens: Option<usize>,
    /// Most tokens that a rank computes in a step.
    pub step_tokens: usize,
    /// Memory for the keys and values of all ranks of this process, in GiB.
    pub cache_gib: f64,
    /// How experts are placed on several ranks.
    pub placement: PlacementPolicy,
    /// What placements go by.
    pub estimator: Estimator,
    /// Tables of [`Estimator::Path`], as `lina profile` writes them.
    pub profile: Option<PathBuf>,
    /// Slots for experts of each rank and layer; by default an even share and one more.
    pub slots: Option<usize>,
    /// Computes every n-th token again on its own rank and compares.
    pub verify_every: Option<u64>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        ModelOptions {
            model: PathBuf::new(),
            ranks: 1,
            engine: Engine::Local,
            arithmetic: Arithmetic::CPU,
            threads: 0,
            max_sequence_tokens: None,
            step_tokens: DEFAULT_STEP_TOKENS,
            cache_gib: DEFAULT_CACHE_GIB,
            placement: PlacementPolicy::LinaAuto,
            estimator: Estimator::History,
            profile: None,
            slots: None,
            verify_every: None,
        }
    }
}

/// Everything that [`with_engine`] knows before ranks start.
struct Prepared {
    cluster: ClusterConfig,
    config: ModelConfig,
    limits: InferenceLimits,
    backend: BackendLimits,
    scheduler: ExpertSchedulerSettings,
}

/// Starts a job, calls `f` with the handle of its engine on the process that leads (rank 0's; with threads there is no
/// other), and ends the job when `f` returns: what is running then is answered first. `None` on a process that does not
/// lead.
///
/// # Errors
/// A bad folder or sizes; a lost rank.
pub fn with_engine<R: Send>(
    options: &ModelOptions,
    engine: EngineOptions,
    f: impl FnOnce(EngineHandle) -> R + Send,
) -> Result<Option<R>, InferError> {
    let prepared = prepare(options)?;
    let beside = beside_weights(options, &prepared);
    let processes = if options.engine.has_processes() { launched_ranks_here().unwrap_or(1) } else { 1 };
    let weights = Arc::new(load_weights(Some(&options.model), prepared.config.clone(), &[beside], processes)?);
    let forecast = forecast(options, &weights)?;
    let (handle, inbox) = engine_channel(engine, prepared.backend);
    // Who asks begins once a rank can answer.
    let (ready, serving) = mpsc::channel();
    let inbox = Mutex::new(Some((inbox, ready)));
    let experts =
        ExpertLayout::new(prepared.config.experts.max(1), prepared.cluster.ranks, None).map_err(InferError::input)?;
    let rules = PolicyRules::new(Policy::Fair, &PolicySettings::default());
    let identity = format!("{}\n{options:?}", prepared.config.to_json());
    let shared = ProcessShared::default();
    let rank_main = |comm: &mut Comm| -> Result<(), TrainError> {
        let (scheduler, forecast, verify_every) = (prepared.scheduler, forecast.clone(), options.verify_every);
        let parts = ModelParts {
            arithmetic: options.arithmetic,
            engine: options.engine,
            threads: prepared.cluster.threads_of(comm.ranks()),
            limits: prepared.limits,
            experts: ExpertOptions { scheduler, forecast, planning_flops: 0, verify_every },
            weights: &weights,
            shared: &shared,
        };
        let mut model = StepModel::start(comm, parts)?;
        model.warm_up(comm)?;
        let mut worker = RankWorker::new(model);
        if comm.rank() > 0 {
            return worker.follow(comm).map_err(job_error);
        }
        let (inbox, ready) = inbox.lock().unwrap_or_else(PoisonError::into_inner).take().expect("one rank leads");
        // The other end stays until the job has ended.
        let _ = ready.send(());
        let mut ranks = Ranks::new(comm, worker, prepared.backend, prepared.cluster.is_emulated());
        serve_requests(&mut ranks, inbox).and_then(|()| ranks.stop()).map_err(job_error)
    };
    if !prepared.cluster.leads() {
        drop(handle);
        run_job(&prepared.cluster, &experts, rules, &identity, rank_main)?;
        return Ok(None);
    }
    std::thread::scope(|scope| {
        let user = scope.spawn(move || {
            let _end = ShutDownOnDrop(handle.clone());
            serving.recv().ok().map(|()| f(handle))
        });
        let job = run_job(&prepared.cluster, &experts, rules, &identity, rank_main);
        // A job that never came to serve must not leave its user waiting.
        drop(inbox.lock().unwrap_or_else(PoisonError::into_inner).take());
        let result = user.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        job?;
        Ok(result)
    })
}

/// What a process has in host memory beside the weights: the name and bytes of a part.
fn beside_weights(options: &ModelOptions, prepared: &Prepared) -> (&'static str, u64) {
    if options.arithmetic.device == Device::Cpu {
        return ("keys and values", (options.cache_gib * f64::from(1 << 30)) as u64);
    }
    // A GPU has memory of its own for keys and values; experts that have no slot of it come from a copy.
    let config = &prepared.config;
    let matrices = config.ffn.input_matrices() + 1;
    let expert_bytes = matrices * config.hidden * config.expert_hidden * options.arithmetic.element_bytes();
    let copied = if prepared.scheduler.slots < config.experts { config.moe_layers() * config.experts } else { 0 };
    ("experts for copies", (copied * expert_bytes) as u64)
}

/// A model's weights, of `folder` or initial ones, if they fit beside other parts (names and bytes) in each of `processes`
/// processes of this host.
pub(crate) fn load_weights(
    folder: Option<&Path>,
    config: ModelConfig,
    beside: &[(&str, u64)],
    processes: usize,
) -> Result<InferenceWeights, InferError> {
    let of_process = [&[("weights", InferenceWeights::bytes_of(&config))], beside].concat();
    let parts: Vec<_> = of_process.into_iter().map(|(name, bytes)| (name, bytes * processes as u64)).collect();
    let advice = "lower --cache-gib, raise --slots, have fewer ranks on this host or take a smaller model";
    MemoryPlan::of_parts(&parts).check_or(advice, None)?;
    match folder {
        Some(folder) => InferenceWeights::load(folder, config).map_err(InferError::input),
        None => Ok(InferenceWeights::initial(config, 0)),
    }
}

/// Ends the engine however its user ends.
struct ShutDownOnDrop(EngineHandle);

impl Drop for ShutDownOnDrop {
    fn drop(&mut self) {
        self.0.shut_down();
    }
}

/// Inference's failures as a job's.
pub(crate) fn job_error(error: InferError) -> TrainError {
    match error {
        InferError::Input(message) => TrainError::Input(message),
        InferError::Lost(error) => TrainError::Lost(error),
        #[cfg(feature = "cuda")]
        InferError::Device(error) => TrainError::Device(error),
    }
}

fn prepare(options: &ModelOptions) -> Result<Prepared, InferError> {
    let error = |message: String| Err(InferError::Input(message));
    let config = ModelConfig::from_folder(&options.model).map_err(InferError::input)?;
    for (option, value, least) in [("--ranks", options.ranks, 1), ("--threads", options.threads, 0)] {
        if !(least..=MAX_RANKS).contains(&value) {
            return error(format!("{option} is {value}, expected a number from {least} to {MAX_RANKS}"));
        }
    }
    options.arithmetic.check(options.engine).map_err(InferError::Input)?;
    let longest = options.max_sequence_tokens.unwrap_or(config.max_positions.min(DEFAULT_SEQUENCE_TOKENS));
    if longest < 2 || longest > config.max_positions {
        return error(format!(
            "--max-sequence-tokens is {longest}, expected 2 to {}, the model's positions",
            config.max_positions
        ));
    }
    if options.step_tokens == 0 {
        return error("--step-tokens is 0, expected at least 1".to_owned());
    }
    if options.verify_every == Some(0) {
        return error("--verify-every is 0, expected at least 1".to_owned());
    }
    let pages_of_longest = KvCache::pages_for(longest);
    let page_bytes = (KvCache::page_elements(&config) * options.arithmetic.element_bytes()) as f64;
    let cluster = ClusterConfig {
        ranks: options.ranks,
        engine: options.engine,
        threads: options.threads,
        ..ClusterConfig::default()
    };
    let ranks_here = if options.engine == Engine::Local { options.ranks } else { 1 };
    let pages = (options.cache_gib * f64::from(1 << 30) / page_bytes / ranks_here as f64) as usize;
    if !options.cache_gib.is_finite() || pages < pages_of_longest {
        let needed = pages_of_longest as f64 * page_bytes * ranks_here as f64 / f64::from(1 << 30);
        return error(format!(
            "--cache-gib is {}, expected at least {:.3}: keys and values of one sequence of {longest} tokens on each rank",
            options.cache_gib,
            (needed * 1e3).ceil() / 1e3
        ));
    }
    let limits = InferenceLimits { max_tokens: options.step_tokens, max_sequence_tokens: longest, pages };
    let backend = BackendLimits {
        vocab: config.vocab,
        max_positions: longest,
        ranks: options.ranks,
        page_tokens: PAGE_TOKENS,
        pages_per_rank: pages,
        step_tokens_per_rank: options.step_tokens,
    };
    if options.placement == PlacementPolicy::Best {
        return error(
            "--placement is best, which only a benchmark can have, expected static, lina, eplb or lina-auto".into(),
        );
    }
    let even_share = config.experts.div_ceil(options.ranks);
    let slots = options.slots.unwrap_or(even_share + 1);
    if slots < even_share {
        return error(format!(
            "--slots is {slots}, expected at least {even_share}: {} ranks must hold {} experts",
            options.ranks, config.experts
        ));
    }
    let slots = slots.min(config.experts);
    let scheduler = ExpertSchedulerSettings {
        placement: if options.ranks == 1 { PlacementPolicy::Static } else { options.placement },
        estimation: true,
        fine_tuning: true,
        slots,
        top_k: config.top_k,
        costs: PlacementCosts { row_ns: 1.0, wire_row_ns: 0.0, copy_ns: 0.0 },
        plan_every: PLAN_EVERY,
        seed: 0,
    };
    Ok(Prepared { cluster, config, limits, backend, scheduler })
}

/// What phase one goes by.
fn forecast(options: &ModelOptions, weights: &InferenceWeights) -> Result<Forecast, InferError> {
    let unused = options.ranks == 1 || options.placement == PlacementPolicy::Static;
    Ok(match (options.estimator, &options.profile) {
        (Estimator::History | Estimator::NextGate, _) if unused => Forecast::None,
        (Estimator::Path, Some(profile)) => Forecast::Path(Arc::new(load_profile(profile, weights)?)),
        (Estimator::Path, None) => {
            return Err(InferError::Input(
                "--estimator path needs --profile, a file that `lina profile` has made".into(),
            ));
        }
        (Estimator::NextGate, _) => Forecast::NextGate,
        (Estimator::History, _) => Forecast::History(HISTORY_DECAY),
        (Estimator::Oracle, _) => {
            return Err(InferError::Input(
                "--estimator is oracle, which only a benchmark can have, expected path, next-gate or history".into(),
            ));
        }
    })
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;
    use lina_train::Scalar;

    #[test]
    fn experts_without_a_slot_are_counted_once_more() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lina-model/tests/fixtures/hf/qwen3_moe");
        let config = ModelConfig::from_folder(&model).unwrap();
        let weights = InferenceWeights::load(&model, config.clone()).unwrap();
        let arithmetic = Arithmetic { device: Device::Cuda, dtype: Scalar::Bfloat16 };
        let beside = |ranks| {
            let options = ModelOptions { model: model.clone(), ranks, arithmetic, ..ModelOptions::default() };
            beside_weights(&options, &prepare(&options).unwrap())
        };
        let experts = (config.moe_layers() * config.experts) as u64;
        assert_eq!(beside(1), ("experts for copies", 0));
        assert_eq!(beside(2), ("experts for copies", experts * weights.expert_bytes() / 2));
    }
}
