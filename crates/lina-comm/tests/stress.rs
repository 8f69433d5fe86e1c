//! Ten thousand steps of small random programs with random delays on every rank: all ranks launch the same operations
//! in the same order, whatever comes late, and none hangs. 8,000 between threads and 2,000 between processes, where the
//! feature `mpi` and an `mpirun` are there.

use std::time::{Duration, Instant};

use lina_comm::local::{LocalConfig, LocalJob};
use lina_comm::*;
use lina_plan::{Launch, Policy, PolicyRules, PolicySettings};

mod dice;
#[cfg(feature = "mpi")]
mod launcher;

use dice::Dice;

/// Steps of one job.
const STEPS: u64 = 250;
/// Elements of the largest gradient.
const GRADIENT: usize = 700;
/// A rank that waits for so long hangs.
const TIMEOUT: Duration = Duration::from_secs(20);

fn rules(policy: Policy) -> PolicyRules {
    PolicyRules::new(
        policy,
        &PolicySettings { bucket_bytes: 3000, partition_bytes: 800, pipeline_chunks: 2, ..PolicySettings::default() },
    )
}

/// Every two neighbours hold something together.
fn groups(ranks: usize) -> Vec<Vec<usize>> {
    let pairs = (1..ranks).map(|rank| vec![rank - 1, rank]);
    std::iter::once((0..ranks).collect()).chain(pairs).collect()
}

fn delays(seed: u64) -> Delays {
    Delays { seed, max_us: 60 }
}

/// A rank's part of a random program: each step has other layers, messages and gradients, some of them empty.
fn program(comm: &mut Comm, seed: u64) -> Result<(), CommError> {
    let (me, ranks) = (comm.rank(), comm.ranks());
    let mut dice = Dice(seed);
    let groups = groups(ranks);
    let mut gradients: Vec<SharedBuffer> = groups.iter().map(|_| SharedBuffer::zeros(4 * GRADIENT)).collect();
    for step in 0..STEPS {
        comm.begin_step(step)?;
        let micro_batches = 1 + dice.roll(2);
        for micro_batch in 0..micro_batches {
            let last = micro_batch + 1 == micro_batches;
            comm.begin_micro_batch(last)?;
            let layers = dice.roll(3) as u32;
            for layer in 0..layers {
                moe_layer(comm, &mut dice, Direction::Forward, layer)?;
            }
            for layer in (0..layers).rev() {
                moe_layer(comm, &mut dice, Direction::Backward, layer)?;
                for (number, (members, buffer)) in groups.iter().zip(&mut gradients).enumerate() {
                    let elements = dice.roll(GRADIENT);
                    let range = layer as usize * GRADIENT..layer as usize * GRADIENT + elements;
                    let local = members.contains(&me).then(|| {
                        // Before the last micro-batch the buffer stays with this thread.
                        buffer.range_mut(range.clone()).fill((me + 1) as f32);
                        (buffer, range)
                    });
                    comm.reduce_gradient(GradientRegion { group: GroupId(number as u32), elements, local })?;
                }
            }
        }
        comm.finish_gradients()?;
        let mut sum = [(me + 1) as f64];
        comm.agree(&mut sum)?;
        assert_eq!(sum, [(ranks * (ranks + 1) / 2) as f64]);
        comm.end_step();
    }
    Ok(())
}

fn moe_layer(comm: &mut Comm, dice: &mut Dice, direction: Direction, layer: u32) -> Result<(), CommError> {
    let (me, ranks) = (comm.rank(), comm.ranks());
    let chunks = comm.moe_shape().chunks as u32;
    for leg in [Leg::Dispatch, Leg::Combine] {
        comm.work(Work { kind: WorkKind::Attention, layer: Some(layer), flops: 1000 })?;
        let mut tickets = Vec::new();
        for chunk in 0..chunks {
            let elements: Vec<usize> = (0..ranks * ranks).map(|_| dice.roll(3) * 40).collect();
            let send_elements = elements[me * ranks..(me + 1) * ranks].to_vec();
            let recv_elements: Vec<usize> = elements.iter().skip(me).step_by(ranks).copied().collect();
            let send = vec![me as f32; send_elements.iter().sum()];
            let recv = vec![-1.0; recv_elements.iter().sum()];
            let kind = AllToAllKind { direction, leg, layer, chunk, chunks };
            tickets.push(comm.all_to_all(Exchange { kind, send, send_elements, recv, recv_elements })?);
        }
        for ticket in tickets {
            let Exchange { recv, recv_elements, .. } = comm.wait(ticket)?;
            let sources = recv_elements.iter().enumerate().flat_map(|(from, &n)| vec![from as f32; n]);
            assert!(recv.into_iter().eq(sources));
        }
    }
    Ok(())
}

/// The launches of every rank between threads, and the steps that they are of.
fn on_threads(ranks: usize, policy: Policy, seed: u64) -> Vec<Vec<(u64, Launch)>> {
    let config =
        LocalConfig { ranks, groups: groups(ranks), timeout: TIMEOUT, delays: Some(delays(seed)), log_launches: true };
    let (job, comms) = LocalJob::start(config, rules(policy)).unwrap();
    let threads: Vec<_> =
        comms.into_iter().map(|mut comm| std::thread::spawn(move || program(&mut comm, seed))).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
    job.launch_logs()
}

#[test]
fn eight_thousand_steps_between_threads() {
    let started = Instant::now();
    for job in 0..8000 / STEPS as usize {
        let policy = Policy::ALL[job % Policy::ALL.len()];
        let (ranks, seed) = (2 + job / Policy::ALL.len() % 4, job as u64);
        let logs = on_threads(ranks, policy, seed);
        assert!(logs.iter().all(|log| *log == logs[0]), "{policy}, {ranks} ranks, seed {seed}");
        // The very last steps may have no layers.
        assert!(logs[0].last().is_some_and(|(step, _)| *step > STEPS - 10), "{policy}, {ranks} ranks, seed {seed}");
        let all_reduces = logs[0].iter().filter(|(_, launch)| matches!(launch, Launch::AllReduce { .. })).count();
        let least = all_reduces.min(logs[0].len() - all_reduces);
        assert!(least > STEPS as usize, "{policy}, {ranks} ranks, seed {seed}: {all_reduces} of {}", logs[0].len());
    }
    eprintln!("8000 steps between threads in {:.1} s", started.elapsed().as_secs_f64());
}

#[cfg(feature = "mpi")]
mod between_processes {
    use std::hash::{DefaultHasher, Hash, Hasher};

    use lina_comm::mpi::{MpiConfig, MpiJob};

    use super::launcher::{lines, mpirun, say, setting};
    use super::*;

    /// What runs under `mpirun`; by itself it does nothing.
    #[test]
    fn rank_program() {
        let Some(policy) = setting("POLICY") else { return };
        let number = |name: &str| setting(name).unwrap().parse::<u64>().unwrap();
        let (ranks, seed) = (number("RANKS") as usize, number("SEED"));
        let config = MpiConfig {
            ranks,
            nodes: ranks,
            groups: groups(ranks),
            timeout: TIMEOUT,
            identity: String::new(),
            device_gflops: None,
            max_message_bytes: MpiConfig::MAX_MESSAGE_BYTES,
            last_words: None,
            delays: Some(delays(seed)),
            log_launches: true,
        };
        let (job, mut comm) = MpiJob::start(config, rules(policy.parse().unwrap())).unwrap();
        program(&mut comm, seed).unwrap();
        let log = job.launch_log();
        let mut digest = DefaultHasher::new();
        format!("{log:?}").hash(&mut digest);
        say(&format!("rank {}: {} launches {:x}", comm.rank(), log.len(), digest.finish()));
        drop(comm);
        // Nothing of the test harness is wanted among the ranks' lines.
        std::process::exit(0);
    }

    #[test]
    fn two_thousand_steps_between_processes() {
        let started = Instant::now();
        for job in 0..2000 / STEPS as usize {
            let policy = Policy::ALL[job % Policy::ALL.len()];
            let ranks = [4, 2, 3][job % 3];
            let (seed, count) = ((100 + job).to_string(), ranks.to_string());
            let settings = [("POLICY", policy.name()), ("RANKS", &count), ("SEED", &seed)];
            let Some(output) = mpirun(ranks, "between_processes::rank_program", &settings) else { return };
            let found = lines(&output, &["rank "]);
            assert_eq!(found.len(), ranks, "{policy}: {output:?}");
            let launches: Vec<&str> = found.iter().filter_map(|line| line.split(": ").nth(1)).collect();
            assert!(launches.iter().all(|other| *other == launches[0]), "{policy}: {found:?}");
        }
        eprintln!("2000 steps between processes in {:.1} s", started.elapsed().as_secs_f64());
    }
}
