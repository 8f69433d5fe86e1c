//! Which ports a collective crosses, and with how many bytes.

use std::collections::BTreeMap;

use lina_plan::{Nanos, Relays, Route};

/// Rates and overheads of an emulated network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Rate of each node's network interface, each way, in Gbit/s.
    pub gbps: f64,
    /// Time from the launch of a collective's message round to its arrival, in microseconds.
    pub latency_us: f64,
    /// Time that launching one operation takes on its channel, in microseconds.
    pub launch_us: f64,
    /// Time for which a message between nodes occupies each of their interfaces besides its bytes, in microseconds.
    pub message_us: f64,
    /// Number of nodes; ranks fill them in order, evenly.
    pub nodes: usize,
    /// Rate of each rank's link inside its node, each way, in Gbit/s.
    pub inner_gbps: f64,
}

/// A one-way port at which collectives share a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Port {
    /// Out of a node's network interface.
    NodeOut(usize),
    /// Into a node's network interface.
    NodeIn(usize),
    /// Out of a rank, to ranks of its node.
    RankOut(usize),
    /// Into a rank, from ranks of its node.
    RankIn(usize),
}

/// Bytes that one collective moves through one port.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Where.
    pub port: Port,
    /// How many, more than 0.
    pub bytes: f64,
}

/// Ranks on nodes.
#[derive(Clone, Debug)]
pub struct Topology {
    link: Link,
    node_of: Vec<usize>,
}

/// A topology that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopologyError {
    /// Key, found and expected, one sentence.
    pub message: String,
}

impl std::fmt::Display for TopologyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for TopologyError {}

impl Topology {
    /// `ranks` spread over the nodes of `link`, in order.
    ///
    /// # Errors
    /// If a rate is not positive, an overhead is negative, or there are more nodes than ranks.
    pub fn new(link: Link, ranks: usize) -> Result<Self, TopologyError> {
        let error = |message: String| Err(TopologyError { message });
        for (key, value) in [("gbps", link.gbps), ("inner_gbps", link.inner_gbps)] {
            if !(value > 0.0 && value.is_finite()) {
                return error(format!("link.{key} is {value}, expected a positive number of Gbit/s"));
            }
        }
        let overheads =
            [("latency_us", link.latency_us), ("launch_us", link.launch_us), ("message_us", link.message_us)];
        for (key, value) in overheads {
            if !(value >= 0.0 && value.is_finite()) {
                return error(format!("link.{key} is {value}, expected a number of microseconds of at least 0"));
            }
        }
        if link.nodes == 0 || link.nodes > ranks {
            return error(format!("link.nodes is {}, expected 1 to {ranks}, the number of ranks", link.nodes));
        }
        let node_of = (0..ranks).map(|rank| rank * link.nodes / ranks).collect();
        Ok(Topology { link, node_of })
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.node_of.len()
    }

    /// The node of a rank.
    pub fn node_of(&self, rank: usize) -> usize {
        self.node_of[rank]
    }

    /// Rate of `port` in bytes per nanosecond.
    pub fn rate(&self, port: Port) -> f64 {
        match port {
            Port::NodeOut(_) | Port::NodeIn(_) => self.link.gbps / 8.0,
            Port::RankOut(_) | Port::RankIn(_) => self.link.inner_gbps / 8.0,
        }
    }

    /// Time of launching an operation.
    pub fn launch(&self) -> Nanos {
        (self.link.launch_us * 1e3).round() as Nanos
    }

    /// Time of `rounds` message rounds before their bytes flow.
    pub fn latency(&self, rounds: usize) -> Nanos {
        (self.link.latency_us * rounds as f64 * 1e3).round() as Nanos
    }

    /// Loads of an all-to-all in which rank `s` sends `bytes[s * ranks + d]` to rank `d`, in the stages that follow each
    /// other. A rank's own piece stays in its memory. [`Route::ThroughNode`] has two stages where there are several
    /// nodes of as many ranks, more than one; else it is the direct way.
    pub fn all_to_all(&self, bytes: &[u64], route: Route) -> Vec<Vec<Load>> {
        let ranks = self.ranks();
        debug_assert_eq!(bytes.len(), ranks * ranks);
        let pieces = (0..ranks).flat_map(|s| (0..ranks).map(move |d| (s, d, bytes[s * ranks + d])));
        let pieces = pieces.filter(|&(s, d, bytes)| s != d && bytes > 0);
        let Some(relays) = Relays::new(ranks, self.link.nodes).filter(|_| route == Route::ThroughNode) else {
            return vec![self.sum_loads(pieces.map(|(s, d, bytes)| (s, d, bytes as f64, 1)))];
        };
        let inside =
            pieces.clone().map(|(s, d, bytes)| (s, relays.relay(s, d), bytes as f64, 1)).filter(|x| x.0 != x.1);
        // What a relay has for a rank goes in one message.
        let mut between = BTreeMap::new();
        for (s, d, bytes) in pieces {
            let relay = relays.relay(s, d);
            if relay != d {
                *between.entry((relay, d)).or_insert(0.0) += bytes as f64;
            }
        }
        let between = between.into_iter().map(|((relay, d), bytes)| (relay, d, bytes, 1));
        vec![self.sum_loads(inside), self.sum_loads(between)]
    }

    /// Loads of an allreduce of `bytes` over the ranks of `group`: a ring, whose every member passes
    /// `2·(n-1)/n·bytes` to its successor. (A direct reduce-scatter and all-gather moves the same bytes.)
    pub fn all_reduce(&self, group: &[usize], bytes: u64) -> Vec<Load> {
        let n = group.len();
        if n < 2 {
            return Vec::new();
        }
        let share = 2.0 * (n as f64 - 1.0) / n as f64 * bytes as f64;
        self.sum_loads((0..n).map(|i| (group[i], group[(i + 1) % n], share, 2 * (n - 1))))
    }

    /// How long `loads` take while nothing else is on the wire, overheads excluded.
    pub fn alone(&self, loads: &[Load]) -> Nanos {
        loads.iter().map(|load| load.bytes / self.rate(load.port)).fold(0.0, f64::max).ceil() as Nanos
    }

    /// Loads of (source, destination, bytes, number of messages).
    fn sum_loads(&self, messages: impl Iterator<Item = (usize, usize, f64, usize)>) -> Vec<Load> {
        // A message's overhead is as many bytes as could have passed in its time.
        let message_bytes = self.link.message_us * 1e3 * self.link.gbps / 8.0;
        let (ranks, nodes) = (self.ranks(), self.link.nodes);
        let (mut node_out, mut node_in) = (vec![0.0; nodes], vec![0.0; nodes]);
        let (mut rank_out, mut rank_in) = (vec![0.0; ranks], vec![0.0; ranks]);
        for (source, destination, bytes, messages) in messages {
            let (from, to) = (self.node_of[source], self.node_of[destination]);
            if from == to {
                rank_out[source] += bytes;
                rank_in[destination] += bytes;
            } else {
                let bytes = bytes + message_bytes * messages as f64;
                node_out[from] += bytes;
                node_in[to] += bytes;
            }
        }
        let loads = |port: fn(usize) -> Port, sums: Vec<f64>| {
            let loads = sums.into_iter().enumerate().map(move |(place, bytes)| Load { port: port(place), bytes });
            loads.filter(|load| load.bytes > 0.0)
        };
        loads(Port::NodeOut, node_out)
            .chain(loads(Port::NodeIn, node_in))
            .chain(loads(Port::RankOut, rank_out))
            .chain(loads(Port::RankIn, rank_in))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(nodes: usize) -> Link {
        Link { gbps: 8.0, latency_us: 5.0, launch_us: 2.0, message_us: 0.0, nodes, inner_gbps: 80.0 }
    }

    #[test]
    fn an_all_to_all_between_nodes_loads_their_interfaces() {
        let topology = Topology::new(link(2), 4).unwrap();
        let [loads] = &topology.all_to_all(&[100; 16], Route::Direct)[..] else { panic!("one stage") };
        // Each node sends 2 x 2 pieces out, each rank one piece to its neighbour.
        assert!(loads.contains(&Load { port: Port::NodeOut(0), bytes: 400.0 }));
        assert!(loads.contains(&Load { port: Port::RankIn(3), bytes: 100.0 }));
        // 400 bytes at 1 byte/ns.
        assert_eq!(topology.alone(loads), 400);
    }

    #[test]
    fn through_the_node_fewer_messages_cross() {
        let messages = Link { message_us: 1.0, ..link(2) };
        let topology = Topology::new(messages, 4).unwrap();
        let [direct] = &topology.all_to_all(&[100; 16], Route::Direct)[..] else { panic!("one stage") };
        // 4 messages of 100 bytes leave each node, or 2 of 200 bytes; a message costs as much as 1000 bytes.
        assert!(direct.contains(&Load { port: Port::NodeOut(0), bytes: 4400.0 }));
        let [inside, between] = &topology.all_to_all(&[100; 16], Route::ThroughNode)[..] else { panic!("two stages") };
        assert!(between.contains(&Load { port: Port::NodeOut(1), bytes: 2400.0 }));
        // A rank gives its neighbour what is for it, and what it is to pass on.
        assert!(inside.contains(&Load { port: Port::RankOut(0), bytes: 200.0 }));
        // Without several ranks in a node there is one way.
        let flat = Topology::new(Link { nodes: 4, ..messages }, 4).unwrap();
        assert_eq!(flat.all_to_all(&[7; 16], Route::ThroughNode), flat.all_to_all(&[7; 16], Route::Direct));
    }

    #[test]
    fn a_ring_crosses_each_node_boundary_once() {
        let topology = Topology::new(link(2), 4).unwrap();
        let loads = topology.all_reduce(&[0, 1, 2, 3], 1000);
        assert!(loads.contains(&Load { port: Port::NodeOut(1), bytes: 1500.0 }));
        assert_eq!(topology.alone(&loads), 1500);
        assert!(topology.all_reduce(&[2], 1000).is_empty());
    }

    #[test]
    fn impossible_links_say_why() {
        let error = |link| Topology::new(link, 4).unwrap_err().message;
        assert_eq!(error(link(5)), "link.nodes is 5, expected 1 to 4, the number of ranks");
        assert!(error(Link { gbps: 0.0, ..link(1) }).contains("link.gbps is 0"));
        assert!(error(Link { latency_us: f64::NAN, ..link(1) }).contains("link.latency_us"));
    }
}
