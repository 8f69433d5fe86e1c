//! How a rank starts: MPI first, then it meets the others. Calls of this module block; afterwards nothing does.

use std::sync::Arc;
use std::time::Instant;

use mpi::Threading;
use mpi::environment::Universe;

use super::handles::{Communicator, World};
use super::{MpiConfig, MpiStartError};
use crate::processes::meeting::{Expectations, Met, Refusal, meet};
use crate::processes::{Assembly, Fault};
use crate::threaded::Mailbox;

/// A rank that has met the others.
pub(super) struct Started {
    /// Finalises MPI when it is dropped.
    pub(super) universe: Universe,
    pub(super) world: Communicator,
    pub(super) rank: usize,
    pub(super) met: Met,
}

impl From<Fault> for MpiStartError {
    fn from(Fault(sentence): Fault) -> Self {
        MpiStartError::Broken(sentence)
    }
}

impl From<Refusal> for MpiStartError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Broken(sentence) => MpiStartError::Broken(sentence),
            Refusal::OtherRanks { found, expected } => MpiStartError::OtherRanks { found, expected },
            Refusal::Differs { rank, difference } => MpiStartError::Differs { rank, difference },
        }
    }
}

impl Started {
    pub(super) fn new(config: &MpiConfig, epoch: Instant, mailbox: Arc<Mailbox>) -> Result<Self, MpiStartError> {
        let universe = mpi::initialize_with_threading(Threading::Funneled);
        let again = || MpiStartError::Broken("MPI has been started in this process before".to_owned());
        let (universe, _) = universe.ok_or_else(again)?;
        let mut world = World::new()?;
        let MpiConfig { ranks, timeout, last_words, .. } = *config;
        let expected = Expectations { ranks, identity: &config.identity, timeout, last_words };
        let met = meet(&mut world, &expected, epoch, mailbox)?;
        Ok(Started { universe, world: world.communicator, rank: world.rank(), met })
    }
}
