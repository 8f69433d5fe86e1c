//! AdamW and sums of squares, against the processor's.

use lina_cuda::DType;
use lina_cuda::testing::{random, relative_error, round_bf16};
use lina_kernels::{self as cpu, AdamWStep, Compute};

#[test]
fn adamw() {
    let Some(gpu) = lina_cuda::testing::gpu() else { return };
    let step = AdamWStep {
        learning_rate: 1e-2,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        bias_correction1: 0.271,
        bias_correction2: 0.142_625,
        grad_scale: 0.3,
    };
    for len in [0, 1, 5, 8, 1000, 4099] {
        // Buffers that are aligned alike from some element on, and some that are not.
        for skipped in [[0, 0, 0, 0, 0], [3, 3, 3, 3, 3], [3, 3, 3, 3, 2], [1, 0, 2, 3, 0]] {
            for with_copy in [false, true] {
                let place = |values: &[f32], skipped: usize| {
                    let padded: Vec<f32> = vec![7.0; skipped].into_iter().chain(values.iter().copied()).collect();
                    gpu.buffer_from(&padded, DType::F32).unwrap()
                };
                let (mut params, grads) = (random(1, len), random(2, len));
                let (mut m, mut v) = (random(3, len), random(4, len).iter().map(|x| x.abs()).collect::<Vec<_>>());
                let (mut params_on, grads_on) = (place(&params, skipped[0]), place(&grads, skipped[1]));
                let (mut m_on, mut v_on) = (place(&m, skipped[2]), place(&v, skipped[3]));
                let mut copy_on = gpu.zeros(len + skipped[4], DType::Bf16).unwrap();
                cpu::adamw_step(&Compute::new(2), &mut params, &grads, &mut m, &mut v, &step);
                lina_cuda::adamw_step(
                    &gpu,
                    params_on.slice_mut(skipped[0]..len + skipped[0]),
                    grads_on.slice(skipped[1]..len + skipped[1]),
                    m_on.slice_mut(skipped[2]..len + skipped[2]),
                    v_on.slice_mut(skipped[3]..len + skipped[3]),
                    with_copy.then(|| copy_on.slice_mut(skipped[4]..len + skipped[4])),
                    &step,
                )
                .unwrap();
                let found = [(&params_on, &params, skipped[0]), (&m_on, &m, skipped[2]), (&v_on, &v, skipped[3])];
                for (found, expected, skipped) in found {
                    let found: Vec<f32> = gpu.to_host(found.whole()).unwrap();
                    assert!(found[..skipped].iter().all(|&value| value == 7.0), "what is before stays");
                    let error = relative_error(&found[skipped..], expected);
                    assert!(error <= 1e-6, "{len} elements, {skipped} skipped: {error}");
                }
                if with_copy {
                    let params: Vec<f32> = gpu.to_host(params_on.slice(skipped[0]..len + skipped[0])).unwrap();
                    let copy: Vec<f32> = gpu.to_host(copy_on.slice(skipped[4]..len + skipped[4])).unwrap();
                    assert_eq!(copy, round_bf16(&params));
                }
            }
        }
    }
}

#[test]
fn squares_of_many_ranges() {
    let Some(gpu) = lina_cuda::testing::gpu() else { return };
    let values = random(1, 300_000);
    let values_on = gpu.buffer_from(&values, DType::F32).unwrap();
    let mut ranges = vec![0..0, 0..300_000, 5..5, 1..2, 3..140_000, 65_536..131_072, 7..65_544, 300_000..300_000];
    ranges.extend((0..1000).map(|i| i * 37..i * 37 + i % 50));
    for ranges in [&ranges[..], &ranges[..1], &[]] {
        let mut sums = vec![f64::NAN; ranges.len()];
        lina_cuda::sum_of_squares(&gpu, values_on.whole(), ranges, &mut sums).unwrap();
        for (range, sum) in ranges.iter().zip(&sums) {
            let expected: f64 = values[range.clone()].iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            assert!((sum - expected).abs() <= 1e-12 * expected, "{range:?}: {sum} instead of {expected}");
        }
        let mut again = vec![f64::NAN; ranges.len()];
        lina_cuda::sum_of_squares(&gpu, values_on.whole(), ranges, &mut again).unwrap();
        assert_eq!(sums, again);
    }
}
