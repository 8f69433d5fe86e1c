//! Host memory that the device copies from and to by itself.

use std::ops::{Deref, DerefMut};

use cudarc::driver::sys::{self, CUresult};

use crate::device::Device;
use crate::error::{CudaError, check};

/// Page-locked bytes.
#[derive(Debug)]
pub struct PinnedBuffer {
    device: Device,
    ptr: *mut u8,
    len: usize,
}

// SAFETY: the memory belongs to this value, and any thread may use it.
unsafe impl Send for PinnedBuffer {}
// SAFETY: shared references only read.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// `len` zeros.
    ///
    /// # Errors
    /// If the host has no more memory to lock.
    pub fn zeros(device: &Device, len: usize) -> Result<PinnedBuffer, CudaError> {
        device.bind()?;
        let mut ptr = std::ptr::null_mut();
        // SAFETY: the out-parameter is valid; at least one byte is asked for.
        match unsafe { sys::cuMemHostAlloc(&mut ptr, len.max(1), 0) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Err(CudaError::HostOutOfMemory { needed: len }),
            code => check("cuMemHostAlloc", code)?,
        }
        let ptr = ptr.cast::<u8>();
        // SAFETY: as many bytes were allocated.
        unsafe { ptr.write_bytes(0, len) };
        Ok(PinnedBuffer { device: device.clone(), ptr, len })
    }

    /// Where devices find it, too: addresses are unified.
    pub fn address(&self) -> u64 {
        self.ptr as u64
    }
}

impl Deref for PinnedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes that this value owns.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl DerefMut for PinnedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: `len` initialised bytes that this value owns, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated in `zeros`, freed once; CUDA waits for what the device does with it.
            let _ = unsafe { sys::cuMemFreeHost(self.ptr.cast()) };
        }
    }
}
