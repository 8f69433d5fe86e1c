//! Collectives of the emulated cluster, matched across ranks and put on virtual links.
//!
//! Each class of operation is a channel: a rank's operations of one class run one after another in launch order, as
//! on a stream of their own. A collective begins when all its members have launched it and it heads the channel of
//! each; after its launch overhead and latency its bytes flow.

use std::collections::{BTreeMap, VecDeque};

use lina_net::{FlowId, Load, Network, Topology};
use lina_plan::{Nanos, Route};

/// A channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Channel {
    AllToAll,
    AllReduce,
    Control,
}

/// Number of channels.
pub(crate) const CHANNELS: usize = 3;

impl Channel {
    /// What a rank waits for, in messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Channel::AllToAll => "an all-to-all",
            Channel::AllReduce => "an allreduce",
            Channel::Control => "the step's closing sum",
        }
    }
}

/// A collective: the `sequence`-th of its channel. Every rank counts every one, member or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct CollectiveId {
    pub(crate) channel: Channel,
    pub(crate) sequence: u64,
}

/// What a launching rank says of a collective.
pub(crate) enum Shape<'a> {
    /// Bytes to each rank, and the way that they go.
    AllToAll { bytes_to: &'a [u64], route: Route },
    /// Bytes to reduce among `members`.
    AllReduce { members: &'a [usize], bytes: u64 },
}

/// A collective that is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Completion {
    pub(crate) id: CollectiveId,
    /// When all members had launched it and it headed their channels.
    pub(crate) begin: Nanos,
    pub(crate) end: Nanos,
    /// What it takes with nothing else on the wire, overheads included.
    pub(crate) alone: Nanos,
}

#[derive(Debug)]
struct Collective {
    members: Vec<usize>,
    launched: Vec<bool>,
    /// Row s: bytes that rank s sends to each rank (all-to-all).
    matrix: Vec<u64>,
    route: Route,
    reduced_bytes: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    Gathering,
    /// Its launch or a message round passes; then the first of `stages` flows.
    Overhead {
        begin: Nanos,
        flow_at: Nanos,
        alone: Nanos,
        stages: VecDeque<Vec<Load>>,
    },
    /// A stage's bytes flow, the rest is to follow.
    Flowing {
        begin: Nanos,
        alone: Nanos,
        stages: VecDeque<Vec<Load>>,
    },
}

#[derive(Debug)]
pub(crate) struct Wire {
    network: Network,
    collectives: BTreeMap<CollectiveId, Collective>,
    /// Of each rank and channel, the collectives in which it takes part, oldest first.
    queues: Vec<[VecDeque<CollectiveId>; CHANNELS]>,
    /// Of each rank and channel, how many it has launched.
    launched: Vec<[u64; CHANNELS]>,
    flows: BTreeMap<FlowId, CollectiveId>,
    next_flow: FlowId,
}

impl Wire {
    pub(crate) fn new(topology: &Topology) -> Self {
        let ranks = topology.ranks();
        Wire {
            network: Network::new(topology),
            collectives: BTreeMap::new(),
            queues: (0..ranks).map(|_| Default::default()).collect(),
            launched: vec![[0; CHANNELS]; ranks],
            flows: BTreeMap::new(),
            next_flow: 0,
        }
    }

    pub(crate) fn topology(&self) -> &Topology {
        self.network.topology()
    }

    /// Bytes over rate of the busiest port, of everything since the last call.
    pub(crate) fn take_busiest_port(&mut self) -> f64 {
        self.network.take_busiest_port()
    }

    /// `rank` launches its next operation on `channel`. A rank outside the members only counts it.
    pub(crate) fn launch(&mut self, now: Nanos, rank: usize, channel: Channel, shape: Shape<'_>) -> CollectiveId {
        let ranks = self.launched.len();
        let id = CollectiveId { channel, sequence: self.launched[rank][channel as usize] };
        self.launched[rank][channel as usize] += 1;
        if let Shape::AllReduce { members, .. } = shape
            && !members.contains(&rank)
        {
            return id;
        }
        let collective = self.collectives.entry(id).or_insert_with(|| {
            let (members, matrix, route) = match shape {
                Shape::AllToAll { route, .. } => ((0..ranks).collect(), vec![0; ranks * ranks], route),
                Shape::AllReduce { members, .. } => (members.to_vec(), Vec::new(), Route::Direct),
            };
            let launched = vec![false; ranks];
            Collective { members, launched, matrix, route, reduced_bytes: 0, state: State::Gathering }
        });
        collective.launched[rank] = true;
        match shape {
            Shape::AllToAll { bytes_to, .. } => {
                collective.matrix[rank * ranks..(rank + 1) * ranks].copy_from_slice(bytes_to);
            }
            Shape::AllReduce { bytes, .. } => {
                collective.reduced_bytes = bytes;
            }
        }
        self.queues[rank][channel as usize].push_back(id);
        self.begin_if_ready(now, id);
        id
    }

    /// When something changes on the wire, if nothing is launched before.
    pub(crate) fn next_event(&self) -> Option<Nanos> {
        let overheads = self.collectives.values().filter_map(|collective| match collective.state {
            State::Overhead { flow_at, .. } => Some(flow_at),
            _ => None,
        });
        overheads.chain(self.network.next_completion()).min()
    }

    /// Runs until `now`, at most [`next_event`](Self::next_event), and appends what completes then.
    pub(crate) fn advance(&mut self, now: Nanos, completions: &mut Vec<Completion>) {
        for flow in self.network.advance(now) {
            let id = self.flows.remove(&flow).expect("every flow belongs to a collective");
            let latency = self.network.topology().latency(1);
            let collective = self.collectives.get_mut(&id).expect("a flowing collective exists");
            let State::Flowing { begin, alone, stages } = &mut collective.state else { unreachable!("it was flowing") };
            let (begin, alone, stages) = (*begin, *alone, std::mem::take(stages));
            if !stages.is_empty() {
                collective.state = State::Overhead { begin, flow_at: now + latency, alone, stages };
                continue;
            }
            let collective = self.collectives.remove(&id).expect("it was just there");
            completions.push(Completion { id, begin, end: now, alone });
            for &member in &collective.members {
                let queue = &mut self.queues[member][id.channel as usize];
                debug_assert_eq!(queue.front(), Some(&id));
                queue.pop_front();
            }
            for &member in &collective.members {
                if let Some(&next) = self.queues[member][id.channel as usize].front() {
                    self.begin_if_ready(now, next);
                }
            }
        }
        let Wire { collectives, network, flows, next_flow, .. } = self;
        for (&id, collective) in collectives {
            if let State::Overhead { begin, flow_at, alone, stages } = &mut collective.state
                && *flow_at <= now
            {
                network.start(now, *next_flow, stages.pop_front().unwrap_or_default());
                flows.insert(*next_flow, id);
                *next_flow += 1;
                collective.state = State::Flowing { begin: *begin, alone: *alone, stages: std::mem::take(stages) };
            }
        }
    }

    fn begin_if_ready(&mut self, now: Nanos, id: CollectiveId) {
        let topology = self.network.topology();
        let Some(collective) = self.collectives.get_mut(&id) else { return };
        let ready = collective.members.iter().all(|&member| {
            collective.launched[member] && self.queues[member][id.channel as usize].front() == Some(&id)
        });
        if !ready || !matches!(collective.state, State::Gathering) {
            return;
        }
        let (stages, rounds) = match id.channel {
            Channel::AllToAll => (topology.all_to_all(&collective.matrix, collective.route), 1),
            Channel::AllReduce | Channel::Control => {
                (vec![topology.all_reduce(&collective.members, collective.reduced_bytes)], 2)
            }
        };
        let (launch, latency) = (topology.launch(), topology.latency(rounds));
        let flowing: Nanos = stages.iter().map(|loads| latency + topology.alone(loads)).sum();
        let (flow_at, alone) = (now + launch + latency, launch + flowing);
        collective.state = State::Overhead { begin: now, flow_at, alone, stages: stages.into() };
    }
}
