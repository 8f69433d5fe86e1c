//! `lina profile`, `lina bench infer` and `lina bench decode`: what they print, the same numbers twice, and what they refuse.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::common::{RUN, check_fields, check_in, json};

/// Four emulated ranks, two sequences each.
const CLUSTER: &str = r#"
[cluster]
ranks = 4
link = { gbps = 1, latency_us = 5, launch_us = 2 }
device = { gflops = 10, copy_gbps = 10 }

[infer]
slots = 5
sequence_tokens = 16
batch_sequences = 8
batches = 6
warmup_batches = 2
plan_us = 5
verify_every = 3
"#;

/// In the order in which results come.
const SCHEDULERS: &str = "static,ideal,lina,lina-auto,eplb,lina@oracle";

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../lina-model/tests/fixtures/hf/qwen3_moe")
}

/// A folder with a model of 128 ids in `model`, a text in them, and a configuration.
fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    let path = folder.path();
    fs::create_dir(path.join("model")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixture().join(file), path.join("model").join(file)).unwrap();
    }
    let text: String = (0..60).map(|line| format!("line {line} of a text, {} words\n", line * 7 % 13)).collect();
    fs::write(path.join("text.txt"), text).unwrap();
    fs::write(path.join("infer.toml"), CLUSTER).unwrap();
    folder
}

const PROFILE: [&str; 4] = ["profile", "model", "--data", "text.txt"];
const INFER: [&str; 6] = ["bench", "infer", "model", "--data", "text.txt", "--config"];

fn profiled() -> TempDir {
    let folder = folder();
    json(folder.path(), &[&PROFILE[..], &["--out", "paths", "--json", "--quiet"]].concat());
    folder
}

fn infer<'a>(options: &[&'a str]) -> Vec<&'a str> {
    [&INFER[..], &["infer.toml", "--profile", "paths"], options].concat()
}

/// What depends on the wall clock, which no two runs share.
fn without_wall_clock(mut value: Value) -> Value {
    for result in value["schedulers"].as_array_mut().unwrap() {
        for field in ["plan_us_median", "estimate_us_median"] {
            result[field].take();
        }
    }
    value
}

#[test]
fn a_profile_says_what_it_holds() {
    let folder = folder();
    let path = folder.path();
    let value =
        json(path, &[&PROFILE[..], &["--out", "paths", "--held-out", "text.txt", "--json", "--quiet"]].concat());
    check_fields(&value, &["file", "file_bytes", "tokens", "length", "paths", "following", "estimators"]);
    assert_eq!(value["file_bytes"], fs::metadata(path.join("paths")).unwrap().len());
    // Experts are in the first and the last of three layers.
    assert_eq!(value["following"].as_array().unwrap().len(), 1);
    let mean = |name: &str| {
        let rows = value["estimators"].as_array().unwrap();
        let row = rows.iter().find(|row| row["estimator"] == name).unwrap_or_else(|| panic!("no `{name}` in {value}"));
        row["mean"]["tokens"].as_f64().unwrap()
    };
    // What a table learned from the very text can do is what any table of its length can do.
    assert_eq!(mean("path, l = 3"), mean("best table, l = 3"));
}

#[test]
fn schedulers_are_compared_and_numbers_repeat() {
    let folder = profiled();
    let arguments = infer(&["--schedulers", SCHEDULERS, "--json", "--quiet"]);
    let value = json(folder.path(), &arguments);
    check_fields(&value, &["ranks", "emulated", "w", "r_static", "schedulers"]);
    assert_eq!((&value["ranks"], &value["emulated"]), (&4.into(), &true.into()));
    let rows = value["schedulers"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["scheduler"].as_str().unwrap()).collect();
    assert_eq!(names, SCHEDULERS.split(',').collect::<Vec<_>>());
    for row in rows {
        check_fields(
            row,
            &[
                "p50_ms",
                "p95_ms",
                "p95_vs_ideal",
                "accuracy",
                "replan_rate",
                "plan_us_median",
                "moved_bytes",
                "imbalance",
            ],
        );
        assert!(row["p50_ms"].as_f64().unwrap() > 0.0 && row["imbalance"].as_f64().unwrap() >= 1.0, "{row}");
    }
    let (fixed, ideal, oracle) = (&rows[0], &rows[1], &rows[5]);
    assert_eq!((fixed["moved_bytes"].as_f64(), fixed["replan_rate"].as_f64()), (Some(0.0), Some(0.0)));
    assert_eq!((ideal["p95_vs_ideal"].as_f64(), ideal["imbalance"].as_f64()), (Some(1.0), Some(1.0)));
    assert_eq!(oracle["accuracy"].as_f64(), Some(1.0));
    let again = json(folder.path(), &arguments);
    assert_eq!(without_wall_clock(again), without_wall_clock(value));
}

#[test]
fn decoding_is_compared_too() {
    let folder = profiled();
    let options = ["--schedulers", "lina-auto,lina", "--set", "infer.batch=decode", "--json", "--quiet"];
    let value = json(folder.path(), &infer(&options));
    assert_eq!((&value["batch"], &value["batch_tokens"]), (&"decode".into(), &8.into()));
    assert_eq!(value["schedulers"].as_array().unwrap().len(), 4);
}

#[test]
fn comparisons_that_cannot_be() {
    let folder = profiled();
    let path = folder.path();
    let refused = |options: &[&str], sentence: &str| check_in(path, &infer(options), 2, sentence);
    refused(
        &["--schedulers", "static,nearest"],
        "--schedulers: scheduler `nearest` is unknown, expected one of ideal, static, lina, eplb, lina-auto, best, \
         no-estimation, no-fine-tuning",
    );
    refused(
        &["--schedulers", "eplb@path"],
        "--schedulers: scheduler `eplb@path`: `eplb` has no phase one, expected it without `@`",
    );
    refused(&["--set", "infer.slotz=3"], "--set infer.slotz=3: unknown key `infer.slotz`, did you mean `slots`?");
    refused(
        &["--set", "infer.batches=0"],
        "--set infer.batches=0: `infer.batches` is 0, expected a number from 1 to 1048576",
    );
    refused(
        &["--set", "infer.slots=3"],
        "infer.slots is 3: 3 slots on each of 4 devices hold 12 experts, but a layer has 16",
    );
    refused(
        &["--set", "infer.sequence_tokens=97"],
        "infer.sequence_tokens is 97, expected at most 96, the model's positions",
    );
    let without_profile = [&INFER[..], &["infer.toml"]].concat();
    check_in(
        path,
        &without_profile,
        2,
        "schedulers that go by `path` need --profile, a file that `lina profile` has made",
    );
    check_in(
        path,
        &[&INFER[..], &["none.toml"]].concat(),
        2,
        "cannot read the configuration `none.toml`: No such file or directory (os error 2)",
    );
    fs::write(path.join("bad.toml"), format!("{CLUSTER}slotz = 3\n")).unwrap();
    check_in(
        path,
        &[&INFER[..], &["bad.toml"]].concat(),
        2,
        "bad.toml line 15: unknown key `infer.slotz`, did you mean `slots`?",
    );
}

#[test]
fn profiles_that_cannot_be() {
    let folder = folder();
    let path = folder.path();
    let refused =
        |options: &[&str], sentence: &str| check_in(path, &[&PROFILE, options, &["--quiet"]].concat(), 2, sentence);
    refused(&["--out", "none/paths"], "none/paths cannot be written: none is no folder");
    refused(&["--out", "paths", "--path-length", "0"], "--path-length is 0, expected at least 1");
    refused(
        &["--out", "paths", "--path-length", "99"],
        "--path-length is 99: paths of 99 choices among 16 experts: expected experts to the power of the length below 2^64",
    );
    refused(&["--out", "paths", "--seq-tokens", "97"], "--seq-tokens is 97, expected 2 to 96, the model's positions");
    let config = fs::read_to_string(path.join("model/config.json")).unwrap();
    let experts_in_one_layer = config.replacen("    1\n", "    0,\n    1\n", 1);
    assert_ne!(experts_in_one_layer, config);
    fs::write(path.join("model/config.json"), experts_in_one_layer).unwrap();
    refused(
        &["--out", "paths"],
        "model has 1 layers with experts, expected at least 2: a profile says what follows what",
    );
}

#[test]
fn profiles_that_are_no_use() {
    let folder = profiled();
    let path = folder.path();
    let whole = fs::read(path.join("paths")).unwrap();
    fs::write(path.join("paths"), &whole[..whole.len() - 5]).unwrap();
    let cut = crate::common::lina(path, &infer(&[]));
    let message = String::from_utf8(cut.stderr).unwrap();
    assert_eq!((cut.status.code(), message.lines().count()), (Some(2), 1), "{message}");
    assert!(message.starts_with("error: paths: is no profile, expected a safetensors file"), "{message}");
    check_in(
        path,
        &[&INFER[..], &["infer.toml", "--profile", "model/model.safetensors"]].concat(),
        2,
        "model/model.safetensors: is no profile, expected a file that `lina profile` has made",
    );
}

#[test]
fn a_token_is_compared_with_reading_its_weights() {
    let folder = folder();
    let path = folder.path();
    let decode =
        ["bench", "decode", "model", "--rounds", "1", "--tokens", "2", "--prompt-tokens", "8", "--threads", "1"];
    let value = json(path, &[&decode[..], &["--json", "--quiet"]].concat());
    check_fields(
        &value,
        &["active_bytes", "read_gb_per_s", "bound_ms", "decode_ms", "decode_over_bound", "prefill_ms", "products_ms"],
    );
    assert_eq!((&value["initial_weights"], &value["threads"]), (&false.into(), &1.into()));
    assert!(value["decode_ms"].as_f64().unwrap() > 0.0 && value["products_gflop"].as_f64().unwrap() > 0.0);
    fs::write(path.join("run.toml"), RUN).unwrap();
    let of_sizes = ["bench", "decode", "run.toml", "--rounds", "1", "--tokens", "2", "--prompt-tokens", "8"];
    assert_eq!(json(path, &[&of_sizes[..], &["--json", "--quiet"]].concat())["initial_weights"], true);
    for (options, sentence) in [
        (&["--rounds", "0"][..], "--rounds is 0, expected a number from 1 to 10000"),
        (&["--dtype", "bfloat16"], "--dtype is bfloat16, expected float32: processors compute in nothing else"),
        (&["--prompt-tokens", "97"], "--prompt-tokens is 97, expected a number from 1 to 96, the model's positions"),
        (
            &["--tokens", "33", "--prompt-tokens", "9"],
            "--tokens is 33, expected a number from 1 to 32, the model's positions less the 64 before",
        ),
        (&["--threads", "5000", "--prompt-tokens", "9"], "--threads is 5000, expected a number from 0 to 1024"),
    ] {
        check_in(path, &[&["bench", "decode", "model"], options].concat(), 2, sentence);
    }
    check_in(
        path,
        &["bench", "decode", "none.toml"],
        2,
        "cannot read the configuration `none.toml`: No such file or directory (os error 2)",
    );
}
