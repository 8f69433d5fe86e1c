//! How a run can end early, and the exit code that goes with it.

use std::path::PathBuf;

use lina_comm::CommError;
use lina_model::StepError;
use thiserror::Error;

/// A run that did not come to its end.
#[derive(Debug, Error)]
pub enum TrainError {
    /// Configuration, data, checkpoint or environment: the sentence names the place, what was found and what is
    /// expected.
    #[error("{0}")]
    Input(String),
    /// A rank was lost, or this one was told that another was.
    #[error(transparent)]
    Lost(#[from] CommError),
    /// The GPU failed.
    #[cfg(feature = "cuda")]
    #[error("the GPU failed: {0}")]
    Device(lina_cuda::CudaError),
    /// Stopped on request; what was reached is in the checkpoint.
    #[error("interrupted after step {step}; {}", match checkpoint {
        Some(path) => format!("the checkpoint is in {}", path.display()),
        None => "no checkpoint was written, since there is no --out".to_owned(),
    })]
    Interrupted {
        /// Steps that were completed.
        step: u64,
        /// Where they are.
        checkpoint: Option<PathBuf>,
    },
}

impl TrainError {
    /// Exit code of the process: 2 for bad input, 1 for a lost rank, 130 after ctrl-C.
    pub fn exit_code(&self) -> u8 {
        match self {
            TrainError::Input(_) => 2,
            TrainError::Lost(_) => 1,
            #[cfg(feature = "cuda")]
            TrainError::Device(_) => 1,
            TrainError::Interrupted { .. } => 130,
        }
    }

    /// An input error from anything that says it in one sentence.
    pub(crate) fn input(error: impl std::fmt::Display) -> Self {
        TrainError::Input(error.to_string())
    }
}

#[cfg(feature = "cuda")]
impl From<lina_cuda::CudaError> for TrainError {
    fn from(error: lina_cuda::CudaError) -> Self {
        match error {
            // What is missing or does not suffice is the environment's or the configuration's.
            error @ lina_cuda::CudaError::Call { .. } => TrainError::Device(error),
            error => TrainError::input(error),
        }
    }
}

impl From<StepError> for TrainError {
    fn from(error: StepError) -> Self {
        match error {
            StepError::Comm(error) => TrainError::Lost(error),
            #[cfg(feature = "cuda")]
            StepError::Cuda(error) => error.into(),
            error => TrainError::input(error),
        }
    }
}

impl From<lina_model::CheckpointError> for TrainError {
    fn from(error: lina_model::CheckpointError) -> Self {
        TrainError::input(error)
    }
}

impl From<lina_data::DataError> for TrainError {
    fn from(error: lina_data::DataError) -> Self {
        TrainError::input(error)
    }
}

impl From<lina_report::ReportError> for TrainError {
    fn from(error: lina_report::ReportError) -> Self {
        TrainError::input(error)
    }
}
