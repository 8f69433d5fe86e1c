//! Configuration, weights, Hugging Face checkpoints, and the explicit forward and backward of decoders with
//! Mixture-of-Experts layers, over preallocated buffers and with expert parallelism.
//!
//! | question | answered by |
//! |---|---|
//! | what is a model? | [`ModelConfig`]; [`ModelSection`] and `config.json` fill it in |
//! | where is a parameter? | [`ParameterLayout`] |
//! | how do weights get in and out? | [`Checkpoint`], [`FolderWriter`] |
//! | what does a pass compute, in which order? | [`Model`] (`decoder`), with `attention`, `ffn`, `moe` |
//! | which token's row goes where? | `routing` |
//! | what does a pass on a GPU launch? | `CudaModel` (`cuda`, with the feature of this name) |
//! | what does a step of inference compute? | [`InferenceModel`] (`inference`), on a GPU `CudaInferenceModel` |
//! | how much memory does a rank need? | [`memory_plan`]; less for an evaluation ([`Purpose`]) |
//!
//! The crate hands all-to-alls and gradients to a [`lina_comm::Comm`] and is told by it how many pipeline chunks to
//! make and where weight gradients stand. It knows neither the policy that decides so nor the engine that carries it
//! out.

mod attention;
mod batch;
mod checkpoint;
mod config;
#[cfg(feature = "cuda")]
mod cuda;
mod decoder;
mod exchanges;
mod experts;
mod ffn;
mod inference;
mod initial;
mod jitter;
mod memory;
mod moe;
mod norm;
mod params;
mod pass;
mod purpose;
mod routing;
mod waiting;

pub use batch::{Batch, ForwardOutput, StepContext, StepError};
pub use checkpoint::{Checkpoint, CheckpointError, FolderWriter};
pub use config::{
    AuxLoss, ConfigError, FfnKind, ModelConfig, ModelKind, ModelSection, NormKind, PositionKind, QkNorm, RouterConfig,
    Sizes, SpecialTokens,
};
#[cfg(feature = "cuda")]
pub use cuda::{
    CudaInferenceModel, CudaModel, CudaModelError, CudaMoeLayer, DeviceGradients, DeviceRank, DeviceWeights, RowRoute,
    SharedExperts, measure_device_costs,
};
pub use decoder::{Model, ModelLimits};
pub use inference::{
    Chooser, ExpertOptions, Forecast, Gate, InferenceBatch, InferenceLimits, InferenceModel, InferenceStats,
    InferenceWeights, KvCache, LayerStats, LogitsOf, RoutingRecord, SequenceFeed, VerificationError,
    measure_placement_costs,
};
pub use memory::{MemoryPart, memory_plan};
pub use moe::{LayerRouting, RouterLosses};
pub use params::{Buffer, Parameter, ParameterLayout, Parameters, Place};
pub use purpose::Purpose;
