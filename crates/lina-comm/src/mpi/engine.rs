//! The engine: queues of operations, one request table, and what to do when a request is done.

use std::collections::VecDeque;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lina_plan::{GroupId, Relays, Route};
use mpi::environment::Universe;

use super::MpiConfig;
use super::exchange::ExchangeOp;
use super::handles::{Address, Communicator, Done, Requests};
use super::reduction::{Pool, ReductionOp};
use super::start::Started;
use crate::CommError;
use crate::driver::{Operation, Reduction};
use crate::exchange::AnyExchange;
use crate::processes::heartbeat::Heartbeat;
use crate::processes::meeting::Met;
use crate::processes::{Fault, Patience};
use crate::threaded::{Engine, Finished, LOOK_AROUND};
use crate::transfer::sum_control;
use crate::wire::Channel;

/// Allreduces under way at a time; more wait their turn, so that pooled buffers stay few.
const REDUCTIONS: usize = 3;

/// Looks at MPI with only a yield in between, after something has happened.
const YIELDS: u32 = 4;
/// No sleep is longer while operations are under way: at 1 Gbit/s, 25 KB.
const LONGEST_SLEEP: Duration = Duration::from_micros(200);

/// What a request is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Label {
    pub(super) channel: Channel,
    /// Which operation of the channel's queue.
    pub(super) sequence: u64,
    /// The peer's rank in the operation's communicator.
    pub(super) peer: usize,
    pub(super) part: Part,
}

/// An operation exchanges messages of up to two kinds: an all-to-all its announcements and its data, an allreduce its
/// shares and its sums, a closing sum its values. A hierarchical all-to-all has a third: data to be passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    First,
    FirstSent,
    Second,
    SecondSent,
    Transit,
}

impl Part {
    fn is_received(self) -> bool {
        matches!(self, Part::First | Part::Second | Part::Transit)
    }
}

/// Operations of a channel, oldest first.
struct Queue<T> {
    /// Sequence number of the oldest.
    first: u64,
    operations: VecDeque<(Instant, T)>,
}

impl<T> Queue<T> {
    fn new() -> Self {
        Queue { first: 0, operations: VecDeque::new() }
    }

    /// The number of the next operation to be pushed.
    fn next(&self) -> u64 {
        self.first + self.operations.len() as u64
    }

    fn push(&mut self, operation: T) {
        self.operations.push_back((Instant::now(), operation));
    }

    fn get(&mut self, sequence: u64) -> &mut T {
        &mut self.operations[(sequence - self.first) as usize].1
    }

    fn pop_if(&mut self, done: impl Fn(&T) -> bool) -> Option<(Instant, T)> {
        if !self.operations.front().is_some_and(|(_, operation)| done(operation)) {
            return None;
        }
        self.first += 1;
        self.operations.pop_front()
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.operations.iter_mut().map(|(_, operation)| operation)
    }

    /// The oldest operation's number, and since when it is under way.
    fn oldest(&self) -> Option<(u64, Instant)> {
        self.operations.front().map(|(since, _)| (self.first, *since))
    }
}

/// A small sum: everybody sends everybody its values.
struct ControlOp {
    values: Vec<f64>,
    /// By rank, with room for one value more than expected, which must stay empty.
    received: Vec<Vec<f64>>,
    under_way: usize,
}

/// A group's communicator and how many of its allreduces this rank has started; `None` on ranks outside.
struct Group {
    communicator: Communicator,
    member: usize,
    started: u64,
}

pub(super) struct MpiEngine {
    rank: usize,
    ranks: usize,
    members: Arc<Vec<Vec<usize>>>,
    /// Where all-to-alls may go through nodes.
    relays: Option<Relays>,
    timeout: Duration,
    epoch: Instant,
    clock_offset: i64,
    all_to_all: Communicator,
    control: Communicator,
    /// Made when the engine starts, by all ranks together.
    groups: Vec<Option<Group>>,
    requests: Requests<Label>,
    exchanges: Queue<ExchangeOp>,
    reductions: Queue<ReductionOp>,
    controls: Queue<ControlOp>,
    /// Allreduces that wait for their turn.
    waiting: VecDeque<Reduction>,
    pool: Pool,
    done: Vec<Done<Label>>,
    patience: Patience,
    looked: Instant,
    failure: Option<CommError>,
    universe: ManuallyDrop<Universe>,
    /// Beats until MPI is finalised.
    heartbeat: Heartbeat,
}

impl MpiEngine {
    /// Makes the communicators; all ranks call it together.
    pub(super) fn new(started: Started, config: &MpiConfig, members: Arc<Vec<Vec<usize>>>, epoch: Instant) -> Self {
        let Started { universe, world, rank, met: Met { clock_offset, heartbeat } } = started;
        let mut engine = MpiEngine {
            rank,
            ranks: config.ranks,
            relays: Relays::new(config.ranks, config.nodes),
            timeout: config.timeout,
            epoch,
            clock_offset,
            all_to_all: world,
            control: world,
            groups: Vec::new(),
            requests: Requests::new(config.max_message_bytes),
            exchanges: Queue::new(),
            reductions: Queue::new(),
            controls: Queue::new(),
            waiting: VecDeque::new(),
            pool: Pool::default(),
            done: Vec::new(),
            patience: Patience::new(YIELDS, LONGEST_SLEEP),
            looked: Instant::now(),
            failure: None,
            universe: ManuallyDrop::new(universe),
            heartbeat,
            members,
        };
        if let Err(fault) = engine.make_communicators(world) {
            engine.fail_here(fault);
        }
        engine
    }

    fn make_communicators(&mut self, world: Communicator) -> Result<(), Fault> {
        self.all_to_all = world.duplicate()?;
        self.control = world.duplicate()?;
        self.make_groups(world)
    }

    /// Replaces the groups' communicators by those of the present groups. All ranks call it together; blocks.
    fn make_groups(&mut self, world: Communicator) -> Result<(), Fault> {
        for group in self.groups.drain(..).flatten() {
            group.communicator.free()?;
        }
        for members in self.members.iter() {
            let member = members.iter().position(|&rank| rank == self.rank);
            let communicator = world.of_members(member)?;
            let group = member.zip(communicator);
            self.groups.push(group.map(|(member, communicator)| Group { communicator, member, started: 0 }));
        }
        Ok(())
    }

    /// Nanoseconds on rank 0's clock.
    fn now_on_first(&self) -> i64 {
        self.epoch.elapsed().as_nanos() as i64 + self.clock_offset
    }

    /// A moment in the past on rank 0's clock as one of this rank's. Clocks are set with an error, on a busy machine with
    /// a large one, so that a message may seem to come from the future.
    fn instant(&self, on_first: i64) -> Instant {
        let instant = self.epoch + Duration::from_nanos((on_first - self.clock_offset).max(0) as u64);
        instant.min(Instant::now())
    }

    fn fail_here(&mut self, Fault(sentence): Fault) {
        self.end(CommError::RankFailed { rank: self.rank, reason: sentence });
    }

    /// The job is over: nothing is asked of MPI any more.
    fn end(&mut self, failure: CommError) {
        if self.failure.is_none() {
            self.heartbeat.fail(failure.clone());
            // Somebody else's failure may have come first; all ranks name the same one.
            self.failure = self.heartbeat.failure().or(Some(failure));
        }
    }

    fn try_start(&mut self, operation: Operation) -> Result<(), Fault> {
        match operation {
            Operation::AllToAll { index, exchange, route } => {
                let place = (self.all_to_all, self.exchanges.next(), self.rank);
                let launched = self.now_on_first();
                let relays = self.relays.filter(|_| route == Route::ThroughNode);
                let exchange = exchange.into_host();
                let op = ExchangeOp::start((index, exchange), relays, place, launched, &mut self.requests)?;
                self.exchanges.push(op);
                self.send_exchanges()
            }
            Operation::AllReduce(reduction) => {
                self.waiting.push_back(reduction);
                self.send_reductions()
            }
            Operation::Control(values) => self.start_control(values),
        }
    }

    /// Sends the data of every all-to-all whose turn it is.
    fn send_exchanges(&mut self) -> Result<(), Fault> {
        for op in self.exchanges.iter_mut() {
            op.pass_on(&mut self.requests)?;
        }
        for op in self.exchanges.iter_mut() {
            op.send(&mut self.requests)?;
            if !op.has_sent() {
                break;
            }
        }
        Ok(())
    }

    /// Starts allreduces that may, and sends the shares of every one whose turn it is.
    fn send_reductions(&mut self) -> Result<(), Fault> {
        while self.reductions.operations.len() < REDUCTIONS
            && let Some(reduction) = self.waiting.pop_front()
        {
            let number = reduction.group.0 as usize;
            let group = self.groups[number].as_mut().expect("an allreduce is started on members only");
            let place = (group.communicator, self.reductions.next(), group.started);
            group.started += 1;
            let member = (group.member, self.members[number].len());
            let op = ReductionOp::start(reduction, place, member, &mut self.pool, &mut self.requests)?;
            self.reductions.push(op);
        }
        for op in self.reductions.iter_mut() {
            op.send(&mut self.pool, &mut self.requests)?;
            if !op.has_sent() {
                break;
            }
        }
        Ok(())
    }

    fn start_control(&mut self, values: Vec<f64>) -> Result<(), Fault> {
        let sequence = self.controls.next();
        let received = (0..self.ranks).map(|_| vec![0.0; values.len() + 1]).collect();
        let mut op = ControlOp { values, received, under_way: 0 };
        for peer in (0..self.ranks).filter(|&peer| peer != self.rank) {
            let route = Address { communicator: self.control, peer, tag: (sequence % (1 << 14)) as i32 };
            let label = |part| Label { channel: Channel::Control, sequence, peer, part };
            // SAFETY: neither vector is resized before the operation is done; if it never is, it is leaked with MPI.
            unsafe {
                op.under_way += self.requests.receive(&mut op.received[peer], route, label(Part::First))?;
                op.under_way += self.requests.send(&op.values, route, label(Part::FirstSent))?;
            }
        }
        self.controls.push(op);
        Ok(())
    }

    fn advance(&mut self, finished: &mut Vec<(Instant, Finished)>) -> Result<(), CommError> {
        let rank = self.rank;
        let here = move |Fault(reason): Fault| CommError::RankFailed { rank, reason };
        let mut done = std::mem::take(&mut self.done);
        self.requests.test(&mut done).map_err(here)?;
        if !done.is_empty() {
            self.patience.reset();
        }
        for Done { label: Label { channel, sequence, peer, part }, bytes } in done.drain(..) {
            match channel {
                Channel::AllToAll => self.exchanges.get(sequence).done(peer, part)?,
                Channel::AllReduce => {
                    let op = self.reductions.get(sequence);
                    op.done(peer, part, &mut self.pool, &mut self.requests).map_err(here)?;
                }
                Channel::Control => {
                    let op = self.controls.get(sequence);
                    op.under_way -= 1;
                    if part == Part::First {
                        op.received[peer].truncate(bytes / size_of::<f64>());
                    }
                }
            }
        }
        self.done = done;
        self.send_exchanges().map_err(here)?;
        while let Some((_, op)) = self.exchanges.pop_if(ExchangeOp::is_done) {
            let begin = self.instant(op.launched);
            let exchange = AnyExchange::Host(op.exchange);
            finished.push((begin, Finished::all_to_all(op.index, exchange, self.rank)));
        }
        loop {
            self.send_reductions().map_err(here)?;
            let Some((begin, op)) = self.reductions.pop_if(ReductionOp::is_done) else { break };
            finished.push((begin, Finished::AllReduce(op.finish(&mut self.pool))));
        }
        while let Some((begin, mut op)) = self.controls.pop_if(|op| op.under_way == 0) {
            op.received[rank] = op.values;
            let sum = sum_control(op.received.into_iter().enumerate())?;
            finished.push((begin, Finished::Control(sum)));
        }
        if self.looked.elapsed() >= LOOK_AROUND {
            self.looked = Instant::now();
            self.look_after_peers()?;
        }
        Ok(())
    }

    /// Whether a rank that this one waits for has left, or has been silent for too long.
    fn look_after_peers(&self) -> Result<(), CommError> {
        let oldest = [
            (Channel::AllToAll, self.exchanges.oldest()),
            (Channel::AllReduce, self.reductions.oldest()),
            (Channel::Control, self.controls.oldest()),
        ];
        for (channel, oldest) in oldest {
            let Some((sequence, since)) = oldest else { continue };
            let of_oldest = |label: &&Label| label.channel as usize == channel as usize && label.sequence == sequence;
            let open: Vec<Label> = self.requests.labels().iter().filter(of_oldest).copied().collect();
            let received = open.iter().filter(|label| label.part.is_received());
            // Who has not even begun is to blame before who waits for others itself.
            let begun_last = received.clone().filter(|label| label.part == Part::First).chain(received).chain(&open);
            let group = match channel {
                Channel::AllReduce => self.reductions.operations[0].1.reduction.group,
                Channel::AllToAll | Channel::Control => GroupId::WORLD,
            };
            let mut peers = begun_last.map(|label| self.members[group.0 as usize][label.peer]);
            if let Some(rank) = peers.clone().find(|&rank| self.heartbeat.has_left(rank)) {
                return Err(CommError::left(rank));
            }
            if self.heartbeat.overdue_from(since).elapsed() > self.timeout
                && let Some(rank) = peers.next()
            {
                let (seconds, operation) = (self.timeout.as_secs(), channel.name().to_owned());
                return Err(CommError::RankSilent { rank, seconds, operation });
            }
        }
        Ok(())
    }
}

impl Engine for MpiEngine {
    fn start(&mut self, operation: Operation) {
        self.patience.reset();
        // What comes after a failure goes straight back to its owner, who is about to hear of it.
        if self.failure.is_none()
            && let Err(fault) = self.try_start(operation)
        {
            self.fail_here(fault);
        }
    }

    fn set_groups(&mut self, groups: &Arc<Vec<Vec<usize>>>) {
        self.members = Arc::clone(groups);
        if self.failure.is_none()
            && let Err(fault) = self.make_groups(self.control)
        {
            self.fail_here(fault);
        }
    }

    fn skip(&mut self, _channel: Channel) {}

    fn poll(&mut self, finished: &mut Vec<(Instant, Finished)>) -> Result<(), CommError> {
        if self.failure.is_none() {
            self.failure = self.heartbeat.failure();
        }
        if self.failure.is_none()
            && let Err(failure) = self.advance(finished)
        {
            self.end(failure);
        }
        self.failure.clone().map_or(Ok(()), Err)
    }

    fn patience(&mut self) -> Duration {
        if self.failure.is_some() || self.requests.is_empty() { LOOK_AROUND } else { self.patience.next() }
    }

    fn fail(&mut self, failure: CommError) {
        self.end(failure);
    }

    fn compute_failed(&mut self, failure: CommError) {
        self.heartbeat.fail_quietly(failure.clone());
        self.end(failure);
    }
}

impl Drop for MpiEngine {
    fn drop(&mut self) {
        if !self.requests.is_empty() {
            self.end(CommError::left(self.rank));
        }
        if self.failure.is_none() {
            self.heartbeat.farewell();
            // SAFETY: dropped once, here; nothing uses MPI any more.
            unsafe { ManuallyDrop::drop(&mut self.universe) };
            return;
        }
        // MPI may still know the memory of what is under way, and to finalise it would wait for ranks that are gone.
        std::mem::forget(std::mem::replace(&mut self.exchanges, Queue::new()));
        std::mem::forget(std::mem::replace(&mut self.reductions, Queue::new()));
        std::mem::forget(std::mem::replace(&mut self.controls, Queue::new()));
    }
}
