//! The gate of a Mixture-of-Experts layer: softmax over all experts, the k largest, and optionally weights renormalised
//! over those k. All tensors are f32.

use crate::buffer::{DType, Slice, SliceMut};
use crate::compile::Module;
use crate::elementwise::{THREADS, flag, number};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Arg, LaunchShape};
use crate::limits::{check_experts, check_routing};

pub(crate) static ROUTER: Module = Module::new("router", include_str!("kernels/router.cu"));

/// Threads of a token.
const WARP: usize = 32;

/// probs = softmax(logits) per token; the `k` most probable experts, most probable first and lower index first among
/// equals; their probabilities as weights, divided by their sum with `renormalise`.
///
/// `logits`, `probs`: `[tokens, experts]`; `expert_index` (u32), `gate_weight`: `[tokens, k]`. All outputs are
/// overwritten.
///
/// # Errors
/// If there are more experts or choices than the kernel takes, or the device has failed.
///
/// # Panics
/// If `k` is 0 or larger than the number of experts.
pub fn router_forward(
    gpu: &Gpu,
    logits: Slice<'_>,
    k: usize,
    renormalise: bool,
    probs: SliceMut<'_>,
    expert_index: SliceMut<'_>,
    gate_weight: SliceMut<'_>,
) -> Result<(), CudaError> {
    let (tokens, experts) = shape(probs.len(), expert_index.as_slice(), k)?;
    assert!(logits.len() == probs.len() && gate_weight.len() == expert_index.len(), "router_forward: shapes");
    assert_f32(&[logits, probs.as_slice(), gate_weight.as_slice()]);
    let [count, experts, k] = [tokens, experts, k].map(number);
    let outputs = [(&probs).into(), (&expert_index).into(), (&gate_weight).into()];
    let [probs, expert_index, gate_weight] = outputs;
    let args = [logits.into(), count, experts, k, flag(renormalise), probs, expert_index, gate_weight];
    gpu.launch(&ROUTER, "router_forward", warps(tokens), &args)
}

/// Backward of [`router_forward`] with the auxiliary losses.
///
/// `probs`, `expert_index`, `gate_weight`, `k`, `renormalise`: as the forward pass had them; `grad_gate_weight`:
/// `[tokens, k]`; `extra_grad_probs`: `[experts]`, added to every token's gradient of probs: the load-balancing loss,
/// whose gradient is the same for all tokens; `z_loss_scale`: adds the gradient of `z_loss_scale` · logsumexp(logits)²
/// per token (ST-MoE's router z-loss), with `logits` as in the forward pass; `grad_logits`: `[tokens, experts]`,
/// overwritten.
///
/// # Errors
/// As [`router_forward`].
pub fn router_backward(
    gpu: &Gpu,
    probs: Slice<'_>,
    expert_index: Slice<'_>,
    gate_weight: Slice<'_>,
    k: usize,
    renormalise: bool,
    grad_gate_weight: Slice<'_>,
    extra_grad_probs: Option<Slice<'_>>,
    z_loss_scale: f32,
    logits: Slice<'_>,
    grad_logits: SliceMut<'_>,
) -> Result<(), CudaError> {
    let (tokens, experts) = shape(probs.len(), expert_index, k)?;
    let weights = gate_weight.len() == expert_index.len() && grad_gate_weight.len() == expert_index.len();
    assert!(weights && logits.len() == probs.len() && grad_logits.len() == probs.len(), "router_backward: shapes");
    assert!(
        extra_grad_probs.is_none_or(|extra| extra.len() == experts || tokens == 0),
        "router_backward: extra_grad_probs has one element per expert"
    );
    assert_f32(&[probs, gate_weight, grad_gate_weight, logits, grad_logits.as_slice()]);
    assert_f32(extra_grad_probs.as_slice());
    let [count, experts, k] = [tokens, experts, k].map(number);
    let args = [
        probs.into(),
        expert_index.into(),
        gate_weight.into(),
        count,
        experts,
        k,
        flag(renormalise),
        grad_gate_weight.into(),
        Arg::Pointer(extra_grad_probs.map_or(0, |extra| extra.ptr())),
        z_loss_scale.into(),
        logits.into(),
        (&grad_logits).into(),
    ];
    gpu.launch(&ROUTER, "router_backward", warps(tokens), &args)
}

/// logsumexp(logits)² per token: the router z-loss. `logits`: `[tokens, experts]`; `out`: `[tokens]`, overwritten.
///
/// # Errors
/// If there are more experts than the kernel takes, or the device has failed.
pub fn z_loss(gpu: &Gpu, logits: Slice<'_>, out: SliceMut<'_>) -> Result<(), CudaError> {
    let tokens = out.len();
    let experts = logits.len().checked_div(tokens).unwrap_or(0);
    assert_eq!(logits.len(), tokens * experts, "z_loss: shapes");
    assert_f32(&[logits, out.as_slice()]);
    check_experts(experts)?;
    let args = [logits.into(), number(tokens), number(experts), (&out).into()];
    gpu.launch(&ROUTER, "z_loss", warps(tokens), &args)
}

/// Tokens and experts of `[tokens, experts]` and `[tokens, k]` buffers.
fn shape(dense: usize, sparse: Slice<'_>, k: usize) -> Result<(usize, usize), CudaError> {
    assert!(
        k > 0 && sparse.len().is_multiple_of(k) && sparse.dtype() == DType::U32,
        "router: {} choices are not {k} per token",
        sparse.len()
    );
    let tokens = sparse.len() / k;
    let experts = dense.checked_div(tokens).unwrap_or(k);
    assert!(
        dense == tokens * experts && k <= experts,
        "router: {dense} probabilities for {tokens} tokens that choose {k} experts each"
    );
    check_routing(experts, k)?;
    Ok((tokens, experts))
}

fn assert_f32(slices: &[Slice<'_>]) {
    assert!(slices.iter().all(|slice| slice.dtype() == DType::F32), "router: types");
}

fn warps(tokens: usize) -> LaunchShape {
    LaunchShape::covering(tokens * WARP, THREADS)
}
