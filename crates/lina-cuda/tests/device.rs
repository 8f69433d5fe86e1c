//! Memory, copies and launches on a GPU; skipped where there is none.

use lina_cuda::testing::{gpu, random, round_bf16};
use lina_cuda::{DType, LaunchShape, Module};

static ADD_ONE: Module = Module::new(
    "add_one",
    "extern \"C\" __global__ void add_one(float* x, u32 n, float by) {
        u32 i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < n) x[i] += by;
    }",
);

#[test]
fn what_is_uploaded_comes_back() {
    let Some(gpu) = gpu() else { return };
    // Larger than a staging slot, and an odd number of elements.
    let values = random(1, 3_000_001);
    let buffer = gpu.buffer_from(&values, DType::F32).unwrap();
    assert_eq!(gpu.to_host::<f32>(buffer.whole()).unwrap(), values);
    let buffer = gpu.buffer_from(&values, DType::Bf16).unwrap();
    assert_eq!(gpu.to_host::<f32>(buffer.whole()).unwrap(), round_bf16(&values));
    let part = gpu.to_host::<f32>(buffer.slice(5..9)).unwrap();
    assert_eq!(part, round_bf16(&values[5..9]));
    let numbers: Vec<u32> = (0..1000).collect();
    let mut buffer = gpu.buffer_from(&numbers, DType::U32).unwrap();
    gpu.fill_zero(buffer.slice_mut(10..20)).unwrap();
    let found = gpu.to_host::<u32>(buffer.whole()).unwrap();
    assert_eq!((&found[..10], &found[10..20], &found[20..]), (&numbers[..10], &[0; 10][..], &numbers[20..]));
}

#[test]
fn many_small_uploads_do_not_overwrite_each_other() {
    let Some(gpu) = gpu() else { return };
    let buffers: Vec<_> = (0..3000).map(|n| gpu.buffer_from(&vec![n as f32; 5000], DType::F32).unwrap()).collect();
    for (n, buffer) in buffers.iter().enumerate() {
        let found = gpu.to_host::<f32>(buffer.whole()).unwrap();
        assert!(found.iter().all(|&value| value == n as f32), "buffer {n}");
    }
}

#[test]
fn kernels_run_in_order() {
    let Some(gpu) = gpu() else { return };
    let mut buffer = gpu.zeros(1000, DType::F32).unwrap();
    for _ in 0..10 {
        let shape = LaunchShape::covering(999, 128);
        gpu.launch(&ADD_ONE, "add_one", shape, &[(&buffer.whole_mut()).into(), 999u32.into(), 0.5f32.into()]).unwrap();
    }
    let found = gpu.to_host::<f32>(buffer.whole()).unwrap();
    assert!(found[..999].iter().all(|&value| value == 5.0) && found[999] == 0.0);
}

#[test]
fn too_much_memory_is_one_sentence() {
    let Some(gpu) = gpu() else { return };
    let error = gpu.uninit(1 << 45, DType::F32).map(drop).unwrap_err().to_string();
    assert!(error.contains("out of memory") && error.contains("MiB are free"), "{error}");
}
