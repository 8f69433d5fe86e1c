//! What can be typed: commands, options and their help.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::builder::PossibleValuesParser;
use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use lina_train::{ConfigError, Engine, Override, RunConfig};

use crate::commands::Failure;

/// The process's arguments; `None` if they ask for help or the version, which has been printed then.
///
/// # Errors
/// If they do not parse.
pub(crate) fn parse() -> Result<Option<Arguments>, Failure> {
    parse_from(std::env::args_os())
}

fn parse_from(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Arguments>, Failure> {
    let error = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => return Ok(Some(arguments)),
        Err(error) => error,
    };
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // As with every result, a reader that went away is no error.
            let _ = error.print();
            Ok(None)
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            Err(Failure::new("a command is missing, expected one that `--help` lists", 2))
        }
        _ => Err(Failure::new(format_args!("{}; `--help` says what is expected", one_line(&error.to_string())), 2)),
    }
}

/// What clap says in paragraphs, in one sentence and without the usage that follows.
fn one_line(message: &str) -> String {
    let message = message.strip_prefix("error: ").unwrap_or(message);
    let sentence = message.split("\n\nUsage:").next().unwrap_or(message);
    let sentence = sentence.split("\n\nFor more information").next().unwrap_or(sentence);
    let paragraphs = sentence.split("\n\n").map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "));
    paragraphs.collect::<Vec<_>>().join("; ")
}

/// Trains Mixture-of-Experts language models with expert parallelism, and keeps the all-to-all off the critical path.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  lina doctor
  lina train examples/quickstart.toml --out runs/first
  lina train examples/quickstart.toml --policy fair --set train.learning_rate=3e-4 --json
  lina bench train examples/quickstart.toml --policies fair,lina
  lina eval runs/first/checkpoint-300 --data README.md

Exit codes: 0 success, 1 a lost rank or a bug, 2 bad input, 130 stopped by ctrl-C.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Trains a model.
    #[command(after_help = TRAIN_EXAMPLES)]
    Train(TrainArguments),
    /// Measures.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Measures the loss of a model on a text.
    #[command(after_help = EVAL_EXAMPLES)]
    Eval(EvalArguments),
    /// Says what this machine has and what each engine lacks, or which rank, host or link of a job is slow.
    #[command(after_help = DOCTOR_EXAMPLES)]
    Doctor(DoctorArguments),
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Compares communication policies on one model, in interleaved rounds of one run.
    #[command(after_help = BENCH_TRAIN_EXAMPLES)]
    Train(BenchTrainArguments),
    /// Measures a training step's arithmetic against its bare matrix products, on one rank.
    #[command(after_help = BENCH_COMPUTE_EXAMPLES)]
    Compute(BenchComputeArguments),
}

const TRAIN_EXAMPLES: &str = "\
The run's folder gets config.toml, metrics.jsonl, trace.json (for ui.perfetto.dev), report.html and
checkpoints as Hugging Face folders. Without --out it is runs/CONFIG, or the first of runs/CONFIG-2,
runs/CONFIG-3, ... that is free; a run that goes on from a checkpoint stays where it was. A folder with
the checkpoints of another run is refused. The first ctrl-C ends the run after the step under way, with
a checkpoint; the second one ends it at once.

Examples:
  lina train examples/quickstart.toml --out runs/first
  lina train examples/quickstart.toml --ranks 2 --steps 50 --set data='books/**/*.txt'
  lina train examples/quickstart.toml --resume runs/first/checkpoint-300 --steps 600
With experts packed onto ranks as the run goes on (policy.packing, examples/packing.toml):
  lina train examples/quickstart.toml --set policy.packing=true
On the wall clock instead of an emulated cluster's:
  lina train examples/quickstart.toml --set cluster.link= --set cluster.device=
Each rank a process, in a build with engine mpi:
  mpirun -np 4 --bind-to none lina train examples/contention-mpi.toml --engine mpi";

const BENCH_TRAIN_EXAMPLES: &str = "\
Examples:
  lina bench train examples/quickstart.toml
  lina bench train examples/quickstart.toml --policies fair,lina --set cluster.link.gbps=10 --json
  lina bench train examples/packing.toml --policies fair,lina,lina+packing
The paper's ablation, the sweep of partition sizes and pipelining efficiency, with pictures:
  lina bench train examples/packing.toml --ablation --partition-sweep --pipelining --out runs/bench
  lina bench train examples/contention.toml --policies fair,lina --partition-sweep=16384,32768,65536";

const BENCH_COMPUTE_EXAMPLES: &str = "\
Example:
  lina bench compute examples/compute.toml --rounds 5";

const DOCTOR_EXAMPLES: &str = "\
With --engine, every two ranks are measured in turn: the round trip of a small message and the rate of
a large one each way, besides each rank's rate of matrix products while all compute. What is much
slower than most is named.

Examples:
  lina doctor
  mpirun -np 4 --bind-to none lina doctor --engine mpi";

const EVAL_EXAMPLES: &str = "\
The loss is the mean over consecutive windows of T tokens with T-1 predictions each; a last partial
window is dropped. A folder without tokenizer.json is byte-level.

Example:
  lina eval runs/first/checkpoint-300 --data README.md --seq-tokens 128";

/// A configuration file and changes to it.
#[derive(Debug, Args)]
pub(crate) struct ConfigArguments {
    /// Configuration file.
    #[arg(value_name = "CONFIG.toml")]
    config: PathBuf,
    /// Changes a key of the configuration, as in train.steps=10; may be repeated. The value is TOML or a bare word,
    /// `data=GLOB` is short for data.files, and nothing after the `=` removes the key.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Further assignments after one `--set`.
    #[arg(value_name = "KEY=VALUE", hide = true)]
    more: Vec<String>,
}

impl ConfigArguments {
    /// The configuration file.
    pub(crate) fn file(&self) -> &Path {
        &self.config
    }

    /// Loads the configuration: the file, then the assignments, then `options`.
    pub(crate) fn load(&self, options: Vec<Option<Override>>) -> Result<RunConfig, ConfigError> {
        let mut overrides = Vec::new();
        for assignment in self.set.iter().chain(&self.more) {
            overrides.push(Override::set(assignment)?);
        }
        overrides.extend(options.into_iter().flatten());
        RunConfig::load(&self.config, &overrides)
    }
}

/// How results are shown.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct OutputArguments {
    /// Prints one JSON object on stdout instead of text.
    #[arg(long)]
    pub(crate) json: bool,
    /// Shows no progress and no tables on stderr.
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TrainArguments {
    #[command(flatten)]
    pub(crate) config: ConfigArguments,
    /// Number of ranks [short for cluster.ranks].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) ranks: Option<String>,
    /// local, mpi or nccl, if this build has it [short for cluster.engine].
    #[arg(long, value_name = "ENGINE")]
    pub(crate) engine: Option<String>,
    /// Communication policy: fair, priority, fixed, partition, lina or lina-auto [short for policy.name].
    #[arg(long, value_name = "POLICY")]
    pub(crate) policy: Option<String>,
    /// Steps of the whole run [short for train.steps].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) steps: Option<String>,
    /// Folder of the run [default: runs/CONFIG, or that of the run to go on from].
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Checkpoint to go on from, or the folder of a run, whose latest one it is then.
    #[arg(long, value_name = "DIR")]
    pub(crate) resume: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) output: OutputArguments,
}

#[derive(Debug, Args)]
pub(crate) struct BenchTrainArguments {
    #[command(flatten)]
    pub(crate) config: ConfigArguments,
    /// Policies to compare, with commas between, `+packing` after a name to pack experts [short for bench.policies;
    /// default: fair, priority, fixed, lina].
    #[arg(long, value_name = "P,P,...", value_delimiter = ',')]
    pub(crate) policies: Vec<String>,
    /// Compares the policies of the paper's ablation, beside the paper's figures.
    #[arg(long, conflicts_with = "policies")]
    pub(crate) ablation: bool,
    /// Measures lina with these largest allreduce micro-ops in bytes too, and lina-auto [without a list: from a quarter
    /// of policy.partition_bytes to four times as much].
    #[arg(long, value_name = "BYTES,...", value_delimiter = ',', num_args = 0.., require_equals = true)]
    pub(crate) partition_sweep: Option<Vec<usize>>,
    /// Measures how much of the all-to-alls lina computes through, with several numbers of chunks, without and with
    /// packing.
    #[arg(long)]
    pub(crate) pipelining: bool,
    /// Folder that gets report.html, with pictures, and bench.json [default: none].
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Times that every policy has its turn [short for bench.rounds].
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub(crate) rounds: Option<String>,
    /// Number of ranks [short for cluster.ranks].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) ranks: Option<String>,
    /// local, mpi or nccl, if this build has it [short for cluster.engine].
    #[arg(long, value_name = "ENGINE")]
    pub(crate) engine: Option<String>,
    #[command(flatten)]
    pub(crate) output: OutputArguments,
}

#[derive(Debug, Args)]
pub(crate) struct BenchComputeArguments {
    #[command(flatten)]
    pub(crate) config: ConfigArguments,
    /// Measured rounds [short for bench.rounds].
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub(crate) rounds: Option<String>,
    #[command(flatten)]
    pub(crate) output: OutputArguments,
}

#[derive(Debug, Args)]
pub(crate) struct EvalArguments {
    /// Hugging Face folder with config.json and model.safetensors.
    #[arg(value_name = "MODEL_DIR")]
    pub(crate) model: PathBuf,
    /// Text or .jsonl file, or a glob of them.
    #[arg(long, value_name = "FILE")]
    pub(crate) data: PathBuf,
    /// Tokens of a window [default: the model's positions, at most 1024].
    #[arg(long, value_name = "T")]
    pub(crate) seq_tokens: Option<usize>,
    /// Number of ranks [default: 1, or those that the launcher of engine mpi has started].
    #[arg(long, value_name = "N")]
    pub(crate) ranks: Option<usize>,
    /// What carries the ranks' messages: local or, if this build has it, mpi.
    #[arg(long, value_name = "ENGINE", default_value = "local", value_parser = PossibleValuesParser::new(built_engines()))]
    pub(crate) engine: String,
    /// Threads that compute for one rank; 0 shares the cores out.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,
    #[command(flatten)]
    pub(crate) output: OutputArguments,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArguments {
    /// Measures the ranks of a job on this engine against each other: local or, if this build has it, mpi.
    #[arg(long, value_name = "ENGINE", value_parser = PossibleValuesParser::new(built_engines()))]
    pub(crate) engine: Option<String>,
    /// Number of ranks to measure [default: 4, or those that the launcher of engine mpi has started].
    #[arg(long, value_name = "N", requires = "engine")]
    pub(crate) ranks: Option<usize>,
    /// Prints one JSON object on stdout instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Names of the engines that this build has.
fn built_engines() -> Vec<&'static str> {
    Engine::BUILT.iter().map(|engine| engine.name()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_sweep_has_a_list_or_none() {
        let sizes = |line: &str| match Arguments::try_parse_from(line.split(' ')).unwrap().command {
            Command::Bench(BenchCommand::Train(bench)) => bench.partition_sweep,
            _ => panic!("{line}"),
        };
        assert_eq!(sizes("lina bench train x.toml"), None);
        assert_eq!(sizes("lina bench train --partition-sweep x.toml"), Some(vec![]));
        assert_eq!(sizes("lina bench train --partition-sweep=16,32 x.toml"), Some(vec![16, 32]));
        let both = "lina bench train x.toml --ablation --policies fair";
        assert_eq!(Arguments::try_parse_from(both.split(' ')).unwrap_err().kind(), ErrorKind::ArgumentConflict);
    }

    #[test]
    fn assignments_may_be_repeated_or_follow_each_other() {
        for line in
            ["lina train --set a=1 x.toml --set b=2", "lina train x.toml --set a=1 b=2", "lina train x.toml a=1 b=2"]
        {
            let Command::Train(train) = Arguments::try_parse_from(line.split(' ')).unwrap().command else {
                panic!("{line}")
            };
            let assignments: Vec<_> = train.config.set.iter().chain(&train.config.more).collect();
            assert_eq!(assignments, ["a=1", "b=2"], "{line}");
        }
    }
}
