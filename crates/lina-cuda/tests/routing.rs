//! Router and permutation, against the processor's.

use std::mem::replace;
use std::ops::Range;

use lina_cuda::testing::{random, relative_error, round_bf16};
use lina_cuda::{Buffer, DType, Gpu};
use lina_kernels::{self as cpu, Compute, DROPPED};

fn poisoned(gpu: &Gpu, len: usize, dtype: DType) -> Buffer {
    gpu.buffer_from(&vec![f32::NAN; len], dtype).unwrap()
}

fn host(gpu: &Gpu, buffer: &Buffer) -> Vec<f32> {
    gpu.to_host(buffer.whole()).unwrap()
}

fn check(gpu: &Gpu, name: &str, found: &Buffer, expected: &[f32]) {
    let limit = if found.dtype() == DType::Bf16 { 1e-2 } else { 1e-5 };
    let error = relative_error(&host(gpu, found), expected);
    assert!(error <= limit, "{name}, {:?}, {} elements: {error}", found.dtype(), expected.len());
}

/// Whole numbers in 0..limit.
fn choices(seed: u64, len: usize, limit: usize) -> Vec<u32> {
    random(seed, len).iter().map(|x| ((x + 1.0) * 0.5 * limit as f32) as u32 % limit as u32).collect()
}

#[test]
fn router() {
    let Some(gpu) = lina_cuda::testing::gpu() else { return };
    let cpu_threads = Compute::new(2);
    let shapes =
        [(0, 4, 2), (1, 1, 1), (5, 4, 2), (33, 60, 4), (300, 128, 8), (7, 1000, 64), (3, 1024, 1), (9, 64, 64)];
    for (tokens, experts, k) in shapes {
        for renormalise in [false, true] {
            // Few different values, so that some are equal and the others are not nearly equal.
            let logits: Vec<f32> = random(1, tokens * experts).iter().map(|x| (x * 512.0).floor() / 128.0).collect();
            let logits_on = gpu.buffer_from(&logits, DType::F32).unwrap();
            let (mut probs, mut index, mut weight) =
                (vec![0.0; logits.len()], vec![0; tokens * k], vec![0.0; tokens * k]);
            cpu::router_forward(&cpu_threads, &logits, k, renormalise, &mut probs, &mut index, &mut weight);
            let mut probs_on = poisoned(&gpu, logits.len(), DType::F32);
            let mut index_on = gpu.buffer_from(&vec![77u32; tokens * k], DType::U32).unwrap();
            let mut weight_on = poisoned(&gpu, tokens * k, DType::F32);
            lina_cuda::router_forward(
                &gpu,
                logits_on.whole(),
                k,
                renormalise,
                probs_on.whole_mut(),
                index_on.whole_mut(),
                weight_on.whole_mut(),
            )
            .unwrap();
            check(&gpu, "probabilities", &probs_on, &probs);
            check(&gpu, "weights", &weight_on, &weight);
            assert_eq!(gpu.to_host::<u32>(index_on.whole()).unwrap(), index, "{tokens} {experts} {k}");

            let (grad_weight, extra) = (random(2, tokens * k), random(3, experts));
            let grad_weight_on = gpu.buffer_from(&grad_weight, DType::F32).unwrap();
            let extra_on = gpu.buffer_from(&extra, DType::F32).unwrap();
            for (balanced, z) in [(false, 0.0), (true, 0.0), (false, 0.05), (true, 0.05)] {
                let mut grad = vec![0.0; logits.len()];
                let extra = balanced.then_some(&extra[..]);
                cpu::router_backward(
                    &cpu_threads,
                    &probs,
                    &index,
                    &weight,
                    k,
                    renormalise,
                    &grad_weight,
                    extra,
                    z,
                    &logits,
                    &mut grad,
                );
                let mut grad_on = poisoned(&gpu, logits.len(), DType::F32);
                lina_cuda::router_backward(
                    &gpu,
                    probs_on.whole(),
                    index_on.whole(),
                    weight_on.whole(),
                    k,
                    renormalise,
                    grad_weight_on.whole(),
                    balanced.then(|| extra_on.whole()),
                    z,
                    logits_on.whole(),
                    grad_on.whole_mut(),
                )
                .unwrap();
                // With all experts chosen and nothing else to learn, gradients are differences of nearly equal numbers.
                if experts > k || balanced || z > 0.0 {
                    check(&gpu, "gradient", &grad_on, &grad);
                }
            }

            let mut z_on = poisoned(&gpu, tokens, DType::F32);
            lina_cuda::z_loss(&gpu, logits_on.whole(), z_on.whole_mut()).unwrap();
            let z_loss = |row: &[f32]| row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln().powi(2) as f32;
            let z: Vec<f32> = logits.chunks_exact(experts).map(z_loss).collect();
            check(&gpu, "z loss", &z_on, &z);
        }
    }
}

#[test]
fn router_survives_infinite_and_missing_numbers() {
    let Some(gpu) = lina_cuda::testing::gpu() else { return };
    let logits = [f32::NAN, 1.0, 2.0, f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
    let logits_on = gpu.buffer_from(&logits, DType::F32).unwrap();
    let (mut probs_on, mut weight_on) = (poisoned(&gpu, 6, DType::F32), poisoned(&gpu, 4, DType::F32));
    let mut index_on = gpu.buffer_from(&[9u32; 4], DType::U32).unwrap();
    let outputs = (probs_on.whole_mut(), index_on.whole_mut(), weight_on.whole_mut());
    lina_cuda::router_forward(&gpu, logits_on.whole(), 2, false, outputs.0, outputs.1, outputs.2).unwrap();
    assert_eq!(gpu.to_host::<u32>(index_on.whole()).unwrap(), [0, 1, 1, 0]);
    assert_eq!(host(&gpu, &weight_on)[2..], [1.0, 0.0]);
}

/// Where assignments go, as `place_rows` should have it.
struct Placed {
    row_starts: Vec<u32>,
    row_ends: Vec<u32>,
    chunk_starts: Vec<u32>,
    position: Vec<u32>,
    token_of_row: Vec<u32>,
}

/// At most `capacity` rows per chunk and expert; experts in an order of their own.
fn place(index: &[u32], top_k: usize, chunks: &[Range<usize>], experts: usize, capacity: u32) -> Placed {
    let mut placed = Placed {
        row_starts: vec![0; chunks.len() * experts],
        row_ends: vec![0; chunks.len() * experts],
        chunk_starts: vec![],
        position: vec![DROPPED; index.len()],
        token_of_row: vec![],
    };
    for (number, chunk) in chunks.iter().enumerate() {
        let first = placed.token_of_row.len();
        placed.chunk_starts.push(first as u32);
        for expert in (0..experts).rev() {
            let start = (placed.token_of_row.len() - first) as u32;
            placed.row_starts[number * experts + expert] = start;
            let items = chunk.start * top_k..chunk.end * top_k;
            for (item, &choice) in items.clone().zip(&index[items]) {
                let row = (placed.token_of_row.len() - first) as u32;
                if choice as usize == expert && row < start + capacity {
                    placed.position[item] = row;
                    placed.token_of_row.push((item / top_k) as u32);
                }
            }
            placed.row_ends[number * experts + expert] = (placed.token_of_row.len() - first) as u32;
        }
    }
    placed
}

#[test]
fn places() {
    let Some(gpu) = lina_cuda::testing::gpu() else { return };
    for (tokens, top_k, experts) in [(0, 2, 4), (1, 1, 1), (500, 2, 8), (3000, 3, 128), (700, 4, 1000), (2500, 1, 2)] {
        let index = choices(1, tokens * top_k, experts);
        let index_on = gpu.buffer_from(&index, DType::U32).unwrap();
        let third = tokens / 3;
        for ends in [&[tokens][..], &[0, third, third, tokens, tokens]] {
            let chunks: Vec<Range<usize>> = ends.iter().scan(0, |start, &end| Some(replace(start, end)..end)).collect();
            let mut counts = vec![0; (chunks.len() + 1) * experts];
            for (number, chunk) in chunks.iter().enumerate() {
                for item in chunk.start * top_k..chunk.end * top_k {
                    counts[number * experts + index[item] as usize] += 1;
                    if item % top_k == 0 {
                        counts[chunks.len() * experts + index[item] as usize] += 1;
                    }
                }
            }
            let mut counts_on = gpu.buffer_from(&vec![77u32; counts.len()], DType::U32).unwrap();
            lina_cuda::count_assignments(&gpu, index_on.whole(), top_k, &chunks, experts, counts_on.whole_mut())
                .unwrap();
            assert_eq!(gpu.to_host::<u32>(counts_on.whole()).unwrap(), counts);

            for capacity in [u32::MAX / 2, 3, 0] {
                let expected = place(&index, top_k, &chunks, experts, capacity);
                let starts_on = gpu.buffer_from(&expected.row_starts, DType::U32).unwrap();
                let ends_on = gpu.buffer_from(&expected.row_ends, DType::U32).unwrap();
                let mut position_on = gpu.buffer_from(&vec![77u32; index.len()], DType::U32).unwrap();
                let rows = expected.token_of_row.len();
                let mut tokens_on = gpu.buffer_from(&vec![77u32; rows], DType::U32).unwrap();
                lina_cuda::place_rows(
                    &gpu,
                    index_on.whole(),
                    top_k,
                    &chunks,
                    experts,
                    starts_on.whole(),
                    ends_on.whole(),
                    &expected.chunk_starts,
                    position_on.whole_mut(),
                    tokens_on.whole_mut(),
                )
                .unwrap();
                assert_eq!(gpu.to_host::<u32>(position_on.whole()).unwrap(), expected.position);
                assert_eq!(gpu.to_host::<u32>(tokens_on.whole()).unwrap(), expected.token_of_row);
            }
        }
    }
}

#[test]
fn rows_travel_and_come_back() {
    let Some(gpu) = lina_cuda::testing::gpu() else { return };
    let cpu_threads = Compute::new(2);
    for dtype in [DType::F32, DType::Bf16] {
        let stored = |seed, len| {
            let values = random(seed, len);
            if dtype == DType::Bf16 { round_bf16(&values) } else { values }
        };
        let place_on = |values: &[f32]| gpu.buffer_from(values, dtype).unwrap();
        for (tokens, k, width) in [(0, 2, 8), (1, 1, 1), (40, 2, 100), (33, 8, 264), (9, 5, 2048), (3, 1, 4104)] {
            let placed = place(&choices(1, tokens * k, 8), k, std::slice::from_ref(&(0..tokens)), 8, 5);
            let rows = placed.token_of_row.len();
            let position_on = gpu.buffer_from(&placed.position, DType::U32).unwrap();
            // The last row has no source.
            let source: Vec<u32> = placed.token_of_row.iter().copied().chain([DROPPED]).collect();
            let source_on = gpu.buffer_from(&source, DType::U32).unwrap();

            let x = stored(2, tokens * width);
            let x_on = place_on(&x);
            let mut gathered = vec![0.0; (rows + 1) * width];
            let mut gathered_on = poisoned(&gpu, gathered.len(), dtype);
            cpu::gather_rows(&cpu_threads, &x, width, &source, &mut gathered);
            lina_cuda::gather_rows(&gpu, x_on.whole(), width, source_on.whole(), gathered_on.whole_mut()).unwrap();
            assert_eq!(host(&gpu, &gathered_on), gathered);

            let (expert_rows, gate_weight) = (stored(3, rows * width), random(4, tokens * k));
            let rows_on = place_on(&expert_rows);
            let weight_on = gpu.buffer_from(&gate_weight, DType::F32).unwrap();
            let mut y = x.clone();
            cpu::combine_rows(&cpu_threads, &expert_rows, width, &placed.position, &gate_weight, &mut y);
            let mut y_on = poisoned(&gpu, y.len(), dtype);
            let inputs = (rows_on.whole(), position_on.whole(), weight_on.whole(), x_on.whole());
            lina_cuda::combine_rows(&gpu, inputs.0, width, inputs.1, inputs.2, inputs.3, y_on.whole_mut()).unwrap();
            check(&gpu, "combined", &y_on, &y);

            let mut grad_x = x.clone();
            let mut grad_x_on = place_on(&x);
            cpu::gather_backward(&cpu_threads, &expert_rows, width, &placed.position, &mut grad_x);
            let position = position_on.whole();
            lina_cuda::gather_backward(&gpu, rows_on.whole(), width, position, grad_x_on.whole_mut()).unwrap();
            check(&gpu, "gathered gradient", &grad_x_on, &grad_x);

            let (mut grad_rows, mut grad_weight) = (vec![7.0; rows * width], vec![0.0; tokens * k]);
            let mut grad_rows_on = place_on(&grad_rows);
            let mut grad_weight_on = poisoned(&gpu, tokens * k, DType::F32);
            cpu::combine_backward(
                &cpu_threads,
                &x,
                width,
                &expert_rows,
                &placed.position,
                &gate_weight,
                &mut grad_rows,
                &mut grad_weight,
            );
            lina_cuda::combine_backward(
                &gpu,
                x_on.whole(),
                width,
                rows_on.whole(),
                position_on.whole(),
                weight_on.whole(),
                grad_rows_on.whole_mut(),
                grad_weight_on.whole_mut(),
            )
            .unwrap();
            check(&gpu, "gradient of rows", &grad_rows_on, &grad_rows);
            check(&gpu, "gradient of weights", &grad_weight_on, &grad_weight);
        }
    }
}

#[test]
fn blocks_of_rows_move() {
    let Some(gpu) = lina_cuda::testing::gpu() else { return };
    for dtype in [DType::F32, DType::Bf16] {
        for width in [1, 24, 300] {
            // From row 4 on: 3 rows to 10, 1 to 2, 5 to 20.
            let blocks = [4u32, 10, 3, 7, 2, 1, 8, 20, 5];
            let blocks_on = gpu.buffer_from(&blocks, DType::U32).unwrap();
            let source = round_bf16(&random(1, 13 * width));
            let mut expected = vec![7.0; 30 * width];
            let mut destination_on = gpu.buffer_from(&expected, dtype).unwrap();
            for block in blocks.chunks_exact(3) {
                let [from, to, rows] = [block[0], block[1], block[2]].map(|rows| rows as usize * width);
                expected[to..to + rows].copy_from_slice(&source[from..from + rows]);
            }
            let source_on = gpu.buffer_from(&source, dtype).unwrap();
            let source_view = source_on.whole();
            lina_cuda::copy_blocks(&gpu, blocks_on.whole(), 9, width, source_view, destination_on.whole_mut()).unwrap();
            assert_eq!(host(&gpu, &destination_on), expected);
            lina_cuda::copy_blocks(&gpu, blocks_on.slice(0..0), 0, width, source_view, destination_on.whole_mut())
                .unwrap();
        }
    }
}
