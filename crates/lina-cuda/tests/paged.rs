//! Attention over pages on a GPU against the processor's, and that a token's bits depend on nothing but its sequence.

use lina_cuda::testing::{gpu, random, relative_error, round_bf16};
use lina_cuda::{Buffer, CudaError, DType, Gpu, PagedMemory, PagedPlan, paged_append, paged_attention};
use lina_kernels::{Compute, PAGE_TOKENS, PagedSequence, PagedShape, page_elements};

const TYPES: [DType; 2] = [DType::F32, DType::Bf16];

fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F32 { 1e-5 } else { 1e-2 }
}

fn values(dtype: DType, seed: u64, len: usize) -> Vec<f32> {
    let values: Vec<f32> = random(seed, len).iter().map(|value| 2.0 * value).collect();
    if dtype == DType::F32 { values } else { round_bf16(&values) }
}

/// Pages for `tokens` tokens, from a pool that hands them out in disorder.
fn pages(tokens: usize, first: usize, pool: usize) -> Vec<u32> {
    (0..tokens.div_ceil(PAGE_TOKENS)).map(|index| ((first + index) * 7 % pool) as u32).collect()
}

/// The pages' number has no factor in common with the step of [`pages`].
const POOL: usize = 61;

/// Appends the new tokens and attends; rows that are not written are not numbers.
fn step(gpu: &Gpu, shape: &PagedShape<'_>, tokens: usize, dtype: DType, qkv: &[f32], cache: &mut Buffer) -> Vec<f32> {
    let plan = PagedPlan::new(gpu, shape, tokens, dtype).unwrap();
    let qkv = gpu.buffer_from(qkv, dtype).unwrap();
    let nothing = vec![f32::NAN; tokens * shape.heads_q * shape.head_dim];
    let mut output = gpu.buffer_from(&nothing, dtype).unwrap();
    paged_append(gpu, &plan, qkv.whole(), cache.whole_mut()).unwrap();
    paged_attention(gpu, &plan, qkv.whole(), cache.whole(), output.whole_mut()).unwrap();
    gpu.to_host(output.whole()).unwrap()
}

fn empty_cache(gpu: &Gpu, shape: &PagedShape<'_>, dtype: DType) -> Buffer {
    gpu.buffer_from(&vec![f32::NAN; POOL * page_elements(shape.heads_kv, shape.head_dim)], dtype).unwrap()
}

#[test]
fn agrees_with_the_processor_in_prefill_and_decoding() {
    let Some(gpu) = gpu() else { return };
    let compute = Compute::new(2);
    let lengths = [1100, 75, 1, 640];
    let firsts = [0, 18, 20, 21];
    for dtype in TYPES {
        for head_dim in [16, 32, 64, 96, 128] {
            for (heads_q, heads_kv) in [(1, 1), (4, 2), (3, 1), (32, 1)] {
                for window in [None, Some(1), Some(100), Some(600)] {
                    let row = (heads_q + 2 * heads_kv) * head_dim;
                    let pages: Vec<Vec<u32>> =
                        lengths.iter().zip(firsts).map(|(&length, first)| pages(length + 2, first, POOL)).collect();
                    // All prompts in one step, with a row that belongs to nobody, then two tokens each, then one.
                    let mut past = [0; 4];
                    let mut expected_cache = vec![0.0; POOL * page_elements(heads_kv, head_dim)];
                    let mut cache = empty_cache(&gpu, &PagedShape::fused(&[], heads_q, heads_kv, head_dim), dtype);
                    for (seed, rows) in [(1, [1099, 74, 1, 639]), (2, [2, 2, 1, 2]), (3, [1, 1, 2, 1])] {
                        let mut start_row = 1;
                        let mut sequences = Vec::new();
                        for index in 0..4 {
                            let pages = &pages[index];
                            sequences.push(PagedSequence { start_row, rows: rows[index], past: past[index], pages });
                            start_row += rows[index];
                        }
                        let shape = PagedShape { window, ..PagedShape::fused(&sequences, heads_q, heads_kv, head_dim) };
                        let qkv = values(dtype, seed, start_row * row);
                        let mut expected = vec![f32::NAN; start_row * heads_q * head_dim];
                        lina_kernels::paged_append(&compute, &shape, &qkv, &mut expected_cache);
                        lina_kernels::paged_attention(&compute, &shape, &qkv, &expected_cache, &mut expected);
                        let found = step(&gpu, &shape, start_row, dtype, &qkv, &mut cache);
                        let first = heads_q * head_dim;
                        assert!(found[..first].iter().all(|value| value.is_nan()), "a row of no sequence was written");
                        let error = relative_error(&found[first..], &expected[first..]);
                        assert!(
                            error <= tolerance(dtype),
                            "off by {error:e} for {dtype:?}, {heads_q}/{heads_kv} heads of {head_dim}, window {window:?}"
                        );
                        past.iter_mut().zip(rows).for_each(|(past, rows)| *past += rows);
                    }
                }
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_in_prefill_in_pieces_and_alone() {
    let Some(gpu) = gpu() else { return };
    let (length, heads_q, heads_kv) = (1300, 6, 2);
    for dtype in TYPES {
        for head_dim in [32, 64, 128] {
            for window in [None, Some(300), Some(700)] {
                let pages = pages(length, 0, POOL);
                let (row, width) = ((heads_q + 2 * heads_kv) * head_dim, heads_q * head_dim);
                let qkv = values(dtype, 9, length * row);
                let run = |pieces: &[usize]| {
                    let mut found = Vec::new();
                    let empty = PagedShape::fused(&[], heads_q, heads_kv, head_dim);
                    let mut cache = empty_cache(&gpu, &empty, dtype);
                    let mut past = 0;
                    for &rows in pieces {
                        let sequences = [PagedSequence { start_row: 0, rows, past, pages: &pages }];
                        let shape = PagedShape { window, ..PagedShape::fused(&sequences, heads_q, heads_kv, head_dim) };
                        found.extend(step(&gpu, &shape, rows, dtype, &qkv[past * row..][..rows * row], &mut cache));
                        past += rows;
                    }
                    found.into_iter().map(f32::to_bits).collect::<Vec<u32>>()
                };
                let whole = run(&[length]);
                assert_eq!(
                    whole,
                    run(&[511, 2, 700, 1, 1, 3, 82]),
                    "{dtype:?}, heads of {head_dim}, window {window:?}"
                );
                let mut alone = vec![length - 40];
                alone.extend([1; 40]);
                assert_eq!(whole[(length - 40) * width..], run(&alone)[(length - 40) * width..]);
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_whatever_is_beside_it() {
    let Some(gpu) = gpu() else { return };
    // So many sequences that blocks merge their own spans, against one alone, whose spans run side by side.
    let (count, length, heads, head_dim) = (1200, 640, 1, 64);
    let row = 3 * heads * head_dim;
    for dtype in TYPES {
        let pages = pages(length, 0, POOL);
        let qkv = values(dtype, 11, length * row);
        let shape = |sequences| PagedShape::fused(sequences, heads, heads, head_dim);
        let mut cache = empty_cache(&gpu, &shape(&[]), dtype);
        let prompt = [PagedSequence { start_row: 0, rows: length, past: 0, pages: &pages }];
        step(&gpu, &shape(&prompt), length, dtype, &qkv, &mut cache);
        let last = &qkv[(length - 1) * row..];
        let sequences: Vec<PagedSequence<'_>> =
            (0..count).map(|start_row| PagedSequence { start_row, rows: 1, past: length - 1, pages: &pages }).collect();
        let many = step(&gpu, &shape(&sequences), count, dtype, &last.repeat(count), &mut cache);
        let one = step(&gpu, &shape(&sequences[..1]), 1, dtype, last, &mut cache);
        for found in many.chunks_exact(heads * head_dim) {
            assert!(found.iter().zip(&one).all(|(a, b)| a.to_bits() == b.to_bits()), "{dtype:?}");
        }
    }
}

#[test]
fn heads_that_bf16_has_no_kernel_for_are_refused() {
    let Some(gpu) = gpu() else { return };
    for head_dim in [5, 24, 192] {
        let shape = PagedShape::fused(&[], 3, 1, head_dim);
        assert!(matches!(PagedPlan::new(&gpu, &shape, 0, DType::Bf16), Err(CudaError::Unsupported(_))));
    }
}

#[test]
fn no_sequences_are_ordinary() {
    let Some(gpu) = gpu() else { return };
    for dtype in TYPES {
        let shape = PagedShape::fused(&[], 4, 2, 32);
        let mut cache = empty_cache(&gpu, &shape, dtype);
        assert!(step(&gpu, &shape, 0, dtype, &[], &mut cache).is_empty());
    }
}

#[test]
fn launches_that_were_recorded_serve_later_plans() {
    let Some(gpu) = gpu() else { return };
    let (heads, head_dim) = (4, 32);
    for dtype in TYPES {
        // The sequences grow into new pages and spans, so that some steps have other launches than the one before.
        let pages = [pages(1200, 0, POOL), pages(700, 19, POOL), pages(60, 30, POOL)];
        let mut cache = gpu.zeros(POOL * page_elements(heads, head_dim), dtype).unwrap();
        let width = 3 * heads * head_dim;
        let mut qkv = gpu.zeros(3 * width, dtype).unwrap();
        let mut output = gpu.zeros(3 * heads * head_dim, dtype).unwrap();
        let (mut memory, mut recorded, mut replays) = (PagedMemory::new(&gpu).unwrap(), None, 0);
        for step in 0..40 {
            let past = [480 + step, 600 + step, step];
            let sequences: Vec<PagedSequence<'_>> = (0..3)
                .map(|number| PagedSequence { start_row: number, rows: 1, past: past[number], pages: &pages[number] })
                .collect();
            let shape = PagedShape::fused(&sequences, heads, heads, head_dim);
            gpu.upload(&values(dtype, step as u64, 3 * width), qkv.whole_mut()).unwrap();

            let plan = PagedPlan::new(&gpu, &shape, 3, dtype).unwrap();
            paged_append(&gpu, &plan, qkv.whole(), cache.whole_mut()).unwrap();
            paged_attention(&gpu, &plan, qkv.whole(), cache.whole(), output.whole_mut()).unwrap();
            let expected: Vec<f32> = gpu.to_host(output.whole()).unwrap();
            gpu.fill_zero(output.whole_mut()).unwrap();

            let mut plan = PagedPlan::with_memory(&gpu, &shape, 3, dtype, memory).unwrap();
            if recorded.as_ref().is_none_or(|(launches, _)| *launches != plan.launches()) {
                gpu.begin_recording().unwrap();
                paged_append(&gpu, &plan, qkv.whole(), cache.whole_mut()).unwrap();
                paged_attention(&gpu, &plan, qkv.whole(), cache.whole(), output.whole_mut()).unwrap();
                recorded = Some((plan.launches(), gpu.end_recording().unwrap()));
            } else {
                replays += 1;
            }
            recorded.as_ref().unwrap().1.launch().unwrap();
            let found: Vec<f32> = gpu.to_host(output.whole()).unwrap();
            assert!(found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()), "{dtype:?}, step {step}");
            memory = plan.take_memory(&gpu).unwrap();
        }
        assert!(replays > 30, "{replays} replays");
    }
}

/// Prints the rate at which decoding reads the cache: `cargo test -p lina-cuda --release --test paged -- --ignored
/// --nocapture rate`.
#[test]
#[ignore = "a measurement"]
fn rate() {
    let Some(gpu) = gpu() else { return };
    for (count, context, heads_q, heads_kv, head_dim) in [
        (1, 2048, 16, 16, 128),
        (32, 2048, 16, 16, 128),
        (64, 2048, 32, 4, 128),
        (256, 512, 16, 16, 128),
        (8, 16384, 32, 4, 128),
    ] {
        for dtype in [DType::Bf16, DType::F32] {
            let of_sequence = context / PAGE_TOKENS;
            let pool: Vec<u32> = (0..count * of_sequence).map(|page| page as u32).collect();
            let elements = pool.len() * page_elements(heads_kv, head_dim);
            let mut cache = gpu.zeros(elements, dtype).unwrap();
            let sequences: Vec<PagedSequence<'_>> = pool
                .chunks_exact(of_sequence)
                .enumerate()
                .map(|(start_row, pages)| PagedSequence { start_row, rows: 1, past: context - 1, pages })
                .collect();
            let shape = PagedShape::fused(&sequences, heads_q, heads_kv, head_dim);
            let plan = PagedPlan::new(&gpu, &shape, count, dtype).unwrap();
            let qkv = gpu.zeros(count * shape.row_stride, dtype).unwrap();
            let mut output = gpu.zeros(count * heads_q * head_dim, dtype).unwrap();
            let mut run = || {
                paged_append(&gpu, &plan, qkv.whole(), cache.whole_mut()).unwrap();
                paged_attention(&gpu, &plan, qkv.whole(), cache.whole(), output.whole_mut()).unwrap();
            };
            (0..3).for_each(|_| run());
            let (start, end) = (gpu.event().unwrap(), gpu.event().unwrap());
            start.record(gpu.stream()).unwrap();
            (0..20).for_each(|_| run());
            end.record(gpu.stream()).unwrap();
            end.synchronize().unwrap();
            let ms = f64::from(end.elapsed_ms_since(&start).unwrap()) / 20.0;
            println!(
                "{dtype:?}, {count} sequences of {context} tokens, {heads_q}/{heads_kv} heads of {head_dim}: {ms:.3} ms, {:.2} TB/s",
                (elements * dtype.bytes()) as f64 / ms / 1e9
            );
        }
    }
}
