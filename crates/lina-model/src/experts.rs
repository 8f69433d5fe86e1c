//! The experts' feed-forward networks on rows in expert-major order, a pipeline chunk at a time.
//!
//! The rows of a chunk are scattered over the experts and sources; every product runs on one block of one expert's
//! rows, and all blocks of a chunk run as one parallel job. A row's result does not depend on the block that it is
//! in, so chunks change nothing.

use std::ops::Range;

use lina_kernels::{Compute, Mat, MatMut, Product, matmul_grouped};

use crate::config::{FfnKind, ModelConfig};
use crate::ffn::{FfnScratch, activate, activate_backward};
use crate::pass::product_flops;
use crate::routing::ChunkPlan;

/// Sizes of one expert.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExpertShape {
    pub kind: FfnKind,
    pub hidden: usize,
    pub inner: usize,
    /// Rows of the input projection: gate and up, or up alone.
    pub input_width: usize,
}

impl ExpertShape {
    pub fn new(config: &ModelConfig) -> Self {
        ExpertShape {
            kind: config.ffn,
            hidden: config.hidden,
            inner: config.expert_hidden,
            input_width: config.ffn.input_matrices() * config.expert_hidden,
        }
    }

    /// Operations of one pass over `rows` rows: forward, input gradients or weight gradients take the same.
    pub fn flops(&self, rows: usize) -> u64 {
        product_flops(rows, self.input_width + self.inner, self.hidden)
    }

    pub fn input_elements(&self) -> usize {
        self.input_width * self.hidden
    }

    pub fn elements(&self) -> usize {
        self.input_elements() + self.hidden * self.inner
    }
}

/// A layer's experts on one rank.
pub(crate) struct Experts<'a> {
    pub compute: &'a Compute,
    pub shape: ExpertShape,
    /// Their blocks, one after another.
    pub weights: &'a [f32],
}

impl<'a> Experts<'a> {
    /// `[input_width, hidden]`.
    fn input(&self, slot: usize) -> Mat<'a> {
        let block = &self.weights[slot * self.shape.elements()..][..self.shape.input_elements()];
        Mat::new(block, self.shape.input_width, self.shape.hidden)
    }

    /// `[hidden, inner]`.
    fn down(&self, slot: usize) -> Mat<'a> {
        let block = &self.weights[slot * self.shape.elements()..][self.shape.input_elements()..];
        Mat::new(&block[..self.shape.hidden * self.shape.inner], self.shape.hidden, self.shape.inner)
    }

    /// Runs the chunk's rows of `inputs` through the experts: `projected` keeps the input projections for backward,
    /// `outputs` gets the results in the order of the chunk's blocks, as they travel back.
    pub fn forward(
        &self,
        chunk: &ChunkPlan,
        inputs: &[f32],
        projected: &mut [f32],
        hidden: &mut [f32],
        outputs: &mut [f32],
    ) {
        let ExpertShape { kind, hidden: width, inner, input_width } = self.shape;
        let mut cutter = Cutter::new(projected, input_width);
        matmul_grouped(
            self.compute,
            chunk.runs.iter().map(|run| Product {
                c: cutter.cut(&run.rows),
                a: rows(inputs, width, &run.rows),
                b: self.input(run.slot).t(),
                accumulate: false,
            }),
        );
        for span in &chunk.spans {
            let projected = &mut projected[span.start * input_width..span.end * input_width];
            activate(self.compute, kind, inner, projected, &mut hidden[span.start * inner..span.end * inner]);
        }
        let mut cutter = Cutter::new(outputs, width);
        matmul_grouped(
            self.compute,
            chunk.blocks.iter().map(|block| Product {
                c: cutter.take(block.rows.len()),
                a: rows(hidden, inner, &block.rows),
                b: self.down(block.slot).t(),
                accumulate: false,
            }),
        );
    }

    /// Gradients of the chunk's inputs, in the order of its blocks, given those of its outputs in expert-major order.
    /// Leaves in `scratch` what the weight gradients need.
    pub fn backward(
        &self,
        chunk: &ChunkPlan,
        projected: &mut [f32],
        grad_outputs: &[f32],
        scratch: &mut FfnScratch,
        grad_inputs: &mut [f32],
    ) {
        let ExpertShape { kind, hidden: width, inner, input_width } = self.shape;
        let mut cutter = Cutter::new(&mut scratch.grad_hidden, inner);
        matmul_grouped(
            self.compute,
            chunk.runs.iter().map(|run| Product {
                c: cutter.cut(&run.rows),
                a: rows(grad_outputs, width, &run.rows),
                b: self.down(run.slot),
                accumulate: false,
            }),
        );
        for span in &chunk.spans {
            let units = span.start * inner..span.end * inner;
            let inputs = span.start * input_width..span.end * input_width;
            activate_backward(
                self.compute,
                kind,
                inner,
                &mut projected[inputs.clone()],
                &scratch.grad_hidden[units.clone()],
                &mut scratch.grad_projected[inputs],
                &mut scratch.hidden[units],
            );
        }
        let mut cutter = Cutter::new(grad_inputs, width);
        matmul_grouped(
            self.compute,
            chunk.blocks.iter().map(|block| Product {
                c: cutter.take(block.rows.len()),
                a: rows(&scratch.grad_projected, input_width, &block.rows),
                b: self.input(block.slot),
                accumulate: false,
            }),
        );
    }

    /// Weight gradients of all experts, each one product over all of its rows.
    pub fn weight_gradients(
        &self,
        slot_rows: &[Range<usize>],
        inputs: &[f32],
        grad_outputs: &[f32],
        scratch: &FfnScratch,
        gradients: &mut [f32],
        accumulate: bool,
    ) {
        let ExpertShape { hidden: width, inner, input_width, .. } = self.shape;
        let blocks = gradients.chunks_exact_mut(self.shape.elements());
        matmul_grouped(
            self.compute,
            blocks.zip(slot_rows).flat_map(|(block, slot_rows)| {
                let (input_gradient, down_gradient) = block.split_at_mut(self.shape.input_elements());
                [
                    Product {
                        c: MatMut::new(down_gradient, width, inner),
                        a: rows(grad_outputs, width, slot_rows).t(),
                        b: rows(&scratch.hidden, inner, slot_rows),
                        accumulate,
                    },
                    Product {
                        c: MatMut::new(input_gradient, input_width, width),
                        a: rows(&scratch.grad_projected, input_width, slot_rows).t(),
                        b: rows(inputs, width, slot_rows),
                        accumulate,
                    },
                ]
            }),
        );
    }
}

fn rows<'a>(data: &'a [f32], width: usize, rows: &Range<usize>) -> Mat<'a> {
    Mat::new(&data[rows.start * width..rows.end * width], rows.len(), width)
}

/// Cuts disjoint blocks of rows off a matrix, front to back.
struct Cutter<'a> {
    rest: &'a mut [f32],
    row: usize,
    width: usize,
}

impl<'a> Cutter<'a> {
    fn new(data: &'a mut [f32], width: usize) -> Self {
        Cutter { rest: data, row: 0, width }
    }

    /// The rows `range`, which lie behind all that were cut before.
    fn cut(&mut self, range: &Range<usize>) -> MatMut<'a> {
        self.take(range.start - self.row);
        self.take(range.len())
    }

    /// The next `count` rows.
    fn take(&mut self, count: usize) -> MatMut<'a> {
        let (block, rest) = std::mem::take(&mut self.rest).split_at_mut(count * self.width);
        self.rest = rest;
        self.row += count;
        MatMut::new(block, count, self.width)
    }
}
