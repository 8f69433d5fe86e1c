//! What work costs on the devices of a job, measured before it begins.

use std::sync::Arc;

use lina_comm::{Comm, Leg};
use lina_cuda::{CudaError, DType, Event, ExpertSlots, Gpu, PinnedBuffer};
use lina_plan::PlacementCosts;

use super::exchange::{RowExchanges, RowRoute};
use crate::batch::StepError;
use crate::cuda::experts::Experts;
use crate::experts::ExpertShape;
use crate::inference::InferenceWeights;
use crate::inference::moe::kind;
use crate::routing::ChunkPlan;

/// Rows that are measured: enough for an expert's products to run at their rate.
const ROWS: usize = 1024;
/// Measurements, of which the middle one counts.
const ROUNDS: usize = 5;

/// As [`measure_placement_costs`](crate::measure_placement_costs), of devices that store `dtype` and exchange rows by `route`.
///
/// # Errors
/// If the job or the device fails, or memory does not suffice.
pub fn measure_device_costs(
    comm: &mut Comm,
    gpu: &Gpu,
    weights: &InferenceWeights,
    dtype: DType,
    route: RowRoute,
) -> Result<PlacementCosts, StepError> {
    let shape = ExpertShape::new(weights.config());
    let expert = &weights.layer_experts(weights.config().moe_layer(0))[..shape.elements()];
    let mut slots = ExpertSlots::new(gpu, 1, 1, shape.elements(), dtype)?;
    slots.load(gpu, 0, 0, expert)?;
    let ranks = comm.ranks();
    comm.begin_evaluation(0)?;
    let row_ns = row_ns(gpu, shape, &slots, dtype)?;
    let wire_row_ns = wire_row_ns(comm, gpu, shape.hidden, dtype, route)?;
    let copy_ns = copy_ns(gpu, &mut slots, shape.elements() * dtype.bytes())?;
    let mut costs = [row_ns, wire_row_ns, copy_ns];
    comm.sum(&mut costs)?;
    comm.end_step();
    let [row_ns, wire_row_ns, copy_ns] = costs.map(|sum| sum / ranks as f64);
    Ok(PlacementCosts { row_ns: row_ns.max(f64::MIN_POSITIVE), wire_row_ns, copy_ns })
}

fn row_ns(gpu: &Gpu, shape: ExpertShape, slots: &ExpertSlots, dtype: DType) -> Result<f64, CudaError> {
    let experts = Experts { gpu, shape, weights: slots.layer(0) };
    let chunk = ChunkPlan::of_one_expert(0, ROWS);
    let inputs = gpu.zeros(ROWS * shape.hidden, dtype)?;
    let mut projected = gpu.uninit(ROWS * shape.input_width, dtype)?;
    let mut units = gpu.uninit(ROWS * shape.inner, dtype)?;
    let mut outputs = gpu.uninit(ROWS * shape.hidden, dtype)?;
    let mut round = || {
        timed(gpu, || {
            let (projected, units) = (projected.whole_mut(), units.whole_mut());
            experts.forward(&chunk, inputs.whole(), projected, units, outputs.whole_mut())
        })
    };
    // The first one finds its algorithms.
    round()?;
    let rounds = (0..ROUNDS).map(|_| round()).collect::<Result<_, _>>()?;
    Ok(middle(rounds) / ROWS as f64)
}

fn wire_row_ns(comm: &mut Comm, gpu: &Gpu, width: usize, dtype: DType, route: RowRoute) -> Result<f64, StepError> {
    let (mut exchanges, ranks) = (RowExchanges::new(route, dtype), comm.ranks());
    let rows = vec![ROWS.div_ceil(ranks); ranks];
    let mut rounds = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let exchange = exchanges.take(gpu, kind(Leg::Requests, 0), width, &rows, &rows)?;
        // All ranks begin the exchange together.
        comm.sum(&mut [0.0])?;
        gpu.synchronize()?;
        let begun = comm.now();
        let travelling = exchanges.begin(comm, gpu, exchange)?;
        let exchange = exchanges.finish(comm, gpu, travelling)?;
        gpu.synchronize()?;
        rounds.push((comm.now() - begun) as f64);
        exchanges.put(exchange);
    }
    let sent_rows = (ranks - 1) * rows[0];
    Ok(middle(rounds) / sent_rows.max(1) as f64)
}

fn copy_ns(gpu: &Gpu, slots: &mut ExpertSlots, bytes: usize) -> Result<f64, CudaError> {
    let from = Arc::new(PinnedBuffer::zeros(gpu.device(), bytes)?);
    let mut round = || {
        timed(gpu, || {
            slots.used(0)?;
            slots.begin_copy(0, 0, &from, 0..bytes)?;
            slots.wait(0)
        })
    };
    let rounds = (0..ROUNDS).map(|_| round()).collect::<Result<_, _>>()?;
    Ok(middle(rounds))
}

/// Nanoseconds on the compute stream of what `enqueue` enqueues there.
fn timed(gpu: &Gpu, mut enqueue: impl FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
    let [begun, ended]: [Event; 2] = [gpu.event()?, gpu.event()?];
    begun.record(gpu.stream())?;
    enqueue()?;
    ended.record(gpu.stream())?;
    ended.synchronize()?;
    Ok(f64::from(ended.elapsed_ms_since(&begun)?) * 1e6)
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
