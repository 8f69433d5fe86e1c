//! `lina doctor --engine E`: measures every two ranks of a job, and says which rank, host or link is slow.
//!
//! Pairs take turns, so that no two share a network interface (`lina_plan::pair_rounds`). The round trip of a pair is a
//! sum of two numbers over these two ranks; a rate is that of an all-to-all in which one of them sends to the other and
//! nobody else anything. Both are what a job gets through its engine, the threads of the ranks included, and not what
//! the wire could do.

use std::fmt::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use lina_comm::{AllToAllKind, Comm, CommError, Direction, Exchange, GradientRegion, GroupId, Leg, SharedBuffer};
use lina_kernels::{Compute, Mat, MatMut, matmul};
use lina_plan::{
    Aspect, ExpertLayout, Finding, PairMeasurements, Place, Policy, PolicyRules, PolicySettings, diagnose, pair_rounds,
};
use lina_report::{Align, Table};
use serde::Serialize;

use crate::TrainError;
use crate::bench::median;
use crate::config::check::MAX_RANKS;
use crate::config::{ClusterConfig, Engine, RunConfig};
use crate::job::run_job;

/// Round trips of a pair; the shortest counts. Not all at once: something else may occupy a host for a while.
const ROUND_TRIPS: usize = 30;
const ROUND_TRIP_PASSES: usize = 3;
/// Elements of the first message of a pair, from which the size of the others is found: 256 KiB.
const FIRST_ELEMENTS: usize = 64 << 10;
/// Elements of the largest message: 16 MiB.
const MOST_ELEMENTS: usize = 4 << 20;
const ELEMENT_BITS: f64 = 32.0;
/// Messages in each direction; the fastest counts.
const MESSAGES: usize = 3;
/// How long a message should take, and how long all messages together.
const MESSAGE_S: f64 = 0.1;
const ALL_MESSAGES_S: f64 = 15.0;
/// How long a rank multiplies matrices, long enough for ranks that share cores to get the same of them, in each of
/// several windows of which the median counts.
const WINDOW: Duration = Duration::from_millis(150);
const WINDOWS: usize = 5;
/// Rows and columns of these matrices.
const MATRIX: usize = 192;
/// Bytes of a host's name.
const NAME_BYTES: usize = 64;
/// Pairs that the table shows; the slowest, where there are more.
const ROWS: usize = 36;

/// What ranks measured of each other.
#[derive(Clone, Debug, Serialize)]
pub struct RankDiagnosis {
    /// What carried the messages.
    pub engine: &'static str,
    /// By rank.
    pub ranks: Vec<RankMeasured>,
    /// Every two ranks.
    pub pairs: Vec<PairMeasured>,
    /// What is slow, if anything; ranks by number, hosts by their place in `hosts`.
    pub findings: Vec<Finding>,
    /// Names of the hosts.
    pub hosts: Vec<String>,
    /// The findings in words.
    pub sentence: String,
}

/// A rank by itself.
#[derive(Clone, Debug, Serialize)]
pub struct RankMeasured {
    /// Its number.
    pub rank: usize,
    /// The name of its host.
    pub host: String,
    /// Rate of a matrix product on one thread while all ranks compute, in GFLOP/s.
    pub compute_gflops: f64,
}

/// Two ranks.
#[derive(Clone, Debug, Serialize)]
pub struct PairMeasured {
    /// Their numbers, ascending.
    pub ranks: [usize; 2],
    /// A small message there and back, in microseconds.
    pub round_trip_us: f64,
    /// Rate of a large message from the first to the second, in Mbit/s.
    pub mbit_per_s: f64,
    /// The same from the second to the first.
    pub mbit_per_s_back: f64,
}

/// Measures every two ranks and the computation of each.
///
/// # Errors
/// Fewer than two ranks; a lost rank.
pub fn diagnose_ranks(engine: Engine, ranks: usize) -> Result<RankDiagnosis, TrainError> {
    if !(2..=MAX_RANKS).contains(&ranks) {
        return Err(TrainError::Input(format!(
            "{ranks} rank(s) are to be measured against each other, expected 2 to {MAX_RANKS}: --ranks N, or on engine \
             mpi as many as `mpirun -np N` starts"
        )));
    }
    if engine.has_gpus() {
        let engine = engine.name();
        return Err(TrainError::Input(format!(
            "ranks of engine {engine} are not measured against each other, expected engine local or mpi; `lina bench \
             train` shows what engine {engine} takes"
        )));
    }
    let cluster = ClusterConfig { engine, ranks, ..ClusterConfig::default() };
    let layout = ExpertLayout::new(ranks, ranks, None).map_err(TrainError::input)?;
    let rules = PolicyRules::new(Policy::Fair, &PolicySettings::default());
    let mut outcome = run_job(&cluster, &layout, rules, "doctor", |comm| Ok(measure(comm)?))?;
    let (measured, hosts) = outcome.ranks.swap_remove(0);
    Ok(RankDiagnosis::new(engine, &measured, hosts))
}

/// Measures every two ranks of a job at its end, where ranks are processes: what is slow, in words, on rank 0. All ranks
/// call it together; reduction groups are those of no model afterwards.
pub(crate) fn network_sentence(config: &RunConfig, comm: &mut Comm) -> Result<Option<String>, CommError> {
    if config.cluster.engine != Engine::Mpi || comm.ranks() < 2 {
        return Ok(None);
    }
    let (measured, hosts) = measure(comm)?;
    Ok((comm.rank() == 0).then(|| sentence(&diagnose(&measured), &measured, &hosts)))
}

impl RankDiagnosis {
    fn new(engine: Engine, measured: &PairMeasurements, hosts: Vec<String>) -> Self {
        let ranks = measured.hosts.len();
        let pair = |(first, second): (usize, usize)| PairMeasured {
            ranks: [first, second],
            round_trip_us: measured.round_trip_us[first][second],
            mbit_per_s: measured.mbit_per_s[first][second],
            mbit_per_s_back: measured.mbit_per_s[second][first],
        };
        let pairs = (0..ranks).flat_map(|first| (first + 1..ranks).map(move |second| (first, second))).map(pair);
        let findings = diagnose(measured);
        RankDiagnosis {
            engine: engine.name(),
            ranks: (0..ranks)
                .map(|rank| RankMeasured {
                    rank,
                    host: hosts[measured.hosts[rank]].clone(),
                    compute_gflops: measured.compute_gflops[rank],
                })
                .collect(),
            pairs: pairs.collect(),
            sentence: sentence(&findings, measured, &hosts),
            findings,
            hosts,
        }
    }

    /// Ranks and pairs as tables, and what they come to.
    pub fn table(&self) -> String {
        let mut ranks =
            Table::new([("rank", Align::Right), ("host", Align::Left), ("computes\nGFLOP/s", Align::Right)]);
        for RankMeasured { rank, host, compute_gflops } in &self.ranks {
            ranks.row([rank.to_string(), host.clone(), format!("{compute_gflops:.1}")]);
        }
        let mut pairs = Table::new([
            ("ranks", Align::Left),
            ("hosts", Align::Left),
            ("round trip\nus", Align::Right),
            ("there\nMbit/s", Align::Right),
            ("back\nMbit/s", Align::Right),
        ]);
        let mut shown: Vec<&PairMeasured> = self.pairs.iter().collect();
        if shown.len() > ROWS {
            shown.sort_by(|a, b| a.slower_mbit_per_s().total_cmp(&b.slower_mbit_per_s()));
            shown.truncate(ROWS);
        }
        for pair in &shown {
            let [first, second] = pair.ranks;
            pairs.row([
                format!("{first} - {second}"),
                format!("{} - {}", self.ranks[first].host, self.ranks[second].host),
                format!("{:.0}", pair.round_trip_us),
                format!("{:.0}", pair.mbit_per_s),
                format!("{:.0}", pair.mbit_per_s_back),
            ]);
        }
        let mut text = format!("{}\n{}", ranks.render(), pairs.render());
        if shown.len() < self.pairs.len() {
            let _ = writeln!(text, "The slowest {} of {} pairs.", shown.len(), self.pairs.len());
        }
        format!("{text}\n{}\n", self.sentence)
    }
}

impl PairMeasured {
    /// The rate of the slower direction.
    fn slower_mbit_per_s(&self) -> f64 {
        self.mbit_per_s.min(self.mbit_per_s_back)
    }
}

/// What is slow, in words, with the figures; `hosts` are the names of the hosts.
fn sentence(findings: &[Finding], measured: &PairMeasurements, hosts: &[String]) -> String {
    let pairs = || {
        let ranks = 0..measured.hosts.len();
        ranks.clone().flat_map(move |from| ranks.clone().map(move |to| (from, to))).filter(|(from, to)| from != to)
    };
    if findings.is_empty() {
        let least = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::MAX, f64::min);
        let longest_us = pairs().map(|(from, to)| measured.round_trip_us[from][to]).fold(0.0, f64::max);
        return format!(
            "No pair of ranks is much slower than the others: at least {:.0} Mbit/s each way, at most {:.2} ms for a \
             round trip; every rank computes at {:.1} GFLOP/s or more.",
            least(&mut pairs().map(|(from, to)| measured.mbit_per_s[from][to])),
            longest_us / 1e3,
            least(&mut measured.compute_gflops.iter().copied()),
        );
    }
    let name = |place: &Place| match *place {
        Place::Host(host) => {
            let ranks: Vec<String> = (0..measured.hosts.len())
                .filter(|&rank| measured.hosts[rank] == host)
                .map(|rank| rank.to_string())
                .collect();
            format!("host {} (rank {})", hosts[host], ranks.join(", "))
        }
        Place::Rank(rank) => format!("rank {rank} (host {})", hosts[measured.hosts[rank]]),
    };
    let is_of = |rank: usize, place: &Place| match *place {
        Place::Host(host) => measured.hosts[rank] == host,
        Place::Rank(only) => rank == only,
    };
    // The best of what is between two places, or between one and all others.
    let figure = |aspect: Aspect, from: &Place, to: Option<&Place>| -> String {
        let other = |rank: usize| to.map_or(!is_of(rank, from), |to| is_of(rank, to));
        let best = |table: &[Vec<f64>], there: bool, better: fn(f64, f64) -> f64, start: f64| {
            let between = pairs().filter(|&(a, b)| is_of(a, from) && other(b));
            between.map(|(a, b)| if there { table[a][b] } else { table[b][a] }).fold(start, better)
        };
        let sends = || format!("{:.0}", best(&measured.mbit_per_s, true, f64::max, 0.0));
        let receives = || format!("{:.0}", best(&measured.mbit_per_s, false, f64::max, 0.0));
        match aspect {
            Aspect::RoundTrip => format!("{:.2} ms", best(&measured.round_trip_us, true, f64::min, f64::MAX) / 1e3),
            Aspect::Sending => format!("{} Mbit/s", sends()),
            Aspect::Receiving => format!("{} Mbit/s", receives()),
            Aspect::Rate => format!("{} Mbit/s there, {} back", sends(), receives()),
        }
    };
    let clauses = findings.iter().map(|finding| match finding {
        Finding::Computes { place, times } => {
            format!("{} computes {times:.1} times slower than most ranks", name(place))
        }
        Finding::Connects { place, aspect, times } => {
            let verb = match aspect {
                Aspect::Sending => "sends",
                Aspect::Receiving => "receives",
                Aspect::Rate => "sends and receives",
                Aspect::RoundTrip => "answers",
            };
            let figure = figure(*aspect, place, None);
            format!("{} {verb} {times:.1} times slower than most others ({figure} at best)", name(place))
        }
        Finding::Link { from, to, aspect, times } => {
            let (link, figure) = (figure(*aspect, from, Some(to)), name(to));
            let join = if *aspect == Aspect::Sending { "to" } else { "and" };
            format!("{} {join} {figure}: their link is {times:.1} times slower than their others ({link})", name(from))
        }
    });
    let text = clauses.collect::<Vec<_>>().join("; ");
    let mut characters = text.chars();
    let first = characters.next().map(|first| first.to_ascii_uppercase());
    format!("{}{}.", first.unwrap_or_default(), characters.as_str())
}

/// All of it, on every rank alike, with the names of the hosts.
fn measure(comm: &mut Comm) -> Result<(PairMeasurements, Vec<String>), CommError> {
    let ranks = comm.ranks();
    let (hosts, names) = exchange_hosts(comm)?;
    let compute_gflops = measure_computation(comm)?;
    let rounds = pair_rounds(&hosts);
    let round_trip_us = measure_round_trips(comm, &rounds)?;
    let first = measure_rates(comm, &rounds, 1, |_, _| FIRST_ELEMENTS)?;
    let message_s = MESSAGE_S.min(ALL_MESSAGES_S / (2 * rounds.len() * MESSAGES) as f64);
    // A slow pair would take very long for what a fast one needs.
    let elements = |from: usize, to: usize| {
        let elements = first[from][to] * 1e6 * message_s / ELEMENT_BITS;
        (elements as usize).clamp(FIRST_ELEMENTS, MOST_ELEMENTS)
    };
    let mbit_per_s = measure_rates(comm, &rounds, MESSAGES, elements)?;
    // The groups of the job, should anybody go on with it.
    comm.set_groups(&[(0..ranks).collect()])?;
    Ok((PairMeasurements { hosts, compute_gflops, round_trip_us, mbit_per_s }, names))
}

/// A number for the host of each rank, in the order of their first ranks, and the hosts' names.
fn exchange_hosts(comm: &mut Comm) -> Result<(Vec<usize>, Vec<String>), CommError> {
    let mut bytes = vec![0.0; comm.ranks() * NAME_BYTES];
    let own = host_name();
    for (place, &byte) in bytes[comm.rank() * NAME_BYTES..].iter_mut().zip(own.as_bytes()).take(NAME_BYTES) {
        *place = f64::from(byte);
    }
    sum(comm, &mut bytes)?;
    let mut names: Vec<String> = Vec::new();
    let hosts = bytes.chunks_exact(NAME_BYTES).map(|name| {
        let name: Vec<u8> = name.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0).collect();
        let name = String::from_utf8_lossy(&name).into_owned();
        names.iter().position(|other| *other == name).unwrap_or_else(|| {
            names.push(name);
            names.len() - 1
        })
    });
    Ok((hosts.collect(), names))
}

/// What this host calls itself.
fn host_name() -> String {
    let printed = Command::new("uname").arg("-n").output().ok().filter(|output| output.status.success());
    let name = printed.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    name.filter(|name| !name.is_empty()).unwrap_or_else(|| "without a name".to_owned())
}

/// A sum over all ranks between steps.
fn sum(comm: &mut Comm, values: &mut [f64]) -> Result<(), CommError> {
    comm.begin_evaluation(0)?;
    comm.sum(values)?;
    comm.end_step();
    Ok(())
}

/// Every rank's own value.
fn share(comm: &mut Comm, own: f64) -> Result<Vec<f64>, CommError> {
    let mut values = vec![0.0; comm.ranks()];
    values[comm.rank()] = own;
    sum(comm, &mut values)?;
    Ok(values)
}

/// The rate of matrix products on one thread of each rank, in GFLOP/s, while all compute.
fn measure_computation(comm: &mut Comm) -> Result<Vec<f64>, CommError> {
    let compute = Compute::new(1);
    let (a, b) = (vec![1.0; MATRIX * MATRIX], vec![0.5; MATRIX * MATRIX]);
    let mut c = vec![0.0; MATRIX * MATRIX];
    let mut product = || {
        let [a, b] = [&a, &b].map(|matrix| Mat::new(matrix, MATRIX, MATRIX));
        matmul(&compute, MatMut::new(&mut c, MATRIX, MATRIX), a, b, false);
    };
    product();
    let mut rates = Vec::with_capacity(WINDOWS);
    for _ in 0..WINDOWS {
        sum(comm, &mut [0.0])?;
        let start = Instant::now();
        let mut products = 0.0;
        while start.elapsed() < WINDOW {
            product();
            products += 1.0;
        }
        let flop = products * 2.0 * (MATRIX as f64).powi(3);
        rates.push(flop / start.elapsed().as_secs_f64() / 1e9);
    }
    share(comm, median(&rates))
}

/// The shortest round trip of every two ranks, in microseconds.
fn measure_round_trips(comm: &mut Comm, rounds: &[Vec<(usize, usize)>]) -> Result<Vec<Vec<f64>>, CommError> {
    let (rank, ranks) = (comm.rank(), comm.ranks());
    let mut table = vec![0.0; ranks * ranks];
    let mut buffer = SharedBuffer::zeros(2);
    for (pass, round) in (0..ROUND_TRIP_PASSES).flat_map(|pass| rounds.iter().map(move |round| (pass, round))) {
        let pairs = round.iter().map(|&(first, second)| vec![first, second]);
        let groups: Vec<Vec<usize>> = std::iter::once((0..ranks).collect()).chain(pairs).collect();
        comm.set_groups(&groups)?;
        let mut shortest = f64::MAX;
        for _ in 0..ROUND_TRIPS {
            comm.begin_step(0)?;
            comm.begin_micro_batch(true)?;
            let start = comm.now();
            for (number, members) in groups.iter().enumerate().skip(1) {
                let local = members.contains(&rank).then_some((&mut buffer, 0..2));
                comm.reduce_gradient(GradientRegion { group: GroupId(number as u32), elements: 2, local })?;
            }
            comm.finish_gradients()?;
            shortest = shortest.min((comm.now() - start) as f64 / 1e3);
            comm.end_step();
        }
        for &(first, second) in round.iter().filter(|(first, _)| *first == rank) {
            let before = if pass == 0 { f64::MAX } else { table[first * ranks + second] };
            table[first * ranks + second] = shortest.min(before);
            table[second * ranks + first] = shortest.min(before);
        }
    }
    sum(comm, &mut table)?;
    Ok(table.chunks_exact(ranks).map(<[f64]>::to_vec).collect())
}

/// The highest rate from every rank to every other, in Mbit/s, of so many messages of `elements(from, to)`.
fn measure_rates(
    comm: &mut Comm,
    rounds: &[Vec<(usize, usize)>],
    messages: usize,
    elements: impl Fn(usize, usize) -> usize,
) -> Result<Vec<Vec<f64>>, CommError> {
    const KIND: AllToAllKind =
        AllToAllKind { direction: Direction::Forward, leg: Leg::Parameters, layer: 0, chunk: 0, chunks: 1 };
    let (rank, ranks) = (comm.rank(), comm.ranks());
    let mut table = vec![0.0; ranks * ranks];
    let (mut send, mut recv) = (Vec::new(), Vec::new());
    for round in rounds {
        let back: Vec<_> = round.iter().map(|&(first, second)| (second, first)).collect();
        for pairs in [round, &back] {
            let (mut send_elements, mut recv_elements) = (vec![0; ranks], vec![0; ranks]);
            let mut sender = None;
            for &(from, to) in pairs {
                if from == rank {
                    send_elements[to] = elements(from, to);
                    send.resize(send_elements[to].max(send.len()), 0.0);
                } else if to == rank {
                    recv_elements[from] = elements(from, to);
                    recv.resize(recv_elements[from].max(recv.len()), 0.0);
                    sender = Some(from);
                }
            }
            for _ in 0..messages {
                comm.begin_evaluation(0)?;
                // All begin together: what has been sent ahead would take no time.
                comm.sum(&mut [0.0])?;
                let start = comm.now();
                let exchange = Exchange { kind: KIND, send, send_elements, recv, recv_elements };
                let ticket = comm.all_to_all(exchange)?;
                Exchange { send, send_elements, recv, recv_elements, .. } = comm.wait(ticket)?;
                let took_ns = (comm.now() - start) as f64;
                comm.end_step();
                if let Some(from) = sender {
                    let bits = recv_elements[from] as f64 * ELEMENT_BITS;
                    let rate = &mut table[from * ranks + rank];
                    *rate = f64::max(*rate, bits / took_ns * 1e3);
                }
            }
        }
    }
    sum(comm, &mut table)?;
    Ok(table.chunks_exact(ranks).map(<[f64]>::to_vec).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four ranks on as many hosts.
    fn measured() -> PairMeasurements {
        PairMeasurements {
            hosts: (0..4).collect(),
            compute_gflops: vec![40.0; 4],
            round_trip_us: vec![vec![250.0; 4]; 4],
            mbit_per_s: vec![vec![900.0; 4]; 4],
        }
    }

    #[track_caller]
    fn check(measured: &PairMeasurements, expected: &str) {
        let hosts: Vec<String> = (1..=4).map(|number| format!("h{number}")).collect();
        assert_eq!(sentence(&diagnose(measured), measured, &hosts), expected);
    }

    #[test]
    fn findings_are_said_with_their_figures() {
        check(
            &measured(),
            "No pair of ranks is much slower than the others: at least 900 Mbit/s each way, at most 0.25 ms for a round \
             trip; every rank computes at 40.0 GFLOP/s or more.",
        );
        let mut host = measured();
        for other in 0..4 {
            host.mbit_per_s[2][other] = 100.0;
            host.mbit_per_s[other][2] = 90.0;
        }
        check(
            &host,
            "Host h3 (rank 2) sends and receives 10.0 times slower than most others (100 Mbit/s there, 90 back at best).",
        );
        let mut link = measured();
        link.mbit_per_s[3][0] = 300.0;
        link.compute_gflops[1] = 10.0;
        check(
            &link,
            "Rank 1 (host h2) computes 4.0 times slower than most ranks; host h4 (rank 3) to host h1 (rank 0): their \
             link is 3.0 times slower than their others (300 Mbit/s).",
        );
    }

    #[test]
    fn threads_of_one_process_are_measured() {
        let diagnosis = diagnose_ranks(Engine::Local, 3).unwrap();
        assert_eq!(diagnosis.pairs.iter().map(|pair| pair.ranks).collect::<Vec<_>>(), [[0, 1], [0, 2], [1, 2]]);
        for pair in &diagnosis.pairs {
            assert!(pair.round_trip_us > 0.0 && pair.slower_mbit_per_s() > 0.0, "{pair:?}");
        }
        assert!(diagnosis.ranks.iter().all(|rank| rank.compute_gflops > 0.0 && rank.host == diagnosis.hosts[0]));
        let table = diagnosis.table();
        assert!(table.contains("0 - 2") && table.ends_with(&format!("\n\n{}\n", diagnosis.sentence)), "{table}");
        let refused = diagnose_ranks(Engine::Local, 1).unwrap_err();
        assert_eq!(refused.exit_code(), 2);
    }
}
