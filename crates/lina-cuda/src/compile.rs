//! Kernels from source: NVRTC compiles them for the GPU that is there, once; what it made is kept in the user's cache folder.

use std::ffi::{CString, c_char};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::nvrtc::sys::{self, nvrtcProgram, nvrtcResult};
use xxhash_rust::xxh3::xxh3_128;

use crate::error::CudaError;

/// What every module begins with.
const COMMON: &str = include_str!("kernels/common.cuh");

/// Bytes of [`cache_header`].
const HEADER_BYTES: usize = 8 + 16;

/// A source file of kernels.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Module {
    /// Name in messages.
    pub name: &'static str,
    /// CUDA C++.
    pub source: &'static str,
}

impl Module {
    /// A module of this source, in front of which stand the definitions that all share.
    pub const fn new(name: &'static str, source: &'static str) -> Self {
        Module { name, source }
    }
}

/// NVRTC's version.
///
/// # Errors
/// If it cannot be loaded.
pub fn nvrtc_version() -> Result<(i32, i32), CudaError> {
    // SAFETY: looks for a file and loads it.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoLibrary {
            library: "libnvrtc.so",
            hint: "CUDA's runtime compiler on the library path (the package nvidia-cuda-nvrtc has it in nvidia/cu13/lib)",
        });
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the out-parameters are valid.
    let code = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    ok("nvrtcVersion", code).map(|()| (major, minor))
}

/// The machine code of `module` for GPUs of `architecture` (`sm_90a`, say).
///
/// # Errors
/// If NVRTC cannot be loaded, or does not take the source: its log says why.
pub fn compile(module: &Module, architecture: &str) -> Result<Vec<u8>, CudaError> {
    nvrtc_version()?;
    let text = |text: String| CString::new(text).expect("sources have no null bytes");
    let source = text(format!("{COMMON}\n#line 1 \"{}.cu\"\n{}", module.name, module.source));
    let name = text(format!("{}.cu", module.name));
    let options =
        [format!("--gpu-architecture={architecture}"), "--std=c++17".into(), "-default-device".into()].map(text);
    let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let mut program = std::ptr::null_mut();
    // SAFETY: strings end in null bytes and outlive the call; there are no headers.
    ok("nvrtcCreateProgram", unsafe {
        let none = std::ptr::null();
        sys::nvrtcCreateProgram(&mut program, source.as_ptr(), name.as_ptr(), 0, none, none)
    })?;
    let program = Program(program);
    // SAFETY: the program lives and the options are strings that outlive the call.
    let code = unsafe { sys::nvrtcCompileProgram(program.0, options.len() as i32, options.as_ptr()) };
    if code == nvrtcResult::NVRTC_ERROR_COMPILATION {
        let (module, architecture) = (module.name, architecture.to_owned());
        return Err(CudaError::Compile { module, architecture, log: program.log() });
    }
    if code == nvrtcResult::NVRTC_ERROR_INVALID_OPTION {
        let (major, minor) = nvrtc_version()?;
        return Err(CudaError::Unsupported(format!(
            "NVRTC {major}.{minor} does not compile for {architecture}, expected a version of CUDA that knows this GPU"
        )));
    }
    ok("nvrtcCompileProgram", code)?;
    let mut size = 0;
    // SAFETY: the program lives and the out-parameter is valid.
    ok("nvrtcGetCUBINSize", unsafe { sys::nvrtcGetCUBINSize(program.0, &mut size) })?;
    let mut cubin = vec![0u8; size];
    // SAFETY: the buffer has the size that NVRTC asked for.
    ok("nvrtcGetCUBIN", unsafe { sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()) })?;
    Ok(cubin)
}

/// As [`compile`], from the cache folder where this was compiled before.
///
/// # Errors
/// As [`compile`]; a cache that cannot be read or written is none, and a file of it that is damaged is made anew.
pub fn compile_cached(module: &Module, architecture: &str) -> Result<Vec<u8>, CudaError> {
    let (major, minor) = nvrtc_version()?;
    let key = format!("{major}.{minor} {architecture} {COMMON}{}", module.source);
    let path =
        cache_folder().map(|folder| folder.join(format!("{}-{:032x}.cubin", module.name, xxh3_128(key.as_bytes()))));
    if let Some(cubin) = path.as_deref().and_then(read_cached) {
        return Ok(cubin);
    }
    let cubin = compile(module, architecture)?;
    if let Some(path) = path {
        // Without a cache the next start is slower.
        let _ = write_cached(&path, &cubin);
    }
    Ok(cubin)
}

/// What the cache's file holds after its length and hash; nothing where it has others, is cut short, or is not there.
fn read_cached(path: &Path) -> Option<Vec<u8>> {
    let file = std::fs::read(path).ok()?;
    let (header, cubin) = file.split_at_checked(HEADER_BYTES)?;
    (header == cache_header(cubin)).then(|| cubin.to_vec())
}

fn write_cached(path: &Path, cubin: &[u8]) -> io::Result<()> {
    // Under a name of its own first: other ranks, processes or threads, may be writing the same.
    static WRITTEN: AtomicUsize = AtomicUsize::new(0);
    let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
    let own = path.with_extension(format!("{}.{number}.part", std::process::id()));
    let write = || {
        path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
        let mut file = File::create(&own)?;
        file.write_all(&cache_header(cubin))?;
        file.write_all(cubin)?;
        file.sync_all()?;
        std::fs::rename(&own, path)
    };
    write().inspect_err(|_| {
        let _ = std::fs::remove_file(&own);
    })
}

/// Length and hash of machine code, which stand in front of it in the cache.
fn cache_header(cubin: &[u8]) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&(cubin.len() as u64).to_le_bytes());
    header[8..].copy_from_slice(&xxh3_128(cubin).to_le_bytes());
    header
}

fn cache_folder() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    base.map(|base| base.join("lina").join("kernels"))
}

struct Program(nvrtcProgram);

impl Program {
    fn log(&self) -> String {
        let mut size = 0;
        // SAFETY: the program lives and the out-parameter is valid.
        if unsafe { sys::nvrtcGetProgramLogSize(self.0, &mut size) } != nvrtcResult::NVRTC_SUCCESS {
            return "NVRTC gives no log".to_owned();
        }
        let mut log = vec![0u8; size];
        // SAFETY: the buffer has the size that NVRTC asked for.
        let code = unsafe { sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast()) };
        debug_assert_eq!(code, nvrtcResult::NVRTC_SUCCESS);
        String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made in `compile`, dropped once.
        let _ = unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn ok(call: &'static str, code: nvrtcResult) -> Result<(), CudaError> {
    if code == nvrtcResult::NVRTC_SUCCESS { Ok(()) } else { Err(CudaError::Call { call, reason: format!("{code:?}") }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_not_taken_from_the_cache() {
        let folder = std::env::temp_dir().join(format!("lina-kernels-{}", std::process::id()));
        let path = folder.join("norm.cubin");
        let cubin: Vec<u8> = (0..1000u32).map(|i| (i * i) as u8).collect();
        assert_eq!(read_cached(&path), None, "a file that is not there");
        write_cached(&path, &cubin).unwrap();
        assert_eq!(read_cached(&path).as_ref(), Some(&cubin));

        let whole = std::fs::read(&path).unwrap();
        let mut changed = whole.clone();
        *changed.last_mut().unwrap() ^= 1;
        let longer = [&whole[..], &[0]].concat();
        let damaged = [&whole[..0], &whole[..10], &whole[..HEADER_BYTES], &whole[..500], &changed, &longer, &cubin];
        for file in damaged {
            std::fs::write(&path, file).unwrap();
            assert_eq!(read_cached(&path), None, "{} bytes", file.len());
        }

        write_cached(&path, &cubin).unwrap();
        assert_eq!(read_cached(&path), Some(cubin));
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "files under other names are gone");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
