//! Norms, rotary embedding, activations, embeddings, loss and whole-buffer operations, against the processor's.

use lina_cuda::testing::{gpu, random, relative_error, round_bf16};
use lina_cuda::{Buffer, DType, Gpu, PartSum, Priority, Slice, SliceMut, Stream};
use lina_kernels::{self as cpu, Activation, Compute, HeadLayout, IGNORED};

/// Device memory whose first elements are skipped, so that the others may not be aligned.
struct Data {
    buffer: Buffer,
    skipped: usize,
}

impl Data {
    fn view(&self) -> Slice<'_> {
        self.buffer.slice(self.skipped..self.buffer.len())
    }

    fn view_mut(&mut self) -> SliceMut<'_> {
        self.buffer.slice_mut(self.skipped..self.buffer.len())
    }
}

/// How activations are stored in a run of a test.
struct Setup<'a> {
    gpu: &'a Gpu,
    cpu: Compute,
    dtype: DType,
    /// Elements skipped in each buffer.
    skipped: usize,
}

impl Setup<'_> {
    fn place(&self, values: &[f32], dtype: DType) -> Data {
        let mut padded = vec![f32::NAN; self.skipped];
        padded.extend_from_slice(values);
        Data { buffer: self.gpu.buffer_from(&padded, dtype).unwrap(), skipped: self.skipped }
    }

    /// Random values that the storage type can hold, and the same on the device.
    fn random(&self, seed: u64, len: usize) -> (Vec<f32>, Data) {
        let values = random(seed, len);
        let values = if self.dtype == DType::Bf16 { round_bf16(&values) } else { values };
        let data = self.place(&values, self.dtype);
        (values, data)
    }

    fn random_f32(&self, seed: u64, len: usize) -> (Vec<f32>, Data) {
        let values = random(seed, len);
        let data = self.place(&values, DType::F32);
        (values, data)
    }

    /// Room for a result.
    fn poisoned(&self, len: usize) -> Data {
        self.place(&vec![f32::NAN; len], self.dtype)
    }

    fn poisoned_f32(&self, len: usize) -> Data {
        self.place(&vec![f32::NAN; len], DType::F32)
    }

    fn numbers(&self, values: &[u32]) -> Buffer {
        self.gpu.buffer_from(values, DType::U32).unwrap()
    }

    fn host(&self, data: &Data) -> Vec<f32> {
        self.gpu.to_host(data.view()).unwrap()
    }

    fn check(&self, name: &str, found: &Data, expected: &[f32]) {
        let limit = if self.dtype == DType::Bf16 { 1e-2 } else { 1e-5 };
        let error = relative_error(&self.host(found), expected);
        assert!(
            error <= limit,
            "{name}, {:?}, {} skipped, {} elements: {error}",
            self.dtype,
            self.skipped,
            expected.len()
        );
    }
}

/// Runs a test with every storage type, aligned and not, twice each: `test` gives what must have the same bits.
fn with_every_setup(test: impl Fn(&Setup<'_>) -> Vec<Vec<f32>>) {
    let Some(gpu) = lina_cuda::testing::gpu() else { return };
    for dtype in [DType::F32, DType::Bf16] {
        for skipped in [0, 1] {
            let setup = Setup { gpu: &gpu, cpu: Compute::new(2), dtype, skipped };
            let bits = || -> Vec<Vec<u32>> {
                test(&setup).iter().map(|values| values.iter().map(|value| value.to_bits()).collect()).collect()
            };
            assert!(bits() == bits(), "{dtype:?}: two runs differ");
        }
    }
}

#[test]
fn rms_norm() {
    with_every_setup(|s| {
        let mut results = vec![];
        for (rows, width) in [(0, 8), (1, 1), (3, 7), (5, 64), (37, 128), (9, 300), (70, 2048), (3, 4100), (5, 8192)] {
            let (x, x_on) = s.random(1, rows * width);
            let (weight, weight_on) = s.random_f32(2, width);
            let (mut y, mut inverse) = (vec![0.0; rows * width], vec![0.0; rows]);
            cpu::rms_norm_forward(&s.cpu, &x, &weight, 1e-5, &mut y, &mut inverse);
            let (mut y_on, mut inverse_on) = (s.poisoned(rows * width), s.poisoned_f32(rows));
            let (x_view, weight_view) = (x_on.view(), weight_on.view());
            lina_cuda::rms_norm_forward(s.gpu, x_view, weight_view, 1e-5, y_on.view_mut(), inverse_on.view_mut())
                .unwrap();
            s.check("y", &y_on, &y);
            s.check("inverse", &inverse_on, &inverse);

            let (grad_y, grad_y_on) = s.random(3, rows * width);
            let (mut grad_x, mut grad_x_on) = s.random(4, rows * width);
            let (mut grad_weight, mut grad_weight_on) = s.random_f32(5, width);
            cpu::rms_norm_backward(&s.cpu, &x, &weight, &inverse, &grad_y, &mut grad_x, &mut grad_weight);
            lina_cuda::rms_norm_backward(
                s.gpu,
                x_view,
                weight_view,
                inverse_on.view(),
                grad_y_on.view(),
                grad_x_on.view_mut(),
                grad_weight_on.view_mut(),
            )
            .unwrap();
            s.check("grad_x", &grad_x_on, &grad_x);
            s.check("grad_weight", &grad_weight_on, &grad_weight);
            results.extend([s.host(&y_on), s.host(&grad_x_on), s.host(&grad_weight_on)]);
        }
        results
    });
}

const LAYOUTS: [HeadLayout; 5] = [
    HeadLayout { offset: 0, heads: 4, head_dim: 128, row_stride: 768 },
    HeadLayout { offset: 3, heads: 2, head_dim: 10, row_stride: 31 },
    HeadLayout { offset: 64, heads: 9, head_dim: 64, row_stride: 640 },
    HeadLayout { offset: 32, heads: 3, head_dim: 32, row_stride: 128 },
    HeadLayout { offset: 512, heads: 1, head_dim: 512, row_stride: 1536 },
];

#[test]
fn head_rms_norm() {
    with_every_setup(|s| {
        let mut results = vec![];
        for (layout, rows) in LAYOUTS.into_iter().zip([33, 5, 700, 2, 9]) {
            let len = rows * layout.row_stride;
            let (x, x_on) = s.random(1, len);
            let (weight, weight_on) = s.random_f32(2, layout.head_dim);
            // What is outside of the heads stays.
            let (mut y, mut y_on) = s.random(3, len);
            let mut inverse = vec![0.0; rows * layout.heads];
            let mut inverse_on = s.poisoned_f32(inverse.len());
            cpu::head_rms_norm_forward(&s.cpu, layout, &x, &weight, 1e-5, &mut y, &mut inverse);
            let (x_view, weight_view) = (x_on.view(), weight_on.view());
            let outputs = (y_on.view_mut(), inverse_on.view_mut());
            lina_cuda::head_rms_norm_forward(s.gpu, layout, x_view, weight_view, 1e-5, outputs.0, outputs.1).unwrap();
            s.check("y", &y_on, &y);
            s.check("inverse", &inverse_on, &inverse);

            let (mut grad, mut grad_on) = s.random(4, len);
            let (mut grad_weight, mut grad_weight_on) = s.random_f32(5, layout.head_dim);
            cpu::head_rms_norm_backward(&s.cpu, layout, &x, &weight, &inverse, &mut grad, &mut grad_weight);
            let (inverse_view, outputs) = (inverse_on.view(), (grad_on.view_mut(), grad_weight_on.view_mut()));
            lina_cuda::head_rms_norm_backward(s.gpu, layout, x_view, weight_view, inverse_view, outputs.0, outputs.1)
                .unwrap();
            s.check("grad", &grad_on, &grad);
            s.check("grad_weight", &grad_weight_on, &grad_weight);
            results.extend([s.host(&y_on), s.host(&grad_on), s.host(&grad_weight_on)]);
        }
        results
    });
}

#[test]
fn layer_norm() {
    with_every_setup(|s| {
        let mut results = vec![];
        for (rows, width) in [(0, 8), (1, 3), (3, 7), (37, 128), (9, 300), (70, 2048), (3, 4100), (5, 8192)] {
            let (x, x_on) = s.random(1, rows * width);
            let ((weight, weight_on), (bias, bias_on)) = (s.random_f32(2, width), s.random_f32(3, width));
            let (mut y, mut mean, mut inverse) = (vec![0.0; rows * width], vec![0.0; rows], vec![0.0; rows]);
            cpu::layer_norm_forward(&s.cpu, &x, &weight, &bias, 1e-5, &mut y, &mut mean, &mut inverse);
            let mut y_on = s.poisoned(rows * width);
            let (mut mean_on, mut inverse_on) = (s.poisoned_f32(rows), s.poisoned_f32(rows));
            lina_cuda::layer_norm_forward(
                s.gpu,
                x_on.view(),
                weight_on.view(),
                bias_on.view(),
                1e-5,
                y_on.view_mut(),
                mean_on.view_mut(),
                inverse_on.view_mut(),
            )
            .unwrap();
            s.check("y", &y_on, &y);
            s.check("mean", &mean_on, &mean);
            s.check("inverse", &inverse_on, &inverse);

            let (grad_y, grad_y_on) = s.random(4, rows * width);
            let (mut grad_x, mut grad_x_on) = s.random(5, rows * width);
            let (mut grad_weight, mut grad_weight_on) = s.random_f32(6, width);
            let (mut grad_bias, mut grad_bias_on) = s.random_f32(7, width);
            cpu::layer_norm_backward(
                &s.cpu,
                &x,
                &weight,
                &mean,
                &inverse,
                &grad_y,
                &mut grad_x,
                &mut grad_weight,
                &mut grad_bias,
            );
            lina_cuda::layer_norm_backward(
                s.gpu,
                x_on.view(),
                weight_on.view(),
                mean_on.view(),
                inverse_on.view(),
                grad_y_on.view(),
                grad_x_on.view_mut(),
                grad_weight_on.view_mut(),
                grad_bias_on.view_mut(),
            )
            .unwrap();
            s.check("grad_x", &grad_x_on, &grad_x);
            s.check("grad_weight", &grad_weight_on, &grad_weight);
            s.check("grad_bias", &grad_bias_on, &grad_bias);
            results.extend([s.host(&y_on), s.host(&grad_x_on), s.host(&grad_weight_on), s.host(&grad_bias_on)]);
        }
        results
    });
}

#[test]
fn column_sums() {
    with_every_setup(|s| {
        let mut results = vec![];
        for (rows, width) in [(0, 3), (1, 1), (1500, 37), (5000, 128)] {
            let (values, values_on) = s.random(1, rows * width);
            let (mut total, mut total_on) = s.random_f32(2, width);
            cpu::bias_grad(&s.cpu, &values, &mut total);
            lina_cuda::column_sums(s.gpu, values_on.view(), total_on.view_mut()).unwrap();
            s.check("total", &total_on, &total);
            results.push(s.host(&total_on));
        }
        results
    });
}

#[test]
fn rotary() {
    with_every_setup(|s| {
        let mut results = vec![];
        for (layout, rows) in LAYOUTS.into_iter().zip([33, 5, 70, 0, 9]) {
            let positions: Vec<u32> = (0..rows as u32).map(|row| row * 7919 % 100).collect();
            let positions_on = s.numbers(&positions);
            let table = cpu::RotaryTable::new(layout.head_dim, 100, 10_000.0);
            let table_on = lina_cuda::RotaryTable::new(s.gpu, layout.head_dim, 100, 10_000.0).unwrap();
            assert_eq!(table_on.max_positions(), 100);
            let (mut x, mut x_on) = s.random(1, rows * layout.row_stride);
            cpu::rotary_forward(&s.cpu, &table, &positions, layout, &mut x);
            lina_cuda::rotary_forward(s.gpu, &table_on, positions_on.whole(), layout, x_on.view_mut()).unwrap();
            s.check("rotated", &x_on, &x);
            cpu::rotary_backward(&s.cpu, &table, &positions[..], layout, &mut x);
            cpu::rotary_backward(&s.cpu, &table, &positions[..], layout, &mut x);
            for _ in 0..2 {
                lina_cuda::rotary_backward(s.gpu, &table_on, positions_on.whole(), layout, x_on.view_mut()).unwrap();
            }
            s.check("rotated back", &x_on, &x);
            results.push(s.host(&x_on));
        }
        results
    });
}

#[test]
fn swiglu() {
    with_every_setup(|s| {
        let mut results = vec![];
        for (rows, features) in [(0, 8), (1, 1), (5, 12), (33, 64), (7, 768)] {
            let (gate_up, gate_up_on) = s.random(1, rows * 2 * features);
            let mut hidden = vec![0.0; rows * features];
            let mut hidden_on = s.poisoned(hidden.len());
            cpu::swiglu_forward(&s.cpu, &gate_up, features, &mut hidden);
            lina_cuda::swiglu_forward(s.gpu, gate_up_on.view(), features, hidden_on.view_mut()).unwrap();
            s.check("hidden", &hidden_on, &hidden);

            let (grad_hidden, grad_hidden_on) = s.random(2, rows * features);
            let mut grad = vec![0.0; gate_up.len()];
            cpu::swiglu_backward(&s.cpu, &gate_up, features, &grad_hidden, &mut grad, None);
            for again in [false, true] {
                let (mut grad_on, mut hidden_on) = (s.poisoned(grad.len()), s.poisoned(hidden.len()));
                let hidden_out = again.then(|| hidden_on.view_mut());
                let (gate_up_view, grad_view) = (gate_up_on.view(), grad_hidden_on.view());
                lina_cuda::swiglu_backward(s.gpu, gate_up_view, features, grad_view, grad_on.view_mut(), hidden_out)
                    .unwrap();
                s.check("grad_gate_up", &grad_on, &grad);
                if again {
                    s.check("hidden again", &hidden_on, &hidden);
                }
                results.push(s.host(&grad_on));
            }
        }
        results
    });
}

#[test]
fn activations() {
    with_every_setup(|s| {
        let mut results = vec![];
        for activation in [Activation::Relu, Activation::Gelu, Activation::GeluTanh] {
            for (rows, width) in [(0, 8), (1, 1), (5, 12), (33, 64)] {
                for with_bias in [false, true] {
                    let (mut pre, mut pre_on) = s.random(1, rows * width);
                    let (bias, bias_on) = s.random_f32(2, width);
                    let mut y = vec![0.0; pre.len()];
                    let mut y_on = s.poisoned(y.len());
                    cpu::activation_forward(&s.cpu, activation, &mut pre, with_bias.then_some(&bias[..]), &mut y);
                    let bias_view = with_bias.then(|| bias_on.view());
                    lina_cuda::activation_forward(s.gpu, activation, pre_on.view_mut(), bias_view, y_on.view_mut())
                        .unwrap();
                    s.check("pre", &pre_on, &pre);
                    s.check("y", &y_on, &y);

                    // The slope of ReLU is not continuous: the processor's has the values that the device holds.
                    let pre = s.host(&pre_on);
                    let (grad_y, grad_y_on) = s.random(3, y.len());
                    let mut grad = vec![0.0; y.len()];
                    let mut grad_on = s.poisoned(y.len());
                    cpu::activation_backward(&s.cpu, activation, &pre, &grad_y, &mut grad);
                    let (pre_view, grad_view) = (pre_on.view(), grad_y_on.view());
                    lina_cuda::activation_backward(s.gpu, activation, pre_view, grad_view, grad_on.view_mut()).unwrap();
                    s.check("grad_pre", &grad_on, &grad);
                    results.push(s.host(&grad_on));
                }
            }
        }
        let (mut x, mut x_on) = s.random(1, 9 * 24);
        let (bias, bias_on) = s.random_f32(2, 24);
        cpu::add_bias(&s.cpu, &mut x, &bias);
        lina_cuda::add_bias(s.gpu, x_on.view_mut(), bias_on.view()).unwrap();
        s.check("biased", &x_on, &x);
        results
    });
}

#[test]
fn embeddings() {
    with_every_setup(|s| {
        let mut results = vec![];
        // Many different ids, few, one, and ids that fill whole blocks of the sum.
        for (vocabulary, count, width, distinct) in [
            (5, 0, 8, 5),
            (1, 1, 1, 1),
            (3000, 700, 24, 3000),
            (70_000, 300, 7, 70_000),
            (50, 1000, 72, 3),
            (9, 96, 2056, 1),
        ] {
            let seeds: Vec<f32> = random(9, count);
            let ids: Vec<u32> = seeds.iter().map(|x| ((x + 1.0) * 0.5 * distinct as f32) as u32 % distinct).collect();
            let ids_on = s.numbers(&ids);
            let (table, table_on) = s.random(1, vocabulary * width);
            let mut out = vec![0.0; count * width];
            let mut out_on = s.poisoned(out.len());
            cpu::embedding_forward(&s.cpu, &table, &ids, &mut out);
            lina_cuda::embedding_forward(s.gpu, table_on.view(), ids_on.whole(), out_on.view_mut()).unwrap();
            s.check("out", &out_on, &out);
            lina_cuda::add_position_embedding(s.gpu, table_on.view(), ids_on.whole(), out_on.view_mut()).unwrap();
            s.check("doubled", &out_on, &out.iter().map(|x| 2.0 * x).collect::<Vec<_>>());

            for padding in [None, ids.first().copied()] {
                let (mut grad_out, grad_out_on) = s.random(2, count * width);
                let (mut grad, mut grad_on) = s.random_f32(3, vocabulary * width);
                for (id, grad) in ids.iter().zip(grad_out.chunks_exact_mut(width)) {
                    if Some(*id) == padding {
                        grad.fill(0.0);
                    }
                }
                cpu::embedding_backward(&s.cpu, &grad_out, &ids, &mut grad);
                let (grad_view, ids_view) = (grad_out_on.view(), ids_on.whole());
                lina_cuda::embedding_backward(s.gpu, grad_view, ids_view, padding, grad_on.view_mut()).unwrap();
                s.check("grad_table", &grad_on, &grad);
                results.push(s.host(&grad_on));
            }
        }
        results
    });
}

#[test]
fn cross_entropy() {
    with_every_setup(|s| {
        let mut results = vec![];
        for (rows, vocabulary) in [(0, 8), (3, 1), (5, 7), (33, 50), (9, 1000), (4, 20_011)] {
            let (mut logits, mut logits_on) = s.random(1, rows * vocabulary);
            let target = |row: usize| if row % 4 == 3 { IGNORED } else { (row * 7919 % vocabulary) as u32 };
            let targets: Vec<u32> = (0..rows).map(target).collect();
            let targets_on = s.numbers(&targets);
            let mut losses = vec![0.0; rows];
            let mut losses_on = s.poisoned_f32(rows);
            cpu::cross_entropy_forward(&s.cpu, &logits, &targets, &mut losses);
            lina_cuda::cross_entropy_forward(s.gpu, logits_on.view(), targets_on.whole(), losses_on.view_mut())
                .unwrap();
            s.check("losses", &losses_on, &losses);

            cpu::cross_entropy_forward_backward(&s.cpu, &mut logits, &targets, 0.5, &mut losses);
            let mut losses_on = s.poisoned_f32(rows);
            let outputs = (logits_on.view_mut(), losses_on.view_mut());
            lina_cuda::cross_entropy_forward_backward(s.gpu, outputs.0, targets_on.whole(), 0.5, outputs.1).unwrap();
            s.check("losses", &losses_on, &losses);
            s.check("gradient", &logits_on, &logits);

            let mut sum_on = s.poisoned_f32(1);
            lina_cuda::sum_into(s.gpu, losses_on.view(), sum_on.view_mut()).unwrap();
            s.check("sum", &sum_on, &[losses.iter().sum::<f32>()]);
            results.extend([s.host(&logits_on), s.host(&losses_on), s.host(&sum_on)]);
        }
        results
    });
}

#[test]
fn whole_buffers() {
    with_every_setup(|s| {
        for len in [0, 1, 7, 8, 15, 1000, 2057] {
            let ((mut y, mut y_on), (x, x_on)) = (s.random(1, len), s.random(2, len));
            cpu::clamp_backward(&s.cpu, &x, 0.5, &mut y);
            lina_cuda::clamp_backward(s.gpu, x_on.view(), 0.5, y_on.view_mut()).unwrap();
            s.check("clamp's gradient", &y_on, &y);
            cpu::clamp(&s.cpu, &mut y, 0.25);
            lina_cuda::clamp(s.gpu, y_on.view_mut(), 0.25).unwrap();
            s.check("clamped", &y_on, &y);

            let (mut total, mut total_on) = s.random_f32(3, len);
            cpu::add(&s.cpu, &mut total, &x);
            lina_cuda::accumulate_f32(s.gpu, total_on.view_mut(), x_on.view()).unwrap();
            s.check("accumulated", &total_on, &total);

            let mut narrow = s.place(&vec![f32::NAN; len], DType::Bf16);
            lina_cuda::cast(s.gpu, total_on.view(), narrow.view_mut()).unwrap();
            assert_eq!(s.host(&narrow), round_bf16(&s.host(&total_on)));
            let mut wide = s.place(&vec![f32::NAN; len], DType::F32);
            lina_cuda::cast(s.gpu, narrow.view(), wide.view_mut()).unwrap();
            assert_eq!(s.host(&wide), s.host(&narrow));
        }
        vec![]
    });
}

#[test]
fn jitter_has_the_processors_bits() {
    let mix = |state: u64| {
        let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    with_every_setup(|s| {
        for (rows, width) in [(0, 8), (3, 5), (17, 64)] {
            let (mut values, mut on) = s.random(1, rows * width);
            let (stream, offset) = (0x0123_4567_89ab_cdef, 1 << 40);
            for (row, values) in values.chunks_exact_mut(width).enumerate() {
                let token = mix(stream ^ (offset + row as u64));
                for (column, value) in values.iter_mut().enumerate() {
                    let unit = (mix(token.wrapping_add(column as u64)) >> 40) as f32 / (1u32 << 24) as f32;
                    *value *= 1.0 + 0.3 * (2.0 * unit - 1.0);
                }
            }
            lina_cuda::jitter::apply(s.gpu, on.view_mut(), width, 0.3, stream, offset).unwrap();
            let expected = if s.dtype == DType::Bf16 { round_bf16(&values) } else { values };
            assert_eq!(s.host(&on), expected);
        }
        vec![]
    });
}

/// Prints what operations move per second, on sizes of a training step.
#[test]
#[ignore = "measures a GPU and checks nothing"]
fn rates() {
    let Some(gpu) = lina_cuda::testing::gpu() else { return };
    let (rows, width, k, experts, vocabulary) = (32_768, 2048, 8, 128, 151_936);
    let zeros = |len: usize, dtype: DType| gpu.zeros(len, dtype).unwrap();
    let measure = |name: &str, bytes: usize, run: &mut dyn FnMut()| {
        const REPEATS: usize = 20;
        run();
        let (start, end) = (gpu.event().unwrap(), gpu.event().unwrap());
        start.record(gpu.stream()).unwrap();
        (0..REPEATS).for_each(|_| run());
        end.record(gpu.stream()).unwrap();
        end.synchronize().unwrap();
        let ms = f64::from(end.elapsed_ms_since(&start).unwrap()) / REPEATS as f64;
        println!("{name:<32} {:>9.1} us {:>8.2} TB/s", ms * 1e3, bytes as f64 / ms / 1e9);
    };
    let (row_bytes, f32_bytes) = (rows * width * 2, rows * width * 4);
    let tokens = |dtype| zeros(rows * width, dtype);
    let (x, mut y, grad) = (tokens(DType::Bf16), tokens(DType::Bf16), tokens(DType::Bf16));
    let (weight, mut grad_weight) = (zeros(width, DType::F32), zeros(width, DType::F32));
    let (mut mean, mut inverse, mut heads) =
        (zeros(rows, DType::F32), zeros(rows, DType::F32), zeros(rows * 32, DType::F32));
    let mut grad_bias = zeros(width, DType::F32);
    let w = weight.whole();
    measure("rms_norm_forward", 2 * row_bytes, &mut || {
        lina_cuda::rms_norm_forward(&gpu, x.whole(), w, 1e-5, y.whole_mut(), inverse.whole_mut()).unwrap();
    });
    measure("rms_norm_backward", 4 * row_bytes, &mut || {
        let outputs = (y.whole_mut(), grad_weight.whole_mut());
        lina_cuda::rms_norm_backward(&gpu, x.whole(), w, inverse.whole(), grad.whole(), outputs.0, outputs.1).unwrap();
    });
    let layout = HeadLayout { offset: 0, heads: 16, head_dim: 128, row_stride: width };
    let head_weight = weight.slice(0..128);
    let head_inverse = rows * 16;
    measure("head_rms_norm_forward", 2 * row_bytes, &mut || {
        let outputs = (y.whole_mut(), heads.slice_mut(0..head_inverse));
        lina_cuda::head_rms_norm_forward(&gpu, layout, x.whole(), head_weight, 1e-5, outputs.0, outputs.1).unwrap();
    });
    measure("head_rms_norm_backward", 3 * row_bytes, &mut || {
        let outputs = (y.whole_mut(), grad_weight.slice_mut(0..128));
        let inverse = heads.slice(0..head_inverse);
        lina_cuda::head_rms_norm_backward(&gpu, layout, x.whole(), head_weight, inverse, outputs.0, outputs.1).unwrap();
    });
    measure("layer_norm_forward", 2 * row_bytes, &mut || {
        let outputs = (y.whole_mut(), mean.whole_mut(), inverse.whole_mut());
        lina_cuda::layer_norm_forward(&gpu, x.whole(), w, w, 1e-5, outputs.0, outputs.1, outputs.2).unwrap();
    });
    measure("layer_norm_backward", 4 * row_bytes, &mut || {
        let outputs = (y.whole_mut(), grad_weight.whole_mut(), grad_bias.whole_mut());
        let (mean, inverse) = (mean.whole(), inverse.whole());
        lina_cuda::layer_norm_backward(
            &gpu,
            x.whole(),
            w,
            mean,
            inverse,
            grad.whole(),
            outputs.0,
            outputs.1,
            outputs.2,
        )
        .unwrap();
    });
    let positions = zeros(rows, DType::U32);
    let table = lina_cuda::RotaryTable::new(&gpu, 128, 4096, 10_000.0).unwrap();
    measure("rotary_forward", 2 * row_bytes, &mut || {
        lina_cuda::rotary_forward(&gpu, &table, positions.whole(), layout, y.whole_mut()).unwrap();
    });
    let features = width / 2;
    let mut hidden = zeros(rows * features, DType::Bf16);
    measure("swiglu_forward", 3 * row_bytes / 2, &mut || {
        lina_cuda::swiglu_forward(&gpu, x.whole(), features, hidden.whole_mut()).unwrap();
    });
    measure("swiglu_backward with hidden", 3 * row_bytes, &mut || {
        let (grad, outputs) = (grad.slice(0..rows * features), (y.whole_mut(), hidden.whole_mut()));
        lina_cuda::swiglu_backward(&gpu, x.whole(), features, grad, outputs.0, Some(outputs.1)).unwrap();
    });
    let (token_count, mut logits) = (4096, zeros(4096 * vocabulary, DType::Bf16));
    let (targets, mut losses) = (zeros(token_count, DType::U32), zeros(token_count, DType::F32));
    let logit_bytes = token_count * vocabulary * 2;
    measure("cross_entropy_forward", logit_bytes, &mut || {
        lina_cuda::cross_entropy_forward(&gpu, logits.whole(), targets.whole(), losses.whole_mut()).unwrap();
    });
    measure("cross_entropy_forward_backward", 3 * logit_bytes, &mut || {
        let outputs = (logits.whole_mut(), losses.whole_mut());
        lina_cuda::cross_entropy_forward_backward(&gpu, outputs.0, targets.whole(), 1.0, outputs.1).unwrap();
    });
    let ids: Vec<u32> = random(1, rows).iter().map(|x| ((x + 1.0) * 10_000.0 * (x + 1.0)) as u32).collect();
    let ids = gpu.buffer_from(&ids, DType::U32).unwrap();
    let mut grad_table = zeros(vocabulary * width, DType::F32);
    measure("embedding_backward", row_bytes, &mut || {
        lina_cuda::embedding_backward(&gpu, grad.whole(), ids.whole(), None, grad_table.whole_mut()).unwrap();
    });

    let router_logits = gpu.buffer_from(&random(2, rows * experts), DType::F32).unwrap();
    let mut probs = zeros(rows * experts, DType::F32);
    let (mut index, mut gate) = (zeros(rows * k, DType::U32), zeros(rows * k, DType::F32));
    measure("router_forward", 2 * rows * experts * 4, &mut || {
        let outputs = (probs.whole_mut(), index.whole_mut(), gate.whole_mut());
        lina_cuda::router_forward(&gpu, router_logits.whole(), k, true, outputs.0, outputs.1, outputs.2).unwrap();
    });
    let mut grad_logits = zeros(rows * experts, DType::F32);
    measure("router_backward", 2 * rows * experts * 4, &mut || {
        let choices = (probs.whole(), index.whole(), gate.whole());
        let grad_weight = (gate.whole(), grad_logits.whole_mut());
        lina_cuda::router_backward(
            &gpu,
            choices.0,
            choices.1,
            choices.2,
            k,
            true,
            grad_weight.0,
            None,
            0.0,
            router_logits.whole(),
            grad_weight.1,
        )
        .unwrap();
    });
    let chunk = 0..rows;
    let chunks = std::slice::from_ref(&chunk);
    let mut counts = zeros(2 * experts, DType::U32);
    measure("count_assignments", rows * k * 4, &mut || {
        lina_cuda::count_assignments(&gpu, index.whole(), k, chunks, experts, counts.whole_mut()).unwrap();
    });
    let counts: Vec<u32> = gpu.to_host(counts.slice(0..experts)).unwrap();
    let ends: Vec<u32> = counts
        .iter()
        .scan(0, |end, count| {
            *end += count;
            Some(*end)
        })
        .collect();
    let starts: Vec<u32> = ends.iter().zip(&counts).map(|(end, count)| end - count).collect();
    let [starts, ends] = [starts, ends].map(|rows| gpu.buffer_from(&rows, DType::U32).unwrap());
    let (mut position, mut token_of_row) = (zeros(rows * k, DType::U32), zeros(rows * k, DType::U32));
    measure("place_rows", 3 * rows * k * 4, &mut || {
        let outputs = (position.whole_mut(), token_of_row.whole_mut());
        let (starts, ends) = (starts.whole(), ends.whole());
        lina_cuda::place_rows(&gpu, index.whole(), k, chunks, experts, starts, ends, &[0], outputs.0, outputs.1)
            .unwrap();
    });
    let (mut expert_rows, mut grad_rows) = (zeros(k * rows * width, DType::Bf16), zeros(k * rows * width, DType::Bf16));
    measure("gather_rows", (k + 1) * row_bytes, &mut || {
        lina_cuda::gather_rows(&gpu, x.whole(), width, token_of_row.whole(), expert_rows.whole_mut()).unwrap();
    });
    measure("gather_backward", (k + 2) * row_bytes, &mut || {
        lina_cuda::gather_backward(&gpu, expert_rows.whole(), width, position.whole(), y.whole_mut()).unwrap();
    });
    measure("combine_rows", (k + 2) * row_bytes, &mut || {
        let (rows, position) = (expert_rows.whole(), position.whole());
        lina_cuda::combine_rows(&gpu, rows, width, position, gate.whole(), x.whole(), y.whole_mut()).unwrap();
    });
    measure("combine_backward", (2 * k + 1) * row_bytes, &mut || {
        let (rows, position, outputs) =
            (expert_rows.whole(), position.whole(), (grad_rows.whole_mut(), probs.slice_mut(0..rows * k)));
        lina_cuda::combine_backward(&gpu, grad.whole(), width, rows, position, gate.whole(), outputs.0, outputs.1)
            .unwrap();
    });
    let blocks = gpu.buffer_from(&[0u32, 5, 1000, 1000, 2000, rows as u32 - 2000], DType::U32).unwrap();
    measure("copy_blocks", 2 * row_bytes * (rows - 1000) / rows, &mut || {
        lina_cuda::copy_blocks(&gpu, blocks.whole(), rows - 1000, width, x.whole(), y.whole_mut()).unwrap();
    });
    measure("jitter", 2 * row_bytes, &mut || {
        lina_cuda::jitter::apply(&gpu, y.whole_mut(), width, 0.01, 1, 0).unwrap();
    });
    let (mut params, grads, mut m, mut v) =
        (tokens(DType::F32), tokens(DType::F32), tokens(DType::F32), tokens(DType::F32));
    let step = cpu::AdamWStep {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        bias_correction1: 0.1,
        bias_correction2: 0.05,
        grad_scale: 1.0,
    };
    measure("adamw_step with copy", 7 * f32_bytes + row_bytes, &mut || {
        let moments = (m.whole_mut(), v.whole_mut());
        let copy = Some(y.whole_mut());
        lina_cuda::adamw_step(&gpu, params.whole_mut(), grads.whole(), moments.0, moments.1, copy, &step).unwrap();
    });
    let ranges: Vec<_> = (0..1000).map(|i| i * (rows * width / 1000)..(i + 1) * (rows * width / 1000)).collect();
    let mut sums = vec![0.0; ranges.len()];
    measure("sum_of_squares of 1000 ranges", f32_bytes, &mut || {
        lina_cuda::sum_of_squares(&gpu, grads.whole(), &ranges, &mut sums).unwrap();
    });
    measure("accumulate_f32", 3 * f32_bytes, &mut || {
        lina_cuda::accumulate_f32(&gpu, params.whole_mut(), grads.whole()).unwrap();
    });
}

#[test]
fn parts_are_summed_in_their_order_on_any_stream() {
    let Some(gpu) = gpu() else { return };
    let (count, len) = (5, 1_003);
    let parts = random(3, count * len);
    let device_parts = gpu.buffer_from(&parts, DType::F32).unwrap();
    let sum = gpu.zeros(len, DType::F32).unwrap();
    gpu.synchronize().unwrap();
    let stream = Stream::new(gpu.device(), Priority::High).unwrap();
    let kernel = PartSum::new(gpu.device()).unwrap();
    // SAFETY: nobody else uses the sum before the stream has come as far.
    unsafe { kernel.enqueue(&stream, device_parts.whole(), count, sum.whole().ptr()) }.unwrap();
    stream.synchronize().unwrap();
    let in_order = |i: usize| parts[i..].iter().step_by(len).copied().reduce(|sum, part| sum + part).unwrap();
    assert!(gpu.to_host::<f32>(sum.whole()).unwrap().into_iter().eq((0..len).map(in_order)));
}
