//! A queue of work on a device; what is enqueued runs in order.

use std::sync::Arc;

use cudarc::driver::sys::{self, CUstream};

use crate::device::Device;
use crate::error::{CudaError, check};
use crate::event::Event;

/// Whose kernels go first where several streams have some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// Everything else.
    Low,
    /// What others wait for.
    High,
}

#[derive(Debug)]
struct Inner {
    device: Device,
    stream: CUstream,
}

// SAFETY: a stream is a handle that CUDA lets any thread use.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made in `Stream::new` and nobody holds it any more; work under way still completes.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.stream) };
        }
    }
}

/// A stream; clones are the same one.
#[derive(Clone, Debug)]
pub struct Stream(Arc<Inner>);

impl Stream {
    /// A new stream, which waits for no other.
    ///
    /// # Errors
    /// If CUDA makes none.
    pub fn new(device: &Device, priority: Priority) -> Result<Stream, CudaError> {
        device.bind()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: the out-parameters are valid.
        check("cuCtxGetStreamPriorityRange", unsafe { sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest) })?;
        let priority = if priority == Priority::High { greatest } else { least };
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let mut stream = std::ptr::null_mut();
        // SAFETY: the out-parameter is valid.
        check("cuStreamCreate", unsafe { sys::cuStreamCreateWithPriority(&mut stream, flags, priority) })?;
        Ok(Stream(Arc::new(Inner { device: device.clone(), stream })))
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// CUDA's handle.
    pub fn raw(&self) -> CUstream {
        self.0.stream
    }

    /// A new event of the device.
    ///
    /// # Errors
    /// If CUDA makes none.
    pub fn event(&self) -> Result<Event, CudaError> {
        Event::new(&self.0.device)
    }

    /// Waits until everything enqueued has run.
    ///
    /// # Errors
    /// The first error of what was enqueued.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.0.device.bind()?;
        // SAFETY: the stream lives.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.0.stream) })
    }

    /// What is enqueued from here on waits for `event`.
    ///
    /// # Errors
    /// If the context is lost.
    pub fn wait(&self, event: &Event) -> Result<(), CudaError> {
        self.0.device.bind()?;
        // SAFETY: both handles live.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.0.stream, event.raw(), 0) })
    }
}
