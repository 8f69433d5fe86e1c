//! The engine on NCCL: one process a rank, each with a GPU.
//!
//! Ranks learn from their launcher which they are (`launcher`), meet over TCP (`star`, `start`) and watch each other as
//! those of engine `mpi` do (`processes`). NCCL's library is loaded when the engine starts (`library`), so a build needs
//! none. Each class of operation has a stream of its own, ahead of the computation's, and communicators of its own:
//! all-to-alls, closing sums, and allreduces one for each set of ranks. What is the host's, devices read and write in
//! page-locked memory.
//!
//! The communication thread launches operations in the order in which the brain decides, which is the same on all ranks, and
//! only what has its data (see `threaded`). An all-to-all of device memory goes back to the compute thread as soon as it is
//! launched, with the event behind it, for which the compute stream waits. So devices wait only for what all ranks launch in
//! one order, never for each other in a circle.
//!
//! What is different from the other engines:
//! - With the data of an all-to-all travels the time at which each rank launched it, so that waiting for a late rank is not
//!   counted as time on the wire. Allreduces and closing sums count from their launch on this rank, as on MPI.
//! - NCCL's sums have a fixed order for given ranks and sizes, so that runs repeat to the bit. But how a gradient is cut into
//!   micro-operations may change the last bits: between policies, results are the same up to rounding, or to the bit with
//!   [`NcclConfig::ordered_sums`] (`sums`).
//! - [`Route::ThroughNode`] is not offered: NCCL has ways of its own through a node.

mod engine;
mod launcher;
mod library;
mod star;
mod start;
mod sums;

use std::io;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use lina_plan::{Launch, PolicyRules, Route};
use thiserror::Error;

use crate::Comm;
use crate::delay::Delays;
use crate::threaded::{Mailbox, ThreadConfig, ThreadedPort, communicate};
use engine::NcclEngine;
use library::Nccl;
use start::Started;

pub use crate::processes::LastWords;
pub use launcher::{Launched, launched};

/// What an NCCL job is made of.
#[derive(Clone, Debug)]
pub struct NcclConfig {
    /// Number of ranks that the job is laid out for.
    pub ranks: usize,
    /// Members of each reduction group, ascending; group 0 is all ranks.
    pub groups: Vec<Vec<usize>>,
    /// Whether gradients are summed in the order of ranks, however they are cut, instead of by NCCL's allreduce.
    pub ordered_sums: bool,
    /// How long the others wait for a rank before the job ends.
    pub timeout: Duration,
    /// Text that must be the same on all ranks: version and configuration, a key a line.
    pub identity: String,
    /// Called when the job has failed and the compute thread has not ended the rank soon after.
    pub last_words: Option<LastWords>,
    /// Random delays of every piece of work, for stress tests.
    pub delays: Option<Delays>,
    /// Whether launches are kept for [`NcclJob::launch_log`].
    pub log_launches: bool,
}

/// Why an NCCL job did not start.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum NcclStartError {
    /// A driver, a library, a GPU, a thread or a connection does not work.
    #[error("engine nccl cannot start: {0}")]
    Broken(String),
    /// This process was started by itself.
    #[error(
        "engine nccl cannot start: nothing says which rank this process is, expected to be started by mpirun, srun or torchrun, \
         or with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set"
    )]
    NoLauncher,
    /// The launcher started another number of ranks.
    #[error("the launcher started {found} rank(s), expected {expected}, the number that the job is laid out for")]
    OtherRanks {
        /// Number that was started.
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
    /// The policy sends all-to-alls through nodes.
    #[error("engine nccl sends every all-to-all straight, expected policy.hierarchical_all_to_all = false")]
    NoRelays,
}

/// NCCL as it is found on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibraryFacts {
    /// Major and minor version and patch.
    pub version: (u32, u32, u32),
    /// The file.
    pub path: String,
}

/// Loads NCCL's library.
///
/// # Errors
/// If it is not there, or too old.
pub fn library() -> Result<LibraryFacts, NcclStartError> {
    let nccl = Nccl::get().map_err(NcclStartError::Broken)?;
    Ok(LibraryFacts { version: nccl.version, path: nccl.path.clone() })
}

/// This process's rank of an NCCL job.
pub struct NcclJob {
    mailbox: Arc<Mailbox>,
    device: usize,
}

impl NcclJob {
    /// Meets the other ranks and returns this rank's handle, under `rules`. Once in a process. The handle wants to know the
    /// clock of the GPU that [`device`](Self::device) names ([`Comm::set_device`]). When it is dropped it waits for the other
    /// ranks to come as far. Where another rank is lost after all have met, every call on the handle returns why.
    ///
    /// # Errors
    /// What goes wrong on this rank; the same on all ranks where the ranks do not fit together.
    pub fn start(config: NcclConfig, rules: PolicyRules) -> Result<(NcclJob, Comm), NcclStartError> {
        if rules.moe.route == Route::ThroughNode {
            return Err(NcclStartError::NoRelays);
        }
        let broken = |e: io::Error| NcclStartError::Broken(format!("a thread cannot be started: {e}"));
        let mailbox = Arc::new(Mailbox::new());
        let began = Instant::now();
        let (report, started) = mpsc::channel();
        let NcclConfig { ranks, delays, .. } = config;
        let groups = Arc::new(config.groups.clone());
        let (mail, members) = (Arc::clone(&mailbox), Arc::clone(&groups));
        let thread = std::thread::Builder::new().name("lina-comm".to_owned()).spawn(move || {
            shorten_sleeps();
            let log_launches = config.log_launches;
            let start = || -> Result<_, NcclStartError> {
                let started = Started::new(&config, began, Arc::clone(&mail))?;
                // All ranks count time from one moment, so that what they record can be laid side by side.
                let ahead = Duration::from_nanos(started.clock_offset.unsigned_abs());
                let epoch = if started.clock_offset < 0 { began.checked_add(ahead) } else { began.checked_sub(ahead) };
                let epoch = epoch.unwrap_or(began);
                let (rank, device) = (started.rank, started.device.facts().ordinal);
                let engine = NcclEngine::new(started, &config, Arc::clone(&members), epoch)?;
                Ok((engine, rank, device, epoch))
            };
            let (engine, rank, epoch) = match start() {
                Ok((engine, rank, device, epoch)) => {
                    // The receiver waits for exactly this.
                    let _ = report.send(Ok((rank, device, epoch)));
                    (engine, rank, epoch)
                }
                Err(error) => {
                    let _ = report.send(Err(error));
                    return;
                }
            };
            communicate(ThreadConfig { rank, epoch, groups: members, log_launches, delays }, mail, engine);
        });
        let thread = thread.map_err(broken)?;
        let ended = |_| NcclStartError::Broken("its communication thread panicked".to_owned());
        let (rank, device, epoch) = started.recv().map_err(ended)??;
        let port = ThreadedPort::new(Arc::clone(&mailbox), thread, rank, epoch, delays);
        Ok((NcclJob { mailbox, device }, Comm::new(Box::new(port), rank, ranks, rules, &groups)))
    }

    /// The number of this rank's GPU among the visible ones.
    pub fn device(&self) -> usize {
        self.device
    }

    /// Takes this rank's launches, with their step, in order.
    pub fn launch_log(&self) -> Vec<(u64, Launch)> {
        self.mailbox.take_log()
    }
}

/// Lets this thread's sleeps end when they are due instead of up to 50 us later.
fn shorten_sleeps() {
    const SLACK_NS: libc::c_ulong = 1000;
    // SAFETY: sets a number of the calling thread. Where that is refused, sleeps are longer.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, SLACK_NS) };
}
