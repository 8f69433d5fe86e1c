//! What the tokens of a text choose, layer by layer: what profiles are made of, and estimators measured with.

use std::path::Path;
use std::sync::Arc;

use lina_comm::Comm;
use lina_data::{EvalWindows, Sources, TokenStream, Tokenizer};
use lina_kernels::Compute;
use lina_model::{
    ExpertOptions, Forecast, InferenceBatch, InferenceLimits, InferenceModel, InferenceWeights, KvCache, LogitsOf,
    ModelConfig, SequenceFeed,
};

use crate::InferError;
use crate::ranks::step_error;

/// Token ids of a text.
pub(crate) fn read_tokens(model: &Path, config: &ModelConfig, data: &Path) -> Result<TokenStream, InferError> {
    let tokenizer = Tokenizer::for_model_folder(model).map_err(InferError::input)?;
    let sources = Sources::from_globs(&[data.to_string_lossy()]).map_err(InferError::input)?;
    let stream = TokenStream::read(&sources, &tokenizer).map_err(InferError::input)?;
    stream.check_vocabulary(config.vocab, &tokenizer).map_err(InferError::input)?;
    Ok(stream)
}

/// Choices of the tokens of one batch.
#[derive(Clone, Debug, Default)]
pub(crate) struct BatchRouting {
    /// `[tokens, MoE layers, top_k]`.
    pub choices: Vec<u32>,
    /// `[tokens, MoE layers - 1, top_k]`: what the gates of the next layers made of the hidden states before them.
    pub next_gate: Vec<u32>,
}

/// Runs a text through a model on one rank, and hands each batch's routing over.
pub(crate) struct RoutingTracer {
    model: InferenceModel,
    comm: Comm,
    window_tokens: usize,
    windows_of_batch: usize,
}

impl RoutingTracer {
    /// For batches of `batch_tokens` tokens in windows of `window_tokens`.
    pub fn new(
        weights: &Arc<InferenceWeights>,
        threads: usize,
        window_tokens: usize,
        batch_tokens: usize,
    ) -> Result<Self, InferError> {
        let config = weights.config();
        let windows_of_batch = (batch_tokens / window_tokens).max(1);
        let max_tokens = windows_of_batch * window_tokens;
        let pages = windows_of_batch * KvCache::pages_for(window_tokens);
        let limits = InferenceLimits { max_tokens, max_sequence_tokens: window_tokens, pages };
        let experts = ExpertOptions { forecast: Forecast::NextGate, ..ExpertOptions::fixed(config) };
        let compute = Compute::new(threads);
        let mut model = InferenceModel::new(weights.clone(), 1, compute, limits, experts).map_err(InferError::input)?;
        model.record_routing();
        Ok(RoutingTracer { model, comm: Comm::solo(), window_tokens, windows_of_batch })
    }

    /// Batches of `stream`, the last one may be smaller; `each` gets the number of the batch and of all batches too.
    pub fn run(
        &mut self,
        stream: &TokenStream,
        mut each: impl FnMut(usize, usize, BatchRouting) -> Result<(), InferError>,
    ) -> Result<(), InferError> {
        let windows = EvalWindows::new(stream, self.window_tokens).map_err(InferError::input)?;
        let batches = windows.windows().div_ceil(self.windows_of_batch);
        for batch in 0..batches {
            let first = batch * self.windows_of_batch;
            let tokens: Vec<&[u32]> = (first..windows.windows().min(first + self.windows_of_batch))
                .map(|window| windows.window(window).0)
                .collect();
            each(batch, batches, self.batch(&tokens)?)?;
        }
        Ok(())
    }

    /// One batch of sequences.
    pub fn batch(&mut self, sequences: &[&[u32]]) -> Result<BatchRouting, InferError> {
        let feeds: Vec<SequenceFeed<'_>> = sequences
            .iter()
            .enumerate()
            .map(|(id, tokens)| SequenceFeed { id: id as u32, tokens, logits: LogitsOf::Nothing })
            .collect();
        for feed in &feeds {
            self.model.cache().admit(feed.id, KvCache::pages_for(feed.tokens.len()));
        }
        self.comm.begin_evaluation(0)?;
        let batch = InferenceBatch { feeds: &feeds, token_offset: 0, truth: None };
        self.model.forward(&mut self.comm, batch).map_err(|error| step_error(0, error))?;
        self.comm.end_step();
        feeds.iter().for_each(|feed| self.model.cache().release(feed.id));
        let (layers, top_k) = (self.model.config().moe_layers(), self.model.config().top_k);
        let record = self.model.take_record();
        let tokens = sequences.iter().map(|tokens| tokens.len()).sum();
        Ok(BatchRouting {
            choices: by_token(&record.choices, layers, tokens, top_k),
            next_gate: by_token(&record.forecasts, layers - 1, tokens, top_k),
        })
    }
}

/// `[layers, tokens, top_k]` as `[tokens, layers, top_k]`.
fn by_token(by_layer: &[u32], layers: usize, tokens: usize, top_k: usize) -> Vec<u32> {
    let mut by_token = Vec::with_capacity(by_layer.len());
    for token in 0..tokens {
        for layer in 0..layers {
            by_token.extend_from_slice(&by_layer[(layer * tokens + token) * top_k..][..top_k]);
        }
    }
    by_token
}
