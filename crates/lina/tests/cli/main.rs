//! The command line as scripts see it: exit codes, the sentence on stderr, one JSON object on stdout.

mod bad_input;
mod common;
mod disk;
mod generate;
mod gpus;
mod infer;
mod run_folder;
#[cfg(unix)]
mod signals;

use std::process::{Command, Stdio};

use common::{check_fields, folder, json, lina};

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
    assert_eq!(again["out"], "runs/config");

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
