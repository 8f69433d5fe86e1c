//! Sizes and combinations that cannot be, found before anything is read or started.

use std::fmt::Display;
use std::ops::RangeInclusive;

use lina_comm::launched_ranks;
use lina_net::Topology;
use lina_plan::ExpertLayout;

use super::{ClusterConfig, DeviceConfig, Engine, RunConfig, Scalar};

/// Something impossible, and the key to blame, so that the place can be looked up.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) key: &'static str,
    pub(super) message: String,
}

type Check = Result<(), Problem>;

/// Beyond these a number is a slip of the keyboard, and products of two still fit 64 bits.
const MAX_STEPS: u64 = 1 << 40;
const MAX_SEQUENCE_TOKENS: usize = 1 << 20;
const MAX_SEQUENCES: usize = 1 << 20;
pub(crate) const MAX_RANKS: usize = 1024;
pub(crate) const MAX_THREADS: usize = 1024;
/// Of all ranks together: beyond it, systems refuse threads or their stacks.
const MAX_JOB_THREADS: usize = 4096;
/// With as many, the sizes of all buffers fit 64 bits.
const MAX_MICRO_BATCH_TOKENS: usize = 1 << 30;
const MAX_BYTES: usize = 1 << 40;
const MAX_CHUNKS: usize = 1024;
/// What one launch of the kernels that place rows takes.
const MAX_DEVICE_CHUNKS: usize = 128;
const MAX_ROUNDS: usize = 10_000;
/// A day.
const MAX_TIMEOUT_S: f64 = 86_400.0;

/// The first problem of `config`.
pub(super) fn check(config: &RunConfig) -> Check {
    check_train(config)?;
    check_data(config)?;
    check_cluster(config)?;
    let policy = &config.policy;
    within("policy.bucket_bytes", policy.bucket_bytes, 1..=MAX_BYTES)?;
    within("policy.partition_bytes", policy.partition_bytes, 1..=MAX_BYTES)?;
    within("policy.pipeline_chunks", policy.pipeline_chunks, 1..=MAX_CHUNKS)?;
    if config.cluster.engine.has_gpus() {
        within("policy.pipeline_chunks", policy.pipeline_chunks, 1..=MAX_DEVICE_CHUNKS)?;
    }
    if policy.hierarchical_all_to_all && config.cluster.engine == Engine::Nccl {
        return problem(
            "policy.hierarchical_all_to_all",
            "`policy.hierarchical_all_to_all` is true, expected false on engine `nccl`, which has ways of its own inside a \
             node"
                .to_owned(),
        );
    }
    if let Some(most) = policy.max_experts_per_rank {
        within("policy.max_experts_per_rank", most, 1..=config.model.experts)?;
    }
    check_bench(config)
}

fn check_train(config: &RunConfig) -> Check {
    let train = &config.train;
    within("train.steps", train.steps, 1..=MAX_STEPS)?;
    within("train.sequence_tokens", train.sequence_tokens, 1..=MAX_SEQUENCE_TOKENS)?;
    let positions = config.model.max_positions;
    require(
        train.sequence_tokens <= positions,
        "train.sequence_tokens",
        train.sequence_tokens,
        format_args!("at most the model's max_positions = {positions}"),
    )?;
    within("train.batch_sequences", train.batch_sequences, 1..=MAX_SEQUENCES)?;
    require(
        (1..=train.batch_sequences).contains(&train.micro_batches),
        "train.micro_batches",
        train.micro_batches,
        format_args!("a number from 1 to batch_sequences = {}", train.batch_sequences),
    )?;
    let micro_batch_tokens = train.batch_sequences.div_ceil(train.micro_batches) * train.sequence_tokens;
    require(
        micro_batch_tokens <= MAX_MICRO_BATCH_TOKENS,
        "train.batch_sequences",
        train.batch_sequences,
        format_args!("micro-batches of at most {MAX_MICRO_BATCH_TOKENS} tokens, found {micro_batch_tokens}"),
    )?;
    // TOML's integers have a sign.
    within("train.seed", train.seed, 0..=i64::MAX as u64)?;
    within("train.warmup_steps", train.warmup_steps, 0..=MAX_STEPS)?;
    require(positive(train.learning_rate), "train.learning_rate", train.learning_rate, "a number above 0")?;
    let ratio = train.min_learning_rate_ratio;
    require((0.0..=1.0).contains(&ratio), "train.min_learning_rate_ratio", ratio, "a number from 0 to 1")?;
    for (key, value) in [("train.weight_decay", train.weight_decay), ("train.clip_norm", train.clip_norm)] {
        require(value >= 0.0 && value.is_finite(), key, value, "a number of at least 0")?;
    }
    for (key, value) in [("train.beta1", train.beta1), ("train.beta2", train.beta2)] {
        require((0.0..1.0).contains(&value), key, value, "a number of at least 0 and below 1")?;
    }
    require(positive(train.epsilon.into()), "train.epsilon", train.epsilon, "a number above 0")?;
    within("train.eval_every", train.eval_every, 0..=MAX_STEPS)?;
    within("train.eval_sequences", train.eval_sequences, 1..=MAX_SEQUENCES)?;
    within("train.checkpoint_every", train.checkpoint_every, 0..=MAX_STEPS)?;
    within("train.trace_steps", train.trace_steps, 0..=MAX_STEPS)?;
    if train.dtype != Scalar::Float32 && !config.cluster.engine.has_gpus() {
        let engine = config.cluster.engine.name();
        return problem(
            "train.dtype",
            format!(
                "`train.dtype` is bfloat16, expected float32 on engine `{engine}`: processors compute in nothing else"
            ),
        );
    }
    Ok(())
}

fn check_data(config: &RunConfig) -> Check {
    let data = &config.data;
    require(!data.files.is_empty(), "data.files", "empty", "at least one path or glob")?;
    let fraction = data.eval_fraction;
    require((0.0..1.0).contains(&fraction), "data.eval_fraction", fraction, "a number of at least 0 and below 1")
}

fn check_cluster(config: &RunConfig) -> Check {
    let cluster = &config.cluster;
    check_ranks(cluster)?;
    if let Some(per_rank) = cluster.experts_per_rank {
        within("cluster.experts_per_rank", per_rank, 1..=config.model.experts)?;
    }
    match ExpertLayout::new(config.model.experts, cluster.ranks, cluster.experts_per_rank) {
        Ok(_) => Ok(()),
        Err(error) => problem("cluster.experts_per_rank", format!("`cluster.experts_per_rank`: {error}")),
    }
}

/// What can be said of `[cluster]` without a model.
pub(super) fn check_ranks(cluster: &ClusterConfig) -> Check {
    within("cluster.ranks", cluster.ranks, 1..=MAX_RANKS)?;
    let engine = cluster.engine;
    if !Engine::BUILT.contains(&engine) {
        let built = Engine::BUILT.iter().map(|engine| format!("`{}`", engine.name())).collect::<Vec<_>>().join(" and ");
        return problem(
            "cluster.engine",
            format!("this build has no engine `{}`, it has {built}; `lina doctor` says more", engine.name()),
        );
    }
    if let Some(launched) = launched_ranks().filter(|_| engine.has_processes()) {
        let expected = format_args!("{launched}, the number that the launcher started; it need not be written");
        require(cluster.ranks == launched, "cluster.ranks", cluster.ranks, expected)?;
    }
    within("cluster.threads", cluster.threads, 0..=MAX_THREADS)?;
    let threads = cluster.threads_of(cluster.ranks);
    require(
        threads * cluster.ranks <= MAX_JOB_THREADS,
        "cluster.threads",
        threads,
        format_args!("at most {MAX_JOB_THREADS} threads on all {} ranks together", cluster.ranks),
    )?;
    let timeout_s = cluster.timeout_s;
    require(
        timeout_s > 0.0 && timeout_s <= MAX_TIMEOUT_S,
        "cluster.timeout_s",
        timeout_s,
        format_args!("a number of seconds above 0 and up to {MAX_TIMEOUT_S}"),
    )?;
    if let Some(nodes) = cluster.nodes {
        within("cluster.nodes", nodes, 1..=cluster.ranks)?;
        if cluster.link.is_some() {
            return problem(
                "cluster.nodes",
                "`cluster.nodes` is set, but on an emulated cluster `cluster.link.nodes` says it".to_owned(),
            );
        }
    }
    if let Some(limit_gib) = cluster.memory_limit_gib {
        require(positive(limit_gib), "cluster.memory_limit_gib", limit_gib, "a number of GiB above 0")?;
    }
    match (&cluster.link, &cluster.device) {
        (Some(_), _) if engine.has_processes() => problem(
            "cluster.link",
            format!(
                "`cluster.link` is set, but the network of engine `{}` is a real one; remove it, as --set cluster.link= \
                 does",
                engine.name()
            ),
        ),
        (None, Some(device)) if engine.has_gpus() && device.memory_gib.is_some() => problem(
            "cluster.device.memory_gib",
            "`cluster.device.memory_gib` is set, but the memory of engine `nccl` is a GPU's; remove it".to_owned(),
        ),
        (None, Some(device)) if engine.has_processes() => check_device(device),
        (Some(_), None) => problem("cluster.link", missing_half("link", "device")),
        (None, Some(_)) => problem("cluster.device", missing_half("device", "link")),
        (None, None) => Ok(()),
        (Some(link), Some(device)) => {
            if let Err(error) = Topology::new(link.resolve(cluster.ranks), cluster.ranks) {
                return problem(link_key(&error.message), format!("cluster.{error}"));
            }
            check_device(device)
        }
    }
}

fn check_device(device: &DeviceConfig) -> Check {
    let DeviceConfig { gflops, memory_gib, copy_gbps } = *device;
    require(positive(gflops), "cluster.device.gflops", gflops, "a number above 0")?;
    if let Some(memory_gib) = memory_gib {
        require(positive(memory_gib), "cluster.device.memory_gib", memory_gib, "a number of GiB above 0")?;
    }
    match copy_gbps {
        Some(gbps) => require(positive(gbps), "cluster.device.copy_gbps", gbps, "a number of Gbit/s above 0"),
        None => Ok(()),
    }
}

/// The key of `cluster.link` that a sentence about it begins with.
fn link_key(message: &str) -> &'static str {
    const KEYS: [&str; 6] = [
        "cluster.link.gbps",
        "cluster.link.inner_gbps",
        "cluster.link.latency_us",
        "cluster.link.message_us",
        "cluster.link.launch_us",
        "cluster.link.nodes",
    ];
    let found = message.split(' ').next().unwrap_or_default();
    KEYS.into_iter().find(|key| key.strip_prefix("cluster.") == Some(found)).unwrap_or("cluster.link")
}

fn missing_half(set: &str, missing: &str) -> String {
    format!("`cluster.{set}` is set and `cluster.{missing}` is not, but an emulated cluster needs both")
}

fn check_bench(config: &RunConfig) -> Check {
    let Some(bench) = &config.bench else { return Ok(()) };
    require(!bench.policies.is_empty(), "bench.policies", "empty", "at least one policy")?;
    if let Some((_, twice)) =
        bench.policies.iter().enumerate().find(|(index, policy)| bench.policies[..*index].contains(policy))
    {
        return problem("bench.policies", format!("`bench.policies` has `{twice}` twice, expected each policy once"));
    }
    within("bench.steps", bench.steps, 1..=MAX_STEPS)?;
    within("bench.warmup_steps", bench.warmup_steps, 0..=MAX_STEPS)?;
    within("bench.rounds", bench.rounds, 1..=MAX_ROUNDS)
}

fn positive(value: f64) -> bool {
    value > 0.0 && value.is_finite()
}

fn within<T: PartialOrd + Display>(key: &'static str, value: T, range: RangeInclusive<T>) -> Check {
    let expected = format!("a number from {} to {}", range.start(), range.end());
    require(range.contains(&value), key, &value, expected)
}

fn require(holds: bool, key: &'static str, found: impl Display, expected: impl Display) -> Check {
    if holds { Ok(()) } else { problem(key, format!("`{key}` is {found}, expected {expected}")) }
}

fn problem(key: &'static str, message: String) -> Check {
    Err(Problem { key, message })
}
