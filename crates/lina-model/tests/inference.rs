//! Inference against the training pass: the same logits to rounding, and the same bits however a sequence is cut.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lina_comm::Comm;
use lina_kernels::Compute;
use lina_model::*;
use lina_plan::ExpertLayout;

fn folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf");
    ["mixtral", "olmoe", "olmoe_clip_sharded", "qwen3_moe"].map(|name| root.join(name)).to_vec()
}

fn prompt(config: &ModelConfig, tokens: usize) -> Vec<u32> {
    (0..tokens).map(|i| ((i * i * 7 + 3 * i + 1) % config.vocab) as u32).collect()
}

/// Logits of every token of the prompt, fed in pieces of these sizes beside another sequence.
fn logits(folder: &Path, pieces: &[usize], threads: usize) -> Vec<f32> {
    let config = ModelConfig::from_folder(folder).unwrap();
    let weights = Arc::new(InferenceWeights::load(folder, config.clone()).unwrap());
    let tokens = pieces.iter().sum();
    let experts = ExpertOptions { verify_every: Some(2), ..ExpertOptions::fixed(&config) };
    let limits = InferenceLimits { max_tokens: tokens + 3, max_sequence_tokens: 48, pages: 4 };
    let mut model = InferenceModel::new(weights, 1, Compute::new(threads), limits, experts).unwrap();
    let mut comm = Comm::solo();
    let prompt = prompt(&config, tokens);
    model.cache().admit(0, 1);
    let mut all = Vec::new();
    let mut fed = 0;
    for (number, &piece) in pieces.iter().enumerate() {
        let other = 1 + number as u32;
        if number < 3 {
            model.cache().admit(other, 1);
        }
        let mut feeds = vec![SequenceFeed { id: 0, tokens: &prompt[fed..fed + piece], logits: LogitsOf::All }];
        if number < 3 {
            feeds.insert(number % 2, SequenceFeed { id: other, tokens: &[5, 2], logits: LogitsOf::Nothing });
        }
        comm.begin_evaluation(0).unwrap();
        model.forward(&mut comm, InferenceBatch { feeds: &feeds, ..InferenceBatch::default() }).unwrap();
        comm.end_step();
        all.extend_from_slice(model.logits());
        fed += piece;
    }
    all
}

fn training_logits(folder: &Path, tokens: usize) -> Vec<f32> {
    let config = ModelConfig::from_folder(folder).unwrap();
    let experts = ExpertLayout::new(config.experts, 1, None).unwrap();
    let limits = ModelLimits { max_tokens: tokens, max_sequence_tokens: tokens, max_expert_rows: None };
    let mut model = Model::new(Purpose::Training, config.clone(), experts, 0, Compute::new(1), limits).unwrap();
    let (_, layout, parameters) = model.for_update();
    Checkpoint::open(folder).unwrap().load(layout, parameters).unwrap();
    let input = prompt(&config, tokens);
    let target = vec![u32::MAX; tokens];
    let mut comm = Comm::solo();
    comm.begin_evaluation(0).unwrap();
    let batch = Batch { input: &input, target: &target, sequences: &[tokens] };
    model.forward(&mut comm, batch, StepContext::evaluation()).unwrap();
    comm.end_step();
    model.logits().unwrap().to_vec()
}

#[test]
fn logits_are_those_of_training() {
    for folder in folders() {
        let (cached, trained) = (logits(&folder, &[40], 1), training_logits(&folder, 40));
        let largest = trained.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        for (number, (a, b)) in cached.iter().zip(&trained).enumerate() {
            assert!((a - b).abs() <= 1e-5 * largest, "{}: element {number}: {a} and {b}", folder.display());
        }
    }
}

#[test]
fn pieces_and_threads_change_no_bit() {
    for folder in folders() {
        let whole = logits(&folder, &[40], 1);
        for pieces in [vec![1; 40], vec![13, 1, 1, 25], vec![39, 1]] {
            assert_eq!(logits(&folder, &pieces, 2), whole, "{}: {pieces:?}", folder.display());
        }
    }
}
