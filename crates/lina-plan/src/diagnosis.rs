//! What makes a job's all-to-alls slow: a rank, a host or a link, from measurements between all pairs of ranks.
//!
//! Nothing is compared with a figure that the hardware should reach, which nobody knows here, but with what the others
//! reach: a host is slow if even its best connection is much slower than the best ones of most hosts, a link if it is
//! much slower than what both of its ends reach elsewhere. The best connection of a host tells of the host alone, since
//! only the other end of a bad one may be to blame. Where all ranks are on one host, ranks stand for hosts.

use serde::Serialize;

use crate::median;

/// How many times slower than others a rate between hosts has to be.
const SLOWER: f64 = 1.5;
/// The same of computation: ranks that share cores do not always get the same of them.
const COMPUTES_SLOWER: f64 = 2.0;
/// The same of rates inside one host, where messages are copies in memory, and of round trips, where a sleeping thread
/// may be woken late.
const MUCH_SLOWER: f64 = 3.0;
/// And by how much they have to be longer, in microseconds.
const LONGER_BY_US: f64 = 1000.0;

/// What was measured between the ranks of a job; tables are `[from][to]`, with nothing of interest on the diagonal.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PairMeasurements {
    /// The host of each rank, numbered from 0 without gaps.
    pub hosts: Vec<usize>,
    /// Rate of a matrix product on each rank, in GFLOP/s, while all ranks compute.
    pub compute_gflops: Vec<f64>,
    /// Shortest time for a small message there and back, in microseconds.
    pub round_trip_us: Vec<Vec<f64>>,
    /// Highest rate of a large message, in Mbit/s.
    pub mbit_per_s: Vec<Vec<f64>>,
}

/// Who is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// All ranks of a host.
    Host(usize),
    /// A rank.
    Rank(usize),
}

/// Something that is slower than the others.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "what")]
pub enum Finding {
    /// It computes slowly.
    Computes {
        /// Who.
        place: Place,
        /// How many times slower than the median rank.
        times: f64,
    },
    /// All of its connections are slow.
    Connects {
        /// Who.
        place: Place,
        /// In what.
        aspect: Aspect,
        /// How many times slower than most.
        times: f64,
    },
    /// Two that are fine with others are slow with each other.
    Link {
        /// One end: the sender, if one direction is slow.
        from: Place,
        /// The other end.
        to: Place,
        /// In what.
        aspect: Aspect,
        /// How many times slower than what both ends reach elsewhere.
        times: f64,
    },
}

/// In what a connection is slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Aspect {
    /// The rate of what it sends.
    Sending,
    /// The rate of what it receives.
    Receiving,
    /// The rate in both directions.
    Rate,
    /// The time that a small message takes.
    RoundTrip,
}

/// Rounds in which every two ranks meet exactly once, each rank at most once in a round, and each host in at most one
/// pair of two hosts, so that no two pairs share a network interface. `hosts` is the host of each rank.
pub fn pair_rounds(hosts: &[usize]) -> Vec<Vec<(usize, usize)>> {
    let mut rounds: Vec<Vec<(usize, usize)>> = Vec::new();
    for second in 0..hosts.len() {
        for first in 0..second {
            let apart = hosts[first] != hosts[second];
            let clashes = |&(a, b): &(usize, usize)| {
                let ranks = [a, b];
                let busy = |host| hosts[a] != hosts[b] && (hosts[a] == host || hosts[b] == host);
                ranks.contains(&first)
                    || ranks.contains(&second)
                    || apart && (busy(hosts[first]) || busy(hosts[second]))
            };
            match rounds.iter_mut().find(|round| !round.iter().any(clashes)) {
                Some(round) => round.push((first, second)),
                None => rounds.push(vec![(first, second)]),
            }
        }
    }
    rounds
}

/// What is slow; nothing, if no rank, host or link is much slower than the others.
pub fn diagnose(measured: &PairMeasurements) -> Vec<Finding> {
    let mut findings = slow_computation(measured);
    let hosts = measured.hosts.iter().max().map_or(0, |last| last + 1);
    let ranks_of = |host: usize| -> Vec<usize> {
        (0..measured.hosts.len()).filter(|&rank| measured.hosts[rank] == host).collect()
    };
    let places: Vec<(Place, Vec<usize>)> = if hosts > 1 {
        (0..hosts).map(|host| (Place::Host(host), ranks_of(host))).collect()
    } else {
        (0..measured.hosts.len()).map(|rank| (Place::Rank(rank), vec![rank])).collect()
    };
    let best = |of: &dyn Fn(usize, usize) -> f64| -> Vec<Vec<f64>> {
        let between = |a: &[usize], b: &[usize]| {
            let pairs = a.iter().flat_map(|&from| b.iter().map(move |&to| (from, to)));
            pairs.map(|(from, to)| of(from, to)).fold(0.0, f64::max)
        };
        places.iter().map(|(_, a)| places.iter().map(|(_, b)| between(a, b)).collect()).collect()
    };
    let rates = best(&|from, to| measured.mbit_per_s[from][to]);
    let slower = if hosts > 1 { SLOWER } else { MUCH_SLOWER };
    findings.extend(slow_connections(&rates, &|rate, reference| rate * slower < reference, Aspect::Rate, &places));
    let trips = best(&|from, to| 1.0 / measured.round_trip_us[from][to].max(f64::MIN_POSITIVE));
    let longer =
        |trip: f64, reference: f64| trip * MUCH_SLOWER < reference && 1.0 / trip > 1.0 / reference + LONGER_BY_US;
    findings.extend(slow_connections(&trips, &longer, Aspect::RoundTrip, &places));
    findings
}

/// Ranks that compute more slowly than the median rank; a host, where all of its ranks do and there are others.
fn slow_computation(measured: &PairMeasurements) -> Vec<Finding> {
    let gflops = &measured.compute_gflops;
    if gflops.is_empty() {
        return Vec::new();
    }
    let reference = median(gflops.iter().copied());
    let slow: Vec<usize> = (0..gflops.len()).filter(|&rank| gflops[rank] * COMPUTES_SLOWER < reference).collect();
    let mut findings: Vec<Finding> = Vec::new();
    for &rank in &slow {
        let host = measured.hosts[rank];
        let others = (0..gflops.len()).filter(|&other| measured.hosts[other] == host);
        let all = others.clone().count() > 1 && others.clone().all(|other| slow.contains(&other));
        let place = if all { Place::Host(host) } else { Place::Rank(rank) };
        let slowest = if all { others.map(|other| gflops[other]).fold(f64::MAX, f64::min) } else { gflops[rank] };
        let finding = Finding::Computes { place, times: reference / slowest };
        if !findings.contains(&finding) {
            findings.push(finding);
        }
    }
    findings
}

/// Slow places and slow links in a table of speeds, `[from][to]`. `is_slow` compares a speed with a reference.
fn slow_connections(
    speeds: &[Vec<f64>],
    is_slow: &dyn Fn(f64, f64) -> bool,
    both: Aspect,
    places: &[(Place, Vec<usize>)],
) -> Vec<Finding> {
    let n = speeds.len();
    let others = |of: usize| (0..n).filter(move |&other| other != of);
    let sent: Vec<f64> = (0..n).map(|from| others(from).map(|to| speeds[from][to]).fold(0.0, f64::max)).collect();
    let received: Vec<f64> = (0..n).map(|to| others(to).map(|from| speeds[from][to]).fold(0.0, f64::max)).collect();
    let mut findings = Vec::new();
    let (mut sends_slowly, mut receives_slowly) = (vec![false; n], vec![false; n]);
    // Between two places, whose fault a slow direction is cannot be told.
    if n > 2 {
        let (usually_sent, usually_received) = (upper_median(&sent), upper_median(&received));
        for (index, (place, _)) in places.iter().enumerate() {
            sends_slowly[index] = is_slow(sent[index], usually_sent);
            receives_slowly[index] = is_slow(received[index], usually_received);
            let (aspect, times) = match (sends_slowly[index], receives_slowly[index]) {
                (true, true) => (both, (usually_sent / sent[index]).max(usually_received / received[index])),
                (true, false) => (Aspect::Sending, usually_sent / sent[index]),
                (false, true) => (Aspect::Receiving, usually_received / received[index]),
                (false, false) => continue,
            };
            findings.push(Finding::Connects { place: *place, aspect, times });
        }
    }
    let slow_link = |from: usize, to: usize| -> Option<f64> {
        let reference = if n > 2 { sent[from].min(received[to]) } else { sent[from].max(received[from]) };
        let slow = !sends_slowly[from] && !receives_slowly[to] && is_slow(speeds[from][to], reference);
        slow.then(|| reference / speeds[from][to])
    };
    for first in 0..n {
        for second in first + 1..n {
            let (from, to, aspect, times) = match (slow_link(first, second), slow_link(second, first)) {
                (Some(there), Some(back)) => (first, second, both, there.max(back)),
                (Some(times), None) => (first, second, Aspect::Sending, times),
                (None, Some(times)) => (second, first, Aspect::Sending, times),
                (None, None) => continue,
            };
            findings.push(Finding::Link { from: places[from].0, to: places[to].0, aspect, times });
        }
    }
    findings
}

/// The middle value, the upper one of the middle two: half of the hosts may be slow.
fn upper_median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Ranks that are all alike, up to `noise` of some percent; `hosts` is the host of each.
    fn alike(hosts: &[usize], noise: &[f64]) -> PairMeasurements {
        let n = hosts.len();
        let mut noise = noise.iter().cycle().copied();
        let mut about = |value: f64| value * noise.next().unwrap_or(1.0);
        let mut table =
            |value: f64| -> Vec<Vec<f64>> { (0..n).map(|_| (0..n).map(|_| about(value)).collect()).collect() };
        PairMeasurements {
            hosts: hosts.to_vec(),
            round_trip_us: table(150.0),
            mbit_per_s: table(900.0),
            compute_gflops: (0..n).map(|_| about(40.0)).collect(),
        }
    }

    /// Up to 6 hosts of up to 3 ranks, all hosts alike, and noise.
    fn jobs(fewest_hosts: usize) -> impl Strategy<Value = (Vec<usize>, Vec<f64>)> {
        (fewest_hosts..=6, 1_usize..=3, prop::collection::vec(0.9..1.1, 97))
            .prop_map(|(hosts, ranks, noise)| ((0..hosts * ranks).map(|rank| rank / ranks).collect(), noise))
    }

    fn limit(measured: &mut PairMeasurements, slow: impl Fn(usize, usize) -> bool) {
        for from in 0..measured.hosts.len() {
            for to in 0..measured.hosts.len() {
                if slow(measured.hosts[from], measured.hosts[to]) {
                    measured.mbit_per_s[from][to] /= 3.0;
                }
            }
        }
    }

    /// Findings without how many times.
    fn kinds(measured: &PairMeasurements) -> Vec<(Place, Option<Place>, Option<Aspect>)> {
        let kind = |finding| match finding {
            Finding::Computes { place, .. } => (place, None, None),
            Finding::Connects { place, aspect, .. } => (place, None, Some(aspect)),
            Finding::Link { from, to, aspect, .. } => (from, Some(to), Some(aspect)),
        };
        diagnose(measured).into_iter().map(kind).collect()
    }

    proptest! {
        #[test]
        fn every_pair_meets_once(hosts in prop::collection::vec(0_usize..4, 0..14)) {
            let rounds = pair_rounds(&hosts);
            let mut pairs: Vec<_> = rounds.iter().flatten().copied().collect();
            pairs.sort_unstable();
            pairs.dedup();
            prop_assert_eq!(pairs.len(), hosts.len() * hosts.len().saturating_sub(1) / 2);
            prop_assert_eq!(rounds.iter().map(Vec::len).sum::<usize>(), pairs.len());
            for round in rounds {
                let mut ranks: Vec<_> = round.iter().flat_map(|&(a, b)| [a, b]).collect();
                let apart = round.iter().filter(|&&(a, b)| hosts[a] != hosts[b]);
                let mut busy: Vec<_> = apart.flat_map(|&(a, b)| [hosts[a], hosts[b]]).collect();
                for values in [&mut ranks, &mut busy] {
                    let count = values.len();
                    values.sort_unstable();
                    values.dedup();
                    prop_assert_eq!(values.len(), count);
                }
            }
        }

        #[test]
        fn ranks_that_are_alike_are_not_blamed((hosts, noise) in jobs(1)) {
            prop_assert_eq!(diagnose(&alike(&hosts, &noise)), vec![]);
        }

        #[test]
        fn a_slow_host_is_blamed_and_none_of_its_links((hosts, noise) in jobs(3), which in 0_usize..6) {
            let slow = which % (hosts[hosts.len() - 1] + 1);
            let mut measured = alike(&hosts, &noise);
            limit(&mut measured, |from, to| from == slow || to == slow);
            prop_assert_eq!(kinds(&measured), vec![(Place::Host(slow), None, Some(Aspect::Rate))]);
            let mut measured = alike(&hosts, &noise);
            limit(&mut measured, |from, _| from == slow);
            prop_assert_eq!(kinds(&measured), vec![(Place::Host(slow), None, Some(Aspect::Sending))]);
        }

        #[test]
        fn a_slow_link_is_blamed_and_neither_end((hosts, noise) in jobs(3), first in 0_usize..6, step in 1_usize..5) {
            let count = hosts[hosts.len() - 1] + 1;
            let (a, b) = (first % count, (first % count + 1 + (step - 1) % (count - 1)) % count);
            let (low, high) = (a.min(b), a.max(b));
            let mut measured = alike(&hosts, &noise);
            limit(&mut measured, |from, to| from.min(to) == low && from.max(to) == high);
            let expected = (Place::Host(low), Some(Place::Host(high)), Some(Aspect::Rate));
            prop_assert_eq!(kinds(&measured), vec![expected]);
            let mut measured = alike(&hosts, &noise);
            limit(&mut measured, |from, to| from == a && to == b);
            let expected = (Place::Host(a), Some(Place::Host(b)), Some(Aspect::Sending));
            prop_assert_eq!(kinds(&measured), vec![expected]);
        }

        #[test]
        fn a_rank_that_computes_slowly_is_blamed((hosts, noise) in jobs(3), which in 0_usize..18) {
            let slow = which % hosts.len();
            let mut measured = alike(&hosts, &noise);
            measured.compute_gflops[slow] /= 3.0;
            prop_assert_eq!(kinds(&measured), vec![(Place::Rank(slow), None, None)]);
        }
    }

    #[test]
    fn between_two_hosts_only_a_direction_can_be_slow() {
        let mut measured = alike(&[0, 1], &[1.0]);
        limit(&mut measured, |_, _| true);
        assert_eq!(diagnose(&measured), vec![]);
        limit(&mut measured, |from, _| from == 1);
        let (from, to) = (Place::Host(1), Place::Host(0));
        assert_eq!(diagnose(&measured), vec![Finding::Link { from, to, aspect: Aspect::Sending, times: 3.0 }]);
    }

    #[test]
    fn half_of_the_hosts_may_be_slow() {
        let mut measured = alike(&[0, 1, 2, 3], &[1.0]);
        limit(&mut measured, |from, to| from < 2 || to < 2);
        let blamed = [0, 1].map(|host| (Place::Host(host), None, Some(Aspect::Rate)));
        assert_eq!(kinds(&measured), blamed);
    }

    #[test]
    fn ranks_of_one_host_are_told_apart() {
        let mut measured = alike(&[0; 4], &[1.0]);
        measured.round_trip_us[1][3] = 5000.0;
        measured.round_trip_us[3][1] = 5000.0;
        assert_eq!(kinds(&measured), vec![(Place::Rank(1), Some(Place::Rank(3)), Some(Aspect::RoundTrip))]);
        measured.round_trip_us = vec![vec![150.0; 4]; 4];
        for other in 0..4 {
            measured.round_trip_us[2][other] = 4000.0;
            measured.round_trip_us[other][2] = 4000.0;
        }
        assert_eq!(kinds(&measured), vec![(Place::Rank(2), None, Some(Aspect::RoundTrip))]);
    }

    #[test]
    fn a_host_whose_ranks_all_compute_slowly() {
        let mut measured = alike(&[0, 0, 1, 1, 2, 2], &[1.0]);
        measured.compute_gflops[2] = 10.0;
        measured.compute_gflops[3] = 15.0;
        assert_eq!(diagnose(&measured), vec![Finding::Computes { place: Place::Host(1), times: 4.0 }]);
    }

    #[test]
    fn nobody_measured_nothing_found() {
        assert_eq!(diagnose(&PairMeasurements::default()), vec![]);
    }
}
