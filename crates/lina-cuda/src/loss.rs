//! Cross entropy of next-token predictions.

use lina_kernels::IGNORED;

use crate::buffer::{DType, Slice, SliceMut};
use crate::compile::Module;
use crate::elementwise::number;
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::LaunchShape;

pub(crate) static LOSS: Module = Module::new("loss", include_str!("kernels/loss.cu"));

/// Threads of a row.
const THREADS: u32 = 512;
/// Threads of the block of [`sum_into`].
const SUM_THREADS: u32 = 1024;

// The kernels know it too.
const _: () = assert!(IGNORED == u32::MAX);

/// −log softmax(logits)\[target\] per row in `losses`, and `scale` · (softmax − one-hot) in place of the logits.
///
/// `logits`: `[rows, vocabulary]`, overwritten with the gradient; `targets`: u32 `[rows]`, each in the vocabulary or
/// [`IGNORED`] for none; `losses`: f32 `[rows]`, overwritten, not scaled.
///
/// # Errors
/// If the device has failed.
pub fn cross_entropy_forward_backward(
    gpu: &Gpu,
    logits: SliceMut<'_>,
    targets: Slice<'_>,
    scale: f32,
    losses: SliceMut<'_>,
) -> Result<(), CudaError> {
    let vocabulary = vocabulary(logits.as_slice(), targets, losses.as_slice());
    let kernel = format!("cross_entropy_forward_backward_{}", logits.dtype().suffix());
    let args = [(&logits).into(), targets.into(), number(vocabulary), scale.into(), (&losses).into()];
    gpu.launch(&LOSS, &kernel, LaunchShape::linear(targets.len() as u32, THREADS), &args)
}

/// The losses of [`cross_entropy_forward_backward`] alone.
///
/// # Errors
/// If the device has failed.
pub fn cross_entropy_forward(
    gpu: &Gpu,
    logits: Slice<'_>,
    targets: Slice<'_>,
    losses: SliceMut<'_>,
) -> Result<(), CudaError> {
    let vocabulary = vocabulary(logits, targets, losses.as_slice());
    let kernel = format!("cross_entropy_forward_{}", logits.dtype().suffix());
    let args = [logits.into(), targets.into(), number(vocabulary), (&losses).into()];
    gpu.launch(&LOSS, &kernel, LaunchShape::linear(targets.len() as u32, THREADS), &args)
}

/// `out` (f32, one element) = the sum of `values` (f32), which is added up in double precision.
///
/// # Errors
/// If the device has failed.
pub fn sum_into(gpu: &Gpu, values: Slice<'_>, out: SliceMut<'_>) -> Result<(), CudaError> {
    assert!(out.len() == 1 && values.dtype() == DType::F32 && out.dtype() == DType::F32, "sum_into: shapes");
    let args = [values.into(), number(values.len()), (&out).into()];
    gpu.launch(&LOSS, "sum_into", LaunchShape::linear(1, SUM_THREADS), &args)
}

fn vocabulary(logits: Slice<'_>, targets: Slice<'_>, losses: Slice<'_>) -> usize {
    let vocabulary = logits.len().checked_div(targets.len()).unwrap_or(1);
    assert!(
        vocabulary * targets.len() == logits.len() && losses.len() == targets.len(),
        "cross_entropy: {} logits, {} targets, {} losses",
        logits.len(),
        targets.len(),
        losses.len()
    );
    assert!(targets.dtype() == DType::U32 && losses.dtype() == DType::F32, "cross_entropy: types");
    vocabulary
}
