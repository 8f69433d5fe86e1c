//! A model for evaluation computes what one for training does in a forward pass, in buffers that layers take turns with.

use lina_comm::Comm;
use lina_kernels::Compute;
use lina_model::{AuxLoss, Batch, Model, ModelConfig, ModelKind, ModelLimits, Purpose, Sizes, StepContext};
use lina_plan::ExpertLayout;

const SIZES: Sizes = Sizes { vocab: 23, hidden: 16, layers: 4, heads: 4, experts: 4, top_k: 2, expert_hidden: 12 };
const LIMITS: ModelLimits = ModelLimits { max_tokens: 20, max_sequence_tokens: 8, max_expert_rows: None };

fn random(mut model: Model) -> Model {
    let (_, layout, parameters) = model.for_update();
    parameters.initialise(layout, 42);
    model
}

#[test]
fn losses_and_logits_are_those_of_a_model_for_training() {
    for kind in [ModelKind::Mixtral, ModelKind::Qwen3Moe, ModelKind::Olmoe, ModelKind::LinaMoe] {
        for dense_layers in [vec![], vec![0], vec![1, 3]] {
            let mut config = ModelConfig::family(kind, SIZES);
            (config.dense_layers, config.dense_hidden) = (dense_layers, 20);
            if config.validate("model").is_err() {
                continue;
            }
            config.router.aux_loss = AuxLoss::Switch;
            config.router.aux_loss_coefficient = 0.3;
            config.router.z_loss_coefficient = 0.2;
            let experts = || ExpertLayout::new(4, 1, None).unwrap();
            let mut training =
                random(Model::new(Purpose::Training, config.clone(), experts(), 0, Compute::new(1), LIMITS).unwrap());
            let evaluation = Model::new(Purpose::Evaluation, config.clone(), experts(), 0, Compute::new(1), LIMITS);
            let mut evaluation = random(evaluation.unwrap());
            // The second batch is shorter: what the first one left must not matter.
            for sequences in [&[5, 8, 7][..], &[3, 6]] {
                let input: Vec<u32> =
                    (0..sequences.iter().sum::<usize>() as u32).map(|i| (i * 7 + i * i) % 23).collect();
                let batch = Batch { input: &input, target: &input, sequences };
                let forward =
                    |model: &mut Model| model.forward(&mut Comm::solo(), batch, StepContext::evaluation()).unwrap();
                let (expected, found) = (forward(&mut training), forward(&mut evaluation));
                assert!(expected.router_loss > 0.0);
                assert_eq!(found, expected, "{kind} {:?}", config.dense_layers);
                assert_eq!(evaluation.logits(), training.logits(), "{kind} {:?}", config.dense_layers);
            }
        }
    }
}

#[test]
#[should_panic(expected = "the model is for evaluation")]
fn it_does_not_train() {
    let config = ModelConfig::family(ModelKind::Mixtral, SIZES);
    let experts = ExpertLayout::new(4, 1, None).unwrap();
    let mut model = Model::new(Purpose::Evaluation, config, experts, 0, Compute::new(1), LIMITS).unwrap();
    let step = StepContext { training: true, global_tokens: 3, ..StepContext::evaluation() };
    let _ = model.forward(&mut Comm::solo(), Batch { input: &[1; 3], target: &[1; 3], sequences: &[3] }, step);
}
