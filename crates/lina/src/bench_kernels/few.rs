//! Products of the few tokens of a decoding step, which read their matrices once.

use lina_cuda::*;

use super::meter::{Meter, Work};
use super::products::size;
use super::{EXPERT_HIDDEN, EXPERTS, HIDDEN, QKV_WIDTH, TOP_K};

/// Tokens of a step: of one sequence, and of some.
const FEW_TOKENS: [usize; 2] = [1, 16];

pub(super) fn measure(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    FEW_TOKENS.into_iter().try_for_each(|tokens| {
        dense(meter, tokens)?;
        experts(meter, tokens)
    })
}

fn dense(meter: &mut Meter<'_>, tokens: usize) -> Result<(), CudaError> {
    let (gpu, sizes) = (meter.gpu, [QKV_WIDTH, HIDDEN]);
    let (x, weight) = (meter.random(tokens * HIDDEN)?, meter.random(QKV_WIDTH * HIDDEN)?);
    let mut y = meter.zeros(tokens * QKV_WIDTH)?;
    let work = Work::Bytes(meter.bytes(weight.len()));
    meter.measure("few tokens", "queries, keys, values", size(tokens, QKV_WIDTH, HIDDEN), work, || {
        few_matmul(gpu, x.whole(), weight.whole(), sizes, None, y.whole_mut())
    })
}

fn experts(meter: &mut Meter<'_>, tokens: usize) -> Result<(), CudaError> {
    let (gpu, choices) = (meter.gpu, tokens * TOP_K);
    // A stride that shares no divisor with the number of experts visits all of them.
    let index: Vec<u32> = (0..choices).map(|choice| (choice * 29 % EXPERTS) as u32).collect();
    let index = gpu.buffer_from(&index, DType::U32)?;
    let slots = gpu.buffer_from(&(0..EXPERTS as u32).collect::<Vec<_>>(), DType::U32)?;
    let chosen = ChosenExperts { index: index.whole(), top_k: TOP_K, slots: slots.whole() };
    let read = choices.min(EXPERTS);
    let (up, down) = (2 * EXPERT_HIDDEN * HIDDEN, HIDDEN * EXPERT_HIDDEN);
    let weights = meter.random(EXPERTS * (up + down))?;
    let matrices =
        |offset, n, k| GroupedB { data: weights.whole(), offset, stride: up + down, n, k, layout: BLayout::Nk };
    let x = meter.random(tokens * HIDDEN)?;
    let (mut units, mut rows) = (meter.random(choices * EXPERT_HIDDEN)?, meter.zeros(choices * HIDDEN)?);
    let of = |columns, depth| format!("{read} experts, {}", size(choices, columns, depth));
    let work = Work::Bytes(meter.bytes(read * up));
    meter.measure("few tokens", "experts, gate and up, SwiGLU", of(2 * EXPERT_HIDDEN, HIDDEN), work, || {
        let b = matrices(0, 2 * EXPERT_HIDDEN, HIDDEN);
        few_projected(gpu, &chosen, FewActivation::Swiglu, x.whole(), b, units.whole_mut())
    })?;
    let work = Work::Bytes(meter.bytes(read * down));
    meter.measure("few tokens", "experts, down", of(HIDDEN, EXPERT_HIDDEN), work, || {
        few_rows(gpu, &chosen, units.whole(), matrices(up, HIDDEN, EXPERT_HIDDEN), rows.whole_mut())
    })
}
