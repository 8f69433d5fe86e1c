//! One toy training job, run by every body under every policy: sums, messages, launch order, determinism, failures.

use std::time::Duration;

use lina_comm::emulated::{Device, EmulatedCluster, EmulatedConfig};
use lina_comm::local::{LocalConfig, LocalJob};
use lina_comm::*;
use lina_net::{Link, Topology};
use lina_plan::{Launch, Policy, PolicyRules, PolicySettings};

const LAYERS: u32 = 3;
const GRADIENT: usize = 1000;
const REPLICATED: usize = 300;
/// Evaluation passes are numbered from here.
const EVALUATION: u64 = 1000;

type Logs = Vec<Vec<(u64, Launch)>>;

fn settings() -> PolicySettings {
    PolicySettings { bucket_bytes: 6000, partition_bytes: 1500, pipeline_chunks: 2, ..PolicySettings::default() }
}

fn rules(policy: Policy) -> PolicyRules {
    PolicyRules::new(policy, &settings())
}

/// Ranks 1 and 2 hold an expert together.
fn groups(ranks: usize) -> Vec<Vec<usize>> {
    vec![(0..ranks).collect(), vec![1, 2]]
}

fn topology(ranks: usize) -> Topology {
    let link = Link { gbps: 1.0, latency_us: 5.0, launch_us: 2.0, message_us: 0.0, nodes: ranks, inner_gbps: 10.0 };
    Topology::new(link, ranks).unwrap()
}

fn emulated(ranks: usize, delays: Option<Delays>) -> EmulatedCluster {
    EmulatedCluster::new(EmulatedConfig {
        topology: topology(ranks),
        device: Device { gflops: 1.0 },
        groups: groups(ranks),
        timeout: Duration::from_secs(20),
        delays,
        log_launches: true,
    })
}

fn local(ranks: usize, delays: Option<Delays>, timeout: Duration, policy: Policy) -> (LocalJob, Vec<Comm>) {
    let config = LocalConfig { ranks, groups: groups(ranks), timeout, delays, log_launches: true };
    LocalJob::start(config, rules(policy)).unwrap()
}

/// Sends `source * 100 + destination` to each rank, a number of times that depends on both, sometimes never.
fn exchange(comm: &mut Comm, kind: AllToAllKind) -> Result<Ticket, CommError> {
    let elements = |source: usize, destination: usize| {
        (source * 3 + destination * 5 + kind.layer as usize) % 7 * 40 / kind.chunks as usize
    };
    let (me, ranks) = (comm.rank(), comm.ranks());
    let send_elements: Vec<usize> = (0..ranks).map(|destination| elements(me, destination)).collect();
    let recv_elements: Vec<usize> = (0..ranks).map(|source| elements(source, me)).collect();
    let send = send_elements.iter().enumerate().flat_map(|(to, &n)| vec![(me * 100 + to) as f32; n]).collect();
    let recv = vec![-1.0; recv_elements.iter().sum()];
    comm.all_to_all(Exchange { kind, send, send_elements, recv, recv_elements })
}

fn check_received(comm: &mut Comm, ticket: Ticket) -> Result<(), CommError> {
    let me = comm.rank();
    let exchange = comm.wait(ticket)?;
    let expected: Vec<f32> =
        exchange.recv_elements.iter().enumerate().flat_map(|(from, &n)| vec![(from * 100 + me) as f32; n]).collect();
    assert_eq!(exchange.recv, expected, "{}", exchange.kind);
    Ok(())
}

fn work(comm: &mut Comm, kind: WorkKind, layer: u32, flops: u64) -> Result<(), CommError> {
    comm.work(Work { kind, layer: Some(layer), flops })
}

fn moe_layer(comm: &mut Comm, direction: Direction, layer: u32) -> Result<(), CommError> {
    let chunks = comm.moe_shape().chunks as u32;
    let (first, second) = match direction {
        Direction::Forward => (Leg::Dispatch, Leg::Combine),
        Direction::Backward => (Leg::Combine, Leg::Dispatch),
    };
    let kind = |leg, chunk| AllToAllKind { direction, leg, layer, chunk, chunks };
    let firsts: Vec<Ticket> = (0..chunks).map(|c| exchange(comm, kind(first, c))).collect::<Result<_, _>>()?;
    let mut seconds = Vec::new();
    for (chunk, ticket) in (0..).zip(firsts) {
        check_received(comm, ticket)?;
        work(comm, WorkKind::ExpertFfn, layer, 20_000 / u64::from(chunks))?;
        seconds.push(exchange(comm, kind(second, chunk))?);
    }
    seconds.into_iter().try_for_each(|ticket| check_received(comm, ticket))
}

fn train(comm: &mut Comm, steps: u64, fail_at: Option<(usize, u64)>) -> Result<Vec<StepStats>, CommError> {
    train_from(comm, 0, steps, fail_at)
}

fn train_from(
    comm: &mut Comm,
    first_step: u64,
    steps: u64,
    fail_at: Option<(usize, u64)>,
) -> Result<Vec<StepStats>, CommError> {
    let (me, ranks) = (comm.rank(), comm.ranks());
    let mut dense = SharedBuffer::zeros(LAYERS as usize * GRADIENT);
    let mut expert = SharedBuffer::zeros(if me == 1 || me == 2 { LAYERS as usize * REPLICATED } else { 0 });
    let mut stats = Vec::new();
    for step in first_step..first_step + steps {
        comm.begin_step(step)?;
        for micro_batch in 0..2 {
            comm.begin_micro_batch(micro_batch == 1)?;
            for layer in 0..LAYERS {
                work(comm, WorkKind::Attention, layer, 30_000)?;
                moe_layer(comm, Direction::Forward, layer)?;
            }
            for layer in (0..LAYERS).rev() {
                moe_layer(comm, Direction::Backward, layer)?;
                if fail_at == Some((me, step)) {
                    comm.fail("it was told to".to_owned());
                }
                let place = (LAYERS - 1 - layer) as usize;
                let local = (!expert.is_empty()).then(|| {
                    let range = place * REPLICATED..(place + 1) * REPLICATED;
                    expert.range_mut(range.clone()).fill((me + 1) as f32);
                    (&mut expert, range)
                });
                comm.reduce_gradient(GradientRegion { group: GroupId(1), elements: REPLICATED, local })?;
                work(comm, WorkKind::Attention, layer, 200_000)?;
                let range = place * GRADIENT..(place + 1) * GRADIENT;
                dense.range_mut(range.clone()).iter_mut().enumerate().for_each(|(i, x)| *x = (me * 1000 + i) as f32);
                let local = Some((&mut dense, range));
                comm.reduce_gradient(GradientRegion { group: GroupId::WORLD, elements: GRADIENT, local })?;
            }
        }
        comm.finish_gradients()?;
        let base = (0..ranks).map(|rank| rank * 1000).sum::<usize>();
        let sum = dense.range(0..dense.len()).iter().enumerate();
        for (i, &x) in sum {
            assert_eq!(x, (base + ranks * (i % GRADIENT)) as f32, "dense gradient {i}");
        }
        assert!(expert.range(0..expert.len()).iter().all(|&x| x == 5.0), "ranks 1 and 2 add 2 and 3");
        let mut norm = [me as f64, 1.0];
        comm.agree(&mut norm)?;
        assert_eq!(norm, [(0..ranks).sum::<usize>() as f64, ranks as f64]);
        work(comm, WorkKind::Optimizer, 0, 5000)?;
        stats.push(comm.end_step());
    }
    Ok(stats)
}

/// Runs one thread a rank and returns what each came to.
fn run(comms: Vec<Comm>, steps: u64, fail_at: Option<(usize, u64)>) -> Vec<Result<Vec<StepStats>, CommError>> {
    run_each(comms, move |comm| train(comm, steps, fail_at))
}

fn run_each<R: Send + 'static>(comms: Vec<Comm>, main: impl Fn(&mut Comm) -> R + Copy + Send + 'static) -> Vec<R> {
    let threads: Vec<_> = comms.into_iter().map(|mut comm| std::thread::spawn(move || main(&mut comm))).collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

fn assert_one_order(logs: &Logs, steps: u64, all_reduces: bool) {
    assert!(logs.iter().all(|log| log == &logs[0]), "ranks launched in different orders");
    assert!(logs[0].iter().any(|(step, _)| *step == steps - 1));
    assert_eq!(logs[0].iter().any(|(_, launch)| matches!(launch, Launch::AllReduce { .. })), all_reduces);
}

#[test]
fn every_policy_moves_the_same_data_on_virtual_time() {
    for policy in Policy::ALL {
        for ranks in [3, 4, 5] {
            let cluster = emulated(ranks, None);
            let results = run(cluster.comms(rules(policy)), 4, None);
            assert!(results.iter().all(Result::is_ok), "{policy}: {results:?}");
            assert_one_order(&cluster.launch_logs(), 4, true);
        }
    }
}

#[test]
fn every_policy_moves_the_same_data_between_threads() {
    for policy in Policy::ALL {
        let (job, comms) = local(4, None, Duration::from_secs(20), policy);
        let results = run(comms, 10, None);
        assert!(results.iter().all(Result::is_ok), "{policy}: {results:?}");
        assert_one_order(&job.launch_logs(), 10, true);
    }
}

/// Invariant 1: random delays on every rank change when operations launch, never their order.
#[test]
fn launch_order_is_one_under_random_delays() {
    for policy in [Policy::Fair, Policy::Priority, Policy::Lina] {
        for seed in 0..3 {
            let delays = Some(Delays { seed, max_us: 300 });
            let cluster = emulated(4, delays);
            let results = run(cluster.comms(rules(policy)), 60, None);
            assert!(results.iter().all(Result::is_ok), "{policy}: {results:?}");
            assert_one_order(&cluster.launch_logs(), 60, true);
            let (job, comms) = local(4, delays, Duration::from_secs(20), policy);
            let results = run(comms, 8, None);
            assert!(results.iter().all(Result::is_ok), "{policy}: {results:?}");
            assert_one_order(&job.launch_logs(), 8, true);
        }
    }
}

/// Trains with a forward pass without gradients after every step, under a number of its own.
fn train_and_evaluate(comm: &mut Comm, steps: u64) -> Result<Vec<StepStats>, CommError> {
    let mut stats = Vec::new();
    for step in 0..steps {
        stats.extend(train_from(comm, step, 1, None)?);
        comm.begin_evaluation(EVALUATION + step)?;
        for layer in 0..LAYERS {
            work(comm, WorkKind::Attention, layer, 30_000)?;
            moe_layer(comm, Direction::Forward, layer)?;
        }
        let mut loss = [0.5, comm.rank() as f64];
        comm.sum(&mut loss)?;
        let ranks = comm.ranks();
        assert_eq!(loss, [0.5 * ranks as f64, (0..ranks).sum::<usize>() as f64]);
        let evaluation = comm.end_step();
        assert_eq!((evaluation.all_reduce, evaluation.all_to_all_backward), (0, 0));
        assert!(evaluation.all_to_all > 0 && evaluation.step >= evaluation.all_to_all_blocked);
    }
    Ok(stats)
}

/// Evaluation passes leave the steps around them as they are: their plans, their times, their bounds.
#[test]
fn evaluation_passes_lie_between_steps() {
    let steps = 6;
    for policy in Policy::ALL {
        let once = |evaluate: bool| {
            let cluster = emulated(4, None);
            let results = run_each(cluster.comms(rules(policy)), move |comm| {
                if evaluate { train_and_evaluate(comm, steps) } else { train(comm, steps, None) }
            });
            let mut stats: Vec<Vec<StepStats>> = results.into_iter().map(Result::unwrap).collect();
            stats.iter_mut().flatten().for_each(|stats| stats.deciding_wall = 0);
            let mut logs = cluster.launch_logs();
            logs.iter_mut().for_each(|log| log.retain(|(step, _)| *step < EVALUATION));
            (stats, logs, cluster.take_bounds())
        };
        assert_eq!(once(true), once(false), "{policy}");
        let (job, comms) = local(4, None, Duration::from_secs(20), policy);
        let results = run_each(comms, move |comm| train_and_evaluate(comm, steps));
        assert!(results.iter().all(Result::is_ok), "{policy}: {results:?}");
        assert_one_order(&job.launch_logs(), EVALUATION + steps, true);
    }
}

/// Trains while another pair of ranks holds the replicated expert in every step, and checks its sums.
fn train_with_changing_groups(comm: &mut Comm, steps: u64) -> Result<(), CommError> {
    let (me, ranks) = (comm.rank(), comm.ranks());
    let mut expert = SharedBuffer::zeros(REPLICATED);
    for step in 0..steps {
        let mut pair = [step as usize % ranks, (step as usize + 1) % ranks];
        pair.sort_unstable();
        comm.set_groups(&[(0..ranks).collect(), vec![0], pair.to_vec()])?;
        comm.begin_step(step)?;
        comm.begin_micro_batch(true)?;
        moe_layer(comm, Direction::Backward, 0)?;
        expert.range_mut(0..REPLICATED).fill((me + 1) as f32);
        let local = pair.contains(&me).then_some((&mut expert, 0..REPLICATED));
        comm.reduce_gradient(GradientRegion { group: GroupId(2), elements: REPLICATED, local })?;
        comm.finish_gradients()?;
        let expected = if pair.contains(&me) { pair[0] + pair[1] + 2 } else { me + 1 };
        assert!(expert.range(0..REPLICATED).iter().all(|&x| x == expected as f32), "step {step} on rank {me}");
        let stats = comm.stats();
        assert_eq!((stats.ffn_micro_ops, stats.token_exchange_micro_ops), (2, 4), "step {step} on rank {me}");
        assert!(stats.token_exchange > 0 && stats.token_exchange <= stats.all_to_all);
        comm.agree(&mut [0.0])?;
        comm.end_step();
    }
    Ok(())
}

#[test]
fn groups_change_between_steps() {
    for delays in [None, Some(Delays { seed: 3, max_us: 200 })] {
        let cluster = emulated(4, delays);
        let results = run_each(cluster.comms(rules(Policy::Lina)), |comm| train_with_changing_groups(comm, 9));
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        assert_one_order(&cluster.launch_logs(), 9, true);
        let (job, comms) = local(4, delays, Duration::from_secs(20), Policy::Lina);
        let results = run_each(comms, |comm| train_with_changing_groups(comm, 9));
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        assert_one_order(&job.launch_logs(), 9, true);
    }
}

#[test]
fn virtual_time_is_the_same_every_time() {
    let once = || {
        let cluster = emulated(4, Some(Delays { seed: 1, max_us: 50 }));
        let results = run(cluster.comms(rules(Policy::Lina)), 5, None);
        let mut stats: Vec<Vec<StepStats>> = results.into_iter().map(Result::unwrap).collect();
        stats.iter_mut().flatten().for_each(|stats| stats.deciding_wall = 0);
        (stats, cluster.take_bounds())
    };
    let first = once();
    assert!(first.0[0].iter().all(|stats| stats.step > 0));
    assert!(first.1.iter().all(|bound| bound.graph > 0.0 && bound.link > 0.0));
    for _ in 0..4 {
        assert_eq!(once(), first);
    }
}

#[test]
fn a_step_is_never_shorter_than_its_bound() {
    for policy in Policy::ALL {
        let cluster = emulated(4, None);
        let results = run(cluster.comms(rules(policy)), 5, None);
        let steps: Vec<u64> =
            (0..5).map(|i| results.iter().map(|stats| stats.as_ref().unwrap()[i].step).max().unwrap()).collect();
        for (step, bound) in steps.iter().zip(cluster.take_bounds()) {
            assert!(*step as f64 >= bound.graph.max(bound.link), "{policy}: {step} against {bound:?}");
        }
    }
}

#[test]
fn lina_keeps_allreduces_out_of_the_way() {
    let step = |policy| {
        let cluster = emulated(4, None);
        let results = run(cluster.comms(rules(policy)), 8, None);
        let stats = *results[0].as_ref().unwrap().last().unwrap();
        assert!(stats.all_to_all_backward >= stats.all_to_all_backward_alone);
        stats
    };
    let (fair, lina) = (step(Policy::Fair), step(Policy::Lina));
    assert!(lina.step < fair.step, "{lina:?} against {fair:?}");
    assert_eq!(lina.all_to_all_backward, lina.all_to_all_backward_alone);
    assert!(fair.all_to_all_backward > fair.all_to_all_backward_alone);
}

#[test]
fn a_failed_rank_ends_the_job_everywhere() {
    let check = |comms: Vec<Comm>| {
        for (rank, result) in run(comms, 5, Some((2, 1))).into_iter().enumerate() {
            let expected = CommError::RankFailed { rank: 2, reason: "it was told to".to_owned() };
            assert_eq!(result, Err(expected), "on rank {rank}");
        }
    };
    check(emulated(4, None).comms(rules(Policy::Lina)));
    check(local(4, None, Duration::from_secs(20), Policy::Lina).1);
}

#[test]
fn a_silent_rank_is_named() {
    let (_job, mut comms) = local(3, None, Duration::from_millis(300), Policy::Fair);
    let silent = comms.pop().unwrap();
    let results = run(comms, 2, None);
    for result in results {
        assert!(matches!(result, Err(CommError::RankSilent { rank: 2, .. })), "{result:?}");
    }
    drop(silent);
    let cluster = EmulatedCluster::new(EmulatedConfig {
        topology: topology(3),
        device: Device { gflops: 1.0 },
        groups: groups(3),
        timeout: Duration::from_millis(300),
        delays: None,
        log_launches: false,
    });
    let mut comms = cluster.comms(rules(Policy::Fair));
    let silent = comms.pop().unwrap();
    for result in run(comms, 2, None) {
        assert!(matches!(result, Err(CommError::RankSilent { rank: 2, .. })), "{result:?}");
    }
    drop(silent);
}
