//! An all-to-all under way on this rank.
//!
//! Its receives are posted when it starts; its data is sent when the all-to-all before it has sent its own, since two
//! at a time would only delay the first. A small message goes ahead of the data to each peer: with when this rank
//! launched, from which everybody knows how long the exchange itself took, and with what is to come, so that ranks
//! whose programs differ are found.
//!
//! On the hierarchical way a rank meets the ranks of its node and those of its place in the others only. What it says to
//! the latter waits until it has heard the former: how much it passes on, and who of its node launched last.

use std::ffi::c_int;

use lina_plan::Relays;

use super::engine::{Label, Part};
use super::handles::{Address, Communicator, Requests};
use super::relay::Relay;
use crate::processes::Fault;
use crate::wire::Channel;
use crate::{AllToAllKind, CommError, Exchange};

/// Launch time on rank 0's clock, elements to come, the kind of the exchange; on the hierarchical way, within a node,
/// elements to pass on to each node follow.
type Announcement = Vec<i64>;

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
    /// On the hierarchical way.
    relay: Option<Relay>,
    /// Whether the ranks of other nodes are still to be told what comes.
    tells_far: bool,
    communicator: Communicator,
    sequence: u64,
    rank: usize,
}

/// Tags of one exchange are three; they repeat long after their exchange is over.
fn tag(sequence: u64, part: c_int) -> c_int {
    (sequence % (1 << 13)) as c_int * 3 + part
}

const ANNOUNCEMENT: c_int = 0;
const DATA: c_int = 1;
const TRANSIT: c_int = 2;

/// A number that differs between kinds.
fn code(kind: &AllToAllKind) -> i64 {
    let (leg, backward) = (kind.leg as i64, kind.direction as i64);
    ((i64::from(kind.layer) << 12 | i64::from(kind.chunk & 0xfff)) << 12 | i64::from(kind.chunks & 0xfff)) << 4
        | leg << 1
        | backward
}

impl ExchangeOp {
    /// Takes the exchange, copies this rank's own piece, announces and posts the receives; on the hierarchical way, if
    /// there are `relays`.
    pub(super) fn start(
        (index, mut exchange): (u32, Exchange),
        relays: Option<Relays>,
        (communicator, sequence, rank): (Communicator, u64, usize),
        launched: i64,
        requests: &mut Requests<Label>,
    ) -> Result<Self, Fault> {
        let ranks = exchange.send_elements.len();
        let from: usize = exchange.send_elements[..rank].iter().sum();
        let to: usize = exchange.recv_elements[..rank].iter().sum();
        let own = exchange.send_elements[rank];
        if own == exchange.recv_elements[rank] {
            exchange.recv[to..to + own].copy_from_slice(&exchange.send[from..from + own]);
        }
        let mut op = ExchangeOp {
            index,
            exchange,
            launched,
            announced: vec![Vec::new(); ranks],
            heard: vec![Vec::new(); ranks],
            awaited: vec![0; ranks],
            sending: 0,
            announcing: 0,
            sent: false,
            relay: relays.map(|relays| Relay::new(relays, rank)),
            tells_far: relays.is_some(),
            communicator,
            sequence,
            rank,
        };
        for peer in (0..ranks).filter(|&peer| peer != rank) {
            if !op.meets(peer) {
                continue;
            }
            let (near, nodes) = (op.is_near(peer), relays.map_or(0, |relays| relays.nodes()));
            op.heard[peer] = vec![0; 3 + if near { nodes } else { 0 }];
            let place = op.arrives(peer);
            let (head, head_label) = op.place(peer, ANNOUNCEMENT, Part::First);
            let (data, data_label) = op.place(peer, DATA, Part::Second);
            // SAFETY: the vectors are not resized while the operation lives, and it lives until every request is
            // done, or is leaked together with MPI. The pieces do not overlap, and nobody else has the exchange.
            unsafe {
                op.announcing += requests.receive(&mut op.heard[peer], head, head_label)?;
                op.awaited[peer] = requests.receive(&mut op.exchange.recv[place], data, data_label)?;
            }
            if near {
                op.announce(peer, op.exchange.send_elements[peer], requests)?;
            }
        }
        Ok(op)
    }

    /// Whether this rank exchanges messages with `peer`.
    fn meets(&self, peer: usize) -> bool {
        self.relay.as_ref().is_none_or(|relay| relay.meets(peer))
    }

    /// Whether `peer` gets its own data straight from this rank.
    fn is_near(&self, peer: usize) -> bool {
        self.relay.as_ref().is_none_or(|relay| relay.is_near(peer))
    }

    /// Where in the receive buffer the data that `peer` sends goes.
    fn arrives(&self, peer: usize) -> std::ops::Range<usize> {
        match &self.relay {
            Some(relay) if !relay.is_near(peer) => relay.arrives(&self.exchange, peer),
            _ => {
                let start: usize = self.exchange.recv_elements[..peer].iter().sum();
                start..start + self.exchange.recv_elements[peer]
            }
        }
    }

    fn place(&self, peer: usize, kind: c_int, part: Part) -> (Address, Label) {
        let route = Address { communicator: self.communicator, peer, tag: tag(self.sequence, kind) };
        (route, Label { channel: Channel::AllToAll, sequence: self.sequence, peer, part })
    }

    /// Tells `peer` that `elements` are to come.
    fn announce(&mut self, peer: usize, elements: usize, requests: &mut Requests<Label>) -> Result<(), Fault> {
        let mut announcement = vec![self.launched, elements as i64, code(&self.exchange.kind)];
        if let Some(relay) = self.relay.as_ref().filter(|relay| relay.is_near(peer)) {
            announcement.extend(relay.given(&self.exchange, peer));
        }
        self.announced[peer] = announcement;
        let (route, label) = self.place(peer, ANNOUNCEMENT, Part::FirstSent);
        // SAFETY: written once, here; it lives until every request is done, or is leaked together with MPI.
        self.announcing += unsafe { requests.send(&self.announced[peer], route, label) }?;
        Ok(())
    }

    /// Sends the data, once. Begins with the next rank, so that no rank gets everybody's first piece.
    pub(super) fn send(&mut self, requests: &mut Requests<Label>) -> Result<(), Fault> {
        if std::mem::replace(&mut self.sent, true) {
            return Ok(());
        }
        let ranks = self.exchange.send_elements.len();
        for peer in (1..ranks).map(|distance| (self.rank + distance) % ranks) {
            if !self.is_near(peer) {
                continue;
            }
            let start: usize = self.exchange.send_elements[..peer].iter().sum();
            let elements = self.exchange.send_elements[peer];
            let (route, label) = self.place(peer, DATA, Part::SecondSent);
            let transit = self.place(peer, TRANSIT, Part::SecondSent);
            // SAFETY: nobody else has the exchange, which lives until every request is done, or is leaked with MPI.
            unsafe {
                // What is to be passed on goes first: it has the longer way.
                if let Some(relay) = &self.relay {
                    self.sending += relay.give(&self.exchange, peer, transit, requests)?;
                }
                self.sending += requests.send(&self.exchange.send[start..start + elements], route, label)?;
            }
        }
        Ok(())
    }

    /// Collects and passes on what it can, on the hierarchical way.
    pub(super) fn pass_on(&mut self, requests: &mut Requests<Label>) -> Result<(), Fault> {
        let Some(mut relay) = self.relay.take() else { return Ok(()) };
        let result = self.pass_on_with(&mut relay, requests);
        self.relay = Some(relay);
        result
    }

    fn pass_on_with(&mut self, relay: &mut Relay, requests: &mut Requests<Label>) -> Result<(), Fault> {
        if relay.all_announced() && std::mem::replace(&mut self.tells_far, false) {
            // SAFETY: the relay's memory is a vector of its own that lives as long as the operation, which lives until
            // every request is done, or is leaked together with MPI.
            unsafe { relay.collect(&self.exchange, |peer| self.place(peer, TRANSIT, Part::Transit), requests)? };
            for peer in (0..self.heard.len()).filter(|&peer| relay.meets(peer) && !relay.is_near(peer)) {
                self.announce(peer, relay.passes_on(peer), requests)?;
            }
        }
        if !self.tells_far {
            // SAFETY: as above.
            self.sending += unsafe { relay.pass_on(|peer| self.place(peer, DATA, Part::SecondSent), requests)? };
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
            Part::Transit => self.relay.iter_mut().for_each(Relay::received),
            Part::First => {
                self.announcing -= 1;
                let expected = self.arrives(peer).len();
                let (head, given) = self.heard[peer].split_at(3);
                let &[launched, elements, kind] = head else { unreachable!("3 values") };
                self.launched = self.launched.max(launched);
                let what = self.exchange.kind;
                let reason = if kind != code(&what) {
                    format!("it takes part in another exchange than {what}, which rank {} is at", self.rank)
                } else if elements != expected as i64 {
                    format!("{what}: it sends {elements} elements to rank {}, which expects {expected}", self.rank)
                } else {
                    if let Some(relay) = self.relay.as_mut().filter(|relay| relay.is_near(peer)) {
                        relay.announced(peer, given);
                    }
                    return Ok(());
                };
                return Err(CommError::RankFailed { rank: peer, reason });
            }
        }
        Ok(())
    }

    /// Whether all data has been handed to the network.
    pub(super) fn has_sent(&self) -> bool {
        self.sent && self.sending == 0 && self.relay.as_ref().is_none_or(Relay::has_passed_on)
    }

    pub(super) fn is_done(&self) -> bool {
        self.has_sent() && self.announcing == 0 && self.awaited.iter().all(|&messages| messages == 0)
    }
}
