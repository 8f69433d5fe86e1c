//! Who passes what on in an all-to-all that goes inside the nodes first ([`Route::ThroughNode`](crate::Route)).

/// Nodes of equally many ranks, which ranks fill in order. A piece for rank d of another node goes to the rank of the
/// sender's node that has d's place in its node, the *relay*, and from there to d, together with what the relay has for d
/// from the other ranks of its node: messages between nodes go between ranks of one place only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relays {
    node_ranks: usize,
    nodes: usize,
}

impl Relays {
    /// `None` where that is not a way of its own: a single node, one rank a node, or nodes of different sizes.
    pub fn new(ranks: usize, nodes: usize) -> Option<Self> {
        (nodes > 1 && nodes < ranks && ranks.is_multiple_of(nodes)).then(|| Relays { node_ranks: ranks / nodes, nodes })
    }

    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        self.nodes
    }

    /// Ranks of a node.
    pub fn node_ranks(&self) -> usize {
        self.node_ranks
    }

    /// The node of a rank.
    pub fn node_of(&self, rank: usize) -> usize {
        rank / self.node_ranks
    }

    /// The place of a rank in its node.
    pub fn place_of(&self, rank: usize) -> usize {
        rank % self.node_ranks
    }

    /// The rank in `place` of `node`.
    pub fn rank_at(&self, node: usize, place: usize) -> usize {
        node * self.node_ranks + place
    }

    /// Where a piece from `source` to `destination` goes first: to the destination itself within a node.
    pub fn relay(&self, source: usize, destination: usize) -> usize {
        self.rank_at(self.node_of(source), self.place_of(destination))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_is_in_the_sender_s_node_and_the_receiver_s_place() {
        let relays = Relays::new(6, 2).unwrap();
        assert_eq!((relays.relay(0, 4), relays.relay(0, 1), relays.relay(4, 1), relays.relay(2, 5)), (1, 1, 4, 2));
        assert_eq!((Relays::new(6, 1), Relays::new(6, 6), Relays::new(6, 4)), (None, None, None));
    }
}
