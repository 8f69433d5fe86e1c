//! The loop that serves requests: it asks the brain what to feed, has the backend compute it, and hands out tokens.
//!
//! Requests come from any thread through an [`EngineHandle`] and get their tokens through a [`TokenStream`] each. The
//! loop owns everything else and runs on the thread of the rank that leads the job ([`serve_requests`]), or on one of its
//! own ([`start_engine`]). What is fed when is decided by [`Batcher`].

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc as blocking};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use lina_plan::{BatchLimits, BatchStep, Batcher, SequenceFeed};
use serde::Serialize;
use tokio::sync::mpsc;

use crate::{
    Admission, Backend, BackendLimits, ExpertActivity, Feed, InferError, Sampled, Sampling, SequenceId, StepPlan,
};

/// How often the experts' load is copied for [`EngineHandle::status`] while steps follow each other.
const ACTIVITY_EVERY: Duration = Duration::from_millis(100);

/// How much the engine takes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Most requests that wait besides those that run; the next one is refused.
    pub max_queue: usize,
    /// Most sequences that run at once, on all ranks together; at least 1.
    pub max_running: usize,
    /// With nothing to do, an empty step is sent after this time: ranks take one that is silent for dead.
    pub keep_alive: Duration,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions { max_queue: 256, max_running: 64, keep_alive: Duration::from_secs(2) }
    }
}

/// What is to be generated.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// Token ids; at least one.
    pub prompt: Vec<u32>,
    /// Longest answer. It also ends where the model has no more positions, or a rank no more pages for one sequence.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end the answer and are no part of it: a model's end-of-text tokens.
    pub stop_tokens: Vec<u32>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// One of the stop tokens came.
    Stop,
    /// The answer is as long as it may be.
    Length,
}

/// What a [`TokenStream`] yields: tokens, then one of the other two.
#[derive(Clone, Debug, PartialEq)]
pub enum GenerateEvent {
    /// The answer's next token.
    Token(GeneratedToken),
    /// The answer is complete.
    Finished(FinishReason),
    /// It will not be completed; one sentence.
    Failed(String),
}

/// A token of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct GeneratedToken {
    /// The token.
    pub token: u32,
    /// As in [`Sampled::logprob`].
    pub logprob: f32,
    /// As in [`Sampled::top`].
    pub top: Vec<(u32, f32)>,
    /// When it was chosen, which whoever reads it may see later.
    pub at: Instant,
}

/// Why a request is not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Rejection {
    /// As many requests wait as may wait.
    #[error("{waiting} requests are being served or wait, no more are taken; try again later")]
    QueueFull {
        /// Requests that run or wait.
        waiting: usize,
    },
    /// The prompt leaves no room for an answer.
    #[error("the prompt has {tokens} tokens, expected at most {limit}")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Longest prompt.
        limit: usize,
    },
    /// No token to begin with.
    #[error("the prompt has no tokens, expected at least one")]
    EmptyPrompt,
    /// A token that the model does not have.
    #[error("the prompt has token id {token}, expected ids below {vocab}")]
    TokenOutOfRange {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A sampling parameter out of its range; one sentence.
    #[error("{0}")]
    Sampling(String),
    /// [`EngineHandle::shut_down`] has been called.
    #[error("the server is shutting down and takes no more requests")]
    ShuttingDown,
    /// The engine has failed; one sentence says why.
    #[error("{0}")]
    Failed(String),
}

/// Figures of the engine, since its start unless they say otherwise.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineStatus {
    /// Sequences that run now.
    pub running: usize,
    /// Requests that wait now.
    pub queued: usize,
    /// Steps that fed something.
    pub steps: u64,
    /// Tokens of prompts that were fed.
    pub prompt_tokens: u64,
    /// Tokens that were chosen.
    pub generated_tokens: u64,
    /// Requests whose answers are complete.
    pub finished_requests: u64,
    /// Requests whose readers went away first.
    pub cancelled_requests: u64,
    /// How long the last step took that fed something.
    pub last_step_us: u64,
    /// Sequences in it.
    pub last_step_sequences: usize,
    /// Tokens in it.
    pub last_step_tokens: usize,
    /// Pages set aside for running sequences now, on all ranks together.
    pub kv_pages_used: usize,
    /// Pages that there are.
    pub kv_pages_total: usize,
    /// Load of the experts; a tenth of a second old at most.
    pub activity: ExpertActivity,
    /// Why the engine has failed, if it has.
    pub failed: Option<String>,
}

/// What the two ends share.
#[derive(Debug)]
struct Shared {
    limits: BackendLimits,
    options: EngineOptions,
    /// Requests that wait or run.
    in_flight: AtomicUsize,
    door: Mutex<Door>,
    /// Notified when the door changes.
    changed: Condvar,
    status: Mutex<EngineStatus>,
}

#[derive(Debug, Default)]
struct Door {
    arrived: VecDeque<Arrived>,
    shutting_down: bool,
    ended: bool,
}

/// Values behind these locks are whole after every statement, so a thread that panicked has left nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn failure(&self) -> Option<String> {
        lock(&self.status).failed.clone()
    }

    /// No request is taken from now on; those that have arrived find their streams ended.
    fn end(&self, failure: Option<String>) {
        {
            let mut status = lock(&self.status);
            status.failed = failure;
            (status.running, status.queued) = (0, 0);
        }
        let mut door = lock(&self.door);
        door.ended = true;
        let arrived = std::mem::take(&mut door.arrived);
        drop(door);
        drop(arrived);
        self.changed.notify_all();
    }
}

/// A request's place among those that may wait or run.
#[derive(Debug)]
struct Place(Arc<Shared>);

impl Place {
    fn take(shared: &Arc<Shared>) -> Result<Place, Rejection> {
        let EngineOptions { max_queue, max_running, .. } = shared.options;
        let most = max_queue.saturating_add(max_running);
        let one_more = |waiting: usize| (waiting < most).then_some(waiting + 1);
        match shared.in_flight.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more) {
            Ok(_) => Ok(Place(Arc::clone(shared))),
            Err(waiting) => Err(Rejection::QueueFull { waiting }),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request on its way to its answer.
#[derive(Debug)]
struct Arrived {
    request: GenerateRequest,
    events: mpsc::UnboundedSender<GenerateEvent>,
    _place: Place,
}

/// Where requests go in. Clones lead to the same engine.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    shared: Arc<Shared>,
}

/// Where they come out; for [`serve_requests`]. The engine has ended when it is dropped.
#[derive(Debug)]
pub struct Inbox {
    shared: Arc<Shared>,
}

/// The two ends of an engine whose backend has `limits`.
pub fn engine_channel(options: EngineOptions, limits: BackendLimits) -> (EngineHandle, Inbox) {
    let options = EngineOptions { max_running: options.max_running.max(1), ..options };
    let status = EngineStatus { kv_pages_total: limits.ranks * limits.pages_per_rank, ..EngineStatus::default() };
    let shared = Arc::new(Shared {
        limits,
        options,
        in_flight: AtomicUsize::new(0),
        door: Mutex::default(),
        changed: Condvar::new(),
        status: Mutex::new(status),
    });
    (EngineHandle { shared: Arc::clone(&shared) }, Inbox { shared })
}

/// Starts an engine on a thread of its own, where its backend is built: it need not be `Send`.
///
/// # Errors
/// If the backend cannot be built, or no thread started.
pub fn start_engine<B: Backend>(
    build: impl FnOnce() -> Result<B, InferError> + Send + 'static,
    options: EngineOptions,
) -> Result<EngineHandle, InferError> {
    let (send, built) = blocking::channel();
    let run = move || {
        let mut backend = match build() {
            Ok(backend) => backend,
            Err(error) => return drop(send.send(Err(error))),
        };
        let (handle, inbox) = engine_channel(options, backend.limits());
        if send.send(Ok(handle)).is_ok() {
            // Whoever submitted something has been told of an error, and so is whoever asks for the status.
            let _ = serve_requests(&mut backend, inbox);
        }
    };
    let thread = std::thread::Builder::new()
        .name("lina-engine".into())
        .spawn(run)
        .map_err(|error| InferError::Input(format!("the engine's thread does not start: {error}")))?;
    match built.recv() {
        Ok(result) => result,
        Err(_) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!("the thread sends a result before it ends"),
        },
    }
}

impl EngineHandle {
    /// What the backend can take.
    pub fn limits(&self) -> BackendLimits {
        self.shared.limits
    }

    /// Longest sequence, prompt and answer together, in tokens.
    pub fn max_sequence_tokens(&self) -> usize {
        let BackendLimits { max_positions, page_tokens, pages_per_rank, .. } = self.shared.limits;
        max_positions.min(page_tokens.saturating_mul(pages_per_rank))
    }

    /// Hands a request in.
    ///
    /// # Errors
    /// See [`Rejection`].
    pub fn submit(&self, mut request: GenerateRequest) -> Result<TokenStream, Rejection> {
        let vocab = self.shared.limits.vocab;
        if let Some(&token) = request.prompt.iter().find(|&&token| token as usize >= vocab) {
            return Err(Rejection::TokenOutOfRange { token, vocab });
        }
        let (tokens, longest) = (request.prompt.len(), self.max_sequence_tokens());
        if tokens == 0 {
            return Err(Rejection::EmptyPrompt);
        }
        if tokens >= longest {
            return Err(Rejection::PromptTooLong { tokens, limit: longest.saturating_sub(1) });
        }
        request.sampling.check().map_err(Rejection::Sampling)?;
        request.max_new_tokens = request.max_new_tokens.min(longest - tokens);
        let (events, receiver) = mpsc::unbounded_channel();
        let stream = TokenStream { events: receiver, shared: Arc::clone(&self.shared), ended: false };
        let mut door = lock(&self.shared.door);
        if door.ended || door.shutting_down {
            drop(door);
            return Err(self.shared.failure().map_or(Rejection::ShuttingDown, Rejection::Failed));
        }
        if request.max_new_tokens == 0 {
            // Cannot fail: the receiver is in `stream`.
            let _ = events.send(GenerateEvent::Finished(FinishReason::Length));
            return Ok(stream);
        }
        door.arrived.push_back(Arrived { request, events, _place: Place::take(&self.shared)? });
        drop(door);
        self.shared.changed.notify_all();
        Ok(stream)
    }

    /// Figures of the engine.
    pub fn status(&self) -> EngineStatus {
        lock(&self.shared.status).clone()
    }

    /// No new requests are taken; those that run or wait are served, then the engine ends.
    pub fn shut_down(&self) {
        lock(&self.shared.door).shutting_down = true;
        self.shared.changed.notify_all();
    }

    /// Waits until the engine has ended.
    pub fn wait(&self) {
        let door = lock(&self.shared.door);
        drop(self.shared.changed.wait_while(door, |door| !door.ended).unwrap_or_else(PoisonError::into_inner));
    }
}

/// The answer to one request, token by token. Dropped before its end, it cancels the request: the next step releases
/// what was set aside for it.
#[derive(Debug)]
pub struct TokenStream {
    events: mpsc::UnboundedReceiver<GenerateEvent>,
    shared: Arc<Shared>,
    ended: bool,
}

impl TokenStream {
    /// Waits for the next event; `None` after [`GenerateEvent::Finished`] or [`GenerateEvent::Failed`]. Blocks the
    /// thread: asynchronous code calls [`TokenStream::next`].
    pub fn recv(&mut self) -> Option<GenerateEvent> {
        if self.ended {
            return None;
        }
        let event = self.events.blocking_recv();
        Some(self.note(event))
    }

    /// As [`TokenStream::recv`], in asynchronous code of any runtime.
    pub async fn next(&mut self) -> Option<GenerateEvent> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// As [`TokenStream::next`], for implementations of streams.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<GenerateEvent>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.events.poll_recv(context).map(|event| Some(self.note(event)))
    }

    /// An engine that ends before an answer does closes the answer's channel.
    fn note(&mut self, event: Option<GenerateEvent>) -> GenerateEvent {
        let failure = || self.shared.failure().unwrap_or_else(|| "the engine has ended".into());
        let event = event.unwrap_or_else(|| GenerateEvent::Failed(failure()));
        self.ended = !matches!(event, GenerateEvent::Token(_));
        event
    }
}

/// Serves the requests of `inbox` until [`EngineHandle::shut_down`] is called and all are answered.
///
/// # Errors
/// If a step fails. Open streams then end with [`GenerateEvent::Failed`], and so does every later request.
pub fn serve_requests<B: Backend>(backend: &mut B, inbox: Inbox) -> Result<(), InferError> {
    let BackendLimits { ranks, page_tokens, pages_per_rank, step_tokens_per_rank, .. } = inbox.shared.limits;
    let max_running = inbox.shared.options.max_running;
    let limits = BatchLimits { ranks, page_tokens, pages_per_rank, step_tokens_per_rank, max_running };
    let mut serving = Serving {
        inbox,
        backend,
        batcher: Batcher::new(limits),
        requests: HashMap::new(),
        next_request: 0,
        activity_at: None,
    };
    let result = serving.run();
    serving.inbox.shared.end(result.as_ref().err().map(ToString::to_string));
    result
}

impl Inbox {
    /// Requests that have arrived, and whether no more will; waits up to `patience` for either.
    fn take(&self, patience: Duration) -> (VecDeque<Arrived>, bool) {
        let nothing = |door: &mut Door| door.arrived.is_empty() && !door.shutting_down;
        let door = lock(&self.shared.door);
        let waited = self.shared.changed.wait_timeout_while(door, patience, nothing);
        let (mut door, _) = waited.unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut door.arrived), door.shutting_down)
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        if !lock(&self.shared.door).ended {
            let why = if std::thread::panicking() { "has stopped because of a bug" } else { "was never started" };
            self.shared.end(Some(format!("the engine {why}")));
        }
    }
}

/// A request that waits in the batcher or runs.
#[derive(Debug)]
struct Active {
    arrived: Arrived,
    /// The token that is fed next, once the prompt has been.
    last_token: u32,
}

/// The loop's state. The inbox is dropped first, so that streams find out why before they end.
struct Serving<'a, B> {
    inbox: Inbox,
    backend: &'a mut B,
    batcher: Batcher,
    requests: HashMap<u64, Active>,
    next_request: u64,
    /// When the experts' load was last published.
    activity_at: Option<Instant>,
}

impl<B: Backend> Serving<'_, B> {
    fn run(&mut self) -> Result<(), InferError> {
        loop {
            let patience = if self.batcher.is_idle() {
                self.publish_activity();
                self.inbox.shared.options.keep_alive
            } else {
                Duration::ZERO
            };
            let (arrived, shutting_down) = self.inbox.take(patience);
            arrived.into_iter().for_each(|arrived| self.enqueue(arrived));
            self.drop_cancelled();
            if shutting_down && self.batcher.is_idle() {
                self.publish_activity();
                return Ok(());
            }
            self.step()?;
        }
    }

    fn enqueue(&mut self, arrived: Arrived) {
        let number = self.next_request;
        self.next_request += 1;
        let GenerateRequest { prompt, max_new_tokens, .. } = &arrived.request;
        match self.batcher.enqueue(number, prompt.len(), *max_new_tokens) {
            Ok(()) => drop(self.requests.insert(number, Active { arrived, last_token: 0 })),
            // `submit` has cut every request to what a rank can hold, so this is for whoever changes it. A reader that
            // is gone need not know.
            Err(refused) => {
                let (pages, has) = (refused.pages, refused.pages_per_rank);
                let sentence = format!("the request needs {pages} pages of keys and values, a rank has {has}");
                drop(arrived.events.send(GenerateEvent::Failed(sentence)));
            }
        }
    }

    fn drop_cancelled(&mut self) {
        let gone: Vec<u64> =
            self.requests.extract_if(|_, it| it.arrived.events.is_closed()).map(|(id, _)| id).collect();
        self.note_cancelled(&gone);
    }

    fn note_cancelled(&mut self, requests: &[u64]) {
        requests.iter().for_each(|&request| self.batcher.end(request));
        lock(&self.inbox.shared.status).cancelled_requests += requests.len() as u64;
    }

    /// One step of the backend, and its tokens to their readers.
    fn step(&mut self) -> Result<(), InferError> {
        let decided = self.batcher.next_step();
        let plan = self.plan(&decided);
        let begin = Instant::now();
        let output = self.backend.step(&plan)?;
        let step_us = begin.elapsed().as_micros() as u64;
        let feeds: Vec<&SequenceFeed> = decided.feeds.iter().filter(|feed| feed.sample).collect();
        if output.sampled.len() != feeds.len() {
            let (found, expected) = (output.sampled.len(), feeds.len());
            return Err(InferError::Input(format!("a step chose {found} tokens, expected {expected}")));
        }
        self.note_step(&decided, feeds.len(), step_us);
        for (feed, sampled) in feeds.into_iter().zip(output.sampled) {
            self.deliver(feed, sampled);
        }
        let mut status = lock(&self.inbox.shared.status);
        status.running = self.batcher.running();
        status.queued = self.batcher.queued();
        status.kv_pages_used = self.batcher.used_pages();
        drop(status);
        if self.activity_at.is_none_or(|at| at.elapsed() >= ACTIVITY_EVERY) {
            self.publish_activity();
        }
        Ok(())
    }

    fn plan(&self, decided: &BatchStep) -> StepPlan {
        let admission = |it: &lina_plan::AdmittedSequence| {
            let request = &self.requests[&it.request].arrived.request;
            Admission {
                id: SequenceId(it.slot),
                rank: it.rank,
                pages: it.pages,
                sampling: request.sampling.clone(),
                prompt_tokens: request.prompt.len(),
            }
        };
        let feed = |it: &SequenceFeed| {
            let active = &self.requests[&it.request];
            let prompt = &active.arrived.request.prompt;
            let tokens = match prompt.get(it.start..it.start + it.tokens) {
                Some(piece) => piece.to_vec(),
                None => vec![active.last_token],
            };
            Feed { id: SequenceId(it.slot), tokens, sample: it.sample }
        };
        StepPlan {
            released: decided.released.iter().map(|&slot| SequenceId(slot)).collect(),
            admitted: decided.admitted.iter().map(admission).collect(),
            feeds: decided.feeds.iter().map(feed).collect(),
        }
    }

    fn note_step(&self, decided: &BatchStep, sampled: usize, step_us: u64) {
        if decided.feeds.is_empty() {
            return;
        }
        let prompt_tokens = |feed: &SequenceFeed| {
            let prompt = self.requests[&feed.request].arrived.request.prompt.len();
            feed.tokens.min(prompt.saturating_sub(feed.start))
        };
        let mut status = lock(&self.inbox.shared.status);
        status.steps += 1;
        status.prompt_tokens += decided.feeds.iter().map(prompt_tokens).sum::<usize>() as u64;
        status.generated_tokens += sampled as u64;
        status.last_step_us = step_us;
        status.last_step_sequences = decided.feeds.len();
        status.last_step_tokens = decided.feeds.iter().map(|feed| feed.tokens).sum();
    }

    fn deliver(&mut self, feed: &SequenceFeed, sampled: Sampled) {
        let Some(active) = self.requests.get_mut(&feed.request) else { return };
        let Sampled { token, logprob, top, .. } = sampled;
        let Arrived { request, events, .. } = &active.arrived;
        let stops = request.stop_tokens.contains(&token);
        active.last_token = token;
        let mut delivered = true;
        if !stops {
            delivered =
                events.send(GenerateEvent::Token(GeneratedToken { token, logprob, top, at: Instant::now() })).is_ok();
        }
        if stops || feed.last {
            let reason = if stops { FinishReason::Stop } else { FinishReason::Length };
            delivered &= events.send(GenerateEvent::Finished(reason)).is_ok();
        }
        if !delivered {
            self.requests.remove(&feed.request);
            self.note_cancelled(&[feed.request]);
        } else if stops || feed.last {
            self.requests.remove(&feed.request);
            self.batcher.end(feed.request);
            lock(&self.inbox.shared.status).finished_requests += 1;
        }
    }

    fn publish_activity(&mut self) {
        let activity = self.backend.activity();
        lock(&self.inbox.shared.status).activity = activity;
        self.activity_at = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StepOutput;
    use std::collections::BTreeMap;
    use std::sync::atomic::AtomicBool;

    const LIMITS: BackendLimits = BackendLimits {
        vocab: 100,
        max_positions: 40,
        ranks: 2,
        page_tokens: 4,
        pages_per_rank: 12,
        step_tokens_per_rank: 8,
    };

    /// The token that follows some others.
    fn follower(tokens: &[u32]) -> u32 {
        tokens.iter().fold(7, |hash: u32, &token| hash.wrapping_mul(31).wrapping_add(token)) % LIMITS.vocab as u32
    }

    /// The answer to a prompt.
    fn answer(prompt: &[u32], tokens: usize) -> Vec<u32> {
        let mut all = prompt.to_vec();
        (0..tokens).for_each(|_| all.push(follower(&all)));
        all.split_off(prompt.len())
    }

    /// A function of the tokens so far, that holds plans to their limits.
    #[derive(Default)]
    struct StandIn {
        held: BTreeMap<SequenceId, (Admission, Vec<u32>)>,
        empty_steps: Arc<AtomicUsize>,
        /// No step begins while this is set.
        paused: Arc<AtomicBool>,
        fails_at: Option<u32>,
    }

    impl Backend for StandIn {
        fn limits(&self) -> BackendLimits {
            LIMITS
        }

        fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, InferError> {
            while self.paused.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            for id in &plan.released {
                assert!(self.held.remove(id).is_some());
            }
            for admission in &plan.admitted {
                assert!(self.held.insert(admission.id, (admission.clone(), Vec::new())).is_none());
            }
            self.empty_steps.fetch_add(usize::from(plan.feeds.is_empty()), Ordering::Relaxed);
            let mut output = StepOutput::default();
            for feed in &plan.feeds {
                let (admission, tokens) = self.held.get_mut(&feed.id).unwrap();
                tokens.extend(&feed.tokens);
                assert!(tokens.len() <= admission.pages * LIMITS.page_tokens);
                assert_eq!(feed.sample, tokens.len() >= admission.prompt_tokens);
                if self.fails_at.is_some_and(|token| tokens.contains(&token)) {
                    return Err(InferError::Input("rank 1 is lost".into()));
                }
                if feed.sample {
                    let (token, logprob) = (follower(tokens), -0.5);
                    output.sampled.push(Sampled { id: feed.id, token, logprob, top: vec![(token, logprob)] });
                }
            }
            Ok(output)
        }

        fn activity(&self) -> ExpertActivity {
            ExpertActivity { checks: 3, ..ExpertActivity::default() }
        }
    }

    fn request(prompt: &[u32], max_new_tokens: usize) -> GenerateRequest {
        GenerateRequest { prompt: prompt.to_vec(), max_new_tokens, sampling: Sampling::default(), stop_tokens: vec![] }
    }

    fn start(backend: impl FnOnce(&mut StandIn) + Send + 'static, options: EngineOptions) -> EngineHandle {
        let build = || {
            let mut stand_in = StandIn::default();
            backend(&mut stand_in);
            Ok(stand_in)
        };
        start_engine(build, options).unwrap()
    }

    /// Tokens of a stream, and how it ended.
    fn read(mut stream: TokenStream) -> (Vec<u32>, GenerateEvent) {
        let mut tokens = Vec::new();
        while let Some(event) = stream.recv() {
            match event {
                GenerateEvent::Token(it) => tokens.push(it.token),
                end => {
                    assert_eq!(stream.recv(), None);
                    return (tokens, end);
                }
            }
        }
        panic!("a stream says how it ends")
    }

    /// Waits until the engine's figures are as expected.
    fn wait_for(handle: &EngineHandle, what: impl Fn(&EngineStatus) -> bool) -> EngineStatus {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let status = handle.status();
            if what(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "{status:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn many_requests_get_the_answers_that_each_gets_alone() {
        let handle = start(|_| (), EngineOptions { max_running: 7, ..EngineOptions::default() });
        let prompts: Vec<Vec<u32>> = (1..60).map(|n| (0..1 + n % 20).map(|i| (n * i) as u32 % 100).collect()).collect();
        let streams: Vec<_> =
            prompts.iter().map(|prompt| handle.submit(request(prompt, 1 + prompt.len() % 13)).unwrap()).collect();
        for (prompt, stream) in prompts.iter().zip(streams) {
            let expected = answer(prompt, 1 + prompt.len() % 13);
            assert_eq!(read(stream), (expected, GenerateEvent::Finished(FinishReason::Length)));
        }
        handle.shut_down();
        handle.wait();
        let status = handle.status();
        assert_eq!((status.running, status.queued, status.finished_requests), (0, 0, 59));
        assert_eq!(status.prompt_tokens, prompts.iter().map(|prompt| prompt.len() as u64).sum::<u64>());
        assert_eq!(status.generated_tokens, prompts.iter().map(|prompt| 1 + prompt.len() as u64 % 13).sum::<u64>());
        assert!(status.steps > 0 && status.kv_pages_total == 24 && status.failed.is_none());
        assert_eq!(status.activity.checks, 3);
        assert_eq!(handle.submit(request(&[1], 1)).unwrap_err(), Rejection::ShuttingDown);
    }

    #[test]
    fn an_answer_ends_at_its_stop_token_or_its_length() {
        let handle = start(|_| (), EngineOptions::default());
        let expected = answer(&[1, 2, 3], 37);
        let stop = expected[5];
        let first = expected.iter().position(|&token| token == stop).unwrap();
        let stops = GenerateRequest { stop_tokens: vec![stop], ..request(&[1, 2, 3], 30) };
        let end = |reason| GenerateEvent::Finished(reason);
        assert_eq!(read(handle.submit(stops).unwrap()), (expected[..first].to_vec(), end(FinishReason::Stop)));
        let none = read(handle.submit(request(&[1, 2, 3], 0)).unwrap());
        assert_eq!(none, (vec![], end(FinishReason::Length)));
        // As long as the model has positions.
        let longest = read(handle.submit(request(&[1, 2, 3], usize::MAX)).unwrap());
        assert_eq!(longest, (expected, end(FinishReason::Length)));
    }

    #[test]
    fn what_cannot_be_served_is_refused() {
        let handle = start(|_| (), EngineOptions::default());
        let refused = |request| handle.submit(request).unwrap_err();
        assert_eq!(refused(request(&[], 1)), Rejection::EmptyPrompt);
        assert_eq!(refused(request(&[1; 40], 1)), Rejection::PromptTooLong { tokens: 40, limit: 39 });
        assert_eq!(refused(request(&[1, 100], 1)), Rejection::TokenOutOfRange { token: 100, vocab: 100 });
        let sampling = Sampling { top_p: 2.0, ..Sampling::default() };
        let message = refused(GenerateRequest { sampling, ..request(&[1], 1) }).to_string();
        assert_eq!(message, "top_p is 2, expected a number from 0 to 1");
        assert_eq!(read(handle.submit(request(&[1; 39], 5)).unwrap()).0, answer(&[1; 39], 1));
    }

    #[test]
    fn a_full_queue_takes_no_more() {
        let paused = Arc::new(AtomicBool::new(true));
        let pause = Arc::clone(&paused);
        let options = EngineOptions { max_running: 2, max_queue: 3, ..EngineOptions::default() };
        let handle = start(|it| it.paused = pause, options);
        let streams: Vec<_> = (0..5).map(|n| handle.submit(request(&[n], 3)).unwrap()).collect();
        assert_eq!(handle.submit(request(&[1], 3)).unwrap_err(), Rejection::QueueFull { waiting: 5 });
        paused.store(false, Ordering::Relaxed);
        for (n, stream) in (0..).zip(streams) {
            assert_eq!(read(stream).0, answer(&[n], 3));
        }
        wait_for(&handle, |it| it.finished_requests == 5);
        assert_eq!(read(handle.submit(request(&[1], 3)).unwrap()).0, answer(&[1], 3));
    }

    #[test]
    fn a_reader_that_goes_away_frees_its_place() {
        let paused = Arc::new(AtomicBool::new(true));
        let pause = Arc::clone(&paused);
        let options = EngineOptions { max_running: 1, max_queue: 2, ..EngineOptions::default() };
        let handle = start(|it| it.paused = pause, options);
        // One that runs or is about to, and one that waits.
        let (running, queued) = (handle.submit(request(&[1], 39)), handle.submit(request(&[2], 39)));
        let last = handle.submit(request(&[3], 3)).unwrap();
        drop((running, queued));
        paused.store(false, Ordering::Relaxed);
        assert_eq!(read(last).0, answer(&[3], 3));
        let status = wait_for(&handle, |it| it.running == 0 && it.finished_requests == 1);
        assert_eq!((status.cancelled_requests, status.queued), (2, 0));
        assert!(status.generated_tokens < 39, "{status:?}");
        // In the middle of a step.
        paused.store(true, Ordering::Relaxed);
        let stream = handle.submit(request(&[1], 39)).unwrap();
        wait_for(&handle, |_| lock(&handle.shared.door).arrived.is_empty());
        drop(stream);
        paused.store(false, Ordering::Relaxed);
        wait_for(&handle, |it| it.cancelled_requests == 3 && it.running == 0);
    }

    #[test]
    fn asynchronous_readers_wait_too() {
        let handle = start(|_| (), EngineOptions::default());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut stream = handle.submit(request(&[4, 5], 6)).unwrap();
        let tokens = runtime.block_on(async {
            let mut tokens = Vec::new();
            while let Some(GenerateEvent::Token(it)) = stream.next().await {
                assert_eq!(it.top, [(it.token, it.logprob)]);
                tokens.push(it.token);
            }
            assert_eq!(stream.next().await, None);
            tokens
        });
        assert_eq!(tokens, answer(&[4, 5], 6));
    }

    #[test]
    fn ranks_hear_from_an_engine_with_nothing_to_do() {
        let empty_steps = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&empty_steps);
        let options = EngineOptions { keep_alive: Duration::from_millis(5), ..EngineOptions::default() };
        let handle = start(|it| it.empty_steps = count, options);
        let deadline = Instant::now() + Duration::from_secs(20);
        while empty_steps.load(Ordering::Relaxed) < 3 {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(handle.status().steps, 0);
        handle.shut_down();
        handle.wait();
    }

    #[test]
    fn a_lost_job_is_told_to_all() {
        let paused = Arc::new(AtomicBool::new(true));
        let pause = Arc::clone(&paused);
        let begin = |it: &mut StandIn| (it.paused, it.fails_at) = (pause, Some(99));
        let handle = start(begin, EngineOptions { max_running: 1, ..EngineOptions::default() });
        let streams = [99, 1].map(|token| handle.submit(request(&[token], 5)).unwrap());
        paused.store(false, Ordering::Relaxed);
        for stream in streams {
            assert_eq!(read(stream), (vec![], GenerateEvent::Failed("rank 1 is lost".into())));
        }
        handle.wait();
        assert_eq!(handle.submit(request(&[1], 5)).unwrap_err(), Rejection::Failed("rank 1 is lost".into()));
        assert_eq!(handle.status().failed.as_deref(), Some("rank 1 is lost"));
        // A second failure, of the loop itself.
        let handle =
            start(|it| it.held = BTreeMap::from([(SequenceId(0), (admission(), vec![]))]), EngineOptions::default());
        let (_, end) = read(handle.submit(request(&[1], 5)).unwrap());
        assert_eq!(end, GenerateEvent::Failed("the engine has stopped because of a bug".into()));
        handle.wait();
    }

    fn admission() -> Admission {
        Admission { id: SequenceId(0), rank: 0, pages: 1, sampling: Sampling::default(), prompt_tokens: 1 }
    }

    #[test]
    fn an_engine_that_never_runs_serves_nobody() {
        let build = || -> Result<StandIn, InferError> { Err(InferError::Input("no such model".into())) };
        assert_eq!(start_engine(build, EngineOptions::default()).unwrap_err().to_string(), "no such model");
        let (handle, inbox) = engine_channel(EngineOptions::default(), LIMITS);
        let stream = handle.submit(request(&[1], 5)).unwrap();
        drop(inbox);
        assert_eq!(read(stream), (vec![], GenerateEvent::Failed("the engine was never started".into())));
        handle.wait();
    }
}
