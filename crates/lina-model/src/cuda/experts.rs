//! The experts' feed-forward networks on a device, on rows in expert-major order, a pipeline chunk at a time: each product of
//! all experts is one launch.

use std::ops::Range;

use lina_cuda::{
    BLayout, CudaError, Gpu, GroupedB, GroupedReduction, GroupedRows, Slice, SliceMut, grouped_matmul,
    grouped_weight_gradient,
};

use super::ffn::{FfnScratch, activate, activate_backward};
use crate::experts::ExpertShape;
use crate::routing::{Block, ChunkPlan};

/// A layer's experts on one rank.
pub(crate) struct Experts<'a> {
    pub gpu: &'a Gpu,
    pub shape: ExpertShape,
    /// Their blocks, one after another.
    pub weights: Slice<'a>,
}

impl Experts<'_> {
    /// `[input_width, hidden]` of every expert, to multiply rows.
    pub fn input_rows(&self) -> GroupedB<'_> {
        self.input(BLayout::Nk)
    }

    /// `[hidden, inner]` of every expert, to multiply rows.
    pub fn down_rows(&self) -> GroupedB<'_> {
        self.down(BLayout::Nk)
    }

    /// `[input_width, hidden]` of every expert.
    fn input(&self, layout: BLayout) -> GroupedB<'_> {
        let ExpertShape { hidden, input_width, .. } = self.shape;
        self.matrices(0, input_width, hidden, layout)
    }

    /// `[hidden, inner]` of every expert.
    fn down(&self, layout: BLayout) -> GroupedB<'_> {
        let ExpertShape { hidden, inner, .. } = self.shape;
        self.matrices(self.shape.input_elements(), hidden, inner, layout)
    }

    /// Matrices `[outputs, inputs]`, `offset` elements into each expert's block.
    fn matrices(&self, offset: usize, outputs: usize, inputs: usize, layout: BLayout) -> GroupedB<'_> {
        // As `[n, k]` rows are multiplied by the transposed, as `[k, n]` by the matrix itself.
        let (n, k) = match layout {
            BLayout::Nk => (outputs, inputs),
            BLayout::Kn => (inputs, outputs),
        };
        GroupedB { data: self.weights, offset, stride: self.shape.elements(), n, k, layout }
    }

    /// Runs the chunk's rows of `inputs` through the experts: `projected` keeps the input projections for backward,
    /// `outputs` gets the results in the order of the chunk's blocks, as they travel back.
    pub fn forward(
        &self,
        chunk: &ChunkPlan,
        inputs: Slice<'_>,
        mut projected: SliceMut<'_>,
        mut hidden: SliceMut<'_>,
        outputs: SliceMut<'_>,
    ) -> Result<(), CudaError> {
        let ExpertShape { kind, inner, input_width, .. } = self.shape;
        grouped_matmul(self.gpu, &in_place(&chunk.runs), inputs, self.input_rows(), projected.reborrow())?;
        for span in &chunk.spans {
            let projected = projected.slice_mut(span.start * input_width..span.end * input_width);
            let hidden = hidden.slice_mut(span.start * inner..span.end * inner);
            activate(self.gpu, kind, inner, projected, hidden)?;
        }
        let groups = one_after_another(&chunk.blocks);
        grouped_matmul(self.gpu, &groups, hidden.as_slice(), self.down_rows(), outputs)
    }

    /// Gradients of the chunk's inputs, in the order of its blocks, given those of its outputs in expert-major order.
    /// Leaves in `scratch` what the weight gradients need.
    pub fn backward(
        &self,
        chunk: &ChunkPlan,
        mut projected: SliceMut<'_>,
        grad_outputs: Slice<'_>,
        scratch: &mut FfnScratch,
        grad_inputs: SliceMut<'_>,
    ) -> Result<(), CudaError> {
        let ExpertShape { kind, inner, input_width, .. } = self.shape;
        let grad_hidden = scratch.grad_hidden.whole_mut();
        grouped_matmul(self.gpu, &in_place(&chunk.runs), grad_outputs, self.down(BLayout::Kn), grad_hidden)?;
        for span in &chunk.spans {
            let units = span.start * inner..span.end * inner;
            let inputs = span.start * input_width..span.end * input_width;
            activate_backward(
                self.gpu,
                kind,
                inner,
                projected.slice_mut(inputs.clone()),
                scratch.grad_hidden.slice(units.clone()),
                scratch.grad_projected.slice_mut(inputs),
                scratch.hidden.slice_mut(units),
            )?;
        }
        let groups = one_after_another(&chunk.blocks);
        grouped_matmul(self.gpu, &groups, scratch.grad_projected.whole(), self.input(BLayout::Kn), grad_inputs)
    }

    /// Weight gradients of all experts, each one product over all of its rows.
    pub fn weight_gradients(
        &self,
        slot_rows: &[Range<usize>],
        inputs: Slice<'_>,
        grad_outputs: Slice<'_>,
        scratch: &FfnScratch,
        mut gradients: SliceMut<'_>,
        accumulate: bool,
    ) -> Result<(), CudaError> {
        let ExpertShape { hidden, inner, input_width, .. } = self.shape;
        let stride = self.shape.elements();
        let groups: Vec<GroupedReduction> = slot_rows
            .iter()
            .enumerate()
            .map(|(slot, rows)| GroupedReduction { slot: slot as u32, row: rows.start as u32, rows: rows.len() as u32 })
            .collect();
        let mut gradient = |offset, grads: Slice<'_>, outputs, rows: Slice<'_>, inputs| {
            let gradients = gradients.reborrow();
            grouped_weight_gradient(
                self.gpu, &groups, grads, outputs, rows, inputs, gradients, offset, stride, accumulate,
            )
        };
        gradient(self.shape.input_elements(), grad_outputs, hidden, scratch.hidden.whole(), inner)?;
        gradient(0, scratch.grad_projected.whole(), input_width, inputs, hidden)
    }
}

/// Rows whose results lie where they do.
fn in_place(blocks: &[Block]) -> Vec<GroupedRows> {
    let group = |block: &Block| {
        let row = block.rows.start as u32;
        GroupedRows { slot: block.slot as u32, a_row: row, c_row: row, rows: block.rows.len() as u32 }
    };
    blocks.iter().map(group).collect()
}

/// Rows whose results lie in the order of the blocks.
fn one_after_another(blocks: &[Block]) -> Vec<GroupedRows> {
    let mut next = 0;
    let group = |block: &Block| {
        let (c_row, rows) = (next, block.rows.len() as u32);
        next += rows;
        GroupedRows { slot: block.slot as u32, a_row: block.rows.start as u32, c_row, rows }
    };
    blocks.iter().map(group).collect()
}
