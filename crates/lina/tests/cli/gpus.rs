//! What is said of GPUs, on machines with and without.

use serde_json::Value;

use crate::common::{check_fields, folder, json, lina};

#[test]
fn the_doctor_knows_every_device() {
    let folder = folder();
    let value = json(folder.path(), &["doctor", "--json"]);
    check_fields(&value["cuda"], &["driver", "gpus", "libraries", "nccl"]);
    let devices = value["devices"].as_array().unwrap();
    assert_eq!(devices.iter().map(|device| &device["device"]).collect::<Vec<_>>(), ["cpu", "cuda"]);
    assert_eq!(devices[0]["ready"], true);
    let cuda = &devices[1];
    assert_eq!(cuda["built"], cfg!(feature = "cuda"));
    let complete = cuda["missing"] == Value::Array(Vec::new());
    assert_eq!(cuda["ready"], cfg!(feature = "cuda") && complete);
    assert_eq!(cuda["advice"].is_null(), cuda["ready"] == true);
    let text = lina(folder.path(), &["doctor"]);
    assert_eq!(String::from_utf8_lossy(&text.stdout).contains("an NVIDIA GPU"), value["cuda"]["gpus"][0].is_null());
}

#[cfg(feature = "cuda")]
#[test]
fn without_a_gpu_kernels_cannot_be_measured() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_lina"))
        .args(["bench", "kernels", "--json"])
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.starts_with("error: ") && said.lines().count() == 1, "{said}");
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(2), b"".as_slice()));
}
