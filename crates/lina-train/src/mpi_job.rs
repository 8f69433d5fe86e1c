//! A job on MPI: this process is one of its ranks.

use std::time::Duration;

use lina_comm::Comm;
use lina_comm::mpi::{MpiConfig, MpiJob};
use lina_plan::{ExpertLayout, PolicyRules};

use crate::TrainError;
use crate::config::ClusterConfig;
use crate::job::{JobOutcome, LAST_WORDS, emulate_copies, run_this_rank};

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
    let config = MpiConfig {
        ranks: experts.ranks(),
        nodes: cluster.node_count(),
        groups: experts.groups().to_vec(),
        timeout: Duration::from_secs_f64(cluster.timeout_s),
        identity: format!("lina {}\n{identity}", env!("CARGO_PKG_VERSION")),
        device_gflops: cluster.device.map(|device| device.gflops),
        max_message_bytes: MpiConfig::MAX_MESSAGE_BYTES,
        last_words: LAST_WORDS.get().copied(),
        delays: None,
        log_launches: false,
    };
    let (_, mut comm) = MpiJob::start(config, rules).map_err(TrainError::input)?;
    emulate_copies(cluster, &mut comm);
    run_this_rank(comm, rank_main)
}
