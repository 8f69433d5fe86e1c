//! The decoder on a GPU: transformers' fixtures in f32, and every family's switches against the processor, in f32 and bf16.
//! Skipped where there is no GPU.

mod common;

use common::{folders, tensors};
use lina_comm::{Comm, DeviceClock};
use lina_cuda::testing::{gpu, random, relative_error};
use lina_cuda::{DType, Gpu};
use lina_kernels::Compute;
use lina_model::{
    AuxLoss, Batch, Checkpoint, CudaModel, DeviceWeights, FfnKind, Model, ModelConfig, ModelKind, ModelLimits,
    ParameterLayout, Parameters, Purpose, Sizes, StepContext,
};
use lina_plan::ExpertLayout;

/// A model of one rank with the parameters that `fill` gives, and its handle.
fn on_gpu(
    gpu: Gpu,
    config: &ModelConfig,
    dtype: DType,
    limits: ModelLimits,
    fill: impl Fn(&ParameterLayout, &mut Parameters),
) -> (CudaModel, Comm) {
    let layout = ExpertLayout::new(config.experts, 1, None).unwrap();
    let mut comm = Comm::solo();
    comm.set_device(DeviceClock::new(&gpu).unwrap());
    let mut model = CudaModel::new(Purpose::Training, gpu, config.clone(), layout, 0, dtype, limits).unwrap();
    let mut parameters = Parameters::zeros(model.layout());
    fill(model.layout(), &mut parameters);
    model.load(&parameters).unwrap();
    let mut back = Parameters::zeros(model.layout());
    model.store(&mut back).unwrap();
    assert_eq!((back.dense, back.experts), (parameters.dense, parameters.experts));
    (model, comm)
}

#[test]
fn logits_loss_and_gradients_are_those_of_transformers() {
    for folder in folders() {
        let Some(gpu) = gpu() else { return };
        let name = folder.display();
        let mut config = ModelConfig::from_folder(&folder).unwrap();
        config.router.aux_loss_coefficient = 0.0;
        let expected = tensors(&folder.join("expected.safetensors"));
        let ids: Vec<u32> = expected["input_ids"].iter().map(|&id| id as u32).collect();
        let rows = 2;
        let length = ids.len() / rows;
        let target: Vec<u32> =
            ids.chunks_exact(length).flat_map(|row| row[1..].iter().copied().chain([u32::MAX])).collect();
        let limits = ModelLimits { max_tokens: ids.len() + 5, max_sequence_tokens: length, max_expert_rows: None };
        let load = |layout: &ParameterLayout, parameters: &mut Parameters| {
            Checkpoint::open(&folder).unwrap().load(layout, parameters).unwrap();
        };
        let (mut model, mut comm) = on_gpu(gpu, &config, DType::F32, limits, load);

        let batch = Batch { input: &ids, target: &target, sequences: &[length, length] };
        let evaluated = model.forward(&mut comm, batch, StepContext::evaluation()).unwrap();
        let loss = evaluated.loss_sum / evaluated.target_tokens as f64;
        assert!((loss - f64::from(expected["loss"][0])).abs() < 1e-5, "{name}: loss {loss} {:?}", expected["loss"]);
        let logits = model.logits().unwrap().unwrap();
        let differences = logits.iter().zip(&expected["logits"]).map(|(a, b)| (a - b).abs());
        let logits = differences.fold(0.0, f32::max);
        assert!(logits < 1e-4, "{name}: logits differ by {logits}");

        let step = StepContext { training: true, global_tokens: evaluated.target_tokens, ..StepContext::evaluation() };
        let gradients = tensors(&folder.join("gradients.safetensors"));
        let mut worst = (0.0, String::new());
        // Once alone, and once as two micro-batches of the same tokens, which double every gradient.
        for (number, micro_batches) in [1, 2].into_iter().enumerate() {
            comm.begin_step(number as u64).unwrap();
            for micro in 0..micro_batches {
                comm.begin_micro_batch(micro + 1 == micro_batches).unwrap();
                model.forward(&mut comm, batch, step).unwrap();
                model.backward(&mut comm, micro > 0).unwrap();
            }
            comm.finish_gradients().unwrap();
            for parameter in model.layout().parameters() {
                let mut found = model.gradient(&parameter.place).unwrap().unwrap();
                found.iter_mut().for_each(|value| *value /= micro_batches as f32);
                let difference = relative_error(&found, &gradients[&parameter.key]);
                assert!(difference < 1e-3, "{name}: gradient of {} differs by {difference}", parameter.key);
                if difference > worst.0 {
                    worst = (difference, parameter.key.clone());
                }
            }
        }
        println!("{name}: loss {loss:.6}, logits within {logits:.1e}, gradients within {:.1e} ({})", worst.0, worst.1);
    }
}

/// One step on the processor and on the GPU: losses, router losses and every gradient.
fn compare(name: &str, config: &ModelConfig, dtype: DType, sequences: &[usize], tolerance: f64) {
    let Some(gpu) = gpu() else { return };
    let tokens: usize = sequences.iter().sum();
    let longest = sequences.iter().copied().max().unwrap_or(0);
    let limits = ModelLimits { max_tokens: tokens + 3, max_sequence_tokens: longest, max_expert_rows: None };
    let vocab = config.vocab as u32;
    let input: Vec<u32> = (0..tokens as u32).map(|i| (i * 7 + i * i) % vocab).collect();
    let mut target: Vec<u32> = input.iter().map(|id| (id * 3 + 5) % vocab).collect();
    target[tokens / 2] = u32::MAX;
    let batch = Batch { input: &input, target: &target, sequences };
    let step = StepContext {
        training: true,
        global_tokens: tokens as u64,
        micro_batches: 2,
        seed: 5,
        step: 3,
        token_offset: 7,
    };
    let fill = |layout: &ParameterLayout, parameters: &mut Parameters| {
        parameters.initialise(layout, 42);
        // Norms at 1 and biases at 0 would hide mistakes.
        let noise = random(7, parameters.dense.len());
        parameters.dense.iter_mut().zip(noise).for_each(|(value, noise)| *value += 0.05 * noise);
        if dtype == DType::Bf16 {
            let all = parameters.dense.iter_mut().chain(&mut parameters.experts);
            all.for_each(|value| *value = half::bf16::from_f32(*value).to_f32());
        }
    };
    let experts = ExpertLayout::new(config.experts, 1, None).unwrap();
    let mut reference = Model::new(Purpose::Training, config.clone(), experts, 0, Compute::new(2), limits).unwrap();
    let (_, layout, parameters) = reference.for_update();
    fill(layout, parameters);
    let expected = reference.forward(&mut Comm::solo(), batch, step).unwrap();
    reference.backward(&mut Comm::solo(), false).unwrap();

    let (mut model, mut comm) = on_gpu(gpu, config, dtype, limits, fill);
    comm.begin_step(0).unwrap();
    comm.begin_micro_batch(true).unwrap();
    let found = model.forward(&mut comm, batch, step).unwrap();
    model.backward(&mut comm, false).unwrap();
    comm.finish_gradients().unwrap();
    let close = |found: f64, expected: f64| (found - expected).abs() <= tolerance * expected.abs().max(1e-3);
    assert!(close(found.loss_sum, expected.loss_sum), "{name}: {found:?}, expected {expected:?}");
    assert!(close(found.router_loss, expected.router_loss), "{name}: {found:?}, expected {expected:?}");
    assert_eq!(found.target_tokens, expected.target_tokens);
    for (expected, found) in
        (0..config.layers).filter_map(|layer| Some((reference.routing(layer)?, model.routing(layer)?)))
    {
        let counts = |routing: lina_model::LayerRouting<'_>| -> Vec<u64> {
            (0..config.experts).map(|expert| routing.local_assignments(expert)).collect()
        };
        assert_eq!(counts(found), counts(expected), "{name}: routing");
        assert_eq!(found.dropped(), expected.dropped(), "{name}: routing");
    }
    let mut worst = (0.0, "");
    for parameter in reference.layout().parameters() {
        let found = model.gradient(&parameter.place).unwrap().unwrap();
        let expected = reference.parameters().gradient(reference.layout(), &parameter.place).unwrap();
        if expected.iter().all(|value| *value == 0.0) {
            assert!(found.iter().all(|value| *value == 0.0), "{name}: {} has a gradient", parameter.key);
            continue;
        }
        let difference = relative_error(&found, expected);
        if difference > worst.0 {
            worst = (difference, &parameter.key);
        }
    }
    println!("{name} {dtype:?}: gradients within {:.1e} ({})", worst.0, worst.1);
    assert!(worst.0 < 5.0 * tolerance, "{name}: gradient of {} differs by {}", worst.1, worst.0);
}

const SMALL: Sizes = Sizes { vocab: 23, hidden: 16, layers: 2, heads: 4, experts: 4, top_k: 2, expert_hidden: 12 };

#[test]
fn every_router_setting_is_that_of_the_processor() {
    for ffn in [FfnKind::Gelu, FfnKind::Relu] {
        for (aux_loss, capacity_factor, jitter) in
            [(AuxLoss::None, None, 0.0), (AuxLoss::Gshard, Some(0.7), 0.0), (AuxLoss::Switch, None, 0.2)]
        {
            let mut config = ModelConfig::family(ModelKind::LinaMoe, SMALL);
            config.ffn = ffn;
            config.initializer_range = 0.3;
            config.router.aux_loss = aux_loss;
            config.router.aux_loss_coefficient = 0.3;
            config.router.z_loss_coefficient = 0.2;
            config.router.capacity_factor = capacity_factor;
            config.router.jitter = jitter;
            compare(&format!("{ffn:?} {aux_loss:?}"), &config, DType::F32, &[5, 8], 1e-4);
        }
    }
}

#[test]
fn every_family_is_that_of_the_processor() {
    let mut config = ModelConfig::family(ModelKind::Mixtral, SMALL);
    config.kv_heads = 1;
    config.sliding_window = Some(3);
    config.router.aux_loss_coefficient = 0.3;
    compare("mixtral", &config, DType::F32, &[5, 8], 1e-4);

    let mut config = ModelConfig::family(ModelKind::Qwen3Moe, SMALL);
    config.kv_heads = 2;
    config.head_dim = 6;
    config.dense_layers = vec![1];
    config.dense_hidden = 20;
    compare("qwen3_moe", &config, DType::F32, &[5, 8], 1e-4);

    let mut config = ModelConfig::family(ModelKind::Olmoe, SMALL);
    config.tied_embeddings = true;
    config.clip_qkv = Some(0.8);
    config.router.z_loss_coefficient = 0.2;
    compare("olmoe", &config, DType::F32, &[5, 8], 1e-4);
}

#[test]
fn an_evaluation_computes_what_training_does() {
    for dtype in [DType::F32, DType::Bf16] {
        let sizes = Sizes { vocab: 512, hidden: 256, layers: 4, heads: 4, experts: 8, top_k: 2, expert_hidden: 192 };
        let mut config = ModelConfig::family(ModelKind::Qwen3Moe, sizes);
        config.dense_layers = vec![1, 3];
        config.dense_hidden = 320;
        config.router.aux_loss = AuxLoss::Switch;
        config.router.aux_loss_coefficient = 0.3;
        config.router.z_loss_coefficient = 0.2;
        let limits = ModelLimits { max_tokens: 200, max_sequence_tokens: 80, max_expert_rows: None };
        let outcomes = [Purpose::Training, Purpose::Evaluation].map(|purpose| {
            let gpu = gpu()?;
            let mut comm = Comm::solo();
            comm.set_device(DeviceClock::new(&gpu).unwrap());
            let experts = ExpertLayout::new(config.experts, 1, None).unwrap();
            let mut model = CudaModel::new(purpose, gpu, config.clone(), experts, 0, dtype, limits).unwrap();
            let mut parameters = Parameters::without_gradients(model.layout());
            parameters.initialise(model.layout(), 42);
            model.load(&parameters).unwrap();
            // The second batch is shorter: what the first one left must not matter.
            Some([&[50, 80, 70][..], &[33, 61]].map(|sequences| {
                let input: Vec<u32> =
                    (0..sequences.iter().sum::<usize>() as u32).map(|i| (i * 7 + i * i) % 512).collect();
                let batch = Batch { input: &input, target: &input, sequences };
                let output = model.forward(&mut comm, batch, StepContext::evaluation()).unwrap();
                (output, model.logits().unwrap().unwrap())
            }))
        });
        let [Some(expected), Some(found)] = outcomes else { return };
        assert!(expected[0].0.router_loss > 0.0);
        assert_eq!(found, expected, "{dtype:?}");
    }
}

#[test]
fn an_evaluation_holds_experts_once() {
    let config = ModelConfig::family(ModelKind::Mixtral, SMALL);
    let experts = ExpertLayout::new(config.experts, 1, None).unwrap();
    let layout = ParameterLayout::new(&config, experts.held_by(0));
    let (dense, experts) = (layout.dense_len(), layout.experts_len());
    for (dtype, purpose, bytes) in [
        (DType::F32, Purpose::Training, 4 * dense + 4 * experts),
        (DType::F32, Purpose::Evaluation, 4 * dense + 4 * experts),
        (DType::Bf16, Purpose::Training, 6 * dense + 6 * experts),
        (DType::Bf16, Purpose::Evaluation, 6 * dense + 2 * experts),
    ] {
        assert_eq!(DeviceWeights::bytes(&layout, dtype, purpose), bytes, "{dtype:?} {purpose:?}");
    }
}

#[test]
fn bf16_is_close_to_the_processor() {
    for kind in [ModelKind::Mixtral, ModelKind::Qwen3Moe, ModelKind::Olmoe, ModelKind::LinaMoe] {
        // Every token goes to every expert: rounding changes no choice, which would change gradients of whole experts.
        let mut sizes =
            Sizes { vocab: 512, hidden: 256, layers: 2, heads: 4, experts: 3, top_k: 3, expert_hidden: 192 };
        for (dtype, experts, top_k, tolerance) in [(DType::Bf16, 3, 3, 1e-2), (DType::F32, 8, 2, 1e-4)] {
            (sizes.experts, sizes.top_k) = (experts, top_k);
            let mut config = ModelConfig::family(kind, sizes);
            if kind == ModelKind::Mixtral || kind == ModelKind::Qwen3Moe {
                config.kv_heads = 2;
            }
            config.router.aux_loss_coefficient = 0.02;
            compare(&format!("{kind}"), &config, dtype, &[200, 129, 1], tolerance);
        }
    }
}
