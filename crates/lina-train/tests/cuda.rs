//! Whole runs on a GPU: they learn as on the processor, and checkpoints go from one to the other. Skipped where there is no
//! GPU.

mod common;

use std::path::PathBuf;

use common::{Run, evaluated};
use lina_train::{Engine, Scalar};

const BASE: &str = r#"
[model]
kind = "mixtral"
layers = 3
hidden = 128
heads = 4
kv_heads = 2
experts = 8
top_k = 2
expert_hidden = 192
aux_loss = "switch"
aux_loss_coefficient = 0.02
z_loss_coefficient = 0.001

[train]
steps = 100
sequence_tokens = 128
batch_sequences = 16
learning_rate = 1e-3
warmup_steps = 20
eval_every = 0
eval_sequences = 8

[cluster]
ranks = 1
threads = 4
"#;

fn run(overrides: &[&str], resume: Option<PathBuf>) -> Run {
    let run = Run::new(common::config(BASE, overrides), resume);
    run.summary();
    run
}

const GPU: &str = "cluster.engine=nccl";

/// Largest difference of two runs' losses, with its step.
fn apart(a: &Run, b: &Run) -> (f64, usize) {
    let (a, b) = (a.losses(), b.losses());
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).enumerate();
    differences
        .fold((0.0, 0), |worst, (step, difference)| if difference > worst.0 { (difference, step) } else { worst })
}

#[test]
fn a_hundred_steps_follow_the_processors() {
    if lina_cuda::testing::gpu().is_none() {
        return;
    }
    let processor = run(&[], None);
    let first = processor.losses()[0];
    assert!(processor.losses()[99] < 0.7 * first, "the run learns");
    for (dtype, tolerance) in [("float32", 1e-2), ("bfloat16", 5e-2)] {
        let gpu = run(&[GPU, &format!("train.dtype={dtype}")], None);
        let (difference, step) = apart(&processor, &gpu);
        println!("{dtype}: losses within {difference:.1e} (step {step}), last {:.4}", gpu.losses()[99]);
        assert!(difference < tolerance, "{dtype}: losses differ by {difference} in step {step}");
    }
    // Two micro-batches instead of one: the same step, but for the order of sums.
    let gpu = run(&[GPU, "train.micro_batches=2"], None);
    let (difference, step) = apart(&run(&["train.micro_batches=2"], None), &gpu);
    assert!(difference < 1e-2, "two micro-batches: losses differ by {difference} in step {step}");
    // The same run twice is the same to the bit.
    assert_eq!(run(&[GPU], None).losses(), run(&[GPU], None).losses());
}

#[test]
fn an_evaluation_is_that_of_the_processor() {
    if lina_cuda::testing::gpu().is_none() {
        return;
    }
    let run = run(&["train.steps=5"], None);
    let on = |gpu| evaluated(run.checkpoint(5), 1, Engine::Local, gpu);
    let processor = on(None);
    for (dtype, tolerance) in [(Scalar::Float32, 1e-4), (Scalar::Bfloat16, 2e-2)] {
        let gpu = on(Some(dtype));
        println!("{dtype:?}: loss {gpu}, on the processor {processor}");
        assert!((gpu - processor).abs() < tolerance, "{dtype:?}: loss {gpu}, on the processor {processor}");
    }
}

#[test]
fn checkpoints_go_from_processor_to_gpu_and_back() {
    if lina_cuda::testing::gpu().is_none() {
        return;
    }
    for (first, second) in [("local", "nccl"), ("nccl", "local"), ("nccl", "nccl")] {
        let engine = |name: &str| format!("cluster.engine={name}");
        let steps = "train.checkpoint_every=10";
        let whole = run(&[&engine(second), "train.steps=20", steps], None);
        let half = run(&[&engine(first), "train.steps=20", steps], None);
        let resumed = run(&[&engine(second), "train.steps=20", steps], Some(half.checkpoint(10)));
        let (whole, resumed) = (whole.losses(), resumed.losses());
        let worst = whole[10..].iter().zip(&resumed).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        println!("{first}, then {second}: losses within {worst:.1e} of a run that never stopped");
        let tolerance = if first == second { 0.0 } else { 1e-3 };
        assert!(worst <= tolerance, "{first}, then {second}: losses differ by {worst}");
    }
}
