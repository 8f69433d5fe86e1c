//! The nonlinearities of expert networks: SwiGLU of three-matrix experts, ReLU and GELU of two-matrix experts.

use lina_kernels::Activation;

use crate::buffer::{DType, Slice, SliceMut};
use crate::compile::Module;
use crate::elementwise::{THREADS, kernel_name, number, pack_len};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Arg, LaunchShape};

pub(crate) static ACTIVATION: Module = Module::new(
    "activation",
    concat!(
        include_str!("kernels/pack.cuh"),
        include_str!("kernels/nonlinearity.cuh"),
        include_str!("kernels/activation.cu")
    ),
);

/// hidden = silu(gate) · up. `gate_up`: `[rows, 2 * features]`, gates first; `hidden`: `[rows, features]`, overwritten.
///
/// # Errors
/// If the device has failed.
pub fn swiglu_forward(gpu: &Gpu, gate_up: Slice<'_>, features: usize, hidden: SliceMut<'_>) -> Result<(), CudaError> {
    check_swiglu(gate_up, features, hidden.as_slice());
    let pack = pack_len(gate_up.dtype(), features, &[gate_up.ptr(), hidden.ptr()]);
    let packs = hidden.len() / pack;
    let args = [gate_up.into(), (&hidden).into(), number(features), number(packs)];
    let kernel = kernel_name("swiglu_forward", gate_up.dtype(), pack);
    gpu.launch(&ACTIVATION, &kernel, LaunchShape::covering(packs, THREADS), &args)
}

/// Backward of [`swiglu_forward`]. `grad_gate_up` (`[rows, 2 * features]`) is overwritten; `hidden_out`, if given,
/// receives the forward result again (`[rows, features]`), so that it need not be kept for the weight gradient of the
/// next product.
///
/// # Errors
/// If the device has failed.
pub fn swiglu_backward(
    gpu: &Gpu,
    gate_up: Slice<'_>,
    features: usize,
    grad_hidden: Slice<'_>,
    grad_gate_up: SliceMut<'_>,
    hidden_out: Option<SliceMut<'_>>,
) -> Result<(), CudaError> {
    check_swiglu(gate_up, features, grad_hidden);
    check_swiglu(grad_gate_up.as_slice(), features, grad_hidden);
    let hidden = hidden_out.map_or(0, |hidden| {
        check_swiglu(gate_up, features, hidden.as_slice());
        hidden.ptr()
    });
    let addresses = [gate_up.ptr(), grad_hidden.ptr(), grad_gate_up.ptr(), hidden];
    let pack = pack_len(gate_up.dtype(), features, &addresses);
    let packs = grad_hidden.len() / pack;
    let [gate_up_at, grad_hidden_at, grad_gate_up_at, hidden_at] = addresses.map(Arg::Pointer);
    let args = [gate_up_at, grad_hidden_at, grad_gate_up_at, hidden_at, number(features), number(packs)];
    let kernel = kernel_name("swiglu_backward", gate_up.dtype(), pack);
    gpu.launch(&ACTIVATION, &kernel, LaunchShape::covering(packs, THREADS), &args)
}

fn check_swiglu(gate_up: Slice<'_>, features: usize, hidden: Slice<'_>) {
    let rows = (features > 0 || hidden.is_empty()) && hidden.len().is_multiple_of(features.max(1));
    assert!(rows && (gate_up.len(), gate_up.dtype()) == (2 * hidden.len(), hidden.dtype()), "swiglu: shapes");
}

/// y = activation(x), x = pre + bias. `pre` (`[rows, width]`) receives the bias in place where one is given (f32
/// `[width]`), as the backward pass needs x; `y` is overwritten.
///
/// # Errors
/// If the device has failed.
pub fn activation_forward(
    gpu: &Gpu,
    activation: Activation,
    pre: SliceMut<'_>,
    bias: Option<Slice<'_>>,
    y: SliceMut<'_>,
) -> Result<(), CudaError> {
    assert_eq!((pre.len(), pre.dtype()), (y.len(), y.dtype()), "activation_forward: shapes");
    let width = bias.map(|bias| check_bias(pre.as_slice(), bias));
    let bias = bias.map_or(0, |bias| bias.ptr());
    let pack = pack_len(pre.dtype(), width.unwrap_or(pre.len()), &[pre.ptr(), bias, y.ptr()]);
    let packs = pre.len() / pack;
    // Kernels ask for the width of a bias alone.
    let width = number(width.unwrap_or(0));
    let args = [kind(activation).into(), (&pre).into(), Arg::Pointer(bias), (&y).into(), width, number(packs)];
    let kernel = kernel_name("activation_forward", pre.dtype(), pack);
    gpu.launch(&ACTIVATION, &kernel, LaunchShape::covering(packs, THREADS), &args)
}

/// Backward of [`activation_forward`]: `grad_pre` = `grad_y` · activation'(pre), with `pre` as the forward pass left
/// it. All `[rows, width]`; overwritten.
///
/// # Errors
/// If the device has failed.
pub fn activation_backward(
    gpu: &Gpu,
    activation: Activation,
    pre: Slice<'_>,
    grad_y: Slice<'_>,
    grad_pre: SliceMut<'_>,
) -> Result<(), CudaError> {
    let like_pre = |len, dtype| (len, dtype) == (pre.len(), pre.dtype());
    assert!(
        like_pre(grad_y.len(), grad_y.dtype()) && like_pre(grad_pre.len(), grad_pre.dtype()),
        "activation_backward: shapes"
    );
    let pack = pack_len(pre.dtype(), pre.len(), &[pre.ptr(), grad_y.ptr(), grad_pre.ptr()]);
    let packs = pre.len() / pack;
    let args = [kind(activation).into(), pre.into(), grad_y.into(), (&grad_pre).into(), number(packs)];
    let kernel = kernel_name("activation_backward", pre.dtype(), pack);
    gpu.launch(&ACTIVATION, &kernel, LaunchShape::covering(packs, THREADS), &args)
}

/// Adds `bias` (f32 `[width]`) to every row of `x` (`[rows, width]`).
///
/// # Errors
/// If the device has failed.
pub fn add_bias(gpu: &Gpu, x: SliceMut<'_>, bias: Slice<'_>) -> Result<(), CudaError> {
    let width = check_bias(x.as_slice(), bias);
    let pack = pack_len(x.dtype(), width, &[x.ptr(), bias.ptr()]);
    let packs = x.len() / pack;
    let args = [(&x).into(), bias.into(), number(width), number(packs)];
    gpu.launch(&ACTIVATION, &kernel_name("add_bias", x.dtype(), pack), LaunchShape::covering(packs, THREADS), &args)
}

/// The width of rows that have this bias.
fn check_bias(x: Slice<'_>, bias: Slice<'_>) -> usize {
    let width = bias.len();
    assert!(
        bias.dtype() == DType::F32 && if width == 0 { x.is_empty() } else { x.len().is_multiple_of(width) },
        "{} elements are not rows of {width}",
        x.len()
    );
    width
}

/// What the kernels call an activation.
pub(crate) fn kind(activation: Activation) -> u32 {
    match activation {
        Activation::Relu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
    }
}
