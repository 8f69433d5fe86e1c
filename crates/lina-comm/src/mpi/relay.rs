//! The transit part of a hierarchical all-to-all on this rank: what it passes on between nodes for the ranks of its own
//! ([`lina_plan::Relays`]).
//!
//! The ranks of a node announce how much they will give each other for every other node. Then this rank knows the size
//! of what it collects for the rank that has its place in another node, and in what order: by source. It goes on in one
//! message as soon as all of it is here, and is received in place, since the ranks of a node follow each other.

use lina_plan::Relays;

use super::engine::Label;
use super::handles::{Address, Requests};
use crate::Exchange;
use crate::processes::Fault;

/// What one rank collects and passes on in one exchange.
pub(super) struct Relay {
    relays: Relays,
    rank: usize,
    /// For each node, elements from each place of this rank's node; known once all have announced.
    elements: Vec<Vec<usize>>,
    /// What is collected, by (node, place of the source).
    transit: Vec<f32>,
    /// Ranks of the node whose announcement is still to come.
    unannounced: usize,
    /// Messages still to come.
    awaited: usize,
    passed_on: bool,
}

impl Relay {
    pub(super) fn new(relays: Relays, rank: usize) -> Self {
        Relay {
            relays,
            rank,
            elements: vec![vec![0; relays.node_ranks()]; relays.nodes()],
            transit: Vec::new(),
            unannounced: relays.node_ranks() - 1,
            awaited: 0,
            passed_on: false,
        }
    }

    /// Whether `peer` is in this rank's node.
    pub(super) fn is_near(&self, peer: usize) -> bool {
        self.relays.node_of(peer) == self.relays.node_of(self.rank)
    }

    /// Whether this rank exchanges messages with `peer`: one of its node, or the one of its place in another.
    pub(super) fn meets(&self, peer: usize) -> bool {
        self.is_near(peer) || self.relays.place_of(peer) == self.relays.place_of(self.rank)
    }

    /// The nodes that this rank passes something on to.
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let own = self.relays.node_of(self.rank);
        (0..self.relays.nodes()).filter(move |&node| node != own)
    }

    /// Elements that this rank gives `peer`, of its node, for each node.
    pub(super) fn given(&self, exchange: &Exchange, peer: usize) -> Vec<i64> {
        let place = self.relays.place_of(peer);
        let to = |node: usize| exchange.send_elements[self.relays.rank_at(node, place)] as i64;
        (0..self.relays.nodes()).map(to).collect()
    }

    /// Where in the receive buffer everything from the node of `peer` goes, as a range of elements.
    pub(super) fn arrives(&self, exchange: &Exchange, peer: usize) -> std::ops::Range<usize> {
        let first = self.relays.rank_at(self.relays.node_of(peer), 0);
        let start: usize = exchange.recv_elements[..first].iter().sum();
        let elements: usize = exchange.recv_elements[first..first + self.relays.node_ranks()].iter().sum();
        start..start + elements
    }

    /// `peer`, of this rank's node, has announced how much it gives for each node.
    pub(super) fn announced(&mut self, peer: usize, elements: &[i64]) {
        let place = self.relays.place_of(peer);
        for (of_node, &elements) in self.elements.iter_mut().zip(elements) {
            of_node[place] = usize::try_from(elements).unwrap_or(0);
        }
        self.unannounced -= 1;
    }

    /// Whether all ranks of the node have announced.
    pub(super) fn all_announced(&self) -> bool {
        self.unannounced == 0
    }

    /// All ranks of the node have announced: takes this rank's own pieces and posts the receives of the others'.
    ///
    /// # Safety
    /// This must stay alive until every request is done, or MPI is never called again.
    pub(super) unsafe fn collect(
        &mut self,
        exchange: &Exchange,
        mut route: impl FnMut(usize) -> (Address, Label),
        requests: &mut Requests<Label>,
    ) -> Result<(), Fault> {
        let own = self.relays.place_of(self.rank);
        for node in self.others() {
            self.elements[node][own] = exchange.send_elements[self.relays.rank_at(node, own)];
        }
        let total = self.others().map(|node| self.elements[node].iter().sum::<usize>()).sum();
        self.transit = vec![0.0; total];
        let mut start = 0;
        for node in self.others() {
            for (place, &elements) in self.elements[node].iter().enumerate() {
                let piece = &mut self.transit[start..start + elements];
                start += elements;
                if place == own {
                    let from = self.relays.rank_at(node, own);
                    let sent: usize = exchange.send_elements[..from].iter().sum();
                    piece.copy_from_slice(&exchange.send[sent..sent + elements]);
                    continue;
                }
                let (route, label) = route(self.relays.rank_at(self.relays.node_of(self.rank), place));
                // SAFETY: the vector is not resized any more, and the caller keeps it alive.
                self.awaited += unsafe { requests.receive(piece, route, label) }?;
            }
        }
        Ok(())
    }

    /// Elements that this rank passes on to `peer`, of its place in another node.
    pub(super) fn passes_on(&self, peer: usize) -> usize {
        self.elements[self.relays.node_of(peer)].iter().sum()
    }

    /// Sends `peer`, of this rank's node, what it is to pass on. Returns the number of messages.
    ///
    /// # Safety
    /// The exchange must stay alive and unchanged until every request is done, or MPI is never called again.
    pub(super) unsafe fn give(
        &self,
        exchange: &Exchange,
        peer: usize,
        (route, label): (Address, Label),
        requests: &mut Requests<Label>,
    ) -> Result<usize, Fault> {
        let mut messages = 0;
        for node in self.others() {
            let to = self.relays.rank_at(node, self.relays.place_of(peer));
            let start: usize = exchange.send_elements[..to].iter().sum();
            let piece = &exchange.send[start..start + exchange.send_elements[to]];
            // SAFETY: the caller keeps the exchange as it is.
            messages += unsafe { requests.send(piece, route, label) }?;
        }
        Ok(messages)
    }

    /// A message to pass on has come.
    pub(super) fn received(&mut self) {
        self.awaited -= 1;
    }

    /// Sends on what is [`collect`](Self::collect)ed, once, when all of it is here. Returns the number of messages.
    ///
    /// # Safety
    /// This must stay alive until every request is done, or MPI is never called again.
    pub(super) unsafe fn pass_on(
        &mut self,
        mut route: impl FnMut(usize) -> (Address, Label),
        requests: &mut Requests<Label>,
    ) -> Result<usize, Fault> {
        if self.awaited > 0 || std::mem::replace(&mut self.passed_on, true) {
            return Ok(0);
        }
        let (mut start, mut messages) = (0, 0);
        for node in self.others() {
            let elements: usize = self.elements[node].iter().sum();
            let (route, label) = route(self.relays.rank_at(node, self.relays.place_of(self.rank)));
            // SAFETY: nobody changes the vector any more, and the caller keeps it alive.
            messages += unsafe { requests.send(&self.transit[start..start + elements], route, label) }?;
            start += elements;
        }
        Ok(messages)
    }

    /// Whether everything has been handed to the network.
    pub(super) fn has_passed_on(&self) -> bool {
        self.passed_on
    }
}
