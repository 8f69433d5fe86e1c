//! That every kernel compiles for the GPUs that are supported: needs NVRTC, no GPU.

use lina_cuda::CudaError;
use lina_cuda::compile::{compile, nvrtc_version};

#[test]
fn every_module_compiles() {
    if let Err(reason @ CudaError::NoLibrary { .. }) = nvrtc_version() {
        eprintln!("skipped: {reason}");
        return;
    }
    for module in lina_cuda::modules() {
        for architecture in ["sm_80", "sm_90a"] {
            if let Err(error) = compile(module, architecture) {
                panic!("{error}");
            }
        }
    }
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
