//! What each engine and each device needs, and what of it is there.

use lina_train::Engine;
use serde::Serialize;

use super::cuda::Cuda;
use super::installed::{Installed, output, program};

/// An engine on this machine.
#[derive(Debug, Serialize)]
pub(super) struct EngineFindings {
    pub(super) engine: &'static str,
    #[serde(flatten)]
    pub(super) readiness: Readiness,
}

/// A kind of device on this machine.
#[derive(Debug, Serialize)]
pub(super) struct DeviceFindings {
    pub(super) device: &'static str,
    #[serde(flatten)]
    pub(super) readiness: Readiness,
}

/// Whether something can be used.
#[derive(Debug, Serialize)]
pub(super) struct Readiness {
    /// Whether this program can use it.
    pub(super) built: bool,
    /// Whether it would run here: built, and nothing missing.
    pub(super) ready: bool,
    pub(super) found: Vec<String>,
    pub(super) missing: Vec<String>,
    /// What to do about what is missing.
    pub(super) advice: Option<String>,
}

impl Readiness {
    /// `not_built` says what to do where this build does not have it.
    fn new(built: bool, found: Vec<String>, missing: Vec<String>, remedy: &str, not_built: &str) -> Self {
        let advice = match (built, missing.is_empty()) {
            (true, true) => None,
            (true, false) => Some(format!("{remedy}.")),
            (false, true) => Some(format!("the machine is ready, but {not_built}.")),
            (false, false) => Some(format!("{remedy}; besides, {not_built}.")),
        };
        Readiness { built, ready: built && missing.is_empty(), found, missing, advice }
    }
}

impl EngineFindings {
    fn new(engine: Engine, found: Vec<String>, missing: Vec<String>, remedy: &str) -> Self {
        let built = Engine::BUILT.contains(&engine);
        let readiness = Readiness::new(built, found, missing, remedy, &not_built(engine));
        EngineFindings { engine: engine.name(), readiness }
    }
}

fn not_built(engine: Engine) -> String {
    let built = Engine::BUILT.iter().map(|engine| engine.name()).collect::<Vec<_>>().join(", ");
    let feature = if engine == Engine::Mpi { "mpi" } else { "cuda" };
    format!(
        "this build has no engine `{}`: use `--engine {built}`, or build with `--features lina/{feature}`",
        engine.name()
    )
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

/// What a device needs, and NCCL, which a rank alone does without.
pub(super) fn nccl(cuda: &Cuda) -> EngineFindings {
    let (found, missing) = cuda.nccl();
    let remedy = "install NVIDIA's driver, the CUDA toolkit and NCCL, and put their libraries on LD_LIBRARY_PATH";
    EngineFindings::new(Engine::Nccl, found, missing, remedy)
}

/// Devices that ranks compute on.
pub(super) fn devices(cuda: &Cuda) -> Vec<DeviceFindings> {
    let processor = Readiness::new(true, vec!["this machine's processor".to_owned()], Vec::new(), "", "");
    let (found, missing) = cuda.device();
    let not_built = "this build has no device `cuda`: build with `--features lina/cuda`";
    let remedy = "install NVIDIA's driver and the CUDA toolkit, and put their libraries on LD_LIBRARY_PATH";
    let gpus = Readiness::new(cfg!(feature = "cuda"), found, missing, remedy, not_built);
    vec![DeviceFindings { device: "cpu", readiness: processor }, DeviceFindings { device: "cuda", readiness: gpus }]
}
