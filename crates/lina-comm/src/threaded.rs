//! The runtime's body: one communication thread a rank drives the brain and an engine; the compute thread hands its
//! submissions over and waits for results.
//!
//! The communication thread owns the engine's handles, which need not be `Send`: a `Send` builder makes the engine
//! on that thread. It sleeps whenever neither its compute thread nor its engine has news.
//!
//! A compute thread with a GPU hands over what its device has yet to compute. The communication thread takes submissions
//! in their order and each only once its data is [`Ready`], so that the brain sees the same as on a processor, and nothing
//! is ever launched that could not run. What a device exchanges comes back once it is launched, with what the compute stream
//! is to wait for ([`Hold`]).

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lina_plan::{AllToAllKind, GapTimings, Launch, Nanos};

use crate::comm::{Port, Submission};
use crate::copies::{CopyTimes, HostCopy};
use crate::delay::Delays;
#[cfg(feature = "nccl")]
use crate::device::DeviceClock;
use crate::driver::{Driver, Operation, Reduction};
use crate::exchange::AnyExchange;
use crate::recorder::{Awaited, ComputeClock};
use crate::wire::{CHANNELS, Channel};
use crate::{CommError, Lane, Span, StepStats, Work};

/// An operation that an engine has finished. Operations of one class finish in the order in which they were started.
pub(crate) enum Finished {
    AllToAll {
        index: u32,
        kind: AllToAllKind,
        sent_bytes: u64,
        /// None if it has been [handed back](Engine::take_launched) before.
        exchange: Option<AnyExchange>,
    },
    AllReduce(Reduction),
    Control(Vec<f64>),
}

impl Finished {
    /// An exchange of `rank` that is complete.
    pub(crate) fn all_to_all(index: u32, exchange: AnyExchange, rank: usize) -> Self {
        let (kind, sent_bytes) = (exchange.kind(), exchange.sent_bytes(rank));
        Finished::AllToAll { index, kind, sent_bytes, exchange: Some(exchange) }
    }

    fn channel(&self) -> Channel {
        match self {
            Finished::AllToAll { .. } => Channel::AllToAll,
            Finished::AllReduce(_) => Channel::AllReduce,
            Finished::Control(_) => Channel::Control,
        }
    }
}

/// An all-to-all that the compute thread gets back.
struct Exchanged {
    index: u32,
    exchange: AnyExchange,
    /// If it is not complete yet.
    hold: Option<Hold>,
}

/// Has the stream of a clock's device wait until something has happened: what is enqueued from there on happens afterwards.
pub(crate) type Hold = Box<dyn FnOnce(&mut ComputeClock) + Send>;

/// What moves data between ranks. Starts operations without blocking and reports them when they are done.
pub(crate) trait Engine {
    /// Starts an operation.
    fn start(&mut self, operation: Operation);
    /// Other reduction groups from here on. Nothing of this rank is under way, and all ranks bring the same; what goes
    /// wrong is for [`poll`](Self::poll) to say.
    fn set_groups(&mut self, groups: &Arc<Vec<Vec<usize>>>);
    /// Counts an operation in which this rank takes no part.
    fn skip(&mut self, channel: Channel);
    /// Makes progress; appends what has finished, with the time since when all members were there.
    fn poll(&mut self, finished: &mut Vec<(Instant, Finished)>) -> Result<(), CommError>;
    /// Takes the all-to-alls that a device carries out and that the compute thread may have back before they are complete,
    /// with what its stream waits for: the host need not. Each finishes without its exchange.
    fn take_launched(&mut self) -> Vec<(u32, AnyExchange, Hold)> {
        Vec::new()
    }
    /// How long the communication thread may sleep now that neither a submission nor `poll` had news; zero for a
    /// yield. An engine with long patience pokes the mailbox.
    fn patience(&mut self) -> Duration {
        LOOK_AROUND
    }
    /// Tells the other ranks that this one has failed.
    fn fail(&mut self, failure: CommError);
    /// The same for a failure of the compute thread, which says itself why its rank ends.
    fn compute_failed(&mut self, failure: CommError) {
        self.fail(failure);
    }
}

/// Whether what a submission is about has happened.
pub(crate) trait Ready: Send {
    /// Once true, it stays so.
    ///
    /// # Errors
    /// Why it never will.
    fn is_ready(&mut self) -> Result<bool, String>;
}

/// A submission on its way, with what must have happened before it counts.
struct Posted {
    submission: Submission,
    ready: Option<Box<dyn Ready>>,
}

/// Where a rank's two threads meet.
pub(crate) struct Mailbox {
    state: Mutex<Mail>,
    for_comm: Condvar,
    for_compute: Condvar,
    /// How often the compute thread has been told of news.
    news: AtomicU64,
    /// The compute thread has long work on the host.
    busy: AtomicBool,
}

#[derive(Default)]
struct Mail {
    submissions: VecDeque<Posted>,
    /// The engine has news for the communication thread.
    poked: bool,
    closed: bool,
    failing: Option<CommError>,
    exchanges: VecDeque<Exchanged>,
    /// All-to-alls that the compute thread may have back and that are not complete.
    incomplete: usize,
    gradients_finished: bool,
    control: Option<Vec<f64>>,
    failure: Option<CommError>,
    timings: GapTimings,
    stats: StepStats,
    recording: bool,
    spans: Vec<Span>,
    log: Vec<(u64, Launch)>,
}

impl Mailbox {
    pub(crate) fn new() -> Self {
        Mailbox {
            state: Mutex::default(),
            for_comm: Condvar::new(),
            for_compute: Condvar::new(),
            news: AtomicU64::new(0),
            busy: AtomicBool::new(false),
        }
    }

    /// Whether the compute thread has said that it works on the host for long.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed)
    }

    /// Says so, and returns what was said before.
    pub(crate) fn set_busy(&self, busy: bool) -> bool {
        self.busy.swap(busy, Ordering::Relaxed)
    }

    /// Wakes the communication thread: its engine has news.
    pub(crate) fn poke(&self) {
        self.lock().poked = true;
        self.for_comm.notify_one();
    }

    /// Wakes the compute thread with a failure, unless it has been told of one.
    pub(crate) fn fail(&self, failure: CommError) {
        self.lock().failure.get_or_insert(failure);
        self.tell_compute();
    }

    /// Wakes the compute thread: something has changed that it may wait for.
    fn tell_compute(&self) {
        self.news.fetch_add(1, Ordering::Release);
        self.for_compute.notify_all();
    }

    /// Looks for news since the count was `seen`, as long as a small exchange takes.
    fn look_for_news(&self, seen: u64) {
        let deadline = Instant::now() + WATCH;
        while self.news.load(Ordering::Acquire) == seen && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }

    /// The launches so far, with their steps.
    pub(crate) fn take_log(&self) -> Vec<(u64, Launch)> {
        std::mem::take(&mut self.lock().log)
    }

    fn lock(&self) -> MutexGuard<'_, Mail> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// What a rank's communication thread needs.
pub(crate) struct ThreadConfig {
    pub(crate) rank: usize,
    pub(crate) epoch: Instant,
    pub(crate) groups: Arc<Vec<Vec<usize>>>,
    pub(crate) log_launches: bool,
    pub(crate) delays: Option<Delays>,
}

/// The compute thread's side.
pub(crate) struct ThreadedPort {
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
    clock: ComputeClock,
    rank: usize,
    delays: Option<Delays>,
    works: u64,
    /// Makes marks as a device would: what is handed over is ready later.
    #[cfg(test)]
    pub(crate) marks: Option<Box<dyn FnMut() -> Box<dyn Ready> + Send>>,
}

impl ThreadedPort {
    /// Starts the communication thread, which builds its engine itself. Where that fails, every call on the handle
    /// returns why.
    pub(crate) fn start<E: Engine>(
        config: ThreadConfig,
        mailbox: Arc<Mailbox>,
        engine: impl FnOnce() -> Result<E, CommError> + Send + 'static,
    ) -> std::io::Result<Self> {
        let (rank, epoch, delays) = (config.rank, config.epoch, config.delays);
        let mail = Arc::clone(&mailbox);
        let thread = std::thread::Builder::new().name(format!("lina-comm-{rank}")).spawn(move || match engine() {
            Ok(engine) => communicate(config, mail, engine),
            Err(failure) => mail.fail(failure),
        })?;
        Ok(ThreadedPort::new(mailbox, thread, rank, epoch, delays))
    }

    /// The compute thread's side of a communication thread that runs [`communicate`] with the same mailbox.
    pub(crate) fn new(
        mailbox: Arc<Mailbox>,
        thread: JoinHandle<()>,
        rank: usize,
        epoch: Instant,
        delays: Option<Delays>,
    ) -> Self {
        let clock = ComputeClock::new(rank as u32, epoch);
        ThreadedPort {
            mailbox,
            thread: Some(thread),
            clock,
            rank,
            delays,
            works: 0,
            #[cfg(test)]
            marks: None,
        }
    }

    /// The same port on an emulated device of that rate, if one is given.
    #[cfg(feature = "mpi")]
    pub(crate) fn on_device(mut self, gflops: Option<f64>) -> Self {
        if let Some(gflops) = gflops {
            self.clock.emulate_device(gflops);
        }
        self
    }

    /// What the compute thread knows of a step, with what the communication thread knows.
    fn with_mail(&self, clock: StepStats) -> StepStats {
        clock.joined(self.mailbox.lock().stats)
    }

    /// Hands a submission over that counts once `ready` is.
    fn post(&mut self, submission: Submission, ready: Option<Box<dyn Ready>>) -> Result<(), CommError> {
        let mut mail = self.mailbox.lock();
        if let Some(failure) = &mail.failure {
            return Err(failure.clone());
        }
        if matches!(submission, Submission::BeginStep { .. }) {
            mail.stats = StepStats::default();
        }
        if matches!(submission, Submission::Flush) {
            mail.gradients_finished = false;
        }
        mail.submissions.push_back(Posted { submission, ready });
        drop(mail);
        self.mailbox.for_comm.notify_one();
        Ok(())
    }

    /// Blocks until `ready` yields.
    fn wait<R>(&mut self, awaited: Awaited, ready: impl FnMut(&mut Mail) -> Option<R>) -> Result<R, CommError> {
        // Who waits for others is not busy: else ranks that wait for each other would never name the one that hangs.
        let busy = self.mailbox.set_busy(false);
        let result = self.wait_idly(awaited, ready);
        self.mailbox.set_busy(busy);
        result
    }

    fn wait_idly<R>(
        &mut self,
        awaited: Awaited,
        mut ready: impl FnMut(&mut Mail) -> Option<R>,
    ) -> Result<R, CommError> {
        self.clock.end_work();
        self.clock.check()?;
        let start = self.clock.now();
        // A thread whose device computes has nothing else to do, and sleeping takes longer than a token's rows on their way.
        let mut watches = self.clock.has_device();
        let mut mail = self.mailbox.lock();
        loop {
            if let Some(result) = ready(&mut mail) {
                drop(mail);
                self.clock.waited(awaited, start);
                return Ok(result);
            }
            if let Some(failure) = &mail.failure {
                return Err(failure.clone());
            }
            if std::mem::take(&mut watches) {
                let seen = self.mailbox.news.load(Ordering::Acquire);
                drop(mail);
                self.mailbox.look_for_news(seen);
                mail = self.mailbox.lock();
            } else {
                mail = self.mailbox.for_compute.wait(mail).unwrap_or_else(|poisoned| poisoned.into_inner());
            }
        }
    }
}

impl Port for ThreadedPort {
    fn now(&self) -> Nanos {
        self.clock.now()
    }

    fn work(&mut self, work: Work) -> Result<(), CommError> {
        self.clock.begin_work(work);
        self.works += 1;
        if let Some(delays) = self.delays {
            std::thread::sleep(Duration::from_nanos(delays.of(self.rank, self.works)));
        }
        self.clock.check()
    }

    fn end_work(&mut self) -> Nanos {
        self.clock.end_work();
        self.clock.now()
    }

    fn copied(&mut self, copy: &HostCopy, times: CopyTimes) {
        self.clock.copied(copy, times);
    }

    fn wait_copies(&mut self, end: Nanos) -> Result<(), CommError> {
        self.clock.wait_copies(end);
        Ok(())
    }

    #[cfg(feature = "nccl")]
    fn set_device(&mut self, clock: DeviceClock) {
        self.clock.set_device(clock);
    }

    fn submit(&mut self, submission: Submission) -> Result<(), CommError> {
        self.clock.end_work();
        if let Submission::BeginStep { step, .. } = submission {
            self.clock.begin_step(step);
        }
        // What the brain times happens when the device has come as far; the rest is of the host.
        #[cfg(feature = "nccl")]
        let ready = match submission {
            Submission::Control(_) | Submission::Groups(_) => None,
            _ => self.clock.mark(),
        };
        #[cfg(not(feature = "nccl"))]
        let ready = None;
        #[cfg(test)]
        let ready = ready.or_else(|| self.marks.as_mut().map(|mark| mark()));
        self.clock.check()?;
        self.post(submission, ready)
    }

    fn wait_all_to_all(&mut self, index: u32) -> Result<AnyExchange, CommError> {
        let Exchanged { exchange, hold, .. } = self.wait(Awaited::AllToAll, |mail| {
            let position = mail.exchanges.iter().position(|exchanged| exchanged.index == index)?;
            mail.exchanges.remove(position)
        })?;
        if let Some(hold) = hold {
            hold(&mut self.clock);
            self.clock.check()?;
        }
        Ok(exchange)
    }

    fn check(&self) -> Result<(), CommError> {
        self.mailbox.lock().failure.clone().map_or(Ok(()), Err)
    }

    fn wait_gradients(&mut self) -> Result<(), CommError> {
        self.wait(Awaited::AllReduce, |mail| mail.gradients_finished.then_some(()))
    }

    fn wait_control(&mut self) -> Result<Vec<f64>, CommError> {
        self.wait(Awaited::AllReduce, |mail| mail.control.take())
    }

    fn timings(&self) -> GapTimings {
        self.mailbox.lock().timings.clone()
    }

    fn stats(&self) -> StepStats {
        self.with_mail(self.clock.stats())
    }

    fn end_step(&mut self) -> StepStats {
        let clock = self.clock.end_step();
        // The device has come to the end; the communication thread is about to see it.
        let mut mail = self.mailbox.lock();
        while mail.incomplete > 0 && mail.failure.is_none() {
            mail = self.mailbox.for_compute.wait(mail).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        drop(mail);
        self.with_mail(clock)
    }

    fn record(&mut self, on: bool) -> Vec<Span> {
        let mut spans = self.clock.record(on);
        let mut mail = self.mailbox.lock();
        mail.recording = on;
        spans.append(&mut mail.spans);
        spans
    }

    fn set_busy(&mut self, busy: bool) -> bool {
        self.mailbox.set_busy(busy)
    }

    fn fail(&mut self, reason: String) {
        self.mailbox.lock().failing = Some(CommError::RankFailed { rank: self.rank, reason });
        self.mailbox.poke();
    }
}

impl Drop for ThreadedPort {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.fail("it panicked".to_owned());
        }
        self.mailbox.lock().closed = true;
        self.mailbox.poke();
        if let Some(thread) = self.thread.take() {
            // It has told its mailbox and the other ranks of a panic; there is nobody else to tell.
            let _ = thread.join();
        }
        let mut mail = self.mailbox.lock();
        if mail.failure.is_some() {
            // A device may still touch the memory of what nobody has claimed.
            std::mem::forget(std::mem::take(&mut mail.exchanges));
        }
    }
}

/// Carries out a rank's communication on this thread, until its port is dropped.
pub(crate) fn communicate<E: Engine>(config: ThreadConfig, mailbox: Arc<Mailbox>, engine: E) {
    CommThread::new(config, mailbox, engine).run();
}

struct CommThread<E> {
    config: ThreadConfig,
    mailbox: Arc<Mailbox>,
    engine: E,
    driver: Driver,
    step: u64,
    finished: Vec<(Instant, Finished)>,
    /// Handed over and not yet told to the brain.
    submissions: VecDeque<Posted>,
    /// When each channel's last operation ended.
    channel_free: [Nanos; CHANNELS],
}

/// How long a compute thread with a device, and its engine after the last operation, look for news before they sleep: some
/// exchanges of a few rows.
pub(crate) const WATCH: Duration = Duration::from_micros(300);
/// How often a communication thread looks after its peers while it waits for them.
pub(crate) const LOOK_AROUND: Duration = Duration::from_millis(200);
/// How often it looks whether the oldest submission is ready, at least.
const LOOK_FOR_READY: Duration = Duration::from_micros(20);

impl<E: Engine> CommThread<E> {
    fn new(config: ThreadConfig, mailbox: Arc<Mailbox>, engine: E) -> Self {
        let mut driver = Driver::default();
        if config.log_launches {
            driver.log_launches();
        }
        CommThread {
            config,
            mailbox,
            engine,
            driver,
            step: 0,
            finished: Vec::new(),
            submissions: VecDeque::new(),
            channel_free: [0; CHANNELS],
        }
    }

    fn now(&self) -> Nanos {
        self.config.epoch.elapsed().as_nanos() as Nanos
    }

    /// Until the compute thread is gone. A panic here must leave neither the compute thread nor other ranks waiting.
    fn run(mut self) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.rounds())) {
            let failure = CommError::panicked(self.config.rank, &*panic);
            self.mailbox.fail(failure.clone());
            self.engine.fail(failure);
        }
    }

    fn rounds(&mut self) {
        while let Some(busy) = self.round() {
            if busy {
                continue;
            }
            let mut patience = self.engine.patience();
            if !self.submissions.is_empty() {
                patience = patience.min(LOOK_FOR_READY);
            }
            if patience.is_zero() {
                std::thread::yield_now();
                continue;
            }
            let mail = self.mailbox.lock();
            if mail.submissions.is_empty() && !mail.poked && !mail.closed && mail.failing.is_none() {
                drop(self.mailbox.for_comm.wait_timeout(mail, patience));
            }
        }
    }

    /// Looks what is ready, polls, takes submissions, launches. Whatever a ready submission came after has happened too, so
    /// that `poll` finds it and the brain hears of it before. Returns whether anything happened, or `None` when all is over.
    fn round(&mut self) -> Option<bool> {
        let mut mail = self.mailbox.lock();
        mail.poked = false;
        self.submissions.append(&mut mail.submissions);
        if let Some(failure) = mail.failing.take() {
            mail.failure = Some(failure.clone());
            drop(mail);
            self.engine.compute_failed(failure);
            return Some(true);
        }
        if mail.closed && self.submissions.is_empty() && mail.incomplete == 0 {
            return None;
        }
        drop(mail);
        self.look_for_ready();
        let mut finished = std::mem::take(&mut self.finished);
        let outcome = self.engine.poll(&mut finished);
        let mut busy = !finished.is_empty();
        busy |= self.hand_back();
        let deciding_started = Instant::now();
        for (begin, finished) in finished.drain(..) {
            self.finish(begin, finished);
        }
        self.finished = finished;
        let mut deciding = deciding_started.elapsed();
        if outcome.is_ok() {
            let (taken, deciding_on_them) = self.take_submissions();
            busy |= taken;
            deciding += deciding_on_them;
        }
        self.launch();
        // Without another round: the compute thread may be waiting for it.
        busy |= self.hand_back();
        let mut mail = self.mailbox.lock();
        mail.stats.deciding_wall += deciding.as_nanos() as Nanos;
        let all_taken = self.submissions.is_empty() && mail.submissions.is_empty();
        let mut news = busy;
        if self.driver.gradients_finished() && !mail.gradients_finished && all_taken {
            mail.gradients_finished = true;
            mail.timings = self.driver.timings();
            news = true;
        }
        if self.config.log_launches {
            mail.log.extend(self.driver.take_log());
        }
        if let Err(failure) = outcome {
            mail.failure.get_or_insert(failure);
            // Nothing comes of them any more.
            mail.incomplete = 0;
            self.submissions.clear();
            news = true;
        }
        drop(mail);
        if news {
            self.mailbox.tell_compute();
        }
        Some(busy)
    }

    /// Looks which submissions are ready, up to the first that is not; these have nothing left to wait for.
    fn look_for_ready(&mut self) {
        for Posted { ready, .. } in &mut self.submissions {
            match ready.as_mut().map_or(Ok(true), |ready| ready.is_ready()) {
                Ok(true) => *ready = None,
                Ok(false) => return,
                Err(reason) => {
                    let failure = CommError::RankFailed { rank: self.config.rank, reason };
                    self.mailbox.fail(failure.clone());
                    self.engine.fail(failure);
                    self.submissions.clear();
                    return;
                }
            }
        }
    }

    /// Gives the compute thread what it may have back before it is complete. Returns whether there was anything.
    fn hand_back(&mut self) -> bool {
        let launched = self.engine.take_launched();
        if launched.is_empty() {
            return false;
        }
        let mut mail = self.mailbox.lock();
        mail.incomplete += launched.len();
        mail.exchanges.extend(launched.into_iter().map(|(index, exchange, hold)| Exchanged {
            index,
            exchange,
            hold: Some(hold),
        }));
        drop(mail);
        self.mailbox.tell_compute();
        true
    }

    /// Tells the brain of the submissions that were found ready, in their order. Returns whether there was one, and how long
    /// the brain took.
    fn take_submissions(&mut self) -> (bool, Duration) {
        let (mut taken, mut deciding) = (false, Duration::ZERO);
        while let Some(Posted { ready: None, submission }) = self.submissions.front() {
            // The host may be ahead of its device, but a step ends for the brain before the next one begins.
            let begins = matches!(submission, Submission::BeginStep { .. } | Submission::Groups(_));
            if begins && self.mailbox.lock().incomplete > 0 {
                break;
            }
            let Some(Posted { submission, .. }) = self.submissions.pop_front() else { break };
            taken = true;
            if let Submission::BeginStep { step, .. } = submission {
                self.step = step;
            }
            if let Submission::Groups(groups) = submission {
                self.engine.set_groups(&groups);
                self.config.groups = groups;
                continue;
            }
            let (now, started) = (self.now(), Instant::now());
            self.driver.submit(now, submission);
            deciding += started.elapsed();
        }
        (taken, deciding)
    }

    fn launch(&mut self) {
        while let Some(operation) = self.driver.next_operation() {
            match operation {
                Operation::AllReduce(reduction)
                    if !self.config.groups[reduction.group.0 as usize].contains(&self.config.rank) =>
                {
                    self.engine.skip(Channel::AllReduce);
                    let now = self.now();
                    self.driver.all_reduce_done(now, reduction.index, false);
                }
                operation => self.engine.start(operation),
            }
        }
    }

    fn finish(&mut self, begin: Instant, finished: Finished) {
        let end = self.now();
        let free = &mut self.channel_free[finished.channel() as usize];
        // Pipelined operations are handed over together, but each has the channel to itself only after the last one.
        let begin = Nanos::max(begin.saturating_duration_since(self.config.epoch).as_nanos() as Nanos, *free);
        *free = end;
        let mut mail = self.mailbox.lock();
        let Mail { stats, spans, recording, exchanges, incomplete, control, .. } = &mut *mail;
        let (lane, name, layer, part, bytes) = match &finished {
            &Finished::AllToAll { kind, sent_bytes, .. } => {
                stats.exchanged(&kind, end - begin, 0, sent_bytes);
                (Lane::AllToAll, kind.name(), Some(kind.layer), (kind.chunk, kind.chunks), sent_bytes)
            }
            Finished::AllReduce(reduction) => {
                stats.all_reduce += end - begin;
                let bytes = (reduction.elements * size_of::<f32>()) as u64;
                (Lane::AllReduce, "allreduce", None, (reduction.index, 0), bytes)
            }
            Finished::Control(_) => (Lane::AllReduce, "norm and plan", None, (0, 0), 0),
        };
        if *recording {
            let (rank, step) = (self.config.rank as u32, self.step);
            spans.push(Span { rank, lane, name, step, layer, part, start: begin, end, bytes });
        }
        match finished {
            Finished::AllToAll { index, exchange, .. } => {
                match exchange {
                    Some(exchange) => exchanges.push_back(Exchanged { index, exchange, hold: None }),
                    // In a failure it may not have come back.
                    None => *incomplete = incomplete.saturating_sub(1),
                }
                self.driver.all_to_all_done(end);
            }
            Finished::AllReduce(reduction) => {
                // The memory is the owner's again before anybody hears of it.
                let index = reduction.index;
                drop(reduction);
                self.driver.all_reduce_done(end, index, true);
            }
            Finished::Control(sum) => *control = Some(sum),
        }
    }
}

#[cfg(test)]
mod tests {
    use lina_plan::{AllToAllKind, Direction, GapPlan, Leg, Policy, PolicyRules, PolicySettings};

    use crate::Exchange;

    use super::*;

    /// Takes a while for each operation, and then either finishes or panics.
    struct SlowEngine {
        under_way: VecDeque<(Instant, Operation)>,
        panics: bool,
        told: Arc<Mutex<Option<CommError>>>,
    }

    impl Engine for SlowEngine {
        fn start(&mut self, operation: Operation) {
            self.under_way.push_back((Instant::now(), operation));
        }

        fn set_groups(&mut self, _groups: &Arc<Vec<Vec<usize>>>) {}

        fn skip(&mut self, _channel: Channel) {}

        fn poll(&mut self, finished: &mut Vec<(Instant, Finished)>) -> Result<(), CommError> {
            let Some((begin, operation)) = self.under_way.pop_front() else { return Ok(()) };
            std::thread::sleep(Duration::from_millis(10));
            assert!(!self.panics, "the engine breaks");
            finished.push(match operation {
                Operation::AllToAll { index, exchange, .. } => (begin, Finished::all_to_all(index, exchange, 0)),
                Operation::AllReduce(reduction) => (begin, Finished::AllReduce(reduction)),
                Operation::Control(values) => (begin, Finished::Control(values)),
            });
            Ok(())
        }

        fn fail(&mut self, failure: CommError) {
            *self.told.lock().unwrap() = Some(failure);
        }
    }

    fn port(panics: bool) -> (ThreadedPort, Arc<Mutex<Option<CommError>>>) {
        let told = Arc::new(Mutex::new(None));
        let engine = {
            let told = Arc::clone(&told);
            move || Ok(SlowEngine { under_way: VecDeque::new(), panics, told })
        };
        (ThreadedPort::start(config(), Arc::new(Mailbox::new()), engine).unwrap(), told)
    }

    fn config() -> ThreadConfig {
        let groups = Arc::new(vec![vec![0, 1]]);
        ThreadConfig { rank: 0, epoch: Instant::now(), groups, log_launches: false, delays: None }
    }

    fn begin_step(port: &mut ThreadedPort) {
        let rules = PolicyRules::new(Policy::Lina, &PolicySettings::default());
        port.submit(Submission::BeginStep { step: 0, rules, plan: GapPlan::default() }).unwrap();
    }

    fn exchange(chunk: u32) -> AnyExchange {
        let kind = AllToAllKind { direction: Direction::Backward, leg: Leg::Combine, layer: 0, chunk, chunks: 3 };
        let (elements, values) = (vec![1; 2], vec![0.0; 2]);
        let (send_elements, send) = (elements.clone(), values.clone());
        AnyExchange::Host(Exchange { kind, send, send_elements, recv: values, recv_elements: elements })
    }

    #[test]
    fn pipelined_all_to_alls_are_timed_one_after_another() {
        let (mut port, _) = port(false);
        begin_step(&mut port);
        port.record(true);
        for chunk in 0..3 {
            port.submit(Submission::AllToAll(exchange(chunk))).unwrap();
        }
        for index in 0..3 {
            port.wait_all_to_all(index).unwrap();
        }
        let stats = port.end_step();
        assert!(stats.all_to_all >= 30_000_000 && stats.all_to_all <= stats.step, "{stats:?}");
        let spans = port.record(false);
        assert_eq!(spans.len(), 3);
        assert!(spans.windows(2).all(|pair| pair[0].end <= pair[1].start), "{spans:?}");
    }

    #[test]
    fn an_engine_that_panics_fails_this_rank_and_tells_the_others() {
        let (mut port, told) = port(true);
        begin_step(&mut port);
        port.submit(Submission::AllToAll(exchange(0))).unwrap();
        let failure = port.wait_all_to_all(0).unwrap_err();
        assert_eq!(failure.to_string(), "rank 0 failed: its communication panicked: the engine breaks");
        drop(port);
        assert_eq!(*told.lock().unwrap(), Some(failure));
    }

    /// Gives exchanges back as soon as they are launched, and finishes them when it is told.
    #[derive(Default)]
    struct EarlyEngine {
        launched: Vec<(u32, AnyExchange, Hold)>,
        under_way: VecDeque<(Instant, u32, AllToAllKind)>,
        held: Arc<AtomicBool>,
        complete: Arc<AtomicBool>,
        /// How many were under way at its end.
        left_under_way: Arc<Mutex<Option<usize>>>,
    }

    impl Drop for EarlyEngine {
        fn drop(&mut self) {
            *self.left_under_way.lock().unwrap() = Some(self.under_way.len());
        }
    }

    impl Engine for EarlyEngine {
        fn start(&mut self, operation: Operation) {
            let Operation::AllToAll { index, exchange, .. } = operation else { panic!("only all-to-alls are started") };
            self.under_way.push_back((Instant::now(), index, exchange.kind()));
            let held = Arc::clone(&self.held);
            self.launched.push((index, exchange, Box::new(move |_| held.store(true, Ordering::Relaxed))));
        }

        fn set_groups(&mut self, _groups: &Arc<Vec<Vec<usize>>>) {}

        fn skip(&mut self, _channel: Channel) {}

        fn poll(&mut self, finished: &mut Vec<(Instant, Finished)>) -> Result<(), CommError> {
            if self.complete.load(Ordering::Relaxed)
                && let Some((begin, index, kind)) = self.under_way.pop_front()
            {
                finished.push((begin, Finished::AllToAll { index, kind, sent_bytes: 8, exchange: None }));
            }
            Ok(())
        }

        fn take_launched(&mut self) -> Vec<(u32, AnyExchange, Hold)> {
            std::mem::take(&mut self.launched)
        }

        fn patience(&mut self) -> Duration {
            Duration::from_millis(1)
        }

        fn fail(&mut self, _failure: CommError) {}
    }

    #[test]
    fn an_exchange_that_a_device_carries_out_comes_back_early_and_counts_when_it_is_complete() {
        let engine = EarlyEngine::default();
        let [held, complete] = [&engine.held, &engine.complete].map(Arc::clone);
        let left_under_way = Arc::clone(&engine.left_under_way);
        let mut port = ThreadedPort::start(config(), Arc::new(Mailbox::new()), || Ok(engine)).unwrap();
        begin_step(&mut port);
        for chunk in 0..2 {
            port.submit(Submission::AllToAll(exchange(chunk))).unwrap();
        }
        let back = port.wait_all_to_all(1).unwrap();
        assert!(back.kind().chunk == 1 && held.load(Ordering::Relaxed));
        port.wait_all_to_all(0).unwrap();
        assert_eq!(port.stats().all_to_all_bytes, 0, "neither is complete");
        complete.store(true, Ordering::Relaxed);
        let deadline = Instant::now() + Duration::from_secs(10);
        while port.stats().all_to_all_bytes < 16 {
            assert!(Instant::now() < deadline, "{:?}", port.stats());
            std::thread::sleep(Duration::from_millis(1));
        }
        // The next step waits for what is left of this one, and so does the end.
        complete.store(false, Ordering::Relaxed);
        port.submit(Submission::AllToAll(exchange(2))).unwrap();
        port.wait_all_to_all(2).unwrap();
        begin_step(&mut port);
        port.submit(Submission::AllToAll(exchange(0))).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(port.mailbox.lock().exchanges.is_empty(), "the next step has not begun");
        complete.store(true, Ordering::Relaxed);
        port.wait_all_to_all(0).unwrap();
        // What a step's statistics lack at its end would be nowhere.
        port.end_step();
        begin_step(&mut port);
        port.submit(Submission::AllToAll(exchange(0))).unwrap();
        port.wait_all_to_all(0).unwrap();
        assert_eq!(port.end_step().all_to_all_bytes, 8);
        port.check().unwrap();
        drop(port);
        assert_eq!(*left_under_way.lock().unwrap(), Some(0));
    }

    /// Has an all-to-all complete at the moment at which what comes after it is ready.
    struct ReadyWhenComplete(Arc<AtomicBool>);

    impl Ready for ReadyWhenComplete {
        fn is_ready(&mut self) -> Result<bool, String> {
            self.0.store(true, Ordering::Relaxed);
            Ok(true)
        }
    }

    #[test]
    fn the_brain_hears_of_an_all_to_all_before_it_hears_of_what_came_after() {
        let engine = EarlyEngine::default();
        let complete = Arc::clone(&engine.complete);
        let mut port = ThreadedPort::start(config(), Arc::new(Mailbox::new()), || Ok(engine)).unwrap();
        begin_step(&mut port);
        port.submit(Submission::AllToAll(exchange(0))).unwrap();
        port.wait_all_to_all(0).unwrap();
        let ready = Some(Box::new(ReadyWhenComplete(complete)) as Box<dyn Ready>);
        port.mailbox.lock().submissions.push_back(Posted { submission: Submission::AllToAll(exchange(1)), ready });
        port.submit(Submission::Flush).unwrap();
        port.wait_all_to_all(1).unwrap();
        port.wait_gradients().unwrap();
        let windows = port.timings().windows;
        assert!(windows[1] > 0.0, "the gap between the two has a length: {windows:?}");
    }

    #[test]
    fn a_failure_is_known_before_anything_else_is_handed_over() {
        let (port, _) = port(false);
        port.check().unwrap();
        port.mailbox.fail(CommError::left(1));
        assert_eq!(port.check(), Err(CommError::left(1)));
    }

    #[test]
    fn an_engine_that_cannot_be_built_is_a_failure() {
        let failure = CommError::RankFailed { rank: 0, reason: "there is no network".to_owned() };
        let engine = {
            let failure = failure.clone();
            move || Err::<SlowEngine, _>(failure)
        };
        let mut port = ThreadedPort::start(config(), Arc::new(Mailbox::new()), engine).unwrap();
        assert_eq!(port.wait_control(), Err(failure));
    }
}
