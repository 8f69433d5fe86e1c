//! What a model announces before it computes is what its matrix products then take.

use std::time::Duration;

use lina_comm::emulated::{Device, EmulatedCluster, EmulatedConfig};
use lina_kernels::{Compute, gemm};
use lina_model::{Batch, Model, ModelConfig, ModelKind, ModelLimits, Purpose, Sizes, StepContext};
use lina_net::{Link, Topology};
use lina_plan::{ExpertLayout, Policy, PolicyRules, PolicySettings};

#[test]
fn announced_operations_are_those_of_the_products() {
    let sizes = Sizes { vocab: 64, hidden: 32, layers: 3, heads: 4, experts: 4, top_k: 2, expert_hidden: 48 };
    let mut config = ModelConfig::family(ModelKind::Qwen3Moe, sizes);
    (config.kv_heads, config.dense_layers, config.dense_hidden) = (2, vec![1], 80);
    let limits = ModelLimits { max_tokens: 64, max_sequence_tokens: 32, max_expert_rows: None };
    let layout = ExpertLayout::new(4, 1, None).unwrap();
    let mut model = Model::new(Purpose::Training, config, layout, 0, Compute::new(1), limits).unwrap();
    let (_, layout, parameters) = model.for_update();
    parameters.initialise(layout, 1);

    let link = Link { gbps: 1.0, latency_us: 0.0, launch_us: 0.0, message_us: 0.0, nodes: 1, inner_gbps: 1.0 };
    let cluster = EmulatedCluster::new(EmulatedConfig {
        topology: Topology::new(link, 1).unwrap(),
        device: Device { gflops: 1.0 },
        groups: vec![vec![0]],
        timeout: Duration::from_secs(20),
        delays: None,
        log_launches: false,
    });
    let rules = PolicyRules::new(Policy::Fair, &PolicySettings::default());
    let mut comm = cluster.comms(rules).pop().unwrap();
    let ids: Vec<u32> = (0..56).collect();
    let step = StepContext { training: true, global_tokens: 56, ..StepContext::evaluation() };
    gemm::record(true);
    comm.begin_step(0).unwrap();
    comm.begin_micro_batch(true).unwrap();
    let start = comm.now();
    model.forward(&mut comm, Batch { input: &ids, target: &ids, sequences: &[32, 24] }, step).unwrap();
    model.backward(&mut comm, false).unwrap();
    gemm::record(false);
    // At 10^9 operations a second, an operation takes a nanosecond.
    let announced = comm.now() - start;
    let products: u64 = gemm::take_recorded().iter().map(|s| 2 * (s.m * s.n * s.k) as u64).sum();
    // Attention's tiles are not recorded: two products forward and five backward for each visible pair and head.
    let pairs: u64 = [32u64, 24].iter().map(|length| length * (length + 1) / 2).sum();
    let attention = 3 * 7 * 2 * pairs * 4 * 8;
    assert_eq!(announced, products + attention);
}
