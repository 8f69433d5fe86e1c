//! What can go wrong between a program and its GPU, each in one sentence that says what to do.

use cudarc::driver::sys::{self, CUresult};
use thiserror::Error;

/// A failure of CUDA or of what it needs.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CudaError {
    /// A shared library is not there.
    #[error("{library} cannot be loaded, expected {hint}")]
    NoLibrary {
        /// File name without version.
        library: &'static str,
        /// Where it usually comes from.
        hint: &'static str,
    },
    /// The driver is older than what the program is made for.
    #[error("the NVIDIA driver supports CUDA {}.{}, expected {}.{} or later; update the driver", .found / 1000, .found % 1000 / 10, .needed / 1000, .needed % 1000 / 10)]
    DriverTooOld {
        /// Version of the driver's interface, as CUDA numbers it.
        found: i32,
        /// Oldest that will do.
        needed: i32,
    },
    /// One of CUDA's libraries is of a later major version than the driver.
    #[error("{library} {}.{} needs a driver for CUDA {}, found one for CUDA {}.{}; update the driver or take the libraries of CUDA {}", .version.0, .version.1, .version.0, .driver / 1000, .driver % 1000 / 10, .driver / 1000)]
    LibraryTooNew {
        /// Its name.
        library: &'static str,
        /// Its major and minor version.
        version: (i32, i32),
        /// Version of the driver's interface, as CUDA numbers it.
        driver: i32,
    },
    /// There is no such GPU.
    #[error("GPU {ordinal} is not there, found {count} GPU(s); CUDA_VISIBLE_DEVICES says which are visible")]
    NoDevice {
        /// Which was wanted.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The device's memory does not suffice.
    #[error(
        "GPU {ordinal} is out of memory: {} MiB more were needed, {} of {} MiB are free; use a smaller batch or model, or \
         more ranks", .needed >> 20, .free >> 20, .total >> 20
    )]
    OutOfMemory {
        /// Which GPU.
        ordinal: usize,
        /// Bytes asked for.
        needed: usize,
        /// Bytes free.
        free: usize,
        /// Bytes that the GPU has.
        total: usize,
    },
    /// The host's memory does not suffice.
    #[error(
        "the host cannot lock {} MiB of memory that the GPU copies from and to; free memory, or use a smaller model or more \
         ranks", .needed.div_ceil(1 << 20)
    )]
    HostOutOfMemory {
        /// Bytes asked for.
        needed: usize,
    },
    /// A kernel does not compile for this GPU.
    #[error("CUDA module `{module}` does not compile for {architecture}: {log}")]
    Compile {
        /// Name of the module.
        module: &'static str,
        /// As NVRTC calls it.
        architecture: String,
        /// What NVRTC said.
        log: String,
    },
    /// A size or type that no kernel takes.
    #[error("{0}")]
    Unsupported(String),
    /// A call failed.
    #[error("{call} failed: {reason}")]
    Call {
        /// The function.
        call: &'static str,
        /// Name of the code, and what it means.
        reason: String,
    },
}

/// The outcome of a driver call.
pub(crate) fn check(call: &'static str, code: CUresult) -> Result<(), CudaError> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: the out-parameter is valid; the driver answers with a static string, or leaves null.
    let found = unsafe { sys::cuGetErrorString(code, &mut text) };
    let reason = if found == CUresult::CUDA_SUCCESS && !text.is_null() {
        // SAFETY: the driver's strings are static and end in a null byte.
        let text = unsafe { std::ffi::CStr::from_ptr(text) };
        format!("{code:?}, {}", text.to_string_lossy())
    } else {
        format!("{code:?}")
    };
    Err(CudaError::Call { call, reason })
}
