//! How inference can end early, and the exit code that goes with it.

use lina_comm::CommError;
use lina_train::TrainError;
use thiserror::Error;

/// Inference that did not come to its end.
#[derive(Debug, Error)]
pub enum InferError {
    /// Model, data, request or environment: the sentence names the place, what was found and what is expected.
    #[error("{0}")]
    Input(String),
    /// A rank was lost, or this one was told that another was.
    #[error(transparent)]
    Lost(#[from] CommError),
    /// The GPU failed.
    #[cfg(feature = "cuda")]
    #[error("the GPU failed: {0}")]
    Device(lina_cuda::CudaError),
}

impl InferError {
    /// Exit code of the process: 2 for bad input, 1 for a lost rank or GPU.
    pub fn exit_code(&self) -> u8 {
        match self {
            InferError::Input(_) => 2,
            InferError::Lost(_) => 1,
            #[cfg(feature = "cuda")]
            InferError::Device(_) => 1,
        }
    }

    /// An input error from anything that says it in one sentence.
    pub fn input(error: impl std::fmt::Display) -> Self {
        InferError::Input(error.to_string())
    }
}

/// What is missing or does not suffice is the environment's or the request's; a call that failed is the GPU's.
#[cfg(feature = "cuda")]
impl From<lina_cuda::CudaError> for InferError {
    fn from(error: lina_cuda::CudaError) -> Self {
        crate::device::device_error(error).into()
    }
}

impl From<TrainError> for InferError {
    fn from(error: TrainError) -> Self {
        match error {
            TrainError::Lost(error) => InferError::Lost(error),
            #[cfg(feature = "cuda")]
            TrainError::Device(error) => InferError::Device(error),
            error => InferError::input(error),
        }
    }
}
