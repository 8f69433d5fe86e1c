//! How ranks meet: MPI starts, everybody compares what it was told, clocks are set against each other, and the
//! heartbeat's connections are made. Calls of this module block; afterwards nothing does.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use mpi::Threading;
use mpi::environment::Universe;

use super::handles::{Communicator, Fault};
use super::heartbeat::{Heartbeat, Meeting};
use super::{MpiConfig, MpiStartError};
use crate::threaded::Mailbox;

/// Bytes in which a rank says in what it differs.
const DIFFERENCE_BYTES: usize = 512;
/// Bytes for a rank's addresses.
const ADDRESS_BYTES: usize = 1024;
/// Exchanges by which a clock is set; the fastest counts.
const CLOCK_ROUNDS: usize = 20;

/// A rank that has met the others.
pub(super) struct Started {
    /// Finalises MPI when it is dropped.
    pub(super) universe: Universe,
    pub(super) world: Communicator,
    pub(super) rank: usize,
    /// What to add to this rank's nanoseconds since `epoch` for rank 0's.
    pub(super) clock_offset: i64,
    pub(super) heartbeat: Heartbeat,
}

impl From<Fault> for MpiStartError {
    fn from(Fault(sentence): Fault) -> Self {
        MpiStartError::Broken(sentence)
    }
}

impl Started {
    pub(super) fn new(config: &MpiConfig, epoch: Instant, mailbox: Arc<Mailbox>) -> Result<Self, MpiStartError> {
        let broken = |sentence: String| MpiStartError::Broken(sentence);
        let universe = mpi::initialize_with_threading(Threading::Funneled);
        let (universe, _) = universe.ok_or_else(|| broken("MPI has been started in this process before".to_owned()))?;
        let world = Communicator::world()?;
        let (rank, ranks) = (world.rank()?, world.size()?);
        if ranks != config.ranks {
            return Err(MpiStartError::OtherRanks { found: ranks, expected: config.ranks });
        }
        compare(world, rank, &config.identity)?;
        let clock_offset = set_clock(world, rank, ranks, epoch)?;

        let meeting = Meeting::open().map_err(|e| broken(format!("a port for the heartbeat cannot be opened: {e}")))?;
        let mine = meeting.addresses().map_err(|e| broken(format!("this host's addresses cannot be listed: {e}")))?;
        let addresses = gather_text(world, &mine, ADDRESS_BYTES)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut token = (now.as_nanos() as u64 ^ u64::from(std::process::id()) << 32).to_le_bytes().to_vec();
        world.broadcast(&mut token)?;
        let token = u64::from_le_bytes(token.try_into().map_err(|_| broken("rank 0 sent no token".to_owned()))?);
        let streams = meeting.connect(rank, token, &addresses).map_err(broken)?;
        let heartbeat = Heartbeat::start(rank, streams, config.timeout, mailbox, config.last_words)
            .map_err(|e| broken(format!("the heartbeat cannot be started: {e}")))?;
        Ok(Started { universe, world, rank, clock_offset, heartbeat })
    }
}

/// Everybody's text, by rank, cut to `capacity` bytes.
fn gather_text(world: Communicator, mine: &str, capacity: usize) -> Result<Vec<String>, Fault> {
    let mut bytes = mine.as_bytes()[..mine.len().min(capacity)].to_vec();
    bytes.resize(capacity, 0);
    let all = world.gather(&bytes)?;
    Ok(all.iter().map(|bytes| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()).collect())
}

/// Whether all ranks were told the same as rank 0.
fn compare(world: Communicator, rank: usize, identity: &str) -> Result<(), MpiStartError> {
    let mut of_first = if rank == 0 { identity.as_bytes().to_vec() } else { Vec::new() };
    world.broadcast(&mut of_first)?;
    let mine = difference(identity, &String::from_utf8_lossy(&of_first)).unwrap_or_default();
    let all = gather_text(world, &mine, DIFFERENCE_BYTES)?;
    match all.into_iter().enumerate().find(|(_, difference)| !difference.is_empty()) {
        Some((rank, difference)) => Err(MpiStartError::Differs { rank, difference }),
        None => Ok(()),
    }
}

/// The first line in which two texts differ, as part of a sentence.
fn difference(mine: &str, first: &str) -> Option<String> {
    if mine == first {
        return None;
    }
    let (mut mine, mut first) = (mine.lines(), first.lines());
    loop {
        let pair = (mine.next(), first.next());
        if pair.0 != pair.1 || pair == (None, None) {
            let [mine, first] = [pair.0, pair.1].map(|line| line.unwrap_or("nothing"));
            return Some(format!("it has `{mine}` where rank 0 has `{first}`"));
        }
    }
}

/// Nanoseconds by which rank 0's clock is ahead of this rank's. The reading that was under way for the shortest time
/// counts, as in Cristian's algorithm (1989).
fn set_clock(world: Communicator, rank: usize, ranks: usize, epoch: Instant) -> Result<i64, Fault> {
    let now = || epoch.elapsed().as_nanos() as i64;
    if rank == 0 {
        for peer in 1..ranks {
            for _ in 0..CLOCK_ROUNDS {
                world.hear(peer)?;
                world.tell(peer, now())?;
            }
        }
        return Ok(0);
    }
    let mut best = (i64::MAX, 0);
    for _ in 0..CLOCK_ROUNDS {
        let asked = now();
        world.tell(0, asked)?;
        let reading = world.hear(0)?;
        let answered = now();
        best = best.min((answered - asked, reading - (asked + answered) / 2));
    }
    Ok(best.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_that_differs_is_named() {
        assert_eq!(difference("a\nb\n", "a\nb\n"), None);
        let expected = "it has `steps = 5` where rank 0 has `steps = 3`";
        assert_eq!(difference("v\nsteps = 5\nz", "v\nsteps = 3\ny").as_deref(), Some(expected));
        assert_eq!(difference("a", "a\nb").as_deref(), Some("it has `nothing` where rank 0 has `b`"));
    }
}
