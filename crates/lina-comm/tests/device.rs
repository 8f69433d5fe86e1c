//! One rank on a GPU: what it is told of its time is the device's. Skipped where there is no GPU.
#![cfg(feature = "nccl")]

use std::time::Duration;

use lina_comm::*;
use lina_cuda::testing::{gpu, random};
use lina_cuda::{DType, Gpu};

const MILLISECOND: u64 = 1_000_000;
const STEPS: u64 = 5;

/// A rank on a device of 1 GFLOP/s.
fn comm(gpu: &Gpu) -> Comm {
    let mut comm = Comm::solo();
    let mut clock = DeviceClock::new(gpu).unwrap();
    clock.emulate_rate(gpu, 1.0).unwrap();
    comm.set_device(clock);
    comm
}

fn work(kind: WorkKind, ms: u64) -> Work {
    Work { kind, layer: None, flops: ms * MILLISECOND }
}

#[test]
fn work_lasts_as_long_as_on_the_device() {
    let Some(gpu) = gpu() else { return };
    let mut comm = comm(&gpu);
    comm.record(true);
    // A busy machine delays a host, but not in every step.
    let (mut ahead, mut on_time) = (0, 0);
    for step in 0..STEPS {
        comm.begin_step(step).unwrap();
        for _ in 0..4 {
            comm.work(work(WorkKind::ExpertFfn, 5)).unwrap();
            comm.work(work(WorkKind::Attention, 3)).unwrap();
        }
        let enqueued = comm.stats();
        comm.finish_gradients().unwrap();
        let stats = comm.end_step();
        // In the first step the driver may still be loading the kernels.
        ahead += usize::from(enqueued.step < 20 * MILLISECOND);
        assert!((32 * MILLISECOND..36 * MILLISECOND).contains(&stats.compute), "{stats:?}");
        assert!((20 * MILLISECOND..23 * MILLISECOND).contains(&stats.ffn), "{stats:?}");
        assert_eq!(stats.ffn_micro_ops, 4);
        assert!(stats.step >= stats.compute, "{stats:?}");
        on_time += usize::from(stats.step < stats.compute + 10 * MILLISECOND);
    }
    assert!(ahead > 0, "the host runs ahead of its device");
    assert!(on_time > 0, "a step lasts hardly longer than its computation");
    let spans = comm.record(false);
    assert_eq!(spans.len(), 8 * STEPS as usize);
    assert!(spans.windows(2).all(|pair| pair[0].end <= pair[1].start + MILLISECOND / 10), "{spans:?}");
    assert!(spans.iter().all(|span| span.start < span.end && span.end <= comm.now()));
}

/// The host's waits count only while the device has nothing to do.
#[test]
fn a_rank_alone_receives_what_it_sends_and_is_never_blocked() {
    let Some(gpu) = gpu() else { return };
    let mut comm = comm(&gpu);
    comm.begin_step(0).unwrap();
    comm.begin_micro_batch(true).unwrap();
    let kind = AllToAllKind { direction: Direction::Forward, leg: Leg::Dispatch, layer: 0, chunk: 0, chunks: 1 };
    for (room, dtype) in [(1000, DType::F32), (1500, DType::F32), (1500, DType::Bf16)] {
        comm.work(work(WorkKind::Permute, 2)).unwrap();
        let values: Vec<f32> = random(1, 1000).iter().map(|value| (value * 64.0).round()).collect();
        let send = gpu.buffer_from(&values, dtype).unwrap();
        let recv = gpu.zeros(room, dtype).unwrap();
        let (send_elements, recv_elements) = (vec![1000], vec![1000]);
        let ticket = comm.all_to_all_on_device(DeviceExchange { kind, send, send_elements, recv, recv_elements });
        let exchange = comm.wait_on_device(ticket.unwrap()).unwrap();
        assert_eq!(gpu.to_host::<f32>(exchange.recv.slice(0..1000)).unwrap(), values);
    }
    let mut gradient = SharedBuffer::on_device(gpu.zeros(64, DType::F32).unwrap());
    gpu.upload(&[1.0; 64], gradient.device_range_mut(0..64)).unwrap();
    let local = Some((&mut gradient, 0..64));
    comm.reduce_gradient(GradientRegion { group: GroupId::WORLD, elements: 64, local }).unwrap();
    comm.finish_gradients().unwrap();
    assert_eq!(gpu.to_host::<f32>(gradient.device_range(0..64)).unwrap(), [1.0; 64]);
    std::thread::sleep(Duration::from_millis(5));
    let stats = comm.end_step();
    assert_eq!((stats.all_to_all_blocked, stats.all_reduce_blocked), (0, 0));
    assert!(stats.compute >= 6 * MILLISECOND && stats.step >= stats.compute + 5 * MILLISECOND, "{stats:?}");
}
