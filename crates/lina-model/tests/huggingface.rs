//! Against transformers: logits, loss and the gradient of every parameter of each folder under `$LINA_FIXTURES`, by
//! default the ones beside this file.

mod common;

use std::path::Path;

use common::{folders, tensors};
use lina_comm::Comm;
use lina_kernels::Compute;
use lina_model::{Batch, Checkpoint, Model, ModelConfig, ModelLimits, Purpose, StepContext};
use lina_plan::ExpertLayout;

fn largest_difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Norm of the difference over the norm.
fn relative_difference(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |x: f64| x * x;
    let difference: f64 = found.iter().zip(expected).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = expected.iter().map(|&b| square(f64::from(b))).sum();
    (difference / norm.max(1e-30)).sqrt()
}

fn check(folder: &Path, threads: usize) {
    let name = folder.display();
    let mut config = ModelConfig::from_folder(folder).unwrap();
    config.router.aux_loss_coefficient = 0.0;
    let expected = tensors(&folder.join("expected.safetensors"));
    let ids: Vec<u32> = expected["input_ids"].iter().map(|&id| id as u32).collect();
    let rows = 2;
    let length = ids.len() / rows;
    let target: Vec<u32> =
        ids.chunks_exact(length).flat_map(|row| row[1..].iter().copied().chain([u32::MAX])).collect();

    let layout = ExpertLayout::new(config.experts, 1, None).unwrap();
    let limits = ModelLimits { max_tokens: ids.len() + 5, max_sequence_tokens: length, max_expert_rows: None };
    let mut model = Model::new(Purpose::Training, config, layout, 0, Compute::new(threads), limits).unwrap();
    let (_, layout, parameters) = model.for_update();
    Checkpoint::open(folder).unwrap().load(layout, parameters).unwrap();

    let mut comm = Comm::solo();
    let batch = Batch { input: &ids, target: &target, sequences: &[length, length] };
    let evaluated = model.forward(&mut comm, batch, StepContext::evaluation()).unwrap();
    let loss = evaluated.loss_sum / evaluated.target_tokens as f64;
    assert_eq!(evaluated.target_tokens as usize, rows * (length - 1));
    assert!((loss - f64::from(expected["loss"][0])).abs() < 1e-5, "{name}: loss {loss} {:?}", expected["loss"]);
    let logits = largest_difference(model.logits().unwrap(), &expected["logits"]);
    assert!(logits < 1e-4, "{name}: logits differ by {logits}");

    let step = StepContext { training: true, global_tokens: evaluated.target_tokens, ..StepContext::evaluation() };
    comm.begin_step(0).unwrap();
    comm.begin_micro_batch(true).unwrap();
    let trained = model.forward(&mut comm, batch, step).unwrap();
    assert_eq!(trained.loss_sum, evaluated.loss_sum);
    model.backward(&mut comm, false).unwrap();
    comm.finish_gradients().unwrap();
    let gradients = tensors(&folder.join("gradients.safetensors"));
    assert_eq!(gradients.len(), model.layout().parameters().len(), "{name}");
    let mut worst = (0.0, "");
    for parameter in model.layout().parameters() {
        let found = model.parameters().gradient(model.layout(), &parameter.place).unwrap();
        let difference = relative_difference(found, &gradients[&parameter.key]);
        assert!(difference < 1e-3, "{name}: gradient of {} differs by {difference}", parameter.key);
        if difference > worst.0 {
            worst = (difference, &parameter.key);
        }
    }
    println!("{name}: loss {loss:.6}, logits within {logits:.1e}, gradients within {:.1e} ({})", worst.0, worst.1);

    // A second micro-batch of the same tokens doubles every gradient.
    comm.begin_step(1).unwrap();
    for (last, accumulate) in [(false, false), (true, true)] {
        comm.begin_micro_batch(last).unwrap();
        model.forward(&mut comm, batch, step).unwrap();
        model.backward(&mut comm, accumulate).unwrap();
    }
    comm.finish_gradients().unwrap();
    for parameter in model.layout().parameters() {
        let found = model.parameters().gradient(model.layout(), &parameter.place).unwrap();
        let halved: Vec<f32> = found.iter().map(|value| value / 2.0).collect();
        let difference = relative_difference(&halved, &gradients[&parameter.key]);
        assert!(difference < 1e-3, "{name}: accumulated gradient of {} differs by {difference}", parameter.key);
    }
}

#[test]
fn logits_loss_and_gradients_are_those_of_transformers() {
    for folder in folders() {
        check(&folder, 1);
        check(&folder, 2);
    }
}
