//! The ways in which writing what people see can fail.

use std::path::{Path, PathBuf};

/// Why a trace, a report or a metrics file could not be written or continued.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The file could not be read or written.
    #[error("cannot {action} `{}`: {source}", file.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        file: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A row that does not serialize to JSON.
    #[error("cannot write a line of `{}`: {source}", file.display())]
    Row {
        /// The file.
        file: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// A line of a metrics file that is to be continued and is not one of ours.
    #[error(
        "`{}` line {line} is not a JSON object with a whole number `step`; move the file away or resume into another folder",
        file.display()
    )]
    NotMetrics {
        /// The file.
        file: PathBuf,
        /// Line number, the first is 1.
        line: usize,
    },
}

impl ReportError {
    /// Adapts an I/O error to the file and the action that it came from.
    pub(crate) fn file(action: &'static str, file: &Path) -> impl FnOnce(std::io::Error) -> ReportError {
        let file = file.to_path_buf();
        move |source| ReportError::File { action, file, source }
    }
}
