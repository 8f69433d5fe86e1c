//! What is bound by memory outside of the experts' exchange: norms, positions, activations, embeddings, losses, the
//! optimizer.

use std::collections::HashSet;

use lina_cuda::*;
use lina_kernels::{Activation, AdamWStep, HeadLayout};

use super::meter::{Meter, Work, random_ids};
use super::{EXPERT_HIDDEN, EXPERT_ROWS, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, QKV_WIDTH, SEQUENCE, TOKENS, VOCABULARY};

/// Parameters of the optimizer's turn.
const PARAMETERS: usize = 1 << 28;
/// Tensors that they are.
const TENSORS: usize = 512;
const EPSILON: f32 = 1e-6;

pub(super) fn measure(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    norms(meter)?;
    heads(meter)?;
    activations(meter)?;
    embeddings(meter)?;
    losses(meter)?;
    elementwise(meter)?;
    optimizer(meter)
}

fn norms(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    let (gpu, bytes) = (meter.gpu, meter.bytes(TOKENS * HIDDEN));
    let size = || format!("[{TOKENS}, {HIDDEN}]");
    let (x, grad_y) = (meter.random(TOKENS * HIDDEN)?, meter.random(TOKENS * HIDDEN)?);
    let (mut y, mut grad_x) = (meter.zeros(TOKENS * HIDDEN)?, meter.zeros(TOKENS * HIDDEN)?);
    let (weight, bias) = (meter.random_of(HIDDEN, DType::F32)?, meter.random_of(HIDDEN, DType::F32)?);
    let (mut grad_weight, mut grad_bias) = (meter.zeros_f32(HIDDEN)?, meter.zeros_f32(HIDDEN)?);
    let (mut mean, mut inv) = (meter.zeros_f32(TOKENS)?, meter.zeros_f32(TOKENS)?);
    let (forward, backward) = (Work::Bytes(2 * bytes), Work::Bytes(4 * bytes));

    meter.measure("norm", "rms_norm_forward", size(), forward, || {
        rms_norm_forward(gpu, x.whole(), weight.whole(), EPSILON, y.whole_mut(), inv.whole_mut())
    })?;
    meter.measure("norm", "rms_norm_backward", size(), backward, || {
        let (x, weight, inv, grad_y) = (x.whole(), weight.whole(), inv.whole(), grad_y.whole());
        rms_norm_backward(gpu, x, weight, inv, grad_y, grad_x.whole_mut(), grad_weight.whole_mut())
    })?;
    meter.measure("norm", "layer_norm_forward", size(), forward, || {
        let (x, weight, bias) = (x.whole(), weight.whole(), bias.whole());
        layer_norm_forward(gpu, x, weight, bias, EPSILON, y.whole_mut(), mean.whole_mut(), inv.whole_mut())
    })?;
    meter.measure("norm", "layer_norm_backward", size(), backward, || {
        let (x, weight, mean, inv, grad_y) = (x.whole(), weight.whole(), mean.whole(), inv.whole(), grad_y.whole());
        let (grad_x, grad_weight) = (grad_x.whole_mut(), grad_weight.whole_mut());
        layer_norm_backward(gpu, x, weight, mean, inv, grad_y, grad_x, grad_weight, grad_bias.whole_mut())
    })?;
    meter.measure("norm", "column_sums", size(), Work::Bytes(bytes), || {
        column_sums(gpu, x.whole(), grad_bias.whole_mut())
    })
}

fn heads(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    let gpu = meter.gpu;
    let layout = HeadLayout { offset: 0, heads: HEADS, head_dim: HEAD_DIM, row_stride: QKV_WIDTH };
    let queries = meter.bytes(TOKENS * HEADS * HEAD_DIM);
    let size = format!("[{TOKENS}, {HEADS}, {HEAD_DIM}]");
    let (x, mut y, mut grad) =
        (meter.random(TOKENS * QKV_WIDTH)?, meter.zeros(TOKENS * QKV_WIDTH)?, meter.random(TOKENS * QKV_WIDTH)?);
    let weight = meter.random_of(HEAD_DIM, DType::F32)?;
    let (mut inv, mut grad_weight) = (meter.zeros_f32(TOKENS * HEADS)?, meter.zeros_f32(HEAD_DIM)?);
    meter.measure("heads", "head_rms_norm_forward", size.clone(), Work::Bytes(2 * queries), || {
        head_rms_norm_forward(gpu, layout, x.whole(), weight.whole(), EPSILON, y.whole_mut(), inv.whole_mut())
    })?;
    meter.measure("heads", "head_rms_norm_backward", size, Work::Bytes(3 * queries), || {
        let (x, weight, inv) = (x.whole(), weight.whole(), inv.whole());
        head_rms_norm_backward(gpu, layout, x, weight, inv, grad.whole_mut(), grad_weight.whole_mut())
    })?;

    let layout = HeadLayout { heads: HEADS + KV_HEADS, ..layout };
    let rotated = meter.bytes(TOKENS * layout.heads * HEAD_DIM);
    let table = RotaryTable::new(gpu, HEAD_DIM, SEQUENCE, 1e4)?;
    let positions: Vec<u32> = (0..TOKENS).map(|token| (token % SEQUENCE) as u32).collect();
    let positions = gpu.buffer_from(&positions, DType::U32)?;
    let size = format!("[{TOKENS}, {}, {HEAD_DIM}]", layout.heads);
    meter.measure("heads", "rotary_forward", size.clone(), Work::Bytes(2 * rotated), || {
        rotary_forward(gpu, &table, positions.whole(), layout, y.whole_mut())
    })?;
    meter.measure("heads", "rotary_backward", size, Work::Bytes(2 * rotated), || {
        rotary_backward(gpu, &table, positions.whole(), layout, grad.whole_mut())
    })
}

fn activations(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    let gpu = meter.gpu;
    let elements = EXPERT_ROWS * EXPERT_HIDDEN;
    let bytes = meter.bytes(elements);
    let size = || format!("[{EXPERT_ROWS}, {EXPERT_HIDDEN}]");
    let (gate_up, grad_hidden) = (meter.random(2 * elements)?, meter.random(elements)?);
    let (mut hidden, mut grad_gate_up) = (meter.zeros(elements)?, meter.zeros(2 * elements)?);
    meter.measure("activation", "swiglu_forward", size(), Work::Bytes(3 * bytes), || {
        swiglu_forward(gpu, gate_up.whole(), EXPERT_HIDDEN, hidden.whole_mut())
    })?;
    meter.measure("activation", "swiglu_backward", size(), Work::Bytes(6 * bytes), || {
        let (gate_up, grad_hidden) = (gate_up.whole(), grad_hidden.whole());
        let (grad_gate_up, hidden) = (grad_gate_up.whole_mut(), Some(hidden.whole_mut()));
        swiglu_backward(gpu, gate_up, EXPERT_HIDDEN, grad_hidden, grad_gate_up, hidden)
    })?;
    drop((gate_up, grad_gate_up));
    let (mut pre, mut grad_pre) = (meter.random(elements)?, meter.zeros(elements)?);
    meter.measure("activation", "activation_forward, gelu", size(), Work::Bytes(2 * bytes), || {
        activation_forward(gpu, Activation::GeluTanh, pre.whole_mut(), None, hidden.whole_mut())
    })?;
    meter.measure("activation", "activation_backward, gelu", size(), Work::Bytes(3 * bytes), || {
        let (pre, grad_y) = (pre.whole(), grad_hidden.whole());
        activation_backward(gpu, Activation::GeluTanh, pre, grad_y, grad_pre.whole_mut())
    })?;
    let bias = meter.random_of(EXPERT_HIDDEN, DType::F32)?;
    meter.measure("activation", "add_bias", size(), Work::Bytes(2 * bytes), || {
        add_bias(gpu, hidden.whole_mut(), bias.whole())
    })
}

fn embeddings(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    let gpu = meter.gpu;
    let rows = meter.bytes(TOKENS * HIDDEN);
    let size = || format!("{TOKENS} of [{VOCABULARY}, {HIDDEN}]");
    let ids = random_ids(TOKENS, VOCABULARY);
    let distinct = ids.iter().collect::<HashSet<_>>().len();
    let ids = gpu.buffer_from(&ids, DType::U32)?;
    let table = meter.random(VOCABULARY * HIDDEN)?;
    let (mut out, mut grad_table) = (meter.zeros(TOKENS * HIDDEN)?, meter.zeros_f32(VOCABULARY * HIDDEN)?);
    meter.measure("embedding", "embedding_forward", size(), Work::Bytes(2 * rows), || {
        embedding_forward(gpu, table.whole(), ids.whole(), out.whole_mut())
    })?;
    meter.measure("embedding", "add_position_embedding", size(), Work::Bytes(3 * rows), || {
        add_position_embedding(gpu, table.whole(), ids.whole(), out.whole_mut())
    })?;
    let gradients = distinct * HIDDEN * DType::F32.bytes();
    meter.measure("embedding", "embedding_backward", size(), Work::Bytes(rows + 2 * gradients), || {
        embedding_backward(gpu, out.whole(), ids.whole(), None, grad_table.whole_mut())
    })
}

fn losses(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    let gpu = meter.gpu;
    let bytes = meter.bytes(TOKENS * VOCABULARY);
    let size = || format!("[{TOKENS}, {VOCABULARY}]");
    let mut logits = meter.random(TOKENS * VOCABULARY)?;
    let targets = gpu.buffer_from(&random_ids(TOKENS, VOCABULARY), DType::U32)?;
    let mut losses = meter.zeros_f32(TOKENS)?;
    meter.measure("loss", "cross_entropy_forward", size(), Work::Bytes(bytes), || {
        cross_entropy_forward(gpu, logits.whole(), targets.whole(), losses.whole_mut())
    })?;
    let scale = 1.0 / TOKENS as f32;
    meter.measure("loss", "cross_entropy_forward_backward", size(), Work::Bytes(2 * bytes), || {
        cross_entropy_forward_backward(gpu, logits.whole_mut(), targets.whole(), scale, losses.whole_mut())
    })?;
    let mut sum = meter.zeros_f32(1)?;
    let bytes = TOKENS * DType::F32.bytes();
    meter.measure("loss", "sum_into", format!("[{TOKENS}]"), Work::Bytes(bytes), || {
        sum_into(gpu, losses.whole(), sum.whole_mut())
    })
}

fn elementwise(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    let gpu = meter.gpu;
    let elements = TOKENS * HIDDEN;
    let (bytes, wide) = (meter.bytes(elements), elements * DType::F32.bytes());
    let size = || format!("[{TOKENS}, {HIDDEN}]");
    let (x, mut y) = (meter.random(elements)?, meter.random(elements)?);
    let mut sums = meter.zeros_f32(elements)?;
    meter.measure("elementwise", "fill_zero", size(), Work::Bytes(bytes), || gpu.fill_zero(y.whole_mut()))?;
    meter.measure("elementwise", "copy", size(), Work::Bytes(2 * bytes), || gpu.copy(x.whole(), y.whole_mut()))?;
    let columns = HIDDEN / 2..HIDDEN;
    meter.measure("elementwise", "copy_columns, half of them", size(), Work::Bytes(bytes), || {
        gpu.copy_columns(x.whole(), y.whole_mut(), HIDDEN, columns.clone())
    })?;
    meter.measure("elementwise", "clamp", size(), Work::Bytes(2 * bytes), || clamp(gpu, y.whole_mut(), 0.5))?;
    meter.measure("elementwise", "clamp_backward", size(), Work::Bytes(3 * bytes), || {
        clamp_backward(gpu, x.whole(), 0.5, y.whole_mut())
    })?;
    meter.measure("elementwise", "accumulate_f32", size(), Work::Bytes(bytes + 2 * wide), || {
        accumulate_f32(gpu, sums.whole_mut(), x.whole())
    })?;
    if meter.dtype == DType::Bf16 {
        meter.measure("elementwise", "cast, bfloat16 to float32", size(), Work::Bytes(bytes + wide), || {
            cast(gpu, x.whole(), sums.whole_mut())
        })?;
        meter.measure("elementwise", "cast, float32 to bfloat16", size(), Work::Bytes(bytes + wide), || {
            cast(gpu, sums.whole(), y.whole_mut())
        })?;
    }
    Ok(())
}

fn optimizer(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    let gpu = meter.gpu;
    let size = || format!("[{PARAMETERS}]");
    let bytes = PARAMETERS * DType::F32.bytes();
    let (mut params, grads) = (meter.random_of(PARAMETERS, DType::F32)?, meter.random_of(PARAMETERS, DType::F32)?);
    let (mut m, mut v) = (meter.zeros_f32(PARAMETERS)?, meter.zeros_f32(PARAMETERS)?);
    let step = AdamWStep {
        learning_rate: 1e-4,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        bias_correction1: 0.1,
        bias_correction2: 0.05,
        grad_scale: 1.0,
    };
    // Parameters and both moments are read and written, gradients are read.
    let mut copy = if meter.dtype == DType::Bf16 { Some(meter.zeros(PARAMETERS)?) } else { None };
    let copied = copy.as_ref().map_or(0, |copy| copy.len() * copy.dtype().bytes());
    meter.measure("optimizer", "adamw_step", size(), Work::Bytes(7 * bytes + copied), || {
        let (params, m, v) = (params.whole_mut(), m.whole_mut(), v.whole_mut());
        adamw_step(gpu, params, grads.whole(), m, v, copy.as_mut().map(Buffer::whole_mut), &step)
    })?;
    let tensor = PARAMETERS / TENSORS;
    let ranges: Vec<_> = (0..TENSORS).map(|number| number * tensor..(number + 1) * tensor).collect();
    let mut sums = vec![0.0; TENSORS];
    meter.measure("optimizer", "sum_of_squares", format!("{TENSORS} of [{tensor}]"), Work::Bytes(bytes), || {
        sum_of_squares(gpu, grads.whole(), &ranges, &mut sums)
    })
}
