//! A GPU and its primary context, shared by the threads and streams of a process.

use std::cell::Cell;
use std::ffi::c_int;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute as Attribute, CUmemoryPool};

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
    /// Its memory.
    pub total_bytes: usize,
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
        let mut context = std::ptr::null_mut();
        // SAFETY: the out-parameter is valid; `Inner` releases the context.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) })?;
        let mut pool = std::ptr::null_mut();
        // SAFETY: the out-parameter is valid.
        check("cuDeviceGetDefaultMemPool", unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, device) })?;
        // What is freed stays in the pool: to give it back to the system would wait for the device.
        let mut keep = u64::MAX;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: this attribute is a 64-bit number.
        check("cuMemPoolSetAttribute", unsafe { sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut keep).cast()) })?;
        let facts = facts(device, ordinal)?;
        Ok(Device(Arc::new(Inner { facts, device, context, pool })))
    }

    /// What the GPU is.
    pub fn facts(&self) -> &DeviceFacts {
        &self.0.facts
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
        total_bytes,
    })
}
