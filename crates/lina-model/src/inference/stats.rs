//! What placements came to on this rank, counted until it is asked for.

use std::time::Duration;

use lina_plan::{LayerAccuracy, Settlement};

/// Counts since the last [`take`](InferenceStats::take); those that say "all ranks" are the same on every rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InferenceStats {
    /// Layers with experts, in order.
    pub layers: Vec<LayerStats>,
    /// Time on the wall clock that the brain took to plan, and how often it was asked.
    pub planning: Duration,
    /// Number of plans.
    pub plans: u64,
    /// Time on the wall clock in which this rank made its estimates.
    pub estimating: Duration,
    /// Time in MoE layers, gate to sum, in nanoseconds of the body's clock.
    pub moe_ns: u64,
}

/// One layer's part.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerStats {
    /// `[experts]`: assignments of all ranks.
    pub expert_rows: Vec<u64>,
    /// `[devices]`: rows that each device's experts computed.
    pub device_rows: Vec<u64>,
    /// Passes.
    pub passes: u64,
    /// Sum over passes of the largest device's rows over the mean.
    pub imbalance_sum: f64,
    /// Times that the layer waited for another placement.
    pub replans: u64,
    /// Bytes of experts copied into slots, on all ranks.
    pub moved_bytes: u64,
    /// How good the estimates were: of the batch over all ranks, and of this rank's tokens.
    pub accuracy: LayerAccuracy,
}

impl InferenceStats {
    pub(super) fn new(layers: usize, experts: usize, devices: usize) -> Self {
        let layer =
            LayerStats { expert_rows: vec![0; experts], device_rows: vec![0; devices], ..LayerStats::default() };
        InferenceStats { layers: vec![layer; layers], ..InferenceStats::default() }
    }

    /// The counts so far; they start again.
    pub fn take(&mut self) -> InferenceStats {
        let (experts, devices) =
            self.layers.first().map_or((0, 0), |layer| (layer.expert_rows.len(), layer.device_rows.len()));
        let fresh = InferenceStats::new(self.layers.len(), experts, devices);
        std::mem::replace(self, fresh)
    }

    /// Adds later counts.
    pub fn add(&mut self, later: &InferenceStats) {
        self.layers.resize_with(later.layers.len(), LayerStats::default);
        for (layer, later) in self.layers.iter_mut().zip(&later.layers) {
            add_all(&mut layer.expert_rows, &later.expert_rows);
            add_all(&mut layer.device_rows, &later.device_rows);
            layer.passes += later.passes;
            layer.imbalance_sum += later.imbalance_sum;
            layer.replans += later.replans;
            layer.moved_bytes += later.moved_bytes;
            layer.accuracy.merge(&later.accuracy);
        }
        self.planning += later.planning;
        self.plans += later.plans;
        self.estimating += later.estimating;
        self.moe_ns += later.moe_ns;
    }

    /// Sum over layers.
    pub fn total(&self, of: impl Fn(&LayerStats) -> u64) -> u64 {
        self.layers.iter().map(of).sum()
    }

    pub(super) fn planned(&mut self, took: Duration) {
        self.planning += took;
        self.plans += 1;
    }

    pub(super) fn settled(&mut self, number: usize, assigned: &[u32], settlement: &Settlement) {
        let layer = &mut self.layers[number];
        for of_source in assigned.chunks_exact(layer.expert_rows.len()) {
            layer.expert_rows.iter_mut().zip(of_source).for_each(|(sum, &rows)| *sum += u64::from(rows));
        }
        let device_rows = settlement.shares.device_rows();
        if device_rows.iter().any(|&rows| rows > 0) {
            layer.imbalance_sum += settlement.shares.imbalance();
            layer.passes += 1;
        }
        add_all(&mut layer.device_rows, &device_rows);
        layer.replans += u64::from(settlement.replanned);
    }

    pub(super) fn moved(&mut self, number: usize, copies: usize, expert_bytes: u64) {
        self.layers[number].moved_bytes += copies as u64 * expert_bytes;
    }

    pub(super) fn compare_tokens(&mut self, number: usize, predicted: &[u32], index: &[u32], top_k: usize) {
        self.layers[number].accuracy.add_tokens(predicted, index, top_k);
    }

    pub(super) fn compare_batch(&mut self, number: usize, estimate: &[f64], truth: &[f64], top_k: usize) {
        self.layers[number].accuracy.add_batch(estimate, truth, top_k);
    }

    pub(super) fn layer_took(&mut self, ns: u64) {
        self.moe_ns += ns;
    }
}

fn add_all(sums: &mut Vec<u64>, values: &[u64]) {
    sums.resize(values.len(), 0);
    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}
