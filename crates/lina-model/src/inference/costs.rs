//! What work costs on the ranks of a job, measured on the body's own clock before it begins.

use lina_comm::{AllToAllKind, Comm, CommError, CopyDirection, Direction, Exchange, HostCopy, Leg, Work, WorkKind};
use lina_kernels::Compute;
use lina_plan::PlacementCosts;

use super::weights::InferenceWeights;
use crate::experts::{ExpertShape, Experts};
use crate::routing::ChunkPlan;

/// Rows that are measured: enough for an expert's products to run at their rate.
const ROWS: usize = 256;
/// Measurements, of which the middle one counts.
const ROUNDS: usize = 5;

/// Measures what the brain weighs against each other when it places experts; the same numbers on all ranks. All of them
/// call it together, between steps.
///
/// # Errors
/// If the job fails.
pub fn measure_placement_costs(
    comm: &mut Comm,
    compute: &Compute,
    weights: &InferenceWeights,
) -> Result<PlacementCosts, CommError> {
    let shape = ExpertShape::new(weights.config());
    let layer = weights.config().moe_layer(0);
    let experts = Experts { compute, shape, weights: weights.layer_experts(layer) };
    let chunk = ChunkPlan::of_one_expert(0, ROWS);
    let inputs = vec![0.5; ROWS * shape.hidden];
    let (mut projected, mut units) = (vec![0.0; ROWS * shape.input_width], vec![0.0; ROWS * shape.inner]);
    let mut outputs = vec![0.0; ROWS * shape.hidden];
    let ranks = comm.ranks();
    let per_rank = ROWS.div_ceil(ranks) * shape.hidden;
    let mut exchange = Some(Exchange {
        kind: AllToAllKind { direction: Direction::Forward, leg: Leg::Requests, layer: 0, chunk: 0, chunks: 1 },
        send: vec![0.0; ranks * per_rank],
        send_elements: vec![per_rank; ranks],
        recv: vec![0.0; ranks * per_rank],
        recv_elements: vec![per_rank; ranks],
    });
    let (mut compute_ns, mut wire_ns) = (Vec::new(), Vec::new());
    comm.begin_evaluation(0)?;
    for _ in 0..ROUNDS {
        let begun = comm.now();
        comm.work(Work { kind: WorkKind::ExpertFfn, layer: Some(layer as u32), flops: shape.flops(ROWS) })?;
        experts.forward(&chunk, &inputs, &mut projected, &mut units, &mut outputs);
        comm.work(Work { kind: WorkKind::Permute, layer: None, flops: 0 })?;
        compute_ns.push((comm.now() - begun) as f64);
        // All ranks begin the exchange together.
        comm.sum(&mut [0.0])?;
        let begun = comm.now();
        let ticket = comm.all_to_all(exchange.take().expect("it comes back every round"))?;
        exchange = Some(comm.wait(ticket)?);
        wire_ns.push((comm.now() - begun) as f64);
    }
    let ticket =
        comm.copy(HostCopy { direction: CopyDirection::ToDevice, layer: layer as u32, bytes: weights.expert_bytes() });
    let copy_ns = comm.copy_remaining(&ticket) as f64;
    comm.wait_copy(ticket)?;
    let sent_rows = (ranks - 1) as f64 * per_rank as f64 / shape.hidden as f64;
    let mut costs = [middle(compute_ns) / ROWS as f64, middle(wire_ns) / sent_rows.max(1.0), copy_ns];
    comm.sum(&mut costs)?;
    comm.end_step();
    let [row_ns, wire_row_ns, copy_ns] = costs.map(|sum| sum / ranks as f64);
    // A clock too coarse to see a product would make rows cost nothing.
    Ok(PlacementCosts { row_ns: row_ns.max(f64::MIN_POSITIVE), wire_row_ns, copy_ns })
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
