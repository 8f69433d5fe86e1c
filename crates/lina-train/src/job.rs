//! A job: one thread a rank, each with its handle on whatever body the configuration asks for, and what becomes of
//! the job when a rank fails.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use lina_comm::emulated::{Device, EmulatedCluster, EmulatedConfig};
use lina_comm::local::{LocalConfig, LocalJob};
use lina_comm::{Comm, CommError, StepBound};
use lina_plan::{ExpertLayout, PolicyRules};

use crate::TrainError;
use crate::config::ClusterConfig;

/// Stack of a rank's thread.
const STACK_BYTES: usize = 8 << 20;

/// What all ranks came to.
pub(crate) struct JobOutcome<R> {
    /// By rank.
    pub(crate) ranks: Vec<R>,
    /// Bounds of the steps, on the emulated cluster.
    pub(crate) bounds: Vec<StepBound>,
}

/// Runs `rank_main` on every rank of `cluster` until all have ended.
///
/// # Errors
/// The first rank's own error, not what the others heard of it.
pub(crate) fn run_job<R: Send>(
    cluster: &ClusterConfig,
    experts: &ExpertLayout,
    rules: PolicyRules,
    rank_main: impl Fn(&mut Comm) -> Result<R, TrainError> + Sync,
) -> Result<JobOutcome<R>, TrainError> {
    let ranks = experts.ranks();
    let groups = experts.groups().to_vec();
    let timeout = Duration::from_secs_f64(cluster.timeout_s);
    let mut emulated = None;
    // Held until all ranks have ended.
    let mut _local = None;
    let comms = match cluster.emulation().map_err(TrainError::input)? {
        Some((topology, gflops)) => {
            let body = EmulatedCluster::new(EmulatedConfig {
                topology,
                device: Device { gflops },
                groups,
                timeout,
                delays: None,
                log_launches: false,
            });
            let comms = body.comms(rules);
            emulated = Some(body);
            comms
        }
        None if ranks == 1 => vec![Comm::solo()],
        None => {
            let local = LocalConfig { ranks, groups, timeout, delays: None, log_launches: false };
            let (job, comms) = LocalJob::start(local, rules)
                .map_err(|e| TrainError::Input(format!("threads for {ranks} ranks cannot be started: {e}")))?;
            _local = Some(job);
            comms
        }
    };
    let results: Vec<Result<R, TrainError>> = std::thread::scope(|scope| {
        let rank_main = &rank_main;
        let threads: Vec<_> = comms
            .into_iter()
            .enumerate()
            .map(|(rank, mut comm)| {
                let body = move || {
                    let result = catch_unwind(AssertUnwindSafe(|| rank_main(&mut comm)))
                        .unwrap_or_else(|panic| Err(CommError::RankFailed { rank, reason: reason(&*panic) }.into()));
                    if let Err(error) = &result {
                        comm.fail(own_reason(error));
                    }
                    result
                };
                std::thread::Builder::new()
                    .name(format!("lina-rank-{rank}"))
                    .stack_size(STACK_BYTES)
                    .spawn_scoped(scope, body)
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| match thread {
                Ok(thread) => thread.join().unwrap_or_else(|panic| Err(TrainError::Input(reason(&*panic)))),
                Err(e) => Err(TrainError::Input(format!("a thread for each of {ranks} ranks cannot be started: {e}"))),
            })
            .collect()
    });
    let mut outcome = Vec::with_capacity(ranks);
    let mut failures = Vec::new();
    for result in results {
        match result {
            Ok(result) => outcome.push(result),
            Err(error) => failures.push(error),
        }
    }
    // A rank's own error says more than what the others were told of it.
    let own = failures.iter().position(|error| !matches!(error, TrainError::Lost(_))).unwrap_or(0);
    if !failures.is_empty() {
        return Err(failures.swap_remove(own));
    }
    let bounds = emulated.map(|cluster| cluster.take_bounds()).unwrap_or_default();
    Ok(JobOutcome { ranks: outcome, bounds })
}

/// What a rank tells the others of its error: the reason without the rank's name, which they add.
fn own_reason(error: &TrainError) -> String {
    match error {
        TrainError::Lost(CommError::RankFailed { reason, .. }) => reason.clone(),
        error => error.to_string(),
    }
}

/// The message of a panic.
fn reason(panic: &(dyn Any + Send)) -> String {
    let message = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    format!("it panicked: {}", message.unwrap_or("without a message"))
}
