//! A mark in a stream that can be asked about from the host.

use cudarc::driver::sys::{self, CUevent, CUresult};

use crate::device::Device;
use crate::error::{CudaError, check};
use crate::stream::Stream;

/// An event with a time.
#[derive(Debug)]
pub struct Event {
    device: Device,
    event: CUevent,
}

// SAFETY: an event is a handle that CUDA lets any thread use.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event that has not been recorded; it counts as complete until then.
    ///
    /// # Errors
    /// If CUDA makes none.
    pub fn new(device: &Device) -> Result<Event, CudaError> {
        device.bind()?;
        let mut event = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT as u32;
        // SAFETY: the out-parameter is valid.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, flags) })?;
        Ok(Event { device: device.clone(), event })
    }

    /// Moves the event to the present end of `stream`.
    ///
    /// # Errors
    /// If the context is lost.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: both handles live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.event, stream.raw()) })
    }

    /// Whether the stream has come as far.
    ///
    /// # Errors
    /// What went wrong on the device before.
    pub fn query(&self) -> Result<bool, CudaError> {
        self.device.bind()?;
        // SAFETY: the handle lives.
        match unsafe { sys::cuEventQuery(self.event) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check("cuEventQuery", code).map(|()| true),
        }
    }

    /// Waits until the stream has come as far.
    ///
    /// # Errors
    /// What went wrong on the device before.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: the handle lives.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.event) })
    }

    /// Milliseconds from `earlier` to this event, both complete; with a resolution of about half a microsecond.
    ///
    /// # Errors
    /// If one of them is not complete.
    pub fn elapsed_ms_since(&self, earlier: &Event) -> Result<f32, CudaError> {
        self.device.bind()?;
        let mut ms = 0.0;
        // SAFETY: the out-parameter is valid and both handles live.
        check("cuEventElapsedTime", unsafe { sys::cuEventElapsedTime_v2(&mut ms, earlier.event, self.event) })?;
        Ok(ms)
    }

    /// CUDA's handle.
    pub fn raw(&self) -> CUevent {
        self.event
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made in `new`, dropped once; a pending record still completes.
            let _ = unsafe { sys::cuEventDestroy_v2(self.event) };
        }
    }
}
