//! The engine on NCCL: what arrives, what is summed, one launch order, and what every rank says when one is lost. Starts
//! itself as a process a rank, on as many GPUs as there are: where ranks share one, each has an `NCCL_HOSTID` of its own (and
//! CUDA's MPS, if it runs, makes it fast). Without a GPU or without NCCL it says so and passes.
#![cfg(feature = "nccl")]

mod dice;
mod launcher;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lina_comm::nccl::{NcclConfig, NcclJob, NcclStartError, library};
use lina_comm::*;
use lina_cuda::{DType, Device, Gpu};
use lina_plan::{Policy, PolicyRules, PolicySettings};

use dice::Dice;
use launcher::{say, setting};

/// Elements of the largest gradient.
const GRADIENT: usize = 700;
/// Rate of the emulated device, so that data is late.
const GFLOPS: f64 = 10.0;

fn rules(policy: Policy) -> PolicyRules {
    PolicyRules::new(
        policy,
        &PolicySettings { bucket_bytes: 3000, partition_bytes: 800, pipeline_chunks: 2, ..PolicySettings::default() },
    )
}

/// Steps between two changes of groups.
const PERIOD: u64 = 8;

/// Every two neighbours hold something together, and the last rank something on its own; or, every other time, all ranks but
/// the first.
fn groups(ranks: usize, time: u64) -> Vec<Vec<usize>> {
    let all: Vec<usize> = (0..ranks).collect();
    let pairs = (1..ranks).map(|rank| vec![rank - 1, rank]);
    if time.is_multiple_of(2) {
        std::iter::once(all).chain(pairs).chain([vec![ranks - 1]]).collect()
    } else {
        vec![all.clone(), all[1.min(ranks - 1)..].to_vec(), all]
    }
}

/// A small whole number, of which sums are exact in any order, and which bf16 can hold.
fn value(rank: usize, i: usize) -> f32 {
    ((rank + 1) * (i % 13)) as f32
}

/// A value without short binary form, so that sums depend on their order.
fn irregular(seed: usize) -> f64 {
    (seed.wrapping_mul(2_654_435_761) % 1_000_003) as f64 / 7.3
}

/// Whether gradients are of values whose sums depend on their order, which is that of ranks.
fn ordered() -> bool {
    setting("ORDERED").is_some()
}

/// An element of a rank's gradient.
fn gradient(rank: usize, i: usize) -> f32 {
    if ordered() { irregular(rank * 7919 + i) as f32 } else { value(rank, i) }
}

/// A rank's part of a random program: each step has other layers, messages and gradients, some of them empty.
fn program(
    comm: &mut Comm,
    gpu: &Gpu,
    seed: u64,
    steps: u64,
    mut each_step: impl FnMut(&mut Comm, u64),
) -> Result<(), CommError> {
    let (me, ranks) = (comm.rank(), comm.ranks());
    let mut dice = Dice(seed);
    let buffer = || SharedBuffer::on_device(gpu.zeros(4 * GRADIENT, DType::F32).unwrap());
    let mut gradients: Vec<SharedBuffer> = (0..=ranks.max(3)).map(|_| buffer()).collect();
    for step in 0..steps {
        let groups = groups(ranks, step / PERIOD);
        if step > 0 && step % PERIOD == 0 {
            comm.set_groups(&groups)?;
        }
        each_step(comm, step);
        comm.begin_step(step)?;
        let micro_batches = 1 + dice.roll(2);
        let mut reduced = Vec::new();
        for micro_batch in 0..micro_batches {
            let last = micro_batch + 1 == micro_batches;
            comm.begin_micro_batch(last)?;
            let layers = dice.roll(3) as u32;
            for layer in 0..layers {
                moe_layer(comm, gpu, &mut dice, Direction::Forward, layer)?;
            }
            for layer in (0..layers).rev() {
                moe_layer(comm, gpu, &mut dice, Direction::Backward, layer)?;
                for (number, (members, buffer)) in groups.iter().zip(&mut gradients).enumerate() {
                    let elements = dice.roll(GRADIENT);
                    let range = layer as usize * GRADIENT..layer as usize * GRADIENT + elements;
                    late(comm, layer)?;
                    let local = members.contains(&me).then(|| {
                        let values: Vec<f32> = (0..elements).map(|i| gradient(me, i + step as usize)).collect();
                        gpu.upload(&values, buffer.device_range_mut(range.clone())).unwrap();
                        (buffer, range.clone())
                    });
                    comm.reduce_gradient(GradientRegion { group: GroupId(number as u32), elements, local })?;
                    if last {
                        reduced.push((number, range));
                    }
                }
            }
        }
        comm.finish_gradients()?;
        for (number, range) in reduced.into_iter().filter(|(number, _)| groups[*number].contains(&me)) {
            let found = gpu.to_host::<f32>(gradients[number].device_range(range)).unwrap();
            let sum = |i: usize| groups[number].iter().map(|&rank| gradient(rank, i + step as usize)).sum();
            assert!(found.iter().copied().eq((0..found.len()).map(sum)), "group {number}, step {step}: {found:?}");
        }
        let mut sum = [irregular(me), (me + 1) as f64];
        comm.agree(&mut sum)?;
        let in_order = (1..ranks).fold(irregular(0), |sum, rank| sum + irregular(rank));
        assert_eq!(sum, [in_order, (ranks * (ranks + 1) / 2) as f64]);
        let stats = comm.end_step();
        assert!(stats.compute <= stats.step && stats.all_to_all_blocked + stats.all_reduce_blocked <= stats.step);
    }
    Ok(())
}

/// Keeps the device busy, so that what is enqueued next happens later.
fn late(comm: &mut Comm, layer: u32) -> Result<(), CommError> {
    comm.work(Work { kind: WorkKind::Attention, layer: Some(layer), flops: 400_000 })?;
    comm.work(Work { kind: WorkKind::Permute, layer: Some(layer), flops: 0 })
}

fn moe_layer(comm: &mut Comm, gpu: &Gpu, dice: &mut Dice, direction: Direction, layer: u32) -> Result<(), CommError> {
    let (me, ranks) = (comm.rank(), comm.ranks());
    let chunks = comm.moe_shape().chunks as u32;
    for leg in [Leg::Dispatch, Leg::Combine] {
        let dtype = if dice.roll(2) == 0 { DType::F32 } else { DType::Bf16 };
        let on_host = dice.roll(4) == 0;
        let (mut tickets, mut expected) = (Vec::new(), Vec::new());
        for chunk in 0..chunks {
            late(comm, layer)?;
            let elements: Vec<usize> = (0..ranks * ranks).map(|_| dice.roll(3) * 41).collect();
            let send_elements = elements[me * ranks..(me + 1) * ranks].to_vec();
            let recv_elements: Vec<usize> = elements.iter().skip(me).step_by(ranks).copied().collect();
            let pieces = |from: usize, to: usize| (0..elements[from * ranks + to]).map(move |i| value(from, i + to));
            let send: Vec<f32> = (0..ranks).flat_map(|to| pieces(me, to)).collect();
            expected.push((0..ranks).flat_map(|from| pieces(from, me)).collect::<Vec<f32>>());
            let kind = AllToAllKind { direction, leg, layer, chunk, chunks };
            let recv = vec![f32::NAN; recv_elements.iter().sum()];
            tickets.push(if on_host {
                comm.all_to_all(Exchange { kind, send, send_elements, recv, recv_elements })?
            } else {
                let (send, recv) = (gpu.buffer_from(&send, dtype).unwrap(), gpu.buffer_from(&recv, dtype).unwrap());
                comm.all_to_all_on_device(DeviceExchange { kind, send, send_elements, recv, recv_elements })?
            });
        }
        for (ticket, expected) in tickets.into_iter().zip(expected) {
            let found = if on_host {
                comm.wait(ticket)?.recv
            } else {
                let found = gpu.to_host(comm.wait_on_device(ticket)?.recv.whole()).unwrap();
                comm.check()?;
                found
            };
            assert_eq!(found, expected);
        }
    }
    Ok(())
}

/// Exchanges to which rank 1 comes late: that the others wait for it is time in which they are blocked, not time on the wire.
fn wait_for_rank_1(comm: &mut Comm, gpu: &Gpu) -> Result<(), CommError> {
    const LATE_NS: u64 = 200_000_000;
    let (me, ranks) = (comm.rank(), comm.ranks());
    for step in 0..4 {
        comm.begin_step(step)?;
        comm.begin_micro_batch(true)?;
        let flops = if me == 1 { (LATE_NS as f64 * GFLOPS) as u64 } else { 0 };
        comm.work(Work { kind: WorkKind::ExpertFfn, layer: None, flops })?;
        let kind = AllToAllKind { direction: Direction::Forward, leg: Leg::Combine, layer: 0, chunk: 0, chunks: 1 };
        let (send_elements, recv_elements) = (vec![100; ranks], vec![100; ranks]);
        if step % 2 == 0 {
            let [send, recv] = [(); 2].map(|()| gpu.zeros(100 * ranks, DType::Bf16).unwrap());
            let ticket =
                comm.all_to_all_on_device(DeviceExchange { kind, send, send_elements, recv, recv_elements })?;
            comm.wait_on_device(ticket)?;
        } else {
            let [send, recv] = [(); 2].map(|()| vec![0.0; 100 * ranks]);
            let ticket = comm.all_to_all(Exchange { kind, send, send_elements, recv, recv_elements })?;
            comm.wait(ticket)?;
        }
        comm.finish_gradients()?;
        comm.agree(&mut [])?;
        let stats = comm.end_step();
        // In the first step connections are made.
        if step > 0 {
            assert!(stats.all_to_all < LATE_NS / 2, "{stats:?}");
            assert_eq!(me != 1, stats.all_to_all_blocked > LATE_NS / 2, "{stats:?}");
            assert_eq!(me == 1, stats.compute >= LATE_NS, "{stats:?}");
        }
    }
    Ok(())
}

/// The sentence of a rank that has lost another.
fn last_words(error: &CommError) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Ordering::Relaxed) {
        say(&format!("ended: {error}"));
    }
    std::process::exit(1);
}

fn signal_itself(signal: &str) {
    let own = std::process::id().to_string();
    Command::new("kill").args([signal, &own]).status().unwrap();
    std::thread::sleep(Duration::from_millis(100));
}

fn number(name: &str) -> Option<u64> {
    setting(name).and_then(|text| text.parse().ok())
}

fn config(ranks: usize) -> NcclConfig {
    let launched: Option<u64> = std::env::var("RANK").ok().and_then(|rank| rank.parse().ok());
    let identity = if number("DIFFERENT") == launched { "steps = 2" } else { "steps = 1" };
    let mut groups = groups(ranks, 0);
    match setting("START").filter(|_| number("LOSE") == launched).as_deref() {
        // Others do not lead the set that it adds, so that it fails, before a set for which they wait for it.
        Some("fail") => groups.insert(1, vec![0, 2]),
        // It has all that it wants while others still wait for it.
        Some("kill") => groups = vec![vec![1]],
        _ => {}
    }
    NcclConfig {
        ranks,
        groups,
        ordered_sums: ordered(),
        timeout: Duration::from_millis(number("TIMEOUT_MS").unwrap_or(30_000)),
        identity: identity.to_owned(),
        last_words: Some(last_words),
        delays: number("SEED").map(|seed| Delays { seed, max_us: 100 }),
        log_launches: true,
    }
}

/// What a rank runs; by itself it does nothing.
#[test]
fn rank_program() {
    let Some(policy) = setting("POLICY") else { return };
    let (ranks, steps) = (number("RANKS").unwrap() as usize, number("STEPS").unwrap());
    let (job, mut comm) = match NcclJob::start(config(ranks), rules(policy.parse().unwrap())) {
        Ok(started) => started,
        Err(error) => {
            say(&format!("start: {error}"));
            std::process::exit(0);
        }
    };
    let rank = comm.rank();
    if setting("START").is_some_and(|what| what == "kill") && number("LOSE") == Some(rank as u64) {
        signal_itself("-KILL");
    }
    let gpu = Gpu::open(job.device()).unwrap();
    let mut clock = DeviceClock::new(&gpu).unwrap();
    clock.emulate_rate(&gpu, GFLOPS).unwrap();
    comm.set_device(clock);
    let lose_at = (number("LOSE") == Some(rank as u64)).then_some(2);
    if setting("LATE").is_some() {
        wait_for_rank_1(&mut comm, &gpu).unwrap();
        say(&format!("rank {rank}: done"));
        drop(comm);
        std::process::exit(0);
    }
    let result = program(&mut comm, &gpu, number("SEED").unwrap_or(1), steps, |comm, step| {
        if Some(step) == lose_at {
            match setting("SIGNAL").unwrap().as_str() {
                "sleep" => std::thread::sleep(Duration::from_secs(20)),
                "busy" => comm.busy(|_| std::thread::sleep(Duration::from_secs(8))),
                "panic" => panic!("it was told to"),
                signal => signal_itself(signal),
            }
        }
    });
    match result {
        Ok(()) => {
            let launches = job.launch_log();
            let mut digest = DefaultHasher::new();
            format!("{launches:?}").hash(&mut digest);
            say(&format!("rank {rank}: {} launches {:x}", launches.len(), digest.finish()));
        }
        Err(error) => last_words(&error),
    }
    drop(comm);
    // Nothing of the test harness is wanted among the ranks' lines.
    std::process::exit(0);
}

/// What the ranks of a job have said, with their output for messages; `None` where there is no GPU or no NCCL.
fn job(ranks: usize, policy: Policy, steps: u64, more: &[(&str, &str)]) -> Option<(Vec<String>, String)> {
    let gpus = match Device::count()
        .map_err(|e| e.to_string())
        .and_then(|count| library().map(|_| count).map_err(|e| e.to_string()))
    {
        Ok(0) => {
            eprintln!("skipped: there is no GPU");
            return None;
        }
        Ok(count) => count,
        Err(reason) => {
            eprintln!("skipped: {reason}");
            return None;
        }
    };
    let (count, steps) = (ranks.to_string(), steps.to_string());
    let settings = [("POLICY", policy.name()), ("RANKS", &count), ("STEPS", &steps)];
    let variables = |rank: usize| {
        let shared = ranks > gpus && setting("UNSHARED").is_none();
        let host = || ("NCCL_HOSTID".to_owned(), format!("host{rank}"));
        let mut variables: Vec<_> = shared.then(host).into_iter().collect();
        variables.push(("NCCL_SOCKET_IFNAME".to_owned(), "lo".to_owned()));
        variables
    };
    let outputs = launcher::processes(ranks, "rank_program", &[&settings, more].concat(), variables);
    let mut lines: Vec<String> =
        outputs.iter().flat_map(|output| launcher::lines(output, &["rank ", "start: ", "ended: "])).collect();
    lines.sort();
    let text = |output: &Output| {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        format!("{out}{err}")
    };
    Some((lines, outputs.iter().map(text).collect()))
}

#[track_caller]
fn check_launches(lines: &[String], ranks: usize, output: &str) {
    assert_eq!(lines.len(), ranks, "{output}");
    let launches: Vec<&str> = lines.iter().filter_map(|line| line.split(": ").nth(1)).collect();
    assert!(launches.iter().all(|other| *other == launches[0]), "{lines:?}");
}

#[test]
fn data_is_right_and_launches_are_in_one_order() {
    for (ranks, policy) in [(1, Policy::Fair), (2, Policy::Lina), (4, Policy::Fair), (8, Policy::Lina)] {
        let started = Instant::now();
        let Some((lines, output)) = job(ranks, policy, 20, &[]) else { return };
        check_launches(&lines, ranks, &output);
        eprintln!("{ranks} ranks, {policy}: 20 steps in {:.1} s", started.elapsed().as_secs_f64());
    }
}

#[test]
fn a_thousand_steps_with_random_delays() {
    for (seed, policy) in Policy::ALL.into_iter().enumerate() {
        let started = Instant::now();
        let ranks = [4, 2, 3][seed % 3];
        let steps = 1000 / Policy::ALL.len() as u64 + 1;
        let Some((lines, output)) = job(ranks, policy, steps, &[("SEED", &(100 + seed).to_string())]) else { return };
        check_launches(&lines, ranks, &output);
        eprintln!("{ranks} ranks, {policy}: {steps} steps in {:.1} s", started.elapsed().as_secs_f64());
    }
}

#[test]
fn sums_in_the_order_of_ranks_do_not_depend_on_how_gradients_are_cut() {
    for (seed, (ranks, policy)) in [(4, Policy::Fair), (3, Policy::Lina)].into_iter().enumerate() {
        let more = [("ORDERED", "1"), ("SEED", &(200 + seed).to_string())];
        let Some((lines, output)) = job(ranks, policy, 25, &more) else { return };
        check_launches(&lines, ranks, &output);
    }
}

#[test]
fn waiting_for_a_late_rank_is_no_time_on_the_wire() {
    let Some((lines, output)) = job(3, Policy::Lina, 0, &[("LATE", "1")]) else { return };
    assert_eq!(lines, ["rank 0: done", "rank 1: done", "rank 2: done"], "{output}");
}

#[test]
fn a_killed_rank_is_named_by_all_others() {
    let started = Instant::now();
    let Some((lines, output)) = job(4, Policy::Lina, 10_000_000, &[("LOSE", "2"), ("SIGNAL", "-KILL")]) else { return };
    assert_eq!(lines, ["ended: rank 2 failed: its process has died or was killed"; 3], "{output}");
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
fn a_rank_that_panics_is_named_by_all_others() {
    let Some((lines, output)) = job(3, Policy::Fair, 10_000_000, &[("LOSE", "0"), ("SIGNAL", "panic")]) else { return };
    assert_eq!(lines, ["ended: rank 0 failed: it panicked"; 2], "{output}");
}

#[test]
fn a_rank_that_fails_while_it_starts_says_why_and_is_named_by_all_others() {
    let started = Instant::now();
    let Some((lines, output)) = job(3, Policy::Lina, 1, &[("LOSE", "1"), ("START", "fail")]) else { return };
    let ended = "ended: rank 1 failed: rank 0 led no group";
    assert_eq!(lines, [ended, ended, "start: engine nccl cannot start: rank 0 led no group"], "{output}");
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
fn a_rank_that_is_killed_while_others_start_is_named_by_them() {
    let started = Instant::now();
    let Some((lines, output)) = job(3, Policy::Lina, 1, &[("LOSE", "1"), ("START", "kill")]) else { return };
    assert_eq!(lines, ["ended: rank 1 failed: its process has died or was killed"; 2], "{output}");
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
fn a_rank_that_does_not_take_part_is_named_by_all_others() {
    let more = [("LOSE", "1"), ("SIGNAL", "sleep"), ("TIMEOUT_MS", "3000")];
    let Some((lines, output)) = job(3, Policy::Lina, 10_000_000, &more) else { return };
    assert!(lines.len() >= 2, "{output}");
    assert!(lines.iter().all(|line| line.starts_with("ended: rank 1 has been silent for 3 s")), "{lines:?}");
}

#[test]
fn a_rank_that_says_that_it_is_busy_is_waited_for() {
    let more = [("LOSE", "1"), ("SIGNAL", "busy"), ("TIMEOUT_MS", "3000")];
    let Some((lines, output)) = job(3, Policy::Lina, 6, &more) else { return };
    check_launches(&lines, 3, &output);
    assert!(lines.iter().all(|line| line.starts_with("rank ")), "{output}");
}

#[test]
fn other_configurations_and_other_ranks_do_not_start() {
    let Some((lines, output)) = job(2, Policy::Lina, 1, &[("DIFFERENT", "1")]) else { return };
    let difference = "it has `steps = 2` where rank 0 has `steps = 1`".to_owned();
    let expected = format!("start: {}", NcclStartError::Differs { rank: 1, difference });
    assert_eq!(lines, vec![expected; 2], "{output}");
    let Some((lines, output)) = job(2, Policy::Lina, 1, &[("RANKS", "3")]) else { return };
    let expected = format!("start: {}", NcclStartError::OtherRanks { found: 2, expected: 3 });
    assert_eq!(lines, vec![expected; 2], "{output}");
}
