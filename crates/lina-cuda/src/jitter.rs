//! Multiplicative noise on the gate's input (Fedus et al., "Switch Transformers", 2021), computed again in backward
//! rather than kept: each factor is a hash of where it belongs, the same as on a processor.

use crate::buffer::SliceMut;
use crate::compile::Module;
use crate::elementwise::{THREADS, kernel_name, number, pack_len};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::LaunchShape;

pub(crate) static JITTER: Module =
    Module::new("jitter", concat!(include_str!("kernels/pack.cuh"), include_str!("kernels/jitter.cu")));

/// Multiplies each element of `values` (`[tokens, width]`) by a number in `1 - amplitude ..= 1 + amplitude` that
/// depends on `stream` (a hash of seed, step and layer), the token's index in the step (that of the first one is
/// `token_offset`) and the column.
///
/// # Errors
/// If the device has failed.
pub fn apply(
    gpu: &Gpu,
    values: SliceMut<'_>,
    width: usize,
    amplitude: f32,
    stream: u64,
    token_offset: u64,
) -> Result<(), CudaError> {
    assert!(values.len().is_multiple_of(width), "jitter: {} elements are not rows of {width}", values.len());
    let pack = pack_len(values.dtype(), width, &[values.ptr()]);
    let packs = values.len() / pack;
    let args = [(&values).into(), number(width), amplitude.into(), stream.into(), token_offset.into(), number(packs)];
    gpu.launch(&JITTER, &kernel_name("jitter", values.dtype(), pack), LaunchShape::covering(packs, THREADS), &args)
}
