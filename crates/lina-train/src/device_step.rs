//! `lina bench compute` on a GPU: how long a step takes on one rank, kernel by kernel, and how long nothing runs between them.

use std::collections::HashMap;

use lina_comm::Comm;
use lina_cuda::Launch;
use lina_plan::ExpertLayout;
use lina_report::{Align, Table};
use serde::Serialize;

use crate::TrainError;
use crate::bench::{median, prepared_worker};
use crate::config::RunConfig;
use crate::data::load_data;
use crate::memory::MemoryPlan;

/// Rows of the table of kernels.
const KERNEL_ROWS: usize = 24;

/// What launches of one name take of a step.
#[derive(Clone, Debug, Serialize)]
pub struct KernelTime {
    /// The kernel, or `product` for cuBLASLt's.
    pub name: String,
    /// Launches of a step.
    pub launches: usize,
    /// Their time.
    pub ms: f64,
}

impl KernelTime {
    /// What each kernel takes of a step whose launches these are, longest first.
    pub fn of_step(launches: &[Launch]) -> Vec<KernelTime> {
        let mut kernels: Vec<KernelTime> = Vec::new();
        for Launch { name, start_ms, end_ms } in launches {
            let ms = end_ms - start_ms;
            match kernels.iter_mut().find(|kernel| kernel.name == *name) {
                Some(kernel) => {
                    kernel.launches += 1;
                    kernel.ms += ms;
                }
                None => kernels.push(KernelTime { name: name.clone(), launches: 1, ms }),
            }
        }
        kernels.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        kernels
    }
}

/// A step on one GPU.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceStepSummary {
    /// Name of the GPU.
    pub gpu: String,
    /// Tokens of a step.
    pub tokens: usize,
    /// Measured steps.
    pub rounds: usize,
    /// Forward, backward and optimizer, median.
    pub step_ms: f64,
    /// Tokens over step.
    pub tokens_per_s: f64,
    /// A step while launches are timed, median: each has an event before and after it then.
    pub timed_step_ms: f64,
    /// Of which no kernel ran.
    pub gap_ms: f64,
    /// The same as a share of the step.
    pub gap_share: f64,
    /// The kernels of a step, longest first.
    pub kernels: Vec<KernelTime>,
}

impl DeviceStepSummary {
    /// The figures as a table for a terminal.
    pub fn table(&self) -> String {
        let mut table = Table::new([
            ("kernel", Align::Left),
            ("launches", Align::Right),
            ("ms", Align::Right),
            ("of step", Align::Right),
        ]);
        let share = |ms: f64| format!("{:.1} %", 100.0 * ms / self.timed_step_ms);
        let (shown, others) = self.kernels.split_at(self.kernels.len().min(KERNEL_ROWS));
        for kernel in shown {
            table.row([
                kernel.name.clone(),
                kernel.launches.to_string(),
                format!("{:.2}", kernel.ms),
                share(kernel.ms),
            ]);
        }
        let (launches, ms) = others.iter().fold((0, 0.0), |sum, other| (sum.0 + other.launches, sum.1 + other.ms));
        if launches > 0 {
            table.row(["others".to_owned(), launches.to_string(), format!("{ms:.2}"), share(ms)]);
        }
        table.row(["nothing".to_owned(), String::new(), format!("{:.2}", self.gap_ms), share(self.gap_ms)]);
        format!(
            "{}\n\nstep {:.2} ms, {:.0} tokens/s; with every launch timed {:.2} ms:\n\n{}",
            self.gpu,
            self.step_ms,
            self.tokens_per_s,
            self.timed_step_ms,
            table.render()
        )
    }
}

/// Measures `rounds` steps on one rank's GPU, and as many with launches timed, in turn.
///
/// # Errors
/// Bad configuration or data, more ranks than one, or a GPU that does not suffice.
pub(crate) fn bench_device_step(config: &RunConfig, rounds: usize) -> Result<DeviceStepSummary, TrainError> {
    let loaded = load_data(config)?;
    let experts = ExpertLayout::new(config.model.experts, 1, None).map_err(TrainError::input)?;
    MemoryPlan::new(config, &experts, loaded.bytes).check(config.cluster.memory_limit_bytes())?;
    let mut comm = Comm::solo();
    let mut worker = prepared_worker(config, &loaded.data, &experts, &mut comm)?;
    let (mut steps, mut timed_steps, mut gaps) = (Vec::new(), Vec::new(), Vec::new());
    let mut kernels: HashMap<String, (usize, Vec<f64>)> = HashMap::new();
    let rounds = rounds.max(1);
    // The first rounds warm up: buffers reach their size, and kernels are compiled.
    for round in 0..rounds + 2 {
        let step = 2 * round as u64;
        let plain = worker.step(&mut comm, step, false)?.stats.step as f64 / 1e6;
        let gpu = worker.gpu().expect("a worker on a GPU");
        gpu.begin_timeline()?;
        let timed = worker.step(&mut comm, step + 1, false)?.stats.step as f64 / 1e6;
        let launches = worker.gpu().expect("a worker on a GPU").end_timeline()?;
        if round < 2 {
            continue;
        }
        let busy: f64 = launches.iter().map(|launch| launch.end_ms - launch.start_ms).sum();
        steps.push(plain);
        timed_steps.push(timed);
        gaps.push((timed - busy).max(0.0));
        for KernelTime { name, launches, ms } in KernelTime::of_step(&launches) {
            let (count, times) = kernels.entry(name).or_default();
            *count = launches;
            times.push(ms);
        }
    }
    let mut kernels: Vec<KernelTime> = kernels
        .into_iter()
        .map(|(name, (launches, times))| KernelTime { name, launches, ms: median(&times) })
        .collect();
    kernels.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    let tokens = config.train.batch_sequences * config.train.sequence_tokens;
    let (step_ms, timed_step_ms, gap_ms) = (median(&steps), median(&timed_steps), median(&gaps));
    Ok(DeviceStepSummary {
        gpu: worker.gpu().map(|gpu| gpu.device().facts().name.clone()).unwrap_or_default(),
        tokens,
        rounds,
        step_ms,
        tokens_per_s: tokens as f64 * 1e3 / step_ms,
        timed_step_ms,
        gap_ms,
        gap_share: gap_ms / timed_step_ms,
        kernels,
    })
}
