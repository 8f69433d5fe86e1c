//! That every kernel compiles for the GPUs that are supported: needs NVRTC, no GPU.

use std::num::NonZero;
use std::sync::Mutex;

use lina_cuda::CudaError;
use lina_cuda::compile::{compile, nvrtc_version};

#[test]
fn every_module_compiles() {
    if let Err(reason @ CudaError::NoLibrary { .. }) = nvrtc_version() {
        eprintln!("skipped: {reason}");
        return;
    }
    let compilations = lina_cuda::modules().into_iter().flat_map(|module| ["sm_80", "sm_90a"].map(|gpu| (module, gpu)));
    let compilations = Mutex::new(compilations);
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                let next = || compilations.lock().ok()?.next();
                while let Some((module, gpu)) = next() {
                    if let Err(error) = compile(module, gpu) {
                        panic!("{error}");
                    }
                }
            });
        }
    });
}

#[test]
fn what_does_not_compile_is_said_with_the_place() {
    static BROKEN: lina_cuda::Module = lina_cuda::Module::new("broken", "__global__ void f() {\n  nothing;\n}");
    match compile(&BROKEN, "sm_90a") {
        Err(CudaError::NoLibrary { .. }) => eprintln!("skipped: no NVRTC"),
        Err(error) => assert!(error.to_string().contains("broken.cu(2)"), "{error}"),
        Ok(_) => panic!("`nothing` is not declared"),
    }
}
