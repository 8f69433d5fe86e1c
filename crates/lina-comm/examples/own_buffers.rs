//! Scheduling somebody else's communication: no model of ours, the caller's buffers and the caller's backward.
//!
//! A framework's plug-in would do the same: hand its gradient memory over range by range as its backward finishes
//! them, its all-to-alls as they come, and wait where it needs data. Here a backward of six layers runs on four ranks
//! of an emulated cluster, first with everything launched when ready, then with the Lina policy.
//!
//! ```text
//! cargo run --release -p lina-comm --example own_buffers
//! ```

use std::sync::Arc;
use std::time::Duration;

use lina_comm::emulated::{Device, EmulatedCluster, EmulatedConfig};
use lina_comm::*;
use lina_net::{Link, Topology};
use lina_plan::{Policy, PolicyRules, PolicySettings};

const RANKS: usize = 4;
const LAYERS: usize = 6;
/// Gradient elements of a layer's dense parameters.
const GRADIENT: usize = 100_000;
/// Elements that a rank sends to each other rank in an all-to-all.
const MESSAGE: usize = 20_000;
const STEPS: u64 = 6;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let link = Link { gbps: 10.0, latency_us: 10.0, launch_us: 5.0, message_us: 0.0, nodes: RANKS, inner_gbps: 10.0 };
    let settings = PolicySettings {
        bucket_bytes: 1 << 20,
        partition_bytes: 50_000,
        pipeline_chunks: 2,
        ..PolicySettings::default()
    };
    println!(
        "{:>8} {:>20} {:>24} {:>20}",
        "policy", "step (emulated) ms", "backward all-to-all ms", "the same alone ms"
    );
    for policy in [Policy::Fair, Policy::Lina] {
        let cluster = EmulatedCluster::new(EmulatedConfig {
            topology: Topology::new(link, RANKS)?,
            device: Device { gflops: 1000.0 },
            groups: vec![(0..RANKS).collect()],
            timeout: Duration::from_secs(30),
            delays: None,
            log_launches: true,
        });
        let comms = cluster.comms(PolicyRules::new(policy, &settings));
        let threads: Vec<_> = comms.into_iter().map(|comm| std::thread::spawn(move || rank(comm))).collect();
        let mut last = StepStats::default();
        for thread in threads {
            last = thread.join().map_err(|_| "a rank panicked")??;
        }
        let ms = |nanos: Nanos| nanos as f64 / 1e6;
        println!(
            "{:>8} {:>20.2} {:>24.2} {:>20.2}",
            policy.name(),
            ms(last.step),
            ms(last.all_to_all_backward),
            ms(last.all_to_all_backward_alone)
        );
        let logs = cluster.launch_logs();
        assert!(logs.iter().all(|log| log == &logs[0]), "every rank launches in one order");
    }
    Ok(())
}

/// One rank of the foreign framework.
fn rank(mut comm: Comm) -> Result<StepStats, CommError> {
    // The framework's own memory, which must outlive what is in flight: it goes along as the owner.
    let memory: Arc<[std::sync::atomic::AtomicU32]> =
        (0..LAYERS * GRADIENT).map(|_| std::sync::atomic::AtomicU32::new(0)).collect();
    let pointer = memory[0].as_ptr().cast::<f32>();
    // SAFETY: an `AtomicU32` has the layout of a `u32` and every bit pattern is an `f32`; the memory lives as long as
    // `memory`'s clone, and this function touches it through the handle only.
    let mut gradients = unsafe { SharedBuffer::from_foreign(pointer, memory.len(), Box::new(Arc::clone(&memory))) };
    let mut stats = StepStats::default();
    for step in 0..STEPS {
        comm.begin_step(step)?;
        comm.begin_micro_batch(true)?;
        for layer in (0..LAYERS).rev() {
            moe_backward(&mut comm, layer)?;
            comm.work(Work { kind: WorkKind::Attention, layer: Some(layer as u32), flops: 1_200_000_000 })?;
            // Its backward writes the layer's gradients, then hands them over where they lie.
            let place = (LAYERS - 1 - layer) * GRADIENT;
            let range = place..place + GRADIENT;
            gradients.range_mut(range.clone()).fill(comm.rank() as f32);
            let local = Some((&mut gradients, range));
            comm.reduce_gradient(GradientRegion { group: GroupId::WORLD, elements: GRADIENT, local })?;
        }
        comm.finish_gradients()?;
        assert!(gradients.range(0..gradients.len()).iter().all(|&sum| sum == 6.0), "0 + 1 + 2 + 3");
        comm.agree(&mut [])?;
        stats = comm.end_step();
    }
    Ok(stats)
}

/// The backward of an MoE layer: gradients out to the experts, their products, gradients back, chunk by chunk.
fn moe_backward(comm: &mut Comm, layer: usize) -> Result<(), CommError> {
    let chunks = comm.moe_shape().chunks as u32;
    let exchange = |comm: &mut Comm, leg, chunk| {
        let elements = MESSAGE / chunks as usize;
        let kind = AllToAllKind { direction: Direction::Backward, leg, layer: layer as u32, chunk, chunks };
        comm.all_to_all(Exchange {
            kind,
            send: vec![1.0; RANKS * elements],
            send_elements: vec![elements; RANKS],
            recv: vec![0.0; RANKS * elements],
            recv_elements: vec![elements; RANKS],
        })
    };
    let mut out = Vec::new();
    for chunk in 0..chunks {
        out.push(exchange(comm, Leg::Combine, chunk)?);
    }
    let mut back = Vec::new();
    for (chunk, ticket) in (0..chunks).zip(out) {
        comm.wait(ticket)?;
        let flops = 600_000_000 / u64::from(chunks);
        comm.work(Work { kind: WorkKind::ExpertFfn, layer: Some(layer as u32), flops })?;
        back.push(exchange(comm, Leg::Dispatch, chunk)?);
    }
    for ticket in back {
        comm.wait(ticket)?;
    }
    Ok(())
}
