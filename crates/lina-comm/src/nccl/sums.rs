//! How gradients are summed: by NCCL's allreduce, whose order of additions depends on how they are cut, or in the order of
//! ranks by a direct reduce-scatter and all-gather of NCCL's messages.
//!
//! For the latter every member owns one even range of every piece. It collects the others' parts of it, adds them up from
//! the first member to the last, and sends the sum to all. These are as many bytes as in a ring, so that it costs little where
//! every rank has its own way into the network, and more where ranks share one.

use lina_cuda::{Buffer, CudaError, DType, Device, PartSum, Stream};
use lina_plan::share_range;

use super::library::Communicator;
use crate::device::copy_bytes;
use crate::processes::Fault;

const F32_BYTES: usize = size_of::<f32>();

/// How gradients are summed.
pub(super) enum Sums {
    /// By NCCL.
    Nccl,
    /// In the order of ranks.
    Ordered(OrderedSums),
}

impl Sums {
    /// Sums `pieces` (device address and number of f32) over the members, in place, in the order of `stream`. Where that
    /// takes two operations, `settled` waits in between until the communicator is ready.
    ///
    /// # Safety
    /// The memory must stay, touched by nobody, until the operation has run or the communicator is aborted.
    pub(super) unsafe fn enqueue(
        &mut self,
        communicator: &Communicator,
        pieces: &[(u64, usize)],
        stream: &Stream,
        settled: impl FnOnce() -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        match self {
            Sums::Nccl => communicator.group(|| {
                // SAFETY: the caller keeps the pieces.
                pieces.iter().try_for_each(|&(at, elements)| unsafe { communicator.sum(at, elements, stream.raw()) })
            }),
            // SAFETY: as above.
            Sums::Ordered(sums) => unsafe { sums.enqueue(communicator, pieces, stream, settled) },
        }
    }
}

/// What sums in the order of ranks need, on one stream.
pub(super) struct OrderedSums {
    kernel: PartSum,
    /// All members' parts of this rank's ranges, by piece, by member. Sums of one stream come one after another, so that
    /// one memory serves all.
    parts: Buffer,
}

impl OrderedSums {
    /// For sums on `stream`.
    pub(super) fn new(device: &Device, stream: &Stream) -> Result<Self, CudaError> {
        Ok(OrderedSums { kernel: PartSum::new(device)?, parts: Buffer::new(stream, 0, DType::F32)? })
    }

    /// As [`Sums::enqueue`].
    ///
    /// # Safety
    /// As there.
    unsafe fn enqueue(
        &mut self,
        communicator: &Communicator,
        pieces: &[(u64, usize)],
        stream: &Stream,
        settled: impl FnOnce() -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let (member, members) = communicator.place();
        // Address and bytes of a member's range of a piece.
        let range = |&(at, elements): &(u64, usize), member: usize| {
            let range = share_range(elements, members, member);
            (at + (range.start * F32_BYTES) as u64, range.len() * F32_BYTES)
        };
        let needed = pieces.iter().map(|&(_, elements)| members * share_range(elements, members, member).len()).sum();
        self.parts.grow(needed)?;
        let first = self.parts.whole().ptr();
        // Each piece with where its parts begin.
        let placed = || {
            pieces.iter().scan(first, |next, piece| {
                let begin = *next;
                *next += (members * range(piece, member).1) as u64;
                Some((piece, begin))
            })
        };
        for (piece, begin) in placed() {
            let (from, bytes) = range(piece, member);
            // SAFETY: this member's place among the parts, which nothing else uses in this stream before it is summed.
            unsafe { copy_bytes(stream, from, begin + (member * bytes) as u64, bytes) }?;
        }
        let collected = |to, from| {
            placed().map(move |(piece, begin)| {
                let mine = range(piece, member).1;
                [range(piece, to), (begin + (from * mine) as u64, mine)]
            })
        };
        // SAFETY: the caller keeps the pieces; the parts stay as long as this value, and those that it gives back are used
        // again only behind this in the stream.
        unsafe { communicator.exchange(stream.raw(), collected) }?;
        settled()?;
        for (piece, begin) in placed() {
            let (sum, bytes) = range(piece, member);
            let start = (begin - first) as usize / F32_BYTES;
            let parts = self.parts.slice(start..start + members * bytes / F32_BYTES);
            // SAFETY: the caller keeps the piece, of which this member's range is nobody else's.
            unsafe { self.kernel.enqueue(stream, parts, members, sum) }?;
        }
        let told = |_, from| pieces.iter().map(move |piece| [range(piece, member), range(piece, from)]);
        // SAFETY: the caller keeps the pieces; ranges of different members do not overlap.
        unsafe { communicator.exchange(stream.raw(), told) }
    }
}
