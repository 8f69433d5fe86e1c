//! Host data on its way through the device: NCCL moves device memory.

use lina_cuda::cudarc::driver::result::{memcpy_dtoh_async, memcpy_htod_async};
use lina_cuda::{Buffer, CudaError, DType, PinnedBuffer, Stream};

/// Memory of the host, page-locked, and as much of the device, of which parts are copied either way.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) host: PinnedBuffer,
    device: Buffer,
    stream: Stream,
}

impl Stage {
    /// Room for `bytes` bytes, used in the order of `stream`.
    pub(super) fn new(stream: &Stream, bytes: usize) -> Result<Stage, CudaError> {
        let host = PinnedBuffer::zeros(stream.device(), bytes)?;
        let device = Buffer::new(stream, bytes.div_ceil(DType::U32.bytes()), DType::U32)?;
        Ok(Stage { host, device, stream: stream.clone() })
    }

    /// Bytes that fit.
    pub(super) fn capacity(&self) -> usize {
        self.host.len()
    }

    /// Device address of byte `start`.
    pub(super) fn address(&self, start: usize) -> u64 {
        self.device.whole().ptr() + start as u64
    }

    /// Enqueues the copy of bytes `start..end` to the device.
    ///
    /// # Safety
    /// The value must stay and the bytes unchanged until the copy has run.
    pub(super) unsafe fn upload(&self, start: usize, end: usize) -> Result<(), CudaError> {
        if start == end {
            return Ok(());
        }
        self.stream.device().bind()?;
        let bytes = &self.host[start..end];
        // SAFETY: both sides have as many bytes; the caller keeps them.
        let outcome = unsafe { memcpy_htod_async(self.address(start), bytes, self.stream.raw()) };
        outcome.map_err(|error| CudaError::Call { call: "cuMemcpyHtoDAsync", reason: error.to_string() })
    }

    /// Enqueues the copy of bytes `start..end` to the host.
    ///
    /// # Safety
    /// The value must stay and the bytes untouched until the copy has run.
    pub(super) unsafe fn download(&mut self, start: usize, end: usize) -> Result<(), CudaError> {
        if start == end {
            return Ok(());
        }
        self.stream.device().bind()?;
        let from = self.address(start);
        let bytes = &mut self.host[start..end];
        // SAFETY: both sides have as many bytes; the caller keeps them.
        let outcome = unsafe { memcpy_dtoh_async(bytes, from, self.stream.raw()) };
        outcome.map_err(|error| CudaError::Call { call: "cuMemcpyDtoHAsync", reason: error.to_string() })
    }
}

/// Bytes of values, one after another.
pub(super) fn write<const N: usize>(bytes: &mut [u8], values: impl Iterator<Item = [u8; N]>) {
    bytes.chunks_exact_mut(N).zip(values).for_each(|(place, value)| place.copy_from_slice(&value));
}
