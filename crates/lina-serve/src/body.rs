//! Reads a request's body within the limits on its size and time, and what it says as JSON.

use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use futures_util::StreamExt;
use serde_json::Value;
use tokio::time::timeout;

use crate::error::ApiError;
use crate::fields::{Fields, shorten};
use crate::server::Server;

/// How much of a body that nobody wants is read and thrown away: a client that is still sending when the connection
/// closes would not see why.
const DISCARDED_BYTES: usize = 64 << 20;

/// The fields of a request's JSON object.
pub(crate) async fn read_fields(server: &Server, request: Request) -> Result<Fields, ApiError> {
    let within = server.options.timeouts.body;
    if let Err(error) = check_media_type(request.headers()) {
        discard(request.into_body(), within).await;
        return Err(error);
    }
    let bytes = timeout(within, read(request.into_body(), server.options.max_body_bytes))
        .await
        .unwrap_or_else(|_| Err(slow(within)))?;
    let text = str::from_utf8(&bytes).map_err(|error| {
        let at = error.valid_up_to();
        ApiError::invalid(format!("the body is no UTF-8 at byte {at} ({:#04x}), expected JSON in UTF-8", bytes[at]))
    })?;
    if text.trim_ascii().is_empty() {
        return Err(ApiError::invalid("the body is empty, expected a JSON object"));
    }
    let value: Value = serde_json::from_str(text)
        .map_err(|error| ApiError::invalid(format!("the body is no JSON ({error}), expected a JSON object")))?;
    Fields::of("", value)
}

/// A page in a browser can send other types to this server without asking, but not this one.
fn check_media_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let found = headers.get(header::CONTENT_TYPE).map_or(Ok(""), |value| value.to_str()).unwrap_or("unreadable");
    let essence = found.split(';').next().unwrap_or(found).trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let found = if found.is_empty() { "missing".into() } else { format!("{:?}", shorten(found)) };
    Err(ApiError::wrong_media_type(format!("the header Content-Type is {found}, expected \"application/json\"")))
}

async fn read(body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut chunks = body.into_data_stream();
    let mut bytes = Vec::new();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| ApiError::invalid(format!("the body breaks off: {error}")))?;
        if chunk.len() > limit - bytes.len() {
            discard_rest(chunks).await;
            let message = format!("the body has more than {limit} bytes, expected at most that many");
            return Err(ApiError::large_body(message));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// Reads a body that is not needed, within limits, so that its client comes to read the answer.
pub(crate) async fn discard(body: Body, within: Duration) {
    // The answer is the same if it takes too long.
    let _ = timeout(within, discard_rest(body.into_data_stream())).await;
}

async fn discard_rest(mut chunks: BodyDataStream) {
    let mut left = DISCARDED_BYTES;
    while let Some(Ok(chunk)) = chunks.next().await {
        let Some(rest) = left.checked_sub(chunk.len()) else { return };
        left = rest;
    }
}

fn slow(within: Duration) -> ApiError {
    ApiError::slow_body(format!("the body was not complete after {} s, expected it by then", within.as_secs_f64()))
}
