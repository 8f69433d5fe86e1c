//! The configuration of `lina bench infer`: a cluster, and what is asked of it.

use lina_train::{ClusterConfig, ClusterSections};
use serde::{Deserialize, Serialize};

/// A configuration file, section by section.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InferBenchConfig {
    /// `[cluster]`.
    pub cluster: ClusterConfig,
    /// `[infer]`.
    pub infer: InferConfig,
}

/// What a batch is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BatchKind {
    /// Whole sequences.
    #[default]
    Prefill,
    /// One token more for every sequence; their first halves come before, and are not measured.
    Decode,
}

/// `[infer]`: batches, slots and plans.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InferConfig {
    /// Experts that a device holds of a layer at most.
    pub slots: usize,
    /// What a batch is: `prefill` or `decode`.
    pub batch: BatchKind,
    /// Tokens of a sequence.
    pub sequence_tokens: usize,
    /// Sequences of a batch, over all ranks together.
    pub batch_sequences: usize,
    /// Measured batches.
    pub batches: usize,
    /// Batches before them.
    pub warmup_batches: usize,
    /// What a plan takes for which a layer waits, in us of the emulated device.
    pub plan_us: f64,
    /// Batches between two placements of `eplb`.
    pub plan_every: usize,
    /// Computes every n-th token again on its own rank and compares; 0 never does.
    pub verify_every: u64,
    /// Seed of placements and of synthetic routing.
    pub seed: u64,
}

impl Default for InferConfig {
    fn default() -> Self {
        InferConfig {
            slots: 4,
            batch: BatchKind::Prefill,
            sequence_tokens: 128,
            batch_sequences: 64,
            batches: 48,
            warmup_batches: 8,
            plan_us: 50.0,
            plan_every: 8,
            verify_every: 0,
            seed: 1,
        }
    }
}

impl InferConfig {
    /// Tokens of a sequence that come before its batches.
    pub fn prompt_tokens(&self) -> usize {
        match self.batch {
            BatchKind::Prefill => 0,
            BatchKind::Decode => self.sequence_tokens / 2,
        }
    }

    /// Tokens of a sequence in one batch.
    pub fn step_tokens(&self) -> usize {
        match self.batch {
            BatchKind::Prefill => self.sequence_tokens,
            BatchKind::Decode => 1,
        }
    }

    /// Batches that take their tokens from the same sequences.
    pub fn batches_of_sequences(&self) -> usize {
        (self.sequence_tokens - self.prompt_tokens()) / self.step_tokens()
    }
}

impl ClusterSections for InferBenchConfig {
    fn cluster(&mut self) -> &mut ClusterConfig {
        &mut self.cluster
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        let infer = &self.infer;
        let counts = [
            ("infer.slots", infer.slots, 1),
            ("infer.sequence_tokens", infer.sequence_tokens, 2),
            ("infer.batch_sequences", infer.batch_sequences, 1),
            ("infer.batches", infer.batches, 1),
            ("infer.warmup_batches", infer.warmup_batches, 0),
            ("infer.plan_every", infer.plan_every, 1),
        ];
        const MOST: usize = 1 << 20;
        for (key, value, least) in counts {
            if !(least..=MOST).contains(&value) {
                return Err((key, format!("`{key}` is {value}, expected a number from {least} to {MOST}")));
            }
        }
        if !(infer.plan_us >= 0.0 && infer.plan_us.is_finite()) {
            let message = format!("`infer.plan_us` is {}, expected a number of us of at least 0", infer.plan_us);
            return Err(("infer.plan_us", message));
        }
        Ok(())
    }
}
