//! Virtual time and links: what a network of given rates does with collectives.
//!
//! Under the emulated cluster and the simulator. Pure: no threads, no clock, no data. A collective loads the ports
//! it crosses ([`Topology::all_to_all`], [`Topology::all_reduce`]); collectives in flight on one port share it
//! equally ([`Network`]), which is what makes an allreduce slow an all-to-all down.

mod network;
mod topology;

pub use network::{FlowId, Network};
pub use topology::{Link, Load, Port, Topology, TopologyError};
