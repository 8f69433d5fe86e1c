//! From prompts to an answer over HTTP, whole or as server-sent events, in whichever dialect the request was made.

use std::convert::Infallible;
use std::future::ready;
use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, BoxStream, SelectAll};
use futures_util::{Stream, StreamExt};
use lina_infer::GenerateRequest;
use serde_json::{Value, json};

use crate::answer::{Answer, Part};
use crate::error::ApiError;
use crate::request::{Settings, random};
use crate::routes::json_response;
use crate::server::{Server, unix_s};

/// What an answer looks like in one of OpenAI's two interfaces.
pub(crate) trait Dialect: Send + 'static {
    /// `object` of a whole answer.
    const WHOLE: &'static str;
    /// `object` of a piece of a stream.
    const PIECE: &'static str;
    /// Beginning of an answer's id.
    const ID: &'static str;

    /// A whole choice, from all of its parts together.
    fn choice(&self, index: usize, part: &Part) -> Value;
    /// The choice of the pieces that open a stream, if it needs one.
    fn opening(&self, index: usize) -> Option<Value>;
    /// The choices of the pieces that carry a part.
    fn pieces(&self, index: usize, part: &Part) -> Vec<Value>;
}

/// A request whose prompts are token ids.
pub(crate) struct Order {
    pub(crate) prompts: Vec<Vec<u32>>,
    /// Path of the field that holds them.
    pub(crate) prompt_field: &'static str,
    pub(crate) settings: Settings,
    /// Longest answer of a request that does not say.
    pub(crate) default_max_tokens: usize,
    /// Whether tokens' probabilities are part of the answer.
    pub(crate) logprobs: bool,
    /// When the request came.
    pub(crate) arrived: Instant,
}

/// Generates and answers.
pub(crate) async fn deliver<D: Dialect>(server: Arc<Server>, order: Order, dialect: D) -> Result<Response, ApiError> {
    let answers = submit(&server, &order)?;
    let envelope = Envelope {
        id: format!("{}-{:016x}{:016x}", D::ID, random(), random()),
        created: unix_s(),
        model: server.model_name().to_owned(),
    };
    let prompt_tokens = order.prompts.iter().map(Vec::len).sum();
    if order.settings.stream {
        let events = events(envelope, dialect, answers, prompt_tokens, order.settings.include_usage);
        let mut response = Body::from_stream(events.map(Ok::<_, Infallible>)).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        return Ok(response);
    }
    let count = answers.len();
    let mut parts = parts(answers);
    let mut whole: Vec<Part> = (0..count).map(|_| Part::default()).collect();
    while let Some((index, part)) = parts.next().await {
        whole[index].extend(part.map_err(ApiError::failed)?);
    }
    let choices = whole.iter().enumerate().map(|(index, part)| dialect.choice(index, part)).collect();
    let completion_tokens = whole.iter().map(|part| part.generated_tokens).sum();
    let mut body = envelope.with(D::WHOLE, choices);
    body["usage"] = usage(prompt_tokens, completion_tokens);
    Ok(json_response(body))
}

/// Hands the prompts to the engine: all of them or none.
fn submit(server: &Arc<Server>, order: &Order) -> Result<Vec<Answer>, ApiError> {
    let longest = server.engine.max_sequence_tokens();
    let longest_prompt = server.options.max_prompt_tokens.unwrap_or(usize::MAX).min(longest.saturating_sub(1));
    let mut answers = Vec::with_capacity(order.prompts.len());
    for prompt in &order.prompts {
        let tokens = prompt.len();
        if tokens > longest_prompt {
            let message = format!("the prompt has {tokens} tokens, expected at most {longest_prompt}");
            return Err(ApiError::too_long(order.prompt_field, message));
        }
        let max_new_tokens = match order.settings.max_tokens {
            Some(given) if given > longest - tokens => {
                let message = format!(
                    "the prompt has {tokens} tokens and `max_tokens` is {given}, expected at most {longest} together"
                );
                return Err(ApiError::too_long("max_tokens", message));
            }
            Some(given) => given,
            None => order.default_max_tokens,
        };
        let request = GenerateRequest {
            prompt: prompt.clone(),
            max_new_tokens,
            sampling: order.settings.sampling.clone(),
            stop_tokens: server.model.defaults.stop_tokens.clone(),
        };
        let stream = server
            .engine
            .submit(request)
            .map_err(|rejection| ApiError::rejected(rejection, order.prompt_field, server.retry_after()))?;
        let stops = order.settings.stops.clone();
        answers.push(Answer::new(Arc::clone(server), stream, prompt, stops, order.logprobs, order.arrived));
    }
    Ok(answers)
}

/// What comes of the answers, in the order in which it comes; an answer's own parts in their order.
fn parts(answers: Vec<Answer>) -> SelectAll<BoxStream<'static, (usize, Result<Part, String>)>> {
    stream::select_all(answers.into_iter().enumerate().map(|(index, answer)| {
        let next = move |mut answer: Answer| async move { answer.next().await.map(|part| ((index, part), answer)) };
        stream::unfold(answer, next).boxed()
    }))
}

/// The answers as server-sent events.
fn events<D: Dialect>(
    envelope: Envelope,
    dialect: D,
    answers: Vec<Answer>,
    prompt_tokens: usize,
    include_usage: bool,
) -> impl Stream<Item = Bytes> + Send + 'static {
    let piece = move |envelope: &Envelope, choice: Value| {
        let mut piece = envelope.with(D::PIECE, vec![choice]);
        if include_usage {
            piece["usage"] = Value::Null;
        }
        event(&piece.to_string())
    };
    let openings: Vec<Bytes> =
        (0..answers.len()).filter_map(|index| dialect.opening(index)).map(|choice| piece(&envelope, choice)).collect();
    let mut parts = parts(answers);
    let mut completion_tokens = 0;
    let mut ended = false;
    let rest = stream::poll_fn(move |context| {
        if ended {
            return std::task::Poll::Ready(None);
        }
        parts.poll_next_unpin(context).map(|part| {
            let events = match part {
                Some((index, Ok(part))) => {
                    completion_tokens += part.generated_tokens;
                    dialect.pieces(index, &part).into_iter().map(|choice| piece(&envelope, choice)).collect()
                }
                Some((_, Err(reason))) => {
                    ended = true;
                    // The status has been sent: OpenAI's clients look for errors in a stream, too.
                    vec![event(&ApiError::failed(reason).body().to_string()), event("[DONE]")]
                }
                None => {
                    ended = true;
                    let mut last = Vec::new();
                    if include_usage {
                        let mut piece = envelope.with(D::PIECE, Vec::new());
                        piece["usage"] = usage(prompt_tokens, completion_tokens);
                        last.push(event(&piece.to_string()));
                    }
                    last.push(event("[DONE]"));
                    last
                }
            };
            Some(events)
        })
    });
    stream::iter([openings])
        .chain(rest)
        .map(|events| Bytes::from(events.concat()))
        .filter(|bytes| ready(!bytes.is_empty()))
}

/// One server-sent event; `data` has no line breaks, as JSON has none.
fn event(data: &str) -> Bytes {
    Bytes::from(format!("data: {data}\n\n"))
}

fn usage(prompt_tokens: usize, completion_tokens: usize) -> Value {
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    })
}

/// What all pieces of an answer have in common.
struct Envelope {
    id: String,
    created: u64,
    model: String,
}

impl Envelope {
    fn with(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }
}
