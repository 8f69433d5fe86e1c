//! Which path does what, and what holds for all of them: the key, counting, and an answer whatever happens.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::FutureExt;
use serde_json::{Value, json};
use subtle::ConstantTimeEq;

use crate::body::discard;
use crate::error::ApiError;
use crate::fields::shorten;
use crate::server::Server;
use crate::{chat, completions, metrics, models, status};

/// The live page: one file that asks for nothing but `/status`.
const PAGE: &str = include_str!("page.html");
/// What a browser may do on the page: run its own script and style, and ask this server.
const PAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
    connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Everything that the server answers.
pub(crate) fn router(server: Arc<Server>) -> Router {
    let protected = Router::new()
        .route("/v1/completions", post(completions::answer))
        .route("/v1/chat/completions", post(chat::answer))
        .route("/v1/models", get(async |State(server): State<Arc<Server>>| json_response(models::list(&server))))
        .route("/v1/models/{*name}", get(model))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&server), check_key));
    Router::new()
        .merge(protected)
        .route("/health", get(health))
        .route("/metrics", get(metrics_page))
        .route("/status", get(async |State(server): State<Arc<Server>>| json_response(status::status(&server))))
        .route("/", get(page))
        .method_not_allowed_fallback(wrong_method)
        .fallback(unknown_path)
        .layer(middleware::from_fn_with_state(Arc::clone(&server), watch))
        .with_state(server)
}

/// A JSON answer.
pub(crate) fn json_response(body: Value) -> Response {
    typed("application/json", body.to_string())
}

fn typed(media_type: &'static str, body: impl IntoResponse) -> Response {
    let mut response = body.into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    response
}

async fn model(State(server): State<Arc<Server>>, Path(name): Path<String>) -> Result<Response, ApiError> {
    models::find(&server, &name).map(json_response)
}

async fn health(State(server): State<Arc<Server>>) -> Response {
    match status::health(&server) {
        Ok(()) => json_response(json!({"status": "ok"})),
        Err(reason) => {
            let body = json!({"status": "unavailable", "reason": reason});
            (StatusCode::SERVICE_UNAVAILABLE, json_response(body)).into_response()
        }
    }
}

async fn metrics_page(State(server): State<Arc<Server>>) -> Response {
    let (engine, ranks) = (server.engine.status(), server.engine.limits().ranks);
    typed(metrics::CONTENT_TYPE, metrics::render(&server.metrics, &engine, server.model_name(), ranks))
}

async fn page() -> Response {
    let mut response = typed("text/html; charset=utf-8", PAGE);
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY));
    response
}

async fn unknown_path(uri: Uri) -> ApiError {
    ApiError::unknown_path(format!(
        "the path {:?} does not exist, expected /v1/completions, /v1/chat/completions, /v1/models, /health or /metrics",
        shorten(uri.path())
    ))
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let expected = if uri.path().ends_with("/completions") { "POST" } else { "GET" };
    let (method, path) = (method.to_string(), uri.path());
    ApiError::wrong_method(format!("the method {} is not for {path}, expected {expected}", shorten(&method)))
}

/// Lets only those through who have the key, if there is one. How long that takes does not say where a wrong key
/// differs.
async fn check_key(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    if let Some(key) = &server.options.api_key {
        let given = bearer(request.headers());
        if !given.is_some_and(|given| bool::from(given.as_bytes().ct_eq(key.as_bytes()))) {
            let found = if given.is_some() { "is another one" } else { "is missing" };
            let message = format!("the API key {found}, expected the header `Authorization: Bearer KEY`");
            discard(request.into_body(), server.options.timeouts.body).await;
            return ApiError::unauthorised(message).into_response();
        }
    }
    next.run(request).await
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

/// Counts answers, and answers even if a bug ends the handler.
async fn watch(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let path = known_path(request.uri().path());
    // A request's own state is dropped with it; what requests share is whole between statements.
    let response = AssertUnwindSafe(next.run(request)).catch_unwind().await;
    let mut response = response.unwrap_or_else(|_| ApiError::failed("a bug in the server").into_response());
    server.metrics.count_response(path, response.status().as_u16());
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// The path as a label: one of the server's own.
fn known_path(path: &str) -> &'static str {
    const PATHS: [&str; 7] =
        ["/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/status", "/"];
    let model = path.strip_prefix("/v1/models/").map(|_| "/v1/models/{id}");
    PATHS.into_iter().find(|&known| known == path).or(model).unwrap_or("other")
}
