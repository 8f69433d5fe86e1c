//! The emulated cluster: ranks are threads, their arithmetic and messages are real, time is *virtual*.
//!
//! A rank's clock advances by its announced floating-point operations over the device's rate, and by waiting for
//! collectives on virtual links ([`lina_net`]). The result is the same to the nanosecond on every machine, however
//! few cores it has and however the threads are scheduled.
//!
//! How that works: events (submissions of ranks, completions on the wire) are processed strictly in the order of
//! virtual time. A running rank can still submit something at its clock or later, so only events *before* the clock
//! of every running rank are processed (the horizon); a rank that waits cannot submit anything before the completion
//! it waits for, so it does not hold the horizon back. Whichever thread moves the horizon processes what it frees.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use lina_net::Topology;
use lina_plan::{GapTimings, GroupId, Launch, Nanos, PolicyRules, Route};

use crate::bound::{ProgramOp, StepBound, makespan};
use crate::comm::{Port, Submission};
use crate::copies::{CopyTimes, HostCopy};
use crate::delay::Delays;
#[cfg(feature = "nccl")]
use crate::device::DeviceClock;
use crate::driver::{Driver, Operation, Reduction};
use crate::exchange::AnyExchange;
use crate::transfer::{check_exchanges, check_reductions, exchange_all, sum_control, sum_pieces};
use crate::wire::{Channel, CollectiveId, Completion, Shape, Wire};
use crate::{Comm, CommError, Exchange, Lane, Span, StepStats, Work, WorkKind};

/// Rates of one emulated device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Device {
    /// Floating-point operations a second of its matrix products, in units of 10⁹.
    pub gflops: f64,
}

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct EmulatedConfig {
    /// Ranks and links.
    pub topology: Topology,
    /// Every rank's device.
    pub device: Device,
    /// Members of each reduction group, ascending; group 0 is all ranks.
    pub groups: Vec<Vec<usize>>,
    /// How long a rank's thread may be silent, on the wall clock, before the job ends.
    pub timeout: Duration,
    /// Random delays of every piece of work, for stress tests.
    pub delays: Option<Delays>,
    /// Whether launches are kept for [`EmulatedCluster::launch_logs`].
    pub log_launches: bool,
}

/// A cluster of threads on virtual time.
#[derive(Clone)]
pub struct EmulatedCluster {
    shared: Arc<Shared>,
}

impl EmulatedCluster {
    /// An idle cluster at virtual time 0.
    pub fn new(config: EmulatedConfig) -> Self {
        let ranks = config.topology.ranks();
        let state = State {
            wire: Wire::new(&config.topology),
            ranks: (0..ranks).map(|_| RankState::new(config.log_launches)).collect(),
            groups: Arc::new(config.groups),
            in_flight: BTreeMap::new(),
            completions: Vec::new(),
            failure: None,
            bounds: Vec::new(),
        };
        let shared = Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            device: config.device,
            timeout: config.timeout,
            delays: config.delays,
        };
        EmulatedCluster { shared: Arc::new(shared) }
    }

    /// The ranks' handles, one for each thread, under `rules`. Call once.
    pub fn comms(&self, rules: PolicyRules) -> Vec<Comm> {
        let (ranks, groups) = {
            let state = self.shared.lock();
            (state.ranks.len(), state.groups.clone())
        };
        (0..ranks)
            .map(|rank| {
                let port = EmulatedPort { shared: Arc::clone(&self.shared), rank, works: 0 };
                Comm::new(Box::new(port), rank, ranks, rules, &groups)
            })
            .collect()
    }

    /// Takes the bounds of the steps that have ended, evaluation passes excluded.
    pub fn take_bounds(&self) -> Vec<StepBound> {
        std::mem::take(&mut self.shared.lock().bounds)
    }

    /// Takes each rank's launches, with their step, in order.
    pub fn launch_logs(&self) -> Vec<Vec<(u64, Launch)>> {
        self.shared.lock().ranks.iter_mut().map(|rank| rank.driver.take_log()).collect()
    }
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    device: Device,
    timeout: Duration,
    delays: Option<Delays>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Whoever panicked has left a failure behind, after which nobody relies on the state (`State::process`).
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// What a rank's thread is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Running,
    Waiting(Awaited),
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Awaited {
    AllToAll(u32),
    Gradients,
    Control,
}

impl Awaited {
    fn name(self) -> String {
        match self {
            Awaited::AllToAll(index) => format!("all-to-all {index} of the step"),
            Awaited::Gradients => "the gradients' reduction".to_owned(),
            Awaited::Control => "the step's closing sum".to_owned(),
        }
    }
}

struct RankState {
    /// Virtual time before which this rank submits nothing.
    clock: Nanos,
    status: Status,
    last_seen: Instant,
    /// It has long work on its host.
    busy: bool,
    driver: Driver,
    inbox: VecDeque<(Nanos, Submission)>,
    /// All-to-alls that are done and not yet waited for.
    exchanges: VecDeque<(Nanos, u32, AnyExchange)>,
    control: Option<(Nanos, Vec<f64>)>,
    step: u64,
    /// The way of the step's all-to-alls.
    route: Route,
    step_start: Nanos,
    /// When the last gradient was done.
    gradients_done: Option<Nanos>,
    program: Vec<ProgramOp>,
    /// Group and bytes of the last gradient handed over in this step.
    last_gradient: (GroupId, u64),
    /// What the rank did in the step that it has ended and others have not.
    finished_program: Option<Vec<ProgramOp>>,
    stats: StepStats,
    recording: bool,
    spans: Vec<Span>,
}

impl RankState {
    fn new(log_launches: bool) -> Self {
        let mut driver = Driver::default();
        if log_launches {
            driver.log_launches();
        }
        RankState {
            clock: 0,
            status: Status::Running,
            last_seen: Instant::now(),
            busy: false,
            driver,
            inbox: VecDeque::new(),
            exchanges: VecDeque::new(),
            control: None,
            step: 0,
            route: Route::Direct,
            step_start: 0,
            gradients_done: None,
            program: Vec::new(),
            last_gradient: (GroupId::WORLD, 0),
            finished_program: None,
            stats: StepStats::default(),
            recording: false,
            spans: Vec::new(),
        }
    }

    fn awaited_at(&self, awaited: Awaited) -> Option<Nanos> {
        match awaited {
            Awaited::AllToAll(index) => self.exchanges.iter().find(|(_, done, _)| *done == index).map(|(at, _, _)| *at),
            Awaited::Gradients => self.gradients_done,
            Awaited::Control => self.control.as_ref().map(|(at, _)| *at),
        }
    }

    fn stats_so_far(&self) -> StepStats {
        StepStats { step: self.clock - self.step_start, ..self.stats }
    }

    fn span(&mut self, rank: usize, lane: Lane, name: &'static str, details: SpanDetails) {
        if self.recording {
            let SpanDetails { layer, part, start, end, bytes } = details;
            self.spans.push(Span { rank: rank as u32, lane, name, step: self.step, layer, part, start, end, bytes });
        }
    }
}

struct SpanDetails {
    layer: Option<u32>,
    part: (u32, u32),
    start: Nanos,
    end: Nanos,
    bytes: u64,
}

/// One rank's payload of a collective under way.
enum Payload {
    AllToAll { index: u32, exchange: Exchange },
    Reduction(Reduction),
    Control(Vec<f64>),
}

struct State {
    wire: Wire,
    ranks: Vec<RankState>,
    groups: Arc<Vec<Vec<usize>>>,
    in_flight: BTreeMap<CollectiveId, Vec<(usize, Payload)>>,
    completions: Vec<Completion>,
    failure: Option<CommError>,
    bounds: Vec<StepBound>,
}

impl State {
    /// Processes what may happen, on the thread of `rank`. Returns whether waiting ranks have something to wake up for:
    /// their results or a failure, after which nothing is processed any more.
    fn process(&mut self, rank: usize) -> bool {
        if self.failure.is_none() {
            match catch_unwind(AssertUnwindSafe(|| self.process_events())) {
                Ok(released) => return released || self.failure.is_some(),
                Err(panic) => self.failure = Some(CommError::panicked(rank, &*panic)),
            }
        }
        true
    }

    /// Processes every event before the horizon. Returns whether a waiting rank was released.
    fn process_events(&mut self) -> bool {
        let mut released = false;
        while self.failure.is_none() {
            let running = self.ranks.iter().filter(|rank| rank.status == Status::Running);
            let horizon = running.map(|rank| rank.clock).min().unwrap_or(Nanos::MAX);
            let submission = (self.ranks.iter().enumerate())
                .filter_map(|(rank, state)| state.inbox.front().map(|(at, _)| (*at, rank)))
                .min();
            // At equal times the wire goes first, then ranks in order.
            let wire = self.wire.next_event().filter(|at| submission.is_none_or(|(time, _)| *at <= time));
            match (wire, submission) {
                (Some(at), _) if at < horizon => released |= self.advance_wire(at),
                (None, Some((at, rank))) if at < horizon => {
                    let (_, submission) = self.ranks[rank].inbox.pop_front().expect("it was the front");
                    if let Submission::Groups(groups) = submission {
                        // Between steps nothing is under way, and all ranks bring the same.
                        self.groups = groups;
                        continue;
                    }
                    if matches!(submission, Submission::BeginStep { .. }) {
                        self.ranks[rank].gradients_done = None;
                    }
                    let started = Instant::now();
                    self.ranks[rank].driver.submit(at, submission);
                    self.ranks[rank].stats.deciding_wall += started.elapsed().as_nanos() as Nanos;
                    self.launch(at, rank);
                    released |= self.release(rank);
                }
                (None, None) => {
                    self.failure = self.deadlock();
                    break;
                }
                _ => break,
            }
        }
        released
    }

    /// Why all ranks that are left wait although nothing is to come, if they do: a rank has gone, or their programs
    /// differ.
    fn deadlock(&self) -> Option<CommError> {
        if self.ranks.iter().any(|state| state.status == Status::Running) {
            return None;
        }
        let mut waiting = self.ranks.iter().enumerate().filter_map(|(rank, state)| match state.status {
            Status::Waiting(awaited) => Some((rank, awaited)),
            _ => None,
        });
        let (rank, awaited) = waiting.next()?;
        if let Some(gone) = self.ranks.iter().position(|state| state.status == Status::Gone) {
            return Some(CommError::left(gone));
        }
        let mut reason = format!("it waits for {} in vain", awaited.name());
        if let Some((other, awaited)) = waiting.find(|(_, other)| *other != awaited) {
            reason = format!("{reason}, as rank {other} does for {}", awaited.name());
        }
        Some(CommError::RankFailed { rank, reason: format!("{reason}: the ranks' programs differ") })
    }

    fn advance_wire(&mut self, at: Nanos) -> bool {
        let mut completions = std::mem::take(&mut self.completions);
        self.wire.advance(at, &mut completions);
        let mut released = false;
        for completion in completions.drain(..) {
            match self.complete(completion) {
                Ok(freed) => released |= freed,
                Err(failure) => {
                    self.failure.get_or_insert(failure);
                }
            }
        }
        self.completions = completions;
        released
    }

    /// Hands what the brain has decided to the wire.
    fn launch(&mut self, now: Nanos, rank: usize) {
        loop {
            let started = Instant::now();
            let operation = self.ranks[rank].driver.next_operation();
            self.ranks[rank].stats.deciding_wall += started.elapsed().as_nanos() as Nanos;
            let (id, payload) = match operation {
                None => break,
                Some(Operation::AllToAll { index, exchange, route }) => {
                    let exchange = exchange.into_host();
                    let bytes_to: Vec<u64> =
                        exchange.send_elements.iter().map(|n| (n * size_of::<f32>()) as u64).collect();
                    let shape = Shape::AllToAll { bytes_to: &bytes_to, route };
                    let id = self.wire.launch(now, rank, Channel::AllToAll, shape);
                    (id, Payload::AllToAll { index, exchange })
                }
                Some(Operation::AllReduce(reduction)) => {
                    let members = &self.groups[reduction.group.0 as usize];
                    let bytes = (reduction.elements * size_of::<f32>()) as u64;
                    let id = self.wire.launch(now, rank, Channel::AllReduce, Shape::AllReduce { members, bytes });
                    if !members.contains(&rank) {
                        self.ranks[rank].driver.all_reduce_done(now, reduction.index, false);
                        continue;
                    }
                    (id, Payload::Reduction(reduction))
                }
                Some(Operation::Control(values)) => {
                    let members = &self.groups[GroupId::WORLD.0 as usize];
                    let shape = Shape::AllReduce { members, bytes: size_of_val(values.as_slice()) as u64 };
                    (self.wire.launch(now, rank, Channel::Control, shape), Payload::Control(values))
                }
            };
            self.in_flight.entry(id).or_default().push((rank, payload));
        }
        let state = &mut self.ranks[rank];
        if state.gradients_done.is_none() && state.driver.gradients_finished() {
            state.gradients_done = Some(now);
        }
    }

    /// Moves a complete collective's data and tells its members. Returns whether a waiting rank was released.
    ///
    /// # Errors
    /// If what the members brought does not fit together.
    fn complete(&mut self, completion: Completion) -> Result<bool, CommError> {
        let Completion { id, begin, end, alone } = completion;
        let mut parts = self.in_flight.remove(&id).expect("what completes was launched");
        parts.sort_by_key(|(rank, _)| *rank);
        let members: Vec<usize> = parts.iter().map(|(rank, _)| *rank).collect();
        match id.channel {
            Channel::AllToAll => {
                let (indices, mut exchanges): (Vec<u32>, Vec<Exchange>) = (parts.into_iter())
                    .map(|(_, payload)| match payload {
                        Payload::AllToAll { index, exchange } => (index, exchange),
                        _ => unreachable!("channels carry one class"),
                    })
                    .unzip();
                check_exchanges(&exchanges)?;
                exchange_all(&mut exchanges);
                for (rank, (index, exchange)) in indices.into_iter().zip(exchanges).enumerate() {
                    let state = &mut self.ranks[rank];
                    let exchange = AnyExchange::Host(exchange);
                    let kind = exchange.kind();
                    let bytes = exchange.sent_bytes(rank);
                    state.stats.exchanged(&kind, end - begin, alone, bytes);
                    let part = (kind.chunk, kind.chunks);
                    let details = SpanDetails { layer: Some(kind.layer), part, start: begin, end, bytes };
                    state.span(rank, Lane::AllToAll, kind.name(), details);
                    state.exchanges.push_back((end, index, exchange));
                    state.driver.all_to_all_done(end);
                }
            }
            Channel::AllReduce => {
                let mut reductions: Vec<Reduction> = (parts.into_iter())
                    .map(|(_, payload)| match payload {
                        Payload::Reduction(reduction) => reduction,
                        _ => unreachable!("channels carry one class"),
                    })
                    .collect();
                check_reductions(members.iter().copied().zip(&reductions))?;
                sum_pieces(&mut reductions);
                for (&rank, reduction) in members.iter().zip(reductions) {
                    let state = &mut self.ranks[rank];
                    state.stats.all_reduce += end - begin;
                    state.stats.all_reduce_alone += alone;
                    let bytes = (reduction.elements * size_of::<f32>()) as u64;
                    let details = SpanDetails { layer: None, part: (reduction.index, 0), start: begin, end, bytes };
                    state.span(rank, Lane::AllReduce, "allreduce", details);
                    // The memory is the owner's again before anybody hears of it.
                    let index = reduction.index;
                    drop(reduction);
                    state.driver.all_reduce_done(end, index, true);
                }
            }
            Channel::Control => {
                let values = parts.into_iter().map(|(rank, payload)| match payload {
                    Payload::Control(values) => (rank, values),
                    _ => unreachable!("channels carry one class"),
                });
                let sum = sum_control(values)?;
                for &rank in &members {
                    self.ranks[rank].control = Some((end, sum.clone()));
                    let details = SpanDetails { layer: None, part: (0, 0), start: begin, end, bytes: 0 };
                    self.ranks[rank].span(rank, Lane::AllReduce, "norm and plan", details);
                }
            }
        }
        let mut released = false;
        for rank in members {
            self.launch(end, rank);
            released |= self.release(rank);
        }
        Ok(released)
    }

    /// Lets a waiting rank run if what it waits for is there.
    fn release(&mut self, rank: usize) -> bool {
        let state = &mut self.ranks[rank];
        let Status::Waiting(awaited) = state.status else { return false };
        let Some(at) = state.awaited_at(awaited) else { return false };
        let blocked = at.saturating_sub(state.clock);
        match awaited {
            Awaited::AllToAll(_) => state.stats.all_to_all_blocked += blocked,
            Awaited::Gradients | Awaited::Control => state.stats.all_reduce_blocked += blocked,
        }
        state.clock = state.clock.max(at);
        state.status = Status::Running;
        true
    }

    /// A rank has ended its step; when all have, the step's bound is replayed. Evaluation passes, which wait for no
    /// gradients, have none: they share their number with a step.
    fn end_program(&mut self, rank: usize) {
        self.ranks[rank].finished_program = Some(std::mem::take(&mut self.ranks[rank].program));
        if !self.ranks.iter().all(|state| state.finished_program.is_some()) {
            return;
        }
        let programs: Vec<Vec<ProgramOp>> =
            self.ranks.iter_mut().filter_map(|state| state.finished_program.take()).collect();
        let link = self.wire.take_busiest_port();
        if programs.iter().flatten().any(|op| matches!(op, ProgramOp::WaitGradients { .. })) {
            let graph = makespan(self.wire.topology(), &programs);
            self.bounds.push(StepBound { step: self.ranks[rank].step, graph, link });
        }
    }

    /// The rank that has been silent for longer than `timeout`, and what the others wait for.
    fn silent_rank(&self, timeout: Duration) -> Option<CommError> {
        let (rank, _) = (self.ranks.iter().enumerate())
            .find(|(_, state)| state.status == Status::Running && !state.busy && state.last_seen.elapsed() > timeout)?;
        let operation = self.ranks.iter().find_map(|state| match state.status {
            Status::Waiting(awaited) => Some(awaited.name()),
            _ => None,
        })?;
        Some(CommError::RankSilent { rank, seconds: timeout.as_secs(), operation })
    }
}

struct EmulatedPort {
    shared: Arc<Shared>,
    rank: usize,
    works: u64,
}

impl EmulatedPort {
    /// Runs `change` on the state, then processes what it made possible.
    fn update<R>(&mut self, change: impl FnOnce(&mut State, usize) -> R) -> Result<R, CommError> {
        let mut state = self.shared.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        state.ranks[self.rank].last_seen = Instant::now();
        let result = change(&mut state, self.rank);
        if state.process(self.rank) {
            self.shared.changed.notify_all();
        }
        Ok(result)
    }

    fn wait(&mut self, awaited: Awaited) -> Result<(), CommError> {
        let rank = self.rank;
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        state.ranks[rank].status = Status::Waiting(awaited);
        state.release(rank);
        if state.process(rank) {
            shared.changed.notify_all();
        }
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            if state.ranks[rank].status == Status::Running {
                state.ranks[rank].last_seen = Instant::now();
                return Ok(());
            }
            // A rank may be lost at any time; half a second is soon enough to look.
            let pause = Duration::from_millis(500).min(shared.timeout);
            state = shared.changed.wait_timeout(state, pause).unwrap_or_else(|poisoned| poisoned.into_inner()).0;
            if state.failure.is_none()
                && let Some(failure) = state.silent_rank(shared.timeout)
            {
                state.failure = Some(failure);
                shared.changed.notify_all();
            }
        }
    }
}

impl Port for EmulatedPort {
    fn now(&self) -> Nanos {
        self.shared.lock().ranks[self.rank].clock
    }

    fn work(&mut self, work: Work) -> Result<(), CommError> {
        self.works += 1;
        let mut duration = (work.flops as f64 / self.shared.device.gflops).round() as Nanos;
        if let Some(delays) = &self.shared.delays {
            duration += delays.of(self.rank, self.works);
        }
        self.update(|state, rank| {
            let state = &mut state.ranks[rank];
            let (start, end) = (state.clock, state.clock + duration);
            state.clock = end;
            state.stats.computed(work.kind, duration);
            state.program.push(ProgramOp::Compute(duration));
            if duration > 0 {
                let details = SpanDetails { layer: work.layer, part: (0, 0), start, end, bytes: 0 };
                state.span(rank, Lane::Compute, WorkKind::name(work.kind), details);
            }
        })
    }

    fn end_work(&mut self) -> Nanos {
        self.now()
    }

    #[cfg(feature = "nccl")]
    fn set_device(&mut self, _clock: DeviceClock) {
        panic!("the emulated cluster computes on no device");
    }

    fn copied(&mut self, copy: &HostCopy, times: CopyTimes) {
        let CopyTimes { start, end } = times;
        let mut state = self.shared.lock();
        let state = &mut state.ranks[self.rank];
        state.stats.copied(end - start, copy.bytes);
        let details = SpanDetails { layer: Some(copy.layer), part: (0, 0), start, end, bytes: copy.bytes };
        state.span(self.rank, Lane::Copy, copy.direction.name(), details);
    }

    fn wait_copies(&mut self, end: Nanos) -> Result<(), CommError> {
        self.update(|state, rank| {
            let state = &mut state.ranks[rank];
            state.stats.copy_blocked += end.saturating_sub(state.clock);
            state.clock = state.clock.max(end);
        })
    }

    fn submit(&mut self, submission: Submission) -> Result<(), CommError> {
        self.update(|state, rank| {
            let state = &mut state.ranks[rank];
            match &submission {
                Submission::BeginStep { step, rules, .. } => {
                    state.step = *step;
                    state.route = rules.moe.route;
                    state.step_start = state.clock;
                    state.stats = StepStats::default();
                    state.program.clear();
                    state.last_gradient = (GroupId::WORLD, 0);
                }
                Submission::Flush => state.gradients_done = None,
                Submission::AllToAll(exchange) => state.program.push(ProgramOp::Submit(
                    exchange.send_elements().iter().map(|n| (n * size_of::<f32>()) as u64).collect(),
                    state.route,
                )),
                Submission::Gradient { group, elements, .. } => {
                    state.last_gradient = (*group, (elements * size_of::<f32>()) as u64);
                }
                Submission::Control(_) => state.control = None,
                _ => {}
            }
            state.inbox.push_back((state.clock, submission));
        })
    }

    fn wait_all_to_all(&mut self, index: u32) -> Result<AnyExchange, CommError> {
        self.wait(Awaited::AllToAll(index))?;
        let mut state = self.shared.lock();
        let state = &mut state.ranks[self.rank];
        state.program.push(ProgramOp::Wait(index));
        let position = state.exchanges.iter().position(|(_, done, _)| *done == index);
        let (_, _, exchange) = position.and_then(|i| state.exchanges.remove(i)).expect("the wait ended with it");
        Ok(exchange)
    }

    fn wait_gradients(&mut self) -> Result<(), CommError> {
        self.wait(Awaited::Gradients)?;
        let mut state = self.shared.lock();
        let (group, last_bytes) = state.ranks[self.rank].last_gradient;
        let members = state.groups[group.0 as usize].clone();
        state.ranks[self.rank].program.push(ProgramOp::WaitGradients { members, last_bytes });
        Ok(())
    }

    fn wait_control(&mut self) -> Result<Vec<f64>, CommError> {
        self.wait(Awaited::Control)?;
        let (_, sum) = self.shared.lock().ranks[self.rank].control.take().expect("the wait ended with it");
        Ok(sum)
    }

    fn timings(&self) -> GapTimings {
        self.shared.lock().ranks[self.rank].driver.timings()
    }

    fn stats(&self) -> StepStats {
        self.shared.lock().ranks[self.rank].stats_so_far()
    }

    fn end_step(&mut self) -> StepStats {
        let mut state = self.shared.lock();
        state.end_program(self.rank);
        state.ranks[self.rank].stats_so_far()
    }

    fn record(&mut self, on: bool) -> Vec<Span> {
        let mut state = self.shared.lock();
        let rank = &mut state.ranks[self.rank];
        rank.recording = on;
        std::mem::take(&mut rank.spans)
    }

    fn set_busy(&mut self, busy: bool) -> bool {
        let mut state = self.shared.lock();
        let state = &mut state.ranks[self.rank];
        state.last_seen = Instant::now();
        std::mem::replace(&mut state.busy, busy)
    }

    fn fail(&mut self, reason: String) {
        let mut state = self.shared.lock();
        state.failure.get_or_insert(CommError::RankFailed { rank: self.rank, reason });
        self.shared.changed.notify_all();
    }
}

impl Drop for EmulatedPort {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ranks[self.rank].status = Status::Gone;
        if std::thread::panicking() {
            let reason = "it panicked".to_owned();
            state.failure.get_or_insert(CommError::RankFailed { rank: self.rank, reason });
        }
        state.process(self.rank);
        self.shared.changed.notify_all();
    }
}
