//! What a rank's emulated device holds, and whose experts wait in host memory because of that.

use lina_model::{ParameterLayout, Purpose, memory_plan};
use lina_plan::{DeviceMemory, ExpertLayout, Residency};

use crate::TrainError;
use crate::config::RunConfig;
use crate::memory::{UNEVEN_PARTS, mib};
use crate::worker::model_limits;

/// The layers of `config` with experts.
fn moe_layers(config: &RunConfig) -> Vec<usize> {
    (0..config.model.layers).filter(|&layer| config.model.is_moe(layer)).collect()
}

/// What `rank`'s device has and needs; `None` where it has what it needs. Of dense parameters it holds gradients and
/// moments too, and of what grows with uneven routing as much as the memory plan counts.
fn device_memory(config: &RunConfig, experts: &ExpertLayout, rank: usize) -> Option<DeviceMemory> {
    let capacity_bytes = config.cluster.device?.memory_bytes()?;
    let layout = ParameterLayout::new(&config.model, experts.held_by(rank));
    let with_uneven_routing = |name: &str, bytes: usize| {
        let uneven = experts.ranks() > 1 && UNEVEN_PARTS.contains(&name);
        if uneven { bytes + bytes / 2 } else { bytes }
    };
    let buffers: usize =
        memory_plan(&config.model, experts, rank, model_limits(config, experts.ranks()), Purpose::Training)
            .iter()
            .filter(|part| !["parameters", "gradients"].contains(&part.name))
            .map(|part| with_uneven_routing(part.name, part.bytes))
            .sum();
    let element_bytes = size_of::<f32>();
    Some(DeviceMemory {
        capacity_bytes,
        // Weights, gradients and two moments.
        always_bytes: (4 * layout.dense_len() * element_bytes + buffers) as u64,
        layer_bytes: (experts.held_by(rank).len() * layout.expert_elements() * element_bytes) as u64,
    })
}

/// Where the experts of `rank` are while it trains.
///
/// # Errors
/// If its device is too small even with all experts in host memory.
pub(crate) fn residency(config: &RunConfig, experts: &ExpertLayout, rank: usize) -> Result<Residency, TrainError> {
    let Some(memory) = device_memory(config, experts, rank) else { return Ok(Residency::default()) };
    let layers = moe_layers(config);
    Residency::new(&memory, &layers).map_err(|least_bytes| {
        let slots_bytes = least_bytes - memory.always_bytes;
        TrainError::Input(format!(
            "the device of rank {rank} needs {} even with all experts in host memory ({} for dense parameters, \
             activations and buffers, {} for {} of {} layers' experts at a time), expected at most {} \
             (cluster.device.memory_gib); lower train.batch_sequences, train.sequence_tokens, \
             cluster.experts_per_rank or the model's sizes, or raise train.micro_batches",
            mib(least_bytes),
            mib(memory.always_bytes),
            mib(slots_bytes),
            layers.len().min(Residency::SLOTS),
            layers.len(),
            mib(memory.capacity_bytes),
        ))
    })
}

/// Whether every rank's device is large enough for the layout `experts`, with experts in host memory if need be.
pub(crate) fn fits_devices(config: &RunConfig, experts: &ExpertLayout) -> bool {
    (0..experts.ranks()).all(|rank| residency(config, experts, rank).is_ok())
}

/// Which layers' experts wait in host memory and why, of the rank with most of them; `None` where none wait.
pub(crate) fn sentence(config: &RunConfig, experts: &ExpertLayout) -> Option<String> {
    let device = config.cluster.device?;
    let waiting_on = |rank: usize| residency(config, experts, rank).map_or(0, |plan| plan.waiting().len());
    let rank = (0..experts.ranks()).rev().max_by_key(|&rank| waiting_on(rank))?;
    let (memory, plan) = (device_memory(config, experts, rank)?, residency(config, experts, rank).ok()?);
    let (layers, waiting) = (config.model.moe_layers(), plan.waiting());
    if waiting.is_empty() {
        return None;
    }
    let names: Vec<String> = waiting.iter().map(usize::to_string).collect();
    Some(format!(
        "on rank {rank} the experts of {} of {layers} layers wait in host memory (layers {}): with all of them it would \
         hold {} and its device has {}; so it holds {}, and copies go at {} Gbit/s",
        waiting.len(),
        names.join(", "),
        mib(memory.held_bytes(layers, 0)),
        mib(memory.capacity_bytes),
        mib(memory.held_bytes(layers, waiting.len())),
        device.copy_gbps(),
    ))
}
