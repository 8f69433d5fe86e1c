//! Answers of the models in lina-model's fixtures, token for token those of Hugging Face transformers 5.24
//! (`model.generate(..., max_new_tokens=20, repetition_penalty=1.8)` on the bytes of "hello"), on any number of ranks.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use lina_infer::{Arithmetic, GenerateOptions, ModelOptions, SamplingOptions, generate};

fn fixtures() -> PathBuf {
    std::env::var_os("LINA_FIXTURES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../lina-model/tests/fixtures/hf"), PathBuf::from)
}

fn check_answers(arithmetic: Arithmetic) {
    for (model, expected) in [
        ("mixtral", [27, 77, 9, 69, 15, 121, 107, 100, 17, 75, 99, 87, 10, 112, 63, 125, 120, 107, 113, 107]),
        ("olmoe", [77, 119, 63, 35, 35, 54, 86, 70, 70, 70, 69, 69, 69, 69, 69, 69, 69, 69, 69, 69]),
        ("qwen3_moe", [95, 106, 76, 1, 6, 115, 118, 5, 47, 46, 34, 31, 34, 67, 100, 84, 53, 11, 13, 34]),
    ] {
        for ranks in [1, 3] {
            let model_options = ModelOptions {
                model: fixtures().join(model),
                ranks,
                arithmetic,
                threads: 1,
                ..ModelOptions::default()
            };
            let options = GenerateOptions {
                model: model_options,
                prompt: "hello".into(),
                chat: false,
                max_new_tokens: expected.len(),
                sampling: SamplingOptions { greedy: true, repetition_penalty: Some(1.8), ..SamplingOptions::default() },
                stop: vec![],
            };
            let mut shown = String::new();
            let summary = generate(&options, |text| {
                shown += text;
                ControlFlow::Continue(())
            });
            let summary = summary.unwrap().expect("this process leads");
            assert_eq!(summary.token_ids, expected, "{model} on {ranks} ranks");
            assert_eq!(shown, summary.text);
        }
    }
}

#[test]
fn answers_are_those_of_transformers() {
    check_answers(Arithmetic::CPU);
}

/// Skipped where there is no GPU, which threads share here.
#[cfg(feature = "cuda")]
#[test]
fn answers_of_a_gpu_are_the_same() {
    let Some(_gpu) = lina_cuda::testing::gpu() else { return };
    check_answers(Arithmetic { device: lina_infer::Device::Cuda, ..Arithmetic::CPU });
}
