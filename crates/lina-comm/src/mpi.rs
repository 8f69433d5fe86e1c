//! The engine on MPI: one process a rank, started by `mpirun` or `srun`.
//!
//! The communication thread initialises MPI, owns every handle and finalises it (`handles`). Collectives are made of
//! nonblocking messages in place: all-to-alls (`exchange`, `relay`) and direct reduce-scatters with all-gathers (`reduction`),
//! summed in rank order, so that results are those of [`local`](crate::local) to the bit. Each class of operation has a
//! communicator of its own, allreduces one for each group. How ranks meet, how MPI is kept moving without taking a core
//! from the computation, and what finds ranks that have died or fallen silent is in `processes`.

mod engine;
mod exchange;
mod handles;
mod reduction;
mod relay;
mod start;

use std::io;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use lina_plan::{Launch, PolicyRules};
use thiserror::Error;

use crate::Comm;
use crate::delay::Delays;
use crate::threaded::{Mailbox, ThreadConfig, ThreadedPort, communicate};
use engine::MpiEngine;
use start::Started;

pub use crate::processes::LastWords;

/// What an MPI job is made of.
#[derive(Clone, Debug)]
pub struct MpiConfig {
    /// Number of ranks that the job is laid out for.
    pub ranks: usize,
    /// Number of nodes, which ranks fill in order, evenly.
    pub nodes: usize,
    /// Members of each reduction group, ascending; group 0 is all ranks.
    pub groups: Vec<Vec<usize>>,
    /// How long the others wait for a rank before the job ends.
    pub timeout: Duration,
    /// Text that must be the same on all ranks: version and configuration, a key a line.
    pub identity: String,
    /// Rate of an emulated device, in GFLOP/s: announced work lasts at least its operations over this rate.
    pub device_gflops: Option<f64>,
    /// Messages are cut to this many bytes, at most 2^31 - 1.
    pub max_message_bytes: usize,
    /// Called when the job has failed and the compute thread has not ended the rank soon after.
    pub last_words: Option<LastWords>,
    /// Random delays of every piece of work, for stress tests.
    pub delays: Option<Delays>,
    /// Whether launches are kept for [`MpiJob::launch_log`].
    pub log_launches: bool,
}

impl MpiConfig {
    /// Largest message, in bytes: well below what MPI can count, large enough not to matter.
    pub const MAX_MESSAGE_BYTES: usize = 1 << 30;
}

/// Why an MPI job did not start.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum MpiStartError {
    /// MPI, a thread or a connection does not work.
    #[error("engine mpi cannot start: {0}")]
    Broken(String),
    /// The launcher started another number of ranks.
    #[error(
        "MPI started {found} rank(s), expected {expected}, the number that the job is laid out for, as \
         `mpirun -np {expected}` does"
    )]
    OtherRanks {
        /// Number that MPI started.
        found: usize,
        /// Number that was asked for.
        expected: usize,
    },
    /// A rank brings another version or configuration than rank 0.
    #[error("rank {rank} differs from rank 0: {difference}")]
    Differs {
        /// The first rank that does.
        rank: usize,
        /// What it found and what rank 0 has.
        difference: String,
    },
}

/// This process's rank of an MPI job.
pub struct MpiJob {
    mailbox: Arc<Mailbox>,
}

impl MpiJob {
    /// Starts MPI on a communication thread, meets the other ranks and returns this rank's handle, under `rules`. Once
    /// in a process; MPI is finalised when the handle is dropped, which waits for the other ranks to come as far.
    ///
    /// # Errors
    /// The same on all ranks where the ranks do not fit together.
    pub fn start(config: MpiConfig, rules: PolicyRules) -> Result<(MpiJob, Comm), MpiStartError> {
        let broken = |e: io::Error| MpiStartError::Broken(format!("a thread cannot be started: {e}"));
        let mailbox = Arc::new(Mailbox::new());
        let epoch = Instant::now();
        let (report, started) = mpsc::channel();
        let MpiConfig { ranks, delays, device_gflops, .. } = config;
        let groups = Arc::new(config.groups.clone());
        let (mail, members) = (Arc::clone(&mailbox), Arc::clone(&groups));
        let thread = std::thread::Builder::new().name("lina-comm".to_owned()).spawn(move || {
            let log_launches = config.log_launches;
            let (engine, rank) = match Started::new(&config, epoch, Arc::clone(&mail)) {
                Ok(started) => {
                    let rank = started.rank;
                    // The receiver waits for exactly this.
                    let _ = report.send(Ok(rank));
                    (MpiEngine::new(started, &config, Arc::clone(&members), epoch), rank)
                }
                Err(error) => {
                    let _ = report.send(Err(error));
                    return;
                }
            };
            communicate(ThreadConfig { rank, epoch, groups: members, log_launches, delays }, mail, engine);
        });
        let thread = thread.map_err(broken)?;
        let ended = |_| MpiStartError::Broken("its communication thread panicked".to_owned());
        let rank = started.recv().map_err(ended)??;
        let port = ThreadedPort::new(Arc::clone(&mailbox), thread, rank, epoch, delays).on_device(device_gflops);
        Ok((MpiJob { mailbox }, Comm::new(Box::new(port), rank, ranks, rules, &groups)))
    }

    /// Takes this rank's launches, with their step, in order.
    pub fn launch_log(&self) -> Vec<(u64, Launch)> {
        self.mailbox.take_log()
    }
}
