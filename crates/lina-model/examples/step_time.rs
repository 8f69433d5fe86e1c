//! Times training steps on one rank against their matrix products alone, replayed from a record of one step, and says
//! where the time goes.
//!
//! ```text
//! cargo run --release -p lina-model --example step_time -- [THREADS] [ROUNDS]
//! ```

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Instant;

use lina_comm::{Comm, Lane};
use lina_kernels::gemm::{self, Layout, Shape};
use lina_kernels::{AdamWStep, Compute, Mat, MatMut, Product, adamw_step, matmul_grouped, sum_of_squares};
use lina_model::{Batch, Model, ModelConfig, ModelKind, ModelLimits, Purpose, Sizes, StepContext};
use lina_plan::ExpertLayout;

const SEQUENCES: usize = 8;
const LENGTH: usize = 256;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<usize>());
    let threads = arguments.next().transpose()?.unwrap_or(2);
    let rounds = arguments.next().transpose()?.unwrap_or(7).max(1);
    let sizes = Sizes { vocab: 256, hidden: 256, layers: 8, heads: 4, experts: 8, top_k: 2, expert_hidden: 512 };
    let config = ModelConfig::family(ModelKind::Mixtral, sizes);
    let layout = ExpertLayout::new(config.experts, 1, None)?;
    let limits = ModelLimits { max_tokens: SEQUENCES * LENGTH, max_sequence_tokens: LENGTH, max_expert_rows: None };
    let mut model = Model::new(Purpose::Training, config, layout, 0, Compute::new(threads), limits)?;
    let (_, layout, parameters) = model.for_update();
    parameters.initialise(layout, 1);
    let mut moments = [layout.dense_len(), layout.experts_len()].map(|len| (vec![0.0; len], vec![0.0; len]));

    let mut comm = Comm::solo();
    step(&mut model, &mut comm, &mut moments)?;
    gemm::record(true);
    step(&mut model, &mut comm, &mut moments)?;
    gemm::record(false);
    let shapes = gemm::take_recorded();
    let flops: f64 = shapes.iter().map(|s| 2.0 * s.m as f64 * s.n as f64 * s.k as f64).sum();
    let mut replay = Replay::new(&shapes);
    let compute = Compute::new(threads);
    replay.run(&compute);

    comm.record(true);
    let (mut steps, mut products) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let start = Instant::now();
        step(&mut model, &mut comm, &mut moments)?;
        steps.push(start.elapsed().as_secs_f64() * 1e3);
        let start = Instant::now();
        replay.run(&compute);
        products.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let (step_ms, products_ms) = (median(&mut steps), median(&mut products));
    println!(
        "{threads} threads: step {step_ms:.1} ms, its products {products_ms:.1} ms ({:.0} GFLOP/s), ratio {:.2}",
        flops / products_ms / 1e6,
        step_ms / products_ms
    );
    let mut parts: BTreeMap<&str, f64> = BTreeMap::new();
    for span in comm.record(false).iter().filter(|span| span.lane == Lane::Compute) {
        *parts.entry(span.name).or_default() += (span.end - span.start) as f64 / 1e6 / rounds as f64;
    }
    for (name, ms) in parts {
        println!("{ms:9.2} ms  {name}");
    }
    Ok(())
}

/// First and second moments of one buffer.
type Moments = (Vec<f32>, Vec<f32>);

fn step(model: &mut Model, comm: &mut Comm, moments: &mut [Moments; 2]) -> Result<(), Box<dyn Error>> {
    let ids: Vec<u32> = (0..(SEQUENCES * LENGTH) as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) % 256).collect();
    let context = StepContext { training: true, global_tokens: ids.len() as u64, ..StepContext::evaluation() };
    comm.begin_step(0)?;
    comm.begin_micro_batch(true)?;
    model.forward(comm, Batch { input: &ids, target: &ids, sequences: &[LENGTH; SEQUENCES] }, context)?;
    model.backward(comm, false)?;
    comm.finish_gradients()?;
    comm.work(lina_comm::Work { kind: lina_comm::WorkKind::Optimizer, layer: None, flops: 0 })?;
    let (compute, layout, parameters) = model.for_update();
    let dense = parameters.dense_gradients.range(0..layout.dense_len());
    let experts = parameters.expert_gradients.range(0..layout.experts_len());
    let norm = (sum_of_squares(compute, dense) + sum_of_squares(compute, experts)).sqrt();
    let update = AdamWStep {
        learning_rate: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        bias_correction1: 0.1,
        bias_correction2: 0.001,
        grad_scale: (1.0 / norm.max(1.0)) as f32,
    };
    let [(dense_m, dense_v), (experts_m, experts_v)] = moments;
    adamw_step(compute, &mut parameters.dense, dense, dense_m, dense_v, &update);
    adamw_step(compute, &mut parameters.experts, experts, experts_m, experts_v, &update);
    comm.agree(&mut [0.0])?;
    comm.end_step();
    Ok(())
}

/// The recorded products on buffers of their own.
struct Replay<'a> {
    shapes: &'a [Shape],
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
}

impl<'a> Replay<'a> {
    fn new(shapes: &'a [Shape]) -> Self {
        // A group's operands lie one after the other.
        let largest = |size: fn(&Shape) -> usize| {
            let groups = shapes.chunk_by(|a, b| a.batch == b.batch && a.batch > 1);
            groups.map(|group| group.iter().map(size).sum()).max().unwrap_or(0)
        };
        Replay {
            shapes,
            a: vec![0.5; largest(|s| s.m * s.k)],
            b: vec![0.5; largest(|s| s.k * s.n)],
            c: vec![0.0; largest(|s| s.m * s.n)],
        }
    }

    fn run(&mut self, compute: &Compute) {
        let mut next = 0;
        while next < self.shapes.len() {
            let group = &self.shapes[next..next + self.shapes[next].batch];
            next += group.len();
            let (mut a, mut b, mut c) = (&self.a[..], &self.b[..], &mut self.c[..]);
            matmul_grouped(
                compute,
                group.iter().map(|shape| {
                    let (this_a, rest_a) = a.split_at(shape.m * shape.k);
                    let (this_b, rest_b) = b.split_at(shape.k * shape.n);
                    let (this_c, rest_c) = std::mem::take(&mut c).split_at_mut(shape.m * shape.n);
                    (a, b, c) = (rest_a, rest_b, rest_c);
                    let transposed_a = matches!(shape.layout, Layout::TN | Layout::TT);
                    let transposed_b = matches!(shape.layout, Layout::NT | Layout::TT);
                    Product {
                        c: MatMut::new(this_c, shape.m, shape.n),
                        a: matrix(this_a, shape.m, shape.k, transposed_a),
                        b: matrix(this_b, shape.k, shape.n, transposed_b),
                        accumulate: shape.accumulate,
                    }
                }),
            );
        }
    }
}

fn matrix(data: &[f32], rows: usize, columns: usize, transposed: bool) -> Mat<'_> {
    if transposed { Mat::new(data, columns, rows).t() } else { Mat::new(data, rows, columns) }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
