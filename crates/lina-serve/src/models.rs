//! `/v1/models`: the names under which the model is served.

use serde_json::{Value, json};

use crate::error::ApiError;
use crate::fields::shorten;
use crate::server::Server;

/// All names.
pub(crate) fn list(server: &Server) -> Value {
    let models: Vec<Value> = server.model.names.iter().map(|name| model(server, name)).collect();
    json!({"object": "list", "data": models})
}

/// One of them.
pub(crate) fn find(server: &Server, name: &str) -> Result<Value, ApiError> {
    if server.model.names.iter().any(|known| known == name) {
        return Ok(model(server, name));
    }
    let message = format!("the model {:?} is not served here, expected {}", shorten(name), server.known_models());
    Err(ApiError::unknown_model(message))
}

fn model(server: &Server, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": server.created,
        "owned_by": "lina",
        "root": server.model_name(),
        "max_model_len": server.engine.max_sequence_tokens(),
    })
}
