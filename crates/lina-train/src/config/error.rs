//! What can be wrong with a run's configuration, each as one sentence.

use std::path::PathBuf;

/// A configuration that cannot be read or that asks for something impossible.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration `{}`: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// Something in the file or in an override is wrong.
    #[error("{place}: {message}")]
    Invalid {
        /// File and line, or the command line's option as it was given.
        place: String,
        /// Key, what was found and what is expected.
        message: String,
    },
    /// The model cannot be.
    #[error(transparent)]
    Model(#[from] lina_model::ConfigError),
}

impl ConfigError {
    pub(super) fn invalid(place: impl Into<String>, message: impl Into<String>) -> Self {
        ConfigError::Invalid { place: place.into(), message: message.into() }
    }
}
