//! A rank's GPU: its compute stream, its compiled kernels, and copies between host and device.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys;

use crate::buffer::{Buffer, DType, Element, Slice, SliceMut};
use crate::compile::Module;
use crate::device::Device;
use crate::error::{CudaError, check};
use crate::event::Event;
use crate::kernel::{Kernel, LoadedModule};
use crate::launch::{Arg, LaunchShape};
use crate::matmul::Blas;
use crate::staging::Staging;
use crate::stream::{Priority, Stream};
use crate::timeline::{Launch, Timeline};

/// A GPU as one thread of a rank uses it: everything is enqueued on one stream.
pub struct Gpu {
    stream: Stream,
    staging: RefCell<Staging>,
    modules: RefCell<HashMap<&'static str, Arc<LoadedModule>>>,
    /// By module and name.
    kernels: RefCell<HashMap<&'static str, HashMap<String, Kernel>>>,
    blas: OnceCell<Blas>,
    timeline: Timeline,
    /// Launches are noted instead of run.
    pub(crate) recording: Cell<bool>,
}

impl Gpu {
    /// The visible GPU number `ordinal`, with a stream of its own.
    ///
    /// # Errors
    /// If there is no driver or no such GPU.
    pub fn open(ordinal: usize) -> Result<Gpu, CudaError> {
        let stream = Stream::new(&Device::open(ordinal)?, Priority::Low)?;
        Ok(Gpu {
            staging: RefCell::new(Staging::new(&stream)?),
            stream,
            modules: RefCell::default(),
            kernels: RefCell::default(),
            blas: OnceCell::new(),
            timeline: Timeline::default(),
            recording: Cell::new(false),
        })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        self.stream.device()
    }

    /// The compute stream.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// The GPU's number among the visible ones.
    pub fn ordinal(&self) -> usize {
        self.device().facts().ordinal
    }

    /// Number of multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.device().facts().multiprocessors
    }

    /// Compute capability.
    pub fn compute_capability(&self) -> (u32, u32) {
        self.device().facts().compute_capability
    }

    /// Memory with whatever is in it.
    ///
    /// # Errors
    /// If the device's memory does not suffice.
    ///
    /// # Panics
    /// If launches are being recorded, which would allocate the memory wherever they are launched.
    pub fn uninit(&self, elements: usize, dtype: DType) -> Result<Buffer, CudaError> {
        assert!(elements == 0 || !self.recording.get(), "nothing is allocated while launches are recorded");
        Buffer::new(&self.stream, elements, dtype)
    }

    /// Zeros.
    ///
    /// # Errors
    /// If the device's memory does not suffice.
    pub fn zeros(&self, elements: usize, dtype: DType) -> Result<Buffer, CudaError> {
        let mut buffer = self.uninit(elements, dtype)?;
        self.fill_zero(buffer.whole_mut())?;
        Ok(buffer)
    }

    /// [`Buffer::grow`], of a buffer of this GPU.
    ///
    /// # Errors
    /// If the device's memory does not suffice.
    ///
    /// # Panics
    /// As [`uninit`](Self::uninit), if it has to grow.
    pub fn grow(&self, buffer: &mut Buffer, len: usize) -> Result<(), CudaError> {
        assert!(buffer.len() >= len || !self.recording.get(), "nothing is allocated while launches are recorded");
        buffer.grow(len)
    }

    /// Memory filled from the host, stored as `dtype`.
    ///
    /// # Errors
    /// If the device's memory does not suffice.
    pub fn buffer_from<E: Element>(&self, from: &[E], dtype: DType) -> Result<Buffer, CudaError> {
        let mut buffer = self.uninit(from.len(), dtype)?;
        self.upload(from, buffer.whole_mut())?;
        Ok(buffer)
    }

    /// Fills device memory from the host. `from` has been read when this returns; the copy is enqueued.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn upload<E: Element>(&self, from: &[E], to: SliceMut<'_>) -> Result<(), CudaError> {
        assert_eq!(from.len(), to.len(), "as many elements as there is room for");
        self.staging.borrow_mut().upload(from, to)
    }

    /// Reads device memory, once everything enqueued before has run.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn download<E: Element>(&self, from: Slice<'_>, to: &mut [E]) -> Result<(), CudaError> {
        assert_eq!(from.len(), to.len(), "as many elements as there is room for");
        self.staging.borrow_mut().download(from, to)
    }

    /// Two [downloads](Self::download) that are waited for together.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn download_both<A: Element, B: Element>(
        &self,
        first: (Slice<'_>, &mut [A]),
        second: (Slice<'_>, &mut [B]),
    ) -> Result<(), CudaError> {
        assert!(first.0.len() == first.1.len() && second.0.len() == second.1.len(), "as many elements as room");
        self.staging.borrow_mut().download_both(first, second)
    }

    /// As [`download`](Self::download), into a new vector.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn to_host<E: Element>(&self, from: Slice<'_>) -> Result<Vec<E>, CudaError> {
        let mut values = vec![E::default(); from.len()];
        self.download(from, &mut values)?;
        Ok(values)
    }

    /// Overwrites with zeros.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn fill_zero(&self, to: SliceMut<'_>) -> Result<(), CudaError> {
        if to.is_empty() {
            return Ok(());
        }
        self.device().bind()?;
        let bytes = to.len() * to.dtype().bytes();
        self.timed("clear", || {
            // SAFETY: the view is of as many bytes of device memory, exclusively borrowed.
            check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(to.ptr(), 0, bytes, self.stream.raw()) })
        })
    }

    /// Copies on the device.
    ///
    /// # Errors
    /// If the device has failed.
    ///
    /// # Panics
    /// If lengths or types differ.
    pub fn copy(&self, from: Slice<'_>, to: SliceMut<'_>) -> Result<(), CudaError> {
        assert_eq!((from.len(), from.dtype()), (to.len(), to.dtype()), "like is copied to like");
        if to.is_empty() {
            return Ok(());
        }
        self.device().bind()?;
        let bytes = to.len() * to.dtype().bytes();
        self.timed("copy", || {
            // SAFETY: both views are of as many bytes of device memory, and the destination is exclusively borrowed.
            check("cuMemcpyDtoDAsync", unsafe {
                sys::cuMemcpyDtoDAsync_v2(to.ptr(), from.ptr(), bytes, self.stream.raw())
            })
        })
    }

    /// Copies some columns of a matrix with rows of `width` elements to the same columns of another.
    ///
    /// # Errors
    /// If the device has failed.
    ///
    /// # Panics
    /// If lengths or types differ, or there are no such columns.
    pub fn copy_columns(
        &self,
        from: Slice<'_>,
        to: SliceMut<'_>,
        width: usize,
        columns: Range<usize>,
    ) -> Result<(), CudaError> {
        assert_eq!((from.len(), from.dtype()), (to.len(), to.dtype()), "like is copied to like");
        assert!(columns.end <= width && from.len().is_multiple_of(width), "{columns:?} of rows of {width} elements");
        if from.is_empty() || columns.is_empty() {
            return Ok(());
        }
        self.device().bind()?;
        let bytes = from.dtype().bytes();
        let skipped = columns.start * bytes;
        let device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: skipped,
            srcY: 0,
            srcMemoryType: device,
            srcHost: std::ptr::null(),
            srcDevice: from.ptr(),
            srcArray: std::ptr::null_mut(),
            srcPitch: width * bytes,
            dstXInBytes: skipped,
            dstY: 0,
            dstMemoryType: device,
            dstHost: std::ptr::null_mut(),
            dstDevice: to.ptr(),
            dstArray: std::ptr::null_mut(),
            dstPitch: width * bytes,
            WidthInBytes: columns.len() * bytes,
            Height: from.len() / width,
        };
        self.timed("copy columns", || {
            // SAFETY: both matrices have as many rows of as many bytes, and the destination is exclusively borrowed.
            check("cuMemcpy2DAsync", unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.stream.raw()) })
        })
    }

    /// From now on notes when each launch runs, at the price of two events around it.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn begin_timeline(&self) -> Result<(), CudaError> {
        self.timeline.begin(&self.stream)
    }

    /// Whether each launch is being noted.
    pub fn is_timed(&self) -> bool {
        self.timeline.is_running()
    }

    /// Stops noting, waits for what is enqueued, and returns what ran, in order.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn end_timeline(&self) -> Result<Vec<Launch>, CudaError> {
        self.timeline.end(&self.stream)
    }

    /// Enqueues something that no [`launch`](Self::launch) does.
    pub(crate) fn timed<R>(&self, name: &str, enqueue: impl FnOnce() -> Result<R, CudaError>) -> Result<R, CudaError> {
        self.timeline.around(&self.stream, name, enqueue)
    }

    /// Waits until everything enqueued has run.
    ///
    /// # Errors
    /// The first error of what was enqueued.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.stream.synchronize()
    }

    /// A new event.
    ///
    /// # Errors
    /// If CUDA makes none.
    pub fn event(&self) -> Result<Event, CudaError> {
        Event::new(self.device())
    }

    /// Enqueues a kernel of `module`, with arguments of the types that it declares. An empty grid is ordinary: nothing runs.
    ///
    /// # Errors
    /// If the module does not compile, or the device has failed.
    ///
    /// # Panics
    /// If the module has no such kernel.
    pub fn launch(
        &self,
        module: &'static Module,
        kernel: &str,
        shape: LaunchShape,
        args: &[Arg<'_>],
    ) -> Result<(), CudaError> {
        if shape.grid.contains(&0) {
            return Ok(());
        }
        let mut kernels = self.kernels.borrow_mut();
        let of_module = kernels.entry(module.name).or_default();
        // Looked up by a borrowed name first: a launch allocates nothing once its kernel is known.
        if !of_module.contains_key(kernel) {
            of_module.insert(kernel.to_owned(), self.kernel(module, kernel)?);
        }
        let kernel = of_module.get_mut(kernel).expect("it is there by now");
        kernel.allow_shared(shape.shared_bytes)?;
        self.timeline.around(&self.stream, kernel.name(), || kernel.launch(&self.stream, shape, args))
    }

    /// A kernel of `module`, to launch it on other streams.
    ///
    /// # Errors
    /// If the module does not compile, or the device has failed.
    ///
    /// # Panics
    /// If the module has no such kernel.
    pub fn kernel(&self, module: &'static Module, name: &str) -> Result<Kernel, CudaError> {
        let mut modules = self.modules.borrow_mut();
        let loaded = match modules.entry(module.name) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                entry.insert(Arc::new(LoadedModule::new(self.device(), module, &self.device().architecture())?))
            }
        };
        Kernel::new(loaded, name)
    }

    /// The products of cuBLASLt.
    pub(crate) fn blas(&self) -> Result<&Blas, CudaError> {
        if let Some(blas) = self.blas.get() {
            return Ok(blas);
        }
        let blas = Blas::new(&self.stream)?;
        Ok(self.blas.get_or_init(|| blas))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Kernels under way still use what is dropped now; a failure has been told to whoever waited for them.
        let _ = self.stream.synchronize();
    }
}
