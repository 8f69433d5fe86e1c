//! What is there to look at: `/health`, `/metrics`, `/status` and the page.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use crate::stand_in::start;

/// Samples of a page in Prometheus' text format, by name and labels. Fails where a strict parser would.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let name_is_valid = |name: &str| {
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
    };
    assert!(text.ends_with('\n'));
    let (mut samples, mut types, mut helped) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
    let mut family = "";
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, sentence) = help.split_once(' ').unwrap();
            assert!(name_is_valid(name) && !sentence.is_empty() && helped.insert(name), "{line}");
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert!(helped.contains(name) && ["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(types.insert(name, kind).is_none(), "one type: {line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            family = name;
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            let labels = labels.strip_suffix('}').unwrap();
            for label in labels.split(',').filter(|label| !label.is_empty()) {
                let (key, value) = label.split_once('=').unwrap();
                assert!(
                    name_is_valid(key) && value.len() >= 2 && value.starts_with('"') && value.ends_with('"'),
                    "{line}"
                );
            }
            let suffix = name.strip_prefix(family).unwrap_or_else(|| panic!("{line} is under {family}"));
            let suffixes: &[&str] = if types[family] == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
            assert!(suffixes.contains(&suffix), "{line}");
            assert!(samples.insert(series.to_owned(), value.parse().unwrap()).is_none(), "twice: {line}");
        }
    }
    for (name, _) in types.iter().filter(|(_, kind)| **kind == "histogram") {
        let buckets: Vec<(f64, f64)> = text
            .lines()
            .filter_map(|line| line.strip_prefix(&format!("{name}_bucket{{le=\""))?.split_once("\"} "))
            .map(|(bound, count)| (bound.parse().unwrap_or(f64::INFINITY), count.parse().unwrap()))
            .collect();
        assert!(buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{name}: {buckets:?}");
        assert_eq!(buckets.last(), Some(&(f64::INFINITY, samples[&format!("{name}_count")])), "{name}");
    }
    samples
}

#[test]
fn metrics_count_what_was_done() {
    let server = start(|_| {});
    let before = parse(&server.get("/metrics").body);
    assert_eq!(before["lina_generated_tokens_total"], 0.0);
    assert_eq!(before["lina_time_to_first_token_seconds_count"], 0.0);
    assert!(
        !before.keys().any(|name| name.starts_with("lina_balancedness")),
        "nothing is balanced before the first token"
    );

    server.complete("aa", json!({"max_tokens": 5}));
    server.complete("a", json!({"max_tokens": 1, "stream": true}));
    server.complete("", json!({}));
    server.get("/no/such/path");
    let answer = server.get("/metrics");
    assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    // Load is published a little later.
    server.wait_until("load", |status| status.activity.layers[0].expert_tokens.iter().sum::<u64>() == 7);
    let samples = parse(&server.get("/metrics").body);
    for (series, value) in [
        ("lina_info{version=\"0.1.0\",model=\"alphabet\"}", 1.0),
        ("lina_up", 1.0),
        ("lina_ranks", 2.0),
        ("lina_emulated", 1.0),
        ("lina_http_responses_total{path=\"/v1/completions\",status=\"200\"}", 2.0),
        ("lina_http_responses_total{path=\"/v1/completions\",status=\"400\"}", 1.0),
        ("lina_http_responses_total{path=\"other\",status=\"404\"}", 1.0),
        ("lina_time_to_first_token_seconds_count", 2.0),
        ("lina_time_per_output_token_seconds_count", 1.0),
        ("lina_request_duration_seconds_count", 2.0),
        ("lina_requests_running", 0.0),
        ("lina_requests_queued", 0.0),
        ("lina_requests_finished_total", 2.0),
        ("lina_prompt_tokens_total", 3.0),
        ("lina_generated_tokens_total", 6.0),
        ("lina_popularity_checks_total", 7.0),
        ("lina_replans_total", 2.0),
        ("lina_moved_bytes_total", 4096.0),
        // a, a, b, c, d, e and a of the prompts and answers but for the last tokens, which nothing follows.
        ("lina_expert_tokens_total{layer=\"3\",expert=\"1\"}", 4.0),
        ("lina_device_tokens_total{layer=\"1\",device=\"0\"}", 5.0),
        ("lina_balancedness{layer=\"1\"}", 0.7),
    ] {
        assert_eq!(samples.get(series), Some(&value), "{series}");
    }
    assert!(samples["lina_steps_total"] >= 5.0 && samples["lina_kv_pages"] > 0.0);
}

#[test]
fn status_is_what_the_page_draws() {
    let server = start(|_| {});
    server.complete("a", json!({"max_tokens": 4}));
    server.wait_until("load", |status| status.activity.layers[0].expert_tokens.iter().sum::<u64>() == 4);
    let status = server.get("/status").json();
    assert_eq!(
        (&status["model"], &status["ok"], &status["emulated"]),
        (&json!("alphabet"), &json!(true), &json!(true))
    );
    assert_eq!(status["generated_tokens"], 4);
    let layer = json!({"layer": 1, "expert_tokens": [1, 1, 1, 1], "device_tokens": [2, 2], "resident": [[0, 1], [2, 3]],
        "balancedness": 1.0});
    assert_eq!(status["layers"][0], layer);

    let page = server.get("/");
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    // Every figure that the script reads is there.
    let script = page.body.split("<script>").nth(1).unwrap();
    for field in
        script.split("now.").skip(1).map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap())
    {
        assert!(field == "map" || status.get(field).is_some(), "the page reads `{field}`");
    }
    assert!(!page.body.contains("http://") && !page.body.contains("https://"), "the page asks nobody else");
    assert!(page.header("content-security-policy").unwrap().starts_with("default-src 'none'"));
    assert_eq!(server.get("/health").json(), json!({"status": "ok"}));
}

#[test]
fn a_model_without_experts_has_a_page_too() {
    let server = start(|setting| setting.experts = false);
    server.complete("a", json!({"max_tokens": 4}));
    assert_eq!(server.get("/status").json()["layers"], json!([]));
    assert!(!parse(&server.get("/metrics").body).keys().any(|name| name.starts_with("lina_balancedness")));
}
