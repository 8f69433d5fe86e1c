//! A compiled kernel, and its launch.

use std::sync::Arc;

use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute as Attribute, CUmodule};

use crate::compile::{Module, compile_cached, nvrtc_version};
use crate::device::{Device, check_library};
use crate::error::{CudaError, check};
use crate::launch::{Arg, LaunchShape};
use crate::stream::Stream;

/// Most arguments of a kernel.
const MAX_ARGS: usize = 32;

/// Shared memory that a kernel may have without asking for more.
const SHARED_BYTES: u32 = 48 << 10;

/// The kernels of one module, on a device.
#[derive(Debug)]
pub(crate) struct LoadedModule {
    device: Device,
    name: &'static str,
    module: CUmodule,
}

// SAFETY: a module is a handle that CUDA lets any thread use.
unsafe impl Send for LoadedModule {}
// SAFETY: as above.
unsafe impl Sync for LoadedModule {}

impl LoadedModule {
    pub(crate) fn new(device: &Device, module: &Module, architecture: &str) -> Result<Self, CudaError> {
        check_library("NVRTC", nvrtc_version()?, Device::driver_version()?)?;
        let cubin = compile_cached(module, architecture)?;
        device.bind()?;
        let mut loaded = std::ptr::null_mut();
        // SAFETY: the image is what NVRTC made, whole; from the cache comes only what has the length and hash that it was
        // written with.
        check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&mut loaded, cubin.as_ptr().cast()) })?;
        Ok(LoadedModule { device: device.clone(), name: module.name, module: loaded })
    }
}

impl Drop for LoadedModule {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: loaded once; the driver waits for kernels of the module that still run.
            let _ = unsafe { sys::cuModuleUnload(self.module) };
        }
    }
}

/// A kernel that can be launched on any stream of its device.
#[derive(Clone, Debug)]
pub struct Kernel {
    module: Arc<LoadedModule>,
    name: String,
    function: CUfunction,
    /// Dynamic shared memory that it may have.
    shared_bytes: u32,
}

// SAFETY: a function is a handle that CUDA lets any thread use.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Kernel {
    /// # Panics
    /// If the module has no such kernel.
    pub(crate) fn new(module: &Arc<LoadedModule>, name: &str) -> Result<Self, CudaError> {
        module.device.bind()?;
        let symbol = std::ffi::CString::new(name).expect("kernels' names have no null bytes");
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded and the name ends in a null byte.
        let code = unsafe { sys::cuModuleGetFunction(&mut function, module.module, symbol.as_ptr()) };
        assert_ne!(code, sys::CUresult::CUDA_ERROR_NOT_FOUND, "module {} has no kernel {name}", module.name);
        check("cuModuleGetFunction", code)?;
        let mut fixed_bytes = 0;
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        // SAFETY: the out-parameter is valid, and the function lives with its module.
        check("cuFuncGetAttribute", unsafe { sys::cuFuncGetAttribute(&mut fixed_bytes, attribute, function) })?;
        let shared_bytes = SHARED_BYTES.saturating_sub(fixed_bytes as u32);
        Ok(Kernel { module: Arc::clone(module), name: name.to_owned(), function, shared_bytes })
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Lets launches have that much dynamic shared memory.
    pub(crate) fn allow_shared(&mut self, shared_bytes: u32) -> Result<(), CudaError> {
        if shared_bytes > self.shared_bytes {
            self.module.device.bind()?;
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function lives with its module.
            check("cuFuncSetAttribute", unsafe {
                sys::cuFuncSetAttribute(self.function, attribute, shared_bytes as i32)
            })?;
            self.shared_bytes = shared_bytes;
        }
        Ok(())
    }

    /// Enqueues the kernel on `stream`, with arguments of the types that it declares. An empty grid is ordinary: nothing runs.
    ///
    /// # Errors
    /// If the device has failed, or cannot run such blocks.
    pub fn launch(&self, stream: &Stream, shape: LaunchShape, args: &[Arg<'_>]) -> Result<(), CudaError> {
        if shape.grid.contains(&0) {
            return Ok(());
        }
        stream.device().bind()?;
        assert!(args.len() <= MAX_ARGS, "a kernel has at most {MAX_ARGS} arguments");
        let mut words = [0u64; MAX_ARGS];
        let mut addresses = [std::ptr::null_mut(); MAX_ARGS];
        for ((arg, word), address) in args.iter().zip(&mut words).zip(&mut addresses) {
            *address = arg.address(word);
        }
        let [x, y, z] = shape.grid;
        // SAFETY: the function lives with its module, and the addresses are of as many arguments, which the caller gives the
        // types that the kernel declares; kernels keep within the views that they are given.
        check("cuLaunchKernel", unsafe {
            let (stream, args, no_extra) = (stream.raw(), addresses.as_mut_ptr(), std::ptr::null_mut());
            sys::cuLaunchKernel(self.function, x, y, z, shape.block, 1, 1, shape.shared_bytes, stream, args, no_extra)
        })
        .map_err(|error| match error {
            CudaError::Call { call, reason } => {
                CudaError::Call { call, reason: format!("{reason} (kernel {}, {shape:?})", self.name) }
            }
            error => error,
        })
    }
}
