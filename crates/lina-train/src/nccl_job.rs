//! A job on GPUs: this process is one of its ranks, or all of it.

use std::time::Duration;

use lina_comm::Comm;
use lina_comm::nccl::{NcclConfig, NcclJob, launched};
use lina_cuda::Device;
use lina_plan::{ExpertLayout, PolicyRules};

use crate::TrainError;
use crate::config::ClusterConfig;
use crate::job::{JobOutcome, LAST_WORDS, run_this_rank};

/// The number of the GPU that this process's rank uses: ranks of a host take its visible GPUs in turn.
pub(crate) fn rank_device() -> Result<usize, TrainError> {
    let gpus = Device::count()?;
    let local_rank = launched().map_or(0, |launched| launched.local_rank);
    Ok(local_rank % gpus.max(1))
}

/// Runs `rank_main` on this process's rank. `identity` must be the same text on all ranks.
///
/// # Errors
/// This rank's own error, or what it heard of another's.
pub(crate) fn run<R>(
    cluster: &ClusterConfig,
    experts: &ExpertLayout,
    rules: PolicyRules,
    identity: &str,
    rank_main: impl Fn(&mut Comm) -> Result<R, TrainError>,
) -> Result<JobOutcome<R>, TrainError> {
    let (_job, comm) = if experts.ranks() == 1 {
        (None, Comm::solo())
    } else {
        let config = NcclConfig {
            ranks: experts.ranks(),
            groups: experts.groups().to_vec(),
            ordered_sums: cluster.ordered_sums,
            timeout: Duration::from_secs_f64(cluster.timeout_s),
            identity: format!("lina {}\n{identity}", env!("CARGO_PKG_VERSION")),
            last_words: LAST_WORDS.get().copied(),
            delays: None,
            log_launches: false,
        };
        let (job, comm) = NcclJob::start(config, rules).map_err(TrainError::input)?;
        (Some(job), comm)
    };
    run_this_rank(comm, rank_main)
}
