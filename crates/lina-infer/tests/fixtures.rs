//! Greedy continuations of Hugging Face's own generation, through the whole engine: cached, batched with other requests,
//! on any number of ranks, wherever experts are placed.

use std::path::{Path, PathBuf};

use lina_infer::{EngineOptions, GenerateEvent, GenerateRequest, ModelOptions, Sampling, TokenStream, with_engine};
use lina_model::ModelConfig;
use lina_plan::{Estimator, PlacementPolicy};
use safetensors::SafeTensors;

const PROMPT_TOKENS: usize = 16;
const NEW_TOKENS: usize = 24;

fn fixture(name: &str) -> PathBuf {
    let fixtures = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../lina-model/tests/fixtures/hf");
    std::env::var_os("LINA_FIXTURES").map_or_else(fixtures, PathBuf::from).join(name)
}

/// What transformers was told to pad with when it made the continuations: it masks such tokens in prompts, and fills up
/// with them after the end of the text.
const PADDING: u32 = 0;

/// Prompts with their continuations.
fn continuations(folder: &Path) -> Vec<(Vec<u32>, Vec<u32>)> {
    let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = tensors.tensor("greedy_ids").unwrap();
    let ids: Vec<u32> =
        tensor.data().chunks_exact(8).map(|id| i64::from_le_bytes(id.try_into().unwrap()) as u32).collect();
    let columns = tensor.shape()[1];
    let ends = ModelConfig::from_folder(folder).unwrap().special_tokens.end;
    ids.chunks_exact(columns)
        .map(|row| {
            let (prompt, continuation) = row.split_at(PROMPT_TOKENS);
            let prompt = prompt.iter().copied().filter(|&id| id != PADDING).collect();
            (prompt, continuation.iter().copied().take_while(|id| !ends.contains(id)).collect())
        })
        .collect()
}

fn answer(mut stream: TokenStream) -> Vec<u32> {
    let mut tokens = Vec::new();
    loop {
        match stream.recv().expect("a stream ends with an event") {
            GenerateEvent::Token(token) => tokens.push(token.token),
            GenerateEvent::Finished(_) => return tokens,
            GenerateEvent::Failed(reason) => panic!("{reason}"),
        }
    }
}

fn check(name: &str, change: impl Fn(&mut ModelOptions)) {
    let model = fixture(name);
    let expected = continuations(&model);
    let stop = ModelConfig::from_folder(&model).unwrap().special_tokens.end;
    for ranks in 1..=4 {
        let mut options =
            ModelOptions { model: model.clone(), ranks, threads: 1, verify_every: Some(3), ..ModelOptions::default() };
        change(&mut options);
        let answers = with_engine(&options, EngineOptions::default(), |engine| {
            let request = |prompt: &[u32], tokens: usize, temperature: f32| {
                let sampling = Sampling { temperature, seed: 5, ..Sampling::default() };
                let request = GenerateRequest {
                    prompt: prompt.to_vec(),
                    max_new_tokens: tokens,
                    sampling,
                    stop_tokens: stop.clone(),
                };
                engine.submit(request).unwrap()
            };
            // Others come before, between and after, of other lengths, and one of them goes away.
            let mut others = Vec::new();
            let mut streams = Vec::new();
            for (number, (prompt, _)) in expected.iter().enumerate() {
                others.push(request(&prompt[..3 + number], 9, 1.0));
                streams.push(request(prompt, NEW_TOKENS, 0.0));
                drop(request(&prompt[..1], 60, 0.0));
                others.push(request(&[7; 90], 5, 0.5));
            }
            let answers: Vec<Vec<u32>> = streams.into_iter().map(answer).collect();
            others.into_iter().for_each(|other| assert!(!answer(other).is_empty()));
            answers
        });
        let answers = answers.unwrap().expect("this process leads");
        for (answer, (_, continuation)) in answers.iter().zip(&expected) {
            assert_eq!(answer, continuation, "{name} on {ranks} ranks");
        }
    }
}

#[test]
fn mixtral_goes_on_as_transformers_does() {
    check("mixtral", |_| {});
}

#[test]
fn qwen3_moe_goes_on_as_transformers_does() {
    check("qwen3_moe", |options| options.estimator = Estimator::History);
}

#[test]
fn olmoe_goes_on_as_transformers_does() {
    check("olmoe", |options| options.placement = PlacementPolicy::Lina);
}

#[test]
fn prompts_in_pieces_change_nothing() {
    check("qwen3_moe", |options| {
        options.step_tokens = 7;
        options.placement = PlacementPolicy::Eplb;
    });
}

#[cfg(feature = "cuda")]
#[test]
fn gpus_go_on_as_transformers_does() {
    use lina_infer::{Arithmetic, Device};
    use lina_train::Scalar;

    // The device stays open from one job to the next.
    let Some(_gpu) = lina_cuda::testing::gpu() else { return };
    for (name, placement) in
        [("mixtral", PlacementPolicy::LinaAuto), ("qwen3_moe", PlacementPolicy::Lina), ("olmoe", PlacementPolicy::Eplb)]
    {
        check(name, |options| {
            options.arithmetic = Arithmetic { device: Device::Cuda, dtype: Scalar::Float32 };
            options.placement = placement;
            options.step_tokens = 50;
        });
    }
}
