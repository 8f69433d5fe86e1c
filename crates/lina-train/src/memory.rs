//! What a run takes in memory: predicted before anything is allocated, measured at the end.

use lina_comm::launched_rank;
use lina_model::{ModelConfig, ModelLimits, ParameterLayout, Purpose, memory_plan};
use lina_plan::ExpertLayout;
use lina_report::{Align, Table};
use serde::Serialize;

use crate::TrainError;
use crate::config::RunConfig;
use crate::worker::model_limits;

/// Bytes that a process takes besides what it plans: program, threads, allocator.
const PROCESS_BYTES: u64 = 24 << 20;

/// Parts that grow with the rows that a rank is sent. The model's own plan takes them to be the same on all ranks;
/// routers that have not learned yet are far from it, and buffers stay as large as they once had to be: half as much
/// again, as measured in the first steps of models with 8 experts on 4 ranks.
pub(crate) const UNEVEN_PARTS: [&str; 2] = ["expert activations", "exchange buffers"];

/// The predicted memory of all ranks of this process, part by part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MemoryPlan {
    /// Names and bytes, largest first.
    pub parts: Vec<(String, u64)>,
    /// Their sum.
    pub total_bytes: u64,
}

impl MemoryPlan {
    /// Predicts what `config` takes on the ranks of `experts`, with `data_bytes` of tokens and text.
    pub(crate) fn new(config: &RunConfig, experts: &ExpertLayout, data_bytes: u64) -> Self {
        if config.cluster.engine.has_gpus() {
            return Self::beside_gpu(&config.model, experts, data_bytes, Purpose::Training);
        }
        Self::of_ranks(&config.model, experts, model_limits(config, experts.ranks()), data_bytes, Purpose::Training)
    }

    /// Predicts what forward passes alone take.
    pub(crate) fn of_forward(
        model: &ModelConfig,
        experts: &ExpertLayout,
        limits: ModelLimits,
        data_bytes: u64,
    ) -> Self {
        Self::of_ranks(model, experts, limits, data_bytes, Purpose::Evaluation)
    }

    /// Predicts what this process's rank takes beside its GPU: the weights that come from a folder, and in training the
    /// moments that checkpoints have too.
    pub(crate) fn beside_gpu(model: &ModelConfig, experts: &ExpertLayout, data_bytes: u64, purpose: Purpose) -> Self {
        let rank = launched_rank().unwrap_or(0).min(experts.ranks() - 1);
        let layout = ParameterLayout::new(model, experts.held_by(rank));
        let bytes = ((layout.dense_len() + layout.experts_len()) * size_of::<f32>()) as u64;
        let mut parts = vec![("parameters", bytes), ("data", data_bytes)];
        if purpose == Purpose::Training {
            parts.push(("optimizer state", 2 * bytes));
        }
        Self::of_parts(&parts)
    }

    fn of_ranks(
        model: &ModelConfig,
        experts: &ExpertLayout,
        limits: ModelLimits,
        data_bytes: u64,
        purpose: Purpose,
    ) -> Self {
        let mut parts: Vec<(String, u64)> = Vec::new();
        let mut add = |name: &str, bytes: u64| match parts.iter_mut().find(|(part, _)| part == name) {
            Some((_, sum)) => *sum += bytes,
            None => parts.push((name.to_owned(), bytes)),
        };
        let mut uneven_routing_bytes = 0;
        for rank in 0..experts.ranks() {
            for part in memory_plan(model, experts, rank, limits, purpose) {
                if UNEVEN_PARTS.contains(&part.name) {
                    uneven_routing_bytes += part.bytes as u64 / 2;
                }
                add(part.name, part.bytes as u64);
                if purpose == Purpose::Training && part.name == "parameters" {
                    add("optimizer state", 2 * part.bytes as u64);
                }
            }
        }
        if experts.ranks() > 1 {
            add("uneven routing", uneven_routing_bytes);
        }
        add("data", data_bytes);
        let parts: Vec<(&str, u64)> = parts.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
        Self::of_parts(&parts)
    }

    /// A plan of these parts, names and bytes, and the process itself.
    pub fn of_parts(parts: &[(&str, u64)]) -> Self {
        let mut parts: Vec<(String, u64)> = parts.iter().map(|&(name, bytes)| (name.to_owned(), bytes)).collect();
        parts.push(("process".to_owned(), PROCESS_BYTES));
        parts.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let total_bytes = parts.iter().map(|(_, bytes)| bytes).sum();
        MemoryPlan { parts, total_bytes }
    }

    /// Refuses a training run that cannot fit.
    pub(crate) fn check(&self, limit_bytes: Option<u64>) -> Result<(), TrainError> {
        let advice =
            "lower train.batch_sequences, train.sequence_tokens or the model's sizes, or raise train.micro_batches";
        self.check_or(advice, limit_bytes)
    }

    /// Refuses what cannot fit, with `advice` on what to do.
    ///
    /// # Errors
    /// If it does not fit the limit, or without one the machine's memory.
    pub fn check_or(&self, advice: &str, limit_bytes: Option<u64>) -> Result<(), TrainError> {
        let Some((limit, source)) = limit(limit_bytes) else { return Ok(()) };
        if self.total_bytes <= limit {
            return Ok(());
        }
        Err(TrainError::Input(format!(
            "the run needs {} ({}), expected at most {} ({source}); {advice}",
            mib(self.total_bytes),
            self.largest(),
            mib(limit),
        )))
    }

    /// Whether it fits with `more_bytes` beside it.
    pub(crate) fn fits(&self, more_bytes: u64, limit_bytes: Option<u64>) -> bool {
        limit(limit_bytes).is_none_or(|(limit, _)| self.total_bytes + more_bytes <= limit)
    }

    /// Total and largest parts, in one sentence.
    pub fn sentence(&self) -> String {
        format!("memory: {} predicted ({})", mib(self.total_bytes), self.largest())
    }

    fn largest(&self) -> String {
        let largest: Vec<String> =
            self.parts.iter().take(3).map(|(name, bytes)| format!("{name} {}", mib(*bytes))).collect();
        format!("{}, ...", largest.join(", "))
    }

    /// The parts as a table, with the measured peak where it is known.
    pub fn table(&self, peak_bytes: Option<u64>) -> String {
        let mut table = Table::new([("memory", Align::Left), ("MiB", Align::Right)]);
        for (name, bytes) in &self.parts {
            table.row([name.clone(), format!("{:.1}", *bytes as f64 / f64::from(1 << 20))]);
        }
        table.row(["predicted".to_owned(), format!("{:.1}", self.total_bytes as f64 / f64::from(1 << 20))]);
        if let Some(peak) = peak_bytes {
            table.row(["measured peak".to_owned(), format!("{:.1}", peak as f64 / f64::from(1 << 20))]);
        }
        table.render()
    }
}

/// The configured limit, else what the machine has, and where it comes from; `None` where nobody knows.
fn limit(configured_bytes: Option<u64>) -> Option<(u64, &'static str)> {
    match configured_bytes {
        Some(bytes) => Some((bytes, "cluster.memory_limit_gib")),
        None => available_bytes().map(|bytes| (bytes, "what this machine has available")),
    }
}

pub(crate) fn mib(bytes: u64) -> String {
    format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Memory that the machine can still give, where it says so.
fn available_bytes() -> Option<u64> {
    proc_kib("/proc/meminfo", "MemAvailable:")
}

/// The process's largest resident set so far, where the system says so.
pub(crate) fn peak_rss_bytes() -> Option<u64> {
    proc_kib("/proc/self/status", "VmHWM:")
}

fn proc_kib(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
