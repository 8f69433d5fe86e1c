//! The engine on MPI against the engine between threads: the same job, the same bits, one launch order, and what every
//! rank says when one is lost. The test starts itself under `mpirun`; where there is none, it says so and passes.
#![cfg(feature = "mpi")]

mod launcher;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lina_comm::local::{LocalConfig, LocalJob};
use lina_comm::mpi::{MpiConfig, MpiJob, MpiStartError};
use lina_comm::*;
use lina_plan::{Launch, Policy, PolicyRules, PolicySettings};

use launcher::{say, setting};

const LAYERS: u32 = 3;
const GRADIENT: usize = 1003;
const REPLICATED: usize = 301;
/// How long a rank does nothing, which is longer than the timeout then.
const PAUSE: Duration = Duration::from_millis(2500);
const DELAYS: Delays = Delays { seed: 5, max_us: 300 };

fn rules(policy: Policy) -> PolicyRules {
    PolicyRules::new(
        policy,
        &PolicySettings {
            bucket_bytes: 6000,
            partition_bytes: 1500,
            pipeline_chunks: 2,
            hierarchical_all_to_all: policy == Policy::LinaAuto,
            ..PolicySettings::default()
        },
    )
}

/// Ranks 1 and 2 hold an expert together.
fn groups(ranks: usize) -> Vec<Vec<usize>> {
    vec![(0..ranks).collect(), vec![1, 2]]
}

/// A value without short binary form, so that sums depend on their order.
fn value(seed: usize) -> f32 {
    (seed.wrapping_mul(2_654_435_761) % 1_000_003) as f32 / 7.3
}

/// Exchanges a number of values that depends on both ranks, sometimes none.
fn exchange(comm: &mut Comm, kind: AllToAllKind) -> Result<Ticket, CommError> {
    let (me, ranks) = (comm.rank(), comm.ranks());
    let elements = |source: usize, destination: usize| (source * 3 + destination * 5 + kind.layer as usize) % 7 * 120;
    let send_elements: Vec<usize> = (0..ranks).map(|to| elements(me, to)).collect();
    let recv_elements: Vec<usize> = (0..ranks).map(|from| elements(from, me)).collect();
    let send = (0..send_elements.iter().sum()).map(|i| value(me * 10_000 + i)).collect();
    let recv = vec![0.0; recv_elements.iter().sum()];
    comm.all_to_all(Exchange { kind, send, send_elements, recv, recv_elements })
}

/// A few steps with all-to-alls and gradients; returns a digest of all that was received and summed.
fn toy(comm: &mut Comm, steps: u64, mut each_step: impl FnMut(&mut Comm, u64)) -> Result<u64, CommError> {
    let me = comm.rank();
    let mut digest = DefaultHasher::new();
    let mut dense = [(); 2].map(|()| SharedBuffer::zeros(LAYERS as usize * GRADIENT));
    let mut expert = SharedBuffer::zeros(if me == 1 || me == 2 { LAYERS as usize * REPLICATED } else { 0 });
    for step in 0..steps {
        each_step(comm, step);
        comm.begin_step(step)?;
        comm.begin_micro_batch(true)?;
        for layer in 0..2 * LAYERS {
            let direction = if layer < LAYERS { Direction::Forward } else { Direction::Backward };
            let chunks = comm.moe_shape().chunks as u32;
            for leg in [Leg::Dispatch, Leg::Combine] {
                comm.work(Work { kind: WorkKind::Attention, layer: Some(layer), flops: 1000 })?;
                let kind = |chunk| AllToAllKind { direction, leg, layer, chunk, chunks };
                let tickets: Vec<Ticket> =
                    (0..chunks).map(|chunk| exchange(comm, kind(chunk))).collect::<Result<_, _>>()?;
                for ticket in tickets {
                    comm.wait(ticket)?.recv.iter().for_each(|x| x.to_bits().hash(&mut digest));
                }
            }
            if direction == Direction::Backward {
                let place = (layer - LAYERS) as usize;
                let local = (!expert.is_empty()).then(|| {
                    let range = place * REPLICATED..(place + 1) * REPLICATED;
                    expert.range_mut(range.clone()).iter_mut().enumerate().for_each(|(i, x)| *x = value(me + 31 * i));
                    (&mut expert, range)
                });
                comm.reduce_gradient(GradientRegion { group: GroupId(1), elements: REPLICATED, local })?;
                // Two buffers in turn: micro-operations and members' shares lie across both.
                for buffer in &mut dense {
                    let range = place * GRADIENT..(place + 1) * GRADIENT;
                    let values = buffer.range_mut(range.clone()).iter_mut().enumerate();
                    values.for_each(|(i, x)| *x = value(me * 977 + i + step as usize));
                    let local = Some((buffer, range));
                    comm.reduce_gradient(GradientRegion { group: GroupId::WORLD, elements: GRADIENT, local })?;
                }
            }
        }
        comm.finish_gradients()?;
        for buffer in dense.iter().chain([&expert]) {
            buffer.range(0..buffer.len()).iter().for_each(|x| x.to_bits().hash(&mut digest));
        }
        let mut norm = [f64::from(value(me)), 1.0 / 3.0];
        comm.agree(&mut norm)?;
        norm.iter().for_each(|x| x.to_bits().hash(&mut digest));
        comm.end_step();
    }
    Ok(digest.finish())
}

/// What a rank prints: the digest of its data, and that of its launches.
fn line(rank: usize, data: u64, launches: &[(u64, Launch)]) -> String {
    let mut digest = DefaultHasher::new();
    format!("{launches:?}").hash(&mut digest);
    format!("rank {rank}: data {data:x}, {} launches {:x}", launches.len(), digest.finish())
}

fn on_threads(ranks: usize, policy: Policy, steps: u64) -> Vec<String> {
    let timeout = Duration::from_secs(20);
    let config = LocalConfig { ranks, groups: groups(ranks), timeout, delays: None, log_launches: true };
    let (job, comms) = LocalJob::start(config, rules(policy)).unwrap();
    let threads: Vec<_> =
        comms.into_iter().map(|mut comm| std::thread::spawn(move || toy(&mut comm, steps, |_, _| {}))).collect();
    let data: Vec<u64> = threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect();
    let logs = job.launch_logs();
    data.iter().zip(&logs).enumerate().map(|(rank, (&data, log))| line(rank, data, log)).collect()
}

/// The sentence of a rank that has lost another.
fn last_words(error: &CommError) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Ordering::Relaxed) {
        say(&format!("ended: {error}"));
    }
    // A launcher forwards what a rank has said only while the rank lives.
    std::thread::sleep(Duration::from_millis(300));
    std::process::exit(1);
}

/// What runs under `mpirun`; by itself it does nothing.
#[test]
fn rank_program() {
    let Some(policy) = setting("POLICY") else { return };
    let number = |name: &str| setting(name).and_then(|text| text.parse::<u64>().ok());
    let (ranks, steps) = (number("RANKS").unwrap() as usize, number("STEPS").unwrap());
    let launched: Option<u64> = std::env::var("OMPI_COMM_WORLD_RANK").ok().and_then(|rank| rank.parse().ok());
    let identity = if number("DIFFERENT") == launched { "steps = 2" } else { "steps = 1" };
    let config = MpiConfig {
        ranks,
        nodes: number("NODES").map_or(ranks, |nodes| nodes as usize),
        groups: groups(ranks),
        timeout: Duration::from_millis(number("TIMEOUT_MS").unwrap_or(20_000)),
        identity: identity.to_owned(),
        device_gflops: None,
        max_message_bytes: 1000,
        last_words: Some(last_words),
        delays: setting("DELAYS").map(|_| DELAYS),
        log_launches: true,
    };
    let start = MpiJob::start(config, rules(policy.parse().unwrap()));
    let (job, mut comm) = match start {
        Ok(started) => started,
        Err(error) => return say(&format!("start: {error}")),
    };
    let rank = comm.rank();
    let lose_at = (number("LOSE") == Some(rank as u64)).then_some(2);
    let result = toy(&mut comm, steps, |comm, step| {
        if Some(step) == lose_at {
            let signal = setting("SIGNAL").unwrap();
            match signal.as_str() {
                "idle" => return std::thread::sleep(PAUSE),
                "busy" => return comm.busy(|_| std::thread::sleep(PAUSE)),
                _ => {}
            }
            let own = std::process::id().to_string();
            Command::new("kill").args([&signal, &own]).status().unwrap();
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    match result {
        Ok(data) => say(&line(rank, data, &job.launch_log())),
        Err(error) => last_words(&error),
    }
    drop(comm);
    // Nothing of the test harness is wanted among the ranks' lines.
    std::process::exit(0);
}

fn mpirun(ranks: usize, policy: Policy, steps: u64, more: &[(&str, &str)]) -> Option<Output> {
    let (count, steps) = (ranks.to_string(), steps.to_string());
    let settings = [("POLICY", policy.name()), ("RANKS", &count), ("STEPS", &steps)];
    launcher::mpirun(ranks, "rank_program", &[&settings, more].concat())
}

/// The lines that the ranks printed, sorted.
fn lines(output: &Output) -> Vec<String> {
    launcher::lines(output, &["rank ", "start: ", "ended: "])
}

#[test]
fn results_and_launches_are_those_of_threads_to_the_bit() {
    for (ranks, policy) in [(3, Policy::Fair), (4, Policy::Priority), (4, Policy::Fixed), (4, Policy::Lina)] {
        let Some(output) = mpirun(ranks, policy, 4, &[]) else { return };
        let found = lines(&output);
        // Which allreduce goes into which gap is measured; the data does not depend on it.
        let data = |lines: &[String]| -> Vec<String> {
            lines.iter().map(|line| line.split(',').next().unwrap_or_default().to_owned()).collect()
        };
        assert_eq!(data(&found), data(&on_threads(ranks, policy, 4)), "{policy}: {output:?}");
    }
}

/// Through nodes, in two steps, as much arrives as straight.
#[test]
fn the_hierarchical_way_brings_the_same_data() {
    for (ranks, nodes) in [(4, "2"), (6, "2"), (6, "3")] {
        let Some(output) = mpirun(ranks, Policy::LinaAuto, 6, &[("NODES", nodes), ("DELAYS", "1")]) else { return };
        let data = |lines: &[String]| -> Vec<String> {
            lines.iter().map(|line| line.split(',').next().unwrap_or_default().to_owned()).collect()
        };
        assert_eq!(data(&lines(&output)), data(&on_threads(ranks, Policy::Lina, 6)), "{nodes} nodes: {output:?}");
    }
}

/// Random delays on every rank change when operations launch, never their order.
#[test]
fn launch_order_is_one_under_random_delays() {
    for policy in [Policy::Fair, Policy::Lina] {
        let Some(output) = mpirun(4, policy, 25, &[("DELAYS", "1")]) else { return };
        let found = lines(&output);
        assert_eq!(found.len(), 4, "{output:?}");
        let launches: Vec<&str> = found.iter().filter_map(|line| line.split(", ").nth(1)).collect();
        assert!(launches.iter().all(|other| *other == launches[0]), "{found:?}");
    }
}

#[test]
fn a_killed_rank_is_named_by_all_others() {
    let started = Instant::now();
    let Some(output) = mpirun(4, Policy::Lina, 10_000_000, &[("LOSE", "2"), ("SIGNAL", "-KILL")]) else { return };
    assert_eq!(lines(&output), ["ended: rank 2 failed: its process has died or was killed"; 3], "{output:?}");
    assert!(!output.status.success() && started.elapsed() < Duration::from_secs(15));
}

#[test]
fn a_silent_rank_is_named_by_all_others() {
    let more = [("LOSE", "1"), ("SIGNAL", "-STOP"), ("TIMEOUT_MS", "1000")];
    let Some(output) = mpirun(3, Policy::Lina, 10_000_000, &more) else { return };
    let found = lines(&output);
    // The launcher wakes the silent one to end it; it has been told by then.
    assert!(found.len() >= 2, "{output:?}");
    assert!(found.iter().all(|line| line.starts_with("ended: rank 1 has been silent for 1 s")), "{found:?}");
}

#[test]
fn a_rank_that_says_that_it_is_busy_is_waited_for() {
    let pause = |what| mpirun(3, Policy::Lina, 4, &[("LOSE", "1"), ("SIGNAL", what), ("TIMEOUT_MS", "1000")]);
    let Some(output) = pause("busy") else { return };
    let found = lines(&output);
    assert!(found.len() == 3 && found.iter().all(|line| line.starts_with("rank ")), "{output:?}");
    let found = lines(&pause("idle").unwrap());
    assert!(
        !found.is_empty() && found.iter().all(|line| line.starts_with("ended: rank 1 has been silent")),
        "{found:?}"
    );
}

#[test]
fn other_configurations_and_other_ranks_do_not_start() {
    let Some(output) = mpirun(3, Policy::Lina, 1, &[("DIFFERENT", "2")]) else { return };
    let difference = "it has `steps = 2` where rank 0 has `steps = 1`".to_owned();
    let expected = format!("start: {}", MpiStartError::Differs { rank: 2, difference });
    assert_eq!(lines(&output), vec![expected; 3], "{output:?}");
    let Some(output) = mpirun(3, Policy::Lina, 1, &[("RANKS", "4")]) else { return };
    let expected = format!("start: {}", MpiStartError::OtherRanks { found: 3, expected: 4 });
    assert_eq!(lines(&output), vec![expected; 3], "{output:?}");
}
