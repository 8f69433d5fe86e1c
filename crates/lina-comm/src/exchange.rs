//! The buffers of one all-to-all micro-op, lent to the communication library until the ticket is waited for.

#[cfg(feature = "nccl")]
use lina_cuda::Buffer;

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

/// The same with memory of a GPU, for engine `nccl` and for one rank on its own.
///
/// Counts and order are those of an [`Exchange`], in elements of the buffers, which are of one type. What is sent may still
/// be being computed on the rank's compute stream. What the send buffer holds afterwards is unspecified.
#[cfg(feature = "nccl")]
#[derive(Debug)]
pub struct DeviceExchange {
    /// What travels.
    pub kind: AllToAllKind,
    /// Elements to send.
    pub send: Buffer,
    /// Elements for each rank, `[ranks]`.
    pub send_elements: Vec<usize>,
    /// Elements received.
    pub recv: Buffer,
    /// Elements from each rank, `[ranks]`; must equal what that rank sends here.
    pub recv_elements: Vec<usize>,
}

/// An exchange wherever its memory is.
#[derive(Debug)]
pub(crate) enum AnyExchange {
    Host(Exchange),
    #[cfg(feature = "nccl")]
    Device(DeviceExchange),
}

impl AnyExchange {
    pub(crate) fn kind(&self) -> AllToAllKind {
        match self {
            AnyExchange::Host(exchange) => exchange.kind,
            #[cfg(feature = "nccl")]
            AnyExchange::Device(exchange) => exchange.kind,
        }
    }

    /// Elements for each rank.
    pub(crate) fn send_elements(&self) -> &[usize] {
        match self {
            AnyExchange::Host(exchange) => &exchange.send_elements,
            #[cfg(feature = "nccl")]
            AnyExchange::Device(exchange) => &exchange.send_elements,
        }
    }

    /// Bytes that leave `rank`, its own piece excluded.
    pub(crate) fn sent_bytes(&self, rank: usize) -> u64 {
        let elements = self.send_elements();
        ((elements.iter().sum::<usize>() - elements[rank]) * self.element_bytes()) as u64
    }

    fn element_bytes(&self) -> usize {
        match self {
            AnyExchange::Host(_) => size_of::<f32>(),
            #[cfg(feature = "nccl")]
            AnyExchange::Device(exchange) => exchange.send.dtype().bytes(),
        }
    }

    /// The exchange of an engine that moves host memory only.
    ///
    /// # Panics
    /// If its memory is a device's.
    pub(crate) fn into_host(self) -> Exchange {
        match self {
            AnyExchange::Host(exchange) => exchange,
            #[cfg(feature = "nccl")]
            AnyExchange::Device(exchange) => {
                panic!("{} on device memory, which this engine does not move", exchange.kind)
            }
        }
    }

    /// Panics where counts and buffers contradict each other: a bug of the caller, not an input error.
    pub(crate) fn check(&self, ranks: usize) {
        let (send_elements, send, recv_elements, recv) = match self {
            AnyExchange::Host(Exchange { send, send_elements, recv, recv_elements, .. }) => {
                (send_elements, send.len(), recv_elements, recv.len())
            }
            #[cfg(feature = "nccl")]
            AnyExchange::Device(DeviceExchange { send, send_elements, recv, recv_elements, .. }) => {
                assert_eq!(send.dtype(), recv.dtype(), "what is received is what is sent");
                (send_elements, send.len(), recv_elements, recv.len())
            }
        };
        assert_eq!(send_elements.len(), ranks, "an exchange sends to every rank, if only nothing");
        assert_eq!(recv_elements.len(), ranks, "an exchange receives from every rank, if only nothing");
        assert!(send_elements.iter().sum::<usize>() <= send, "send buffer is too short");
        assert!(recv_elements.iter().sum::<usize>() <= recv, "receive buffer is too short");
    }
}
