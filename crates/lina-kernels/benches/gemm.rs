//! Our matrix products on the shapes of a training step, beside OpenBLAS's with the feature `openblas`:
//!
//!     env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE cargo bench -p lina-kernels --features openblas --bench gemm [-- THREADS]
//!
//! In each round one library goes through all shapes, then the other does, so that a slow spell of the machine hits everything alike. Medians are compared, and
//! the fastest rounds ("best"), which a busy machine disturbs less.

use lina_kernels::gemm::{Layout, Shape};
use lina_kernels::{Compute, Mat, MatMut, Product, matmul_grouped};
use std::time::Instant;

const ROUNDS: usize = 31;
/// A round repeats a product until it has done this much.
const ROUND_FLOP: f64 = 2e9;

struct Case {
    name: &'static str,
    shape: Shape,
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
}

impl Case {
    fn flop(&self) -> f64 {
        2.0 * (self.shape.m * self.shape.n * self.shape.k * self.shape.batch) as f64
    }

    fn repeats(&self) -> usize {
        (ROUND_FLOP / self.flop()).ceil() as usize
    }
}

fn main() {
    // Cargo passes `--bench` to a harness of one's own.
    let threads = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(2);
    let ctx = Compute::new(threads);
    println!("{threads} threads, {:?}, medians of {ROUNDS} interleaved rounds", ctx.isa());
    #[cfg(feature = "openblas")]
    {
        lina_kernels::openblas::set_threads(threads);
        println!("peer: {}", lina_kernels::openblas::describe());
    }
    println!(
        "{:<22} {:>5} {:>5} {:>5} {:>6} {:>5} {:>23} {:>23}",
        "", "", "", "", "", "", "median GFLOP/s", "best GFLOP/s"
    );
    print!("{:<22} {:>5} {:>5} {:>5} {:>6} {:>5}", "product", "m", "n", "k", "layout", "batch");
    println!(" {:>7} {:>8} {:>6} {:>7} {:>8} {:>6}", "ours", "OpenBLAS", "ratio", "ours", "OpenBLAS", "ratio");
    let mut totals = [0.0; 4];
    let mut cases = cases();
    let mut times = vec![(Vec::new(), Vec::new()); cases.len()];
    // The first round warms up.
    for round in 0..=ROUNDS {
        for (case, (ours, _)) in cases.iter_mut().zip(&mut times) {
            let seconds = time(case.repeats(), || run_ours(&ctx, case));
            ours.extend((round > 0).then_some(seconds));
        }
        for (case, (_, peer)) in cases.iter_mut().zip(&mut times) {
            let seconds = if cfg!(feature = "openblas") { time(case.repeats(), || run_peer(case)) } else { f64::NAN };
            peer.extend((round > 0).then_some(seconds));
        }
    }
    for (case, (ours, peer)) in cases.iter().zip(times) {
        let seconds = [quantile(&ours, 0.5), quantile(&peer, 0.5), quantile(&ours, 0.0), quantile(&peer, 0.0)];
        totals.iter_mut().zip(seconds).for_each(|(total, seconds)| *total += seconds);
        let Shape { m, n, k, layout, batch, .. } = case.shape;
        let [ours, peer, best_ours, best_peer] = seconds.map(|seconds| case.flop() / seconds / 1e9);
        print!("{:<22} {m:>5} {n:>5} {k:>5} {:>6} {batch:>5}", case.name, format!("{layout:?}"));
        println!(
            " {ours:>7.1} {peer:>8.1} {:>6.3} {best_ours:>7.1} {best_peer:>8.1} {:>6.3}",
            ours / peer,
            best_ours / best_peer
        );
    }
    let [ours, peer, best_ours, best_peer] = totals.map(|seconds| seconds * 1e3);
    println!(
        "one of each: median {ours:.2} ms, OpenBLAS {peer:.2} ms, ratio {:.3}; best {best_ours:.2} ms, OpenBLAS {best_peer:.2} ms, ratio {:.3}",
        peer / ours,
        best_peer / best_ours
    );
}

/// Forward (NT), input gradient (NN) and weight gradient (TN) of each layer of a small MoE model: 2,048 tokens, width 256, 8 experts of 512 features, top-2.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let layers: [(&str, usize, usize, usize, usize); 6] = [
        ("qkv", 2048, 768, 256, 1),
        ("attention out", 2048, 256, 256, 1),
        ("router", 2048, 8, 256, 1),
        ("expert gate and up", 512, 1024, 256, 8),
        ("expert down", 512, 256, 512, 8),
        ("language model head", 2048, 512, 256, 1),
    ];
    for (name, tokens, out, width, batch) in layers {
        cases.push(case(name, tokens, out, width, Layout::NT, batch));
        cases.push(case(name, tokens, width, out, Layout::NN, batch));
        cases.push(case(name, out, width, tokens, Layout::TN, batch));
    }
    cases.push(case("scores of a head", 64, 256, 64, Layout::NT, 32));
    cases.push(case("values of a head", 64, 64, 256, Layout::NN, 32));
    cases.push(case("one token", 1, 1024, 256, Layout::NT, 1));
    cases
}

fn case(name: &'static str, m: usize, n: usize, k: usize, layout: Layout, batch: usize) -> Case {
    let mut state = 1_u64;
    let mut random = |len: usize| {
        let next = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..len).map(next).collect::<Vec<f32>>()
    };
    Case {
        name,
        shape: Shape { m, n, k, layout, accumulate: false, batch },
        a: random(batch * m * k),
        b: random(batch * k * n),
        c: vec![0.0; batch * m * n],
    }
}

fn run_ours(ctx: &Compute, case: &mut Case) {
    let Shape { m, n, k, layout, accumulate, .. } = case.shape;
    let operands = case.c.chunks_exact_mut(m * n).zip(case.a.chunks_exact(m * k)).zip(case.b.chunks_exact(k * n));
    matmul_grouped(
        ctx,
        operands.map(|((c, a), b)| {
            let a = if layout == Layout::TN { Mat::new(a, k, m).t() } else { Mat::new(a, m, k) };
            let b = if layout == Layout::NT { Mat::new(b, n, k).t() } else { Mat::new(b, k, n) };
            Product { c: MatMut::new(c, m, n), a, b, accumulate }
        }),
    );
}

#[cfg(feature = "openblas")]
fn run_peer(case: &mut Case) {
    let Shape { m, n, k, .. } = case.shape;
    for ((c, a), b) in case.c.chunks_exact_mut(m * n).zip(case.a.chunks_exact(m * k)).zip(case.b.chunks_exact(k * n)) {
        lina_kernels::openblas::matmul(&case.shape, a, b, c);
    }
}

#[cfg(not(feature = "openblas"))]
fn run_peer(_: &mut Case) {}

/// Seconds per repeat.
fn time(repeats: usize, mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    (0..repeats).for_each(|_| run());
    start.elapsed().as_secs_f64() / repeats as f64
}

fn quantile(values: &[f64], at: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * at) as usize]
}
