//! How ranks meet: everybody compares what it was told, clocks are set against each other, and the heartbeat's connections
//! are made. Calls of this module block; afterwards nothing does.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::heartbeat::{Heartbeat, Meeting};
use super::{Assembly, Fault, LastWords};
use crate::threaded::Mailbox;

/// Bytes in which a rank says in what it differs.
const DIFFERENCE_BYTES: usize = 512;
/// Bytes for a rank's addresses.
const ADDRESS_BYTES: usize = 1024;
/// Exchanges by which a clock is set; the fastest counts.
const CLOCK_ROUNDS: usize = 20;

/// What a rank was told of its job.
pub(crate) struct Expectations<'a> {
    /// Number of ranks that the job is laid out for.
    pub(crate) ranks: usize,
    /// Text that must be the same on all ranks.
    pub(crate) identity: &'a str,
    pub(crate) timeout: Duration,
    pub(crate) last_words: Option<LastWords>,
}

/// Why ranks do not come together.
pub(crate) enum Refusal {
    Broken(String),
    OtherRanks { found: usize, expected: usize },
    Differs { rank: usize, difference: String },
}

impl From<Fault> for Refusal {
    fn from(Fault(sentence): Fault) -> Self {
        Refusal::Broken(sentence)
    }
}

/// A rank that has met the others.
pub(crate) struct Met {
    /// What to add to this rank's nanoseconds since its epoch for rank 0's.
    pub(crate) clock_offset: i64,
    pub(crate) heartbeat: Heartbeat,
}

/// Meets the others; all ranks call it together.
///
/// # Errors
/// The same on all ranks where the ranks do not fit together.
pub(crate) fn meet(
    assembly: &mut impl Assembly,
    expected: &Expectations<'_>,
    epoch: Instant,
    mailbox: Arc<Mailbox>,
) -> Result<Met, Refusal> {
    let broken = |sentence: String| Refusal::Broken(sentence);
    let (rank, ranks) = (assembly.rank(), assembly.ranks());
    if ranks != expected.ranks {
        return Err(Refusal::OtherRanks { found: ranks, expected: expected.ranks });
    }
    compare(assembly, expected.identity)?;
    let clock_offset = set_clock(assembly, epoch)?;

    let meeting = Meeting::open().map_err(|e| broken(format!("a port for the heartbeat cannot be opened: {e}")))?;
    let mine = meeting.addresses().map_err(|e| broken(format!("this host's addresses cannot be listed: {e}")))?;
    let addresses = gather_text(assembly, &mine, ADDRESS_BYTES)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut token = (now.as_nanos() as u64 ^ u64::from(std::process::id()) << 32).to_le_bytes().to_vec();
    assembly.broadcast(&mut token)?;
    let token = u64::from_le_bytes(token.try_into().map_err(|_| broken("rank 0 sent no token".to_owned()))?);
    let streams = meeting.connect(rank, token, &addresses).map_err(broken)?;
    let heartbeat = Heartbeat::start(rank, streams, expected.timeout, mailbox, expected.last_words)
        .map_err(|e| broken(format!("the heartbeat cannot be started: {e}")))?;
    Ok(Met { clock_offset, heartbeat })
}

/// Everybody's text, by rank, cut to `capacity` bytes.
pub(crate) fn gather_text(assembly: &mut impl Assembly, mine: &str, capacity: usize) -> Result<Vec<String>, Fault> {
    let mut bytes = mine.as_bytes()[..mine.len().min(capacity)].to_vec();
    bytes.resize(capacity, 0);
    let all = assembly.gather(&bytes)?;
    Ok(all.iter().map(|bytes| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()).collect())
}

/// Whether all ranks were told the same as rank 0.
fn compare(assembly: &mut impl Assembly, identity: &str) -> Result<(), Refusal> {
    let mut of_first = if assembly.rank() == 0 { identity.as_bytes().to_vec() } else { Vec::new() };
    assembly.broadcast(&mut of_first)?;
    let mine = difference(identity, &String::from_utf8_lossy(&of_first)).unwrap_or_default();
    let all = gather_text(assembly, &mine, DIFFERENCE_BYTES)?;
    match all.into_iter().enumerate().find(|(_, difference)| !difference.is_empty()) {
        Some((rank, difference)) => Err(Refusal::Differs { rank, difference }),
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
fn set_clock(assembly: &mut impl Assembly, epoch: Instant) -> Result<i64, Fault> {
    let now = || epoch.elapsed().as_nanos() as i64;
    if assembly.rank() == 0 {
        for peer in 1..assembly.ranks() {
            for _ in 0..CLOCK_ROUNDS {
                assembly.hear(peer)?;
                assembly.tell(peer, now())?;
            }
        }
        return Ok(0);
    }
    let mut best = (i64::MAX, 0);
    for _ in 0..CLOCK_ROUNDS {
        let asked = now();
        assembly.tell(0, asked)?;
        let reading = assembly.hear(0)?;
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
