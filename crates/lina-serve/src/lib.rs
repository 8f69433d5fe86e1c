//! An HTTP server that speaks OpenAI's protocol.
//!
//! It turns requests into those of an engine (`lina-infer`) and tokens back into text, and decides nothing about what is
//! computed when. One thread serves all connections.
//!
//! | question | answered by |
//! |---|---|
//! | where does it listen, and how does it end? | [`Listener`], [`serve`], [`Shutdown`] (`listen`) |
//! | how long may clients take, and how much may they send? | [`ServeOptions`] (`options`), `connection`, `body` |
//! | what is behind a path? | `routes`: `completions`, `chat`, `models`, `status`, `metrics`, `page.html` |
//! | what does a field mean, and what is wrong with it? | `fields`, `request`, and `error` for the answer's shape |
//! | how do tokens become an answer? | `answer` (one sequence), `delivery` (whole or as server-sent events) |
//!
//! Paths under `/v1/` may ask for a key; `/health`, `/metrics`, `/status` and the page at `/` do not, and tell nobody
//! what was asked or answered.

mod answer;
mod body;
mod chat;
mod completions;
mod connection;
mod delivery;
mod error;
mod fields;
mod listen;
mod metrics;
mod models;
mod options;
mod request;
mod routes;
mod server;
mod status;

pub use listen::{Listener, Shutdown, serve};
pub use options::{RequestDefaults, ServeOptions, Timeouts};
pub use server::{ServeSummary, ServedModel};

/// Why a server does not serve, or not any more.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on; one sentence.
    #[error("{0}")]
    Listen(String),
    /// The engine has failed; one sentence says why.
    #[error("the engine has failed: {0}")]
    Engine(String),
}

impl ServeError {
    /// Exit code of the process: 2 for bad input, 1 for a failed engine.
    pub fn exit_code(&self) -> u8 {
        match self {
            ServeError::Listen(_) => 2,
            ServeError::Engine(_) => 1,
        }
    }
}
