//! Choosing experts, and moving tokens' rows to them and back.

use lina_cuda::*;

use super::meter::{Meter, Work};
use super::{EXPERT_ROWS, EXPERTS, HIDDEN, TOKENS, TOP_K};

/// Bytes of an f32 or u32.
const WORD: usize = size_of::<u32>();

pub(super) fn measure(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    let gpu = meter.gpu;
    let mut expert_index = gpu.zeros(EXPERT_ROWS, DType::U32)?;
    let mut gate_weight = meter.zeros_f32(EXPERT_ROWS)?;
    router(meter, &mut expert_index, &mut gate_weight)?;
    let (position, token_of_row) = placing(meter, &expert_index)?;
    moving(meter, &position, &token_of_row, &gate_weight)
}

fn router(meter: &mut Meter<'_>, expert_index: &mut Buffer, gate_weight: &mut Buffer) -> Result<(), CudaError> {
    let gpu = meter.gpu;
    let (all, chosen) = (TOKENS * EXPERTS * WORD, EXPERT_ROWS * WORD);
    let size = || format!("[{TOKENS}, {EXPERTS}], top {TOP_K}");
    let logits = meter.random_of(TOKENS * EXPERTS, DType::F32)?;
    let (mut probabilities, mut grad_logits) = (meter.zeros_f32(TOKENS * EXPERTS)?, meter.zeros_f32(TOKENS * EXPERTS)?);
    meter.measure("router", "router_forward", size(), Work::Bytes(2 * all + 2 * chosen), || {
        let (probabilities, experts) = (probabilities.whole_mut(), expert_index.whole_mut());
        router_forward(gpu, logits.whole(), TOP_K, true, probabilities, experts, gate_weight.whole_mut())
    })?;
    let (balance, grad_gate) = (meter.random_of(EXPERTS, DType::F32)?, meter.random_of(EXPERT_ROWS, DType::F32)?);
    meter.measure("router", "router_backward", size(), Work::Bytes(3 * all + 3 * chosen), || {
        let (probabilities, experts, gates) = (probabilities.whole(), expert_index.whole(), gate_weight.whole());
        let (grad_gate, balance, logits) = (grad_gate.whole(), Some(balance.whole()), logits.whole());
        let grad_logits = grad_logits.whole_mut();
        router_backward(gpu, probabilities, experts, gates, TOP_K, true, grad_gate, balance, 1e-3, logits, grad_logits)
    })?;
    let mut losses = meter.zeros_f32(TOKENS)?;
    meter.measure("router", "z_loss", size(), Work::Bytes(all), || z_loss(gpu, logits.whole(), losses.whole_mut()))?;
    let mut x = meter.random(TOKENS * HIDDEN)?;
    let bytes = meter.bytes(2 * TOKENS * HIDDEN);
    meter.measure("router", "jitter", format!("[{TOKENS}, {HIDDEN}]"), Work::Bytes(bytes), || {
        jitter::apply(gpu, x.whole_mut(), HIDDEN, 0.01, 1, 0)
    })
}

/// Rows of all tokens' assignments, and the tokens of all rows.
fn placing(meter: &mut Meter<'_>, expert_index: &Buffer) -> Result<(Buffer, Buffer), CudaError> {
    let gpu = meter.gpu;
    let bytes = EXPERT_ROWS * WORD;
    let size = || format!("[{TOKENS}, {TOP_K}], {EXPERTS} experts");
    let chunk = 0..TOKENS;
    let chunks = std::slice::from_ref(&chunk);
    let mut counts = gpu.zeros(2 * EXPERTS, DType::U32)?;
    meter.measure("permutation", "count_assignments", size(), Work::Bytes(bytes), || {
        count_assignments(gpu, expert_index.whole(), TOP_K, chunks, EXPERTS, counts.whole_mut())
    })?;
    let counts: Vec<u32> = gpu.to_host(counts.slice(0..EXPERTS))?;
    let ends: Vec<u32> =
        counts.iter().scan(0, |end, count| Some(std::mem::replace(end, *end + count) + count)).collect();
    let starts: Vec<u32> = ends.iter().zip(&counts).map(|(end, count)| end - count).collect();
    let (starts, ends) = (gpu.buffer_from(&starts, DType::U32)?, gpu.buffer_from(&ends, DType::U32)?);
    let (mut position, mut token_of_row) = (gpu.zeros(EXPERT_ROWS, DType::U32)?, gpu.zeros(EXPERT_ROWS, DType::U32)?);
    meter.measure("permutation", "place_rows", size(), Work::Bytes(3 * bytes), || {
        let (starts, ends, position) = (starts.whole(), ends.whole(), position.whole_mut());
        let tokens = token_of_row.whole_mut();
        place_rows(gpu, expert_index.whole(), TOP_K, chunks, EXPERTS, starts, ends, &[0], position, tokens)
    })?;
    Ok((position, token_of_row))
}

fn moving(meter: &mut Meter<'_>, position: &Buffer, tokens: &Buffer, gates: &Buffer) -> Result<(), CudaError> {
    let gpu = meter.gpu;
    let (once, all) = (meter.bytes(TOKENS * HIDDEN), meter.bytes(EXPERT_ROWS * HIDDEN));
    let size = || format!("[{EXPERT_ROWS}, {HIDDEN}]");
    let (x, mut y) = (meter.random(TOKENS * HIDDEN)?, meter.zeros(TOKENS * HIDDEN)?);
    let (mut rows, mut grad_rows) = (meter.random(EXPERT_ROWS * HIDDEN)?, meter.zeros(EXPERT_ROWS * HIDDEN)?);
    let mut grad_gates = meter.zeros_f32(EXPERT_ROWS)?;
    meter.measure("permutation", "gather_rows", size(), Work::Bytes(once + all), || {
        gather_rows(gpu, x.whole(), HIDDEN, tokens.whole(), rows.whole_mut())
    })?;
    meter.measure("permutation", "gather_backward", size(), Work::Bytes(all + 2 * once), || {
        gather_backward(gpu, rows.whole(), HIDDEN, position.whole(), y.whole_mut())
    })?;
    meter.measure("permutation", "combine_rows", size(), Work::Bytes(all + 2 * once), || {
        combine_rows(gpu, rows.whole(), HIDDEN, position.whole(), gates.whole(), x.whole(), y.whole_mut())
    })?;
    meter.measure("permutation", "combine_backward", size(), Work::Bytes(2 * all + once), || {
        let (rows, position, gates) = (rows.whole(), position.whole(), gates.whole());
        let (grad_rows, grad_gates) = (grad_rows.whole_mut(), grad_gates.whole_mut());
        combine_backward(gpu, x.whole(), HIDDEN, rows, position, gates, grad_rows, grad_gates)
    })?;
    // Blocks of one size that change places.
    let block = EXPERT_ROWS / EXPERTS;
    let blocks: Vec<u32> = (0..EXPERTS)
        .flat_map(|number| [number * block, (number * 29 % EXPERTS) * block, block])
        .map(|row| row as u32)
        .collect();
    let blocks = gpu.buffer_from(&blocks, DType::U32)?;
    meter.measure("permutation", "copy_blocks", size(), Work::Bytes(2 * all), || {
        copy_blocks(gpu, blocks.whole(), EXPERT_ROWS, HIDDEN, rows.whole(), grad_rows.whole_mut())
    })
}
