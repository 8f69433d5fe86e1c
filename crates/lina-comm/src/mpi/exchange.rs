//! An all-to-all under way on this rank.
//!
//! Its receives are posted when it starts; its data is sent when the all-to-all before it has sent its own, since two
//! at a time would only delay the first. A small message goes ahead of the data to each peer: with when this rank
//! launched, from which everybody knows how long the exchange itself took, and with what is to come, so that ranks
//! whose programs differ are found.

use std::ffi::c_int;

use super::engine::{Label, Part};
use super::handles::{Communicator, Fault, Requests, Route};
use crate::wire::Channel;
use crate::{AllToAllKind, CommError, Exchange};

/// Launch time on rank 0's clock, elements to come, and the kind of the exchange.
type Announcement = [i64; 3];

pub(super) struct ExchangeOp {
    pub(super) index: u32,
    pub(super) exchange: Exchange,
    /// The latest launch known of, on rank 0's clock.
    pub(super) launched: i64,
    announced: Vec<Announcement>,
    heard: Vec<Announcement>,
    /// Data still to come from each peer, in messages.
    awaited: Vec<usize>,
    /// Messages of data under way to peers.
    sending: usize,
    /// Announcements under way or awaited.
    announcing: usize,
    sent: bool,
    communicator: Communicator,
    sequence: u64,
    rank: usize,
}

/// Tags of one exchange are two; they repeat long after their exchange is over.
fn tag(sequence: u64, part: c_int) -> c_int {
    (sequence % (1 << 13)) as c_int * 2 + part
}

/// A number that differs between kinds.
fn code(kind: &AllToAllKind) -> i64 {
    let (leg, backward) = (kind.leg as i64, kind.direction as i64);
    ((i64::from(kind.layer) << 12 | i64::from(kind.chunk & 0xfff)) << 12 | i64::from(kind.chunks & 0xfff)) << 4
        | leg << 1
        | backward
}

impl ExchangeOp {
    /// Takes the exchange, copies this rank's own piece, announces and posts the receives.
    pub(super) fn start(
        (index, mut exchange): (u32, Exchange),
        (communicator, sequence, rank): (Communicator, u64, usize),
        launched: i64,
        requests: &mut Requests<Label>,
    ) -> Result<Self, Fault> {
        let ranks = exchange.send_elements.len();
        let kind = code(&exchange.kind);
        let from: usize = exchange.send_elements[..rank].iter().sum();
        let to: usize = exchange.recv_elements[..rank].iter().sum();
        let own = exchange.send_elements[rank];
        if own == exchange.recv_elements[rank] {
            exchange.recv[to..to + own].copy_from_slice(&exchange.send[from..from + own]);
        }
        let announced = exchange.send_elements.iter().map(|&elements| [launched, elements as i64, kind]).collect();
        let mut op = ExchangeOp {
            index,
            exchange,
            launched,
            announced,
            heard: vec![[0; 3]; ranks],
            awaited: vec![0; ranks],
            sending: 0,
            announcing: 0,
            sent: false,
            communicator,
            sequence,
            rank,
        };
        let mut start = 0;
        for peer in 0..ranks {
            let elements = op.exchange.recv_elements[peer];
            if peer != rank {
                let head = Route { communicator, peer, tag: tag(sequence, 0) };
                let data = Route { tag: tag(sequence, 1), ..head };
                let [first, first_sent, second] =
                    [Part::First, Part::FirstSent, Part::Second].map(|p| op.label(peer, p));
                let recv = &mut op.exchange.recv[start..start + elements];
                // SAFETY: the vectors are not resized while the operation lives, and it lives until every request is
                // done, or is leaked together with MPI. The pieces do not overlap, and nobody else has the exchange.
                unsafe {
                    op.announcing += requests.receive(&mut op.heard[peer..=peer], head, first)?;
                    op.announcing += requests.send(&op.announced[peer..=peer], head, first_sent)?;
                    op.awaited[peer] = requests.receive(recv, data, second)?;
                }
            }
            start += elements;
        }
        Ok(op)
    }

    fn label(&self, peer: usize, part: Part) -> Label {
        Label { channel: Channel::AllToAll, sequence: self.sequence, peer, part }
    }

    /// Sends the data, once. Begins with the next rank, so that no rank gets everybody's first piece.
    pub(super) fn send(&mut self, requests: &mut Requests<Label>) -> Result<(), Fault> {
        if std::mem::replace(&mut self.sent, true) {
            return Ok(());
        }
        let ranks = self.exchange.send_elements.len();
        for peer in (1..ranks).map(|distance| (self.rank + distance) % ranks) {
            let start: usize = self.exchange.send_elements[..peer].iter().sum();
            let elements = self.exchange.send_elements[peer];
            let route = Route { communicator: self.communicator, peer, tag: tag(self.sequence, 1) };
            let label = self.label(peer, Part::SecondSent);
            // SAFETY: nobody else has the exchange, which lives until every request is done, or is leaked with MPI.
            self.sending += unsafe { requests.send(&self.exchange.send[start..start + elements], route, label) }?;
        }
        Ok(())
    }

    /// A request is done.
    ///
    /// # Errors
    /// If the peer sends something else than this rank expects.
    pub(super) fn done(&mut self, peer: usize, part: Part) -> Result<(), CommError> {
        match part {
            Part::FirstSent => self.announcing -= 1,
            Part::SecondSent => self.sending -= 1,
            Part::Second => self.awaited[peer] -= 1,
            Part::First => {
                self.announcing -= 1;
                let [launched, elements, kind] = self.heard[peer];
                self.launched = self.launched.max(launched);
                let expected = self.exchange.recv_elements[peer];
                let what = self.exchange.kind;
                let reason = if kind != code(&what) {
                    format!("it takes part in another exchange than {what}, which rank {} is at", self.rank)
                } else if elements != expected as i64 {
                    format!("{what}: it sends {elements} elements to rank {}, which expects {expected}", self.rank)
                } else {
                    return Ok(());
                };
                return Err(CommError::RankFailed { rank: peer, reason });
            }
        }
        Ok(())
    }

    /// Whether all data has been handed to the network.
    pub(super) fn has_sent(&self) -> bool {
        self.sent && self.sending == 0
    }

    pub(super) fn is_done(&self) -> bool {
        self.has_sent() && self.announcing == 0 && self.awaited.iter().all(|&messages| messages == 0)
    }
}
