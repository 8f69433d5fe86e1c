//! `lina eval`: the mean loss of a model folder over a text.

use std::path::PathBuf;

use lina_comm::Comm;
use lina_data::{EvalWindows, Sources, TokenStream, Tokenizer};
use lina_kernels::Compute;
use lina_model::{Batch, Checkpoint, ForwardOutput, Model, ModelConfig, ModelLimits, Purpose, StepContext};
#[cfg(feature = "cuda")]
use lina_model::{CudaModel, Parameters};
use lina_plan::{ExpertLayout, Policy, PolicyRules, PolicySettings, share_range};
use serde::Serialize;

use crate::TrainError;
use crate::config::check::{MAX_RANKS, MAX_THREADS};
use crate::config::{ClusterConfig, Engine, Scalar};
use crate::job::run_job;
use crate::memory::MemoryPlan;
#[cfg(feature = "cuda")]
use crate::replica::{check_memory, needed_bytes};

/// What `lina eval` is asked for.
#[derive(Clone, Debug)]
pub struct EvalOptions {
    /// Hugging Face folder.
    pub model: PathBuf,
    /// Text or JSONL file, or a glob of them.
    pub data: PathBuf,
    /// Tokens of a window; by default the model's positions, at most 1024.
    pub sequence_tokens: Option<usize>,
    /// Number of ranks.
    pub ranks: usize,
    /// What carries their messages.
    pub engine: Engine,
    /// On GPUs, how they store activations and multiply; none computes on processors.
    pub gpu: Option<Scalar>,
    /// Compute threads of a rank; 0 for an even share of the cores.
    pub threads: usize,
    /// No progress on stderr.
    pub quiet: bool,
}

/// Mean loss over consecutive windows of T tokens, T-1 predictions each, a last partial window dropped.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct EvalSummary {
    /// Mean cross-entropy in nats.
    pub loss: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// Predictions.
    pub tokens: u64,
}

/// Longest default window.
const DEFAULT_WINDOW_TOKENS: usize = 1024;
/// Tokens that a rank takes at a time, at least one window.
const BATCH_TOKENS: usize = 2048;

/// Evaluates.
///
/// # Errors
/// Bad folder, data or sizes; a lost rank.
pub fn eval(options: EvalOptions) -> Result<EvalSummary, TrainError> {
    for (option, value, range) in
        [("--ranks", options.ranks, 1..=MAX_RANKS), ("--threads", options.threads, 0..=MAX_THREADS)]
    {
        if !range.contains(&value) {
            let (first, last) = range.into_inner();
            return Err(TrainError::Input(format!("{option} is {value}, expected a number from {first} to {last}")));
        }
    }
    check_device(&options)?;
    let config = ModelConfig::from_folder(&options.model).map_err(TrainError::input)?;
    let window = options.sequence_tokens.unwrap_or(config.max_positions.min(DEFAULT_WINDOW_TOKENS));
    if window < 2 || window > config.max_positions {
        return Err(TrainError::Input(format!(
            "--seq-tokens is {window}, expected 2 to {}, the model's positions",
            config.max_positions
        )));
    }
    let tokenizer = Tokenizer::for_model_folder(&options.model)?;
    let sources = Sources::from_globs(&[options.data.to_string_lossy()])?;
    let stream = TokenStream::read(&sources, &tokenizer)?;
    stream.check_vocabulary(config.vocab, &tokenizer)?;
    let windows = EvalWindows::new(&stream, window)?;
    let experts = ExpertLayout::new(config.experts, options.ranks, None).map_err(TrainError::input)?;
    let cluster = ClusterConfig {
        ranks: options.ranks,
        engine: options.engine,
        threads: options.threads,
        ..ClusterConfig::default()
    };
    let rules = PolicyRules::new(Policy::Fair, &PolicySettings::default());
    let per_rank = (BATCH_TOKENS / window).max(1);
    let limits = ModelLimits { max_tokens: per_rank * window, max_sequence_tokens: window, max_expert_rows: None };
    let data_bytes = (stream.len() * size_of::<u32>()) as u64;
    let advice = "lower --seq-tokens or evaluate a smaller model";
    let memory = match options.gpu {
        None => MemoryPlan::of_forward(&config, &experts, limits, data_bytes),
        Some(_) => MemoryPlan::beside_gpu(&config, &experts, data_bytes, Purpose::Evaluation),
    };
    memory.check_or(advice, None)?;

    let job = |comm: &mut Comm| -> Result<[f64; 2], TrainError> {
        let (rank, ranks) = (comm.rank(), comm.ranks());
        let mut model = comm.busy(|comm| match options.gpu {
            None => Evaluated::on_host(&options, &config, &experts, limits, rank, &cluster),
            Some(dtype) => Evaluated::on_gpu(&options, &config, &experts, limits, comm, dtype),
        })?;
        let (mut input, mut target, mut sequences) = (Vec::new(), Vec::new(), Vec::new());
        let mut sums = [0.0; 2];
        comm.begin_evaluation(0)?;
        for first in (0..windows.windows()).step_by(per_rank * ranks) {
            let n = (per_rank * ranks).min(windows.windows() - first);
            input.clear();
            target.clear();
            sequences.clear();
            for index in share_range(n, ranks, rank) {
                let (tokens, next) = windows.window(first + index);
                input.extend(tokens);
                target.extend(next);
                sequences.push(tokens.len());
            }
            let batch = Batch { input: &input, target: &target, sequences: &sequences };
            let output = model.forward(comm, batch)?;
            sums[0] += output.loss_sum;
            sums[1] += output.target_tokens as f64;
        }
        comm.sum(&mut sums)?;
        comm.end_step();
        Ok(sums)
    };
    let identity = format!("{}\nwindows of {window} tokens: {}", config.to_json(), windows.windows());
    let [loss_sum, tokens] = run_job(&cluster, &experts, rules, &identity, job)?.ranks[0];
    let loss = loss_sum / tokens;
    Ok(EvalSummary { loss, perplexity: loss.exp(), tokens: tokens as u64 })
}

/// Refuses what ranks cannot compute on.
fn check_device(options: &EvalOptions) -> Result<(), TrainError> {
    let (engine, ranks) = (options.engine, options.ranks);
    if options.gpu.is_some() && !engine.has_gpus() && ranks > 1 {
        return Err(TrainError::Input(format!(
            "--device is cuda for {ranks} ranks on engine `{}`, expected one rank, or engine nccl",
            engine.name()
        )));
    }
    if options.gpu.is_none() && engine.has_gpus() {
        return Err(TrainError::Input(format!(
            "--device is cpu, expected cuda: ranks of engine `{}` compute on GPUs",
            engine.name()
        )));
    }
    Ok(())
}

/// One rank's model, on a processor or a GPU.
enum Evaluated {
    Host(Box<Model>),
    #[cfg(feature = "cuda")]
    Cuda(Box<CudaModel>),
}

impl Evaluated {
    fn on_host(
        options: &EvalOptions,
        config: &ModelConfig,
        experts: &ExpertLayout,
        limits: ModelLimits,
        rank: usize,
        cluster: &ClusterConfig,
    ) -> Result<Self, TrainError> {
        let compute = Compute::new(cluster.threads_of(experts.ranks()));
        let mut model = Model::new(Purpose::Evaluation, config.clone(), experts.clone(), rank, compute, limits)
            .map_err(TrainError::input)?;
        let (_, layout, parameters) = model.for_update();
        Checkpoint::open(&options.model)?.load(layout, parameters)?;
        Ok(Evaluated::Host(Box::new(model)))
    }

    #[cfg(feature = "cuda")]
    fn on_gpu(
        options: &EvalOptions,
        config: &ModelConfig,
        experts: &ExpertLayout,
        limits: ModelLimits,
        comm: &mut Comm,
        dtype: Scalar,
    ) -> Result<Self, TrainError> {
        let gpu = lina_cuda::Gpu::open(crate::nccl_job::rank_device()?)?;
        comm.set_device(lina_comm::DeviceClock::new(&gpu)?);
        let (rank, dtype) = (comm.rank(), dtype.into());
        check_memory(&gpu, needed_bytes(config, experts, rank, dtype, Purpose::Evaluation, limits))?;
        let mut model = CudaModel::new(Purpose::Evaluation, gpu, config.clone(), experts.clone(), rank, dtype, limits)?;
        let mut parameters = Parameters::without_gradients(model.layout());
        Checkpoint::open(&options.model)?.load(model.layout(), &mut parameters)?;
        model.load(&parameters)?;
        Ok(Evaluated::Cuda(Box::new(model)))
    }

    #[cfg(not(feature = "cuda"))]
    fn on_gpu(
        _: &EvalOptions,
        _: &ModelConfig,
        _: &ExpertLayout,
        _: ModelLimits,
        _: &mut Comm,
        _: Scalar,
    ) -> Result<Self, TrainError> {
        Err(TrainError::Input("--device is cuda, which this build does not have, expected cpu".to_owned()))
    }

    fn forward(&mut self, comm: &mut Comm, batch: Batch<'_>) -> Result<ForwardOutput, TrainError> {
        let step = StepContext::evaluation();
        Ok(match self {
            Evaluated::Host(model) => model.forward(comm, batch, step)?,
            #[cfg(feature = "cuda")]
            Evaluated::Cuda(model) => model.forward(comm, batch, step)?,
        })
    }
}
