//! Hugging Face folders: `config.json` with `model.safetensors`, whole or in shards.
//!
//! Reading is by tensor, so that a rank reads no more than it holds. Writing streams tensor by tensor into a temporary
//! folder that takes its name only when everything in it is on disk.

mod read;
mod write;

use std::path::Path;

use thiserror::Error;

pub use read::Checkpoint;
pub use write::FolderWriter;

/// A folder that cannot be read or written. One sentence: which file, what was found, what is expected.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{path}: {message}")]
pub struct CheckpointError {
    /// File or folder.
    pub path: String,
    /// What is wrong with it.
    pub message: String,
}

impl CheckpointError {
    pub(crate) fn new(path: &Path, message: impl Into<String>) -> Self {
        CheckpointError { path: path.display().to_string(), message: message.into() }
    }
}
