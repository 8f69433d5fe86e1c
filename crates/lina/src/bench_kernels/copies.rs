//! Copies between pinned host memory and the device, alone and while it computes.

use lina_cuda::cudarc::driver::result::memcpy_dtoh_async;
use lina_cuda::{CudaError, PinnedBuffer, measure_slot_copy};

use super::meter::{HOST, HOST_COPY_BYTES, Meter, Work, mib};
use super::{EXPERT_HIDDEN, HIDDEN};

/// Time of the computation beside which experts are copied, about.
const COMPUTE_MS: f64 = 20.0;

pub(super) fn measure(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    to_host(meter)?;
    // The three matrices of an expert lie one after another, in host memory as in a slot.
    let expert = meter.bytes(3 * EXPERT_HIDDEN * HIDDEN);
    let rates = measure_slot_copy(meter.gpu, expert, COMPUTE_MS)?;
    meter.host_copy("expert to its slot", expert, rates.alone_bytes_per_s);
    meter.host_copy("  beside computation", expert, rates.beside_bytes_per_s);
    meter.beside_copies("  the computation, bfloat16 products", rates.compute_beside_ms, rates.compute_ms);
    Ok(())
}

/// The ceiling's copy, the other way.
fn to_host(meter: &mut Meter<'_>) -> Result<(), CudaError> {
    let gpu = meter.gpu;
    let mut host = PinnedBuffer::zeros(gpu.device(), HOST_COPY_BYTES)?;
    let device = meter.zeros(HOST_COPY_BYTES / meter.dtype.bytes())?;
    meter.measure(HOST, "device to host", mib(HOST_COPY_BYTES), Work::HostBytes(HOST_COPY_BYTES), || {
        // SAFETY: both have as many bytes and live until the measurement has waited; nobody reads the host's meanwhile.
        unsafe { memcpy_dtoh_async(&mut host[..], device.whole().ptr(), gpu.stream().raw()) }
            .map_err(|error| CudaError::Call { call: "cuMemcpyDtoHAsync", reason: format!("{error:?}") })
    })
}
