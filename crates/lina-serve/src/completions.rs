//! `/v1/completions`: text goes on.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Map, Value, json};

use crate::answer::{Part, TextToken, finish_name};
use crate::body::read_fields;
use crate::delivery::{Dialect, Order, deliver};
use crate::error::ApiError;
use crate::fields::{mismatch, string};
use crate::request::{MOST_TOP_LOGPROBS, Settings, check_model, is_empty};
use crate::server::Server;

/// Longest answer of a request that does not say, as in OpenAI's interface.
const DEFAULT_MAX_TOKENS: usize = 16;
/// Most prompts of a request.
const MOST_PROMPTS: usize = 128;

/// A prompt as it is given.
#[derive(Debug, PartialEq)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

/// Answers a request.
pub(crate) async fn answer(State(server): State<Arc<Server>>, request: Request) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let mut fields = read_fields(&server, request).await?;
    check_model(&mut fields, &server)?;
    let (path, value) = fields.require("prompt", "a string or a list of token ids")?;
    let prompts = prompts(&path, value)?;
    let mut settings = Settings::take(&mut fields, &["max_tokens"], &server.model.defaults)?;
    let top = fields.integer("logprobs", 0..=MOST_TOP_LOGPROBS)?;
    settings.sampling.top_logprobs = top.unwrap_or(0) as usize;
    fields.refuse_unless("echo", |value| value == false)?;
    fields.refuse_unless("best_of", |value| value.as_f64() == Some(1.0))?;
    fields.refuse_unless("suffix", is_empty)?;
    fields.finish()?;
    let prompts = server.on_the_side(move |server| tokenise(server, prompts)).await?;
    let order = Order {
        prompts,
        prompt_field: "prompt",
        settings,
        default_max_tokens: DEFAULT_MAX_TOKENS,
        logprobs: top.is_some(),
        arrived,
    };
    deliver(server, order, TextDialect { logprobs: top.is_some() }).await
}

/// A string, token ids, or a list of one of them.
fn prompts(path: &str, value: Value) -> Result<Vec<Prompt>, ApiError> {
    const EXPECTED: &str = "a string, a list of token ids, or a list of either";
    let items = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(items) if !items.is_empty() => items,
        other => return Err(mismatch(path, &other, EXPECTED)),
    };
    if items[0].is_number() {
        return Ok(vec![Prompt::Tokens(token_ids(path, items)?)]);
    }
    if items.len() > MOST_PROMPTS {
        let message = format!("`{path}` has {} prompts, expected at most {MOST_PROMPTS}", items.len());
        return Err(ApiError::field(path, message));
    }
    let texts = items[0].is_string();
    let item = |(index, item): (usize, Value)| {
        let path = format!("{path}[{index}]");
        match item {
            item if texts => string(&path, item).map(Prompt::Text),
            Value::Array(ids) if !ids.is_empty() => token_ids(&path, ids).map(Prompt::Tokens),
            other => Err(mismatch(&path, &other, "a string or a list of token ids")),
        }
    };
    items.into_iter().enumerate().map(item).collect()
}

fn token_ids(path: &str, items: Vec<Value>) -> Result<Vec<u32>, ApiError> {
    let id = |(index, item): (usize, Value)| {
        let id = item.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| mismatch(&format!("{path}[{index}]"), &item, "a token id"))
    };
    items.into_iter().enumerate().map(id).collect()
}

fn tokenise(server: &Server, prompts: Vec<Prompt>) -> Result<Vec<Vec<u32>>, ApiError> {
    let tokens = |prompt| match prompt {
        Prompt::Tokens(tokens) => Ok(tokens),
        Prompt::Text(text) => {
            server.model.tokenizer.encode_prompt(&text).map_err(|error| ApiError::field("prompt", error.to_string()))
        }
    };
    prompts.into_iter().map(tokens).collect()
}

/// The shape of `text_completion`.
struct TextDialect {
    logprobs: bool,
}

impl Dialect for TextDialect {
    const WHOLE: &'static str = "text_completion";
    const PIECE: &'static str = "text_completion";
    const ID: &'static str = "cmpl";

    fn choice(&self, index: usize, part: &Part) -> Value {
        json!({
            "index": index,
            "text": part.text,
            "logprobs": self.logprobs.then(|| logprobs(&part.tokens)),
            "finish_reason": part.finish.map(finish_name),
        })
    }

    fn opening(&self, _index: usize) -> Option<Value> {
        None
    }

    fn pieces(&self, index: usize, part: &Part) -> Vec<Value> {
        vec![self.choice(index, part)]
    }
}

/// Four lists with an entry for each token. The likeliest tokens include the one that was chosen.
fn logprobs(tokens: &[TextToken]) -> Value {
    let top = |token: &TextToken| {
        let mut top = Map::new();
        for likely in token.top.iter().chain([&token.chosen]) {
            top.entry(likely.name()).or_insert_with(|| json!(likely.logprob()));
        }
        Value::Object(top)
    };
    json!({
        "tokens": tokens.iter().map(|token| token.chosen.name()).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| token.chosen.logprob()).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
        "text_offset": tokens.iter().map(|token| token.offset_chars).collect::<Vec<_>>(),
    })
}
