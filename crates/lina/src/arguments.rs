//! What can be typed: commands, options and their help.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use lina_infer::Device;
use lina_train::{ConfigError, Engine, Override, RunConfig, Scalar};

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
  lina generate runs/first/checkpoint-300 --prompt 'fn main'
  lina serve runs/first/checkpoint-300 --port 8000

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
    /// Has a model go on from a prompt, or answer it.
    #[command(after_help = GENERATE_EXAMPLES)]
    Generate(GenerateArguments),
    /// Answers requests over HTTP as OpenAI's servers do.
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(ServeArguments),
    /// Learns from a text which experts tokens choose next.
    #[command(after_help = PROFILE_EXAMPLES)]
    Profile(ProfileArguments),
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
    /// Compares ways to place experts, batch by batch, on a cluster that serves.
    #[command(after_help = BENCH_INFER_EXAMPLES)]
    Infer(BenchInferArguments),
    /// Measures a token of one sequence against reading its weights once, and a prompt against its matrix products.
    #[command(after_help = BENCH_DECODE_EXAMPLES)]
    Decode(BenchDecodeArguments),
    /// Measures every operation of a GPU against what its memory, its matrix units and its link to the host do at best.
    #[cfg(feature = "cuda")]
    #[command(after_help = BENCH_KERNELS_EXAMPLES)]
    Kernels(BenchKernelsArguments),
    /// Measures one MoE layer on a GPU, forward and backward.
    #[cfg(feature = "cuda")]
    #[command(after_help = BENCH_LAYER_EXAMPLES)]
    Layer(BenchLayerArguments),
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
Examples:
  lina bench compute examples/compute.toml --rounds 5
On a GPU, kernel by kernel, in a build with the feature cuda:
  lina bench compute examples/gpu-step.toml";

#[cfg(feature = "cuda")]
const BENCH_LAYER_EXAMPLES: &str = "\
Examples:
  lina bench layer
  lina bench layer --shape 2048,1024,64,8,16384 --shape 2048,768,128,8,16384 --json";

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

const GENERATE_EXAMPLES: &str = "\
Without options, tokens are chosen as the folder's generation_config.json says, and where it says nothing the
likeliest is taken. One of --temperature, --top-p, --top-k and --seed has them drawn. The answer goes to
stdout as it is made; what it took goes to stderr. --json gives one object with token_ids, logprobs, text,
finish_reason (stop or length), prompt_tokens, seed, first_token_ms and tokens_per_s.

Examples:
  lina generate runs/first/checkpoint-300 --prompt 'fn main' --max-new-tokens 200
  lina generate runs/first/checkpoint-300 --prompt 'fn main' --temperature 0.8 --top-p 0.95 --seed 1
  lina generate models/chat --chat --prompt 'Why is the sky blue?' --stop 'User:' --ranks 2
  lina generate models/chat --prompt-file question.txt --greedy --json
On a GPU, in a build with the feature cuda:
  lina generate models/chat --prompt 'fn main' --device cuda --dtype bfloat16";

const PROFILE_EXAMPLES: &str = "\
The profile is what `--estimator path` goes by: for each path of experts that tokens took through the last layers, how
often each expert came next. It fits the model that it was made of and no other.

Example:
  lina profile runs/specialised/checkpoint-600 --data 'crates/*/src/**/*.rs' --out specialised.profile \\
      --held-out 'examples/data/*.txt'";

const BENCH_INFER_EXAMPLES: &str = "\
Schedulers: static (experts never move), ideal (a gate that is forced to balance), lina (the paper's), eplb (DeepSeek's),
lina-auto (ours), best (popularity known, copies free); no-estimation and no-fine-tuning are lina without one of its
phases. @path, @next-gate, @history or @oracle after lina, no-fine-tuning or lina-auto says what phase one goes by.

Examples:
  lina bench infer runs/specialised/checkpoint-600 --data 'examples/data/*.txt' --profile specialised.profile
  lina bench infer runs/specialised/checkpoint-600 --data README.md --schedulers eplb,lina-auto --set infer.slots=2
  lina bench infer runs/specialised/checkpoint-600 --data README.md --synthetic-skew 5.56";

const BENCH_DECODE_EXAMPLES: &str = "\
A training configuration gives sizes; the weights are initial ones then, on which speed does not depend.

Examples:
  lina bench decode examples/decode.toml
  lina bench decode runs/first/checkpoint-300 --threads 1 --tokens 64
On a GPU, in a build with the feature cuda:
  lina bench decode examples/decode.toml --device cuda --dtype bfloat16";

#[cfg(feature = "cuda")]
const BENCH_KERNELS_EXAMPLES: &str = "\
Sizes are those of a layer of width 2048 with 64 experts, top 8, at 16384 tokens. The ceilings are
measured first: a copy of 2 GiB on the device, read and written, and a product of 8192 x 8192 matrices.
Bytes are the fewest that an operation can do with: each input once, each output once. Times are
medians of 20, each with a cold cache.

Examples:
  lina bench kernels
  lina bench kernels --dtype float32 --only attention,products
  lina bench kernels --json > kernels.json";

const SERVE_EXAMPLES: &str = "\
/v1/completions and /v1/chat/completions (the latter if the folder has a chat template), /v1/models, /health,
/metrics for Prometheus, and a page with the load of experts and devices at /. The API key, also taken from
LINA_API_KEY, guards /v1/ only. The first ctrl-C or SIGTERM takes no more requests and ends when those that
run or wait are answered; the second one ends at once. --json prints one object with what was served.

Examples:
  lina serve runs/first/checkpoint-300
  lina serve models/chat --ranks 2 --port 8080 --served-model-name chat --served-model-name org/chat
  LINA_API_KEY=... lina serve models/chat --host 0.0.0.0 --max-running 128
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{\"model\": \"checkpoint-300\", \"prompt\": \"fn main\", \"max_tokens\": 100}'";

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

/// The ranks of a command that has no configuration file.
#[derive(Debug, Args)]
pub(crate) struct JobArguments {
    /// Number of ranks [default: 1, or those that the launcher of engine mpi or nccl has started].
    #[arg(long, value_name = "N")]
    pub(crate) ranks: Option<usize>,
    /// What carries the ranks' messages: local or, if this build has them, mpi or nccl.
    #[arg(long, value_name = "ENGINE", default_value = "local", value_parser = PossibleValuesParser::new(built_engines()))]
    pub(crate) engine: String,
    /// Threads that compute for one rank; 0 shares the cores out.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,
}

/// What the ranks of a command that has no configuration file compute on.
#[derive(Debug, Args)]
pub(crate) struct DeviceArguments {
    /// What computes: cpu or, if this build has it, cuda [default: cpu, on engine nccl cuda].
    #[arg(long, value_name = "DEVICE", value_parser = PossibleValuesParser::new(built_devices()))]
    pub(crate) device: Option<String>,
    /// How a GPU stores weights and multiplies: float32 or bfloat16.
    #[arg(long, value_name = "TYPE", default_value = "float32", value_parser = scalar_parser())]
    pub(crate) dtype: Scalar,
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
    #[command(flatten)]
    pub(crate) job: JobArguments,
    #[command(flatten)]
    pub(crate) device: DeviceArguments,
    #[command(flatten)]
    pub(crate) output: OutputArguments,
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArguments {
    /// Hugging Face folder with config.json and model.safetensors.
    #[arg(value_name = "MODEL_DIR")]
    pub(crate) model: PathBuf,
    /// Text to go on from.
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "prompt_file",
        conflicts_with = "prompt_file",
        allow_hyphen_values = true
    )]
    pub(crate) prompt: Option<String>,
    /// File with the text to go on from, all of it.
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// Takes the prompt for a user's message and puts the model's chat template around it.
    #[arg(long)]
    pub(crate) chat: bool,
    /// Longest answer, in tokens.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) max_new_tokens: usize,
    /// Always takes the likeliest token.
    #[arg(long, conflicts_with_all = ["temperature", "top_p", "top_k", "seed"])]
    pub(crate) greedy: bool,
    /// Divides logits before a token is drawn; 0 takes the likeliest.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub(crate) temperature: Option<f32>,
    /// Draws from the likeliest tokens whose probabilities sum to P.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) top_p: Option<f32>,
    /// Draws from the K likeliest tokens; 0 is all.
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// Makes tokens less likely that are there already: above 1.
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub(crate) repetition_penalty: Option<f32>,
    /// Draws the same tokens again [default: another one each time].
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Ends the answer before this text; may be repeated.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    #[command(flatten)]
    pub(crate) job: JobArguments,
    #[command(flatten)]
    pub(crate) device: DeviceArguments,
    #[command(flatten)]
    pub(crate) output: OutputArguments,
}

#[derive(Debug, Args)]
pub(crate) struct ProfileArguments {
    /// Hugging Face folder with config.json and model.safetensors.
    #[arg(value_name = "MODEL_DIR")]
    pub(crate) model: PathBuf,
    /// Text or .jsonl file to learn from, or a glob of them.
    #[arg(long, value_name = "FILE")]
    pub(crate) data: PathBuf,
    /// The file to write.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Layers of a path.
    #[arg(long, value_name = "L", default_value_t = 3)]
    pub(crate) path_length: usize,
    /// Text on which estimators are compared, or a glob of files.
    #[arg(long, value_name = "FILE")]
    pub(crate) held_out: Option<PathBuf>,
    /// Tokens of a window [default: the model's positions, at most 256].
    #[arg(long, value_name = "T")]
    pub(crate) seq_tokens: Option<usize>,
    /// Tokens of a batch: popularity is of batches [default: 4096].
    #[arg(long, value_name = "T")]
    pub(crate) batch_tokens: Option<usize>,
    /// Threads that compute; 0 is all cores.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,
    #[command(flatten)]
    pub(crate) output: OutputArguments,
}

#[derive(Debug, Args)]
pub(crate) struct BenchInferArguments {
    /// Hugging Face folder with config.json and model.safetensors.
    #[arg(value_name = "MODEL_DIR")]
    pub(crate) model: PathBuf,
    /// Text or .jsonl file of the batches, or a glob of them.
    #[arg(long, value_name = "FILE")]
    pub(crate) data: PathBuf,
    /// TOML file with the cluster and the batches.
    #[arg(long, value_name = "CONFIG.toml", default_value = "examples/infer.toml")]
    pub(crate) config: PathBuf,
    /// Sets one value of it, such as infer.slots=2; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", num_args = 1..)]
    pub(crate) set: Vec<String>,
    /// Schedulers to compare, with commas between [default: all of the paper's, eplb, lina-auto and best].
    #[arg(long, value_name = "S,S,...", value_delimiter = ',')]
    pub(crate) schedulers: Vec<String>,
    /// Tables for the estimator path, as `lina profile` writes them.
    #[arg(long, value_name = "FILE")]
    pub(crate) profile: Option<PathBuf>,
    /// Chooses experts without the model: its hottest over its coldest expert, such as the paper's 5.56.
    #[arg(long, value_name = "RATIO")]
    pub(crate) synthetic_skew: Option<f64>,
    /// Folder that gets report.html, with pictures, and bench.json [default: none].
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) output: OutputArguments,
}

#[derive(Debug, Args)]
pub(crate) struct BenchDecodeArguments {
    /// Hugging Face folder with config.json and model.safetensors, or a training configuration whose `[model]` gives sizes.
    #[arg(value_name = "CONFIG.toml|MODEL_DIR")]
    pub(crate) model: PathBuf,
    /// Threads that compute; 0 is all cores.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) threads: usize,
    /// Tokens decoded in a round, after 64.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(crate) tokens: usize,
    /// Tokens of the prompt that is measured.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub(crate) prompt_tokens: usize,
    /// Measured rounds.
    #[arg(long, value_name = "R", default_value_t = 7)]
    pub(crate) rounds: usize,
    #[command(flatten)]
    pub(crate) device: DeviceArguments,
    #[command(flatten)]
    pub(crate) output: OutputArguments,
}

#[cfg(feature = "cuda")]
#[derive(Debug, Args)]
pub(crate) struct BenchKernelsArguments {
    /// How activations and weights are stored: float32 or bfloat16.
    #[arg(long, value_name = "TYPE", default_value = "bfloat16", value_parser = scalar_parser())]
    pub(crate) dtype: Scalar,
    /// Measures these parts alone, with commas between: layers, routing, attention, products, few, copies.
    #[arg(long, value_name = "PART,...", value_delimiter = ',', value_parser = PossibleValuesParser::new(crate::bench_kernels::parts()))]
    pub(crate) only: Vec<String>,
    /// Which of the visible GPUs.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) gpu: usize,
    #[command(flatten)]
    pub(crate) output: OutputArguments,
}

#[cfg(feature = "cuda")]
#[derive(Debug, Args)]
pub(crate) struct BenchLayerArguments {
    /// A layer: width of the stream and of an expert, experts, experts of a token, tokens; may be repeated [default:
    /// Mixtral's, and three with smaller experts].
    #[arg(long, value_name = "HIDDEN,EXPERT_HIDDEN,EXPERTS,TOP_K,TOKENS")]
    pub(crate) shape: Vec<lina_train::LayerShape>,
    /// How activations and weights are stored: float32 or bfloat16.
    #[arg(long, value_name = "TYPE", default_value = "bfloat16", value_parser = scalar_parser())]
    pub(crate) dtype: Scalar,
    /// Measured runs of each pass.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) rounds: usize,
    /// Which of the visible GPUs.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) gpu: usize,
    #[command(flatten)]
    pub(crate) output: OutputArguments,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArguments {
    /// Hugging Face folder with config.json and model.safetensors.
    #[arg(value_name = "MODEL_DIR")]
    pub(crate) model: PathBuf,
    /// Name or address to listen on; 0.0.0.0 is all of this machine's.
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// Port; 0 is any that is free.
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    pub(crate) port: u16,
    /// Key that requests must bring [default: LINA_API_KEY, or none].
    #[arg(long, value_name = "KEY")]
    pub(crate) api_key: Option<String>,
    /// Name of the model in requests; may be repeated, answers use the first [default: the folder's name].
    #[arg(long, value_name = "NAME")]
    pub(crate) served_model_name: Vec<String>,
    /// Sequences that are generated at the same time.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one)]
    pub(crate) max_running: usize,
    /// Requests that wait for a place; more are turned away.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(crate) max_queue: usize,
    /// Connections that are open at the same time; more wait.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = at_least_one)]
    pub(crate) max_connections: usize,
    /// Largest body of a request.
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 20, value_parser = at_least_one)]
    pub(crate) max_body_bytes: usize,
    /// Longest prompt [default: what the longest sequence leaves].
    #[arg(long, value_name = "TOKENS", value_parser = at_least_one)]
    pub(crate) max_prompt_tokens: Option<usize>,
    /// Longest sequence, prompt and answer together [default: the model's positions, at most 4096].
    #[arg(long, value_name = "TOKENS")]
    pub(crate) max_sequence_tokens: Option<usize>,
    /// Seconds in which a client must send a request's head, its body, and read on when an answer waits for it.
    #[arg(long, value_name = "S", default_value_t = 30.0, allow_negative_numbers = true)]
    pub(crate) client_timeout_s: f64,
    /// Memory for keys and values of all ranks of a process.
    #[arg(long, value_name = "GIB", default_value_t = 1.0, allow_negative_numbers = true)]
    pub(crate) cache_gib: f64,
    /// Most tokens that a rank computes in a step.
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    pub(crate) step_tokens: usize,
    /// How experts are placed on several ranks: static, lina, eplb or lina-auto.
    #[arg(long, value_name = "POLICY", default_value = "lina-auto")]
    pub(crate) placement: String,
    /// What placements go by: history, next-gate, or path with --profile.
    #[arg(long, value_name = "ESTIMATOR", default_value = "history")]
    pub(crate) estimator: String,
    /// Tables that `lina profile` has made of this model.
    #[arg(long, value_name = "FILE")]
    pub(crate) profile: Option<PathBuf>,
    /// Experts that a rank holds ready in each layer [default: an even share and one more].
    #[arg(long, value_name = "N")]
    pub(crate) slots: Option<usize>,
    /// Computes every n-th token again on its own rank and compares.
    #[arg(long, value_name = "N")]
    pub(crate) verify_every: Option<u64>,
    #[command(flatten)]
    pub(crate) job: JobArguments,
    #[command(flatten)]
    pub(crate) device: DeviceArguments,
    #[command(flatten)]
    pub(crate) output: OutputArguments,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArguments {
    /// Measures the ranks of a job on this engine against each other: local or, if this build has it, mpi.
    #[arg(long, value_name = "ENGINE", value_parser = PossibleValuesParser::new(measured_engines()))]
    pub(crate) engine: Option<String>,
    /// Number of ranks to measure [default: 4, or those that the launcher of engine mpi has started].
    #[arg(long, value_name = "N", requires = "engine")]
    pub(crate) ranks: Option<usize>,
    /// Prints one JSON object on stdout instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A number of things of which there must be one.
fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("expected at least 1".into()),
        Ok(number) => Ok(number),
        Err(error) => Err(error.to_string()),
    }
}

/// Names of the devices that this build knows.
fn built_devices() -> Vec<&'static str> {
    Device::BUILT.iter().map(|device| device.name()).collect()
}

/// Takes the name of a type of numbers.
fn scalar_parser() -> impl TypedValueParser<Value = Scalar> {
    let named = |name: String| Scalar::ALL.into_iter().find(|scalar| scalar.name() == name);
    PossibleValuesParser::new(Scalar::ALL.map(Scalar::name)).map(move |name| named(name).expect("a possible value"))
}

/// Names of the engines whose ranks the doctor measures.
fn measured_engines() -> Vec<&'static str> {
    Engine::BUILT.iter().filter(|engine| !engine.has_gpus()).map(|engine| engine.name()).collect()
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
    fn numbers_are_called_alike_by_all_commands() {
        let mut lines = vec!["eval m --data x", "generate m --prompt x", "serve m", "bench decode m"];
        lines.extend(["bench kernels", "bench layer"].iter().filter(|_| cfg!(feature = "cuda")));
        for line in lines {
            for (name, known) in [("float32", true), ("bfloat16", true), ("bf16", false), ("f32", false)] {
                let line = format!("lina {line} --dtype {name}");
                let kind = Arguments::try_parse_from(line.split(' ')).map_err(|error| error.kind());
                assert_eq!(kind.err(), (!known).then_some(ErrorKind::InvalidValue), "{line}");
            }
        }
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
