//! What a run takes in memory: predicted before anything is allocated, measured at the end.

use lina_model::memory_plan;
use lina_plan::ExpertLayout;
use lina_report::{Align, Table};
use serde::Serialize;

use crate::TrainError;
use crate::config::RunConfig;
use crate::worker::model_limits;

/// Bytes that a process takes besides what it plans: program, threads, allocator.
const PROCESS_BYTES: u64 = 24 << 20;

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
        let ranks = experts.ranks();
        let mut parts: Vec<(String, u64)> = Vec::new();
        let mut add = |name: &str, bytes: u64| match parts.iter_mut().find(|(part, _)| part == name) {
            Some((_, sum)) => *sum += bytes,
            None => parts.push((name.to_owned(), bytes)),
        };
        for rank in 0..ranks {
            for part in memory_plan(&config.model, experts, rank, model_limits(config, ranks)) {
                add(part.name, part.bytes as u64);
                if part.name == "parameters" {
                    add("optimizer state", 2 * part.bytes as u64);
                }
            }
        }
        add("data", data_bytes);
        add("process", PROCESS_BYTES);
        parts.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let total_bytes = parts.iter().map(|(_, bytes)| bytes).sum();
        MemoryPlan { parts, total_bytes }
    }

    /// Refuses what cannot fit.
    pub(crate) fn check(&self, limit_bytes: Option<u64>) -> Result<(), TrainError> {
        let (limit, source) = match limit_bytes {
            Some(bytes) => (bytes, "cluster.memory_limit_gib"),
            None => match available_bytes() {
                Some(bytes) => (bytes, "what this machine has available"),
                None => return Ok(()),
            },
        };
        if self.total_bytes <= limit {
            return Ok(());
        }
        let largest: Vec<String> =
            self.parts.iter().take(3).map(|(name, bytes)| format!("{name} {}", mib(*bytes))).collect();
        Err(TrainError::Input(format!(
            "the run needs {} ({}, ...), expected at most {} ({source}); lower train.batch_sequences, \
             train.sequence_tokens or the model's sizes, or raise train.micro_batches",
            mib(self.total_bytes),
            largest.join(", "),
            mib(limit),
        )))
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

fn mib(bytes: u64) -> String {
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
