//! Attention: in training over whole sequences, in inference over cached pages.

use lina_cuda::*;
use lina_kernels::{AttentionShape, PAGE_TOKENS, PagedSequence, PagedShape, Sequence, page_elements};

use super::meter::{Meter, Work};
use super::{HEAD_DIM, HEADS, KV_HEADS, QKV_WIDTH, SEQUENCE, TOKENS};

const QUERY_WIDTH: usize = HEADS * HEAD_DIM;
const K_OFFSET: usize = QUERY_WIDTH;
const V_OFFSET: usize = K_OFFSET + KV_HEADS * HEAD_DIM;
/// Sequences that answer at the same time.
const DECODED: usize = 128;
/// Tokens that each has cached.
const DECODED_PAST: usize = 4096;
/// Sequences that read a piece of their prompt.
const PREFILLED: usize = 4;
/// Tokens of a piece, and tokens before it.
const PIECE: usize = 512;
const PREFILLED_PAST: usize = 3584;

pub(super) fn measure(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    whole_sequences(meter)?;
    cached(meter, ["paged_append, decoding", "paged_attention, decoding"], DECODED, 1, DECODED_PAST)?;
    cached(meter, ["paged_append, prefill", "paged_attention, prefill"], PREFILLED, PIECE, PREFILLED_PAST)
}

fn scale() -> f32 {
    (HEAD_DIM as f32).sqrt().recip()
}

fn whole_sequences(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    let gpu = meter.gpu;
    let sequences: Vec<_> =
        (0..TOKENS / SEQUENCE).map(|number| Sequence { start_row: number * SEQUENCE, rows: SEQUENCE }).collect();
    let shape = AttentionShape {
        sequences: &sequences,
        heads_q: HEADS,
        heads_kv: KV_HEADS,
        head_dim: HEAD_DIM,
        row_stride: QKV_WIDTH,
        q_offset: 0,
        k_offset: K_OFFSET,
        v_offset: V_OFFSET,
        scale: scale(),
        window: None,
    };
    let plan = AttentionPlan::new(gpu, &shape, TOKENS, meter.dtype)?;
    let (qkv, grad_output) = (meter.random(TOKENS * QKV_WIDTH)?, meter.random(TOKENS * QUERY_WIDTH)?);
    let (mut output, mut grad_qkv) = (meter.zeros(TOKENS * QUERY_WIDTH)?, meter.zeros(TOKENS * QKV_WIDTH)?);
    let mut log_sum_exp = meter.zeros_f32(TOKENS * HEADS)?;
    // Scores and values, half of which the causal mask leaves; backward has five products.
    let product = (TOKENS * SEQUENCE) as f64 * QUERY_WIDTH as f64;
    let size = || format!("{} of {SEQUENCE}, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}", TOKENS / SEQUENCE);
    meter.measure("attention", "attention_forward", size(), Work::Flop(2.0 * product), || {
        attention_forward(gpu, &plan, qkv.whole(), output.whole_mut(), log_sum_exp.whole_mut())
    })?;
    meter.measure("attention", "attention_backward", size(), Work::Flop(5.0 * product), || {
        let (output, log_sum_exp, grad_output) = (output.whole(), log_sum_exp.whole(), grad_output.whole());
        attention_backward(gpu, &plan, qkv.whole(), output, log_sum_exp, grad_output, grad_qkv.whole_mut())
    })
}

/// `count` sequences of `new` tokens each after `past` in the cache.
fn cached(
    meter: &mut Meter<'_>,
    operations: [&'static str; 2],
    count: usize,
    new: usize,
    past: usize,
) -> Result<(), CudaError> {
    let gpu = meter.gpu;
    let pages_each = (past + new).div_ceil(PAGE_TOKENS);
    let pages: Vec<u32> = (0..(count * pages_each) as u32).collect();
    let sequences: Vec<_> = pages
        .chunks(pages_each)
        .enumerate()
        .map(|(number, pages)| PagedSequence { start_row: number * new, rows: new, past, pages })
        .collect();
    let shape = PagedShape {
        sequences: &sequences,
        heads_q: HEADS,
        heads_kv: KV_HEADS,
        head_dim: HEAD_DIM,
        row_stride: QKV_WIDTH,
        q_offset: 0,
        k_offset: K_OFFSET,
        v_offset: V_OFFSET,
        scale: scale(),
        window: None,
    };
    let tokens = count * new;
    let plan = PagedPlan::new(gpu, &shape, tokens, meter.dtype)?;
    let qkv = meter.random(tokens * QKV_WIDTH)?;
    let mut cache = meter.random(pages.len() * page_elements(KV_HEADS, HEAD_DIM))?;
    let mut output = meter.zeros(tokens * QUERY_WIDTH)?;
    let size = || format!("{count} of {new} after {past}, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}");
    let key_and_value = 2 * KV_HEADS * HEAD_DIM;
    let [append, attend] = operations;
    let appended = meter.bytes(2 * tokens * key_and_value);
    meter.measure("attention", append, size(), Work::Bytes(appended), || {
        paged_append(gpu, &plan, qkv.whole(), cache.whole_mut())
    })?;
    // A token alone reads the cache for little arithmetic; a piece of a prompt computes with what it reads.
    let work = if new == 1 {
        Work::Bytes(meter.bytes(count * (past + new) * key_and_value + 2 * tokens * QUERY_WIDTH))
    } else {
        Work::Flop(4.0 * tokens as f64 * (past as f64 + (new + 1) as f64 / 2.0) * QUERY_WIDTH as f64)
    };
    meter.measure("attention", attend, size(), work, || {
        paged_attention(gpu, &plan, qkv.whole(), cache.whole(), output.whole_mut())
    })
}
