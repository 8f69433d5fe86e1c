//! `/v1/chat/completions`: a conversation goes on.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::response::Response;
use lina_infer::ChatMessage;
use serde_json::{Value, json};

use crate::answer::{Likely, Part, finish_name};
use crate::body::read_fields;
use crate::delivery::{Dialect, Order, deliver};
use crate::error::ApiError;
use crate::fields::{Fields, mismatch, string};
use crate::request::{MOST_TOP_LOGPROBS, Settings, check_model, is_empty};
use crate::server::Server;

/// Who can have said something.
const ROLES: [&str; 4] = ["system", "developer", "user", "assistant"];

/// Answers a request.
pub(crate) async fn answer(State(server): State<Arc<Server>>, request: Request) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let mut fields = read_fields(&server, request).await?;
    check_model(&mut fields, &server)?;
    let (path, value) = fields.require("messages", "a list of messages")?;
    let messages = messages(&path, value)?;
    let mut settings = Settings::take(&mut fields, &["max_completion_tokens", "max_tokens"], &server.model.defaults)?;
    let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=MOST_TOP_LOGPROBS)?;
    if top.is_some_and(|top| top > 0) && !logprobs {
        let message = "`top_logprobs` is given, expected it only with `logprobs` being true";
        return Err(ApiError::field("top_logprobs", message));
    }
    settings.sampling.top_logprobs = top.unwrap_or(0) as usize;
    refuse_unsupported(&mut fields)?;
    fields.finish()?;
    let prompt = server.on_the_side(move |server| prompt(server, &messages)).await?;
    let order = Order {
        prompts: vec![prompt],
        prompt_field: "messages",
        settings,
        default_max_tokens: usize::MAX,
        logprobs,
        arrived,
    };
    deliver(server, order, ChatDialect { logprobs }).await
}

/// Fields of OpenAI's that would change the answer, and that this server does not carry out.
fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    for name in ["tools", "functions", "metadata"] {
        fields.refuse_unless(name, is_empty)?;
    }
    for name in ["tool_choice", "function_call"] {
        fields.refuse_unless(name, |value| value == "none" || value == "auto")?;
    }
    fields.refuse_unless("parallel_tool_calls", Value::is_boolean)?;
    fields.refuse_unless("response_format", |value| *value == json!({"type": "text"}))?;
    fields.refuse_unless("modalities", |value| *value == json!(["text"]))?;
    fields.refuse_unless("store", |value| value == false)?;
    fields.refuse_unless("service_tier", |value| value == "auto" || value == "default")?;
    for name in ["audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"] {
        fields.refuse_unless(name, |_| false)?;
    }
    Ok(())
}

fn messages(path: &str, value: Value) -> Result<Vec<ChatMessage>, ApiError> {
    match value {
        Value::Array(items) if !items.is_empty() => {
            items.into_iter().enumerate().map(|(index, item)| message(&format!("{path}[{index}]"), item)).collect()
        }
        other => Err(mismatch(path, &other, "a list of messages")),
    }
}

fn message(path: &str, value: Value) -> Result<ChatMessage, ApiError> {
    let mut fields = Fields::of(path, value)?;
    let expected = "system, developer, user or assistant";
    let (role_path, role) = fields.require("role", expected)?;
    let role = string(&role_path, role)?;
    if !ROLES.contains(&role.as_str()) {
        return Err(mismatch(&role_path, &Value::String(role), expected));
    }
    let (content_path, content) = fields.require("content", "a string")?;
    let content = match content {
        Value::Array(parts) => {
            parts.into_iter().enumerate().map(|(index, part)| text(&format!("{content_path}[{index}]"), part)).collect()
        }
        other => string(&content_path, other),
    }?;
    for name in ["name", "refusal", "audio", "function_call"] {
        fields.refuse_unless(name, |_| false)?;
    }
    fields.refuse_unless("tool_calls", is_empty)?;
    fields.finish()?;
    // OpenAI's newer name for the same role, which templates do not know.
    let role = if role == "developer" { "system".into() } else { role };
    Ok(ChatMessage { role, content })
}

/// The text of one part of a message's content.
fn text(path: &str, value: Value) -> Result<String, ApiError> {
    let mut fields = Fields::of(path, value)?;
    let (kind_path, kind) = fields.require("type", "\"text\"")?;
    if kind != "text" {
        return Err(mismatch(&kind_path, &kind, "\"text\", the only type that this server supports"));
    }
    let (text_path, text) = fields.require("text", "a string")?;
    fields.finish()?;
    string(&text_path, text)
}

/// Token ids of the conversation, up to where the answer begins.
fn prompt(server: &Server, messages: &[ChatMessage]) -> Result<Vec<u32>, ApiError> {
    let Some(template) = &server.model.chat_template else {
        let message = format!(
            "the model {:?} has no chat template, so it cannot take `messages`, expected a request to /v1/completions",
            server.model_name()
        );
        return Err(ApiError::field("messages", message));
    };
    let text = template.render(messages, true).map_err(|error| ApiError::field("messages", error.to_string()))?;
    // The template writes the tokens that a prompt begins with.
    server.model.tokenizer.encode(&text).map_err(|error| ApiError::field("messages", error.to_string()))
}

/// The shape of `chat.completion`.
struct ChatDialect {
    logprobs: bool,
}

impl ChatDialect {
    fn logprobs(&self, part: &Part) -> Option<Value> {
        let shape =
            |likely: &Likely| json!({"token": likely.text, "logprob": likely.logprob(), "bytes": likely.bytes()});
        self.logprobs.then(|| {
            let content: Vec<Value> = part
                .tokens
                .iter()
                .map(|token| {
                    let mut shaped = shape(&token.chosen);
                    shaped["top_logprobs"] = token.top.iter().map(shape).collect();
                    shaped
                })
                .collect();
            json!({"content": content, "refusal": null})
        })
    }

    fn piece(&self, index: usize, delta: Value, logprobs: Option<Value>, finish: Option<&str>) -> Value {
        json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish})
    }
}

impl Dialect for ChatDialect {
    const WHOLE: &'static str = "chat.completion";
    const PIECE: &'static str = "chat.completion.chunk";
    const ID: &'static str = "chatcmpl";

    fn choice(&self, index: usize, part: &Part) -> Value {
        json!({
            "index": index,
            "message": {"role": "assistant", "content": part.text, "refusal": null},
            "logprobs": self.logprobs(part),
            "finish_reason": part.finish.map(finish_name),
        })
    }

    fn opening(&self, index: usize) -> Option<Value> {
        Some(self.piece(index, json!({"role": "assistant", "content": ""}), None, None))
    }

    fn pieces(&self, index: usize, part: &Part) -> Vec<Value> {
        let mut pieces = Vec::new();
        if !part.text.is_empty() || !part.tokens.is_empty() {
            pieces.push(self.piece(index, json!({"content": part.text}), self.logprobs(part), None));
        }
        if let Some(finish) = part.finish {
            pieces.push(self.piece(index, json!({}), None, Some(finish_name(finish))));
        }
        pieces
    }
}
