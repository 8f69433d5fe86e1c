//! An allreduce under way on this rank: a direct reduce-scatter and all-gather.
//!
//! Every member owns one even range of the elements. It receives the others' shares of its range into pooled buffers,
//! sums in rank order, in place, and sends the sum to all; their sums arrive in place, in a range as soon as its share
//! has left. A range that lies in several pieces of memory travels through a pooled copy.

use std::ffi::c_int;
use std::ops::Range;

use lina_plan::share_range;

use super::engine::{Label, Part};
use super::handles::{Address, Communicator, Requests};
use crate::driver::Reduction;
use crate::processes::Fault;
use crate::wire::Channel;

/// Elements summed at a time: small enough to stay in the first-level cache.
const BLOCK: usize = 2048;

/// Buffers that are used again.
#[derive(Default)]
pub(super) struct Pool(Vec<Vec<f32>>);

impl Pool {
    fn take(&mut self, elements: usize) -> Vec<f32> {
        let mut buffer = self.0.pop().unwrap_or_default();
        buffer.resize(elements, 0.0);
        buffer
    }

    fn give_back(&mut self, buffers: impl Iterator<Item = Vec<f32>>) {
        self.0.extend(buffers.filter(|buffer| buffer.capacity() > 0));
    }
}

pub(super) struct ReductionOp {
    pub(super) reduction: Reduction,
    communicator: Communicator,
    /// Place in this rank's queue.
    sequence: u64,
    /// Place among the group's allreduces.
    number: u64,
    /// This rank's and everybody's number in the group.
    member: usize,
    members: usize,
    /// The other members' shares of this member's range, and how many messages of them are to come.
    shares: Vec<Vec<f32>>,
    shares_awaited: usize,
    /// Messages of this member's shares under way, by receiver.
    shares_sending: Vec<usize>,
    /// Messages to come of each member's sum; `None` before its receive is posted.
    sums_awaited: Vec<Option<usize>>,
    sums_sending: usize,
    /// Copies of ranges that lie in several pieces: on their way out, and on their way in.
    outgoing: Vec<Vec<f32>>,
    incoming: Vec<Vec<f32>>,
    sent: bool,
    summed: bool,
}

impl ReductionOp {
    /// Takes the reduction and posts the receives of the first half.
    pub(super) fn start(
        reduction: Reduction,
        (communicator, sequence, number): (Communicator, u64, u64),
        (member, members): (usize, usize),
        pool: &mut Pool,
        requests: &mut Requests<Label>,
    ) -> Result<Self, Fault> {
        let own = share_range(reduction.elements, members, member).len();
        let share = |peer| if peer == member { Vec::new() } else { pool.take(own) };
        let mut op = ReductionOp {
            reduction,
            communicator,
            sequence,
            number,
            member,
            members,
            shares: (0..members).map(share).collect(),
            shares_awaited: 0,
            shares_sending: vec![0; members],
            sums_awaited: vec![None; members],
            sums_sending: 0,
            outgoing: vec![Vec::new(); members],
            incoming: vec![Vec::new(); members],
            sent: false,
            summed: false,
        };
        op.sums_awaited[member] = Some(0);
        for peer in op.peers() {
            let (route, label) = (op.route(peer, 0), op.label(peer, Part::First));
            // SAFETY: the buffer is not resized before the operation is done, or is leaked together with MPI.
            op.shares_awaited += unsafe { requests.receive(&mut op.shares[peer], route, label) }?;
        }
        Ok(op)
    }

    /// The other members, beginning with the next one, so that no member gets everybody's first message.
    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let (member, members) = (self.member, self.members);
        (1..members).map(move |distance| (member + distance) % members)
    }

    fn route(&self, peer: usize, half: c_int) -> Address {
        Address { communicator: self.communicator, peer, tag: (self.number % (1 << 13)) as c_int * 2 + half }
    }

    fn label(&self, peer: usize, part: Part) -> Label {
        Label { channel: Channel::AllReduce, sequence: self.sequence, peer, part }
    }

    fn range(&self, member: usize) -> Range<usize> {
        share_range(self.reduction.elements, self.members, member)
    }

    /// Sends every other member its share, once.
    pub(super) fn send(&mut self, pool: &mut Pool, requests: &mut Requests<Label>) -> Result<(), Fault> {
        if std::mem::replace(&mut self.sent, true) {
            return Ok(());
        }
        for peer in self.peers() {
            let messages = self.send_range(peer, self.route(peer, 0), Part::FirstSent, pool, requests)?;
            self.shares_sending[peer] = messages;
            if messages == 0 {
                self.await_sum(peer, pool, requests)?;
            }
        }
        self.sum_if_ready(pool, requests)
    }

    /// Sends the elements of one member's range, as they lie or through a copy. The sum goes to every peer.
    fn send_range(
        &mut self,
        peer: usize,
        route: Address,
        part: Part,
        pool: &mut Pool,
        requests: &mut Requests<Label>,
    ) -> Result<usize, Fault> {
        let owner = if part == Part::FirstSent { peer } else { self.member };
        let range = self.range(owner);
        let label = self.label(peer, part);
        if let Some(place) = self.place(&range) {
            // SAFETY: the region is lent to this operation, which outlives the request or is leaked with MPI; until
            // then nobody writes to the range.
            return unsafe { requests.send(std::slice::from_raw_parts(place, range.len()), route, label) };
        }
        if self.outgoing[owner].is_empty() {
            let mut copy = pool.take(range.len());
            for_pieces(&mut self.reduction, range, |offset, place, len| {
                // SAFETY: within the region, which is lent to this operation; MPI writes to other ranges only.
                copy[offset..offset + len].copy_from_slice(unsafe { std::slice::from_raw_parts(place, len) });
            });
            self.outgoing[owner] = copy;
        }
        // SAFETY: the copy stays as it is until the operation is done, or is leaked with MPI.
        unsafe { requests.send(&self.outgoing[owner], route, label) }
    }

    /// Where a range lies, if in one piece.
    fn place(&mut self, range: &Range<usize>) -> Option<*mut f32> {
        let mut found = None;
        for_pieces(&mut self.reduction, range.clone(), |_, place, len| {
            if len == range.len() {
                found = Some(place);
            }
        });
        found
    }

    /// The share of `peer`'s range has left: its sum may come.
    fn await_sum(&mut self, peer: usize, pool: &mut Pool, requests: &mut Requests<Label>) -> Result<(), Fault> {
        let range = self.range(peer);
        let (route, label) = (self.route(peer, 1), self.label(peer, Part::Second));
        let messages = if range.is_empty() {
            0
        } else if let Some(place) = self.place(&range) {
            // SAFETY: the region is lent to this operation, which outlives the request or is leaked with MPI, and
            // nothing reads or writes this range before the request is done.
            unsafe { requests.receive(std::slice::from_raw_parts_mut(place, range.len()), route, label) }?
        } else {
            self.incoming[peer] = pool.take(range.len());
            // SAFETY: the buffer is not touched before the request is done, or is leaked with MPI.
            unsafe { requests.receive(&mut self.incoming[peer], route, label) }?
        };
        self.sums_awaited[peer] = Some(messages);
        Ok(())
    }

    /// A request is done.
    pub(super) fn done(
        &mut self,
        peer: usize,
        part: Part,
        pool: &mut Pool,
        requests: &mut Requests<Label>,
    ) -> Result<(), Fault> {
        match part {
            Part::First => self.shares_awaited -= 1,
            Part::FirstSent => {
                self.shares_sending[peer] -= 1;
                if self.shares_sending[peer] == 0 {
                    self.await_sum(peer, pool, requests)?;
                }
            }
            Part::Second => {
                let left = self.sums_awaited[peer].as_mut().expect("a sum arrives after its receive was posted");
                *left -= 1;
                if *left == 0 && !self.incoming[peer].is_empty() {
                    let (range, from) = (self.range(peer), std::mem::take(&mut self.incoming[peer]));
                    for_pieces(&mut self.reduction, range, |offset, place, len| {
                        // SAFETY: within the region, which is lent to this operation; no request uses this range.
                        let to = unsafe { std::slice::from_raw_parts_mut(place, len) };
                        to.copy_from_slice(&from[offset..offset + len]);
                    });
                    pool.give_back(std::iter::once(from));
                }
            }
            Part::SecondSent => self.sums_sending -= 1,
            Part::Transit => unreachable!("allreduces pass nothing on"),
        }
        self.sum_if_ready(pool, requests)
    }

    /// Sums this member's range in rank order and sends it to everybody, once all shares are there.
    fn sum_if_ready(&mut self, pool: &mut Pool, requests: &mut Requests<Label>) -> Result<(), Fault> {
        if self.summed || !self.sent || self.shares_awaited > 0 {
            return Ok(());
        }
        self.summed = true;
        let (range, member, shares) = (self.range(self.member), self.member, &self.shares);
        for_pieces(&mut self.reduction, range, |offset, place, len| {
            // SAFETY: within the region, which is lent to this operation; no request uses this range.
            let own = unsafe { std::slice::from_raw_parts_mut(place, len) };
            sum_in_rank_order(own, member, shares, offset);
        });
        pool.give_back(self.shares.iter_mut().map(std::mem::take));
        for peer in self.peers() {
            self.sums_sending += self.send_range(peer, self.route(peer, 1), Part::SecondSent, pool, requests)?;
        }
        Ok(())
    }

    /// Whether all shares have been handed to the network.
    pub(super) fn has_sent(&self) -> bool {
        self.sent && self.shares_sending.iter().all(|&messages| messages == 0)
    }

    pub(super) fn is_done(&self) -> bool {
        self.has_sent()
            && self.summed
            && self.sums_sending == 0
            && self.sums_awaited.iter().all(|messages| *messages == Some(0))
    }

    /// Ends the operation.
    pub(super) fn finish(mut self, pool: &mut Pool) -> Reduction {
        pool.give_back(self.outgoing.drain(..));
        self.reduction
    }
}

/// Calls `visit` with the places that make up elements `range`, in order: offset in it, address, elements.
fn for_pieces(reduction: &mut Reduction, range: Range<usize>, mut visit: impl FnMut(usize, *mut f32, usize)) {
    let mut base = 0;
    for piece in &mut reduction.pieces {
        let end = base + piece.len();
        let (from, to) = (range.start.clamp(base, end), range.end.clamp(base, end));
        if from < to {
            visit(from - range.start, piece.address(from - base), to - from);
        }
        base = end;
    }
}

/// Sums `own`, the part of member `member`, and the others' shares from `offset` on, member by member from 0.
fn sum_in_rank_order(own: &mut [f32], member: usize, shares: &[Vec<f32>], offset: usize) {
    let mut sum = [0.0f32; BLOCK];
    for (number, own) in own.chunks_mut(BLOCK).enumerate() {
        let sum = &mut sum[..own.len()];
        let start = offset + number * BLOCK;
        for (i, share) in shares.iter().enumerate() {
            let part = if i == member { &*own } else { &share[start..start + own.len()] };
            if i == 0 {
                sum.copy_from_slice(part);
            } else {
                sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
            }
        }
        own.copy_from_slice(sum);
    }
}
