//! Gradients against central differences of the loss: the families' switches, both kinds of positions and norms,
//! router losses, capacity and jitter.

use lina_comm::Comm;
use lina_kernels::Compute;
use lina_model::{AuxLoss, Batch, FfnKind, Model, ModelConfig, ModelKind, ModelLimits, Purpose, Sizes, StepContext};
use lina_plan::ExpertLayout;

const SIZES: Sizes = Sizes { vocab: 23, hidden: 16, layers: 2, heads: 4, experts: 4, top_k: 2, expert_hidden: 12 };
const STEP: StepContext =
    StepContext { training: true, global_tokens: 11, micro_batches: 2, seed: 5, step: 3, token_offset: 7 };

fn model(mut config: ModelConfig) -> Model {
    // Larger than usual, so that no part of the loss drowns in rounding.
    config.initializer_range = 0.3;
    let layout = ExpertLayout::new(config.experts, 1, None).unwrap();
    let limits = ModelLimits { max_tokens: 16, max_sequence_tokens: 8, max_expert_rows: None };
    let mut model = Model::new(Purpose::Training, config, layout, 0, Compute::new(1), limits).unwrap();
    let (_, layout, parameters) = model.for_update();
    parameters.initialise(layout, 42);
    // Norms at 1 and biases at 0 would hide mistakes.
    for (index, value) in parameters.dense.iter_mut().enumerate() {
        *value += 0.1 * (index as f32 * 0.7).sin();
    }
    model
}

fn loss(model: &mut Model, input: &[u32], target: &[u32]) -> f64 {
    let batch = Batch { input, target, sequences: &[5, 8] };
    let output = model.forward(&mut Comm::solo(), batch, STEP).unwrap();
    output.loss_sum / STEP.global_tokens as f64 + output.router_loss
}

fn choices(model: &Model) -> Vec<Vec<u32>> {
    let layers = 0..model.config().layers;
    layers
        .filter_map(|layer| model.routing(layer))
        .map(|routing| routing.expert_index().expect("on the host").to_vec())
        .collect()
}

fn check(name: &str, config: ModelConfig) {
    let mut model = model(config);
    let input: Vec<u32> = (0..13).map(|i| (i * 7 + i * i) % 23).collect();
    let mut target: Vec<u32> = input.iter().map(|id| (id + 5) % 23).collect();
    target[4] = u32::MAX;
    target[12] = u32::MAX;
    let mut comm = Comm::solo();
    loss(&mut model, &input, &target);
    model.backward(&mut comm, false).unwrap();

    let parameters = model.layout().parameters().to_vec();
    let (mut checked, mut jumps) = (0, 0);
    for parameter in parameters {
        let (layout, gradients) = (model.layout().clone(), model.parameters());
        let gradient = gradients.gradient(&layout, &parameter.place).unwrap().to_vec();
        let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        // Along the gradient's own direction, where a difference stands out most from rounding, and along another.
        for direction in 0..2 {
            let mut along: Vec<f32> = match direction {
                0 => gradient.clone(),
                _ => (0..gradient.len()).map(|i| (i as f32 * 1.3 + 0.4).cos()).collect(),
            };
            let length = along.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>().sqrt();
            if length < 1e-9 {
                continue;
            }
            along.iter_mut().for_each(|a| *a = (f64::from(*a) / length) as f32);
            let slope: f64 = along.iter().zip(&gradient).map(|(&a, &g)| f64::from(a) * f64::from(g)).sum();
            // A step that changes a token's choice of experts crosses a jump, where no difference is a slope.
            let Some(difference) = [2e-3f32, 1e-3, 5e-4, 2.5e-4].into_iter().find_map(|distance| {
                let mut at = |factor: f32| {
                    let (_, layout, parameters) = model.for_update();
                    let values = parameters.get_mut(layout, &parameter.place).unwrap();
                    let before = values.to_vec();
                    values.iter_mut().zip(&along).for_each(|(value, a)| *value += factor * distance * a);
                    let result = loss(&mut model, &input, &target);
                    let (_, layout, parameters) = model.for_update();
                    parameters.get_mut(layout, &parameter.place).unwrap().copy_from_slice(&before);
                    (result, choices(&model))
                };
                let (above, below) = (at(1.0), at(-1.0));
                (above.1 == below.1).then(|| (above.0 - below.0) / (2.0 * f64::from(distance)))
            }) else {
                jumps += 1;
                continue;
            };
            checked += 1;
            let tolerance = 1e-3 + 0.02 * norm;
            assert!(
                (difference - slope).abs() < tolerance,
                "{name}: {} along {direction}: {difference} by differences, {slope} by backward",
                parameter.key
            );
        }
    }
    assert!(jumps * 10 < checked, "{name}: {jumps} jumps, {checked} slopes");
}

#[test]
fn the_papers_kind_with_every_router_setting() {
    for ffn in [FfnKind::Gelu, FfnKind::Relu] {
        for (aux_loss, capacity_factor, jitter) in
            [(AuxLoss::None, None, 0.0), (AuxLoss::Gshard, Some(0.7), 0.0), (AuxLoss::Switch, None, 0.2)]
        {
            let mut config = ModelConfig::family(ModelKind::LinaMoe, SIZES);
            config.ffn = ffn;
            config.router.aux_loss = aux_loss;
            config.router.aux_loss_coefficient = 0.3;
            config.router.z_loss_coefficient = 0.2;
            config.router.capacity_factor = capacity_factor;
            config.router.jitter = jitter;
            check(&format!("{ffn:?} {aux_loss:?}"), config);
        }
    }
}

#[test]
fn the_families_switches() {
    let mut config = ModelConfig::family(ModelKind::Mixtral, SIZES);
    config.kv_heads = 1;
    config.sliding_window = Some(3);
    config.router.aux_loss_coefficient = 0.3;
    check("mixtral", config);

    let mut config = ModelConfig::family(ModelKind::Qwen3Moe, SIZES);
    config.kv_heads = 2;
    config.head_dim = 6;
    config.dense_layers = vec![1];
    config.dense_hidden = 20;
    check("qwen3_moe", config);

    let mut config = ModelConfig::family(ModelKind::Olmoe, SIZES);
    config.tied_embeddings = true;
    config.clip_qkv = Some(0.8);
    config.router.z_loss_coefficient = 0.2;
    check("olmoe", config);
}
