//! What engines whose ranks are processes share, whatever carries their first words: how ranks find out that they fit
//! together (`meeting`), and how they watch each other (`heartbeat`).

pub(crate) mod heartbeat;
pub(crate) mod meeting;
mod patience;

pub(crate) use patience::Patience;

use crate::CommError;

/// Says why the job has failed and ends the process, which a launcher would otherwise kill before it has spoken.
pub type LastWords = fn(&CommError);

/// What a library or the network said of a call that failed.
#[derive(Debug)]
pub(crate) struct Fault(pub(crate) String);

/// All ranks before their first operation: every call blocks, and all ranks make the same calls.
pub(crate) trait Assembly {
    /// This rank.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn ranks(&self) -> usize;
    /// Everybody's `mine`, by rank. All ranks bring the same length.
    fn gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, Fault>;
    /// Rank 0's bytes on every rank.
    fn broadcast(&mut self, bytes: &mut Vec<u8>) -> Result<(), Fault>;
    /// Sends a value to `peer`; one of the two is rank 0.
    fn tell(&mut self, peer: usize, value: i64) -> Result<(), Fault>;
    /// Receives a value from `peer`; one of the two is rank 0.
    fn hear(&mut self, peer: usize) -> Result<i64, Fault>;
}
