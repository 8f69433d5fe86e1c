//! Expert packing: decided alike on all ranks, without a jump in what is computed, kept in checkpoints, and worth it
//! where `examples/packing.toml` says so.

mod common;

use std::path::{Path, PathBuf};

use common::{Run, largest_difference};
use lina_report::PolicyRow;
use lina_train::{BenchOptions, BenchSummary, Override, RunConfig, bench_train};

/// Two nodes of two; packing twice puts every expert into each node.
const BASE: &str = r#"
[model]
kind = "mixtral"
layers = 2
hidden = 32
heads = 4
experts = 4
top_k = 2
expert_hidden = 16
aux_loss = "switch"
aux_loss_coefficient = 0.02

[train]
steps = 20
sequence_tokens = 24
batch_sequences = 16
learning_rate = 3e-3
warmup_steps = 4
eval_every = 0
eval_sequences = 5

[cluster]
ranks = 4
threads = 1
link = { gbps = 1.0, latency_us = 1.0, launch_us = 1.0, nodes = 2, inner_gbps = 20.0 }
device = { gflops = 20.0 }

[policy]
name = "lina"
packing = true
bucket_bytes = 20000
partition_bytes = 5000
pipeline_chunks = 2
"#;

fn run_from(config: RunConfig, resume: Option<PathBuf>) -> Run {
    let run = Run::new(config, resume);
    run.summary();
    run
}

fn run(overrides: &[&str]) -> Run {
    run_from(common::config(BASE, overrides), None)
}

/// Experts a rank of each step.
fn experts_per_rank(run: &Run) -> Vec<u64> {
    run.metrics().iter().map(|line| line["experts_per_rank"].as_u64().unwrap()).collect()
}

/// The experts a rank of `steps` steps that change where `changes` says.
fn stages(steps: u64, changes: &[(u64, u64)]) -> Vec<u64> {
    let at = |step: u64| changes.iter().rev().find(|(from, _)| step >= *from).map_or(1, |(_, experts)| *experts);
    (0..steps).map(at).collect()
}

#[test]
fn losses_do_not_jump() {
    let packed = run(&["policy.max_experts_per_rank=2"]);
    assert_eq!(experts_per_rank(&packed), stages(20, &[(10, 2)]));
    assert_eq!(packed.summary().experts_per_rank, 2);
    let final_layout = run(&["policy.packing=false", "cluster.experts_per_rank=2"]);
    let never = run(&["policy.packing=false"]);
    assert_eq!(packed.losses()[..10], never.losses()[..10], "nothing has changed before step 10");
    let difference = largest_difference(&packed.losses(), &final_layout.losses());
    assert!(difference < 1e-4, "losses differ by {difference}");
    assert!(packed.losses()[19] < packed.losses()[0]);
}

/// When things are sent changes neither what is decided here nor what is computed.
#[test]
fn schedules_that_decide_alike_agree_bit_for_bit() {
    let most = "policy.max_experts_per_rank=2";
    let reference = run(&[most]);
    for change in [&["policy.name=fair"][..], &["policy.name=fixed"], &["policy.pipeline_chunks=1"]] {
        let other = run(&[&[most], change].concat());
        assert_eq!(experts_per_rank(&other), experts_per_rank(&reference), "{change:?}");
        assert_eq!(other.losses(), reference.losses(), "{change:?}");
        assert!(other.weights(20) == reference.weights(20), "{change:?}: other weights");
    }
}

/// Before, at and after a change, and while one is on trial.
#[test]
fn a_run_resumes_across_changes_bit_for_bit() {
    let whole = run(&["train.checkpoint_every=1"]);
    assert!(experts_per_rank(&whole)[19] > 1);
    for step in [7, 9, 10, 12, 14, 17] {
        let checkpoint = whole.out().join(format!("checkpoint-{step}"));
        let rest = run_from(common::config(BASE, &[]), Some(checkpoint));
        assert_eq!(experts_per_rank(&rest), experts_per_rank(&whole)[step as usize..], "from step {step}");
        assert_eq!(rest.losses(), whole.losses()[step as usize..], "from step {step}");
        assert!(rest.weights(20) == whole.weights(20), "from step {step}: other weights");
    }
}

/// Another number of ranks begins with its own layout, and so does a run that does not pack any more.
#[test]
fn a_packed_checkpoint_goes_on_anywhere() {
    let whole = run(&["train.checkpoint_every=15"]);
    for (change, experts) in [("cluster.ranks=2", 2), ("policy.packing=false", 1)] {
        let rest = run_from(common::config(BASE, &[change]), Some(whole.out().join("checkpoint-15")));
        assert_eq!(experts_per_rank(&rest), [experts; 5], "{change}");
        let difference = largest_difference(&rest.losses(), &whole.losses()[15..]);
        assert!(difference < 1e-3, "{change}: losses differ by {difference}");
    }
}

/// Where all links are alike, packing saves a part of the exchanges, and reductions of large experts cost more.
#[test]
fn what_does_not_pay_is_undone() {
    let costly = [
        "model.expert_hidden=256",
        "cluster.device.gflops=2000",
        "cluster.link.nodes=4",
        "train.steps=30",
        "train.batch_sequences=4",
    ];
    let packed = run(&costly);
    assert_eq!(experts_per_rank(&packed), stages(30, &[(10, 2), (14, 1)]));
    let never = run(&[&costly[..], &["policy.packing=false"]].concat());
    let difference = largest_difference(&packed.losses(), &never.losses());
    assert!(difference < 1e-4, "losses differ by {difference}");
    let step_ms = |run: &Run| run.metrics()[29]["step_ms"].as_f64().unwrap();
    assert!((step_ms(&packed) / step_ms(&never) - 1.0).abs() < 0.02, "{} {}", step_ms(&packed), step_ms(&never));
}

#[test]
fn what_does_not_fit_in_memory_is_not_taken() {
    let limit_mib = |run: &Run, factor: f64| run.summary().memory.total_bytes as f64 * factor / f64::from(1 << 30);
    let most = "policy.max_experts_per_rank=2";
    let packed = run(&[most]);
    let never = run(&[most, "policy.packing=false"]);
    assert_eq!((packed.summary().experts_per_rank, never.summary().experts_per_rank), (2, 1));
    // Enough for the layout that the run starts with, and not for the next one.
    let limit = format!("cluster.memory_limit_gib={}", limit_mib(&never, 1.001));
    let short = run(&[most, &limit]);
    assert_eq!(short.summary().experts_per_rank, 1);
    assert_eq!(short.losses(), never.losses());
}

/// Real threads and the wall clock: what is decided depends on the machine, what is computed does not.
#[test]
fn the_local_engine_packs_too() {
    let text: String = BASE
        .lines()
        .filter(|line| !line.starts_with("link") && !line.starts_with("device"))
        .fold(String::new(), |text, line| text + line + "\n");
    let local = run_from(common::config(&text, &[]), None);
    let reference = run(&["policy.packing=false"]);
    let difference = largest_difference(&local.losses(), &reference.losses());
    assert!(difference < 1e-4, "losses differ by {difference}");
}

/// Two ranks come to hold both experts each; on the way back nothing has to move.
#[test]
fn a_comparison_unpacks_what_every_rank_holds() {
    let overrides = [
        "cluster.ranks=2",
        "model.experts=2",
        "cluster.link.gbps=0.5",
        "bench.policies=[\"lina+packing\",\"lina\"]",
        "bench.steps=2",
        "bench.rounds=2",
    ];
    let config = common::config(BASE, &overrides);
    let experts: Vec<usize> =
        bench_train(BenchOptions::new(config)).unwrap().policies.iter().map(|row| row.experts_per_rank).collect();
    assert_eq!(experts, [2, 1]);
}

#[test]
fn a_comparison_packs_in_its_own_row_only() {
    let mut config = common::config(
        BASE,
        &["bench.policies=[\"lina+packing\",\"lina\",\"fair\"]", "bench.steps=2", "bench.rounds=2"],
    );
    config.policy.packing = false;
    let summary = bench_train(BenchOptions::new(config)).unwrap();
    let experts: Vec<usize> = summary.policies.iter().map(|row| row.experts_per_rank).collect();
    assert!(experts[0] > 1 && experts[1..] == [1, 1], "{experts:?}");
    assert!(row(&summary, "lina+packing").step_ms_median < row(&summary, "lina").step_ms_median);
}

fn row<'a>(summary: &'a BenchSummary, policy: &str) -> &'a PolicyRow {
    summary.policies.iter().find(|row| row.policy == policy).unwrap()
}

/// Eight experts on two nodes of four: the paper measures 1.73x over its baseline.
#[test]
fn packing_removes_the_exchanges_between_nodes() {
    // Paths in examples are relative to the repository.
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let data = format!("data.files={}", repository.join("examples/data/synthetic.txt").display());
    let overrides = [Override::set(&data).unwrap()];
    let config = RunConfig::load(&repository.join("examples/packing.toml"), &overrides).unwrap();
    let summary = bench_train(BenchOptions::new(config)).unwrap();
    println!("{}\nexperts' feed-forward: {:.3} of fair's step", summary.table(), summary.expert_share);
    assert!(summary.emulated);
    let (fair, lina, packed) = (row(&summary, "fair"), row(&summary, "lina"), row(&summary, "lina+packing"));
    assert_eq!((lina.experts_per_rank, packed.experts_per_rank), (1, 2));
    assert!((0.33..=0.45).contains(&fair.a2a_share), "{fair:?}");
    assert!(packed.a2a_share < 0.05, "{packed:?}");
    assert!(packed.step_ms_median < lina.step_ms_median, "{packed:?}");
    assert!(packed.speedup_vs_fair.unwrap() >= 1.5, "{packed:?}");
}
