//! Work that lasts as long as it would on a slower device, for emulated clusters: a stamp at its beginning, and at its end a
//! kernel that waits until enough time has passed since. Both run on the compute stream, so a device that is shared, or faster
//! than the emulated one, appears to each rank as that rank's own.

use cudarc::driver::sys::{self, CUfunction, CUmodule};

use crate::buffer::{Buffer, DType};
use crate::compile::{Module, compile_cached};
use crate::error::{CudaError, check};
use crate::gpu::Gpu;
use crate::launch::Arg;
use crate::stream::Stream;

/// The kernels.
pub static PACE: Module = Module::new("pace", include_str!("kernels/pace.cu"));

/// The beginning and the end of work on one stream. Its kernels are its own, so that it can live on without the [`Gpu`].
#[derive(Debug)]
pub struct Pace {
    stream: Stream,
    module: CUmodule,
    begin: CUfunction,
    hold: CUfunction,
    /// When the work under way began, in nanoseconds of the device's clock: a 64-bit number.
    stamp: Buffer,
}

// SAFETY: modules and functions are handles that CUDA lets any thread use.
unsafe impl Send for Pace {}

impl Pace {
    /// On the compute stream of `gpu`.
    ///
    /// # Errors
    /// If the kernels do not compile, or the device has failed.
    pub fn new(gpu: &Gpu) -> Result<Pace, CudaError> {
        gpu.device().bind()?;
        let cubin = compile_cached(&PACE, &gpu.device().architecture())?;
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is what NVRTC made, whole.
        check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&mut module, cubin.as_ptr().cast()) })?;
        let function = |name: &std::ffi::CStr| {
            let mut function = std::ptr::null_mut();
            // SAFETY: the module is loaded and the name ends in a null byte.
            let code = unsafe { sys::cuModuleGetFunction(&mut function, module, name.as_ptr()) };
            check("cuModuleGetFunction", code).map(|()| function)
        };
        let (begin, hold) = (function(c"pace_begin")?, function(c"pace_hold")?);
        Ok(Pace { stream: gpu.stream().clone(), module, begin, hold, stamp: gpu.zeros(2, DType::U32)? })
    }

    /// Work begins.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn begin(&mut self) -> Result<(), CudaError> {
        self.launch(self.begin, &[self.stamp.whole().into()])
    }

    /// The stream goes on at the earliest `duration_ns` nanoseconds after the last [`begin`](Self::begin).
    ///
    /// # Errors
    /// If the device has failed.
    pub fn hold(&mut self, duration_ns: u64) -> Result<(), CudaError> {
        self.launch(self.hold, &[self.stamp.whole().into(), duration_ns.into()])
    }

    /// Enqueues a kernel of one thread.
    fn launch(&self, function: CUfunction, args: &[Arg<'_>]) -> Result<(), CudaError> {
        self.stream.device().bind()?;
        let mut words = [0u64; 2];
        let mut addresses = [std::ptr::null_mut(); 2];
        for ((arg, word), address) in args.iter().zip(&mut words).zip(&mut addresses) {
            *address = arg.address(word);
        }
        // SAFETY: the module lives, and the addresses are of as many arguments as the kernel declares, of its types.
        check("cuLaunchKernel", unsafe {
            let (stream, args) = (self.stream.raw(), addresses.as_mut_ptr());
            sys::cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, args, std::ptr::null_mut())
        })
    }
}

impl Drop for Pace {
    fn drop(&mut self) {
        // Kernels under way still use the module.
        if self.stream.synchronize().is_ok() {
            // SAFETY: loaded once, and nothing of it runs any more.
            let _ = unsafe { sys::cuModuleUnload(self.module) };
        }
    }
}
