//! Inference: generation with continuous batching, experts re-placed ahead of their popularity, and what measures both.
//!
//! | question | answered by |
//! |---|---|
//! | what does a step feed, and what comes out? | [`StepPlan`], [`StepOutput`] (`backend`) |
//! | who runs it? | a [`Backend`]: a model on the ranks of a job (`ranks`), started by [`with_engine`] (`job`) |
//! | what do ranks compute on? | [`Device`] (`device`) |
//! | what do tokens choose next? | [`profile()`] |
//! | how do schedulers of experts compare? | [`bench_infer`] (`bench`) |
//! | how far is a token from reading its weights? | [`bench_decode`] (`decode`) |
//! | how is a token chosen? | [`Sampling`], [`Sampler`] (`sampling`) |
//! | what does an answer read like? | [`Completion`], [`TextDecoder`] (`completion`, `text`) |
//! | what does a model folder say of generation and chats? | [`GenerationConfig`], [`ChatTemplate`] (`generation`, `chat`) |
//! | who serves many requests at once? | [`EngineHandle`], [`serve_requests`] (`engine`) |

mod backend;
mod bench;
mod chat;
mod completion;
mod decode;
mod decode_machine;
mod device;
mod engine;
mod error;
mod generate;
mod generation;
mod hub;
mod job;
mod profile;
mod ranks;
mod routing_trace;
mod sampling;
mod text;

pub use backend::{
    Admission, Backend, BackendLimits, ExpertActivity, Feed, LayerActivity, Sampled, SequenceId, StepOutput, StepPlan,
};
pub use bench::{
    BatchKind, InferBenchConfig, InferBenchOptions, InferBenchSummary, InferConfig, LayerAccuracyNumbers, Scheduler,
    SchedulerResult, bench_infer,
};
pub use chat::{ChatMessage, ChatTemplate};
pub use completion::{Completion, StopMatcher};
pub use decode::{DecodeOptions, DecodeSummary, bench_decode};
pub use device::{Arithmetic, Device};
pub use engine::{
    EngineHandle, EngineOptions, EngineStatus, FinishReason, GenerateEvent, GenerateRequest, GeneratedToken, Inbox,
    Rejection, TokenStream, engine_channel, serve_requests, start_engine,
};
pub use error::InferError;
pub use generate::{GenerateOptions, GenerateSummary, SamplingOptions, generate};
pub use generation::GenerationConfig;
pub use hub::model_folder;
pub use job::{ModelOptions, with_engine};
pub use profile::{
    AccuracyNumbers, EstimatorAccuracy, LayerFollowing, ProfileOptions, ProfileSummary, load_profile, profile,
};
pub use sampling::{Choice, Sampler, Sampling};
pub use text::TextDecoder;
