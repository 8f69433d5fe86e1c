//! Attention on a GPU against the processor's, forward and backward.

use lina_cuda::testing::{gpu, random, relative_error, round_bf16};
use lina_cuda::{AttentionPlan, CudaError, DType, Gpu, attention_backward, attention_forward};
use lina_kernels::{AttentionShape, Compute, Sequence};

const TYPES: [DType; 2] = [DType::F32, DType::Bf16];

fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F32 { 1e-5 } else { 1e-2 }
}

/// Values that `dtype` can hold.
fn values(dtype: DType, seed: u64, len: usize) -> Vec<f32> {
    let values = random(seed, len);
    if dtype == DType::F32 { values } else { round_bf16(&values) }
}

fn sequences(rows: &[(usize, usize)]) -> Vec<Sequence> {
    rows.iter().map(|&(start_row, rows)| Sequence { start_row, rows }).collect()
}

/// What an attention layer leaves on the GPU.
struct Results {
    output: Vec<f32>,
    /// `[heads_q, tokens]`.
    log_sum_exp: Vec<f32>,
    grad_qkv: Vec<f32>,
}

fn on_gpu(
    gpu: &Gpu,
    shape: &AttentionShape<'_>,
    tokens: usize,
    dtype: DType,
    qkv: &[f32],
    grad_output: &[f32],
) -> Result<Results, CudaError> {
    let plan = AttentionPlan::new(gpu, shape, tokens, dtype)?;
    let nan = |len: usize, dtype: DType| gpu.buffer_from(&vec![f32::NAN; len], dtype);
    let qkv = gpu.buffer_from(qkv, dtype)?;
    let grad_output = gpu.buffer_from(grad_output, dtype)?;
    let mut output = nan(grad_output.len(), dtype)?;
    let mut log_sum_exp = nan(tokens * shape.heads_q, DType::F32)?;
    let mut grad_qkv = nan(qkv.len(), dtype)?;
    attention_forward(gpu, &plan, qkv.whole(), output.whole_mut(), log_sum_exp.whole_mut())?;
    attention_backward(
        gpu,
        &plan,
        qkv.whole(),
        output.whole(),
        log_sum_exp.whole(),
        grad_output.whole(),
        grad_qkv.whole_mut(),
    )?;
    Ok(Results {
        output: gpu.to_host(output.whole())?,
        log_sum_exp: gpu.to_host(log_sum_exp.whole())?,
        grad_qkv: gpu.to_host(grad_qkv.whole())?,
    })
}

/// Compares with the processor in the rows of sequences; other rows have to be as they were.
fn compare(gpu: &Gpu, shape: &AttentionShape<'_>, tokens: usize, dtype: DType) {
    let (heads, width) = (shape.heads_q, shape.heads_q * shape.head_dim);
    let mut qkv = values(dtype, 1, tokens * shape.row_stride);
    let grad_output = values(dtype, 2, tokens * width);
    qkv.iter_mut().for_each(|value| *value *= 2.0);
    let (mut output, mut lse) = (vec![f32::NAN; tokens * width], vec![f32::NAN; tokens * heads]);
    let mut grad_qkv = vec![f32::NAN; qkv.len()];
    let compute = Compute::new(2);
    lina_kernels::attention_forward(&compute, shape, &qkv, &mut output, &mut lse);
    lina_kernels::attention_backward(&compute, shape, &qkv, &output, &lse, &grad_output, &mut grad_qkv);
    let found = on_gpu(gpu, shape, tokens, dtype, &qkv, &grad_output).unwrap();

    let transposed: Vec<f32> = (0..tokens * heads).map(|i| found.log_sum_exp[i % heads * tokens + i / heads]).collect();
    let pairs = [
        ("output", &found.output, &output),
        ("logsumexp", &transposed, &lse),
        ("gradient", &found.grad_qkv, &grad_qkv),
    ];
    for (name, found, expected) in pairs {
        let written = |values: &[f32]| -> Vec<f32> {
            values.iter().zip(expected).filter(|(_, expected)| !expected.is_nan()).map(|(value, _)| *value).collect()
        };
        let error = relative_error(&written(found), &written(expected));
        assert!(error <= tolerance(dtype), "{name} is off by {error:e} for {dtype:?} in {shape:?}");
        let untouched = found.iter().zip(expected).all(|(found, expected)| found.is_nan() || !expected.is_nan());
        assert!(untouched, "{name} was written outside of sequences, for {dtype:?} in {shape:?}");
    }
}

#[test]
fn agrees_with_the_processor() {
    let Some(gpu) = gpu() else { return };
    let batches: [(usize, &[(usize, usize)]); 6] = [
        (0, &[]),
        (1, &[(0, 1)]),
        (215, &[(0, 130), (130, 7), (140, 70)]),
        (200, &[(0, 0), (0, 200)]),
        (310, &[(3, 300)]),
        (1300, &[(0, 1029), (1029, 257)]),
    ];
    for dtype in TYPES {
        for head_dim in [16, 32, 64, 96, 128] {
            for (heads_q, heads_kv) in [(1, 1), (4, 2), (3, 1)] {
                for (tokens, rows) in batches {
                    for window in [None, Some(1), Some(50), Some(130)] {
                        let sequences = sequences(rows);
                        let shape =
                            AttentionShape { window, ..AttentionShape::fused(&sequences, heads_q, heads_kv, head_dim) };
                        compare(&gpu, &shape, tokens, dtype);
                    }
                }
            }
        }
    }
}

#[test]
fn f32_takes_heads_of_any_size() {
    let Some(gpu) = gpu() else { return };
    let sequences = sequences(&[(0, 100), (100, 33)]);
    for head_dim in [2, 6, 40, 66, 130, 256] {
        compare(&gpu, &AttentionShape::fused(&sequences, 4, 2, head_dim), 140, DType::F32);
    }
    let too_large = AttentionShape::fused(&sequences, 1, 1, 258);
    assert!(matches!(AttentionPlan::new(&gpu, &too_large, 140, DType::F32), Err(CudaError::Unsupported(_))));
}

#[test]
fn heads_that_bf16_has_no_kernel_for_are_refused() {
    let Some(gpu) = gpu() else { return };
    let sequences = sequences(&[(0, 100)]);
    for head_dim in [5, 24, 192] {
        let shape = AttentionShape::fused(&sequences, 3, 1, head_dim);
        assert!(matches!(AttentionPlan::new(&gpu, &shape, 100, DType::Bf16), Err(CudaError::Unsupported(_))));
    }
}

#[test]
fn queries_keys_and_values_may_lie_anywhere_in_a_row() {
    let Some(gpu) = gpu() else { return };
    let sequences = sequences(&[(2, 150)]);
    let shape = AttentionShape {
        row_stride: 8 * 32 + 24,
        q_offset: 4 * 32 + 16,
        k_offset: 2 * 32 + 8,
        v_offset: 8,
        scale: 0.3,
        ..AttentionShape::fused(&sequences, 4, 2, 32)
    };
    TYPES.into_iter().for_each(|dtype| compare(&gpu, &shape, 160, dtype));
}

#[test]
fn the_same_inputs_give_the_same_bits_whatever_is_beside_them() {
    let Some(gpu) = gpu() else { return };
    let (tokens, from) = (700, 317);
    let (both, alone) = (sequences(&[(0, 300), (from, 383)]), sequences(&[(0, 383)]));
    for dtype in TYPES {
        let shape = AttentionShape::fused(&both, 4, 2, 64);
        let (stride, width) = (shape.row_stride, 4 * 64);
        let (qkv, grads) = (values(dtype, 3, tokens * stride), values(dtype, 4, tokens * width));
        let first = on_gpu(&gpu, &shape, tokens, dtype, &qkv, &grads).unwrap();
        let again = on_gpu(&gpu, &shape, tokens, dtype, &qkv, &grads).unwrap();
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&first.output), bits(&again.output));
        assert_eq!(bits(&first.grad_qkv), bits(&again.grad_qkv));
        let shape = AttentionShape::fused(&alone, 4, 2, 64);
        let (qkv, grads) = (&qkv[from * stride..], &grads[from * width..]);
        let one = on_gpu(&gpu, &shape, 383, dtype, qkv, grads).unwrap();
        assert_eq!(bits(&one.output), bits(&first.output[from * width..]));
        assert_eq!(bits(&one.grad_qkv), bits(&first.grad_qkv[from * stride..]));
    }
}

/// Prints the rate of a training step's attention, counting as products what the mask leaves of two (forward) and five
/// (backward) products: `cargo test -p lina-cuda --release --test attention -- --ignored --nocapture rate`.
#[test]
#[ignore = "a measurement"]
fn rate() {
    let Some(gpu) = gpu() else { return };
    let tokens = 8192;
    for (length, heads_q, heads_kv, head_dim) in
        [(2048, 16, 16, 128), (2048, 32, 4, 128), (8192, 16, 16, 128), (2048, 32, 32, 64), (512, 16, 16, 128)]
    {
        let rows: Vec<(usize, usize)> = (0..tokens / length).map(|index| (index * length, length)).collect();
        let sequences = sequences(&rows);
        let shape = AttentionShape::fused(&sequences, heads_q, heads_kv, head_dim);
        for dtype in [DType::Bf16, DType::F32] {
            let plan = AttentionPlan::new(&gpu, &shape, tokens, dtype).unwrap();
            let qkv = gpu.buffer_from(&values(dtype, 5, tokens * shape.row_stride), dtype).unwrap();
            let grad_output = gpu.buffer_from(&values(dtype, 6, tokens * heads_q * head_dim), dtype).unwrap();
            let mut output = gpu.uninit(grad_output.len(), dtype).unwrap();
            let mut lse = gpu.uninit(tokens * heads_q, DType::F32).unwrap();
            let mut grad_qkv = gpu.uninit(qkv.len(), dtype).unwrap();
            let mut forward = || {
                attention_forward(&gpu, &plan, qkv.whole(), output.whole_mut(), lse.whole_mut()).unwrap();
            };
            let forward_ms = mean_ms(&gpu, &mut forward);
            let mut backward = || {
                let (output, lse, grads) = (output.whole(), lse.whole(), grad_output.whole());
                attention_backward(&gpu, &plan, qkv.whole(), output, lse, grads, grad_qkv.whole_mut()).unwrap();
            };
            let backward_ms = mean_ms(&gpu, &mut backward);
            let product = 2.0 * (heads_q * head_dim * tokens) as f64 * (length + 1) as f64 / 2.0;
            println!(
                "{dtype:?}, {length} tokens, {heads_q}/{heads_kv} heads of {head_dim}: forward {forward_ms:.3} ms, {:.0} \
                 TFLOP/s; backward {backward_ms:.3} ms, {:.0} TFLOP/s",
                2.0 * product / forward_ms / 1e9,
                5.0 * product / backward_ms / 1e9
            );
        }
    }
}

fn mean_ms(gpu: &Gpu, run: &mut dyn FnMut()) -> f64 {
    const RUNS: usize = 20;
    (0..3).for_each(|_| run());
    let (start, end) = (gpu.event().unwrap(), gpu.event().unwrap());
    start.record(gpu.stream()).unwrap();
    (0..RUNS).for_each(|_| run());
    end.record(gpu.stream()).unwrap();
    end.synchronize().unwrap();
    f64::from(end.elapsed_ms_since(&start).unwrap()) / RUNS as f64
}
