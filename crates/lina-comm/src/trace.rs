//! What happened when, for traces and reports.

use std::collections::BTreeSet;
use std::sync::Mutex;

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
    /// Copies between the device's memory and its host's.
    Copy,
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
    /// Bytes that this rank sent, for communication; that were copied, for copies.
    pub bytes: u64,
}

impl Span {
    /// The span as words, to send it to another process; [`from_words`](Self::from_words) is the way back.
    pub fn to_words(&self) -> Vec<u64> {
        let Span { rank, lane, name, step, layer, part, start, end, bytes } = self;
        let layer = layer.map_or(0, |layer| u64::from(layer) + 1);
        let part = u64::from(part.0) << 32 | u64::from(part.1);
        let mut words = vec![u64::from(*rank), *lane as u64, *step, layer, part, *start, *end, *bytes];
        words.extend(name.bytes().map(u64::from));
        words
    }

    /// The span that [`to_words`](Self::to_words) made words of.
    ///
    /// # Panics
    /// If there are too few words.
    pub fn from_words(words: &[u64]) -> Self {
        let (head, name) = words.split_at(8);
        let &[rank, lane, step, layer, part, start, end, bytes] = head else { unreachable!("8 words") };
        let name: Vec<u8> = name.iter().map(|&letter| letter as u8).collect();
        Span {
            rank: rank as u32,
            lane: [Lane::Compute, Lane::AllToAll, Lane::AllReduce, Lane::Copy][(lane as usize).min(3)],
            name: interned(&String::from_utf8_lossy(&name)),
            step,
            layer: layer.checked_sub(1).map(|layer| layer as u32),
            part: ((part >> 32) as u32, part as u32),
            start,
            end,
            bytes,
        }
    }
}

/// The one copy of a name that came from another process. There are as many as a rank has kinds of work.
fn interned(name: &str) -> &'static str {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = NAMES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(known) = names.get(name) {
        return known;
    }
    let name: &'static str = Box::leak(name.to_owned().into_boxed_str());
    names.insert(name);
    name
}
