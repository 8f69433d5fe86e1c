//! The runtime's body: one communication thread a rank drives the brain and an engine; the compute thread hands its
//! submissions over and waits for results.
//!
//! The communication thread owns the engine's handles, which need not be `Send`: a `Send` builder makes the engine
//! on that thread. It sleeps whenever neither its compute thread nor its engine has news.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lina_plan::{GapTimings, Launch, Nanos};

use crate::comm::{Port, Submission};
use crate::delay::Delays;
use crate::driver::{Driver, Operation, Reduction};
use crate::recorder::ComputeClock;
use crate::wire::Channel;
use crate::{CommError, Exchange, Lane, Span, StepStats, Work};

/// An operation that an engine has finished. Operations of one class finish in the order in which they were started.
pub(crate) enum Finished {
    AllToAll { index: u32, exchange: Exchange },
    AllReduce(Reduction),
    Control(Vec<f64>),
}

/// What moves data between ranks. Starts operations without blocking and reports them when they are done.
pub(crate) trait Engine {
    /// Starts an operation.
    fn start(&mut self, operation: Operation);
    /// Counts an operation in which this rank takes no part.
    fn skip(&mut self, channel: Channel);
    /// Makes progress; appends what has finished, with the time since when all members were there.
    fn poll(&mut self, finished: &mut Vec<(Instant, Finished)>) -> Result<(), CommError>;
    /// Tells the other ranks that this one has failed.
    fn fail(&mut self, failure: CommError);
}

/// Where a rank's two threads meet.
pub(crate) struct Mailbox {
    state: Mutex<Mail>,
    for_comm: Condvar,
    for_compute: Condvar,
}

#[derive(Default)]
struct Mail {
    submissions: VecDeque<Submission>,
    /// The engine has news for the communication thread.
    poked: bool,
    closed: bool,
    failing: Option<CommError>,
    exchanges: VecDeque<(u32, Exchange)>,
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
        Mailbox { state: Mutex::default(), for_comm: Condvar::new(), for_compute: Condvar::new() }
    }

    /// Wakes the communication thread: its engine has news.
    pub(crate) fn poke(&self) {
        self.lock().poked = true;
        self.for_comm.notify_one();
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
    blocked: (Nanos, Nanos),
}

impl ThreadedPort {
    /// Starts the communication thread, which builds its engine itself.
    pub(crate) fn start<E: Engine>(
        config: ThreadConfig,
        mailbox: Arc<Mailbox>,
        engine: impl FnOnce() -> E + Send + 'static,
    ) -> std::io::Result<Self> {
        let (rank, epoch, delays) = (config.rank, config.epoch, config.delays);
        let mail = Arc::clone(&mailbox);
        let thread = std::thread::Builder::new()
            .name(format!("lina-comm-{rank}"))
            .spawn(move || CommThread::new(config, mail, engine()).run())?;
        let clock = ComputeClock::new(rank as u32, epoch);
        Ok(ThreadedPort { mailbox, thread: Some(thread), clock, rank, delays, works: 0, blocked: (0, 0) })
    }

    /// Blocks until `ready` yields, and returns how long that took.
    fn wait<R>(&mut self, mut ready: impl FnMut(&mut Mail) -> Option<R>) -> Result<(R, Nanos), CommError> {
        self.clock.end_work();
        let start = self.clock.now();
        let mut mail = self.mailbox.lock();
        loop {
            if let Some(result) = ready(&mut mail) {
                drop(mail);
                return Ok((result, self.clock.now() - start));
            }
            if let Some(failure) = &mail.failure {
                return Err(failure.clone());
            }
            mail = self.mailbox.for_compute.wait(mail).unwrap_or_else(|poisoned| poisoned.into_inner());
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
        Ok(())
    }

    fn submit(&mut self, submission: Submission) -> Result<(), CommError> {
        self.clock.end_work();
        let mut mail = self.mailbox.lock();
        if let Some(failure) = &mail.failure {
            return Err(failure.clone());
        }
        if let Submission::BeginStep { step, .. } = submission {
            self.clock.begin_step(step);
            self.blocked = (0, 0);
            mail.stats = StepStats::default();
        }
        if matches!(submission, Submission::Flush) {
            mail.gradients_finished = false;
        }
        mail.submissions.push_back(submission);
        drop(mail);
        self.mailbox.for_comm.notify_one();
        Ok(())
    }

    fn wait_all_to_all(&mut self, index: u32) -> Result<Exchange, CommError> {
        let (exchange, blocked) = self.wait(|mail| {
            let position = mail.exchanges.iter().position(|(done, _)| *done == index)?;
            mail.exchanges.remove(position).map(|(_, exchange)| exchange)
        })?;
        self.blocked.0 += blocked;
        Ok(exchange)
    }

    fn wait_gradients(&mut self) -> Result<(), CommError> {
        let ((), blocked) = self.wait(|mail| mail.gradients_finished.then_some(()))?;
        self.blocked.1 += blocked;
        Ok(())
    }

    fn wait_control(&mut self) -> Result<Vec<f64>, CommError> {
        let (sum, blocked) = self.wait(|mail| mail.control.take())?;
        self.blocked.1 += blocked;
        Ok(sum)
    }

    fn timings(&self) -> GapTimings {
        self.mailbox.lock().timings.clone()
    }

    fn end_step(&mut self) -> StepStats {
        let own = self.clock.end_step();
        let StepStats { step, compute, expert, .. } = own;
        let (all_to_all_blocked, all_reduce_blocked) = self.blocked;
        StepStats { step, compute, expert, all_to_all_blocked, all_reduce_blocked, ..self.mailbox.lock().stats }
    }

    fn record(&mut self, on: bool) -> Vec<Span> {
        let mut spans = self.clock.record(on);
        let mut mail = self.mailbox.lock();
        mail.recording = on;
        spans.append(&mut mail.spans);
        spans
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
            // A communication thread that panicked has told its mailbox; there is nobody else to tell.
            let _ = thread.join();
        }
    }
}

struct CommThread<E> {
    config: ThreadConfig,
    mailbox: Arc<Mailbox>,
    engine: E,
    driver: Driver,
    step: u64,
    finished: Vec<(Instant, Finished)>,
    submissions: VecDeque<Submission>,
}

/// How often a communication thread looks after its peers while it waits for them.
const LOOK_AROUND: Duration = Duration::from_millis(200);

impl<E: Engine> CommThread<E> {
    fn new(config: ThreadConfig, mailbox: Arc<Mailbox>, engine: E) -> Self {
        let mut driver = Driver::default();
        if config.log_launches {
            driver.log_launches();
        }
        CommThread { config, mailbox, engine, driver, step: 0, finished: Vec::new(), submissions: VecDeque::new() }
    }

    fn now(&self) -> Nanos {
        self.config.epoch.elapsed().as_nanos() as Nanos
    }

    fn run(mut self) {
        while let Some(busy) = self.round() {
            let mail = self.mailbox.lock();
            if !busy && mail.submissions.is_empty() && !mail.poked && !mail.closed && mail.failing.is_none() {
                drop(self.mailbox.for_comm.wait_timeout(mail, LOOK_AROUND));
            }
        }
    }

    /// Takes submissions, launches, polls. Returns whether anything happened, or `None` when all is over.
    fn round(&mut self) -> Option<bool> {
        let mut mail = self.mailbox.lock();
        mail.poked = false;
        std::mem::swap(&mut self.submissions, &mut mail.submissions);
        if let Some(failure) = mail.failing.take() {
            mail.failure = Some(failure.clone());
            drop(mail);
            self.engine.fail(failure);
            return Some(true);
        }
        if mail.closed && self.submissions.is_empty() {
            return None;
        }
        drop(mail);
        let started = Instant::now();
        let mut busy = !self.submissions.is_empty();
        while let Some(submission) = self.submissions.pop_front() {
            if let Submission::BeginStep { step, .. } = submission {
                self.step = step;
            }
            let now = self.now();
            self.driver.submit(now, submission);
        }
        let mut deciding = started.elapsed();
        self.launch();
        let mut finished = std::mem::take(&mut self.finished);
        let outcome = self.engine.poll(&mut finished);
        busy |= !finished.is_empty();
        let deciding_started = Instant::now();
        for (begin, finished) in finished.drain(..) {
            self.finish(begin, finished);
        }
        self.finished = finished;
        deciding += deciding_started.elapsed();
        self.launch();
        let mut mail = self.mailbox.lock();
        mail.stats.deciding_wall += deciding.as_nanos() as Nanos;
        if self.driver.gradients_finished() && !mail.gradients_finished && mail.submissions.is_empty() {
            mail.gradients_finished = true;
            mail.timings = self.driver.timings();
        }
        if self.config.log_launches {
            mail.log.extend(self.driver.take_log());
        }
        if let Err(failure) = outcome {
            mail.failure.get_or_insert(failure);
        }
        drop(mail);
        self.mailbox.for_compute.notify_all();
        Some(busy)
    }

    fn launch(&mut self) {
        while let Some(operation) = self.driver.next_operation() {
            match operation {
                Operation::AllReduce(reduction)
                    if !self.config.groups[reduction.group.0 as usize].contains(&self.config.rank) =>
                {
                    self.engine.skip(Channel::AllReduce);
                    let now = self.now();
                    self.driver.all_reduce_done(now, false);
                }
                operation => self.engine.start(operation),
            }
        }
    }

    fn finish(&mut self, begin: Instant, finished: Finished) {
        let end = self.now();
        let begin = begin.saturating_duration_since(self.config.epoch).as_nanos() as Nanos;
        let mut mail = self.mailbox.lock();
        let Mail { stats, spans, recording, exchanges, control, .. } = &mut *mail;
        let (lane, name, layer, part, bytes) = match &finished {
            Finished::AllToAll { exchange, .. } => {
                let kind = exchange.kind;
                let bytes = exchange.sent_bytes(self.config.rank);
                stats.exchanged(kind.direction, end - begin, 0, bytes);
                (Lane::AllToAll, kind.name(), Some(kind.layer), (kind.chunk, kind.chunks), bytes)
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
            Finished::AllToAll { index, exchange } => {
                exchanges.push_back((index, exchange));
                self.driver.all_to_all_done(end);
            }
            Finished::AllReduce(reduction) => {
                // The memory is the owner's again before anybody hears of it.
                drop(reduction);
                self.driver.all_reduce_done(end, true);
            }
            Finished::Control(sum) => *control = Some(sum),
        }
    }
}

impl<E> Drop for CommThread<E> {
    /// A communication thread that ends by panic must not leave its compute thread waiting.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let reason = "its communication thread panicked".to_owned();
            self.mailbox.lock().failure = Some(CommError::RankFailed { rank: self.config.rank, reason });
            self.mailbox.for_compute.notify_all();
        }
    }
}
