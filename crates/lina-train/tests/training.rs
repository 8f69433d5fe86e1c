//! Whole runs: the same numbers under every policy and number of ranks, exact resumption, faults.

mod common;

use std::path::PathBuf;

use common::{Run, evaluated, largest_difference};
use lina_train::{Engine, RunConfig, StopFlag, TrainError, TrainOptions, train};
use tempfile::TempDir;

const BASE: &str = r#"
[model]
kind = "mixtral"
layers = 2
hidden = 32
heads = 4
kv_heads = 2
experts = 6
top_k = 2
expert_hidden = 48
aux_loss = "switch"
aux_loss_coefficient = 0.02
z_loss_coefficient = 0.001

[train]
steps = 20
sequence_tokens = 24
batch_sequences = 8
learning_rate = 3e-3
warmup_steps = 4
eval_every = 10
eval_sequences = 5

[cluster]
ranks = 4
threads = 1
link = { gbps = 1.0, latency_us = 5.0, launch_us = 2.0 }
device = { gflops = 20.0 }

[policy]
name = "lina"
bucket_bytes = 20000
partition_bytes = 5000
pipeline_chunks = 2
"#;

fn config(overrides: &[&str]) -> RunConfig {
    common::config(BASE, overrides)
}

fn run_from(overrides: &[&str], resume: Option<PathBuf>) -> Run {
    Run::new(config(overrides), resume)
}

fn run(overrides: &[&str]) -> Run {
    let run = run_from(overrides, None);
    run.summary();
    run
}

/// Invariant 2: when things are sent does not change what is computed, to the bit.
#[test]
fn an_evaluation_is_the_same_on_any_number_of_ranks() {
    let run = run(&["train.steps=4", "model.layers=3"]);
    let on = |ranks| evaluated(run.checkpoint(4), ranks, Engine::Local, None);
    let alone = on(1);
    assert!(alone > 1.0 && alone < 6.0, "{alone}");
    for ranks in [2, 4] {
        assert!((on(ranks) - alone).abs() < 1e-9, "{ranks} ranks: {}, alone {alone}", on(ranks));
    }
}

#[test]
fn policies_partitions_and_depths_agree_bit_for_bit() {
    let reference = run(&["policy.name=fair"]);
    assert!(reference.losses()[19] < reference.losses()[0]);
    for change in [
        &["policy.name=priority"][..],
        &["policy.name=fixed"],
        &["policy.name=partition"],
        &["policy.name=lina-auto"],
        &["policy.name=lina", "policy.pipeline_chunks=1"],
        &["policy.name=lina", "policy.defer_attention_gradients=true"],
        &["policy.name=lina", "policy.pipeline_chunks=2", "policy.partition_bytes=1000"],
        &["policy.name=lina", "policy.pipeline_chunks=4", "policy.partition_bytes=20000"],
        &["policy.name=lina", "policy.pipeline_chunks=3", "policy.partition_bytes=100000"],
    ] {
        let other = run(change);
        assert_eq!(other.losses(), reference.losses(), "{change:?}");
        assert!(other.weights(20) == reference.weights(20), "{change:?}: other weights");
    }
}

/// The same arithmetic with real threads and the wall clock instead of virtual time.
#[test]
fn the_local_engine_agrees_with_the_emulated_cluster_bit_for_bit() {
    let emulated = run(&["policy.name=lina"]);
    let text: String = BASE
        .lines()
        .filter(|line| !line.starts_with("link") && !line.starts_with("device"))
        .fold(String::new(), |text, line| text + line + "\n");
    let config = common::config(&text, &[]);
    assert!(!config.is_emulated());
    let local = Run::new(config, None);
    assert_eq!(local.losses(), emulated.losses());
    assert!(local.weights(20) == emulated.weights(20));
}

/// The batch is global: the number of ranks and the placement of experts change rounding only.
#[test]
fn any_number_of_ranks_learns_the_same() {
    let reference = run(&["cluster.ranks=1"]);
    for change in [
        &["cluster.ranks=2"][..],
        &["cluster.ranks=3"],
        &["cluster.ranks=4"],
        &["cluster.ranks=8"],
        &["cluster.ranks=4", "cluster.experts_per_rank=3"],
        &["cluster.ranks=3", "cluster.experts_per_rank=6"],
        &["cluster.ranks=11"],
    ] {
        let other = run(change);
        let difference = largest_difference(&other.losses(), &reference.losses());
        assert!(difference < 1e-3, "{change:?}: losses differ by {difference}");
    }
}

/// Accumulation changes rounding only, once the router losses, which are means over micro-batches, are off.
#[test]
fn accumulated_gradients_learn_the_same() {
    let plain = ["model.aux_loss_coefficient=0.0", "model.z_loss_coefficient=0.0"];
    let whole = run(&plain);
    let parts = run(&[&plain[..], &["cluster.ranks=3", "train.micro_batches=3"]].concat());
    let difference = largest_difference(&parts.losses(), &whole.losses());
    assert!(difference < 1e-3, "losses differ by {difference}");
}

#[test]
fn a_resumed_run_equals_the_uninterrupted_one() {
    let whole = run(&["train.checkpoint_every=8"]);
    let checkpoint = whole.out().join("checkpoint-8");
    let same = run_from(&[], Some(checkpoint.clone()));
    assert_eq!(same.summary.as_ref().unwrap().steps, 20);
    assert_eq!(same.losses(), whole.losses()[8..]);
    assert!(same.weights(20) == whole.weights(20));
    for change in [&["cluster.ranks=3"][..], &["cluster.ranks=1"], &["cluster.experts_per_rank=3"]] {
        let other = run_from(change, Some(checkpoint.clone()));
        let difference = largest_difference(&other.losses(), &whole.losses()[8..]);
        assert!(difference < 1e-3, "{change:?}: losses differ by {difference}");
    }
}

/// `lina-auto` changes its sizes on all ranks at once (or the job would not go on), comes to rest, and a run that stops in
/// the middle of its search finds what the uninterrupted one finds.
#[test]
fn a_search_settles_and_resumes() {
    let auto = [
        "policy.name=lina-auto",
        "policy.partition_bytes=2000",
        "policy.pipeline_chunks=4",
        "train.steps=48",
        "train.eval_every=0",
    ];
    let whole = run(&[&auto[..], &["train.checkpoint_every=10"]].concat());
    let sizes = |run: &Run| -> Vec<(u64, u64)> {
        let size = |line: &serde_json::Value, key: &str| line[key].as_u64().unwrap();
        run.metrics().iter().map(|line| (size(line, "partition_bytes"), size(line, "pipeline_chunks"))).collect()
    };
    let tried = sizes(&whole);
    assert_eq!(tried[..4], [(2000, 4); 4]);
    assert!(tried.iter().any(|&(_, chunks)| chunks != 4) && tried.iter().any(|&(bytes, _)| bytes != 2000));
    assert!(tried[40..].iter().all(|sizes| *sizes == tried[40]), "{tried:?}");
    let settings = whole.summary.as_ref().unwrap().settings;
    assert_eq!((settings.partition_bytes as u64, settings.pipeline_chunks as u64), tried[47]);
    let fixed = run(&[&auto[..], &["policy.name=lina"]].concat());
    let last_ms = |run: &Run| run.metrics()[47]["step_ms"].as_f64().unwrap();
    assert!(last_ms(&whole) < 0.95 * last_ms(&fixed), "{} ms, {} without a search", last_ms(&whole), last_ms(&fixed));

    let rest = run_from(&auto, Some(whole.out().join("checkpoint-10")));
    assert_eq!(sizes(&rest), tried[10..]);
    assert!(rest.weights(48) == whole.weights(48));
    let state = |run: &Run| run.text("checkpoint-48/trainer_state.json");
    assert_eq!(state(&rest), state(&whole));
}

#[test]
fn a_run_directory_is_complete() {
    let run = run(&["bench.policies=[\"fair\",\"lina\"]", "bench.steps=2", "bench.warmup_steps=2"]);
    for name in ["config.toml", "metrics.jsonl", "trace.json", "report.html", "checkpoint-20/config.json"] {
        assert!(run.out().join(name).exists(), "{name}");
    }
    let summary = run.summary.as_ref().unwrap();
    assert!(summary.emulated);
    assert!(summary.eval_loss.unwrap() < summary.eval_loss_start.unwrap());
    let bench = summary.bench.as_ref().unwrap();
    assert_eq!(bench.policies.len(), 2);
    assert!(bench.policies.iter().all(|row| row.ratio_to_bound.unwrap() >= 1.0), "{bench:?}");
    let resolved = RunConfig::load(&run.out().join("config.toml"), &[]).unwrap();
    assert_eq!(resolved.train, config(&[]).train);
}

#[test]
fn capacity_drops_the_same_tokens_on_any_number_of_ranks() {
    let drops = |ranks: &str| -> Vec<f64> {
        let run = run(&[ranks, "model.capacity_factor=0.8", "train.steps=4"]);
        run.metrics().iter().map(|line| line["drop_rate"].as_f64().unwrap()).collect()
    };
    let one = drops("cluster.ranks=1");
    assert!(one.iter().all(|&rate| rate > 0.1), "{one:?}");
    assert_eq!(drops("cluster.ranks=3"), one);
}

#[test]
fn a_stop_writes_a_checkpoint_that_goes_on() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("run");
    let stop = StopFlag::new();
    stop.request();
    let options = TrainOptions { config: config(&[]), out: Some(out.clone()), resume: None, quiet: true };
    let error = train(options, &stop).unwrap_err();
    assert_eq!(error.exit_code(), 130);
    let TrainError::Interrupted { step: 1, checkpoint: Some(checkpoint) } = error else { panic!("{error}") };
    let rest = run_from(&[], Some(checkpoint));
    assert_eq!(rest.losses(), run(&[]).losses()[1..]);
}

#[test]
fn what_does_not_fit_a_checkpoint_is_named() {
    let whole = run(&["train.steps=2"]);
    let checkpoint = whole.out().join("checkpoint-2");
    let error = |overrides: &[&str]| {
        let error = run_from(overrides, Some(checkpoint.clone())).summary.unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    };
    assert!(
        error(&["model.hidden=64"]).contains("is a checkpoint of another model"),
        "{}",
        error(&["model.hidden=64"])
    );
    assert!(error(&["train.seed=9"]).contains("train.seed was 1 and is 9 now"));
    assert!(error(&["train.steps=2"]).contains("2 steps are done, expected fewer than train.steps = 2"));
    std::fs::write(checkpoint.join("exp_avg.safetensors"), b"short").unwrap();
    assert!(error(&[]).contains("exp_avg.safetensors"), "{}", error(&[]));
}

#[test]
fn what_does_not_fit_in_memory_is_refused_with_the_numbers() {
    let options =
        TrainOptions { config: config(&["cluster.memory_limit_gib=0.01"]), out: None, resume: None, quiet: true };
    let message = train(options, &StopFlag::new()).unwrap_err().to_string();
    assert!(message.contains("expected at most 10 MiB (cluster.memory_limit_gib)"), "{message}");
}
