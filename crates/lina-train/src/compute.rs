//! `lina bench compute`: how long a step takes on one rank, beside its matrix products alone, and beside what OpenBLAS
//! takes for the same products where it is linked.

use lina_comm::{Comm, Lane};
use lina_kernels::Compute;
use lina_kernels::gemm::{self, Layout, Shape};
use lina_plan::ExpertLayout;
use lina_report::{Align, Table};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Instant;

use crate::TrainError;
use crate::bench::{median, prepared_worker};
use crate::config::RunConfig;
use crate::data::load_data;
use crate::memory::{MemoryPlan, peak_rss_bytes};
use crate::products::ProductReplay;

/// Rows of a query tile of the attention kernels.
const ATTENTION_TILE_ROWS: usize = 64;

/// A step on one rank against its matrix products.
#[derive(Clone, Debug, Serialize)]
pub struct ComputeSummary {
    /// Compute threads.
    pub threads: usize,
    /// Tokens of a step.
    pub tokens: usize,
    /// Measured rounds: a step, the products, OpenBLAS's products, in turn.
    pub rounds: usize,
    /// Forward, backward and optimizer, median.
    pub step_ms: f64,
    /// The step's matrix products alone, by our kernels, median.
    pub products_ms: f64,
    /// Step over products.
    pub step_over_products: f64,
    /// Floating-point operations of the products, in units of 10⁹.
    pub products_gflop: f64,
    /// Their rate.
    pub products_gflops: f64,
    /// OpenBLAS on the same products, median; `None` in a build without the feature `openblas`.
    pub openblas_ms: Option<f64>,
    /// OpenBLAS's time over ours: the share of its rate that we reach.
    pub share_of_openblas: Option<f64>,
    /// OpenBLAS's version and kernels.
    pub openblas: Option<String>,
    /// Where a step's time goes, by part, median.
    pub parts: Vec<(String, f64)>,
    /// Memory predicted, part by part.
    pub memory: MemoryPlan,
    /// The process's peak resident set at the end of the first steps.
    pub peak_rss_bytes: Option<u64>,
}

impl ComputeSummary {
    /// The figures as tables for a terminal.
    pub fn table(&self) -> String {
        let mut table = Table::new([("compute", Align::Left), ("ms", Align::Right), ("", Align::Left)]);
        for (part, ms) in &self.parts {
            table.row([part.clone(), format!("{ms:.1}"), String::new()]);
        }
        table.row(["step".into(), format!("{:.1}", self.step_ms), "forward, backward, optimizer".into()]);
        table.row([
            "matrix products alone".into(),
            format!("{:.1}", self.products_ms),
            format!("{:.0} GFLOP/s; the step takes {:.2}x", self.products_gflops, self.step_over_products),
        ]);
        if let (Some(ms), Some(share)) = (self.openblas_ms, self.share_of_openblas) {
            table.row([
                "the same in OpenBLAS".into(),
                format!("{ms:.1}"),
                format!("ours reach {:.0} %", share * 100.0),
            ]);
        }
        format!("{}\n{}", table.render(), self.memory.table(self.peak_rss_bytes))
    }
}

/// A step on one rank: on the processor, or on its GPU.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum StepSummary {
    /// Engine `local`.
    Processor(Box<ComputeSummary>),
    /// Engine `nccl`.
    #[cfg(feature = "cuda")]
    Gpu(crate::DeviceStepSummary),
}

impl StepSummary {
    /// The figures as tables for a terminal.
    pub fn table(&self) -> String {
        match self {
            StepSummary::Processor(summary) => summary.table(),
            #[cfg(feature = "cuda")]
            StepSummary::Gpu(summary) => summary.table(),
        }
    }
}

/// Measures `rounds` rounds on one rank.
///
/// # Errors
/// Bad configuration or data, or more ranks than one.
pub fn bench_compute(config: RunConfig, rounds: usize) -> Result<StepSummary, TrainError> {
    if config.cluster.ranks != 1 || config.is_emulated() {
        return Err(TrainError::Input(format!(
            "cluster.ranks is {}{}, expected one rank that is not emulated",
            config.cluster.ranks,
            if config.is_emulated() { " and the cluster is emulated" } else { "" }
        )));
    }
    #[cfg(feature = "cuda")]
    if config.cluster.engine.has_gpus() {
        return crate::device_step::bench_device_step(&config, rounds).map(StepSummary::Gpu);
    }
    let loaded = load_data(&config)?;
    let experts = ExpertLayout::new(config.model.experts, 1, None).map_err(TrainError::input)?;
    let memory = MemoryPlan::new(&config, &experts, loaded.bytes);
    memory.check(config.cluster.memory_limit_bytes())?;
    let mut comm = Comm::solo();
    let mut worker = prepared_worker(&config, &loaded.data, &experts, &mut comm)?;
    let threads = worker.model.compute().threads();
    let mut next_step = 0..;
    let mut step = |worker: &mut crate::worker::Worker<'_>, comm: &mut Comm| -> Result<(), TrainError> {
        let step = next_step.next().unwrap_or(0);
        worker.step(comm, step, false).map(drop)
    };
    // Buffers that depend on routing reach their size, and one step's products are recorded.
    step(&mut worker, &mut comm)?;
    step(&mut worker, &mut comm)?;
    gemm::record(true);
    step(&mut worker, &mut comm)?;
    gemm::record(false);
    let mut shapes = gemm::take_recorded();
    shapes.extend(attention_shapes(&config));
    let peak_rss_bytes = peak_rss_bytes();

    let compute = Compute::new(threads);
    let mut replay = ProductReplay::new(shapes);
    let (mut steps, mut products, mut peers) = (Vec::new(), Vec::new(), Vec::new());
    let mut parts: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
    // The first round warms up.
    for round in 0..=rounds.max(1) {
        comm.record(true);
        let step_ms = time_ms(|| step(&mut worker, &mut comm))?;
        let spans = comm.record(false);
        let products_ms = time_ms(|| {
            replay.run(&compute);
            Ok(())
        })?;
        let peer_ms = peer_ms(&mut replay, threads)?;
        if round == 0 {
            continue;
        }
        steps.push(step_ms);
        products.push(products_ms);
        peers.extend(peer_ms);
        let mut of_step: BTreeMap<&'static str, f64> = BTreeMap::new();
        for span in spans.iter().filter(|span| span.lane == Lane::Compute) {
            *of_step.entry(span.name).or_default() += (span.end - span.start) as f64 / 1e6;
        }
        of_step.into_iter().for_each(|(name, ms)| parts.entry(name).or_default().push(ms));
    }
    let gflop = replay.gflop();
    let (step_ms, products_ms) = (median(&steps), median(&products));
    let openblas_ms = (!peers.is_empty()).then(|| median(&peers));
    let mut parts: Vec<(String, f64)> = parts.iter().map(|(name, ms)| (name.to_string(), median(ms))).collect();
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    Ok(StepSummary::Processor(Box::new(ComputeSummary {
        threads,
        tokens: config.train.batch_sequences * config.train.sequence_tokens,
        rounds,
        step_ms,
        products_ms,
        step_over_products: step_ms / products_ms,
        products_gflop: gflop,
        products_gflops: gflop * 1e3 / products_ms,
        openblas_ms,
        share_of_openblas: openblas_ms.map(|ms| ms / products_ms),
        openblas: peer_name(),
        parts,
        memory,
        peak_rss_bytes,
    })))
}

fn time_ms(run: impl FnOnce() -> Result<(), TrainError>) -> Result<f64, TrainError> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// The products inside the attention kernels, which are not recorded one by one: those of the tiles that the causal
/// mask leaves, scores and values forward, five products backward (probabilities are recomputed).
fn attention_shapes(config: &RunConfig) -> Vec<Shape> {
    let (model, train) = (&config.model, &config.train);
    let head_dim = model.head_dim;
    let groups = model.layers * train.batch_sequences * model.heads;
    let mut shapes = Vec::new();
    for _ in 0..groups {
        for start in (0..train.sequence_tokens).step_by(ATTENTION_TILE_ROWS) {
            let rows = ATTENTION_TILE_ROWS.min(train.sequence_tokens - start);
            let keys = start + rows;
            let shape = |m, n, k, layout, accumulate| Shape { m, n, k, layout, accumulate, batch: 1 };
            let scores = shape(rows, keys, head_dim, Layout::NT, false);
            let values = shape(rows, head_dim, keys, Layout::NN, false);
            let transposed = shape(keys, head_dim, rows, Layout::TN, true);
            shapes.extend([scores, values]);
            // Scores again, gradients of probabilities, of queries, of keys and of values.
            shapes.extend([scores, scores, values, transposed, transposed]);
        }
    }
    shapes
}

#[cfg(feature = "openblas")]
fn peer_ms(replay: &mut ProductReplay, threads: usize) -> Result<Option<f64>, TrainError> {
    use lina_kernels::openblas;
    openblas::set_threads(threads);
    let run = |group: &[Shape], (mut input, mut output): (&[f32], &mut [f32])| {
        for shape in group {
            let (a, rest) = input.split_at(shape.m * shape.k);
            let (b, rest) = rest.split_at(shape.k * shape.n);
            input = rest;
            let (c, rest) = std::mem::take(&mut output).split_at_mut(shape.m * shape.n);
            output = rest;
            openblas::matmul(shape, a, b, c);
        }
    };
    let ms = time_ms(|| {
        replay.run_with(run);
        Ok(())
    })?;
    Ok(Some(ms))
}

#[cfg(not(feature = "openblas"))]
fn peer_ms(_replay: &mut ProductReplay, _threads: usize) -> Result<Option<f64>, TrainError> {
    Ok(None)
}

fn peer_name() -> Option<String> {
    #[cfg(feature = "openblas")]
    return Some(lina_kernels::openblas::describe());
    #[cfg(not(feature = "openblas"))]
    None
}
