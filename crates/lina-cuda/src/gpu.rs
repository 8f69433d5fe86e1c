//! A rank's GPU: its compute stream, its compiled kernels, and copies between host and device.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::collections::hash_map::Entry;

use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute as Attribute, CUmodule};

use crate::buffer::{Buffer, DType, Element, Slice, SliceMut};
use crate::compile::{Module, compile_cached};
use crate::device::Device;
use crate::error::{CudaError, check};
use crate::event::Event;
use crate::launch::{Arg, LaunchShape};
use crate::matmul::Blas;
use crate::staging::Staging;
use crate::stream::{Priority, Stream};

/// Shared memory that a kernel may have without asking for more.
const SHARED_BYTES: u32 = 48 << 10;

/// A kernel, and the dynamic shared memory that it may have.
#[derive(Clone, Copy)]
struct Kernel {
    function: CUfunction,
    shared_bytes: u32,
}

/// A GPU as one thread of a rank uses it: everything is enqueued on one stream.
pub struct Gpu {
    stream: Stream,
    staging: RefCell<Staging>,
    modules: RefCell<HashMap<&'static str, CUmodule>>,
    kernels: RefCell<HashMap<(&'static str, String), Kernel>>,
    blas: OnceCell<Blas>,
}

// SAFETY: CUDA's handles may be used from any thread, and `Gpu` is used from one at a time.
unsafe impl Send for Gpu {}

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

    /// Number of multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.device().facts().multiprocessors
    }

    /// Compute capability.
    pub fn compute_capability(&self) -> (u32, u32) {
        self.device().facts().compute_capability
    }

    /// What kernels are compiled for: on Hopper with its own instructions, which later GPUs do not have.
    pub fn architecture(&self) -> String {
        match self.compute_capability() {
            (9, 0) => "sm_90a".to_owned(),
            (major, minor) => format!("sm_{major}{minor}"),
        }
    }

    /// Memory with whatever is in it.
    ///
    /// # Errors
    /// If the device's memory does not suffice.
    pub fn uninit(&self, elements: usize, dtype: DType) -> Result<Buffer, CudaError> {
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
        // SAFETY: the view is of as many bytes of device memory, exclusively borrowed.
        check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(to.ptr(), 0, bytes, self.stream.raw()) })
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
        // SAFETY: both views are of as many bytes of device memory, and the destination is exclusively borrowed.
        check("cuMemcpyDtoDAsync", unsafe { sys::cuMemcpyDtoDAsync_v2(to.ptr(), from.ptr(), bytes, self.stream.raw()) })
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
        self.device().bind()?;
        let function = self.kernel(module, kernel, shape.shared_bytes)?;
        let mut words = [0u64; MAX_ARGS];
        let mut addresses = [std::ptr::null_mut(); MAX_ARGS];
        assert!(args.len() <= MAX_ARGS, "a kernel has at most {MAX_ARGS} arguments");
        for ((arg, word), address) in args.iter().zip(&mut words).zip(&mut addresses) {
            *address = arg.address(word);
        }
        let [x, y, z] = shape.grid;
        // SAFETY: the function lives with its module, and the addresses are of as many arguments, which the caller gives the
        // types that the kernel declares; kernels keep within the views that they are given.
        check("cuLaunchKernel", unsafe {
            let stream = self.stream.raw();
            let args = addresses.as_mut_ptr();
            sys::cuLaunchKernel(function, x, y, z, shape.block, 1, 1, shape.shared_bytes, stream, args, std::ptr::null_mut())
        })
        .map_err(|error| match error {
            CudaError::Call { call, reason } => {
                CudaError::Call { call, reason: format!("{reason} (kernel {kernel}, {shape:?})") }
            }
            error => error,
        })
    }

    /// The products of cuBLASLt.
    pub(crate) fn blas(&self) -> Result<&Blas, CudaError> {
        if let Some(blas) = self.blas.get() {
            return Ok(blas);
        }
        let blas = Blas::new(&self.stream)?;
        Ok(self.blas.get_or_init(|| blas))
    }

    fn kernel(&self, module: &'static Module, name: &str, shared_bytes: u32) -> Result<CUfunction, CudaError> {
        let mut kernels = self.kernels.borrow_mut();
        let kernel = match kernels.entry((module.name, name.to_owned())) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let loaded = self.module(module)?;
                let symbol = std::ffi::CString::new(name).expect("kernels' names have no null bytes");
                let mut function = std::ptr::null_mut();
                // SAFETY: the module is loaded and the name ends in a null byte.
                let code = unsafe { sys::cuModuleGetFunction(&mut function, loaded, symbol.as_ptr()) };
                assert_ne!(code, sys::CUresult::CUDA_ERROR_NOT_FOUND, "module {} has kernel {name}", module.name);
                check("cuModuleGetFunction", code)?;
                entry.insert(Kernel { function, shared_bytes: SHARED_BYTES })
            }
        };
        if shared_bytes > kernel.shared_bytes {
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function lives.
            check("cuFuncSetAttribute", unsafe {
                sys::cuFuncSetAttribute(kernel.function, attribute, shared_bytes as i32)
            })?;
            kernel.shared_bytes = shared_bytes;
        }
        Ok(kernel.function)
    }

    fn module(&self, module: &'static Module) -> Result<CUmodule, CudaError> {
        if let Some(&loaded) = self.modules.borrow().get(module.name) {
            return Ok(loaded);
        }
        let cubin = compile_cached(module, &self.architecture())?;
        let mut loaded = std::ptr::null_mut();
        // SAFETY: the image is what NVRTC made, whole.
        check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&mut loaded, cubin.as_ptr().cast()) })?;
        self.modules.borrow_mut().insert(module.name, loaded);
        Ok(loaded)
    }
}

/// Most arguments of a kernel.
const MAX_ARGS: usize = 32;

impl Drop for Gpu {
    fn drop(&mut self) {
        // Kernels under way still use their modules.
        if self.stream.synchronize().is_ok() {
            for (_, module) in self.modules.get_mut().drain() {
                // SAFETY: loaded once, and nothing of it runs any more.
                let _ = unsafe { sys::cuModuleUnload(module) };
            }
        }
    }
}
