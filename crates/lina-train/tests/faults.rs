//! What goes wrong inside a run: one error, no run folder that looks like more than it is.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use lina_train::{StopFlag, TrainError, TrainOptions, TrainSummary, train};
use tempfile::TempDir;

const RUN: &str = r#"
[model]
kind = "mixtral"
layers = 2
hidden = 16
heads = 2
experts = 4
expert_hidden = 16

[train]
steps = 2
sequence_tokens = 16
batch_sequences = 4
warmup_steps = 1
eval_sequences = 2

[cluster]
ranks = 4
threads = 1
"#;

const EMULATED: [&str; 2] =
    ["cluster.link={ gbps = 1.0, latency_us = 5.0, launch_us = 2.0 }", "cluster.device={ gflops = 20.0 }"];

fn run(assignments: &[&str], out: &Path, resume: Option<PathBuf>) -> Result<TrainSummary, TrainError> {
    let config = common::config(RUN, assignments);
    train(TrainOptions { config, out: Some(out.to_owned()), resume, quiet: true }, &StopFlag::new())
}

/// Puts `value` into the last element of tensor `key`.
fn spoil(file: &Path, key: &str, value: f32) {
    let mut bytes = fs::read(file).unwrap();
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).unwrap();
    let end = 8 + header_bytes + header[key]["data_offsets"][1].as_u64().unwrap() as usize;
    bytes[end - 4..end].copy_from_slice(&value.to_le_bytes());
    fs::write(file, bytes).unwrap();
}

/// Only the rank that holds the expert reads the bad number; the others wait for it and hear of it.
#[test]
fn a_number_that_is_none_in_a_checkpoint_is_named() {
    let folder = TempDir::new().unwrap();
    let first = folder.path().join("first");
    run(&[], &first, None).unwrap();
    let checkpoint = first.join("checkpoint-2");
    for (file, value) in [("model.safetensors", f32::NAN), ("exp_avg_sq.safetensors", f32::INFINITY)] {
        let key = "model.layers.1.block_sparse_moe.experts.3.w2.weight";
        let whole = fs::read(checkpoint.join(file)).unwrap();
        spoil(&checkpoint.join(file), key, value);
        for body in [&[][..], &EMULATED] {
            let out = folder.path().join("out");
            let error = run(&[&["train.steps=4"], body].concat(), &out, Some(checkpoint.clone())).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            let expected = format!(
                "{}: tensor `{key}` has {value} at element 255, expected finite numbers",
                checkpoint.join(file).display()
            );
            assert_eq!(error.to_string(), expected);
            assert!(!out.exists());
        }
        fs::write(checkpoint.join(file), whole).unwrap();
    }
}

#[test]
fn a_run_that_diverges_says_at_which_step() {
    let folder = TempDir::new().unwrap();
    for (body, out) in [(&[][..], "local"), (&EMULATED, "emulated")] {
        let out = folder.path().join(out);
        let changes = ["train.learning_rate=1e9", "train.steps=9", "train.checkpoint_every=1"];
        let error = run(&[&changes, body].concat(), &out, None).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert_eq!(
            error.to_string(),
            "step 1: the gradient's norm is NaN, expected a finite number; lower train.learning_rate = 1000000000 or \
             train.clip_norm = 1"
        );
        // The step before was complete.
        assert!(out.join("checkpoint-1/model.safetensors").exists() && !out.join("checkpoint-2").exists());
    }
}

#[test]
fn memory_is_predicted_within_a_fifth() {
    let folder = TempDir::new().unwrap();
    let changes = [
        "model.hidden=192",
        "model.expert_hidden=768",
        "model.experts=8",
        "model.layers=4",
        "train.batch_sequences=32",
        "train.sequence_tokens=64",
    ];
    let summary = run(&[&changes[..], &EMULATED].concat(), &folder.path().join("run"), None).unwrap();
    let Some(peak_bytes) = summary.peak_rss_bytes else { return };
    let predicted_bytes = summary.memory.total_bytes;
    assert!(predicted_bytes > 300 << 20, "{}", summary.memory.table(None));
    let ratio = predicted_bytes as f64 / peak_bytes as f64;
    assert!((0.8..1.25).contains(&ratio), "{}", summary.memory.table(Some(peak_bytes)));
}
