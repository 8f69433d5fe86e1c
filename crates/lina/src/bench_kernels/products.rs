//! Matrix products: the dense ones of a step, and those of all experts of a layer.

use lina_cuda::*;

use super::meter::{Meter, Work};
use super::{EXPERT_HIDDEN, EXPERT_ROWS, EXPERTS, HEAD_DIM, HEADS, HIDDEN, QKV_WIDTH, TOKENS, VOCABULARY};

pub(super) fn measure(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    dense(meter, "queries, keys, values", QKV_WIDTH, HIDDEN)?;
    dense(meter, "attention's output", HIDDEN, HEADS * HEAD_DIM)?;
    dense(meter, "logits", VOCABULARY, HIDDEN)?;
    router(meter)?;
    experts(meter)
}

fn flop(rows: usize, columns: usize, depth: usize) -> Work {
    Work::Flop(2.0 * rows as f64 * columns as f64 * depth as f64)
}

/// As the table says it.
pub(super) fn size(rows: usize, columns: usize, depth: usize) -> String {
    format!("[{rows}, {columns}] of {depth}")
}

/// A linear layer with a weight `[columns, depth]`: forward, and the gradients of its input and of its weight.
fn dense(meter: &mut Meter<'_>, layer: &'static str, columns: usize, depth: usize) -> Result<(), CudaError> {
    let gpu = meter.gpu;
    let work = flop(TOKENS, columns, depth);
    let (x, weight) = (meter.random(TOKENS * depth)?, meter.random(columns * depth)?);
    let (mut y, mut grad_x) = (meter.random(TOKENS * columns)?, meter.zeros(TOKENS * depth)?);
    let mut grad_weight = meter.zeros_f32(columns * depth)?;
    let (x, weight) = (Mat::new(x.whole(), TOKENS, depth), Mat::new(weight.whole(), columns, depth));
    meter.measure("matrix products", layer, size(TOKENS, columns, depth), work, || {
        matmul(gpu, MatMut::new(y.whole_mut(), TOKENS, columns), x, weight.t(), Addend::None)
    })?;
    let grad_y = Mat::new(y.whole(), TOKENS, columns);
    meter.measure("matrix products", "  gradient of its input", size(TOKENS, depth, columns), work, || {
        matmul(gpu, MatMut::new(grad_x.whole_mut(), TOKENS, depth), grad_y, weight, Addend::None)
    })?;
    meter.measure("matrix products", "  gradient of its weight, float32", size(columns, depth, TOKENS), work, || {
        matmul(gpu, MatMut::new(grad_weight.whole_mut(), columns, depth), grad_y.t(), x, Addend::Accumulate)
    })
}

/// So narrow that reading the tokens is what takes time.
fn router(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    let gpu = meter.gpu;
    let (x, weight) = (meter.random(TOKENS * HIDDEN)?, meter.random(EXPERTS * HIDDEN)?);
    let mut logits = meter.zeros_f32(TOKENS * EXPERTS)?;
    let bytes = meter.bytes((TOKENS + EXPERTS) * HIDDEN) + TOKENS * EXPERTS * DType::F32.bytes();
    meter.measure("matrix products", "router, float32", size(TOKENS, EXPERTS, HIDDEN), Work::Bytes(bytes), || {
        let (x, weight) = (Mat::new(x.whole(), TOKENS, HIDDEN), Mat::new(weight.whole(), EXPERTS, HIDDEN));
        matmul(gpu, MatMut::new(logits.whole_mut(), TOKENS, EXPERTS), x, weight.t(), Addend::None)
    })
}

/// The products of one layer's experts, whose rows are uneven as routing makes them.
fn experts(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    grouped(meter, "experts, gate and up", 2 * EXPERT_HIDDEN, HIDDEN)?;
    grouped(meter, "experts, down", HIDDEN, EXPERT_HIDDEN)
}

fn grouped(meter: &mut Meter<'_>, layer: &'static str, n: usize, k: usize) -> Result<(), CudaError> {
    let gpu = meter.gpu;
    let work = flop(EXPERT_ROWS, n, k);
    let rows = uneven_rows();
    let starts = rows.iter().scan(0, |next, &rows| Some(std::mem::replace(next, *next + rows)));
    let blocks: Vec<(u32, u32, u32)> =
        (0..).zip(starts).zip(&rows).map(|((e, start), &rows)| (e, start, rows)).collect();
    let groups: Vec<_> =
        blocks.iter().map(|&(slot, row, rows)| GroupedRows { slot, a_row: row, c_row: row, rows }).collect();
    let reductions: Vec<_> = blocks.iter().map(|&(slot, row, rows)| GroupedReduction { slot, row, rows }).collect();
    let (x, weights) = (meter.random(EXPERT_ROWS * k)?, meter.random(EXPERTS * n * k)?);
    let (mut y, mut grad_x) = (meter.random(EXPERT_ROWS * n)?, meter.zeros(EXPERT_ROWS * k)?);
    let mut grad_weights = meter.zeros_f32(EXPERTS * n * k)?;
    let matrices = |layout, n, k| GroupedB { data: weights.whole(), offset: 0, stride: n * k, n, k, layout };
    let size = |columns, depth| format!("{EXPERTS} of [~{}, {columns}] of {depth}", EXPERT_ROWS / EXPERTS);
    meter.measure("grouped products", layer, size(n, k), work, || {
        grouped_matmul(gpu, &groups, x.whole(), matrices(BLayout::Nk, n, k), y.whole_mut())
    })?;
    meter.measure("grouped products", "  gradient of their input", size(k, n), work, || {
        grouped_matmul(gpu, &groups, y.whole(), matrices(BLayout::Kn, k, n), grad_x.whole_mut())
    })?;
    let size = format!("{EXPERTS} of [{n}, {k}] of ~{}", EXPERT_ROWS / EXPERTS);
    meter.measure("grouped products", "  gradients of their weights, float32", size, work, || {
        grouped_weight_gradient(gpu, &reductions, y.whole(), n, x.whole(), k, grad_weights.whole_mut(), 0, n * k, true)
    })
}

/// Rows of each expert, `EXPERT_ROWS` in all: from half to one and a half times an even share.
fn uneven_rows() -> Vec<u32> {
    let (experts, share) = (EXPERTS as u32, (EXPERT_ROWS / EXPERTS) as u32);
    // Steps that share no divisor with the number of experts visit every offset once.
    let offset = |expert: u32| (expert * 29 % experts) * share / (experts - 1);
    let mut rows: Vec<u32> = (0..experts).map(|expert| share / 2 + offset(expert)).collect();
    let rest = EXPERT_ROWS as u32 - rows.iter().sum::<u32>();
    rows.iter_mut().take(rest as usize).for_each(|rows| *rows += 1);
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uneven_rows_are_all_rows() {
        let rows = uneven_rows();
        assert_eq!(rows.iter().sum::<u32>() as usize, EXPERT_ROWS);
        assert!(rows.iter().max() > Some(&(2 * rows.iter().min().unwrap())));
    }
}
