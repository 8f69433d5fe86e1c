//! A program's matrix products without the program: what its time is compared with.

use lina_kernels::gemm::{Layout, Shape};
use lina_kernels::{Compute, Mat, MatMut, Product, matmul_grouped};

/// Operands of a replay come from this many elements in turn, so that they come from memory as in a step.
const ARENA_ELEMENTS: usize = 48 << 20;

/// A list of products, as [`lina_kernels::gemm::take_recorded`] gives it, with operands to run it on.
pub struct ProductReplay {
    shapes: Vec<Shape>,
    arena: Vec<f32>,
    output: Vec<f32>,
    next: usize,
}

impl ProductReplay {
    /// Operands for `shapes`: about 400 MiB, whatever the shapes are.
    pub fn new(shapes: Vec<Shape>) -> Self {
        let (mut largest_input, mut largest_output) = (0, 0);
        let mut rest = shapes.as_slice();
        while !rest.is_empty() {
            let (group, others) = next_group(rest);
            rest = others;
            largest_input = largest_input.max(input_elements(group));
            largest_output = largest_output.max(output_elements(group));
        }
        let arena = (0..largest_input + ARENA_ELEMENTS).map(|i| ((i * 37) % 101) as f32 * 0.01 - 0.5).collect();
        ProductReplay { shapes, arena, output: vec![0.0; largest_output + ARENA_ELEMENTS], next: 0 }
    }

    /// Floating-point operations of all products, in units of 10⁹.
    pub fn gflop(&self) -> f64 {
        self.shapes.iter().map(|shape| 2.0 * (shape.m * shape.n * shape.k) as f64).sum::<f64>() / 1e9
    }

    /// Runs all products, group by group, with our kernels.
    pub fn run(&mut self, compute: &Compute) {
        self.run_with(|group, (mut input, mut output)| {
            let products = group.iter().map(|shape| {
                let (a, b) = operands(shape, &mut input);
                let (c, rest) = std::mem::take(&mut output).split_at_mut(shape.m * shape.n);
                output = rest;
                Product { c: MatMut::new(c, shape.m, shape.n), a, b, accumulate: shape.accumulate }
            });
            matmul_grouped(compute, products);
        });
    }

    /// Calls `run` for each group of products with its operands: A and B of all, and room for their Cs.
    pub(crate) fn run_with(&mut self, mut run: impl FnMut(&[Shape], (&[f32], &mut [f32]))) {
        let mut rest = self.shapes.as_slice();
        while !rest.is_empty() {
            let (group, others) = next_group(rest);
            rest = others;
            let (inputs, outputs) = (input_elements(group), output_elements(group));
            self.next = (self.next + inputs) % ARENA_ELEMENTS;
            let input = &self.arena[self.next..self.next + inputs];
            run(group, (input, &mut self.output[self.next..self.next + outputs]));
        }
    }
}

/// The products that `shapes` begins with and that were one call, and the rest.
fn next_group(shapes: &[Shape]) -> (&[Shape], &[Shape]) {
    shapes.split_at(shapes[0].batch.clamp(1, shapes.len()))
}

fn input_elements(group: &[Shape]) -> usize {
    group.iter().map(|shape| shape.m * shape.k + shape.k * shape.n).sum()
}

fn output_elements(group: &[Shape]) -> usize {
    group.iter().map(|shape| shape.m * shape.n).sum()
}

/// A and B of `shape`, as stored, from the front of `input`.
fn operands<'a>(shape: &Shape, input: &mut &'a [f32]) -> (Mat<'a>, Mat<'a>) {
    let &Shape { m, n, k, layout, .. } = shape;
    let (a, rest) = input.split_at(m * k);
    let (b, rest) = rest.split_at(k * n);
    *input = rest;
    let a = if matches!(layout, Layout::TN | Layout::TT) { Mat::new(a, k, m).t() } else { Mat::new(a, m, k) };
    let b = if matches!(layout, Layout::NT | Layout::TT) { Mat::new(b, n, k).t() } else { Mat::new(b, k, n) };
    (a, b)
}
