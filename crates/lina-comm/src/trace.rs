//! What happened when, for traces and reports.

use crate::Nanos;

/// Which of a rank's lanes a span lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    /// The rank's compute thread.
    Compute,
    /// The all-to-all channel.
    AllToAll,
    /// The allreduce channel.
    AllReduce,
}

/// One thing a rank did, on one lane, on the body's clock (virtual where emulated).
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Which rank.
    pub rank: u32,
    /// On which lane.
    pub lane: Lane,
    /// What it was.
    pub name: &'static str,
    /// Step of the run.
    pub step: u64,
    /// Layer index, where it has one.
    pub layer: Option<u32>,
    /// Pipeline chunk and number of chunks of an all-to-all, or index and number 0 of an allreduce micro-op.
    pub part: (u32, u32),
    /// Start.
    pub start: Nanos,
    /// End.
    pub end: Nanos,
    /// Bytes that this rank sent, for communication.
    pub bytes: u64,
}
