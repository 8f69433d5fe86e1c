//! Whatever goes wrong on one rank ends the job on all of them, soon and with the culprit's name, on every body.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lina_comm::emulated::{Device, EmulatedCluster, EmulatedConfig};
use lina_comm::local::{LocalConfig, LocalJob};
use lina_comm::*;
use lina_net::{Link, Topology};
use lina_plan::{Policy, PolicyRules, PolicySettings};

const RANKS: usize = 4;
/// How soon the others hear of a failure that needs no timeout.
const SOON: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Body {
    Emulated,
    Local,
}

impl Body {
    const ALL: [Body; 2] = [Body::Emulated, Body::Local];

    fn comms(self, timeout: Duration) -> Vec<Comm> {
        let groups = vec![(0..RANKS).collect(), vec![1, 2]];
        let rules = PolicyRules::new(Policy::Lina, &PolicySettings::default());
        match self {
            Body::Emulated => {
                let link = Link {
                    gbps: 1.0,
                    latency_us: 5.0,
                    launch_us: 2.0,
                    message_us: 0.0,
                    nodes: RANKS,
                    inner_gbps: 10.0,
                };
                let topology = Topology::new(link, RANKS).unwrap();
                let device = Device { gflops: 1.0 };
                let config = EmulatedConfig { topology, device, groups, timeout, delays: None, log_launches: false };
                EmulatedCluster::new(config).comms(rules)
            }
            Body::Local => {
                let config = LocalConfig { ranks: RANKS, groups, timeout, delays: None, log_launches: false };
                LocalJob::start(config, rules).unwrap().1
            }
        }
    }
}

type Outcome = Result<(), CommError>;

/// Runs `main` on every rank of `body`; a rank that panics has no outcome.
fn run(body: Body, timeout: Duration, main: fn(&mut Comm) -> Outcome) -> Vec<Option<Outcome>> {
    let threads: Vec<JoinHandle<Outcome>> =
        (body.comms(timeout).into_iter()).map(|mut comm| std::thread::spawn(move || main(&mut comm))).collect();
    threads.into_iter().map(|thread| thread.join().ok()).collect()
}

/// On both bodies, every rank but `culprit` hears soon that it failed, for a reason that contains `reason`.
fn check(culprit: usize, reason: &str, main: fn(&mut Comm) -> Outcome) {
    for body in Body::ALL {
        let start = Instant::now();
        for (rank, outcome) in run(body, Duration::from_secs(20), main).into_iter().enumerate() {
            match outcome {
                Some(Err(CommError::RankFailed { rank: failed, reason: found })) => {
                    assert_eq!(failed, culprit, "{body:?}, rank {rank}: {found}");
                    assert!(found.contains(reason), "{body:?}, rank {rank}: {found}");
                }
                other => assert_eq!(rank, culprit, "{body:?}: {other:?}"),
            }
        }
        assert!(start.elapsed() < SOON, "{body:?} took {:?}", start.elapsed());
    }
}

fn kind(layer: u32) -> AllToAllKind {
    AllToAllKind { direction: Direction::Forward, leg: Leg::Dispatch, layer, chunk: 0, chunks: 1 }
}

/// An all-to-all of as many elements for each rank.
fn exchange(kind: AllToAllKind, elements: usize) -> Exchange {
    let n = RANKS * elements;
    Exchange {
        kind,
        send: vec![1.0; n],
        send_elements: vec![elements; RANKS],
        recv: vec![0.0; n],
        recv_elements: vec![elements; RANKS],
    }
}

/// Exchanges until told of a failure.
fn exchange_on(comm: &mut Comm) -> Outcome {
    loop {
        let ticket = comm.all_to_all(exchange(kind(0), 10))?;
        comm.wait(ticket)?;
    }
}

fn reduce(comm: &mut Comm, buffer: &mut SharedBuffer, group: GroupId, range: std::ops::Range<usize>) -> Outcome {
    let member = group == GroupId::WORLD || [1, 2].contains(&comm.rank());
    let elements = range.len();
    comm.reduce_gradient(GradientRegion { group, elements, local: member.then_some((buffer, range)) })
}

#[test]
fn a_rank_that_panics_ends_the_job() {
    check(2, "panicked", |comm| {
        comm.begin_step(0)?;
        let ticket = comm.all_to_all(exchange(kind(0), 10))?;
        comm.wait(ticket)?;
        let mut buffer = SharedBuffer::zeros(1000);
        reduce(comm, &mut buffer, GroupId::WORLD, 0..1000)?;
        assert_ne!(comm.rank(), 2, "rank 2 is to panic, with a gradient under way");
        exchange_on(comm)
    });
}

#[test]
fn a_rank_that_panics_while_others_close_the_step_ends_the_job() {
    check(0, "panicked", |comm| {
        comm.begin_step(0)?;
        assert_ne!(comm.rank(), 0, "rank 0 is to panic");
        comm.finish_gradients()?;
        comm.agree(&mut [1.0])
    });
}

#[test]
fn a_rank_that_leaves_early_ends_the_job() {
    check(3, "left", |comm| {
        comm.begin_step(0)?;
        let ticket = comm.all_to_all(exchange(kind(0), 10))?;
        comm.wait(ticket)?;
        if comm.rank() == 3 { Ok(()) } else { exchange_on(comm) }
    });
}

#[test]
fn pieces_of_another_size_are_a_failure() {
    check(1, "sends 9 elements to rank 0, which expects 10", |comm| {
        comm.begin_step(0)?;
        let mut exchange = exchange(kind(0), 10);
        if comm.rank() == 1 {
            exchange.send_elements[0] = 9;
        }
        let ticket = comm.all_to_all(exchange)?;
        comm.wait(ticket)?;
        exchange_on(comm)
    });
}

#[test]
fn another_all_to_all_is_a_failure() {
    check(2, "it takes part in dispatch layer 7 chunk 1/1 while rank 0 takes part in dispatch layer 0", |comm| {
        comm.begin_step(0)?;
        let layer = if comm.rank() == 2 { 7 } else { 0 };
        let ticket = comm.all_to_all(exchange(kind(layer), 10))?;
        comm.wait(ticket)?;
        exchange_on(comm)
    });
}

#[test]
fn a_gradient_of_another_size_is_a_failure() {
    check(3, "it reduces 99 elements in group 0 while rank 0 reduces 100", |comm| {
        comm.begin_step(0)?;
        let mut buffer = SharedBuffer::zeros(100);
        let elements = if comm.rank() == 3 { 99 } else { 100 };
        reduce(comm, &mut buffer, GroupId::WORLD, 0..elements)?;
        comm.finish_gradients()?;
        exchange_on(comm)
    });
}

#[test]
fn another_number_of_values_is_a_failure() {
    check(1, "it sums 2 values while rank 0 sums 3", |comm| {
        let mut values = [0.0; 3];
        let n = if comm.rank() == 1 { 2 } else { 3 };
        comm.sum(&mut values[..n])?;
        exchange_on(comm)
    });
}

/// Ranks that wait for different things wait for ever: virtual time stops, and a wall clock's timeout passes.
#[test]
fn programs_that_differ_end_the_job() {
    let main = |comm: &mut Comm| {
        comm.begin_step(0)?;
        if comm.rank() == 2 {
            return comm.sum(&mut [1.0]);
        }
        let ticket = comm.all_to_all(exchange(kind(0), 10))?;
        comm.wait(ticket).map(drop)
    };
    let start = Instant::now();
    for outcome in run(Body::Emulated, Duration::from_secs(20), main) {
        let failure = outcome.unwrap().unwrap_err().to_string();
        let expected = "rank 0 failed: it waits for all-to-all 0 of the step in vain, as rank 2 does for the step's \
                        closing sum: the ranks' programs differ";
        assert_eq!(failure, expected);
    }
    assert!(start.elapsed() < SOON);
    for outcome in run(Body::Local, Duration::from_millis(300), main) {
        let failure = outcome.unwrap().unwrap_err();
        assert!(matches!(failure, CommError::RankSilent { rank: 2, .. }), "{failure}");
    }
}

/// What a micro-batch does not reduce is its owner's at once, however far the communication thread is behind.
#[test]
fn gradients_accumulate_without_waiting() {
    for body in Body::ALL {
        let outcomes = run(body, Duration::from_secs(20), |comm| {
            let mut buffer = SharedBuffer::zeros(300);
            for step in 0..20 {
                comm.begin_step(step)?;
                buffer.range_mut(0..300).fill(0.0);
                for micro_batch in 0..4 {
                    comm.begin_micro_batch(micro_batch == 3)?;
                    for range in [0..200, 200..300] {
                        comm.work(Work { kind: WorkKind::DenseFfn, layer: None, flops: 100 })?;
                        buffer.range_mut(range.clone()).iter_mut().for_each(|x| *x += 1.0);
                        reduce(comm, &mut buffer, GroupId::WORLD, range)?;
                    }
                }
                comm.finish_gradients()?;
                assert!(buffer.range(0..300).iter().all(|&x| x == 4.0 * RANKS as f32));
                comm.agree(&mut [])?;
                comm.end_step();
            }
            Ok(())
        });
        assert!(outcomes.iter().all(|outcome| *outcome == Some(Ok(()))), "{body:?}: {outcomes:?}");
    }
}

#[test]
fn a_rank_that_says_that_it_is_busy_is_waited_for() {
    const TIMEOUT: Duration = Duration::from_millis(400);
    fn late(comm: &mut Comm, work: fn(&mut Comm)) -> Outcome {
        comm.begin_step(0)?;
        if comm.rank() == 1 {
            work(comm);
        }
        comm.sum(&mut [1.0])
    }
    fn silent(comm: &mut Comm) -> Outcome {
        late(comm, |_| std::thread::sleep(4 * TIMEOUT))
    }
    // Those who are busy waiting are not busy.
    fn waited_for(comm: &mut Comm) -> Outcome {
        if comm.rank() == 1 { silent(comm) } else { comm.busy(silent) }
    }
    for body in Body::ALL {
        let busy = |comm: &mut Comm| late(comm, |comm| comm.busy(|_| std::thread::sleep(4 * TIMEOUT)));
        let outcomes = run(body, TIMEOUT, busy);
        assert!(outcomes.iter().all(|outcome| *outcome == Some(Ok(()))), "{body:?}: {outcomes:?}");
        let named = |outcome: &Option<Outcome>| matches!(outcome, Some(Err(CommError::RankSilent { rank: 1, .. })));
        for outcomes in [run(body, TIMEOUT, silent), run(body, TIMEOUT, waited_for)] {
            assert!(outcomes.iter().all(named), "{body:?}: {outcomes:?}");
        }
    }
}

#[test]
fn sums_are_the_same_on_every_rank() {
    for body in Body::ALL {
        let outcomes = run(body, Duration::from_secs(20), |comm| {
            for round in 0..50 {
                // Rounding makes another order of the ranks another sum.
                let mut values = [0.1 * comm.rank() as f64 + 0.7, 1e16 * comm.rank() as f64, f64::from(round)];
                comm.sum(&mut values)?;
                let of = |value: &dyn Fn(usize) -> f64| (1..RANKS).fold(value(0), |sum, rank| sum + value(rank));
                let first = of(&|rank| 0.1 * rank as f64 + 0.7);
                assert_eq!(values, [first, 6e16, f64::from(round) * RANKS as f64]);
                comm.sum(&mut [])?;
            }
            Ok(())
        });
        assert!(outcomes.iter().all(|outcome| *outcome == Some(Ok(()))), "{body:?}: {outcomes:?}");
    }
    let mut values = [3.0, 4.0];
    Comm::solo().sum(&mut values).unwrap();
    assert_eq!(values, [3.0, 4.0]);
}

#[test]
fn tickets_are_redeemed_in_any_order() {
    let main = |comm: &mut Comm| {
        for step in 0..3 {
            comm.begin_step(step)?;
            let ranks = comm.ranks();
            let mut tickets = Vec::new();
            for layer in 0..4 {
                let send: Vec<f32> = vec![layer as f32; ranks];
                let (send_elements, recv_elements) = (vec![1; ranks], vec![1; ranks]);
                let recv = vec![-1.0; ranks];
                let exchange = Exchange { kind: kind(layer), send, send_elements, recv, recv_elements };
                tickets.push((layer, comm.all_to_all(exchange)?));
            }
            for (layer, ticket) in tickets.into_iter().rev() {
                let exchange = comm.wait(ticket)?;
                assert_eq!((exchange.kind.layer, exchange.recv), (layer, vec![layer as f32; ranks]));
            }
            comm.finish_gradients()?;
            comm.agree(&mut [])?;
        }
        Ok(())
    };
    for body in Body::ALL {
        let outcomes = run(body, Duration::from_secs(20), main);
        assert!(outcomes.iter().all(|outcome| *outcome == Some(Ok(()))), "{body:?}: {outcomes:?}");
    }
    assert_eq!(main(&mut Comm::solo()), Ok(()));
}

#[test]
#[should_panic(expected = "all-to-alls that nobody waited for")]
fn a_forgotten_ticket_is_no_ticket_of_the_next_step() {
    let mut comm = Comm::solo();
    comm.begin_step(0).unwrap();
    let one =
        Exchange { send: vec![1.0], send_elements: vec![1], recv: vec![0.0], recv_elements: vec![1], kind: kind(0) };
    drop(comm.all_to_all(one));
    let _ = comm.begin_step(1);
}

#[test]
#[should_panic(expected = "rank 0 reduces memory of its own in group 3")]
fn an_unknown_group_is_a_bug_of_the_caller() {
    let mut buffer = SharedBuffer::zeros(1);
    let gradient = GradientRegion { group: GroupId(3), elements: 1, local: Some((&mut buffer, 0..1)) };
    let _ = Comm::solo().reduce_gradient(gradient);
}
