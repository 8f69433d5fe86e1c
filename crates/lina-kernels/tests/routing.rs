//! Router, permutation, loss, embedding, optimizer and whole-buffer operations.

mod common;

use common::{check_gradient, random, weighted, with_every_compute};
use lina_kernels::*;
use proptest::prelude::*;

#[test]
fn router_chooses_the_largest_and_lower_indices_among_equals() {
    let ctx = Compute::new(1);
    let logits = [0.0, 1.0, 1.0, -1.0, 2.0, 2.0, 2.0, 2.0];
    let (mut probs, mut index, mut weight) = (vec![0.0; 8], vec![0; 6], vec![0.0; 6]);
    router_forward(&ctx, &logits, 3, true, &mut probs, &mut index, &mut weight);
    assert_eq!(index, [1, 2, 0, 0, 1, 2]);
    for token in 0..2 {
        assert!((probs[token * 4..][..4].iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!((weight[token * 3..][..3].iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }
    assert!((f64::from(probs[4]) - 0.25).abs() < 1e-7);
}

#[test]
fn router_survives_infinite_and_missing_numbers() {
    let ctx = Compute::new(1);
    let logits = [f32::NAN, 1.0, 2.0, f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
    let (mut probs, mut index, mut weight) = (vec![0.0; 6], vec![9; 4], vec![0.0; 4]);
    router_forward(&ctx, &logits, 2, false, &mut probs, &mut index, &mut weight);
    assert!(index.iter().all(|&expert| expert < 3));
    assert_eq!((index[2], index[3]), (1, 0));
}

#[test]
fn router_gradient_with_auxiliary_losses() {
    for (tokens, experts, k) in [(5, 4, 2), (3, 3, 3), (4, 17, 1), (0, 4, 2), (300, 8, 2)] {
        for renormalise in [false, true] {
            with_every_compute(|ctx| {
                // Far enough apart that a difference step changes no choice.
                let logits: Vec<f32> =
                    (0..tokens * experts).map(|i| ((i * 7 + i / experts) % experts) as f32 * 0.15 - 1.0).collect();
                let (grad_weight, extra, z) = (random(tokens * k, 2), random(experts, 3), 0.05);
                let forward = |logits: &[f32]| {
                    let (mut probs, mut index, mut weight) =
                        (vec![0.0; logits.len()], vec![0; tokens * k], vec![0.0; tokens * k]);
                    router_forward(ctx, logits, k, renormalise, &mut probs, &mut index, &mut weight);
                    (probs, index, weight)
                };
                let (probs, index, weight) = forward(&logits);
                let mut grad = vec![0.0; logits.len()];
                router_backward(
                    ctx,
                    &probs,
                    &index,
                    &weight,
                    k,
                    renormalise,
                    &grad_weight,
                    Some(&extra),
                    z,
                    &logits,
                    &mut grad,
                );
                if tokens < 10 {
                    check_gradient("router", &logits, &grad, |logits| {
                        let (probs, _, weight) = forward(logits);
                        let lse = logits
                            .chunks(experts)
                            .map(|row| row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln().powi(2))
                            .sum::<f64>();
                        let balance: f64 = probs.chunks(experts).map(|row| weighted(row, &extra)).sum();
                        weighted(&weight, &grad_weight) + balance + f64::from(z) * lse
                    });
                }
                vec![probs, weight, grad]
            });
        }
    }
}

/// Rows in expert order for a random choice of experts, some dropped: `position` and, per row, its token.
fn permutation(tokens: usize, k: usize, experts: usize, seed: u64) -> (Vec<u32>, Vec<u32>) {
    let choice: Vec<usize> =
        random(tokens * k, seed).iter().map(|x| ((x + 1.0) / 2.0 * (experts + 1) as f32) as usize).collect();
    let (mut position, mut token_of_row) = (vec![DROPPED; tokens * k], Vec::new());
    for expert in 0..experts {
        for slot in (0..tokens * k).filter(|&slot| choice[slot] == expert) {
            position[slot] = token_of_row.len() as u32;
            token_of_row.push((slot / k) as u32);
        }
    }
    (position, token_of_row)
}

#[test]
fn permutation_forward_and_backward() {
    for (tokens, k, experts, width) in [(0, 2, 4, 5), (1, 1, 1, 1), (7, 2, 3, 5), (300, 2, 8, 70)] {
        with_every_compute(|ctx| {
            let (position, token_of_row) = permutation(tokens, k, experts, 5);
            let rows = token_of_row.len();
            let x = random(tokens * width, 1);
            let mut gathered = vec![0.0; rows * width];
            gather_rows(ctx, &x, width, &token_of_row, &mut gathered);
            for (row, &token) in token_of_row.iter().enumerate() {
                assert_eq!(gathered[row * width..][..width], x[token as usize * width..][..width]);
            }
            let (expert_rows, weight, grad_out) =
                (random(rows * width, 2), random(tokens * k, 3), random(tokens * width, 4));
            let combine = |expert_rows: &[f32], weight: &[f32]| {
                let mut out = x.clone();
                combine_rows(ctx, expert_rows, width, &position, weight, &mut out);
                out
            };
            let out = combine(&expert_rows, &weight);
            let (mut grad_rows, mut grad_weight) = (vec![0.0; rows * width], vec![0.0; tokens * k]);
            combine_backward(ctx, &grad_out, width, &expert_rows, &position, &weight, &mut grad_rows, &mut grad_weight);
            let mut grad_x = vec![0.5; x.len()];
            gather_backward(ctx, &grad_rows, width, &position, &mut grad_x);
            if tokens < 10 {
                check_gradient("combine rows", &expert_rows, &grad_rows, |rows| {
                    weighted(&combine(rows, &weight), &grad_out)
                });
                check_gradient("combine weight", &weight, &grad_weight, |weight| {
                    weighted(&combine(&expert_rows, weight), &grad_out)
                });
                let gained: Vec<f32> = grad_x.iter().map(|x| x - 0.5).collect();
                check_gradient("gather", &x, &gained, |x| {
                    let mut gathered = vec![0.0; rows * width];
                    gather_rows(ctx, x, width, &token_of_row, &mut gathered);
                    weighted(&gathered, &grad_rows)
                });
            }
            vec![out, grad_rows, grad_weight, grad_x]
        });
    }
}

#[test]
#[should_panic(expected = "row 1 belongs to two positions")]
fn two_positions_of_one_row_are_refused() {
    combine_backward(&Compute::new(1), &[0.0; 4], 2, &[0.0; 4], &[1, 1], &[1.0; 2], &mut [0.0; 4], &mut [0.0; 2]);
}

#[test]
fn cross_entropy() {
    for (rows, vocabulary) in [(0, 5), (1, 2), (4, 33), (40, 300)] {
        with_every_compute(|ctx| {
            let logits: Vec<f32> = random(rows * vocabulary, 1).iter().map(|x| 5.0 * x).collect();
            let targets: Vec<u32> =
                (0..rows).map(|row| if row == 2 { IGNORED } else { (row * 7 % vocabulary) as u32 }).collect();
            let forward = |logits: &[f32]| {
                let mut losses = vec![0.0; rows];
                cross_entropy_forward(ctx, logits, &targets, &mut losses);
                losses
            };
            let (mut grad, mut losses) = (logits.clone(), vec![0.0; rows]);
            cross_entropy_forward_backward(ctx, &mut grad, &targets, 0.5, &mut losses);
            assert_eq!(losses, forward(&logits));
            for (row, &target) in targets.iter().enumerate() {
                let row_logits = &logits[row * vocabulary..][..vocabulary];
                let expected = if target == IGNORED {
                    0.0
                } else {
                    row_logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln()
                        - f64::from(row_logits[target as usize])
                };
                assert!((f64::from(losses[row]) - expected).abs() < 1e-5);
            }
            if rows < 10 {
                check_gradient("cross entropy", &logits, &grad, |logits| {
                    0.5 * forward(logits).iter().map(|&x| f64::from(x)).sum::<f64>()
                });
            }
            vec![grad, losses]
        });
    }
}

#[test]
fn embedding_adds_repeated_ids_in_order() {
    with_every_compute(|ctx| {
        let (vocabulary, width) = (50, 7);
        let table = random(vocabulary * width, 1);
        let ids: Vec<u32> = (0..200).map(|i| (i * i % 37) as u32).collect();
        let mut out = vec![0.0; ids.len() * width];
        embedding_forward(ctx, &table, &ids, &mut out);
        let grad_out = random(out.len(), 2);
        let (mut grad, mut expected) = (random(table.len(), 3), random(table.len(), 3));
        embedding_backward(ctx, &grad_out, &ids, &mut grad);
        for (i, &id) in ids.iter().enumerate() {
            assert_eq!(out[i * width..][..width], table[id as usize * width..][..width]);
            for j in 0..width {
                expected[id as usize * width + j] += grad_out[i * width + j];
            }
        }
        assert_eq!(grad, expected);
        embedding_backward(ctx, &[], &[], &mut grad);
        vec![grad]
    });
}

#[test]
fn adamw_follows_pytorch() {
    with_every_compute(|ctx| {
        let len = 40_001;
        let (mut params, grads, mut m, mut v) = (random(len, 1), random(len, 2), vec![0.0; len], vec![0.0; len]);
        let (mut p64, mut m64, mut v64): (Vec<f64>, _, _) =
            (params.iter().map(|&x| f64::from(x)).collect(), vec![0.0; len], vec![0.0; len]);
        for step in 1..=3 {
            let (bias1, bias2) = (1.0 - 0.9_f64.powi(step), 1.0 - 0.95_f64.powi(step));
            let scalars = AdamWStep {
                learning_rate: 0.01,
                beta1: 0.9,
                beta2: 0.95,
                epsilon: 1e-8,
                weight_decay: 0.1,
                bias_correction1: bias1 as f32,
                bias_correction2: bias2 as f32,
                grad_scale: 0.5,
            };
            adamw_step(ctx, &mut params, &grads, &mut m, &mut v, &scalars);
            for i in 0..len {
                let grad = 0.5 * f64::from(grads[i]);
                m64[i] = 0.9 * m64[i] + 0.1 * grad;
                v64[i] = 0.95 * v64[i] + 0.05 * grad * grad;
                p64[i] = p64[i] * (1.0 - 0.001) - 0.01 / bias1 * m64[i] / (v64[i].sqrt() / bias2.sqrt() + 1e-8);
            }
        }
        for i in 0..len {
            assert!(
                (f64::from(params[i]) - p64[i]).abs() < 2e-6,
                "parameter {i} is {} instead of {}",
                params[i],
                p64[i]
            );
        }
        vec![params, m, v]
    });
}

#[test]
fn whole_buffer_operations() {
    with_every_compute(|ctx| {
        let len = 50_003;
        let (x, y) = (random(len, 1), random(len, 2));
        let squares = sum_of_squares(ctx, &x);
        let expected: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        assert!((squares - expected).abs() < 1e-9 * expected);
        assert_eq!(sum_of_squares(ctx, &[]), 0.0);
        let mut sum = vec![5.0; len];
        sum_into(ctx, &mut sum, &[&x, &y, &x]);
        assert!(sum.iter().zip(&x).zip(&y).all(|((sum, x), y)| *sum == (x + y) + x));
        let mut same = x.clone();
        add(ctx, &mut same, &y);
        add(ctx, &mut same, &x);
        assert_eq!(same, sum);
        scale(ctx, &mut same, 0.5);
        assert!(same.iter().zip(&sum).all(|(half, sum)| *half == 0.5 * sum));
        let (mut clamped, mut grad) = (x.clone(), y.clone());
        clamp(ctx, &mut clamped, 0.25);
        clamp_backward(ctx, &x, 0.25, &mut grad);
        for i in 0..len {
            assert_eq!(clamped[i], x[i].clamp(-0.25, 0.25));
            assert_eq!(grad[i], if x[i].abs() > 0.25 { 0.0 } else { y[i] });
        }
        let mut none = vec![1.0; 3];
        sum_into(ctx, &mut none, &[]);
        assert_eq!(none, [0.0; 3]);
        vec![vec![f32::from_bits((squares.to_bits() >> 32) as u32), f32::from_bits(squares.to_bits() as u32)], same]
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Against a sort of all experts.
    #[test]
    fn router_agrees_with_a_sort(logits in prop::collection::vec(-3_i8..3, 1..40), k in 1_usize..40) {
        let k = k.min(logits.len());
        let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
        let (mut probs, mut index, mut weight) = (vec![0.0; logits.len()], vec![0; k], vec![0.0; k]);
        router_forward(&Compute::new(1), &logits, k, false, &mut probs, &mut index, &mut weight);
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        prop_assert_eq!(&order[..k], &index[..]);
        prop_assert!(index.iter().zip(&weight).all(|(&expert, weight)| probs[expert as usize] == *weight));
    }
}
