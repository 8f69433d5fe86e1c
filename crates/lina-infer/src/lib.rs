//! Inference: generation with continuous batching, experts re-placed ahead of their popularity, and what measures both.
//!
//! | question | answered by |
//! |---|---|
//! | what does a step feed, and what comes out? | [`StepPlan`], [`StepOutput`] (`backend`) |
//! | who runs it? | a [`Backend`] |
//! | how is a token chosen? | [`Sampling`] (`sampling`) |

mod backend;
mod error;
mod sampling;

pub use backend::{
    Admission, Backend, BackendLimits, ExpertActivity, Feed, LayerActivity, Sampled, SequenceId, StepOutput, StepPlan,
};
pub use error::InferError;
pub use sampling::Sampling;
