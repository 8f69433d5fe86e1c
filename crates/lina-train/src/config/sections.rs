//! The sections of a run's configuration: keys, defaults, and what they mean.

use std::num::NonZero;
use std::path::PathBuf;

use lina_comm::{launched_rank, launched_ranks_here};
use lina_net::{Link, Topology, TopologyError};
use lina_plan::{Policy, PolicySettings, Schedule};
use serde::{Deserialize, Serialize};

/// `[train]`: what is optimised, for how long, and how often the run looks at itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Tokens of a sequence.
    pub sequence_tokens: usize,
    /// Sequences of a step, over all ranks together.
    pub batch_sequences: usize,
    /// Parts of a step's batch whose gradients are accumulated.
    pub micro_batches: usize,
    /// Seed of the initial weights, the data's order and the router's noise.
    pub seed: u64,
    /// Learning rate after the warm-up.
    pub learning_rate: f64,
    /// Steps in which the learning rate rises linearly to its full value.
    pub warmup_steps: u64,
    /// The learning rate of the last step over the full one; in between it follows a cosine.
    pub min_learning_rate_ratio: f64,
    /// AdamW's decoupled weight decay, of matrices.
    pub weight_decay: f32,
    /// AdamW's decay of the first moment.
    pub beta1: f32,
    /// AdamW's decay of the second moment.
    pub beta2: f32,
    /// Added to the root of AdamW's second moment.
    pub epsilon: f32,
    /// Bound on the global norm of the gradients; 0 is none.
    pub clip_norm: f32,
    /// Steps between two evaluations on held-out text; 0 evaluates at the end only.
    pub eval_every: u64,
    /// Held-out sequences of an evaluation, at most what there is.
    pub eval_sequences: usize,
    /// Steps between two checkpoints; 0 writes one at the end only.
    pub checkpoint_every: u64,
    /// Whether a document's tokens attend to that document only.
    pub document_masking: bool,
    /// How many of the last steps the trace records; 0 records none.
    pub trace_steps: u64,
    /// How GPUs store activations and multiply; sums, master weights and moments are f32.
    pub dtype: Scalar,
}

/// A type of floating-point numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scalar {
    /// 32 bits.
    Float32,
    /// The upper 16 of them.
    Bfloat16,
}

impl Scalar {
    /// All of them.
    pub const ALL: [Scalar; 2] = [Scalar::Float32, Scalar::Bfloat16];

    /// The name in configuration files, on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            Scalar::Float32 => "float32",
            Scalar::Bfloat16 => "bfloat16",
        }
    }
}

#[cfg(feature = "cuda")]
impl From<Scalar> for lina_cuda::DType {
    fn from(scalar: Scalar) -> Self {
        match scalar {
            Scalar::Float32 => lina_cuda::DType::F32,
            Scalar::Bfloat16 => lina_cuda::DType::Bf16,
        }
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            steps: 300,
            sequence_tokens: 128,
            batch_sequences: 16,
            micro_batches: 1,
            seed: 1,
            learning_rate: 1e-3,
            warmup_steps: 20,
            min_learning_rate_ratio: 0.1,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            clip_norm: 1.0,
            eval_every: 50,
            eval_sequences: 32,
            checkpoint_every: 0,
            document_masking: false,
            trace_steps: 2,
            dtype: Scalar::Float32,
        }
    }
}

/// What carries the ranks' messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// Ranks are threads of one process.
    Local,
    /// MPI.
    Mpi,
    /// NCCL, between ranks that compute on GPUs.
    Nccl,
}

impl Engine {
    /// The engines that this build has.
    pub const BUILT: &[Engine] = match (cfg!(feature = "mpi"), cfg!(feature = "cuda")) {
        (false, false) => &[Engine::Local],
        (true, false) => &[Engine::Local, Engine::Mpi],
        (false, true) => &[Engine::Local, Engine::Nccl],
        (true, true) => &[Engine::Local, Engine::Mpi, Engine::Nccl],
    };

    /// Whether every rank is a process of its own, started by a launcher.
    pub fn has_processes(self) -> bool {
        match self {
            Engine::Local => false,
            Engine::Mpi | Engine::Nccl => true,
        }
    }

    /// Whether ranks compute on GPUs.
    pub fn has_gpus(self) -> bool {
        self == Engine::Nccl
    }

    /// The name in configuration files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Local => "local",
            Engine::Mpi => "mpi",
            Engine::Nccl => "nccl",
        }
    }
}

/// `[cluster]`: the ranks, and what they run on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterConfig {
    /// Number of ranks; where ranks are processes as many as the launcher starts, which need not be written.
    pub ranks: usize,
    /// What carries their messages.
    pub engine: Engine,
    /// Threads that compute for one rank; 0 shares the machine's cores out.
    pub threads: usize,
    /// Experts of an MoE layer on each rank; by default an even share, each on one rank.
    pub experts_per_rank: Option<usize>,
    /// Number of nodes, which ranks fill in order, evenly; by default every rank is one. On an emulated cluster
    /// `cluster.link.nodes` says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<usize>,
    /// Whether gradients are summed in the order of ranks on `nccl` too, as always on the other engines, instead of by NCCL's
    /// allreduce: results are then the same to the bit under every policy.
    pub ordered_sums: bool,
    /// How long a rank may be silent before the job ends, in seconds of the wall clock; reading and writing a checkpoint
    /// does not count.
    pub timeout_s: f64,
    /// Memory that the job may take, in GiB; by default what the machine has.
    pub memory_limit_gib: Option<f64>,
    /// Links of an emulated cluster; goes with `device`.
    pub link: Option<LinkConfig>,
    /// Devices of an emulated cluster, goes with `link`; where ranks are processes, they wait as if they computed on such
    /// devices.
    pub device: Option<DeviceConfig>,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        ClusterConfig {
            ranks: 1,
            engine: Engine::Local,
            threads: 0,
            experts_per_rank: None,
            nodes: None,
            ordered_sums: false,
            timeout_s: 30.0,
            memory_limit_gib: None,
            link: None,
            device: None,
        }
    }
}

impl ClusterConfig {
    /// Threads that compute for one rank of `ranks`: `threads` if set, else an even share of the cores that this
    /// process may use, at least 1. On MPI, the ranks that the launcher has started on this host share them.
    pub fn threads_of(&self, ranks: usize) -> usize {
        if self.threads > 0 {
            return self.threads;
        }
        let ranks = if self.engine.has_processes() { launched_ranks_here().unwrap_or(1) } else { ranks };
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        (cores / ranks.max(1)).max(1)
    }

    /// Whether this process speaks for the job: where every rank is a process, rank 0's alone does.
    pub fn leads(&self) -> bool {
        !self.engine.has_processes() || launched_rank().is_none_or(|rank| rank == 0)
    }

    /// Links and the device's rate in GFLOP/s, if the cluster is an emulated one.
    ///
    /// # Errors
    /// If the links cannot be, which [`RunConfig::load`](super::RunConfig::load) has ruled out.
    pub fn emulation(&self) -> Result<Option<(Topology, f64)>, TopologyError> {
        let (Some(link), Some(device)) = (&self.link, &self.device) else { return Ok(None) };
        Topology::new(link.resolve(self.ranks), self.ranks).map(|topology| Some((topology, device.gflops)))
    }

    /// Whether times are virtual.
    pub fn is_emulated(&self) -> bool {
        self.link.is_some() && self.device.is_some()
    }

    /// What tables say where messages are real and ranks wait as if they computed on other devices.
    pub fn emulated_device_sentence(&self) -> Option<String> {
        let device = self.device.filter(|_| self.link.is_none())?;
        Some(format!(
            "Devices are emulated: each rank takes as long as one of {} GFLOP/s would for its matrix products.",
            device.gflops
        ))
    }

    /// Number of nodes.
    pub fn node_count(&self) -> usize {
        self.link.and_then(|link| link.nodes).or(self.nodes).unwrap_or(self.ranks)
    }

    /// Whether there are several nodes, with several ranks each and equally many, and all-to-alls may go inside a node
    /// first: NCCL has ways of its own.
    pub fn has_nodes(&self) -> bool {
        let nodes = self.node_count();
        self.engine != Engine::Nccl && nodes > 1 && nodes < self.ranks && self.ranks.is_multiple_of(nodes)
    }

    /// `memory_limit_gib` in bytes.
    pub fn memory_limit_bytes(&self) -> Option<u64> {
        self.memory_limit_gib.map(gib_to_bytes)
    }
}

/// `cluster.link`: rates and overheads of an emulated network, as in [`Link`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkConfig {
    /// Rate of each node's network interface, each way, in Gbit/s.
    pub gbps: f64,
    /// Time of a message round, in microseconds.
    pub latency_us: f64,
    /// Time that launching one operation takes, in microseconds.
    pub launch_us: f64,
    /// Time for which a message between nodes occupies each of their interfaces besides its bytes, in microseconds; by
    /// default 0.
    #[serde(default)]
    pub message_us: f64,
    /// Number of nodes; by default every rank is one.
    pub nodes: Option<usize>,
    /// Rate of each rank's link inside its node, each way, in Gbit/s; by default `gbps`.
    pub inner_gbps: Option<f64>,
}

impl LinkConfig {
    /// The link with its defaults for `ranks` filled in.
    pub fn resolve(&self, ranks: usize) -> Link {
        Link {
            gbps: self.gbps,
            latency_us: self.latency_us,
            launch_us: self.launch_us,
            message_us: self.message_us,
            nodes: self.nodes.unwrap_or(ranks),
            inner_gbps: self.inner_gbps.unwrap_or(self.gbps),
        }
    }
}

/// `cluster.device`: rates of an emulated device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceConfig {
    /// Floating-point operations a second of its matrix products, in units of 10⁹.
    pub gflops: f64,
    /// Memory of each rank's device, in GiB; by default all that a rank needs. Where it is too little, experts of some
    /// layers wait in the host's memory and are copied when they are needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_gib: Option<f64>,
    /// Rate of copies between the device's memory and its host's, each way, in Gbit/s; by default 200, about what PCIe
    /// 4.0 with 16 lanes reaches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_gbps: Option<f64>,
}

impl DeviceConfig {
    /// `memory_gib` in bytes.
    pub fn memory_bytes(&self) -> Option<u64> {
        self.memory_gib.map(gib_to_bytes)
    }

    /// `copy_gbps`, or its default.
    pub fn copy_gbps(&self) -> f64 {
        self.copy_gbps.unwrap_or(200.0)
    }
}

fn gib_to_bytes(gib: f64) -> u64 {
    (gib * (1u64 << 30) as f64) as u64
}

/// `[policy]`: the communication policy and the sizes that a user may set.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyConfig {
    /// The policy to train with.
    #[serde(with = "policy_name")]
    pub name: Policy,
    /// As in [`PolicySettings`].
    pub bucket_bytes: usize,
    /// As in [`PolicySettings`].
    pub partition_bytes: usize,
    /// As in [`PolicySettings`].
    pub pipeline_chunks: usize,
    /// As in [`PolicySettings`].
    pub defer_attention_gradients: bool,
    /// As in [`PolicySettings`].
    pub hierarchical_all_to_all: bool,
    /// Whether the experts of a rank are decided as the run goes on, from `cluster.experts_per_rank` upwards.
    pub packing: bool,
    /// Most experts of an MoE layer that packing puts on a rank; by default all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_experts_per_rank: Option<usize>,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        let PolicySettings {
            bucket_bytes,
            partition_bytes,
            pipeline_chunks,
            defer_attention_gradients,
            hierarchical_all_to_all,
        } = PolicySettings::default();
        PolicyConfig {
            name: Policy::Lina,
            bucket_bytes,
            partition_bytes,
            pipeline_chunks,
            defer_attention_gradients,
            hierarchical_all_to_all,
            packing: false,
            max_experts_per_rank: None,
        }
    }
}

impl PolicyConfig {
    /// The sizes, for any policy.
    pub fn settings(&self) -> PolicySettings {
        PolicySettings {
            bucket_bytes: self.bucket_bytes,
            partition_bytes: self.partition_bytes,
            pipeline_chunks: self.pipeline_chunks,
            defer_attention_gradients: self.defer_attention_gradients,
            hierarchical_all_to_all: self.hierarchical_all_to_all,
        }
    }
}

/// `[bench]`: the comparison of policies with which a run ends, and what `lina bench train` measures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BenchConfig {
    /// Policies with or without packing (`lina`, `lina+packing`), in the order in which a round runs them.
    #[serde(with = "schedule_names")]
    pub policies: Vec<Schedule>,
    /// Steps that `lina bench train` trains before the comparison, so that routing has settled.
    pub settle_steps: u64,
    /// Measured steps of each policy in each round.
    pub steps: u64,
    /// Steps before them, in which a policy's plans settle. Packing is decided in the first round, in as many more
    /// steps as that takes.
    pub warmup_steps: u64,
    /// Rounds; each runs every policy once, so that a slow minute of the machine hits all of them.
    pub rounds: usize,
}

impl Default for BenchConfig {
    fn default() -> Self {
        BenchConfig {
            policies: [Policy::Fair, Policy::Priority, Policy::Fixed, Policy::Lina].map(Schedule::from).to_vec(),
            settle_steps: 0,
            steps: 6,
            warmup_steps: 3,
            rounds: 1,
        }
    }
}

/// `[data]`: the keys of [`lina_data::DataConfig`], and the tokenizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct DataSection {
    pub(super) files: Vec<String>,
    pub(super) eval_files: Vec<String>,
    pub(super) eval_fraction: f64,
    pub(super) text_key: String,
    /// `bytes`, or the path of a `tokenizer.json`.
    pub(super) tokenizer: PathBuf,
}

/// The value of `data.tokenizer` that makes every byte a token.
pub(super) const BYTES: &str = "bytes";

impl Default for DataSection {
    fn default() -> Self {
        let lina_data::DataConfig { files, eval_files, eval_fraction, text_key } = lina_data::DataConfig::default();
        DataSection { files, eval_files, eval_fraction, text_key, tokenizer: BYTES.into() }
    }
}

/// Policies under their names.
mod policy_name {
    use std::sync::LazyLock;

    use super::Policy;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    static NAMES: LazyLock<Vec<&'static str>> = LazyLock::new(|| Policy::ALL.map(Policy::name).to_vec());

    pub(super) fn serialize<S: Serializer>(policy: &Policy, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(policy.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Policy, D::Error> {
        let name = String::deserialize(deserializer)?;
        name.parse().map_err(|_| D::Error::unknown_variant(&name, &NAMES))
    }
}

/// Lists of policies with or without packing, under their names.
mod schedule_names {
    use std::sync::LazyLock;

    use super::Schedule;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    static OWNED_NAMES: LazyLock<Vec<String>> = LazyLock::new(|| Schedule::all().map(|s| s.to_string()).collect());
    static NAMES: LazyLock<Vec<&'static str>> = LazyLock::new(|| OWNED_NAMES.iter().map(String::as_str).collect());

    pub(super) fn serialize<S: Serializer>(schedules: &[Schedule], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(schedules.iter().map(Schedule::to_string))
    }

    struct Named(Schedule);

    impl<'de> Deserialize<'de> for Named {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let name = String::deserialize(deserializer)?;
            name.parse().map(Named).map_err(|_| D::Error::unknown_variant(&name, &NAMES))
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Schedule>, D::Error> {
        Ok(Vec::<Named>::deserialize(deserializer)?.into_iter().map(|Named(schedule)| schedule).collect())
    }
}
