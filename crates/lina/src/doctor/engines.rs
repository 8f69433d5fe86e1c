//! What each engine needs, and what of it is there.

use std::fs;
use std::path::Path;

use lina_train::Engine;
use serde::Serialize;

use super::installed::{Installed, output, program};

/// An engine on this machine.
#[derive(Debug, Serialize)]
pub(super) struct EngineFindings {
    pub(super) engine: &'static str,
    /// Whether this program can use it.
    pub(super) built: bool,
    /// Whether it would run here: built, and nothing missing.
    pub(super) ready: bool,
    pub(super) found: Vec<String>,
    pub(super) missing: Vec<String>,
    /// What to do about what is missing.
    pub(super) advice: Option<String>,
}

impl EngineFindings {
    fn new(engine: Engine, found: Vec<String>, missing: Vec<String>, remedy: &str) -> Self {
        let built = Engine::BUILT.contains(&engine);
        let advice = match (built, missing.is_empty()) {
            (true, true) => None,
            (true, false) => Some(format!("{remedy}.")),
            (false, true) => Some(format!("the machine is ready, but {}.", not_built(engine))),
            (false, false) => Some(format!("{remedy}; besides, {}.", not_built(engine))),
        };
        EngineFindings { engine: engine.name(), built, ready: built && missing.is_empty(), found, missing, advice }
    }
}

fn not_built(engine: Engine) -> String {
    let built = Engine::BUILT.iter().map(|engine| engine.name()).collect::<Vec<_>>().join(", ");
    let build = if engine == Engine::Mpi { ", or build with `--features lina/mpi`" } else { "" };
    format!("this build has no engine `{}`: use `--engine {built}`{build}", engine.name())
}

/// Threads of one process need nothing.
pub(super) fn local() -> EngineFindings {
    EngineFindings::new(Engine::Local, vec!["threads of this process".to_owned()], Vec::new(), "")
}

/// A launcher and a library, of one make.
pub(super) fn mpi(installed: &Installed) -> EngineFindings {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    match ["mpirun", "mpiexec", "srun"].into_iter().find_map(program) {
        Some(launcher) => {
            let version = output(&launcher.to_string_lossy(), "--version");
            let version = version.as_deref().and_then(|text| text.lines().find(|line| !line.trim().is_empty()));
            let version = version.map(|line| format!(" ({})", line.trim())).unwrap_or_default();
            found.push(format!("launcher {}{version}", launcher.display()));
        }
        None => missing.push("a launcher on PATH: mpirun, mpiexec or srun".to_owned()),
    }
    match ["libmpi.so", "libmpich.so"].into_iter().find_map(|name| installed.library(name)) {
        Some(library) => found.push(format!("library {}", library.display())),
        None => missing.push("a library: libmpi.so or libmpich.so".to_owned()),
    }
    let remedy = "install an MPI, such as Open MPI (Debian and Ubuntu: openmpi-bin and libopenmpi-dev, and libclang-dev to build)";
    EngineFindings::new(Engine::Mpi, found, missing, remedy)
}

/// NVIDIA's driver, and the libraries that are loaded when the engine starts.
pub(super) fn nccl(installed: &Installed) -> EngineFindings {
    const LIBRARIES: [(&str, &str); 5] = [
        ("libcuda.so", "the driver's library"),
        ("libnccl.so", "NCCL"),
        ("libnvrtc.so", "CUDA's run-time compiler"),
        ("libcublas.so", "cuBLAS"),
        ("libcublasLt.so", "cuBLASLt"),
    ];
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    let driver = Path::new("/proc/driver/nvidia");
    match fs::read_to_string(driver.join("version")) {
        Ok(version) => {
            let line = version.lines().next().unwrap_or_default().trim_start_matches("NVRM version:");
            found.push(format!("driver {}", line.split_whitespace().collect::<Vec<_>>().join(" ")));
        }
        Err(_) => missing.push("NVIDIA's driver".to_owned()),
    }
    let gpus = gpu_models(&driver.join("gpus"));
    if gpus.is_empty() {
        missing.push("an NVIDIA GPU".to_owned());
    }
    found.extend(gpus.into_iter().map(|model| format!("GPU {model}")));
    for (name, what) in LIBRARIES {
        match installed.library(name) {
            Some(library) => found.push(format!("library {}", library.display())),
            None => missing.push(format!("{what} ({name})")),
        }
    }
    let remedy = "install NVIDIA's driver, the CUDA toolkit and NCCL, and put their libraries on LD_LIBRARY_PATH";
    EngineFindings::new(Engine::Nccl, found, missing, remedy)
}

/// Models of the GPUs that the driver lists, each in a folder with a file `information`.
fn gpu_models(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut models: Vec<String> = entries
        .filter_map(|entry| {
            let information = fs::read_to_string(entry.path().join("information")).ok()?;
            let model = information.lines().find_map(|line| line.strip_prefix("Model:"))?;
            Some(model.trim().to_owned())
        })
        .collect();
    models.sort();
    models
}
