//! Carries a rank's submissions to the brain and its decisions to an engine. Used by every body; has no thread and
//! no clock of its own.

use std::collections::VecDeque;

use lina_plan::{GroupId, Launch, Nanos, Route, Sequencer};

use crate::buffer::Region;
use crate::comm::Submission;
use crate::exchange::AnyExchange;
use crate::wire::Channel;

/// An operation that the engine is to start now. Operations of one class complete in the order of their launch.
#[derive(Debug)]
pub(crate) enum Operation {
    AllToAll { index: u32, exchange: AnyExchange, route: Route },
    AllReduce(Reduction),
    Control(Vec<f64>),
}

impl Operation {
    pub(crate) fn channel(&self) -> Channel {
        match self {
            Operation::AllToAll { .. } => Channel::AllToAll,
            Operation::AllReduce(_) => Channel::AllReduce,
            Operation::Control(_) => Channel::Control,
        }
    }
}

/// An allreduce micro-op: one sum over a group, of pieces that lie where they are.
#[derive(Debug)]
pub(crate) struct Reduction {
    pub(crate) index: u32,
    pub(crate) group: GroupId,
    pub(crate) elements: usize,
    /// The memory to reduce in place, in stream order; empty on ranks outside the group.
    pub(crate) pieces: Vec<Region>,
}

impl Reduction {
    /// Cuts the first `elements` off.
    pub(crate) fn split_front(&mut self, mut elements: usize) -> Reduction {
        let mut front = Reduction { index: self.index, group: self.group, elements, pieces: Vec::new() };
        self.elements -= elements;
        while elements > 0 {
            let piece = &mut self.pieces[0];
            let taken = elements.min(piece.len());
            elements -= taken;
            front.pieces.push(piece.split_front(taken));
            if piece.len() == 0 {
                self.pieces.remove(0);
            }
        }
        front
    }

    /// Appends what was cut off behind it.
    pub(crate) fn append(&mut self, next: Reduction) {
        self.elements += next.elements;
        for piece in next.pieces {
            append_piece(&mut self.pieces, piece);
        }
    }
}

/// Appends a piece, joined to the last one where it follows it in memory.
fn append_piece(pieces: &mut Vec<Region>, piece: Region) {
    let stranger = match pieces.last_mut() {
        Some(last) => last.join(piece).err(),
        None => Some(piece),
    };
    pieces.extend(stranger);
}

/// A gradient handed over and not yet launched, in stream order of its group.
#[derive(Debug)]
struct Pending {
    elements: usize,
    region: Option<Region>,
}

#[derive(Debug, Default)]
pub(crate) struct Driver {
    sequencer: Sequencer,
    exchanges: VecDeque<AnyExchange>,
    gradients: Vec<VecDeque<Pending>>,
    control: Option<Vec<f64>>,
    step: u64,
    log: Option<Vec<(u64, Launch)>>,
}

impl Driver {
    /// Keeps every launch for [`take_log`](Self::take_log), to compare across ranks.
    pub(crate) fn log_launches(&mut self) {
        self.log = Some(Vec::new());
    }

    pub(crate) fn take_log(&mut self) -> Vec<(u64, Launch)> {
        self.log.as_mut().map(std::mem::take).unwrap_or_default()
    }

    pub(crate) fn submit(&mut self, now: Nanos, submission: Submission) {
        match submission {
            Submission::BeginStep { step, rules, plan } => {
                self.step = step;
                self.sequencer.begin_step(now, rules, plan);
            }
            Submission::BeginMicroBatch { last } => self.sequencer.begin_micro_batch(last),
            Submission::AllToAll(exchange) => {
                self.sequencer.all_to_all_submitted(now, &exchange.kind());
                self.exchanges.push_back(exchange);
            }
            Submission::Gradient { group, elements, region } => {
                if elements > 0 && self.sequencer.reduces() {
                    let slot = group.0 as usize;
                    if self.gradients.len() <= slot {
                        self.gradients.resize_with(slot + 1, VecDeque::new);
                    }
                    self.gradients[slot].push_back(Pending { elements, region });
                    self.sequencer.gradient_ready(now, group, elements);
                }
            }
            Submission::Flush => self.sequencer.flush(now),
            Submission::Control(values) => self.control = Some(values),
            Submission::Groups(_) => unreachable!("the body takes groups itself"),
        }
    }

    pub(crate) fn all_to_all_done(&mut self, now: Nanos) {
        self.sequencer.all_to_all_done(now);
    }

    pub(crate) fn all_reduce_done(&mut self, now: Nanos, index: u32, member: bool) {
        self.sequencer.all_reduce_done(now, index, member);
    }

    pub(crate) fn gradients_finished(&self) -> bool {
        self.sequencer.gradients_finished()
    }

    pub(crate) fn timings(&self) -> lina_plan::GapTimings {
        self.sequencer.timings()
    }

    /// The next operation to start, in order.
    pub(crate) fn next_operation(&mut self) -> Option<Operation> {
        let Some(launch) = self.sequencer.next_launch() else {
            return self.control.take().map(Operation::Control);
        };
        if let Some(log) = &mut self.log {
            log.push((self.step, launch));
        }
        Some(match launch {
            Launch::AllToAll { index } => {
                let exchange = self.exchanges.pop_front().expect("launched once for each submission");
                Operation::AllToAll { index, exchange, route: self.sequencer.route() }
            }
            Launch::AllReduce { index, op } => {
                let pieces = self.take_pieces(op.group, op.elements);
                Operation::AllReduce(Reduction { index, group: op.group, elements: op.elements, pieces })
            }
        })
    }

    /// The next `elements` of a group's gradient stream.
    fn take_pieces(&mut self, group: GroupId, mut elements: usize) -> Vec<Region> {
        let stream = &mut self.gradients[group.0 as usize];
        let mut pieces: Vec<Region> = Vec::new();
        while elements > 0 {
            let front = stream.front_mut().expect("the brain launches no more than was handed over");
            let taken = elements.min(front.elements);
            front.elements -= taken;
            elements -= taken;
            if let Some(region) = &mut front.region {
                append_piece(&mut pieces, region.split_front(taken));
            }
            if front.elements == 0 {
                stream.pop_front();
            }
        }
        pieces
    }
}
