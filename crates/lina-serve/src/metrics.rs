//! `/metrics`: what the server and the engine have done, in the text format of Prometheus (version 0.0.4).
//!
//! Counters start with the server; rates such as tokens per second are for the scraper to derive from them.

use std::collections::BTreeMap;
use std::fmt::{Display, Write};
use std::sync::{Mutex, PoisonError};

use lina_infer::{EngineStatus, LayerActivity};

/// Media type of the answer.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Upper bounds of the buckets for whole requests and first tokens, in seconds.
const REQUEST_BOUNDS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0];
/// Upper bounds of the buckets for one output token, in seconds.
const TOKEN_BOUNDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5];

/// What the server itself counts; the engine counts the rest.
pub(crate) struct Metrics {
    /// From the arrival of a request to its first token.
    pub(crate) first_token_seconds: Histogram,
    /// Between the first and the last token of an answer, for each token after the first.
    pub(crate) output_token_seconds: Histogram,
    /// From the arrival of a request to the end of its answer.
    pub(crate) request_seconds: Histogram,
    /// Answers by path and status.
    responses: Mutex<BTreeMap<(&'static str, u16), u64>>,
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics {
            first_token_seconds: Histogram::new(REQUEST_BOUNDS),
            output_token_seconds: Histogram::new(TOKEN_BOUNDS),
            request_seconds: Histogram::new(REQUEST_BOUNDS),
            responses: Mutex::default(),
        }
    }
}

impl Metrics {
    /// Counts an answer. `path` is one of the server's own, so that clients cannot make up any number of labels.
    pub(crate) fn count_response(&self, path: &'static str, status: u16) {
        *self.responses.lock().unwrap_or_else(PoisonError::into_inner).entry((path, status)).or_default() += 1;
    }
}

/// A cumulative histogram.
pub(crate) struct Histogram {
    bounds: &'static [f64],
    state: Mutex<Observations>,
}

#[derive(Clone, Default)]
struct Observations {
    /// `[bounds + 1]`: values up to each bound that are above the one before; the last are above all.
    counts: Vec<u64>,
    count: u64,
    sum: f64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        let state = Observations { counts: vec![0; bounds.len() + 1], ..Observations::default() };
        Histogram { bounds, state: Mutex::new(state) }
    }

    /// Adds a value.
    pub(crate) fn observe(&self, value: f64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.counts[bucket] += 1;
        state.count += 1;
        state.sum += value;
    }

    fn observations(&self) -> Observations {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many values there are, and their sum.
    pub(crate) fn count_and_sum(&self) -> (u64, f64) {
        let Observations { count, sum, .. } = self.observations();
        (count, sum)
    }

    /// Mean of the values, if there are any.
    pub(crate) fn mean(&self) -> Option<f64> {
        let (count, sum) = self.count_and_sum();
        (count > 0).then(|| sum / count as f64)
    }
}

/// Mean over maximum of the devices' tokens, 1 if all have the same; `None` before the first token.
pub(crate) fn balancedness(layer: &LayerActivity) -> Option<f64> {
    let tokens = &layer.device_tokens;
    let most = *tokens.iter().max().filter(|&&most| most > 0)?;
    Some(tokens.iter().sum::<u64>() as f64 / tokens.len() as f64 / most as f64)
}

/// Memory that the process holds now, where the system says so in Linux's way.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// The page of figures.
pub(crate) fn render(metrics: &Metrics, engine: &EngineStatus, model: &str, ranks: usize) -> String {
    let mut page = Page::default();
    page.family("lina_info", "gauge", "The program and the model; always 1.");
    page.sample("lina_info", &[("version", &env!("CARGO_PKG_VERSION")), ("model", &model)], 1);
    page.single("lina_up", "gauge", "Whether the engine can compute.", u8::from(engine.failed.is_none()));
    page.single("lina_ranks", "gauge", "Ranks of the job.", ranks);
    let emulated = u8::from(engine.activity.emulated);
    page.single("lina_emulated", "gauge", "Whether compute, links and copies of the engine are emulated.", emulated);

    if let Some(bytes) = resident_bytes() {
        page.single("process_resident_memory_bytes", "gauge", "Memory of the process that leads.", bytes);
    }
    page.family("lina_http_responses_total", "counter", "Answers by path and status.");
    for (&(path, status), count) in &*metrics.responses.lock().unwrap_or_else(PoisonError::into_inner) {
        page.sample("lina_http_responses_total", &[("path", &path), ("status", &status)], count);
    }
    let help = "From the arrival of a request to its first token.";
    page.histogram("lina_time_to_first_token_seconds", help, &metrics.first_token_seconds);
    let help = "Time of an output token after the first, averaged over its answer.";
    page.histogram("lina_time_per_output_token_seconds", help, &metrics.output_token_seconds);
    let help = "From the arrival of a request to the end of its answer.";
    page.histogram("lina_request_duration_seconds", help, &metrics.request_seconds);

    page.single("lina_requests_running", "gauge", "Sequences that are being generated.", engine.running);
    page.single("lina_requests_queued", "gauge", "Sequences that wait for a place.", engine.queued);
    page.single("lina_requests_finished_total", "counter", "Completed answers.", engine.finished_requests);
    let help = "Answers that nobody waited for any more.";
    page.single("lina_requests_cancelled_total", "counter", help, engine.cancelled_requests);
    page.single("lina_prompt_tokens_total", "counter", "Tokens of prompts that were computed.", engine.prompt_tokens);
    page.single("lina_generated_tokens_total", "counter", "Tokens that were generated.", engine.generated_tokens);
    page.single("lina_steps_total", "counter", "Steps of the engine that computed something.", engine.steps);
    let last_step_s = engine.last_step_us as f64 * 1e-6;
    page.single("lina_last_step_seconds", "gauge", "Wall-clock time of the last step.", last_step_s);
    page.single("lina_last_step_sequences", "gauge", "Sequences in the last step.", engine.last_step_sequences);
    page.single("lina_last_step_tokens", "gauge", "Tokens in the last step.", engine.last_step_tokens);
    page.single("lina_kv_pages_used", "gauge", "Pages of keys and values set aside.", engine.kv_pages_used);
    page.single("lina_kv_pages", "gauge", "Pages of keys and values there are.", engine.kv_pages_total);

    let activity = &engine.activity;
    let help = "Comparisons of a layer's popularity with its estimate.";
    page.single("lina_popularity_checks_total", "counter", help, activity.checks);
    let help = "Comparisons that led to another placement while the layer waited.";
    page.single("lina_replans_total", "counter", help, activity.replans);
    page.single("lina_moved_bytes_total", "counter", "Weights copied into experts' slots.", activity.moved_bytes);
    page.family("lina_expert_tokens_total", "counter", "Tokens that chose each expert.");
    for layer in &activity.layers {
        for (expert, tokens) in layer.expert_tokens.iter().enumerate() {
            page.sample("lina_expert_tokens_total", &[("layer", &layer.layer), ("expert", &expert)], tokens);
        }
    }
    page.family("lina_device_tokens_total", "counter", "Tokens that each device's experts computed.");
    for layer in &activity.layers {
        for (device, tokens) in layer.device_tokens.iter().enumerate() {
            page.sample("lina_device_tokens_total", &[("layer", &layer.layer), ("device", &device)], tokens);
        }
    }
    page.family("lina_balancedness", "gauge", "Mean over maximum of the devices' tokens since the start, by layer.");
    for layer in &activity.layers {
        if let Some(balancedness) = balancedness(layer) {
            page.sample("lina_balancedness", &[("layer", &layer.layer)], balancedness);
        }
    }
    page.text
}

/// Text in the format of Prometheus.
#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "{line}");
    }

    /// Begins a metric; its samples follow.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}"));
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &dyn Display)], value: impl Display) {
        let labels: Vec<String> =
            labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(&value.to_string()))).collect();
        if labels.is_empty() {
            self.line(format_args!("{name} {value}"));
        } else {
            self.line(format_args!("{name}{{{}}} {value}", labels.join(",")));
        }
    }

    /// A metric with one sample.
    fn single(&mut self, name: &str, kind: &str, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.family(name, "histogram", help);
        let Observations { counts, count, sum } = histogram.observations();
        let mut below = 0;
        for (bound, inside) in histogram.bounds.iter().zip(&counts) {
            below += inside;
            self.sample(&format!("{name}_bucket"), &[("le", bound)], below);
        }
        self.sample(&format!("{name}_bucket"), &[("le", &"+Inf")], count);
        self.sample(&format!("{name}_sum"), &[], sum);
        self.sample(&format!("{name}_count"), &[], count);
    }
}

/// A label's value with what would end it escaped.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
