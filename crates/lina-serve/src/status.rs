//! `/status`: the figures that the live page draws, and `/health`.

use lina_infer::LayerActivity;
use serde::Serialize;
use serde_json::{Value, json};

use crate::metrics::{Histogram, balancedness};
use crate::server::Server;

/// One layer's row of the heat maps.
#[derive(Serialize)]
struct LayerStatus {
    layer: usize,
    /// `[experts]`: tokens that chose each, since the start.
    expert_tokens: Vec<u64>,
    /// `[devices]`: tokens that each computed, since the start.
    device_tokens: Vec<u64>,
    /// `[devices]`: experts that each has now.
    resident: Vec<Vec<usize>>,
    balancedness: Option<f64>,
}

impl From<&LayerActivity> for LayerStatus {
    fn from(activity: &LayerActivity) -> Self {
        LayerStatus {
            layer: activity.layer,
            expert_tokens: activity.expert_tokens.clone(),
            device_tokens: activity.device_tokens.clone(),
            resident: activity.resident.clone(),
            balancedness: balancedness(activity),
        }
    }
}

/// Whether the server takes requests, and why not.
pub(crate) fn health(server: &Server) -> Result<(), String> {
    match server.engine.status().failed {
        Some(reason) => Err(format!("the engine has failed: {reason}")),
        None if server.draining() => Err("the server is shutting down".into()),
        None => Ok(()),
    }
}

/// Everything that the page shows. Counters are since the start; the page takes differences.
pub(crate) fn status(server: &Server) -> Value {
    let engine = server.engine.status();
    let health = health(server);
    let layers: Vec<LayerStatus> = engine.activity.layers.iter().map(LayerStatus::from).collect();
    let times = |histogram: &Histogram| {
        let (count, sum_s) = histogram.count_and_sum();
        json!({"count": count, "sum_s": sum_s})
    };
    json!({
        "model": server.model_name(),
        "version": env!("CARGO_PKG_VERSION"),
        "ok": health.is_ok(),
        "reason": health.err(),
        "uptime_s": server.started.elapsed().as_secs_f64(),
        "ranks": server.engine.limits().ranks,
        "emulated": engine.activity.emulated,
        "running": engine.running,
        "queued": engine.queued,
        "finished_requests": engine.finished_requests,
        "cancelled_requests": engine.cancelled_requests,
        "steps": engine.steps,
        "prompt_tokens": engine.prompt_tokens,
        "generated_tokens": engine.generated_tokens,
        "last_step_us": engine.last_step_us,
        "last_step_sequences": engine.last_step_sequences,
        "last_step_tokens": engine.last_step_tokens,
        "kv_pages_used": engine.kv_pages_used,
        "kv_pages_total": engine.kv_pages_total,
        "time_to_first_token": times(&server.metrics.first_token_seconds),
        "time_per_output_token": times(&server.metrics.output_token_seconds),
        "checks": engine.activity.checks,
        "replans": engine.activity.replans,
        "moved_bytes": engine.activity.moved_bytes,
        "layers": layers,
    })
}
