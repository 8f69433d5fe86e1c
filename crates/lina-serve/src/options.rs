//! What the server listens on and how much it takes.

use std::time::Duration;

use lina_data::Tokenizer;
use lina_infer::{GenerationConfig, Sampling};

/// Where the server listens, who may ask, and how much.
#[derive(Clone)]
pub struct ServeOptions {
    /// Name or address to listen on.
    pub host: String,
    /// Port; 0 is any that is free.
    pub port: u16,
    /// Key that `/v1/` requests must bring, if any.
    pub api_key: Option<String>,
    /// Largest body of a request, in bytes.
    pub max_body_bytes: usize,
    /// Longest prompt, in tokens; `None` leaves it to the model.
    pub max_prompt_tokens: Option<usize>,
    /// Connections that are open at the same time; more wait until one ends.
    pub max_connections: usize,
    /// How long clients may take.
    pub timeouts: Timeouts,
}

/// How long clients may take before they are dropped.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For a request's head, and between the requests of a connection.
    pub head: Duration,
    /// For a request's body.
    pub body: Duration,
    /// For reading on, once the answer does not fit the network's buffers any more.
    pub write: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts { head: Duration::from_secs(30), body: Duration::from_secs(30), write: Duration::from_secs(30) }
    }
}

impl Default for ServeOptions {
    fn default() -> Self {
        ServeOptions {
            host: "127.0.0.1".into(),
            port: 8000,
            api_key: None,
            max_body_bytes: 4 << 20,
            max_prompt_tokens: None,
            max_connections: 1024,
            timeouts: Timeouts::default(),
        }
    }
}

/// What a request that says nothing of them gets.
#[derive(Clone, Debug)]
pub struct RequestDefaults {
    /// How tokens are chosen; a request without a seed gets a random one.
    pub sampling: Sampling,
    /// Tokens that end an answer and are no part of it.
    pub stop_tokens: Vec<u32>,
}

impl RequestDefaults {
    /// OpenAI's defaults, with what the model's folder says instead where it does, as vLLM has it: a folder that says
    /// nothing of temperature does not make answers greedy.
    pub fn for_model(config: &GenerationConfig, tokenizer: &Tokenizer) -> Self {
        let RequestDefaults { sampling, .. } = RequestDefaults::default();
        let sampling = Sampling {
            temperature: config.temperature.unwrap_or(sampling.temperature),
            top_p: config.top_p.unwrap_or(sampling.top_p),
            top_k: config.top_k.unwrap_or(sampling.top_k),
            repetition_penalty: config.repetition_penalty.unwrap_or(sampling.repetition_penalty),
            ..sampling
        };
        RequestDefaults { sampling, stop_tokens: config.stop_tokens(tokenizer) }
    }
}

impl Default for RequestDefaults {
    /// OpenAI's: temperature 1 and nothing cut off.
    fn default() -> Self {
        RequestDefaults { sampling: Sampling { temperature: 1.0, ..Sampling::default() }, stop_tokens: Vec::new() }
    }
}
