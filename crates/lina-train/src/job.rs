//! A job: one thread a rank, each with its handle on whatever body the configuration asks for, and what becomes of
//! the job when a rank fails.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::time::Duration;

use lina_comm::emulated::{Device, EmulatedCluster, EmulatedConfig};
use lina_comm::local::{LocalConfig, LocalJob};
use lina_comm::{Comm, CommError, StepBound};
use lina_plan::{ExpertLayout, PolicyRules};

use crate::TrainError;
use crate::config::ClusterConfig;
use crate::panics::{RANK_THREAD, panic_reason};

/// Stack of a rank's thread.
const STACK_BYTES: usize = 8 << 20;

/// What to say when the job is lost while this rank computes.
pub(crate) static LAST_WORDS: OnceLock<fn(&CommError)> = OnceLock::new();

/// From now on, a process whose job is lost calls `last_words` if its computation has not come to an end soon after:
/// a launcher kills it shortly. They should say the error and end the process. Only the first call counts.
pub fn set_last_words(last_words: fn(&CommError)) {
    LAST_WORDS.get_or_init(|| last_words);
}

/// What all ranks came to.
pub struct JobOutcome<R> {
    /// By rank; of this process's rank only, where ranks are processes.
    pub ranks: Vec<R>,
    /// Bounds of the steps, on the emulated cluster.
    pub bounds: Vec<StepBound>,
}

/// Runs `rank_main` on every rank of `cluster` until all have ended; where ranks are processes, on this one's, and `identity`
/// must be the same text on all ranks.
///
/// # Errors
/// The first rank's own error, not what the others heard of it.
pub fn run_job<R: Send>(
    cluster: &ClusterConfig,
    experts: &ExpertLayout,
    rules: PolicyRules,
    identity: &str,
    rank_main: impl Fn(&mut Comm) -> Result<R, TrainError> + Sync,
) -> Result<JobOutcome<R>, TrainError> {
    if cluster.engine.has_processes() {
        return run_process(cluster, experts, rules, identity, rank_main);
    }
    let ranks = experts.ranks();
    let groups = experts.groups().to_vec();
    let timeout = Duration::from_secs_f64(cluster.timeout_s);
    let mut emulated = None;
    // Held until all ranks have ended.
    let mut _local = None;
    let mut comms = match cluster.emulation().map_err(TrainError::input)? {
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
    comms.iter_mut().for_each(|comm| emulate_copies(cluster, comm));
    let results: Vec<Result<R, TrainError>> = std::thread::scope(|scope| {
        let rank_main = &rank_main;
        let threads: Vec<_> = comms
            .into_iter()
            .enumerate()
            .map(|(rank, mut comm)| {
                let body = move || run_rank(rank, &mut comm, rank_main);
                std::thread::Builder::new()
                    .name(format!("{RANK_THREAD}{rank}"))
                    .stack_size(STACK_BYTES)
                    .spawn_scoped(scope, body)
            })
            .collect();
        threads
            .into_iter()
            .enumerate()
            .map(|(rank, thread)| match thread {
                // Panics of the rank itself are caught on its thread; what is left is its clean-up.
                Ok(thread) => thread.join().unwrap_or_else(|panic| Err(panicked(rank, &*panic))),
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

/// Runs `rank_main` on this process's rank.
#[cfg_attr(
    not(any(feature = "mpi", feature = "cuda")),
    expect(unused_variables, reason = "there is no engine to give them to")
)]
fn run_process<R>(
    cluster: &ClusterConfig,
    experts: &ExpertLayout,
    rules: PolicyRules,
    identity: &str,
    rank_main: impl Fn(&mut Comm) -> Result<R, TrainError>,
) -> Result<JobOutcome<R>, TrainError> {
    match cluster.engine {
        #[cfg(feature = "mpi")]
        crate::config::Engine::Mpi => crate::mpi_job::run(cluster, experts, rules, identity, rank_main),
        #[cfg(feature = "cuda")]
        crate::config::Engine::Nccl => crate::nccl_job::run(cluster, experts, rules, identity, rank_main),
        // The configuration has been checked: no run gets here.
        engine => Err(TrainError::Input(format!("this build has no engine `{}` between processes", engine.name()))),
    }
}

/// Runs `rank_main` on the only rank that this process has, whose handle is `comm`.
#[cfg(any(feature = "mpi", feature = "cuda"))]
pub(crate) fn run_this_rank<R>(
    mut comm: Comm,
    rank_main: impl Fn(&mut Comm) -> Result<R, TrainError>,
) -> Result<JobOutcome<R>, TrainError> {
    let result = run_rank(comm.rank(), &mut comm, rank_main);
    // What is left to do needs no other rank.
    drop(comm);
    Ok(JobOutcome { ranks: vec![result?], bounds: Vec::new() })
}

/// Gives the rank's device memory of its own, where the configuration does.
pub(crate) fn emulate_copies(cluster: &ClusterConfig, comm: &mut Comm) {
    if let Some(device) = cluster.device.filter(|device| device.memory_gib.is_some()) {
        comm.emulate_copies(device.copy_gbps());
    }
}

/// Runs `rank_main` on its rank, and tells the other ranks if it fails.
fn run_rank<R>(
    rank: usize,
    comm: &mut Comm,
    rank_main: impl Fn(&mut Comm) -> Result<R, TrainError>,
) -> Result<R, TrainError> {
    let result =
        catch_unwind(AssertUnwindSafe(|| rank_main(comm))).unwrap_or_else(|panic| Err(panicked(rank, &*panic)));
    if let Err(error) = &result {
        comm.fail(own_reason(error));
    }
    result
}

/// What a rank tells the others of its error: the reason without the rank's name, which they add.
fn own_reason(error: &TrainError) -> String {
    match error {
        TrainError::Lost(CommError::RankFailed { reason, .. }) => reason.clone(),
        error => error.to_string(),
    }
}

/// The failure of a rank that panicked.
fn panicked(rank: usize, panic: &(dyn Any + Send)) -> TrainError {
    CommError::RankFailed { rank, reason: format!("it panicked: {}", panic_reason(panic)) }.into()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use lina_plan::{Policy, PolicySettings};

    use super::*;
    use crate::alone::{is_alone, run_alone};
    use crate::config::{DeviceConfig, LinkConfig};
    use crate::keep_panics_quiet;

    const RANKS: usize = 4;

    /// Runs `rank_main` on ranks that are real threads, then on emulated ones, and returns both errors.
    fn fail(rank_main: impl Fn(&mut Comm) -> Result<(), TrainError> + Sync) -> [TrainError; 2] {
        let link =
            LinkConfig { gbps: 1.0, latency_us: 1.0, launch_us: 1.0, message_us: 0.0, nodes: None, inner_gbps: None };
        let local = ClusterConfig { ranks: RANKS, ..ClusterConfig::default() };
        let device = DeviceConfig { gflops: 1.0, memory_gib: None, copy_gbps: None };
        let emulated = ClusterConfig { link: Some(link), device: Some(device), ..local.clone() };
        [local, emulated].map(|cluster| {
            let experts = ExpertLayout::new(RANKS, RANKS, None).unwrap();
            let rules = PolicyRules::new(Policy::Fair, &PolicySettings::default());
            let start = Instant::now();
            let error = run_job(&cluster, &experts, rules, "", &rank_main).err().unwrap();
            // Far less than the time for which a rank may be silent: the others were told.
            assert!(start.elapsed() < Duration::from_secs(10), "{error} after {:?}", start.elapsed());
            error
        })
    }

    /// A step's sum, for which every rank waits.
    fn meet(comm: &mut Comm) -> Result<(), TrainError> {
        comm.begin_evaluation(0)?;
        comm.sum(&mut [1.0])?;
        comm.end_step();
        Ok(())
    }

    #[test]
    fn a_rank_that_panics_ends_the_job_with_its_name() {
        for error in fail(|comm| {
            meet(comm)?;
            assert!(comm.rank() != 1, "the sky fell");
            meet(comm)
        }) {
            assert_eq!(error.exit_code(), 1);
            let TrainError::Lost(CommError::RankFailed { rank, reason }) = &error else { panic!("{error}") };
            assert_eq!(*rank, 1);
            assert!(reason.starts_with("it panicked: the sky fell"), "{reason}");
        }
    }

    #[test]
    fn a_rank_that_refuses_its_input_ends_the_job_with_its_sentence() {
        for error in fail(|comm| {
            meet(comm)?;
            if comm.rank() == 2 {
                return Err(TrainError::Input("a.txt: is empty, expected text".to_owned()));
            }
            meet(comm)
        }) {
            assert_eq!((error.exit_code(), error.to_string().as_str()), (2, "a.txt: is empty, expected text"));
        }
    }

    #[test]
    fn a_panic_is_one_sentence_with_its_place() {
        const TEST: &str = "job::tests::a_panic_is_one_sentence_with_its_place";
        if is_alone(TEST) {
            keep_panics_quiet();
            let panic = |comm: &mut Comm| {
                assert!(comm.rank() != 1, "two\nlines");
                meet(comm)
            };
            fail(panic).into_iter().for_each(|error| eprintln!("error: {error}"));
            return;
        }
        let output = run_alone(TEST);
        let stderr = String::from_utf8(output.stderr).unwrap();
        let lines: Vec<&str> = stderr.lines().collect();
        assert_eq!(lines.len(), 2, "{stderr}");
        for line in lines {
            assert!(line.starts_with("error: rank 1 failed: it panicked: two lines (at "), "{line}");
            assert!(line.contains("job.rs:") && line.ends_with(')'), "{line}");
        }
    }
}
