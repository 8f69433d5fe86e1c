//! What stands between the loop that serves requests and the ranks that compute: one step at a time, of sequences that
//! each get some tokens more.

use crate::{InferError, Sampling};

/// A sequence that is being generated. Small numbers, used again once they are released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u32);

/// What a backend can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendLimits {
    /// Token ids are below this.
    pub vocab: usize,
    /// Longest sequence, prompt and answer together, in tokens.
    pub max_positions: usize,
    /// Number of ranks; each keeps the keys and values of its own sequences.
    pub ranks: usize,
    /// Tokens of a page of keys and values.
    pub page_tokens: usize,
    /// Pages of a rank.
    pub pages_per_rank: usize,
    /// Most tokens that a step feeds on one rank.
    pub step_tokens_per_rank: usize,
}

/// A sequence comes to a rank.
#[derive(Clone, Debug)]
pub struct Admission {
    /// Not in use until then.
    pub id: SequenceId,
    /// The rank that keeps its keys and values.
    pub rank: usize,
    /// Pages set aside for it: it never holds more tokens than fit.
    pub pages: usize,
    /// How its tokens are chosen.
    pub sampling: Sampling,
    /// Tokens of the prompt: the first that are fed. Repetition penalties count them too.
    pub prompt_tokens: usize,
}

/// Tokens that a sequence gets in a step, after those that it has.
#[derive(Clone, Debug)]
pub struct Feed {
    /// An admitted sequence, at most once in a step.
    pub id: SequenceId,
    /// At least one.
    pub tokens: Vec<u32>,
    /// Whether a token is to be chosen after the last of them.
    pub sample: bool,
}

/// One step: releases first, then admissions, then feeds.
#[derive(Clone, Debug, Default)]
pub struct StepPlan {
    /// Sequences whose pages are free from now on.
    pub released: Vec<SequenceId>,
    /// Sequences that begin.
    pub admitted: Vec<Admission>,
    /// What is computed; may be empty.
    pub feeds: Vec<Feed>,
}

/// A token that was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Its sequence.
    pub id: SequenceId,
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability under the model (before temperature, penalties and truncation).
    pub logprob: f32,
    /// The likeliest tokens with theirs, likeliest first; as many as [`Sampling::top_logprobs`].
    pub top: Vec<(u32, f32)>,
}

/// What a step came to.
#[derive(Clone, Debug, Default)]
pub struct StepOutput {
    /// In the order of the feeds that sample.
    pub sampled: Vec<Sampled>,
}

/// Where the experts' tokens went, since the start.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpertActivity {
    /// Layers with experts, in order.
    pub layers: Vec<LayerActivity>,
    /// Times that a layer's real popularity was looked at before its tokens were sent.
    pub checks: u64,
    /// Of which led to another placement while the layer waited.
    pub replans: u64,
    /// Bytes of weights copied into slots.
    pub moved_bytes: u64,
    /// Whether compute, links and copies are emulated.
    pub emulated: bool,
}

/// One layer's part of [`ExpertActivity`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerActivity {
    /// Layer index in the model.
    pub layer: usize,
    /// `[experts]`: tokens that chose each expert.
    pub expert_tokens: Vec<u64>,
    /// `[ranks]`: tokens that each rank's experts computed.
    pub device_tokens: Vec<u64>,
    /// `[ranks]`: experts in the slots of each rank now.
    pub resident: Vec<Vec<usize>>,
}

/// Whatever computes steps: a model on the ranks of a job, or a stand-in in tests.
pub trait Backend {
    /// What it can take.
    fn limits(&self) -> BackendLimits;

    /// Runs one step. A step without feeds keeps the job alive.
    ///
    /// # Errors
    /// If the job is lost. Plans that break the limits are bugs of the caller.
    fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, InferError>;

    /// Experts' load so far.
    fn activity(&self) -> ExpertActivity;
}
