//! One global batch on any number of ranks, with any placement of experts: the same loss and the same gradients.

use std::collections::BTreeMap;
use std::time::Duration;

use lina_comm::Comm;
use lina_comm::emulated::{Device, EmulatedCluster, EmulatedConfig};
use lina_kernels::Compute;
use lina_model::*;
use lina_net::{Link, Topology};
use lina_plan::{ExpertLayout, Policy, PolicyRules, PolicySettings, share_range};

const SEQUENCES: usize = 6;
const TOKENS: usize = 10;

type Gradients = BTreeMap<String, Vec<f32>>;

fn config(kind: ModelKind) -> ModelConfig {
    let sizes = Sizes { vocab: 40, hidden: 32, layers: 2, heads: 4, experts: 5, top_k: 2, expert_hidden: 24 };
    let mut config = ModelConfig::family(kind, sizes);
    config.router.aux_loss = AuxLoss::Switch;
    config.router.aux_loss_coefficient = 0.05;
    config.router.z_loss_coefficient = 0.01;
    config.router.jitter = 0.02;
    config.initializer_range = 0.1;
    config
}

/// One step's loss and every parameter's gradient, put together from the ranks that hold it.
fn step(
    config: &ModelConfig,
    ranks: usize,
    per_rank: Option<usize>,
    policy: Policy,
    chunks: usize,
) -> (f64, Gradients) {
    let experts = ExpertLayout::new(config.experts, ranks, per_rank).unwrap();
    let link = Link { gbps: 1.0, latency_us: 1.0, launch_us: 1.0, message_us: 0.0, nodes: ranks, inner_gbps: 1.0 };
    let cluster = EmulatedCluster::new(EmulatedConfig {
        topology: Topology::new(link, ranks).unwrap(),
        device: Device { gflops: 10.0 },
        groups: experts.groups().to_vec(),
        timeout: Duration::from_secs(30),
        delays: None,
        log_launches: false,
    });
    let settings = PolicySettings {
        bucket_bytes: 9000,
        partition_bytes: 3000,
        pipeline_chunks: chunks,
        defer_attention_gradients: policy == Policy::LinaAuto,
        ..PolicySettings::default()
    };
    let outcomes: Vec<(f64, Gradients)> = std::thread::scope(|scope| {
        let threads: Vec<_> = cluster
            .comms(PolicyRules::new(policy, &settings))
            .into_iter()
            .map(|comm| scope.spawn(|| rank_step(config, &experts, comm)))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let loss = outcomes[0].0;
    let mut gradients = Gradients::new();
    for (rank, (_, held)) in outcomes.into_iter().enumerate() {
        for (key, gradient) in held {
            if let Some(other) = gradients.get(&key) {
                assert_eq!(other, &gradient, "{key}: rank {rank} holds another reduced gradient");
            }
            gradients.insert(key, gradient);
        }
    }
    (loss, gradients)
}

fn rank_step(config: &ModelConfig, experts: &ExpertLayout, mut comm: Comm) -> (f64, Gradients) {
    let (rank, ranks) = (comm.rank(), comm.ranks());
    let limits = ModelLimits {
        max_tokens: SEQUENCES.div_ceil(ranks) * TOKENS,
        max_sequence_tokens: TOKENS,
        max_expert_rows: None,
    };
    let mut model =
        Model::new(Purpose::Training, config.clone(), experts.clone(), rank, Compute::new(1), limits).unwrap();
    let (_, layout, parameters) = model.for_update();
    parameters.initialise(layout, 3);
    let ids = |sequence: usize| (0..TOKENS + 1).map(move |i| ((sequence * 31 + i * i * 7) % 40) as u32);
    let mine = share_range(SEQUENCES, ranks, rank);
    let input: Vec<u32> = mine.clone().flat_map(|sequence| ids(sequence).take(TOKENS)).collect();
    let target: Vec<u32> = mine.clone().flat_map(|sequence| ids(sequence).skip(1)).collect();
    let sequences = vec![TOKENS; mine.len()];
    let context = StepContext {
        training: true,
        global_tokens: (SEQUENCES * TOKENS) as u64,
        micro_batches: 1,
        seed: 5,
        step: 0,
        token_offset: (mine.start * TOKENS) as u64,
    };
    comm.begin_step(0).unwrap();
    comm.begin_micro_batch(true).unwrap();
    let batch = Batch { input: &input, target: &target, sequences: &sequences };
    let output = model.forward(&mut comm, batch, context).unwrap();
    model.backward(&mut comm, false).unwrap();
    comm.finish_gradients().unwrap();
    let mut loss = [output.loss_sum / context.global_tokens as f64 + output.router_loss];
    comm.agree(&mut loss).unwrap();
    comm.end_step();
    let (layout, parameters) = (model.layout(), model.parameters());
    let held = layout.parameters().iter().filter_map(|parameter| {
        let gradient = parameters.gradient(layout, &parameter.place)?;
        Some((parameter.key.clone(), gradient.to_vec()))
    });
    (loss[0], held.collect())
}

fn relative_difference(a: &[f32], b: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut b.iter().map(|&b| f64::from(b))).max(1e-30)
}

#[test]
fn any_number_of_ranks_has_the_same_gradients() {
    for kind in [ModelKind::Mixtral, ModelKind::Qwen3Moe, ModelKind::Olmoe, ModelKind::LinaMoe] {
        let config = config(kind);
        let (loss, reference) = step(&config, 1, None, Policy::Fair, 1);
        for (ranks, per_rank) in [(2, None), (3, None), (4, None), (8, None), (4, Some(3)), (3, Some(5)), (7, Some(2))]
        {
            let (other_loss, gradients) = step(&config, ranks, per_rank, Policy::Lina, 2);
            assert!((other_loss - loss).abs() < 1e-6, "{kind}, {ranks} ranks: loss {other_loss}, expected {loss}");
            assert_eq!(gradients.len(), reference.len());
            for (key, gradient) in &gradients {
                let difference = relative_difference(gradient, &reference[key]);
                assert!(difference < 1e-5, "{kind}, {ranks} ranks, {per_rank:?}: {key} differs by {difference:e}");
            }
        }
    }
}

#[test]
fn policies_and_chunks_have_the_same_bits() {
    let config = config(ModelKind::Mixtral);
    for (ranks, per_rank) in [(3, None), (4, Some(3))] {
        let reference = step(&config, ranks, per_rank, Policy::Fair, 1);
        for (policy, chunks) in [
            (Policy::Priority, 1),
            (Policy::Fixed, 1),
            (Policy::Partition, 1),
            (Policy::Lina, 1),
            (Policy::Lina, 2),
            (Policy::Lina, 4),
            (Policy::LinaAuto, 1),
            (Policy::LinaAuto, 3),
        ] {
            let other = step(&config, ranks, per_rank, policy, chunks);
            assert_eq!(other.0.to_bits(), reference.0.to_bits(), "{policy} with {chunks} chunks: another loss");
            assert!(other.1 == reference.1, "{policy} with {chunks} chunks: other gradients");
        }
    }
}
