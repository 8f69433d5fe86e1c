//! A call for each command, and its result as JSON or as text.

use std::fmt::Display;

use lina_train::{
    BenchOptions, ConfigError, EvalOptions, Override, TrainError, TrainOptions, TrainSummary, bench_compute,
    bench_train, eval, train,
};

use crate::arguments::{
    Arguments, BenchCommand, BenchComputeArguments, BenchTrainArguments, Command, DoctorArguments, EvalArguments,
    OutputArguments, TrainArguments,
};
use crate::{doctor, output, signals};

/// What the process says and exits with.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) message: String,
    pub(crate) exit_code: u8,
}

impl Failure {
    fn new(message: impl Display, exit_code: u8) -> Self {
        Failure { message: message.to_string(), exit_code }
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
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
    let stop = signals::stop_on_signals()
        .map_err(|error| Failure::new(format_args!("ctrl-C cannot be listened for: {error}"), 1))?;
    let OutputArguments { json, quiet } = arguments.output;
    let report = arguments.out.as_ref().map(|out| out.join("report.html"));
    let options = TrainOptions { config, out: arguments.out, resume: arguments.resume, quiet };
    let summary = train(options, &stop)?;
    if let Some(bench) = summary.bench.as_ref().filter(|_| !quiet) {
        output::say(&bench.table());
    }
    if json {
        return Ok(output::json(&summary)?);
    }
    let mut text = train_text(&summary);
    if let Some(report) = report {
        text.push_str(&format!("\nreport         {}", report.display()));
    }
    Ok(output::text(&text)?)
}

fn run_bench_train(arguments: BenchTrainArguments) -> Result<(), Failure> {
    let policies = &arguments.policies;
    let config = arguments.config.load(vec![
        (!policies.is_empty()).then(|| Override::words("--policies", "bench.policies", policies)),
        short("--rounds", "bench.rounds", arguments.rounds.as_deref())?,
        short("--ranks", "cluster.ranks", arguments.ranks.as_deref())?,
        short("--engine", "cluster.engine", arguments.engine.as_deref())?,
    ])?;
    let bench = config.bench_or_default();
    let OutputArguments { json, quiet } = arguments.output;
    let options = BenchOptions { config, policies: bench.policies, rounds: bench.rounds, quiet };
    let summary = bench_train(options)?;
    Ok(output::table_or_json(json, quiet, &summary.table(), &summary)?)
}

fn run_bench_compute(arguments: BenchComputeArguments) -> Result<(), Failure> {
    let config = arguments.config.load(vec![short("--rounds", "bench.rounds", arguments.rounds.as_deref())?])?;
    let rounds = config.bench_or_default().rounds;
    let OutputArguments { json, quiet } = arguments.output;
    let summary = bench_compute(config, rounds)?;
    Ok(output::table_or_json(json, quiet, &summary.table(), &summary)?)
}

fn run_eval(arguments: EvalArguments) -> Result<(), Failure> {
    let OutputArguments { json, quiet } = arguments.output;
    let summary = eval(EvalOptions {
        model: arguments.model,
        data: arguments.data,
        sequence_tokens: arguments.seq_tokens,
        ranks: arguments.ranks,
        threads: arguments.threads,
        quiet,
    })?;
    if json {
        return Ok(output::json(&summary)?);
    }
    Ok(output::text(&format!(
        "loss           {:.4}\nperplexity     {:.3}\npredictions    {}",
        summary.loss, summary.perplexity, summary.tokens
    ))?)
}

fn run_doctor(arguments: DoctorArguments) -> Result<(), Failure> {
    let findings = doctor::examine();
    if arguments.json {
        return Ok(output::json(&findings)?);
    }
    Ok(output::text(&findings.to_string())?)
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
        lines.push(format!("peak memory    {:.0} MiB", peak_bytes as f64 / f64::from(1 << 20)));
    }
    if let Some(checkpoint) = &summary.checkpoint {
        lines.push(format!("checkpoint     {}", checkpoint.display()));
    }
    lines.join("\n")
}
