//! How the next token is chosen.

/// What a request asks of the choice of its tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only the likeliest tokens whose probabilities sum to this are drawn; 1 is all.
    pub top_p: f32,
    /// Only this many of the likeliest tokens are drawn; 0 is all.
    pub top_k: usize,
    /// Logits of tokens that the sequence holds are divided by this if positive, else multiplied (Keskar et al., 2019).
    pub repetition_penalty: f32,
    /// Draws repeat with the same seed, whatever else is in the batch.
    pub seed: u64,
    /// How many of the likeliest tokens are reported.
    pub top_logprobs: usize,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0, seed: 0, top_logprobs: 0 }
    }
}
