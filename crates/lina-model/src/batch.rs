//! What goes into a pass and what comes out.

use lina_comm::CommError;
use lina_kernels::{IGNORED, Sequence};
use thiserror::Error;

use crate::config::{ConfigError, ModelConfig};
use crate::inference::VerificationError;

/// One rank's tokens of one micro-batch. No tokens at all is ordinary: the rank still takes part in every exchange.
#[derive(Clone, Copy, Debug, Default)]
pub struct Batch<'a> {
    /// Token ids, sequence after sequence.
    pub input: &'a [u32],
    /// What each token is to predict; `u32::MAX` for nothing. As long as `input`.
    pub target: &'a [u32],
    /// Tokens of each sequence; positions start at 0 in each. Sums to the length of `input`.
    pub sequences: &'a [usize],
}

/// What a pass must know of the step it belongs to; the same on all ranks, except `token_offset`.
#[derive(Clone, Copy, Debug)]
pub struct StepContext {
    /// Whether gradients will be wanted: jitter and capacity apply, and the logits are replaced by their gradient.
    pub training: bool,
    /// Targets of the whole step, over all ranks and micro-batches: the loss is their mean.
    pub global_tokens: u64,
    /// Micro-batches of the step, at least 1; router losses are averaged over them.
    pub micro_batches: usize,
    /// Seed of the run, for jitter.
    pub seed: u64,
    /// Step of the run, for jitter.
    pub step: u64,
    /// Index of this rank's first token within the step's tokens, for jitter.
    pub token_offset: u64,
}

impl StepContext {
    /// A pass without gradients.
    pub fn evaluation() -> Self {
        StepContext { training: false, global_tokens: 0, micro_batches: 1, seed: 0, step: 0, token_offset: 0 }
    }

    /// Micro-batches, as a divisor.
    pub(crate) fn micro_batches(&self) -> f64 {
        self.micro_batches.max(1) as f64
    }

    /// Factor of a target's loss.
    pub(crate) fn loss_scale(&self) -> f64 {
        if self.global_tokens == 0 { 0.0 } else { 1.0 / self.global_tokens as f64 }
    }
}

/// What a forward pass found on this rank. Every number is to be summed over ranks and micro-batches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ForwardOutput {
    /// Sum of the targets' cross-entropies.
    pub loss_sum: f64,
    /// Number of targets.
    pub target_tokens: u64,
    /// This rank's share of the routers' losses, coefficients and the mean over micro-batches included: add the sum
    /// to the mean cross-entropy to get what the gradients are of.
    pub router_loss: f64,
    /// Assignments that exceeded their expert's capacity.
    pub dropped_assignments: u64,
}

impl ForwardOutput {
    /// Adds what a layer's routing came to: assignments dropped, and its losses with their coefficients.
    pub(crate) fn add_routing(&mut self, (dropped, loss): (u64, f64), step: &StepContext) {
        self.dropped_assignments += dropped;
        self.router_loss += loss / step.micro_batches();
    }
}

/// A pass that could not be completed.
#[derive(Clone, Debug, Error)]
pub enum StepError {
    /// The job failed, here or elsewhere.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// The model's sizes and those of the job contradict each other.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The GPU failed, or does not suffice.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] lina_cuda::CudaError),
    /// A batch that this model cannot take.
    #[error("batch: {0}")]
    Batch(String),
    /// Routing sent this rank more rows than it may hold.
    #[error(
        "layer {layer}: routing sends {rows} tokens to this rank's experts, expected at most {limit} (the configured \
         limit); raise the limit, set a capacity factor or strengthen the load-balancing loss"
    )]
    TooManyRows {
        /// Layer index.
        layer: usize,
        /// Rows that would arrive.
        rows: usize,
        /// Configured limit.
        limit: usize,
    },
    /// A result over the ranks is not what one rank computes.
    #[error(transparent)]
    Verification(#[from] VerificationError),
}

/// The batch of the pass under way, kept for backward.
#[derive(Debug)]
pub(crate) struct LoadedBatch {
    pub input: Vec<u32>,
    pub target: Vec<u32>,
    /// Position of each token within its sequence.
    pub positions: Vec<u32>,
    pub sequences: Vec<Sequence>,
}

impl LoadedBatch {
    pub fn with_capacity(max_tokens: usize) -> Self {
        LoadedBatch {
            input: Vec::with_capacity(max_tokens),
            target: Vec::with_capacity(max_tokens),
            positions: Vec::with_capacity(max_tokens),
            sequences: Vec::with_capacity(64),
        }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.input.len()
    }

    /// Takes a batch in.
    pub fn load(
        &mut self,
        batch: Batch<'_>,
        config: &ModelConfig,
        max_tokens: usize,
        max_sequence_tokens: usize,
    ) -> Result<(), StepError> {
        let error = |message: String| Err(StepError::Batch(message));
        let tokens = batch.input.len();
        if tokens > max_tokens {
            return error(format!("it has {tokens} tokens, expected at most {max_tokens}"));
        }
        if batch.target.len() != tokens {
            return error(format!("it has {} targets, expected one for each of {tokens} tokens", batch.target.len()));
        }
        if batch.sequences.iter().sum::<usize>() != tokens {
            return error(format!("its sequences {:?} do not sum to its {tokens} tokens", batch.sequences));
        }
        if let Some(length) = batch.sequences.iter().find(|&&length| length > max_sequence_tokens) {
            return error(format!("it has a sequence of {length} tokens, expected at most {max_sequence_tokens}"));
        }
        let outside = |id: u32| id as usize >= config.vocab;
        if let Some(id) = batch.input.iter().find(|&&id| outside(id)) {
            return error(format!("it has token id {id}, expected ids below vocab = {}", config.vocab));
        }
        if let Some(id) = batch.target.iter().find(|&&id| id != IGNORED && outside(id)) {
            return error(format!("it has target {id}, expected ids below vocab = {}", config.vocab));
        }
        refill(&mut self.input, batch.input.iter().copied());
        refill(&mut self.target, batch.target.iter().copied());
        refill(&mut self.positions, batch.sequences.iter().flat_map(|&length| 0..length as u32));
        let starts = batch.sequences.iter().scan(0, |next, &rows| {
            let start_row = *next;
            *next += rows;
            Some(Sequence { start_row, rows })
        });
        refill(&mut self.sequences, starts);
        Ok(())
    }

    /// Pairs of a query and a key that it sees.
    pub fn visible_pairs(&self, window: Option<usize>) -> u64 {
        let pairs = |rows: usize| {
            let window = window.unwrap_or(rows).min(rows) as u64;
            window * (window + 1) / 2 + (rows as u64 - window) * window
        };
        self.sequences.iter().map(|sequence| pairs(sequence.rows)).sum()
    }
}

fn refill<T>(values: &mut Vec<T>, source: impl Iterator<Item = T>) {
    values.clear();
    values.extend(source);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ModelKind, Sizes};

    #[test]
    fn visible_pairs_count_what_a_mask_would_show() {
        let sizes = Sizes { vocab: 9, hidden: 4, layers: 1, heads: 1, experts: 1, top_k: 1, expert_hidden: 4 };
        let config = ModelConfig::family(ModelKind::Mixtral, sizes);
        let mut loaded = LoadedBatch::with_capacity(16);
        let batch = Batch { input: &[0; 9], target: &[0; 9], sequences: &[3, 0, 6] };
        loaded.load(batch, &config, 16, 8).unwrap();
        for window in [None, Some(1), Some(2), Some(4), Some(9)] {
            let counted: usize = [3, 0, 6]
                .iter()
                .map(|&rows| (1..=rows).map(|seen: usize| seen.min(window.unwrap_or(seen))).sum::<usize>())
                .sum();
            assert_eq!(loaded.visible_pairs(window), counted as u64);
        }
        assert_eq!(loaded.positions, [0, 1, 2, 0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn batches_that_do_not_fit_are_refused() {
        let sizes = Sizes { vocab: 9, hidden: 4, layers: 1, heads: 1, experts: 1, top_k: 1, expert_hidden: 4 };
        let config = ModelConfig::family(ModelKind::Mixtral, sizes);
        let mut loaded = LoadedBatch::with_capacity(4);
        let mut check = |input: &[u32], target: &[u32], sequences: &[usize]| {
            loaded.load(Batch { input, target, sequences }, &config, 4, 3).unwrap_err().to_string()
        };
        assert_eq!(check(&[0; 5], &[0; 5], &[5]), "batch: it has 5 tokens, expected at most 4");
        assert_eq!(check(&[0; 4], &[0; 3], &[4]), "batch: it has 3 targets, expected one for each of 4 tokens");
        assert_eq!(check(&[0; 4], &[0; 4], &[3]), "batch: its sequences [3] do not sum to its 4 tokens");
        assert_eq!(check(&[0; 4], &[0; 4], &[4]), "batch: it has a sequence of 4 tokens, expected at most 3");
        assert_eq!(check(&[9], &[0], &[1]), "batch: it has token id 9, expected ids below vocab = 9");
        assert_eq!(check(&[0], &[12], &[1]), "batch: it has target 12, expected ids below vocab = 9");
    }
}
