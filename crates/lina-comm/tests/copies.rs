//! Copies to and from an emulated device's memory: beside computation, in turn, waited for on either clock.

use std::time::{Duration, Instant};

use lina_comm::emulated::{Device, EmulatedCluster, EmulatedConfig};
use lina_comm::local::{LocalConfig, LocalJob};
use lina_comm::{Comm, CopyDirection, HostCopy, Lane, StepStats, Work, WorkKind};
use lina_net::{Link, Topology};
use lina_plan::{Policy, PolicyRules, PolicySettings};

const TO_DEVICE: HostCopy = HostCopy { direction: CopyDirection::ToDevice, layer: 3, bytes: 10_000_000 };

fn rules() -> PolicyRules {
    PolicyRules::new(Policy::Fair, &PolicySettings::default())
}

fn emulated() -> Comm {
    let link = Link { gbps: 1.0, latency_us: 1.0, launch_us: 1.0, message_us: 0.0, nodes: 1, inner_gbps: 1.0 };
    let config = EmulatedConfig {
        topology: Topology::new(link, 1).unwrap(),
        device: Device { gflops: 1.0 },
        groups: vec![vec![0]],
        timeout: Duration::from_secs(30),
        delays: None,
        log_launches: false,
    };
    EmulatedCluster::new(config).comms(rules()).remove(0)
}

/// A step that computes `compute_ns` (emulated) beside two copies of 10 ms, then one back.
fn step(comm: &mut Comm, compute_ns: u64) -> StepStats {
    comm.emulate_copies(8.0);
    comm.begin_step(0).unwrap();
    let first = comm.copy(TO_DEVICE);
    let second = comm.copy(TO_DEVICE);
    comm.work(Work { kind: WorkKind::Attention, layer: Some(0), flops: compute_ns }).unwrap();
    comm.wait_copy(first).unwrap();
    comm.wait_copy(second).unwrap();
    let _back = comm.copy(HostCopy { direction: CopyDirection::ToHost, ..TO_DEVICE });
    comm.finish_gradients().unwrap();
    comm.end_step()
}

#[test]
fn on_the_virtual_clock_waits_are_exact() {
    let mut comm = emulated();
    let stats = step(&mut comm, 5_000_000);
    assert_eq!((stats.compute, stats.copy_blocked, stats.step), (5_000_000, 25_000_000, 30_000_000));
    assert_eq!((stats.copy, stats.copy_bytes), (30_000_000, 30_000_000));
    // Long computation covers the copies that run beside it.
    let stats = step(&mut emulated(), 50_000_000);
    assert_eq!((stats.copy_blocked, stats.step), (10_000_000, 60_000_000));
}

#[test]
fn copies_have_a_lane_of_their_own() {
    let mut comm = emulated();
    comm.record(true);
    step(&mut comm, 0);
    let spans = comm.record(false);
    let copies: Vec<_> = spans.iter().filter(|span| span.lane == Lane::Copy).collect();
    let times: Vec<_> = copies.iter().map(|span| (span.name, span.start, span.end, span.layer)).collect();
    let name = CopyDirection::name;
    assert_eq!(
        times,
        [
            (name(CopyDirection::ToDevice), 0, 10_000_000, Some(3)),
            (name(CopyDirection::ToDevice), 10_000_000, 20_000_000, Some(3)),
            (name(CopyDirection::ToHost), 20_000_000, 30_000_000, Some(3)),
        ]
    );
}

#[test]
fn on_the_wall_clock_waits_are_slept() {
    let local = LocalConfig {
        ranks: 1,
        groups: vec![vec![0]],
        timeout: Duration::from_secs(30),
        delays: None,
        log_launches: false,
    };
    let (_job, mut comms) = LocalJob::start(local, rules()).unwrap();
    for mut comm in [comms.remove(0), Comm::solo()] {
        let started = Instant::now();
        let stats = step(&mut comm, 0);
        assert!(started.elapsed() >= Duration::from_millis(30));
        assert!(stats.copy_blocked >= 29_000_000 && stats.step >= stats.copy_blocked, "{stats:?}");
        assert_eq!((stats.copy, stats.copy_bytes), (30_000_000, 30_000_000));
    }
}

#[test]
fn without_an_emulated_memory_copies_take_nothing() {
    let mut comm = Comm::solo();
    comm.begin_step(0).unwrap();
    let ticket = comm.copy(HostCopy { bytes: u64::MAX, ..TO_DEVICE });
    comm.wait_copy(ticket).unwrap();
    let stats = comm.end_step();
    assert_eq!((stats.copy, stats.copy_blocked, stats.copy_bytes), (0, 0, 0));
}
