//! The command line as scripts see it: exit codes, the sentence on stderr, one JSON object on stdout.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// Trains within a second.
const RUN: &str = r#"
[model]
kind = "mixtral"
hidden = 16
layers = 2
heads = 2
experts = 4
expert_hidden = 16

[data]
files = ["text.txt"]

[train]
steps = 3
sequence_tokens = 16
batch_sequences = 4
warmup_steps = 1
eval_sequences = 2

[cluster]
ranks = 2
link = { gbps = 1, latency_us = 5, launch_us = 2 }
device = { gflops = 10 }
"#;

/// A folder with the configuration `run.toml` and its data.
fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("run.toml"), RUN).unwrap();
    let text: String = (0..400).map(|line| format!("line {line} of a text that is long enough\n")).collect();
    fs::write(folder.path().join("text.txt"), text).unwrap();
    folder
}

fn lina(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lina")).args(arguments).current_dir(folder).output().unwrap()
}

/// Runs `lina` with arguments that it refuses: nothing on stdout, one sentence on stderr.
#[track_caller]
fn check(arguments: &[&str], exit_code: i32, sentence: &str) {
    let folder = folder();
    let output = lina(folder.path(), arguments);
    assert_eq!(String::from_utf8_lossy(&output.stderr), format!("error: {sentence}\n"), "{arguments:?}");
    assert_eq!(output.status.code(), Some(exit_code), "{arguments:?}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
}

/// Runs `lina` and returns the one object on its stdout.
#[track_caller]
fn json(folder: &Path, arguments: &[&str]) -> Value {
    let output = lina(folder, arguments);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(value.is_object());
    value
}

/// Looks for the fields that the JSON promises.
#[track_caller]
fn check_fields(value: &Value, fields: &[&str]) {
    for field in fields {
        assert!(value.get(field).is_some(), "no `{field}` in {value}");
    }
}

#[test]
fn a_configuration_that_is_not_there() {
    check(
        &["train", "no/such.toml"],
        2,
        "cannot read the configuration `no/such.toml`: No such file or directory (os error 2)",
    );
}

#[test]
fn assignments_that_make_no_sense() {
    for (assignment, sentence) in [
        ("train.learnin_rate=1", "unknown key `train.learnin_rate`, did you mean `learning_rate`?"),
        (
            "policy.zzz=1",
            "unknown key `policy.zzz`, expected one of name, bucket_bytes, partition_bytes, pipeline_chunks",
        ),
        ("train.steps=ten", "`train.steps` is \"ten\", expected a whole number of at least 0"),
        ("train.steps", "expected a key and a value, such as train.steps=10"),
        ("policy.name=linna", "`policy.name` is \"linna\", expected one of fair, priority, fixed, lina"),
    ] {
        let sentence = format!("--set {assignment}: {sentence}");
        check(&["train", "run.toml", "--set", assignment], 2, &sentence);
        check(&["bench", "train", "run.toml", "--set", assignment], 2, &sentence);
    }
    // Without its device, the line that the file has becomes the culprit.
    check(
        &["train", "run.toml", "--set", "cluster.device="],
        2,
        "run.toml line 22: `cluster.link` is set and `cluster.device` is not, but an emulated cluster needs both",
    );
}

#[test]
fn short_options_are_checked_as_keys_are() {
    check(
        &["train", "run.toml", "--policy", "linna"],
        2,
        "--policy linna: `policy.name` is \"linna\", expected one of fair, priority, fixed, lina",
    );
    check(
        &["train", "run.toml", "--engine", "mpi"],
        2,
        "--engine mpi: this build has no engine `mpi`, it has `local`; `lina doctor` says more",
    );
    check(
        &["train", "run.toml", "--engine", "tcp"],
        2,
        "--engine tcp: `cluster.engine` is \"tcp\", expected one of local, mpi, nccl",
    );
    check(
        &["train", "run.toml", "--ranks", "-1"],
        2,
        "--ranks -1: `cluster.ranks` is -1, expected a whole number of at least 0",
    );
    check(
        &["train", "run.toml", "--steps", "0"],
        2,
        "--steps 0: `train.steps` is 0, expected a number from 1 to 1099511627776",
    );
    check(
        &["bench", "train", "run.toml", "--policies", "fair,lina-auto"],
        2,
        "--policies fair,lina-auto: `bench.policies[1]` is \"lina-auto\", expected one of fair, priority, fixed, lina",
    );
}

#[test]
fn data_that_is_not_there() {
    check(
        &["train", "run.toml", "--set", "data=none/*.txt"],
        2,
        "the data glob `none/*.txt` matches no file; each glob must match at least one (`dir/**/*.txt` looks into folders \
         below `dir`)",
    );
}

#[test]
fn a_run_leaves_its_folder_and_one_object() {
    let folder = folder();
    let value = json(folder.path(), &["train", "run.toml", "--out", "run", "--json"]);
    check_fields(
        &value,
        &[
            "steps",
            "final_loss",
            "eval_loss",
            "step_ms_median",
            "wall_s",
            "tokens_per_s",
            "peak_rss_bytes",
            "checkpoint",
            "emulated",
        ],
    );
    assert_eq!(value["steps"], 3);
    assert_eq!(value["emulated"], true);
    for file in ["config.toml", "metrics.jsonl", "trace.json", "report.html", "checkpoint-3/model.safetensors"] {
        assert!(folder.path().join("run").join(file).is_file(), "{file}");
    }
    let again = json(folder.path(), &["train", "run/config.toml", "--json", "--quiet"]);
    assert_eq!(again["final_loss"], value["final_loss"]);

    let value =
        json(folder.path(), &["eval", "run/checkpoint-3", "--data", "text.txt", "--seq-tokens", "16", "--json"]);
    check_fields(&value, &["loss", "perplexity", "tokens"]);
}

#[test]
fn policies_are_compared() {
    let folder = folder();
    let arguments = ["bench", "train", "run.toml", "--policies", "fair,lina", "--set", "bench.steps=2", "--json"];
    let value = json(folder.path(), &arguments);
    check_fields(&value, &["engine", "ranks", "emulated", "link_bound_ms", "policies"]);
    let policies: Vec<_> = value["policies"].as_array().unwrap().iter().map(|row| &row["policy"]).collect();
    assert_eq!(policies, ["fair", "lina"]);
}

#[test]
fn a_step_is_compared_with_its_products() {
    let folder = folder();
    let one_rank = ["--set", "cluster.ranks=1", "cluster.link=", "cluster.device="];
    let value = json(folder.path(), &[&["bench", "compute", "run.toml", "--json"], one_rank.as_slice()].concat());
    check_fields(&value, &["step_ms", "products_ms", "step_over_products"]);
}

#[test]
fn the_doctor_knows_every_engine() {
    let folder = folder();
    let value = json(folder.path(), &["doctor", "--json"]);
    check_fields(&value, &["build", "machine", "engines"]);
    let engines: Vec<_> = value["engines"].as_array().unwrap().iter().map(|engine| &engine["engine"]).collect();
    assert_eq!(engines, ["local", "mpi", "nccl"]);
    assert_eq!(value["engines"][0]["ready"], true);
    let text = lina(folder.path(), &["doctor"]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("in this build"));
}

#[test]
fn a_reader_that_went_away_is_no_error() {
    let folder = folder();
    let mut child = Command::new(env!("CARGO_BIN_EXE_lina"))
        .args(["doctor"])
        .current_dir(folder.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), b"".as_slice()));
}
