//! Norms, rotary positions, attention and activations: naive references, finite differences, and equality across thread counts.

mod common;

use common::{check_gradient, random, weighted, with_every_compute};
use lina_kernels::*;

fn close(name: &str, actual: &[f32], expected: &[f64]) {
    within(2e-6, name, actual, expected);
}

fn within(tolerance: f64, name: &str, actual: &[f32], expected: &[f64]) {
    assert_eq!(actual.len(), expected.len(), "{name}");
    for (index, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        assert!(
            (f64::from(*actual) - expected).abs() < tolerance * expected.abs().max(1.0),
            "{name}: element {index} is {actual} instead of {expected}"
        );
    }
}

#[test]
fn rms_norm() {
    with_every_compute(|ctx| {
        let mut outputs = Vec::new();
        for (rows, width) in [(0, 5), (1, 1), (3, 7), (2, 16), (130, 70)] {
            let (x, weight, grad_y) = (random(rows * width, 1), random(width, 2), random(rows * width, 3));
            let forward = |x: &[f32], weight: &[f32]| {
                let (mut y, mut inv_rms) = (vec![0.0; rows * width], vec![0.0; rows]);
                rms_norm_forward(ctx, x, weight, 1e-3, &mut y, &mut inv_rms);
                (y, inv_rms)
            };
            let (y, inv_rms) = forward(&x, &weight);
            let expected: Vec<f64> = (0..rows * width)
                .map(|index| {
                    let row = &x[index / width * width..][..width];
                    let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
                    f64::from(x[index]) * f64::from(weight[index % width]) / (mean + 1e-3).sqrt()
                })
                .collect();
            close("rms_norm", &y, &expected);
            let (mut grad_x, mut grad_weight) = (vec![1.0; rows * width], vec![2.0; width]);
            rms_norm_backward(ctx, &x, &weight, &inv_rms, &grad_y, &mut grad_x, &mut grad_weight);
            if rows < 10 {
                let gained: Vec<f32> = grad_x.iter().map(|x| x - 1.0).collect();
                check_gradient("rms_norm x", &x, &gained, |x| weighted(&forward(x, &weight).0, &grad_y));
                let gained: Vec<f32> = grad_weight.iter().map(|x| x - 2.0).collect();
                check_gradient("rms_norm weight", &weight, &gained, |weight| weighted(&forward(&x, weight).0, &grad_y));
            }
            outputs.extend([y, grad_x, grad_weight]);
        }
        outputs
    });
}

#[test]
fn rms_norm_of_heads_inside_rows() {
    with_every_compute(|ctx| {
        let layout = HeadLayout { offset: 3, heads: 2, head_dim: 6, row_stride: 17 };
        let rows = 70;
        let (x, weight, grad_y) = (random(rows * 17, 1), random(6, 2), random(rows * 17, 3));
        let forward = |x: &[f32], weight: &[f32]| {
            let (mut y, mut inv_rms) = (vec![0.0; x.len()], vec![0.0; rows * 2]);
            head_rms_norm_forward(ctx, layout, x, weight, 1e-3, &mut y, &mut inv_rms);
            (y, inv_rms)
        };
        let (y, inv_rms) = forward(&x, &weight);
        assert!(y.chunks(17).all(|row| row[..3].iter().chain(&row[15..]).all(|&x| x == 0.0)), "other columns stay");
        let (mut grad, mut grad_weight) = (grad_y.clone(), vec![0.0; 6]);
        head_rms_norm_backward(ctx, layout, &x, &weight, &inv_rms, &mut grad, &mut grad_weight);
        let (mut expected, mut masked) = (grad.clone(), grad_y.clone());
        for (row, masked) in masked.chunks_mut(17).enumerate() {
            for column in (0..3).chain(15..17) {
                assert_eq!(grad[row * 17 + column], masked[column], "other columns stay");
                expected[row * 17 + column] = 0.0;
                masked[column] = 0.0;
            }
        }
        check_gradient("head norm x", &x[..17 * 3], &expected[..17 * 3], |moved| {
            let mut all = x.clone();
            all[..17 * 3].copy_from_slice(moved);
            weighted(&forward(&all, &weight).0, &masked)
        });
        check_gradient("head norm weight", &weight, &grad_weight, |weight| weighted(&forward(&x, weight).0, &masked));
        vec![y, grad, grad_weight]
    });
}

#[test]
fn layer_norm() {
    with_every_compute(|ctx| {
        let mut outputs = Vec::new();
        for (rows, width) in [(0, 4), (1, 3), (3, 20), (100, 33)] {
            let (x, weight, bias, grad_y) =
                (random(rows * width, 1), random(width, 2), random(width, 3), random(rows * width, 4));
            let forward = |x: &[f32], weight: &[f32], bias: &[f32]| {
                let (mut y, mut mean, mut inv_std) = (vec![0.0; rows * width], vec![0.0; rows], vec![0.0; rows]);
                layer_norm_forward(ctx, x, weight, bias, 1e-2, &mut y, &mut mean, &mut inv_std);
                (y, mean, inv_std)
            };
            let (y, mean, inv_std) = forward(&x, &weight, &bias);
            let (mut grad_x, mut grad_weight, mut grad_bias) =
                (vec![0.0; rows * width], vec![0.0; width], vec![0.0; width]);
            layer_norm_backward(
                ctx,
                &x,
                &weight,
                &mean,
                &inv_std,
                &grad_y,
                &mut grad_x,
                &mut grad_weight,
                &mut grad_bias,
            );
            if rows < 10 {
                check_gradient("layer_norm x", &x, &grad_x, |x| weighted(&forward(x, &weight, &bias).0, &grad_y));
                check_gradient("layer_norm weight", &weight, &grad_weight, |weight| {
                    weighted(&forward(&x, weight, &bias).0, &grad_y)
                });
                check_gradient("layer_norm bias", &bias, &grad_bias, |bias| {
                    weighted(&forward(&x, &weight, bias).0, &grad_y)
                });
            }
            outputs.extend([y, grad_x, grad_weight, grad_bias]);
        }
        outputs
    });
}

#[test]
fn rotary_matches_rotate_half_and_its_backward_is_the_inverse() {
    with_every_compute(|ctx| {
        let layout = HeadLayout { offset: 2, heads: 3, head_dim: 8, row_stride: 30 };
        let table = RotaryTable::new(8, 64, 10_000.0);
        let positions = [0, 5, 63];
        let x = random(3 * 30, 1);
        let mut y = x.clone();
        rotary_forward(ctx, &table, &positions, layout, &mut y);
        let mut expected: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        for (row, position) in positions.iter().enumerate() {
            for head in 0..3 {
                for i in 0..4 {
                    let angle = f64::from(*position) * 10_000_f64.powf(-2.0 * i as f64 / 8.0);
                    let base = row * 30 + 2 + head * 8;
                    let (a, b) = (f64::from(x[base + i]), f64::from(x[base + i + 4]));
                    expected[base + i] = a * angle.cos() - b * angle.sin();
                    expected[base + i + 4] = b * angle.cos() + a * angle.sin();
                }
            }
        }
        for (y, expected) in y.iter().zip(&expected) {
            assert!((f64::from(*y) - expected).abs() < 1e-5);
        }
        let mut back = y.clone();
        rotary_backward(ctx, &table, &positions, layout, &mut back);
        close("rotary inverse", &back, &x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
        vec![y, back]
    });
}

/// Attention by its definition, in f64: output and logsumexp.
fn reference_attention(shape: &AttentionShape<'_>, qkv: &[f32], rows: usize) -> (Vec<f64>, Vec<f64>) {
    let (dim, stride) = (shape.head_dim, shape.row_stride);
    let (mut out, mut lse) = (vec![0.0; rows * shape.heads_q * dim], vec![0.0; rows * shape.heads_q]);
    for sequence in shape.sequences {
        for head in 0..shape.heads_q {
            let head_kv = head * shape.heads_kv / shape.heads_q;
            for i in 0..sequence.rows {
                let at = |row: usize, offset: usize, d: usize| {
                    f64::from(qkv[(sequence.start_row + row) * stride + offset + d])
                };
                let first = shape.window.map_or(0, |window| (i + 1).saturating_sub(window));
                let scores: Vec<f64> = (first..=i)
                    .map(|j| {
                        (0..dim)
                            .map(|d| at(i, shape.q_offset + head * dim, d) * at(j, shape.k_offset + head_kv * dim, d))
                            .sum::<f64>()
                            * f64::from(shape.scale)
                    })
                    .collect();
                let total = scores.iter().map(|score| score.exp()).sum::<f64>();
                let token = sequence.start_row + i;
                lse[token * shape.heads_q + head] = total.ln();
                for d in 0..dim {
                    out[(token * shape.heads_q + head) * dim + d] = scores
                        .iter()
                        .zip(first..)
                        .map(|(score, j)| score.exp() / total * at(j, shape.v_offset + head_kv * dim, d))
                        .sum();
                }
            }
        }
    }
    (out, lse)
}

#[test]
fn attention_matches_its_definition() {
    let long = [Sequence { start_row: 1, rows: 700 }];
    let several = [
        Sequence { start_row: 0, rows: 1 },
        Sequence { start_row: 1, rows: 0 },
        Sequence { start_row: 2, rows: 65 },
        Sequence { start_row: 70, rows: 300 },
    ];
    for (sequences, window) in
        [(&long[..], None), (&several[..], None), (&long[..], Some(100)), (&long[..], Some(1)), (&[], None)]
    {
        with_every_compute(|ctx| {
            let rows = 702;
            let shape = AttentionShape { window, ..AttentionShape::fused(sequences, 4, 2, 12) };
            let qkv: Vec<f32> = random(rows * shape.row_stride, 1).iter().map(|x| 3.0 * x).collect();
            let (mut out, mut lse) = (vec![0.0; rows * 48], vec![0.0; rows * 4]);
            attention_forward(ctx, &shape, &qkv, &mut out, &mut lse);
            let (expected_out, expected_lse) = reference_attention(&shape, &qkv, rows);
            within(1e-5, "attention", &out, &expected_out);
            within(1e-5, "attention lse", &lse, &expected_lse);
            let mut grad_qkv = vec![0.0; qkv.len()];
            attention_backward(ctx, &shape, &qkv, &out, &lse, &random(out.len(), 2), &mut grad_qkv);
            vec![out, lse, grad_qkv]
        });
    }
}

#[test]
fn attention_gradient() {
    // Sequences of a few rows, and one whose window and length cross tiles; differences are taken for some rows only.
    let short = [Sequence { start_row: 0, rows: 3 }, Sequence { start_row: 3, rows: 5 }];
    let long = [Sequence { start_row: 0, rows: 300 }];
    for (sequences, rows, window) in
        [(&short[..], 8, None), (&short[..], 8, Some(2)), (&long[..], 300, None), (&long[..], 300, Some(270))]
    {
        let ctx = Compute::new(2);
        let shape = AttentionShape { window, ..AttentionShape::fused(sequences, 4, 2, 3) };
        let (qkv, grad_out) = (random(rows * shape.row_stride, 1), random(rows * 12, 2));
        let forward = |qkv: &[f32]| {
            let (mut out, mut lse) = (vec![0.0; rows * 12], vec![0.0; rows * 4]);
            attention_forward(&ctx, &shape, qkv, &mut out, &mut lse);
            (out, lse)
        };
        let (out, lse) = forward(&qkv);
        let mut grad_qkv = vec![9.0; qkv.len()];
        attention_backward(&ctx, &shape, &qkv, &out, &lse, &grad_out, &mut grad_qkv);
        for part in [0, rows / 2, rows - 1] {
            let range = part * shape.row_stride..(part + 1) * shape.row_stride;
            check_gradient("attention", &qkv[range.clone()], &grad_qkv[range.clone()], |moved| {
                let mut all = qkv.clone();
                all[range.clone()].copy_from_slice(moved);
                weighted(&forward(&all).0, &grad_out)
            });
        }
    }
}

#[test]
fn attention_rows_do_not_depend_on_later_tokens() {
    let ctx = Compute::new(2);
    let run = |rows: usize| {
        let sequences = [Sequence { start_row: 0, rows }];
        let shape = AttentionShape::fused(&sequences, 2, 1, 16);
        let qkv = random(rows * shape.row_stride, 1);
        let (mut out, mut lse) = (vec![0.0; rows * 32], vec![0.0; rows * 2]);
        attention_forward(&ctx, &shape, &qkv, &mut out, &mut lse);
        out
    };
    let whole = run(400);
    for rows in [1, 63, 200, 399] {
        assert_eq!(run(rows), whole[..rows * 32]);
    }
}

#[test]
fn swiglu() {
    with_every_compute(|ctx| {
        let mut outputs = Vec::new();
        for (rows, features) in [(0, 3), (1, 1), (4, 9), (50, 100)] {
            let (gate_up, grad_hidden) = (random(rows * features * 2, 1), random(rows * features, 2));
            let forward = |gate_up: &[f32]| {
                let mut hidden = vec![0.0; rows * features];
                swiglu_forward(ctx, gate_up, features, &mut hidden);
                hidden
            };
            let hidden = forward(&gate_up);
            let expected: Vec<f64> = (0..rows * features)
                .map(|index| {
                    let row = &gate_up[index / features * 2 * features..];
                    let (gate, up) = (f64::from(row[index % features]), f64::from(row[features + index % features]));
                    gate / (1.0 + (-gate).exp()) * up
                })
                .collect();
            close("swiglu", &hidden, &expected);
            let (mut grad, mut again) = (vec![0.0; gate_up.len()], vec![0.0; hidden.len()]);
            swiglu_backward(ctx, &gate_up, features, &grad_hidden, &mut grad, Some(&mut again));
            assert_eq!(again, hidden);
            let mut without = vec![0.0; gate_up.len()];
            swiglu_backward(ctx, &gate_up, features, &grad_hidden, &mut without, None);
            assert_eq!(without, grad);
            if rows < 10 {
                check_gradient("swiglu", &gate_up, &grad, |gate_up| weighted(&forward(gate_up), &grad_hidden));
            }
            outputs.extend([hidden, grad]);
        }
        outputs
    });
}

/// The error function by its series, good for |x| < 5.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

#[test]
fn activations() {
    for activation in [Activation::Relu, Activation::Gelu, Activation::GeluTanh] {
        with_every_compute(|ctx| {
            let (rows, width) = (11, 13);
            // Away from 0, where ReLU has no derivative.
            let pre: Vec<f32> = random(rows * width, 1).iter().map(|x| 4.0 * x + 0.05 * x.signum()).collect();
            let (bias, grad_y) =
                (random(width, 2).iter().map(|x| 0.001 * x).collect::<Vec<_>>(), random(rows * width, 3));
            let (mut biased, mut y) = (pre.clone(), vec![0.0; pre.len()]);
            activation_forward(ctx, activation, &mut biased, Some(&bias), &mut y);
            let mut expected = pre.clone();
            add_bias(ctx, &mut expected, &bias);
            assert_eq!(biased, expected);
            let expected: Vec<f64> = biased
                .iter()
                .map(|&x| {
                    let x = f64::from(x);
                    match activation {
                        Activation::Relu => x.max(0.0),
                        Activation::Gelu => 0.5 * x * (1.0 + erf(x / 2_f64.sqrt())),
                        Activation::GeluTanh => {
                            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
                        }
                    }
                })
                .collect();
            close("activation", &y, &expected);
            let mut grad = vec![0.0; y.len()];
            activation_backward(ctx, activation, &biased, &grad_y, &mut grad);
            check_gradient("activation", &biased, &grad, |x| {
                let (mut x, mut y) = (x.to_vec(), vec![0.0; x.len()]);
                activation_forward(ctx, activation, &mut x, None, &mut y);
                weighted(&y, &grad_y)
            });
            vec![y, grad]
        });
    }
}

#[test]
fn bias_gradient_sums_columns() {
    with_every_compute(|ctx| {
        let grad_y = random(1000 * 9, 1);
        let mut grad_bias = vec![1.0; 9];
        bias_grad(ctx, &grad_y, &mut grad_bias);
        for (column, total) in grad_bias.iter().enumerate() {
            let expected = 1.0 + grad_y.iter().skip(column).step_by(9).map(|&x| f64::from(x)).sum::<f64>();
            assert!((f64::from(*total) - expected).abs() < 1e-4);
        }
        vec![grad_bias]
    });
}
