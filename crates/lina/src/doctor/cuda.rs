//! GPUs, and the libraries that drive them. A build with the feature `cuda` loads the libraries and asks them, as a run
//! would; other builds look at files.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::installed::Installed;

/// What is there of NVIDIA's.
#[derive(Debug, Serialize)]
pub(super) struct Cuda {
    /// Version of the driver in the kernel.
    driver: Option<String>,
    gpus: Vec<Gpu>,
    /// Libraries that GPUs compute with.
    libraries: Vec<Library>,
    /// Library of the engine `nccl`.
    nccl: Library,
}

/// A GPU; what is not known of it is in builds without the feature `cuda`.
#[derive(Debug, Serialize)]
struct Gpu {
    name: String,
    memory_bytes: Option<u64>,
    /// As in `9.0`.
    compute_capability: Option<String>,
}

/// A shared library.
#[derive(Debug, Serialize)]
struct Library {
    /// File name without version.
    name: &'static str,
    /// As the library itself says; of `libcuda.so` the version of CUDA that it supports.
    version: Option<String>,
    path: Option<PathBuf>,
    /// Why it is of no use, if it is not.
    problem: Option<String>,
}

impl Cuda {
    pub(super) fn examine(installed: &Installed) -> Self {
        let folder = Path::new("/proc/driver/nvidia");
        let driver = fs::read_to_string(folder.join("version")).ok().and_then(|text| driver_version(&text));
        let (gpus, libraries, nccl) = parts(installed, &folder.join("gpus"));
        Cuda { driver, gpus, libraries, nccl }
    }

    /// A line for each thing that a device has, and for each that it lacks.
    pub(super) fn device(&self) -> (Vec<String>, Vec<String>) {
        let driver = self.driver.iter().map(|version| format!("driver {version}"));
        let gpus = self.gpus.iter().enumerate().map(|(ordinal, gpu)| gpu.line(ordinal));
        let found = driver.chain(gpus).chain(self.libraries.iter().filter_map(Library::found)).collect();
        let no_gpu = self.gpus.is_empty().then(|| "an NVIDIA GPU".to_owned());
        let missing = no_gpu.into_iter().chain(self.libraries.iter().filter_map(|library| library.problem.clone()));
        (found, missing.collect())
    }

    /// The same for the engine `nccl`, which needs a device and its own library.
    pub(super) fn nccl(&self) -> (Vec<String>, Vec<String>) {
        let gpus = (!self.gpus.is_empty()).then(|| format!("{} GPU(s)", self.gpus.len()));
        let found = gpus.into_iter().chain(self.nccl.found()).collect();
        let (_, missing) = self.device();
        (found, missing.into_iter().chain(self.nccl.problem.clone()).collect())
    }
}

impl Gpu {
    fn line(&self, ordinal: usize) -> String {
        let mut line = format!("GPU {ordinal}: {}", self.name);
        if let Some(bytes) = self.memory_bytes {
            line.push_str(&format!(", {:.1} GiB", bytes as f64 / f64::from(1 << 30)));
        }
        if let Some(capability) = &self.compute_capability {
            line.push_str(&format!(", compute capability {capability}"));
        }
        line
    }
}

impl Library {
    fn found(&self) -> Option<String> {
        let path = self.path.as_ref().filter(|_| self.problem.is_none())?;
        let of = if self.name == "libcuda.so" { "for CUDA " } else { "" };
        let version = self.version.as_ref().map(|version| format!("{of}{version}, ")).unwrap_or_default();
        Some(format!("{} {version}{}", self.name, path.display()))
    }
}

/// The version in a line as `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Mon ...`.
fn driver_version(text: &str) -> Option<String> {
    let words = text.lines().next()?.split_whitespace();
    let mut versions =
        words.filter(|word| word.contains('.') && word.starts_with(|first: char| first.is_ascii_digit()));
    versions.next().map(str::to_owned)
}

/// What a library is, for those who lack it.
fn what_is(name: &str) -> &'static str {
    match name {
        "libcuda.so" => "the driver's library",
        "libnvrtc.so" => "CUDA's run-time compiler",
        "libcublasLt.so" => "cuBLASLt",
        _ => "NCCL",
    }
}

/// A library of which only the file is known.
fn file(installed: &Installed, name: &'static str) -> Library {
    let path = installed.library(name).cloned();
    let problem = path.is_none().then(|| format!("{} ({name})", what_is(name)));
    Library { name, version: None, path, problem }
}

#[cfg(not(feature = "cuda"))]
fn parts(installed: &Installed, gpus: &Path) -> (Vec<Gpu>, Vec<Library>, Library) {
    let libraries = ["libcuda.so", "libnvrtc.so", "libcublasLt.so"].map(|name| file(installed, name));
    (listed_gpus(gpus), libraries.into(), file(installed, "libnccl.so"))
}

/// GPUs that the driver lists, each in a folder with a file `information`.
#[cfg(not(feature = "cuda"))]
fn listed_gpus(folder: &Path) -> Vec<Gpu> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| {
            let information = fs::read_to_string(entry.path().join("information")).ok()?;
            let model = information.lines().find_map(|line| line.strip_prefix("Model:"))?;
            Some(model.trim().to_owned())
        })
        .collect();
    names.sort();
    names.into_iter().map(|name| Gpu { name, memory_bytes: None, compute_capability: None }).collect()
}

#[cfg(feature = "cuda")]
use loaded::parts;

#[cfg(feature = "cuda")]
mod loaded {
    use std::ffi::c_int;

    use lina_comm::nccl::LibraryFacts;
    use lina_cuda::cudarc::cublaslt;
    use lina_cuda::cudarc::driver::result::{DriverError, device};
    use lina_cuda::cudarc::driver::sys::CUdevice_attribute as Attribute;
    use lina_cuda::{CudaError, Device};

    use super::*;

    pub(super) fn parts(installed: &Installed, _: &Path) -> (Vec<Gpu>, Vec<Library>, Library) {
        let driver = Device::driver_version().map(|version| dotted(version as usize / 10));
        // Counting refuses a driver that is too old; a library that is there is of no use then.
        let (count, driver) = match (Device::count(), driver) {
            (Ok(count), driver) => (count, driver),
            (Err(error), driver) => (0, driver.and(Err(error))),
        };
        let gpus = (0..count).filter_map(|ordinal| gpu(ordinal as c_int).ok()).collect();
        let nvrtc = lina_cuda::compile::nvrtc_version().map(|(major, minor)| format!("{major}.{minor}"));
        let libraries = vec![
            library(installed, "libcuda.so", driver),
            library(installed, "libnvrtc.so", nvrtc),
            library(installed, "libcublasLt.so", cublaslt_version()),
        ];
        (gpus, libraries, nccl(installed))
    }

    /// NCCL as the engine loads it.
    fn nccl(installed: &Installed) -> Library {
        let found = file(installed, "libnccl.so");
        match lina_comm::nccl::library() {
            Ok(LibraryFacts { version: (major, minor, patch), path }) => Library {
                version: Some(format!("{major}.{minor}.{patch}")),
                path: Some(path.into()),
                problem: None,
                ..found
            },
            Err(error) => Library { problem: found.problem.or(Some(error.to_string())), ..found },
        }
    }

    /// What the driver says without a context, which would take memory of the GPU.
    fn gpu(ordinal: c_int) -> Result<Gpu, DriverError> {
        let gpu = device::get(ordinal)?;
        // SAFETY: the driver has just named this device.
        let attribute = |attribute| unsafe { device::get_attribute(gpu, attribute) };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        // SAFETY: as above.
        let bytes = unsafe { device::total_mem(gpu) }?;
        Ok(Gpu {
            name: device::get_name(gpu)?,
            memory_bytes: Some(bytes as u64),
            compute_capability: Some(format!("{major}.{minor}")),
        })
    }

    fn cublaslt_version() -> Result<String, CudaError> {
        // SAFETY: looks for a file and loads it.
        if !unsafe { cublaslt::sys::is_culib_present() } {
            return Err(CudaError::NoLibrary {
                library: "libcublasLt.so",
                hint: "cuBLAS on the library path (the package nvidia-cublas has it in nvidia/cu13/lib)",
            });
        }
        // SAFETY: the library is there; the function takes nothing.
        Ok(dotted(unsafe { cublaslt::sys::cublasLtGetVersion() } / 100))
    }

    /// 1300 is 13.0.
    fn dotted(version: usize) -> String {
        format!("{}.{}", version / 100, version % 100)
    }

    /// A library that answered with its version is loaded.
    fn library(installed: &Installed, name: &'static str, version: Result<String, CudaError>) -> Library {
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let (version, problem) = match version {
            Ok(version) => (Some(version), None),
            Err(CudaError::NoLibrary { .. }) => {
                let Library { path, problem, .. } = file(installed, name);
                let elsewhere =
                    path.map(|path| format!("{} cannot be loaded, is its folder on LD_LIBRARY_PATH?", path.display()));
                (None, elsewhere.or(problem))
            }
            Err(error) => (None, Some(error.to_string())),
        };
        Library { name, version, path: mapped(&maps, name), problem }
    }
}

/// Path of the library `name`, with any version, among what a process has mapped.
#[cfg(any(test, feature = "cuda"))]
fn mapped(maps: &str, name: &str) -> Option<PathBuf> {
    let paths = maps.lines().filter_map(|line| Some(Path::new(&line[line.find('/')?..])));
    paths.into_iter().find(|path| super::installed::is_library(path, name)).map(Path::to_path_buf)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_is_named_by_the_first_line() {
        let open =
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (root@host)\nGCC 1.2";
        assert_eq!(driver_version(open).as_deref(), Some("580.159.04"));
        assert_eq!(driver_version(""), None);
    }

    #[test]
    fn a_mapped_library_has_its_own_name() {
        let maps = "7f00-7f01 r-xp 00000000 08:01 11 /lib/libnvrtc-builtins.so.13.0\n\
                    7f02-7f03 r-xp 00000000 08:01 12 /opt/a folder/libnvrtc.so.13\n7f04-7f05 rw-p 00000000 00:00 0";
        assert_eq!(mapped(maps, "libnvrtc.so"), Some(PathBuf::from("/opt/a folder/libnvrtc.so.13")));
        assert_eq!(mapped(maps, "libnccl.so"), None);
    }
}
