//! Why communication ended early. Failures are values: every rank gets one, with the culprit's name.

use std::any::Any;

use thiserror::Error;

/// A failure of the job's communication, the same on all ranks.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CommError {
    /// A rank panicked, failed or was killed.
    #[error("rank {rank} failed: {reason}")]
    RankFailed {
        /// The rank that failed first.
        rank: usize,
        /// What it said.
        reason: String,
    },
    /// A rank did not take part for the set time.
    #[error("rank {rank} has been silent for {seconds} s while the others waited for {operation}")]
    RankSilent {
        /// The rank that the others wait for.
        rank: usize,
        /// The limit that was exceeded.
        seconds: u64,
        /// What the others wait for.
        operation: String,
    },
}

impl CommError {
    /// `rank` has ended its part without a failure, and others wait for it.
    pub(crate) fn left(rank: usize) -> Self {
        CommError::RankFailed { rank, reason: "it left while other ranks waited for it".to_owned() }
    }

    /// A thread of `rank` panicked while it carried out communication.
    pub(crate) fn panicked(rank: usize, panic: &(dyn Any + Send)) -> Self {
        let message = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        let message = message.unwrap_or("without a message");
        CommError::RankFailed { rank, reason: format!("its communication panicked: {message}") }
    }
}
