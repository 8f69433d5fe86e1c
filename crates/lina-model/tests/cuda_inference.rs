//! Inference on a GPU: transformers' greedy continuations, the processor's logits, sequences in pieces and in batches, experts
//! that move between slots, and bf16. Skipped where there is no GPU.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lina_comm::Comm;
use lina_comm::local::{LocalConfig, LocalJob};
use lina_cuda::testing::{gpu, relative_error};
use lina_cuda::{DType, Gpu};
use lina_kernels::Compute;
use lina_model::{
    CudaInferenceModel, DeviceRank, ExpertOptions, FfnKind, Forecast, Gate, InferenceBatch, InferenceLimits,
    InferenceModel, InferenceWeights, LogitsOf, ModelConfig, ModelKind, RowRoute, SequenceFeed, SharedExperts, Sizes,
};
use lina_plan::{ExpertSchedulerSettings, PlacementCosts, PlacementPolicy, Policy, PolicyRules, PolicySettings};
use safetensors::SafeTensors;

const PROMPT_TOKENS: usize = 16;
/// What transformers was told to pad with when it made the continuations.
const PADDING: u32 = 0;

fn fixtures() -> PathBuf {
    std::env::var_os("LINA_FIXTURES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf"), PathBuf::from)
}

fn loaded(name: &str) -> Arc<InferenceWeights> {
    let folder = fixtures().join(name);
    let config = ModelConfig::from_folder(&folder).unwrap();
    Arc::new(InferenceWeights::load(&folder, config).unwrap())
}

/// Prompts with their continuations.
fn continuations(name: &str) -> Vec<(Vec<u32>, Vec<u32>)> {
    let bytes = std::fs::read(fixtures().join(name).join("expected.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = tensors.tensor("greedy_ids").unwrap();
    let ids: Vec<u32> = tensor.data().as_chunks().0.iter().map(|&id| i64::from_le_bytes(id) as u32).collect();
    let ends = loaded(name).config().special_tokens.end.clone();
    ids.chunks_exact(tensor.shape()[1])
        .map(|row| {
            let (prompt, continuation) = row.split_at(PROMPT_TOKENS);
            let prompt = prompt.iter().copied().filter(|&id| id != PADDING).collect();
            (prompt, continuation.iter().copied().take_while(|id| !ends.contains(id)).collect())
        })
        .collect()
}

const LIMITS: InferenceLimits = InferenceLimits { max_tokens: 160, max_sequence_tokens: 96, pages: 12 };

/// Steps of few tokens are recorded where none is verified.
const VERIFICATIONS: [Option<u64>; 2] = [Some(2), None];

/// A model on a GPU of its own, all experts in their slots.
fn alone(gpu: Gpu, weights: &Arc<InferenceWeights>, dtype: DType, verify_every: Option<u64>) -> CudaInferenceModel {
    let rank = DeviceRank { rank: 0, ranks: 1, route: RowRoute::Hosts, dtype };
    let experts = ExpertOptions { verify_every, ..ExpertOptions::fixed(weights.config()) };
    CudaInferenceModel::new(gpu, rank, weights.clone(), LIMITS, experts, &SharedExperts::default()).unwrap()
}

fn largest(logits: &[f32]) -> u32 {
    let (_, token) = logits.iter().zip(0..).max_by(|a, b| a.0.total_cmp(b.0)).unwrap();
    token
}

/// Goes on from prompts for `steps` tokens, all of them in one batch.
fn go_on(model: &mut CudaInferenceModel, comm: &mut Comm, prompts: &[Vec<u32>], steps: usize) -> Vec<Vec<u32>> {
    let vocab = model.config().vocab;
    (0..).zip(prompts).for_each(|(id, _)| model.cache().admit(id, 1));
    let mut fed = prompts.to_vec();
    let mut answers = vec![Vec::new(); prompts.len()];
    for step in 0..steps {
        let feed = |(id, tokens)| SequenceFeed { id, tokens, logits: LogitsOf::Last };
        let feeds: Vec<_> = (0..).zip(fed.iter().map(Vec::as_slice)).map(feed).collect();
        comm.begin_evaluation(step as u64).unwrap();
        model.forward(comm, InferenceBatch { feeds: &feeds, ..InferenceBatch::default() }).unwrap();
        comm.end_step();
        for ((logits, answer), fed) in model.logits().chunks_exact(vocab).zip(&mut answers).zip(&mut fed) {
            answer.push(largest(logits));
            *fed = answer[step..].to_vec();
        }
    }
    (0..).zip(prompts).for_each(|(id, _)| model.cache().release(id));
    answers
}

#[test]
fn models_go_on_as_transformers_does() {
    for (name, verify_every) in
        ["mixtral", "qwen3_moe", "olmoe"].iter().flat_map(|name| VERIFICATIONS.map(|v| (*name, v)))
    {
        let Some(gpu) = gpu() else { return };
        let (mut model, mut comm) = (alone(gpu, &loaded(name), DType::F32, verify_every), Comm::solo());
        let expected = continuations(name);
        let steps = expected.iter().map(|(_, continuation)| continuation.len()).max().unwrap();
        let prompts: Vec<Vec<u32>> = expected.iter().map(|(prompt, _)| prompt.clone()).collect();
        let batched = go_on(&mut model, &mut comm, &prompts, steps);
        for ((prompt, continuation), answer) in expected.iter().zip(&batched) {
            assert_eq!(answer[..continuation.len()], *continuation, "{name}");
            let alone = go_on(&mut model, &mut comm, std::slice::from_ref(prompt), steps);
            assert_eq!(alone[0][..continuation.len()], *continuation, "{name}, alone");
        }
    }
}

/// What tokens of a made-up prompt lead to.
fn prompt(config: &ModelConfig, tokens: usize) -> Vec<u32> {
    (0..tokens).map(|i| ((i * i * 7 + 3 * i + 1) % config.vocab) as u32).collect()
}

/// Calls `forward` for pieces of a prompt of these sizes, the first of them beside another sequence, and collects the logits of
/// the prompt's tokens.
fn in_pieces(
    config: &ModelConfig,
    pieces: &[usize],
    mut forward: impl FnMut(&[u32], InferenceBatch<'_>) -> Vec<f32>,
) -> Vec<f32> {
    let text = prompt(config, pieces.iter().sum());
    let mut all = Vec::new();
    let mut fed = 0;
    for (number, &piece) in pieces.iter().enumerate() {
        let mut feeds = vec![SequenceFeed { id: 0, tokens: &text[fed..fed + piece], logits: LogitsOf::All }];
        let mut admitted = vec![];
        if number == 0 {
            admitted = vec![0, 1];
            feeds.insert(0, SequenceFeed { id: 1, tokens: &[5, 2], logits: LogitsOf::Nothing });
        }
        all.extend(forward(&admitted, InferenceBatch { feeds: &feeds, ..InferenceBatch::default() }));
        fed += piece;
    }
    all
}

fn device_logits(model: &mut CudaInferenceModel, pieces: &[usize]) -> Vec<f32> {
    let (config, mut comm) = (model.config().clone(), Comm::solo());
    let logits = in_pieces(&config, pieces, |admitted, batch| {
        admitted.iter().for_each(|&id| model.cache().admit(id, 2));
        comm.begin_evaluation(0).unwrap();
        model.forward(&mut comm, batch).unwrap();
        comm.end_step();
        model.logits().to_vec()
    });
    [0, 1].into_iter().for_each(|id| model.cache().release(id));
    logits
}

fn host_logits(weights: &Arc<InferenceWeights>, pieces: &[usize], gate: Gate) -> Vec<f32> {
    let (config, mut comm) = (weights.config().clone(), Comm::solo());
    let experts = ExpertOptions::fixed(&config);
    let mut model = InferenceModel::new(weights.clone(), 1, Compute::new(2), LIMITS, experts).unwrap();
    model.set_gate(gate);
    in_pieces(&config, pieces, |admitted, batch| {
        admitted.iter().for_each(|&id| model.cache().admit(id, 2));
        comm.begin_evaluation(0).unwrap();
        model.forward(&mut comm, batch).unwrap();
        comm.end_step();
        model.logits().to_vec()
    })
}

fn assert_close(name: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{name}");
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let difference =
        differences.fold(0.0, |most: f32, value| if value.is_nan() { f32::INFINITY } else { most.max(value) });
    println!("{name}: logits within {difference:.1e}");
    assert!(difference < 1e-4, "{name}: logits differ by {difference}");
}

const SMALL: Sizes = Sizes { vocab: 23, hidden: 16, layers: 3, heads: 4, experts: 4, top_k: 2, expert_hidden: 12 };

/// Every switch of the families once.
fn families() -> Vec<(&'static str, ModelConfig)> {
    let mut mixtral = ModelConfig::family(ModelKind::Mixtral, SMALL);
    mixtral.kv_heads = 1;
    mixtral.sliding_window = Some(3);
    let mut qwen = ModelConfig::family(ModelKind::Qwen3Moe, SMALL);
    (qwen.kv_heads, qwen.head_dim) = (2, 6);
    (qwen.dense_layers, qwen.dense_hidden) = (vec![1], 20);
    let mut olmoe = ModelConfig::family(ModelKind::Olmoe, SMALL);
    (olmoe.tied_embeddings, olmoe.clip_qkv) = (true, Some(0.8));
    let mut lina = ModelConfig::family(ModelKind::LinaMoe, SMALL);
    lina.ffn = FfnKind::Relu;
    let mut families = vec![("mixtral", mixtral), ("qwen3_moe", qwen), ("olmoe", olmoe), ("lina_moe", lina)];
    families.iter_mut().for_each(|(_, config)| config.initializer_range = 0.2);
    families
}

#[test]
fn logits_are_those_of_the_processor_however_a_sequence_is_cut() {
    let fixtures = ["mixtral", "olmoe", "olmoe_clip_sharded", "qwen3_moe"].map(|name| (name, loaded(name)));
    let initial = families().into_iter().map(|(name, config)| (name, Arc::new(InferenceWeights::initial(config, 3))));
    for (name, weights) in fixtures.into_iter().chain(initial) {
        // More tokens than few, for which the host settles where rows go.
        let whole = host_logits(&weights, &[90], Gate::Own);
        for verify_every in VERIFICATIONS {
            let Some(gpu) = gpu() else { return };
            let mut model = alone(gpu, &weights, DType::F32, verify_every);
            // Twice: what has been recorded meanwhile says the same.
            for pieces in [vec![90], vec![13, 1, 1, 75], vec![1; 90], vec![90], vec![1; 90]] {
                let found = device_logits(&mut model, &pieces);
                assert_close(&format!("{name} in {} pieces", pieces.len()), &found, &whole);
            }
        }
    }
}

#[test]
fn recorded_steps_say_the_same_after_buffers_have_grown() {
    let Some(gpu) = gpu() else { return };
    let weights = loaded("mixtral");
    let config = weights.config();
    let (mut model, mut comm) = (alone(gpu, &weights, DType::F32, None), Comm::solo());
    model.record_routing();
    let alone = [prompt(config, 9)];
    let first = go_on(&mut model, &mut comm, &alone, 6);
    let tokens = 9 + 5;
    assert_eq!(model.take_record().choices.len(), tokens * config.moe_layers() * config.top_k);
    // More tokens than few, and then steps with more rows of logits than before.
    let others: Vec<Vec<u32>> = (1..9).map(|shift| prompt(config, 15 + shift)[shift..].to_vec()).collect();
    let batched = go_on(&mut model, &mut comm, &others, 6);
    assert_eq!(go_on(&mut model, &mut comm, &alone, 6), first);
    model.warm_up(&mut comm).unwrap();
    assert_eq!(go_on(&mut model, &mut comm, &alone, 6), first);
    assert_eq!(go_on(&mut model, &mut comm, &others, 6), batched);
}

/// What `rank_main` makes of its rank's model, on ranks that are threads with one GPU, by rank.
fn on_ranks<R: Send>(
    weights: &Arc<InferenceWeights>,
    dtype: DType,
    options: &ExpertOptions,
    ranks: usize,
    rank_main: impl Fn(&mut CudaInferenceModel, &mut Comm) -> R + Sync,
) -> Vec<R> {
    let local = LocalConfig {
        ranks,
        groups: vec![(0..ranks).collect()],
        timeout: Duration::from_secs(60),
        delays: None,
        log_launches: false,
    };
    let rules = PolicyRules::new(Policy::Fair, &PolicySettings::default());
    let (_job, comms) = LocalJob::start(local, rules).unwrap();
    let shared = SharedExperts::default();
    let rank_main = |mut comm: Comm| {
        let place = DeviceRank { rank: comm.rank(), ranks, route: RowRoute::Hosts, dtype };
        let (gpu, weights) = (Gpu::open(0).unwrap(), weights.clone());
        let mut model = CudaInferenceModel::new(gpu, place, weights, LIMITS, options.clone(), &shared).unwrap();
        rank_main(&mut model, &mut comm)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = comms.into_iter().map(|comm| scope.spawn(|| rank_main(comm))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Continuations of `prompts` on ranks whose experts the scheduler moves between slots; and the bytes that it moved.
fn go_on_in_slots(
    weights: &Arc<InferenceWeights>,
    scheduler: ExpertSchedulerSettings,
    forecast: &Forecast,
    ranks: usize,
    prompts: &[Vec<u32>],
    steps: usize,
) -> (Vec<Vec<u32>>, u64) {
    let options = ExpertOptions { scheduler, forecast: forecast.clone(), planning_flops: 0, verify_every: Some(3) };
    let results = on_ranks(weights, DType::F32, &options, ranks, |model, comm| {
        let own: Vec<Vec<u32>> = prompts.iter().skip(comm.rank()).step_by(ranks).cloned().collect();
        let answers = go_on(model, comm, &own, steps);
        (answers, model.take_stats().total(|layer| layer.moved_bytes))
    });
    let answers = (0..prompts.len()).map(|number| results[number % ranks].0[number / ranks].clone()).collect();
    (answers, results[0].1)
}

#[test]
fn few_tokens_have_the_same_bits_on_any_number_of_ranks() {
    const SEQUENCES: u32 = 5;
    let sizes = Sizes { vocab: 64, hidden: 256, layers: 2, heads: 4, experts: 8, top_k: 2, expert_hidden: 192 };
    let config = ModelConfig { kv_heads: 2, ..ModelConfig::family(ModelKind::Qwen3Moe, sizes) };
    let weights = Arc::new(InferenceWeights::initial(config, 7));
    let (config, vocab) = (weights.config(), sizes.vocab);
    // A prompt, then single tokens.
    let fed = |id: u32, step: usize| -> Vec<u32> {
        let text = prompt(config, 12);
        if step == 0 { text[..3 + id as usize].to_vec() } else { vec![text[step + id as usize]] }
    };
    for dtype in [DType::F32, DType::Bf16] {
        let Some(gpu) = gpu() else { return };
        // Kernels are compiled once, before ranks would all do so at the same time; the device stays open meanwhile.
        let mut reference = alone(gpu, &weights, dtype, None);
        device_logits(&mut reference, &[9]);
        let mut first = None;
        for ranks in [1, 2, 3] {
            let options = ExpertOptions {
                scheduler: ExpertSchedulerSettings {
                    slots: config.experts.div_ceil(ranks),
                    ..ExpertOptions::fixed(config).scheduler
                },
                ..ExpertOptions::fixed(config)
            };
            let logits = on_ranks(&weights, dtype, &options, ranks, |model, comm| {
                let mine = || (comm.rank() as u32..SEQUENCES).step_by(ranks);
                mine().for_each(|id| model.cache().admit(id, 1));
                let mut logits: Vec<(u32, Vec<f32>)> = Vec::new();
                let sequences: Vec<u32> = mine().collect();
                for step in 0..4 {
                    let texts: Vec<Vec<u32>> = sequences.iter().map(|&id| fed(id, step)).collect();
                    let feed = |(&id, tokens)| SequenceFeed { id, tokens, logits: LogitsOf::Last };
                    let feeds: Vec<_> = sequences.iter().zip(texts.iter().map(Vec::as_slice)).map(feed).collect();
                    comm.begin_evaluation(step as u64).unwrap();
                    model.forward(comm, InferenceBatch { feeds: &feeds, ..InferenceBatch::default() }).unwrap();
                    comm.end_step();
                    logits
                        .extend(sequences.iter().copied().zip(model.logits().chunks_exact(vocab).map(<[f32]>::to_vec)));
                }
                logits
            });
            let mut all: Vec<(u32, Vec<f32>)> = logits.into_iter().flatten().collect();
            // A stable order: each sequence's steps stay one after another.
            all.sort_by_key(|(id, _)| *id);
            assert!(*first.get_or_insert_with(|| all.clone()) == all, "{dtype:?} on {ranks} ranks");
        }
    }
}

#[test]
fn experts_that_move_change_no_token() {
    let Some(gpu) = gpu() else { return };
    let name = "qwen3_moe";
    let weights = loaded(name);
    // Kernels are compiled once, before ranks would all do so at the same time; the device stays open meanwhile.
    let mut reference = alone(gpu, &weights, DType::F32, Some(2));
    device_logits(&mut reference, &[40]);
    let (config, expected) = (weights.config(), continuations(name));
    let prompts: Vec<Vec<u32>> = expected.iter().map(|(prompt, _)| prompt.clone()).collect();
    let steps = expected.iter().map(|(_, continuation)| continuation.len()).max().unwrap();
    let mut moved_at_all = 0;
    for ranks in [2, 3] {
        let slots = config.experts.div_ceil(ranks) + 1;
        assert!(slots < config.experts, "{slots} slots for {} experts leave nothing to move", config.experts);
        for (placement, forecast, copy_ns) in [
            (PlacementPolicy::Static, Forecast::None, 1.0),
            // Copies that seem to take no time are begun for the next layer, long ones for the next step.
            (PlacementPolicy::Lina, Forecast::NextGate, 1.0),
            (PlacementPolicy::Lina, Forecast::History(0.7), 1e12),
            (PlacementPolicy::Eplb, Forecast::History(0.7), 1.0),
            (PlacementPolicy::LinaAuto, Forecast::History(0.7), 1.0),
        ] {
            let scheduler = ExpertSchedulerSettings {
                placement,
                estimation: true,
                fine_tuning: true,
                slots,
                top_k: config.top_k,
                costs: PlacementCosts { row_ns: 1000.0, wire_row_ns: 1.0, copy_ns },
                plan_every: 3,
                seed: 1,
            };
            let (answers, moved) = go_on_in_slots(&weights, scheduler, &forecast, ranks, &prompts, steps);
            println!("{placement} on {ranks} ranks: {moved} bytes moved");
            for (answer, (_, continuation)) in answers.iter().zip(&expected) {
                assert_eq!(answer[..continuation.len()], *continuation, "{placement} on {ranks} ranks");
            }
            assert!(moved == 0 || placement != PlacementPolicy::Static);
            assert!(moved > 0 || placement != PlacementPolicy::Lina, "{placement} on {ranks} ranks moves experts");
            moved_at_all += moved;
        }
    }
    assert!(moved_at_all > 0);
}

#[test]
fn bf16_is_close_to_the_processor() {
    let sizes = Sizes { vocab: 512, hidden: 256, layers: 2, heads: 4, experts: 8, top_k: 2, expert_hidden: 192 };
    for kind in [ModelKind::Mixtral, ModelKind::Qwen3Moe, ModelKind::Olmoe, ModelKind::LinaMoe] {
        let mut config = ModelConfig::family(kind, sizes);
        if matches!(kind, ModelKind::Mixtral | ModelKind::Qwen3Moe) {
            config.kv_heads = 2;
        }
        // Gates that no token's rounding sways: one goes by the token's number in the step, the other takes all experts.
        for (gate, top_k) in [(Gate::Even, config.top_k), (Gate::Own, config.experts)] {
            let Some(gpu) = gpu() else { return };
            let config = ModelConfig { top_k, ..config.clone() };
            let weights = Arc::new(InferenceWeights::initial(config, 7));
            let mut model = alone(gpu, &weights, DType::Bf16, None);
            model.set_gate(gate.clone());
            for pieces in [vec![40], vec![30, 1, 9], vec![1; 40]] {
                let expected = host_logits(&weights, &pieces, gate.clone());
                let error = relative_error(&device_logits(&mut model, &pieces), &expected);
                println!("{kind}, {top_k} experts a token: bf16 logits differ by {error:.1e}");
                assert!(error < 3e-2, "{kind}: bf16 logits differ by {error}");
            }
        }
    }
}
