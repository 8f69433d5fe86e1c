//! Products and attention of a decoding step, which read every weight and every cached key and value once, beside the time of reading it at the memory's measured rate:
//!
//!     cargo bench -p lina-kernels --bench decode [-- THREADS]
//!
//! Several copies take turns, so that none is still in a cache. Rounds interleave the shapes; medians of them are compared.

use lina_kernels::*;
use std::time::Instant;

const ROUNDS: usize = 21;
/// Copies of a weight together take this much memory at least.
const LEAST_BYTES: usize = 256 << 20;

/// Products that run as one job: `experts` of each weight `[out, in]`, `rows` rows each.
struct Case {
    weights: &'static [[usize; 2]],
    experts: usize,
    rows: usize,
}

impl Case {
    fn bytes(&self) -> usize {
        4 * self.experts * self.weights.iter().map(|[out, width]| out * width).sum::<usize>()
    }

    /// Seconds of one step, the mean over all copies in `memory`.
    fn run(&self, ctx: &Compute, memory: &[f32], x: &[f32], y: &mut [f32]) -> f64 {
        let copies = (memory.len() * 4 / self.bytes()).max(1);
        let mut rest = memory;
        let start = Instant::now();
        for _ in 0..copies {
            for &[out, width] in self.weights {
                let (weights, after) = rest.split_at(self.experts * out * width);
                rest = after;
                let products =
                    y.chunks_exact_mut(self.rows * out).zip(weights.chunks_exact(out * width)).map(|(y, w)| Product {
                        c: MatMut::new(y, self.rows, out),
                        a: Mat::new(&x[..self.rows * width], self.rows, width),
                        b: Mat::new(w, out, width).t(),
                        accumulate: false,
                    });
                matmul_grouped(ctx, products.take(self.experts));
            }
        }
        start.elapsed().as_secs_f64() / copies as f64
    }
}

fn main() {
    // Cargo passes `--bench` to a harness of one's own.
    let threads = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(2);
    let ctx = &Compute::new(threads);
    let dense: [&'static [[usize; 2]]; 5] =
        [&[[2048, 2048]], &[[5632, 2048]], &[[32000, 2048]], &[[768, 2048]], &[[2048, 768]]];
    let mut cases = Vec::new();
    for weights in dense {
        cases.extend([1, 2, 4, 8, 16].map(|rows| Case { weights, experts: 1, rows }));
    }
    cases.extend([1, 2, 4].map(|rows| Case { weights: &[[1536, 2048], [2048, 768]], experts: 8, rows }));
    let largest = cases.iter().map(Case::bytes).max().unwrap_or(0).max(LEAST_BYTES);
    let memory = values(largest / 4);
    let (x, mut y) = (values(16 * 8192), vec![0.0; 16 * 32_000]);
    let mut seconds = vec![Vec::new(); cases.len()];
    let mut rates = Vec::new();
    for round in 0..=ROUNDS {
        rates.push(read_bandwidth(ctx));
        for (case, seconds) in cases.iter().zip(&mut seconds) {
            let taken = case.run(ctx, &memory, &x, &mut y);
            // The first round warms up.
            seconds.extend((round > 0).then_some(taken));
        }
    }
    let rate = median(&mut rates);
    println!(
        "{threads} threads, {:?}, medians of {ROUNDS} interleaved rounds; memory is read at {:.1} GB/s",
        ctx.isa(),
        rate / 1e9
    );
    println!("{:<28} {:>7} {:>4} {:>9} {:>10} {:>9} {:>6}", "weights", "experts", "rows", "MB", "us", "GB/s", "ratio");
    for (case, seconds) in cases.iter().zip(&mut seconds) {
        let (taken, bytes) = (median(seconds), case.bytes() as f64);
        println!(
            "{:<28} {:>7} {:>4} {:>9.1} {:>10.1} {:>9.1} {:>6.2}",
            format!("{:?}", case.weights),
            case.experts,
            case.rows,
            bytes / 1e6,
            taken * 1e6,
            bytes / taken / 1e9,
            taken * rate / bytes
        );
    }
    attention(ctx, &memory, rate);
}

/// New tokens, one of each sequence, over caches that together take [`LEAST_BYTES`]: query heads, key-value heads, head size, sequences, cached tokens.
const ATTENTION: [[usize; 5]; 5] = [
    [32, 8, 128, 1, 1024],
    [32, 8, 128, 1, 8192],
    [32, 8, 128, 16, 1024],
    [32, 1, 128, 1, 8192],
    [16, 16, 64, 1, 1024],
];

fn attention(ctx: &Compute, memory: &[f32], rate: f64) {
    println!(
        "{:>7} {:>8} {:>5} {:>9} {:>7} {:>10} {:>9} {:>6}",
        "heads_q", "heads_kv", "dim", "sequences", "tokens", "us", "GB/s", "ratio"
    );
    for [heads_q, heads_kv, head_dim, count, tokens] in ATTENTION {
        let pages_each = (tokens + 1).div_ceil(PAGE_TOKENS);
        let elements = page_elements(heads_kv, head_dim);
        let available = memory.len() / elements / pages_each * pages_each;
        let pages: Vec<u32> = (0..available as u32).collect();
        let mut batches = pages.chunks_exact(pages_each * count).cycle();
        let width = heads_q * head_dim;
        let (qkv, mut out) = (values(count * (width + 2 * heads_kv * head_dim)), vec![0.0; count * width]);
        let mut seconds: Vec<f64> = (0..4 * ROUNDS)
            .map(|_| {
                let pages = batches.next().expect("a batch fits in the memory");
                let sequences: Vec<PagedSequence> = (0..count)
                    .map(|index| PagedSequence {
                        start_row: index,
                        rows: 1,
                        past: tokens,
                        pages: &pages[index * pages_each..][..pages_each],
                    })
                    .collect();
                let shape = PagedShape::fused(&sequences, heads_q, heads_kv, head_dim);
                let start = Instant::now();
                paged_attention(ctx, &shape, &qkv, &memory[..memory.len() / elements * elements], &mut out);
                start.elapsed().as_secs_f64()
            })
            .collect();
        let (taken, bytes) = (median(&mut seconds), (count * (tokens + 1) * 2 * heads_kv * head_dim * 4) as f64);
        println!(
            "{heads_q:>7} {heads_kv:>8} {head_dim:>5} {count:>9} {tokens:>7} {:>10.1} {:>9.1} {:>6.2}",
            taken * 1e6,
            bytes / taken / 1e9,
            taken * rate / bytes
        );
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn values(len: usize) -> Vec<f32> {
    (0..len).map(|index| ((index * 7_919) % 2_003) as f32 / 1_001.5 - 1.0).collect()
}
