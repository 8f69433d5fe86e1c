//! A GPU and its primary context, shared by the threads and streams of a process.

use std::cell::Cell;
use std::ffi::c_int;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute as Attribute, CUmemoryPool, CUresult};

use crate::error::{CudaError, check};

/// Oldest driver interface that will do: CUDA 12.8 knows everything that is called here.
const NEEDED_DRIVER: i32 = 12080;

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Its number among the visible GPUs.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Compute capability.
    pub compute_capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Most shared memory of a block, for kernels that ask for it.
    pub shared_bytes_per_block: usize,
    /// Its memory.
    pub total_bytes: usize,
}

/// Oldest compute capability that kernels are written for: the first with bf16.
const NEEDED_CAPABILITY: (u32, u32) = (8, 0);

impl DeviceFacts {
    /// Refuses a GPU that has not got what kernels need.
    fn check(&self) -> Result<(), CudaError> {
        if self.compute_capability >= NEEDED_CAPABILITY {
            return Ok(());
        }
        let ((major, minor), (needed, _)) = (self.compute_capability, NEEDED_CAPABILITY);
        Err(CudaError::Unsupported(format!(
            "GPU {} ({}) has compute capability {major}.{minor}, expected {needed}.0 or later",
            self.ordinal, self.name
        )))
    }
}

#[derive(Debug)]
struct Inner {
    facts: DeviceFacts,
    device: CUdevice,
    context: CUcontext,
    pool: CUmemoryPool,
}

// SAFETY: contexts and pools are handles that CUDA lets any thread use.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

/// Refuses a library of CUDA of a later major version than a driver's, as `Device::driver_version` has it: its calls,
/// and kernels that it compiles, would fail with codes that do not say so.
pub(crate) fn check_library(library: &'static str, version: (i32, i32), driver: i32) -> Result<(), CudaError> {
    if version.0 > driver / 1000 {
        return Err(CudaError::LibraryTooNew { library, version, driver });
    }
    Ok(())
}

/// A GPU; clones share it.
#[derive(Clone, Debug)]
pub struct Device(Arc<Inner>);

thread_local! {
    static CURRENT: Cell<CUcontext> = const { Cell::new(std::ptr::null_mut()) };
}

impl Device {
    /// Version of CUDA that the driver supports, 1000 times the major plus 10 times the minor number.
    ///
    /// # Errors
    /// If there is no driver.
    pub fn driver_version() -> Result<i32, CudaError> {
        // SAFETY: looks for a file and loads it.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoLibrary {
                library: "libcuda.so",
                hint: "an NVIDIA driver (nvidia-smi shows whether one is installed)",
            });
        }
        let mut version = 0;
        // SAFETY: the out-parameter is valid.
        check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
        Ok(version)
    }

    /// Number of visible GPUs.
    ///
    /// # Errors
    /// If there is no driver, or it is too old.
    pub fn count() -> Result<usize, CudaError> {
        let found = Device::driver_version()?;
        if found < NEEDED_DRIVER {
            return Err(CudaError::DriverTooOld { found, needed: NEEDED_DRIVER });
        }
        // SAFETY: takes no pointer.
        match unsafe { sys::cuInit(0) } {
            sys::CUresult::CUDA_ERROR_NO_DEVICE => return Ok(0),
            code => check("cuInit", code)?,
        }
        let mut count = 0;
        // SAFETY: the out-parameter is valid.
        check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
        Ok(count as usize)
    }

    /// The visible GPU number `ordinal`.
    ///
    /// # Errors
    /// If there is no driver or no such GPU.
    pub fn open(ordinal: usize) -> Result<Device, CudaError> {
        let count = Device::count()?;
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let mut device = 0;
        // SAFETY: the out-parameter is valid and the ordinal is one of the counted.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut device, ordinal as c_int) })?;
        let facts = facts(device, ordinal)?;
        facts.check()?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the out-parameter is valid; `Inner` releases the context.
        match unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) } {
            code @ (CUresult::CUDA_ERROR_OUT_OF_MEMORY | CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE) => {
                return Err(CudaError::Unsupported(format!(
                    "GPU {ordinal} ({}) takes no program at present ({code:?}), expected one with free memory that is not \
                     kept for another program; nvidia-smi shows who uses it",
                    facts.name
                )));
            }
            code => check("cuDevicePrimaryCtxRetain", code)?,
        }
        let mut pool = std::ptr::null_mut();
        // SAFETY: the out-parameter is valid.
        check("cuDeviceGetDefaultMemPool", unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, device) })?;
        // What is freed stays in the pool: to give it back to the system would wait for the device.
        let mut keep = u64::MAX;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: this attribute is a 64-bit number.
        check("cuMemPoolSetAttribute", unsafe { sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut keep).cast()) })?;
        Ok(Device(Arc::new(Inner { facts, device, context, pool })))
    }

    /// What the GPU is.
    pub fn facts(&self) -> &DeviceFacts {
        &self.0.facts
    }

    /// What kernels are compiled for: on Hopper with its own instructions, which later GPUs do not have.
    pub fn architecture(&self) -> String {
        match self.facts().compute_capability {
            (9, 0) => "sm_90a".to_owned(),
            (major, minor) => format!("sm_{major}{minor}"),
        }
    }

    /// The memory pool that buffers come from.
    pub(crate) fn pool(&self) -> CUmemoryPool {
        self.0.pool
    }

    /// Makes this GPU's context the current one of the calling thread. Every call of this crate does so itself; who calls
    /// a CUDA library directly does so first.
    ///
    /// # Errors
    /// If the context is lost.
    pub fn bind(&self) -> Result<(), CudaError> {
        CURRENT.with(|current| {
            if current.get() != self.0.context {
                // SAFETY: the context is retained for as long as `self` lives.
                check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.0.context) })?;
                current.set(self.0.context);
            }
            Ok(())
        })
    }

    /// Bytes free and in all.
    ///
    /// # Errors
    /// If the context is lost.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the out-parameters are valid.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free, total))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        CURRENT.with(|current| current.set(std::ptr::null_mut()));
        // SAFETY: retained once in `open`. A failure leaves nothing to be done.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

fn facts(device: CUdevice, ordinal: usize) -> Result<DeviceFacts, CudaError> {
    let attribute = |attribute: Attribute| {
        let mut value = 0;
        // SAFETY: the out-parameter is valid.
        check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
        Ok(value as u32)
    };
    let mut name = [0u8; 256];
    // SAFETY: the driver writes at most as many bytes as it is told.
    check("cuDeviceGetName", unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as c_int, device) })?;
    let name = std::ffi::CStr::from_bytes_until_nul(&name).map(|name| name.to_string_lossy().into_owned());
    let mut total_bytes = 0;
    // SAFETY: the out-parameter is valid.
    check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&mut total_bytes, device) })?;
    Ok(DeviceFacts {
        ordinal,
        name: name.unwrap_or_default(),
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        total_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_of_a_later_cuda_than_the_drivers_are_refused() {
        assert_eq!(check_library("NVRTC", (13, 1), 13000), Ok(()));
        assert_eq!(check_library("NVRTC", (12, 9), 13000), Ok(()));
        let refused = check_library("NVRTC", (13, 0), 12080).unwrap_err();
        let expected = "NVRTC 13.0 needs a driver for CUDA 13, found one for CUDA 12.8; update the driver or take the \
                        libraries of CUDA 12";
        assert_eq!(refused.to_string(), expected);
    }
}
