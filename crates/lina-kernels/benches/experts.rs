//! A layer's experts as one grouped product or one after another, for few to many rows each:
//!
//!     cargo bench -p lina-kernels --bench experts [-- THREADS]
//!
//! The two ways alternate, each on the next of several copies of the layer, so that weights come from memory and a slow spell of the machine hits both. Medians are
//! compared, and the fastest calls ("best"), which a busy machine disturbs less.

use lina_kernels::*;
use std::time::Instant;

/// Hidden width, inner width: experts of `[2 * inner, hidden]` (gate and up) and `[hidden, inner]` (down).
const LAYERS: [[usize; 2]; 3] = [[256, 512], [1024, 1024], [2048, 768]];
/// Copies of a layer together take this much memory.
const BYTES: usize = 192 << 20;
/// A case is measured for about this long.
const CASE_SECONDS: f64 = 0.6;

fn main() {
    // Cargo passes `--bench` to a harness of one's own.
    let threads = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(2);
    let ctx = &Compute::new(threads);
    println!("{threads} threads, {:?}; below 1: grouped is faster", ctx.isa());
    println!("{:>29} {:>26} {:>26}", "", "median us", "best us");
    print!("{:>6} {:>6} {:>8} {:>6}", "hidden", "inner", "experts", "rows");
    println!(" {:>9} {:>9} {:>6} {:>9} {:>9} {:>6}", "grouped", "in turn", "ratio", "grouped", "in turn", "ratio");
    let memory = values(BYTES / 4);
    for [hidden, inner] in LAYERS {
        for experts in [1, 2, 4, 8] {
            for rows in [1, 4, 16, 64, 256] {
                let sizes = [[2 * inner, hidden], [hidden, inner]];
                let mut layer = Layer {
                    sizes,
                    rows,
                    x: values(experts * rows * hidden.max(inner)),
                    y: vec![0.0; experts * rows * hidden.max(2 * inner)],
                };
                let mut copies = memory.chunks_exact(experts * 3 * inner * hidden).cycle();
                let (mut grouped, mut in_turn) = (Vec::new(), Vec::new());
                let start = Instant::now();
                while grouped.len() < 5 || start.elapsed().as_secs_f64() < CASE_SECONDS {
                    let mut time = |group: usize| {
                        let weights = copies.next().expect("a layer fits in the memory");
                        let start = Instant::now();
                        layer.run(ctx, weights, group);
                        start.elapsed().as_secs_f64() * 1e6
                    };
                    grouped.push(time(experts));
                    in_turn.push(time(1));
                }
                print!("{hidden:>6} {inner:>6} {experts:>8} {rows:>6}");
                grouped.sort_by(f64::total_cmp);
                in_turn.sort_by(f64::total_cmp);
                for rank in [grouped.len() / 2, 0] {
                    let (grouped, in_turn) = (grouped[rank], in_turn[rank]);
                    print!(" {grouped:>9.1} {in_turn:>9.1} {:>6.3}", grouped / in_turn);
                }
                println!();
            }
        }
    }
}

struct Layer {
    sizes: [[usize; 2]; 2],
    rows: usize,
    x: Vec<f32>,
    y: Vec<f32>,
}

impl Layer {
    /// Both products of all experts, `group` experts a call.
    fn run(&mut self, ctx: &Compute, weights: &[f32], group: usize) {
        let mut rest = weights;
        let experts = weights.len() / self.sizes.iter().map(|[out, width]| out * width).sum::<usize>();
        for [out, width] in self.sizes {
            let (matrices, after) = rest.split_at(experts * out * width);
            rest = after;
            let rows = self.rows;
            let mut products = matrices
                .chunks_exact(out * width)
                .zip(self.x.chunks_exact(rows * width))
                .zip(self.y.chunks_exact_mut(rows * out))
                .map(|((w, x), y)| Product {
                    c: MatMut::new(y, rows, out),
                    a: Mat::new(x, rows, width),
                    b: Mat::new(w, out, width).t(),
                    accumulate: false,
                });
            for _ in 0..experts / group {
                matmul_grouped(ctx, products.by_ref().take(group));
            }
        }
    }
}

fn values(len: usize) -> Vec<f32> {
    (0..len).map(|index| ((index * 7_919) % 2_003) as f32 / 1_001.5 - 1.0).collect()
}
