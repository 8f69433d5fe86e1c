//! Collectives for training with expert parallelism, ordered by the brain (`lina-plan`).
//!
//! A rank's compute thread owns one [`Comm`]. It announces its work, hands over all-to-alls and gradients, and
//! waits where it needs data. What launches when is decided by a [`lina_plan::Sequencer`] and carried out by one of
//! several bodies behind the same handle:
//!
//! - [`emulated`]: threads of one process on *virtual* time; real data, emulated compute rate and links;
//! - [`local`]: threads of one process at full speed, one communication thread a rank;
//! - `mpi` (with the feature of this name): a process a rank, on any MPI;
//! - `nccl` (with the feature of this name): a process a rank, on GPUs;
//! - [`Comm::solo`]: one rank, nothing to exchange.
//!
//! The crate knows nothing of models: any program can hand it buffers and gradients (see `examples/own_buffers.rs`).

mod bound;
mod buffer;
mod comm;
mod copies;
mod delay;
#[cfg(feature = "nccl")]
mod device;
mod driver;
pub mod emulated;
mod error;
mod exchange;
mod launcher;
pub mod local;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(feature = "nccl")]
pub mod nccl;
#[cfg(any(feature = "mpi", feature = "nccl"))]
mod processes;
mod recorder;
mod solo;
mod stats;
mod threaded;
mod trace;
mod transfer;
mod wire;
mod work;

pub use bound::StepBound;
pub use buffer::SharedBuffer;
pub use comm::{Comm, GradientRegion, Ticket};
pub use copies::{CopyDirection, CopyTicket, HostCopy};
pub use delay::Delays;
#[cfg(feature = "nccl")]
pub use device::DeviceClock;
pub use error::CommError;
#[cfg(feature = "nccl")]
pub use exchange::DeviceExchange;
pub use exchange::Exchange;
pub use launcher::{launched_rank, launched_ranks, launched_ranks_here};
pub use lina_plan::{AllToAllKind, Direction, GroupId, Leg, MoeShape, Nanos, WeightGradients};
pub use stats::StepStats;
pub use trace::{Lane, Span};
pub use work::{Work, WorkKind};
