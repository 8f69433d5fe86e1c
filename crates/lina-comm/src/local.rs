//! The engine between threads of one process, at full speed.
//!
//! Ranks meet at a hub. When the last member of a collective arrives, it cuts the collective into independent parts
//! (an all-to-all by destination, an allreduce by element range: a direct reduce-scatter and all-gather), and the
//! members' communication threads take parts until none is left. Buffers are handed over by ownership, so nothing
//! here needs `unsafe`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use lina_plan::{GroupId, Launch, PolicyRules, share_range};

use crate::delay::Delays;
use crate::driver::{Operation, Reduction};
use crate::exchange::AnyExchange;
use crate::threaded::{Engine, Finished, Mailbox, ThreadConfig, ThreadedPort};
use crate::transfer::{check_exchanges, check_reductions, receive, sum_control, sum_pieces};
use crate::wire::{CHANNELS, Channel, CollectiveId};
use crate::{Comm, CommError, Exchange};

/// What a process-local job is made of.
#[derive(Clone, Debug)]
pub struct LocalConfig {
    /// Number of ranks.
    pub ranks: usize,
    /// Members of each reduction group, ascending; group 0 is all ranks.
    pub groups: Vec<Vec<usize>>,
    /// How long the others wait for a rank before the job ends.
    pub timeout: Duration,
    /// Random delays of every piece of work, for stress tests.
    pub delays: Option<Delays>,
    /// Whether launches are kept for [`LocalJob::launch_logs`].
    pub log_launches: bool,
}

/// Ranks as threads of this process.
pub struct LocalJob {
    mailboxes: Arc<Vec<Arc<Mailbox>>>,
}

impl LocalJob {
    /// Starts the communication threads and returns the ranks' handles, one for each compute thread, under `rules`.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn start(config: LocalConfig, rules: PolicyRules) -> io::Result<(LocalJob, Vec<Comm>)> {
        let (ranks, groups) = (config.ranks, config.groups.clone());
        let (job, ports) = LocalJob::ports(config)?;
        let comm = |(rank, port)| Comm::new(Box::new(port), rank, ranks, rules, &groups);
        Ok((job, ports.into_iter().enumerate().map(comm).collect()))
    }

    fn ports(config: LocalConfig) -> io::Result<(LocalJob, Vec<ThreadedPort>)> {
        let mailboxes: Arc<Vec<Arc<Mailbox>>> = Arc::new((0..config.ranks).map(|_| Arc::new(Mailbox::new())).collect());
        let groups = Arc::new(config.groups);
        let hub = Arc::new(Hub { state: Mutex::default(), mailboxes: Arc::clone(&mailboxes), timeout: config.timeout });
        let epoch = Instant::now();
        let mut ports = Vec::with_capacity(config.ranks);
        for rank in 0..config.ranks {
            let thread = ThreadConfig {
                rank,
                epoch,
                groups: Arc::clone(&groups),
                log_launches: config.log_launches,
                delays: config.delays,
            };
            let engine = LocalEngine {
                hub: Arc::clone(&hub),
                rank,
                groups: Arc::clone(&groups),
                started: [0; CHANNELS],
                under_way: Default::default(),
            };
            let engine = move || Ok(engine);
            ports.push(ThreadedPort::start(thread, Arc::clone(&mailboxes[rank]), engine)?);
        }
        Ok((LocalJob { mailboxes }, ports))
    }

    /// Takes each rank's launches, with their step, in order.
    pub fn launch_logs(&self) -> Vec<Vec<(u64, Launch)>> {
        self.mailboxes.iter().map(|mailbox| mailbox.take_log()).collect()
    }
}

struct Hub {
    state: Mutex<HubState>,
    mailboxes: Arc<Vec<Arc<Mailbox>>>,
    timeout: Duration,
}

#[derive(Default)]
struct HubState {
    collectives: BTreeMap<CollectiveId, Collective>,
    /// Ranks whose communication has ended.
    gone: BTreeSet<usize>,
    /// When a rank was last seen to have long work on its host.
    last_busy: Option<Instant>,
    failure: Option<CommError>,
}

struct Collective {
    group: GroupId,
    /// Of the first member that arrived; all have the same.
    groups: Arc<Vec<Vec<usize>>>,
    arrived: Vec<(usize, Operation)>,
    /// All members have arrived.
    complete: bool,
    first_arrival: Instant,
    begin: Instant,
    /// Parts that nobody has taken yet.
    parts: Vec<Part>,
    /// Parts taken or to be taken, not yet done.
    parts_left: usize,
    done: Vec<Part>,
    /// Send buffers of an all-to-all, by rank, while its parts are copied.
    sends: Option<Arc<Vec<Exchange>>>,
    /// Indices of the members' all-to-alls, to give back.
    indices: Vec<u32>,
    /// Finished operations, by member, until fetched.
    results: Vec<Option<Finished>>,
    fetched: usize,
}

/// An independent part of a collective.
enum Part {
    /// Fill the receive buffer of `destination`.
    Receive { destination: usize, recv: Vec<f32>, sends: Arc<Vec<Exchange>> },
    /// Sum one element range of every member.
    Sum { range: usize, reductions: Vec<Reduction> },
}

impl Part {
    fn run(&mut self) {
        match self {
            Part::Receive { destination, recv, sends } => receive(sends, *destination, recv),
            Part::Sum { reductions, .. } => sum_pieces(reductions),
        }
    }
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, HubState> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn poke(&self, ranks: &[usize]) {
        for &rank in ranks {
            self.mailboxes[rank].poke();
        }
    }

    fn poke_all(&self) {
        self.mailboxes.iter().for_each(|mailbox| mailbox.poke());
    }

    /// A member arrives; the last one cuts the collective into parts.
    fn arrive(&self, id: CollectiveId, groups: &Arc<Vec<Vec<usize>>>, rank: usize, operation: Operation) {
        let group = match &operation {
            Operation::AllReduce(reduction) => reduction.group,
            Operation::AllToAll { .. } | Operation::Control(_) => GroupId::WORLD,
        };
        let mut state = self.lock();
        let collective = state.collectives.entry(id).or_insert_with(|| Collective {
            group,
            groups: Arc::clone(groups),
            arrived: Vec::with_capacity(groups[group.0 as usize].len()),
            complete: false,
            first_arrival: Instant::now(),
            begin: Instant::now(),
            parts: Vec::new(),
            parts_left: 0,
            done: Vec::new(),
            sends: None,
            indices: Vec::new(),
            results: Vec::new(),
            fetched: 0,
        });
        collective.arrived.push((rank, operation));
        let members = &groups[collective.group.0 as usize];
        if collective.arrived.len() < members.len() {
            return;
        }
        collective.complete = true;
        collective.begin = Instant::now();
        match collective.cut() {
            Ok(()) => {
                drop(state);
                self.poke(members);
            }
            Err(failure) => {
                state.failure.get_or_insert(failure);
                drop(state);
                self.poke_all();
            }
        }
    }

    /// Takes parts of `id` and runs them until none is left. Returns the rank's result when all parts are done.
    fn help(&self, id: CollectiveId, rank: usize) -> Option<(Instant, Finished)> {
        let mut state = self.lock();
        loop {
            let collective = state.collectives.get_mut(&id)?;
            let Some(mut part) = collective.parts.pop() else { break };
            drop(state);
            part.run();
            state = self.lock();
            let collective = state.collectives.get_mut(&id)?;
            collective.done.push(part);
            collective.parts_left -= 1;
            if collective.parts_left == 0 {
                collective.join();
                self.poke(collective.members());
            }
        }
        let collective = state.collectives.get_mut(&id)?;
        let member = collective.members().binary_search(&rank).ok()?;
        let result = collective.results.get_mut(member)?.take()?;
        let begin = collective.begin;
        collective.fetched += 1;
        if collective.fetched == collective.members().len() {
            state.collectives.remove(&id);
        }
        Some((begin, result))
    }

    /// Whether the job has failed, or a rank that others wait for has left or been silent for too long.
    fn check(&self) -> Result<(), CommError> {
        let mut state = self.lock();
        if self.mailboxes.iter().any(|mailbox| mailbox.is_busy()) {
            state.last_busy = Some(Instant::now());
        }
        if state.failure.is_none() {
            state.failure = state.collectives.iter().find_map(|(id, collective)| {
                let here = |rank: usize| collective.arrived.iter().any(|(arrived, _)| *arrived == rank);
                let overdue_from =
                    state.last_busy.map_or(collective.first_arrival, |at| at.max(collective.first_arrival));
                let mut missing = collective.members().iter().copied().filter(|&rank| !here(rank));
                if collective.complete {
                    None
                } else if let Some(rank) = missing.clone().find(|rank| state.gone.contains(rank)) {
                    Some(CommError::left(rank))
                } else if overdue_from.elapsed() > self.timeout {
                    let (seconds, operation) = (self.timeout.as_secs(), id.channel.name().to_owned());
                    missing.next().map(|rank| CommError::RankSilent { rank, seconds, operation })
                } else {
                    None
                }
            });
        }
        state.failure.clone().map_or(Ok(()), Err)
    }
}

impl Collective {
    /// Its ranks, ascending.
    fn members(&self) -> &[usize] {
        &self.groups[self.group.0 as usize]
    }

    /// All members are there: cuts what they brought into parts.
    ///
    /// # Errors
    /// If what they brought does not fit together.
    fn cut(&mut self) -> Result<(), CommError> {
        self.arrived.sort_by_key(|(rank, _)| *rank);
        let n = self.arrived.len();
        let mut exchanges = Vec::new();
        let mut reductions = Vec::new();
        let mut controls = Vec::new();
        for (rank, operation) in self.arrived.drain(..) {
            match operation {
                Operation::AllToAll { index, exchange, .. } => {
                    self.indices.push(index);
                    exchanges.push(exchange.into_host());
                }
                Operation::AllReduce(reduction) => reductions.push((rank, reduction)),
                Operation::Control(values) => controls.push((rank, values)),
            }
        }
        if !exchanges.is_empty() {
            check_exchanges(&exchanges)?;
            let receives: Vec<Vec<f32>> = exchanges.iter_mut().map(|x| std::mem::take(&mut x.recv)).collect();
            let sends = Arc::new(exchanges);
            self.parts = (receives.into_iter().enumerate())
                .map(|(destination, recv)| Part::Receive { destination, recv, sends: Arc::clone(&sends) })
                .collect();
            self.sends = Some(sends);
        } else if !reductions.is_empty() {
            check_reductions(reductions.iter().map(|(rank, reduction)| (*rank, reduction)))?;
            let elements = reductions[0].1.elements;
            self.parts = (0..n)
                .map(|range| {
                    let len = share_range(elements, n, range).len();
                    let reductions = reductions.iter_mut().map(|(_, reduction)| reduction.split_front(len)).collect();
                    Part::Sum { range, reductions }
                })
                .collect();
        } else {
            let sum = sum_control(controls.into_iter())?;
            self.results = (0..n).map(|_| Some(Finished::Control(sum.clone()))).collect();
        }
        self.parts_left = self.parts.len();
        Ok(())
    }

    /// All parts are done: makes each member's result of them.
    fn join(&mut self) {
        let mut receives: Vec<(usize, Vec<f32>)> = Vec::new();
        let mut ranges: Vec<(usize, Vec<Reduction>)> = Vec::new();
        for part in self.done.drain(..) {
            match part {
                Part::Receive { destination, recv, .. } => receives.push((destination, recv)),
                Part::Sum { range, reductions } => ranges.push((range, reductions)),
            }
        }
        if let Some(sends) = self.sends.take() {
            receives.sort_by_key(|(destination, _)| *destination);
            let exchanges = Arc::into_inner(sends).expect("every part that read the sends is done");
            self.results = (exchanges.into_iter().zip(receives).zip(&self.indices))
                .map(|((mut exchange, (rank, recv)), &index)| {
                    exchange.recv = recv;
                    Some(Finished::all_to_all(index, AnyExchange::Host(exchange), rank))
                })
                .collect();
        } else {
            ranges.sort_by_key(|(range, _)| *range);
            let whole = ranges.into_iter().map(|(_, parts)| parts).reduce(|mut whole, parts| {
                whole.iter_mut().zip(parts).for_each(|(whole, part)| whole.append(part));
                whole
            });
            let whole = whole.expect("an allreduce has a part for each member");
            self.results = whole.into_iter().map(|reduction| Some(Finished::AllReduce(reduction))).collect();
        }
    }
}

struct LocalEngine {
    hub: Arc<Hub>,
    rank: usize,
    groups: Arc<Vec<Vec<usize>>>,
    /// Operations started, by channel.
    started: [u64; CHANNELS],
    /// Operations not yet finished, by channel, oldest first.
    under_way: [VecDeque<CollectiveId>; CHANNELS],
}

impl Engine for LocalEngine {
    fn start(&mut self, operation: Operation) {
        let channel = operation.channel();
        let id = CollectiveId { channel, sequence: self.started[channel as usize] };
        self.started[channel as usize] += 1;
        self.under_way[channel as usize].push_back(id);
        self.hub.arrive(id, &self.groups, self.rank, operation);
    }

    fn set_groups(&mut self, groups: &Arc<Vec<Vec<usize>>>) {
        self.groups = Arc::clone(groups);
    }

    fn skip(&mut self, channel: Channel) {
        self.started[channel as usize] += 1;
    }

    fn poll(&mut self, finished: &mut Vec<(Instant, Finished)>) -> Result<(), CommError> {
        for channel in &mut self.under_way {
            while let Some(&id) = channel.front() {
                let Some(result) = self.hub.help(id, self.rank) else { break };
                finished.push(result);
                channel.pop_front();
            }
        }
        self.hub.check()
    }

    fn fail(&mut self, failure: CommError) {
        self.hub.lock().failure.get_or_insert(failure);
        self.hub.poke_all();
    }
}

impl Drop for LocalEngine {
    /// Who waits for a rank that has left need not wait for the timeout.
    fn drop(&mut self) {
        self.hub.lock().gone.insert(self.rank);
        self.hub.poke_all();
    }
}

#[cfg(test)]
mod tests {
    use lina_plan::{AllToAllKind, Direction, Leg, Policy, PolicySettings};

    use super::*;
    use crate::threaded::Ready;
    use crate::{GradientRegion, SharedBuffer};

    const RANKS: usize = 3;
    const GRADIENT: usize = 500;

    /// What is ready at a moment, and not before.
    struct ReadyAt(Instant);

    impl Ready for ReadyAt {
        fn is_ready(&mut self) -> Result<bool, String> {
            Ok(Instant::now() >= self.0)
        }
    }

    struct Broken;

    impl Ready for Broken {
        fn is_ready(&mut self) -> Result<bool, String> {
            Err("its device is lost".to_owned())
        }
    }

    fn ports() -> (LocalJob, Vec<ThreadedPort>, Vec<Vec<usize>>) {
        let groups = vec![(0..RANKS).collect(), vec![0, 2]];
        let timeout = Duration::from_secs(20);
        let config = LocalConfig { ranks: RANKS, groups: groups.clone(), timeout, delays: None, log_launches: true };
        let (job, ports) = LocalJob::ports(config).unwrap();
        (job, ports, groups)
    }

    fn rules(policy: Policy) -> PolicyRules {
        let settings = PolicySettings { bucket_bytes: 2000, partition_bytes: 700, ..PolicySettings::default() };
        PolicyRules::new(policy, &settings)
    }

    fn program(comm: &mut Comm, ready: &Mutex<Instant>) -> Result<(), CommError> {
        let me = comm.rank();
        let mut gradients = [(); 2].map(|()| SharedBuffer::zeros(3 * GRADIENT));
        for step in 0..12 {
            comm.begin_step(step)?;
            comm.begin_micro_batch(true)?;
            for layer in (0..3).rev() {
                for leg in [Leg::Dispatch, Leg::Combine] {
                    let kind = AllToAllKind { direction: Direction::Backward, leg, layer, chunk: 0, chunks: 1 };
                    let elements = vec![40; RANKS];
                    let (send, recv) = (vec![me as f32; 40 * RANKS], vec![-1.0; 40 * RANKS]);
                    let exchange =
                        Exchange { kind, send, send_elements: elements.clone(), recv, recv_elements: elements };
                    let ticket = comm.all_to_all(exchange)?;
                    let exchange = comm.wait(ticket)?;
                    assert!(Instant::now() >= *ready.lock().unwrap(), "nothing is sent before it is ready");
                    assert!(exchange.recv.chunks(40).enumerate().all(|(from, piece)| piece == [from as f32; 40]));
                }
                for (group, buffer) in gradients.iter_mut().enumerate() {
                    let range = layer as usize * GRADIENT..(layer as usize + 1) * GRADIENT;
                    let local = (group == 0 || me != 1).then(|| {
                        buffer.range_mut(range.clone()).fill((me + 1) as f32);
                        (buffer, range)
                    });
                    let group = GroupId(group as u32);
                    comm.reduce_gradient(GradientRegion { group, elements: GRADIENT, local })?;
                }
            }
            comm.finish_gradients()?;
            assert!(Instant::now() >= *ready.lock().unwrap(), "a step ends when everything is ready");
            for (buffer, sum) in gradients.iter().zip([6.0, if me == 1 { 0.0 } else { 4.0 }]) {
                assert!(buffer.range(0..3 * GRADIENT).iter().all(|&x| x == sum));
            }
            comm.agree(&mut [1.0])?;
            comm.end_step();
        }
        Ok(())
    }

    /// Submissions become ready in their order, at random moments: all ranks still launch the same in the same order.
    #[test]
    fn launches_are_in_one_order_whenever_data_is_ready() {
        for (seed, policy) in Policy::ALL.into_iter().enumerate() {
            let delays = Delays { seed: seed as u64, max_us: 400 };
            let (job, ports, groups) = ports();
            let threads: Vec<_> = (ports.into_iter().enumerate())
                .map(|(rank, mut port)| {
                    let ready = Arc::new(Mutex::new(Instant::now()));
                    let (last, mut count) = (Arc::clone(&ready), 0);
                    port.marks = Some(Box::new(move || {
                        let mut last = last.lock().unwrap();
                        count += 1;
                        *last = Instant::now().max(*last) + Duration::from_nanos(delays.of(rank, count));
                        Box::new(ReadyAt(*last))
                    }));
                    let mut comm = Comm::new(Box::new(port), rank, RANKS, rules(policy), &groups);
                    std::thread::spawn(move || program(&mut comm, &ready))
                })
                .collect();
            threads.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
            let logs = job.launch_logs();
            assert!(logs.iter().all(|log| *log == logs[0] && log.len() > 12 * 8), "{policy}: {logs:?}");
        }
    }

    #[test]
    fn a_device_that_is_lost_is_a_failure_of_its_rank() {
        let (_job, ports, groups) = ports();
        let expected = CommError::RankFailed { rank: 1, reason: "its device is lost".to_owned() };
        let threads: Vec<_> = (ports.into_iter().enumerate())
            .map(|(rank, mut port)| {
                if rank == 1 {
                    port.marks = Some(Box::new(|| Box::new(Broken)));
                }
                let mut comm = Comm::new(Box::new(port), rank, RANKS, rules(Policy::Lina), &groups);
                std::thread::spawn(move || program(&mut comm, &Mutex::new(Instant::now())))
            })
            .collect();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), Err(expected.clone()));
        }
    }
}
