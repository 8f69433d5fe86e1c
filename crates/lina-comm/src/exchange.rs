//! The buffers of one all-to-all micro-op, lent to the communication library until the ticket is waited for.

use crate::AllToAllKind;

/// One rank's part of an all-to-all with unequal splits.
///
/// `send` holds the pieces for rank 0, 1, ... one after another, `recv` the pieces from rank 0, 1, ...; empty pieces
/// are ordinary. All ranks submit their all-to-alls in the same order. Lengths beyond the sums of the counts are
/// allowed, so that buffers can be reused at their high-water mark.
#[derive(Debug)]
pub struct Exchange {
    /// What travels.
    pub kind: AllToAllKind,
    /// Elements to send.
    pub send: Vec<f32>,
    /// Elements for each rank, `[ranks]`.
    pub send_elements: Vec<usize>,
    /// Elements received.
    pub recv: Vec<f32>,
    /// Elements from each rank, `[ranks]`; must equal what that rank sends here.
    pub recv_elements: Vec<usize>,
}

impl Exchange {
    /// Bytes that leave `rank`, its own piece excluded.
    pub(crate) fn sent_bytes(&self, rank: usize) -> u64 {
        let elements: usize = self.send_elements.iter().enumerate().filter(|&(r, _)| r != rank).map(|(_, n)| n).sum();
        (elements * size_of::<f32>()) as u64
    }

    /// Panics where counts and buffers contradict each other: a bug of the caller, not an input error.
    pub(crate) fn check(&self, ranks: usize) {
        assert_eq!(self.send_elements.len(), ranks, "an exchange sends to every rank, if only nothing");
        assert_eq!(self.recv_elements.len(), ranks, "an exchange receives from every rank, if only nothing");
        assert!(self.send_elements.iter().sum::<usize>() <= self.send.len(), "send buffer is too short");
        assert!(self.recv_elements.iter().sum::<usize>() <= self.recv.len(), "receive buffer is too short");
    }
}
