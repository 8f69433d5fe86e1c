//! What all requests share: the engine, the model's names and text, and the figures that are kept of them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lina_data::Tokenizer;
use lina_infer::{ChatTemplate, EngineHandle, GenerationConfig, InferError};
use serde::Serialize;

use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::options::{RequestDefaults, ServeOptions};

/// Longest time that a client is told to stay away.
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// A model as clients see it.
pub struct ServedModel {
    /// Names that requests may use; answers use the first. At least one.
    pub names: Vec<String>,
    /// Text to token ids and back.
    pub tokenizer: Tokenizer,
    /// How a conversation becomes a prompt, if the model says.
    pub chat_template: Option<ChatTemplate>,
    /// What requests that say nothing of them get.
    pub defaults: RequestDefaults,
}

impl ServedModel {
    /// The model in a Hugging Face folder: its tokenizer (bytes if it has none), chat template and settings.
    ///
    /// # Errors
    /// If there is no name, or a file is there and cannot be used.
    pub fn for_model_folder(folder: &Path, names: Vec<String>) -> Result<Self, InferError> {
        if names.is_empty() || names.iter().any(String::is_empty) {
            return Err(InferError::Input("a model's name is empty, expected at least a letter".into()));
        }
        let tokenizer = Tokenizer::for_model_folder(folder).map_err(InferError::input)?;
        let defaults = RequestDefaults::for_model(&GenerationConfig::for_model_folder(folder)?, &tokenizer);
        Ok(ServedModel { names, tokenizer, chat_template: ChatTemplate::for_model_folder(folder)?, defaults })
    }
}

/// What a server has done, once it has ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ServeSummary {
    /// Seconds between start and end.
    pub wall_s: f64,
    /// Requests whose answers were completed.
    pub finished_requests: u64,
    /// Requests whose clients went away first.
    pub cancelled_requests: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Tokens that were generated.
    pub generated_tokens: u64,
    /// Steps of the engine.
    pub steps: u64,
    /// Whether compute, links and copies are emulated.
    pub emulated: bool,
}

/// Shared by all connections.
pub(crate) struct Server {
    pub(crate) engine: EngineHandle,
    pub(crate) model: ServedModel,
    pub(crate) options: ServeOptions,
    pub(crate) metrics: Metrics,
    pub(crate) started: Instant,
    /// Unix time of the start, in seconds.
    pub(crate) created: u64,
    draining: AtomicBool,
}

impl Server {
    pub(crate) fn new(engine: EngineHandle, model: ServedModel, options: ServeOptions) -> Self {
        Server {
            engine,
            model,
            options,
            metrics: Metrics::default(),
            started: Instant::now(),
            created: unix_s(),
            draining: AtomicBool::new(false),
        }
    }

    /// Takes no new requests from now on.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        self.engine.shut_down();
    }

    /// Whether the server is about to end.
    pub(crate) fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// The name in answers.
    pub(crate) fn model_name(&self) -> &str {
        self.model.names.first().map_or("", String::as_str)
    }

    /// All names that requests may use, for a message.
    pub(crate) fn known_models(&self) -> String {
        let names: Vec<String> = self.model.names.iter().map(|name| format!("{name:?}")).collect();
        names.join(" or ")
    }

    /// When a client that was turned away may find a place: as long as the queue takes if requests go on to take what
    /// they have taken so far.
    pub(crate) fn retry_after(&self) -> Duration {
        let status = self.engine.status();
        let mean_s = self.metrics.request_seconds.mean().unwrap_or(1.0);
        let turns = status.queued as f64 / status.running.max(1) as f64;
        Duration::from_secs_f64((turns * mean_s).clamp(1.0, LONGEST_RETRY.as_secs_f64()))
    }

    /// Does what takes the processor a while, such as reading a long prompt, where other requests do not wait for it.
    pub(crate) async fn on_the_side<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Server) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let server = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || work(&server)).await;
        done.unwrap_or_else(|_| Err(ApiError::failed("a bug in the server")))
    }

    pub(crate) fn summary(&self) -> ServeSummary {
        let status = self.engine.status();
        ServeSummary {
            wall_s: self.started.elapsed().as_secs_f64(),
            finished_requests: status.finished_requests,
            cancelled_requests: status.cancelled_requests,
            prompt_tokens: status.prompt_tokens,
            generated_tokens: status.generated_tokens,
            steps: status.steps,
            emulated: status.activity.emulated,
        }
    }
}

/// Unix time in seconds; 0 on a clock before 1970.
pub(crate) fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
