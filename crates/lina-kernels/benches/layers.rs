//! Time of the kernels other than products, at the sizes of a training step (2,048 tokens in sequences of 256, width 256, 8 experts of 512 features, top-2), with the
//! rate at which each moves its operands or computes:
//!
//!     cargo bench -p lina-kernels --bench layers [-- THREADS]

use lina_kernels::*;
use std::time::Instant;

const TOKENS: usize = 2048;
const WIDTH: usize = 256;
const FEATURES: usize = 512;
const CHOICES: usize = 2;
const EXPERTS: usize = 8;
const VOCABULARY: usize = 512;
const ROUNDS: usize = 51;

fn main() {
    // Cargo passes `--bench` to a harness of one's own.
    let threads = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(2);
    let ctx = &Compute::new(threads);
    println!("{threads} threads, {:?}, medians of {ROUNDS} rounds", ctx.isa());

    let (x, mut y, mut grad) = (values(TOKENS * WIDTH), values(TOKENS * WIDTH), values(TOKENS * WIDTH));
    let (weight, mut grad_weight, mut inv_rms) = (values(WIDTH), values(WIDTH), vec![0.0; TOKENS]);
    let floats = |count: usize| count as f64 * 4e-9;
    report("rms_norm_forward", "GB/s", floats(2 * x.len()), || {
        rms_norm_forward(ctx, &x, &weight, 1e-5, &mut y, &mut inv_rms)
    });
    report("rms_norm_backward", "GB/s", floats(4 * x.len()), || {
        rms_norm_backward(ctx, &x, &weight, &inv_rms, &y, &mut grad, &mut grad_weight);
    });

    let sequences: Vec<Sequence> = (0..8).map(|index| Sequence { start_row: index * 256, rows: 256 }).collect();
    let shape = AttentionShape::fused(&sequences, 4, 4, 64);
    let (mut qkv, mut grad_qkv) = (values(TOKENS * shape.row_stride), values(TOKENS * shape.row_stride));
    let mut lse = vec![0.0; TOKENS * 4];
    // Half of the scores are masked; forward has two products of them, backward five.
    let product = 2.0 * (8 * 4 * 256 * 256 / 2 * 64) as f64 * 1e-9;
    report("attention_forward", "GFLOP/s", 2.0 * product, || attention_forward(ctx, &shape, &qkv, &mut y, &mut lse));
    report("attention_backward", "GFLOP/s", 5.0 * product, || {
        attention_backward(ctx, &shape, &qkv, &y, &lse, &x, &mut grad_qkv)
    });

    let pages: Vec<u32> = (0..32).rev().collect();
    let paged: Vec<PagedSequence> = (0..8)
        .map(|index| PagedSequence { start_row: index * 256, rows: 256, past: 0, pages: &pages[index * 4..][..4] })
        .collect();
    let shape_paged = PagedShape::fused(&paged, 4, 4, 64);
    let mut cache = vec![0.0; 32 * page_elements(4, 64)];
    report("paged_append", "GB/s", floats(4 * TOKENS * 256), || paged_append(ctx, &shape_paged, &qkv, &mut cache));
    report("paged_attention", "GFLOP/s", 2.0 * product, || paged_attention(ctx, &shape_paged, &qkv, &cache, &mut y));

    let layout = HeadLayout { offset: 0, heads: 8, head_dim: 64, row_stride: shape.row_stride };
    let (table, positions) =
        (RotaryTable::new(64, 256, 10_000.0), (0..TOKENS as u32).map(|token| token % 256).collect::<Vec<_>>());
    report("rotary_forward", "GB/s", floats(2 * TOKENS * 512), || {
        rotary_forward(ctx, &table, &positions, layout, &mut qkv)
    });
    let (mut heads, mut head_rms, head_weight) = (qkv.clone(), vec![0.0; TOKENS * 8], values(64));
    report("head_rms_norm_forward", "GB/s", floats(2 * TOKENS * 512), || {
        head_rms_norm_forward(ctx, layout, &qkv, &head_weight, 1e-5, &mut heads, &mut head_rms);
    });

    let rows = TOKENS * CHOICES;
    let (gate_up, mut hidden, mut grad_gate_up) =
        (values(rows * 2 * FEATURES), values(rows * FEATURES), values(rows * 2 * FEATURES));
    report("swiglu_forward", "GB/s", floats(3 * hidden.len()), || swiglu_forward(ctx, &gate_up, FEATURES, &mut hidden));
    let grad_hidden = hidden.clone();
    report("swiglu_backward", "GB/s", floats(6 * hidden.len()), || {
        swiglu_backward(ctx, &gate_up, FEATURES, &grad_hidden, &mut grad_gate_up, Some(&mut hidden));
    });
    report("gelu forward", "GB/s", floats(2 * hidden.len()), || {
        activation_forward(ctx, Activation::Gelu, &mut grad_gate_up[..rows * FEATURES], None, &mut hidden);
    });

    let (logits, mut probs) = (values(TOKENS * EXPERTS), vec![0.0; TOKENS * EXPERTS]);
    let (mut index, mut gate_weight, mut grad_gate) = (vec![0; rows], vec![0.0; rows], vec![0.0; rows]);
    report("router_forward", "Mtoken/s", TOKENS as f64 * 1e-6, || {
        router_forward(ctx, &logits, CHOICES, true, &mut probs, &mut index, &mut gate_weight)
    });
    let position: Vec<u32> = (0..rows as u32).map(|slot| (slot * 1_237) % rows as u32).collect();
    let (expert_rows, mut grad_rows) = (values(rows * WIDTH), values(rows * WIDTH));
    let token_of_row: Vec<u32> = (0..rows as u32).map(|row| (row * 811) % TOKENS as u32).collect();
    report("gather_rows", "GB/s", floats(2 * grad_rows.len()), || {
        gather_rows(ctx, &x, WIDTH, &token_of_row, &mut grad_rows)
    });
    report("combine_rows", "GB/s", floats(expert_rows.len() + 2 * x.len()), || {
        combine_rows(ctx, &expert_rows, WIDTH, &position, &gate_weight, &mut y)
    });
    report("combine_backward", "GB/s", floats(2 * expert_rows.len() + x.len()), || {
        combine_backward(ctx, &x, WIDTH, &expert_rows, &position, &gate_weight, &mut grad_rows, &mut grad_gate);
    });

    let (vocabulary_logits, mut losses) = (values(TOKENS * VOCABULARY), vec![0.0; TOKENS]);
    let (mut gradient, targets) =
        (vocabulary_logits.clone(), (0..TOKENS as u32).map(|token| token % 512).collect::<Vec<_>>());
    report("cross_entropy", "GB/s", floats(2 * gradient.len()), || {
        cross_entropy_forward_backward(ctx, &mut gradient, &targets, 1.0, &mut losses)
    });

    let parameters = 8 << 20;
    let (mut params, grads, mut m, mut v) =
        (values(parameters), values(parameters), vec![0.0; parameters], vec![0.0; parameters]);
    let step = AdamWStep {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        bias_correction1: 0.1,
        bias_correction2: 0.05,
        grad_scale: 1.0,
    };
    report("adamw_step, 8 Mi", "GB/s", floats(7 * parameters), || {
        adamw_step(ctx, &mut params, &grads, &mut m, &mut v, &step)
    });
    report("sum_of_squares, 8 Mi", "GB/s", floats(parameters), || {
        std::hint::black_box(sum_of_squares(ctx, &grads));
    });
    report("sum_into of 4, 8 Mi", "GB/s", floats(5 * parameters), || {
        sum_into(ctx, &mut params, &[&grads, &m, &v, &grads])
    });
}

fn values(len: usize) -> Vec<f32> {
    (0..len).map(|index| ((index * 7_919) % 2_003) as f32 / 1_001.5 - 1.0).collect()
}

fn report(name: &str, unit: &str, work: f64, mut run: impl FnMut()) {
    run();
    let mut seconds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    let median = seconds[ROUNDS / 2];
    println!("{name:<24} {:>9.1} us {:>8.1} {unit}", median * 1e6, work / median);
}
