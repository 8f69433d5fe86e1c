//! Where routing is tight: capacities that drop assignments in a global order, limits on rows, ranks without tokens,
//! over two micro-batches with jitter. One rank against several, and every policy to the bit.

use std::time::Duration;

use lina_comm::Comm;
use lina_comm::local::{LocalConfig, LocalJob};
use lina_kernels::Compute;
use lina_model::{
    AuxLoss, Batch, ForwardOutput, Model, ModelConfig, ModelKind, ModelLimits, Purpose, Sizes, StepContext,
};
use lina_plan::{ExpertLayout, Policy, PolicyRules, PolicySettings};

const SEQUENCE: usize = 6;
const VOCAB: u32 = 31;

fn config() -> ModelConfig {
    let sizes =
        Sizes { vocab: VOCAB as usize, hidden: 16, layers: 3, heads: 2, experts: 6, top_k: 2, expert_hidden: 24 };
    let mut config = ModelConfig::family(ModelKind::Qwen3Moe, sizes);
    config.initializer_range = 0.3;
    config.dense_layers = vec![1];
    config.dense_hidden = 24;
    config.router.aux_loss = AuxLoss::Gshard;
    config.router.aux_loss_coefficient = 0.1;
    config.router.z_loss_coefficient = 0.05;
    config.router.jitter = 0.1;
    config.router.capacity_factor = Some(1.1);
    config
}

/// What one step gives: summed losses, and every parameter's gradient, those of experts from their first holder.
#[derive(Debug, PartialEq)]
struct Step {
    loss: f64,
    router_loss: f64,
    dropped: u64,
    gradients: Vec<Vec<f32>>,
}

/// A step of two micro-batches; `sequences[rank]` sequences on each rank, of one global list.
fn step(per_rank: Option<usize>, sequences: &[usize], rules: PolicyRules) -> Step {
    let ranks = sequences.len();
    let layout = ExpertLayout::new(6, ranks, per_rank).unwrap();
    let comms = if ranks == 1 {
        vec![Comm::solo()]
    } else {
        let local = LocalConfig {
            ranks,
            groups: layout.groups().to_vec(),
            timeout: Duration::from_secs(20),
            delays: None,
            log_launches: false,
        };
        LocalJob::start(local, rules).unwrap().1
    };
    let results: Vec<(ForwardOutput, Model)> = std::thread::scope(|scope| {
        let threads: Vec<_> = comms
            .into_iter()
            .enumerate()
            .map(|(rank, comm)| {
                let (layout, first) = (layout.clone(), sequences[..rank].iter().sum::<usize>());
                let count = sequences[rank];
                scope.spawn(move || run_rank(comm, layout, rank, first, count))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let sum = |value: fn(&ForwardOutput) -> f64| results.iter().map(|(output, _)| value(output)).sum();
    let parameters = results[0].1.layout().parameters();
    let gradients = parameters.iter().map(|parameter| {
        let of_rank = |model: &Model| Some(model.parameters().gradient(model.layout(), &parameter.place)?.to_vec());
        let mut copies = results.iter().filter_map(|(_, model)| of_rank(model));
        let first = copies.next().unwrap();
        assert!(copies.all(|copy| copy == first), "{}: replicas differ", parameter.key);
        first
    });
    Step {
        loss: sum(|output| output.loss_sum),
        router_loss: sum(|output| output.router_loss),
        dropped: results.iter().map(|(output, _)| output.dropped_assignments).sum(),
        gradients: gradients.collect(),
    }
}

fn run_rank(mut comm: Comm, layout: ExpertLayout, rank: usize, first: usize, count: usize) -> (ForwardOutput, Model) {
    let limits = ModelLimits { max_tokens: 8 * SEQUENCE, max_sequence_tokens: SEQUENCE, max_expert_rows: None };
    let mut model = Model::new(Purpose::Training, config(), layout, rank, Compute::new(1), limits).unwrap();
    let (_, layout, parameters) = model.for_update();
    parameters.initialise(layout, 9);
    let mut total = ForwardOutput::default();
    comm.begin_step(0).unwrap();
    for micro_batch in 0..2u32 {
        let start = first * SEQUENCE;
        let tokens = start as u32..(start + count * SEQUENCE) as u32;
        let input: Vec<u32> = tokens.clone().map(|i| (i * i + 3 * i + 11 * micro_batch) % VOCAB).collect();
        let target: Vec<u32> =
            tokens.map(|i| if i % 5 == 0 { u32::MAX } else { (i * 7 + micro_batch) % VOCAB }).collect();
        let sequences = vec![SEQUENCE; count];
        let context = StepContext {
            training: true,
            global_tokens: 70,
            micro_batches: 2,
            seed: 1,
            step: 0,
            token_offset: start as u64 + 1000 * u64::from(micro_batch),
        };
        comm.begin_micro_batch(micro_batch == 1).unwrap();
        let batch = Batch { input: &input, target: &target, sequences: &sequences };
        let output = model.forward(&mut comm, batch, context).unwrap();
        model.backward(&mut comm, micro_batch == 1).unwrap();
        total.loss_sum += output.loss_sum;
        total.router_loss += output.router_loss;
        total.dropped_assignments += output.dropped_assignments;
    }
    comm.finish_gradients().unwrap();
    comm.agree(&mut [0.0]).unwrap();
    comm.end_step();
    (total, model)
}

fn rules(policy: Policy, chunks: usize) -> PolicyRules {
    let settings = PolicySettings {
        bucket_bytes: 4000,
        partition_bytes: 1500,
        pipeline_chunks: chunks,
        ..PolicySettings::default()
    };
    PolicyRules::new(policy, &settings)
}

#[test]
fn one_rank_and_several_agree_and_policies_change_no_bit() {
    let alone = step(None, &[7], rules(Policy::Fair, 1));
    assert!(alone.dropped > 0, "the capacity should be felt");
    // The last one has a rank without tokens.
    for (per_rank, sequences) in [
        (None, vec![3, 4]),
        (Some(6), vec![3, 4]),
        (Some(4), vec![4, 3]),
        (None, vec![2, 1, 2, 2]),
        (Some(3), vec![2, 1, 2, 2]),
        (None, vec![1, 0, 0, 1, 1, 1, 1, 2]),
        (Some(2), vec![4, 0, 3]),
    ] {
        let first = step(per_rank, &sequences, rules(Policy::Fair, 1));
        assert_eq!(first.dropped, alone.dropped);
        assert!((first.loss - alone.loss).abs() < 1e-4 * alone.loss, "{} {}", first.loss, alone.loss);
        assert!((first.router_loss - alone.router_loss).abs() < 1e-5 * alone.router_loss);
        for (found, expected) in first.gradients.iter().zip(&alone.gradients) {
            let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
            let difference = norm(&mut found.iter().zip(expected).map(|(a, b)| a - b));
            assert!(difference <= 1e-4 * norm(&mut expected.iter().copied()) + 1e-7);
        }
        for (policy, chunks) in [(Policy::Lina, 1), (Policy::Lina, 2), (Policy::Lina, 4), (Policy::Priority, 1)] {
            assert_eq!(step(per_rank, &sequences, rules(policy, chunks)), first, "{policy} {chunks} {sequences:?}");
        }
    }
}

#[test]
fn more_rows_than_the_limit_are_an_error() {
    let layout = ExpertLayout::new(6, 1, None).unwrap();
    let limits = ModelLimits { max_tokens: SEQUENCE, max_sequence_tokens: SEQUENCE, max_expert_rows: Some(10) };
    let mut config = config();
    config.router.capacity_factor = None;
    let mut model = Model::new(Purpose::Training, config, layout, 0, Compute::new(1), limits).unwrap();
    let ids = [0; SEQUENCE];
    let batch = Batch { input: &ids, target: &ids, sequences: &[SEQUENCE] };
    let error = model.forward(&mut Comm::solo(), batch, StepContext::evaluation()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "layer 0: routing sends 12 tokens to this rank's experts, expected at most 10 (the configured limit); raise \
         the limit, set a capacity factor or strengthen the load-balancing loss"
    );
}

#[test]
fn models_that_cannot_be_are_errors() {
    let limits = ModelLimits { max_tokens: 8, max_sequence_tokens: 8, max_expert_rows: None };
    let check = |config: ModelConfig, experts: usize, rank: usize, limits: ModelLimits| {
        let layout = ExpertLayout::new(experts, 2, None).unwrap();
        Model::new(Purpose::Training, config, layout, rank, Compute::new(1), limits)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    assert_eq!(check(config(), 4, 0, limits), "model: a layout of 4 experts, expected 6");
    assert_eq!(check(config(), 6, 2, limits), "model: rank 2, expected one below 2");
    let long = ModelLimits { max_sequence_tokens: 4096, ..limits };
    assert_eq!(check(config(), 6, 0, long), "model: sequences of 4096 tokens, expected at most max_positions = 2048");
    let mut odd = config();
    odd.head_dim = 7;
    assert_eq!(check(odd, 6, 0, limits), "model: `head_dim` is 7, expected an even number, for rotary positions");
}
