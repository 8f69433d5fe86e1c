//! A stretch of launches that is recorded once and enqueued as one: the host's part of a launch, and the pause between two
//! kernels, are most of what a step of few tokens takes.

use cudarc::driver::sys::{self, CUgraphExec};

use crate::error::{CudaError, check};
use crate::gpu::Gpu;
use crate::stream::Stream;

/// Launches on their way to one stream, with the operands that they were recorded with: what these were must live, and lie
/// where it lay, whenever the graph is launched.
#[derive(Debug)]
pub struct Graph {
    stream: Stream,
    executable: CUgraphExec,
}

impl Graph {
    /// Enqueues the launches.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn launch(&self) -> Result<(), CudaError> {
        self.stream.device().bind()?;
        // SAFETY: the graph and the stream live; that its operands do is what whoever recorded it answers for.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.executable, self.stream.raw()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.stream.device().bind().is_ok() {
            // SAFETY: instantiated once, destroyed once; CUDA waits for launches under way.
            let _ = unsafe { sys::cuGraphExecDestroy(self.executable) };
        }
    }
}

impl Gpu {
    /// From now on what this thread enqueues does not run but is noted, until [`end_recording`](Self::end_recording). What
    /// loads a kernel, allocates or waits cannot be noted: the same has to have run once before. Nor can what reads or writes
    /// host memory, which would be read and written whenever the launches are.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn begin_recording(&self) -> Result<(), CudaError> {
        self.device().bind()?;
        // Other threads may allocate and wait meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(self.stream().raw(), mode) })?;
        self.recording.set(true);
        Ok(())
    }

    /// What was noted.
    ///
    /// # Errors
    /// If something was enqueued that cannot be noted, or memory does not suffice.
    pub fn end_recording(&self) -> Result<Graph, CudaError> {
        self.recording.set(false);
        self.device().bind()?;
        let mut graph = std::ptr::null_mut();
        // SAFETY: the out-parameter is valid, and the stream lives.
        check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(self.stream().raw(), &mut graph) })?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: the out-parameter is valid, and the graph lives until it is destroyed below.
        let code = unsafe { sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0) };
        // SAFETY: the executable graph is a copy.
        check("cuGraphDestroy", unsafe { sys::cuGraphDestroy(graph) })?;
        check("cuGraphInstantiate", code)?;
        Ok(Graph { stream: self.stream().clone(), executable })
    }
}
