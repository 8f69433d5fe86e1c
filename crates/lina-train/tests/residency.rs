//! Experts that wait in host memory: the same numbers, the time of the copies where nothing hides them, and layouts
//! that a device's memory allows only so.

mod common;

use common::Run;
use lina_train::TrainError;

/// Experts dominate the memory of a rank: 96 KiB of weights for each of a layer, 4 layers.
const BASE: &str = r#"
[model]
kind = "mixtral"
layers = 4
hidden = 32
heads = 4
experts = 4
top_k = 2
expert_hidden = 256
aux_loss = "switch"
aux_loss_coefficient = 0.02

[train]
steps = 6
sequence_tokens = 8
batch_sequences = 16
learning_rate = 3e-3
warmup_steps = 4
eval_every = 3
eval_sequences = 5

[cluster]
ranks = 4
threads = 1
link = { gbps = 1.0, latency_us = 1.0, launch_us = 1.0, nodes = 2, inner_gbps = 20.0 }
device = { gflops = 2.0 }

[policy]
name = "lina"
partition_bytes = 5000
pipeline_chunks = 2
"#;

/// Bytes of one expert's weights.
const EXPERT_BYTES: u64 = 3 * 32 * 256 * 4;

/// What a rank needs to train `BASE` with one expert of a layer, found by bisection over what is refused or waits.
fn gib_with_waiting(waiting: u64) -> String {
    // From 4 layers waiting to none, memory grows by 2 blocks of weights, gradients and moments for each of the first
    // two that wait, and by 4 for each other.
    let (mut low, mut high) = (0.0, 1.0 / 64.0);
    for _ in 0..24 {
        let middle = (low + high) / 2.0;
        let enough = match run(&[&format!("cluster.device.memory_gib={middle}"), "train.steps=1"]) {
            Ok(run) => run.metric("copy_bytes")[0] <= copied_bytes(waiting) as f64,
            Err(_) => false,
        };
        if enough { high = middle } else { low = middle }
    }
    format!("cluster.device.memory_gib={high}")
}

/// What a rank copies in a step: fetches forward, fetches backward where the slots do not have the layer from forward,
/// and gradients.
fn copied_bytes(waiting: u64) -> u64 {
    (waiting + waiting.saturating_sub(2) + waiting) * EXPERT_BYTES
}

fn run(overrides: &[&str]) -> Result<Run, TrainError> {
    let run = Run::new(common::config(BASE, overrides), None);
    match run.summary {
        Ok(_) => Ok(run),
        Err(error) => Err(error),
    }
}

/// What the last checkpoint has.
fn weights(run: &Run) -> Vec<u8> {
    run.weights(run.summary().steps)
}

fn trace(run: &Run) -> String {
    run.text("trace.json")
}

#[test]
fn copies_change_the_time_and_no_number() {
    let plenty = run(&[]).unwrap();
    assert!(plenty.metric("copy_bytes").iter().all(|&bytes| bytes == 0.0));
    assert!(!trace(&plenty).contains("host to device"));
    for waiting in [1, 2, 4] {
        let memory = gib_with_waiting(waiting);
        let little = |copy_gbps: &str| run(&[&memory, &format!("cluster.device.copy_gbps={copy_gbps}")]).unwrap();
        let (fast, slow) = (little("200"), little("0.02"));
        for run in [&fast, &slow] {
            assert_eq!(run.metric("loss"), plenty.metric("loss"), "{waiting} wait");
            assert_eq!(run.metric("grad_norm"), plenty.metric("grad_norm"), "{waiting} wait");
            assert!(weights(run) == weights(&plenty), "{waiting} wait: other weights");
            assert!(run.metric("copy_bytes").iter().all(|&bytes| bytes == copied_bytes(waiting) as f64));
            assert!(trace(run).contains("host to device") && trace(run).contains("device to host"));
            let steps = run.metric("step_ms").into_iter().zip(plenty.metric("step_ms"));
            steps.zip(run.metric("copy_blocked_ms")).for_each(|((step, alone), blocked)| {
                assert!(if blocked > 0.0 { step > alone } else { step == alone }, "{step} {alone} {blocked}");
            });
        }
        // 4 us each: computation and exchanges cover all but a fetch for the first layer.
        let exposed_ms = if waiting == 4 { 4e-3 } else { 0.0 };
        assert!(
            fast.metric("copy_blocked_ms").iter().all(|&ms| ms <= exposed_ms),
            "{:?}",
            fast.metric("copy_blocked_ms")
        );
        assert!(fast.metric("copy_ms").iter().all(|&ms| ms > 0.0));
        // 39 ms each: nothing is as long. Fetches go one after another, and the last layer's gradients leave after them.
        let copies = (waiting + waiting.saturating_sub(2) + waiting) as f64;
        let in_turn = copies - (waiting - 1) as f64;
        for (step_ms, copy_ms) in slow.metric("step_ms").into_iter().zip(slow.metric("copy_ms")) {
            assert!(step_ms > copy_ms / copies * in_turn, "{step_ms} {copy_ms}");
        }
        assert!(slow.metric("copy_blocked_ms").iter().all(|&ms| ms > 1.0), "{:?}", slow.metric("copy_blocked_ms"));
    }
}

#[test]
fn gradients_of_every_micro_batch_leave_the_device() {
    let memory = gib_with_waiting(4);
    let [plenty, little] =
        [vec!["train.micro_batches=2"], vec!["train.micro_batches=2", &memory]].map(|sets| run(&sets).unwrap());
    assert!(weights(&little) == weights(&plenty));
    // Smaller micro-batches leave more room, so fewer may have to wait.
    let bytes = little.metric("copy_bytes");
    assert!(bytes.iter().all(|&bytes| bytes > 0.0 && bytes % (2 * EXPERT_BYTES) as f64 == 0.0), "{bytes:?}");
}

#[test]
fn packing_takes_a_layout_that_fits_with_experts_in_host_memory() {
    let memory = gib_with_waiting(0);
    let packs = ["policy.packing=true", "policy.max_experts_per_rank=2", "train.steps=13", "cluster.device.gflops=200"];
    let little: Vec<&str> = packs.into_iter().chain([memory.as_str()]).collect();
    let (plenty, little) = (run(&packs).unwrap(), run(&little).unwrap());
    assert_eq!((plenty.summary().experts_per_rank, little.summary().experts_per_rank), (2, 2));
    assert!(weights(&little) == weights(&plenty));
    let bytes = little.metric("copy_bytes");
    assert!(bytes[..10].iter().all(|&bytes| bytes == 0.0) && bytes[10..].iter().all(|&bytes| bytes > 0.0), "{bytes:?}");
}

#[test]
fn what_cannot_fit_is_refused_with_its_numbers() {
    let Err(error) = run(&["cluster.device.memory_gib=0.0001"]) else { panic!("it cannot fit") };
    assert_eq!(error.exit_code(), 2);
    let message = error.to_string();
    assert!(message.starts_with("the device of rank 0 needs "), "{message}");
    assert!(message.contains(" for 2 of 4 layers' experts at a time), expected at most "), "{message}");
    assert!(message.contains("(cluster.device.memory_gib); lower "), "{message}");
}
