//! Collectives in flight as fluid flows: each port divides its rate equally among the collectives that still have
//! bytes to move through it. A collective is complete when it has nothing left at any port.

use std::collections::BTreeMap;

use lina_plan::Nanos;

use crate::topology::{Load, Port, Topology};

/// Names a collective in flight.
pub type FlowId = u64;

/// Bytes below this are rounding noise: a thousandth of a byte.
const NOTHING_BYTES: f64 = 1e-3;

#[derive(Clone, Debug)]
struct Flow {
    id: FlowId,
    loads: Vec<Load>,
}

/// The state of all links at one moment of virtual time.
///
/// ```
/// use lina_net::*;
/// use lina_plan::Route;
/// let link = Link { gbps: 8.0, latency_us: 0.0, launch_us: 0.0, message_us: 0.0, nodes: 2, inner_gbps: 8.0 };
/// let topology = Topology::new(link, 2).unwrap();
/// let mut network = Network::new(&topology);
/// network.start(0, 1, topology.all_reduce(&[0, 1], 1000)); // 1000 ns alone, at 1 byte/ns
/// network.start(0, 2, topology.all_to_all(&[0, 1000, 1000, 0], Route::Direct).remove(0)); // 1000 ns alone
/// assert_eq!(network.next_completion(), Some(2000)); // together they take twice as long
/// ```
#[derive(Clone, Debug)]
pub struct Network {
    topology: Topology,
    now: Nanos,
    flows: Vec<Flow>,
    /// Number of flows at each port, rebuilt when flows change.
    sharing: BTreeMap<Port, usize>,
    /// Bytes of the flows begun, by port.
    carried: BTreeMap<Port, f64>,
}

impl Network {
    /// An idle network.
    pub fn new(topology: &Topology) -> Self {
        Network {
            topology: topology.clone(),
            now: 0,
            flows: Vec::new(),
            sharing: BTreeMap::new(),
            carried: BTreeMap::new(),
        }
    }

    /// The ranks and links.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// A collective's bytes begin to flow at `now`, which is not before the last time given, nor after the next
    /// completion.
    pub fn start(&mut self, now: Nanos, id: FlowId, loads: Vec<Load>) {
        self.drain(now);
        for load in &loads {
            *self.carried.entry(load.port).or_default() += load.bytes;
        }
        self.flows.push(Flow { id, loads });
        self.share();
    }

    /// When the next collective completes or frees a port, if nothing else starts before.
    pub fn next_completion(&self) -> Option<Nanos> {
        let flow_time = |flow: &Flow| {
            flow.loads.iter().map(|load| self.now + (load.bytes / self.rate(load.port)).ceil() as Nanos).min()
        };
        self.flows.iter().map(|flow| flow_time(flow).unwrap_or(self.now)).min()
    }

    /// Lets the bytes flow until `now` and returns the collectives that are complete by then, oldest first. `now` is
    /// at most [`next_completion`](Self::next_completion).
    pub fn advance(&mut self, now: Nanos) -> Vec<FlowId> {
        self.drain(now);
        let done = self.flows.extract_if(.., |flow| flow.loads.is_empty()).map(|flow| flow.id).collect();
        self.share();
        done
    }

    /// Bytes over rate of the busiest port, in nanoseconds, of all flows begun since the last call: what no schedule
    /// can beat.
    pub fn take_busiest_port(&mut self) -> f64 {
        let busy = |(&port, bytes): (&Port, &f64)| bytes / self.topology.rate(port);
        let busiest = self.carried.iter().map(busy).fold(0.0, f64::max);
        self.carried.clear();
        busiest
    }

    fn rate(&self, port: Port) -> f64 {
        self.topology.rate(port) / self.sharing[&port] as f64
    }

    fn drain(&mut self, now: Nanos) {
        debug_assert!(now >= self.now, "virtual time runs forward");
        let elapsed = (now - self.now) as f64;
        let Network { flows, sharing, topology, .. } = self;
        for flow in flows {
            flow.loads.retain_mut(|load| {
                load.bytes -= elapsed * topology.rate(load.port) / sharing[&load.port] as f64;
                load.bytes > NOTHING_BYTES
            });
        }
        self.now = now;
    }

    fn share(&mut self) {
        self.sharing.clear();
        for load in self.flows.iter().flat_map(|flow| &flow.loads) {
            *self.sharing.entry(load.port).or_default() += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Link;
    use lina_plan::Route;
    use proptest::prelude::*;

    fn run(network: &mut Network) -> Vec<(Nanos, FlowId)> {
        let mut completions = Vec::new();
        while let Some(at) = network.next_completion() {
            completions.extend(network.advance(at).into_iter().map(|id| (at, id)));
        }
        completions
    }

    fn four_ranks() -> Topology {
        Topology::new(
            Link { gbps: 8.0, latency_us: 0.0, launch_us: 0.0, message_us: 0.0, nodes: 4, inner_gbps: 8.0 },
            4,
        )
        .unwrap()
    }

    #[test]
    fn an_all_to_all_beside_an_allreduce_takes_twice_as_long() {
        let topology = four_ranks();
        let mut network = Network::new(&topology);
        network.start(0, 1, topology.all_reduce(&[0, 1, 2, 3], 20_000)); // 30 us alone
        network.start(10_000, 2, topology.all_to_all(&[1000; 16], Route::Direct).remove(0)); // 3 us alone
        assert_eq!(run(&mut network), [(16_000, 2), (33_000, 1)]);
    }

    #[test]
    fn groups_on_different_ranks_do_not_meet() {
        let topology = four_ranks();
        let mut network = Network::new(&topology);
        network.start(0, 1, topology.all_reduce(&[0, 1], 1000));
        network.start(0, 2, topology.all_reduce(&[2, 3], 1000));
        assert_eq!(run(&mut network), [(1000, 1), (1000, 2)]);
    }

    #[test]
    fn an_empty_collective_completes_at_once() {
        let topology = four_ranks();
        let mut network = Network::new(&topology);
        network.start(5, 1, topology.all_to_all(&[0; 16], Route::Direct).remove(0));
        assert_eq!(run(&mut network), [(5, 1)]);
    }

    proptest! {
        /// A busy port never idles: the last completion is the busiest port's bytes over its rate, if all start at once.
        #[test]
        fn work_is_conserved(sizes in prop::collection::vec(prop::collection::vec(0u64..10_000, 16), 1..6)) {
            let topology = four_ranks();
            let mut network = Network::new(&topology);
            for (id, bytes) in sizes.iter().enumerate() {
                network.start(0, id as FlowId, topology.all_to_all(bytes, Route::Direct).remove(0));
            }
            let bound = network.take_busiest_port();
            let last = run(&mut network).last().unwrap().0 as f64;
            // Each step of the fluid rounds its end up to a whole nanosecond.
            prop_assert!(last >= bound - 1.0 && last <= bound + 100.0, "{last} against {bound}");
        }
    }
}
