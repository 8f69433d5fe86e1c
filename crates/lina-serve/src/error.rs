//! Answers that are errors, in the shape that OpenAI's clients expect: `{"error": {message, type, param, code}}`.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use lina_infer::Rejection;
use serde_json::{Value, json};

use crate::routes::json_response;

/// A request that gets no answer but the reason, in one sentence: what was found and what is expected.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    /// OpenAI's class of the error.
    kind: &'static str,
    /// Path of the field that is wrong.
    param: Option<String>,
    /// OpenAI's name of the error, where it has one.
    code: Option<&'static str>,
    retry_after: Option<Duration>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        ApiError { status, message: message.into(), kind, param: None, code: None, retry_after: None }
    }

    /// 400: the request as a whole is wrong.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400: a field is wrong.
    pub(crate) fn field(path: &str, message: impl Into<String>) -> Self {
        ApiError { param: Some(path.to_owned()), ..Self::invalid(message) }
    }

    /// 401: a key is expected.
    pub(crate) fn unauthorised(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", message);
        ApiError { code: Some("invalid_api_key"), ..error }
    }

    /// 404: no such path.
    pub(crate) fn unknown_path(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    /// 404: no such model.
    pub(crate) fn unknown_model(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        ApiError { param: Some("model".into()), code: Some("model_not_found"), ..error }
    }

    /// 405: the path has other methods.
    pub(crate) fn wrong_method(message: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    /// 408: the body did not come in time.
    pub(crate) fn slow_body(message: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message)
    }

    /// 413: the body is too large.
    pub(crate) fn large_body(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    /// 415: the body is not declared to be JSON.
    pub(crate) fn wrong_media_type(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", message)
    }

    /// 429: come back after `retry_after`.
    pub(crate) fn busy(message: impl Into<String>, retry_after: Duration) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        ApiError { code: Some("queue_full"), retry_after: Some(retry_after), ..error }
    }

    /// 503: the server is about to end.
    pub(crate) fn shutting_down() -> Self {
        let message = "the server is shutting down and takes no new requests";
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message);
        ApiError { code: Some("shutting_down"), ..error }
    }

    /// 500: the model cannot compute any more, or the server has a bug.
    pub(crate) fn failed(reason: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", format!("the engine has failed: {reason}"))
    }

    /// 400: more tokens than the model or the server takes.
    pub(crate) fn too_long(path: &str, message: impl Into<String>) -> Self {
        ApiError { code: Some("context_length_exceeded"), ..Self::field(path, message) }
    }

    /// What the engine does not take. `prompt` is the path of the field that holds the prompt.
    pub(crate) fn rejected(rejection: Rejection, prompt: &str, retry_after: Duration) -> Self {
        let message = rejection.to_string();
        match rejection {
            Rejection::QueueFull { .. } => Self::busy(message, retry_after),
            Rejection::PromptTooLong { .. } => Self::too_long(prompt, message),
            Rejection::ShuttingDown => Self::shutting_down(),
            Rejection::Failed(reason) => Self::failed(reason),
            _ => Self::field(prompt, message),
        }
    }

    /// The answer's body.
    pub(crate) fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, json_response(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs().max(1)));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
