//! A call for each command, and its result as JSON or as text.

use std::fmt::Display;
use std::time::{Duration, Instant};

use lina_infer::{Arithmetic, Device, InferError, model_folder};
use lina_train::{
    BenchOptions, ClusterConfig, ConfigError, Engine, EvalOptions, Override, Studies, TrainError, TrainOptions,
    TrainSummary, bench_compute, bench_train, default_run_folder, diagnose_ranks, eval, launched_rank, launched_ranks,
    train,
};

use crate::arguments::{
    Arguments, BenchCommand, BenchComputeArguments, BenchTrainArguments, Command, DeviceArguments, DoctorArguments,
    EvalArguments, JobArguments, OutputArguments, TrainArguments,
};
#[cfg(feature = "cuda")]
use lina_train::{LayerShape, bench_layer};

#[cfg(feature = "cuda")]
use crate::arguments::BenchLayerArguments;
#[cfg(feature = "cuda")]
use crate::bench_kernels;
use crate::{doctor, generate, inference, output, serve, signals};

/// Threads that the doctor measures where nobody says how many.
const DOCTOR_RANKS: usize = 4;
/// For how long another rank leaves it to rank 0 to say what is wrong.
const RANK_0_SPEAKS: Duration = Duration::from_secs(2);

/// What the process says and exits with.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) message: String,
    pub(crate) exit_code: u8,
}

impl Failure {
    pub(crate) fn new(message: impl Display, exit_code: u8) -> Self {
        Failure { message: message.to_string(), exit_code }
    }

    /// What this process has to say. Bad input is mostly the same on all ranks that a launcher has started: rank 0 says
    /// it, and the launcher ends the others while they wait here. A rank that is still there is alone with its trouble.
    pub(crate) fn message_of_this_rank(&self) -> Option<String> {
        let message = Some(self.message.clone()).filter(|message| !message.is_empty())?;
        let Some(rank) = launched_rank().filter(|&rank| rank > 0 && self.exit_code == 2) else { return Some(message) };
        let deadline = Instant::now() + RANK_0_SPEAKS;
        while Instant::now() < deadline {
            if signals::asked_to_end() {
                return None;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(format!("rank {rank}: {message}"))
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
        Failure::new(&error, error.exit_code())
    }
}

impl From<InferError> for Failure {
    fn from(error: InferError) -> Self {
        Failure::new(&error, error.exit_code())
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Failure::new(error, 2)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::new(format_args!("cannot write to stdout: {error}"), 1)
    }
}

/// Carries out a command.
pub(crate) fn run(arguments: Arguments) -> Result<(), Failure> {
    match arguments.command {
        Command::Train(arguments) => run_train(arguments),
        Command::Bench(BenchCommand::Train(arguments)) => run_bench_train(arguments),
        Command::Bench(BenchCommand::Compute(arguments)) => run_bench_compute(arguments),
        Command::Eval(arguments) => run_eval(arguments),
        Command::Generate(arguments) => generate::run(arguments),
        Command::Serve(arguments) => serve::run(arguments),
        Command::Profile(arguments) => inference::run_profile(arguments),
        Command::Bench(BenchCommand::Infer(arguments)) => inference::run_bench(arguments),
        Command::Bench(BenchCommand::Decode(arguments)) => inference::run_bench_decode(arguments),
        #[cfg(feature = "cuda")]
        Command::Bench(BenchCommand::Kernels(arguments)) => bench_kernels::run(arguments),
        #[cfg(feature = "cuda")]
        Command::Bench(BenchCommand::Layer(arguments)) => run_bench_layer(arguments),
        Command::Doctor(arguments) => run_doctor(arguments),
    }
}

fn run_train(arguments: TrainArguments) -> Result<(), Failure> {
    let config = arguments.config.load(vec![
        short("--ranks", "cluster.ranks", arguments.ranks.as_deref())?,
        short("--engine", "cluster.engine", arguments.engine.as_deref())?,
        short("--policy", "policy.name", arguments.policy.as_deref())?,
        short("--steps", "train.steps", arguments.steps.as_deref())?,
    ])?;
    let OutputArguments { json, quiet } = arguments.output;
    let stop = signals::stop_on_signals(quiet || !config.cluster.leads())
        .map_err(|error| Failure::new(format_args!("ctrl-C cannot be listened for: {error}"), 1))?;
    signals::report_file_size_limit()
        .map_err(|error| Failure::new(format_args!("SIGXFSZ cannot be listened for: {error}"), 1))?;
    let resume = arguments.resume;
    let out = arguments.out.unwrap_or_else(|| default_run_folder(arguments.config.file(), resume.as_deref()));
    let options = TrainOptions { config, out: Some(out), resume, quiet };
    let leads = options.config.cluster.leads();
    let summary = match train(options, &stop) {
        // Every rank has stopped; one of them says so.
        Err(error @ TrainError::Interrupted { .. }) if !leads => return Err(Failure::new("", error.exit_code())),
        result => result?,
    };
    if !leads {
        return Ok(());
    }
    if let Some(bench) = summary.bench.as_ref().filter(|_| !quiet) {
        output::say(&bench.table());
    }
    if json {
        return Ok(output::json(&summary)?);
    }
    Ok(output::text(&train_text(&summary))?)
}

fn run_bench_train(arguments: BenchTrainArguments) -> Result<(), Failure> {
    let policies = &arguments.policies;
    let config = arguments.config.load(vec![
        (!policies.is_empty()).then(|| Override::words("--policies", "bench.policies", policies)),
        short("--rounds", "bench.rounds", arguments.rounds.as_deref())?,
        short("--ranks", "cluster.ranks", arguments.ranks.as_deref())?,
        short("--engine", "cluster.engine", arguments.engine.as_deref())?,
    ])?;
    let OutputArguments { json, quiet } = arguments.output;
    let mut options = BenchOptions { quiet, out: arguments.out, ..BenchOptions::new(config) };
    if arguments.ablation {
        options.policies = Studies::ABLATION.to_vec();
    }
    options.studies = Studies {
        paper: arguments.ablation,
        partition_sweep: partition_sizes(arguments.partition_sweep)?,
        pipelining: arguments.pipelining,
    };
    let leads = options.config.cluster.leads();
    outlive_launcher(&options.config.cluster)?;
    let summary = bench_train(options)?;
    if !leads {
        return Ok(());
    }
    Ok(output::table_or_json(json, quiet, &summary.table(), &summary)?)
}

/// The sizes of `--partition-sweep`, which must be sizes of something.
fn partition_sizes(sizes: Option<Vec<usize>>) -> Result<Option<Vec<usize>>, Failure> {
    if let Some(bytes) = sizes.iter().flatten().find(|&&bytes| bytes < size_of::<f32>()) {
        let message =
            format!("--partition-sweep: {bytes} bytes hold no gradient, expected at least {}", size_of::<f32>());
        return Err(Failure::new(message, 2));
    }
    Ok(sizes)
}

fn run_bench_compute(arguments: BenchComputeArguments) -> Result<(), Failure> {
    let config = arguments.config.load(vec![short("--rounds", "bench.rounds", arguments.rounds.as_deref())?])?;
    let rounds = config.bench_or_default().rounds;
    let OutputArguments { json, quiet } = arguments.output;
    let summary = bench_compute(config, rounds)?;
    Ok(output::table_or_json(json, quiet, &summary.table(), &summary)?)
}

#[cfg(feature = "cuda")]
fn run_bench_layer(arguments: BenchLayerArguments) -> Result<(), Failure> {
    let BenchLayerArguments { shape, dtype, rounds, gpu, output: OutputArguments { json, quiet } } = arguments;
    let shapes = if shape.is_empty() { LayerShape::DEFAULTS.to_vec() } else { shape };
    let summary = bench_layer(gpu, &shapes, dtype, rounds)?;
    Ok(output::table_or_json(json, quiet, &summary.table(), &summary)?)
}

fn run_eval(arguments: EvalArguments) -> Result<(), Failure> {
    let OutputArguments { json, quiet } = arguments.output;
    let cluster = job_cluster(&arguments.job);
    outlive_launcher(&cluster)?;
    let arithmetic = arithmetic(&arguments.device, cluster.engine);
    arithmetic.check(cluster.engine).map_err(|reason| Failure::new(reason, 2))?;
    let summary = eval(EvalOptions {
        model: model_folder(&arguments.model)?,
        data: arguments.data,
        sequence_tokens: arguments.seq_tokens,
        ranks: cluster.ranks,
        engine: cluster.engine,
        gpu: (arithmetic.device == Device::Cuda).then_some(arithmetic.dtype),
        threads: cluster.threads,
        quiet,
    })?;
    if !cluster.leads() {
        return Ok(());
    }
    if json {
        return Ok(output::json(&summary)?);
    }
    Ok(output::text(&format!(
        "loss           {:.4}\nperplexity     {:.3}\npredictions    {}",
        summary.loss, summary.perplexity, summary.tokens
    ))?)
}

fn run_doctor(arguments: DoctorArguments) -> Result<(), Failure> {
    if let Some(engine) = &arguments.engine {
        let engine = engine_named(engine);
        return run_rank_doctor(engine, arguments.ranks, arguments.json);
    }
    let findings = doctor::examine();
    if arguments.json {
        return Ok(output::json(&findings)?);
    }
    Ok(output::text(&findings.to_string())?)
}

fn run_rank_doctor(engine: Engine, ranks: Option<usize>, json: bool) -> Result<(), Failure> {
    let ranks = match engine {
        Engine::Mpi => ranks.or(launched_ranks()).unwrap_or(1),
        _ => ranks.unwrap_or(DOCTOR_RANKS),
    };
    let cluster = ClusterConfig { engine, ranks, ..ClusterConfig::default() };
    outlive_launcher(&cluster)?;
    let diagnosis = diagnose_ranks(engine, ranks)?;
    if !cluster.leads() {
        return Ok(());
    }
    if json {
        return Ok(output::json(&diagnosis)?);
    }
    Ok(output::text(&diagnosis.table())?)
}

/// The ranks that a command without a configuration file asks for.
pub(crate) fn job_cluster(job: &JobArguments) -> ClusterConfig {
    let engine = engine_named(&job.engine);
    let ranks = job.ranks.or(launched_ranks().filter(|_| engine.has_processes())).unwrap_or(1);
    ClusterConfig { engine, ranks, threads: job.threads, ..ClusterConfig::default() }
}

/// What ranks on `engine` compute on, as the arguments say.
pub(crate) fn arithmetic(arguments: &DeviceArguments, engine: Engine) -> Arithmetic {
    let named = |name: &String| Device::BUILT.iter().copied().find(|device| device.name() == name);
    let device = arguments.device.as_ref().and_then(named).unwrap_or(Device::of_engine(engine));
    Arithmetic { device, dtype: arguments.dtype }
}

/// The engine of a name that the arguments have been checked for.
fn engine_named(name: &str) -> Engine {
    Engine::BUILT.iter().copied().find(|engine| engine.name() == name).unwrap_or(Engine::Local)
}

/// A launcher that loses a rank terminates the others: they stay long enough to say why.
pub(crate) fn outlive_launcher(cluster: &ClusterConfig) -> Result<(), Failure> {
    if cluster.engine.has_processes() {
        signals::ignore_termination()
            .map_err(|error| Failure::new(format_args!("SIGTERM cannot be listened for: {error}"), 1))?;
    }
    Ok(())
}

/// The change that a short option makes, if it was given.
fn short(option: &str, key: &str, value: Option<&str>) -> Result<Option<Override>, ConfigError> {
    value.map(|value| Override::option(option, key, value)).transpose()
}

fn train_text(summary: &TrainSummary) -> String {
    let clock = if summary.emulated { " (emulated time)" } else { "" };
    let mut lines =
        vec![format!("steps          {}", summary.steps), format!("training loss  {:.4}", summary.final_loss)];
    if let Some(eval_loss) = summary.eval_loss {
        lines.push(match summary.eval_loss_start {
            Some(start) => format!("held-out loss  {eval_loss:.4}, at the start {start:.4}"),
            None => format!("held-out loss  {eval_loss:.4}"),
        });
    }
    lines.push(format!("step           {:.2} ms, median{clock}", summary.step_ms_median));
    lines.push(format!("throughput     {:.0} tokens/s{clock}", summary.tokens_per_s));
    lines.push(format!("wall clock     {:.1} s", summary.wall_s));
    if let Some(peak_bytes) = summary.peak_rss_bytes {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let predicted = mib(summary.memory.total_bytes);
        lines.push(format!("peak memory    {:.0} MiB, predicted {predicted:.0} MiB", mib(peak_bytes)));
    }
    if let Some(network) = &summary.network {
        lines.push(format!("network        {network}"));
    }
    if let Some(checkpoint) = &summary.checkpoint {
        lines.push(format!("checkpoint     {}", checkpoint.display()));
    }
    if let Some(out) = &summary.out {
        lines.push(format!("report         {}", out.join("report.html").display()));
        lines.push(format!("trace          {}, for ui.perfetto.dev", out.join("trace.json").display()));
    }
    lines.join("\n")
}
