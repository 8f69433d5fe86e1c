//! `lina-auto`: finds the sizes of the `lina` policy on the job's own steps.
//!
//! The best size of a micro-op depends on the model, the batch and the network: a large one does not fit between two
//! all-to-alls, a small one pays its overhead too often. The paper takes one size (30 MB) from a sweep on its cluster.
//! The [`Tuner`] makes the sweep where it counts, by coordinate search: it changes one setting, trains a few steps with
//! it, keeps the change if the median step became shorter, and goes on in that direction while it pays. The first
//! micro-op size that it tries is not a guess: it follows from the gaps and the rate that steps have measured
//! ([`LinkUse::suggested_partition_bytes`](crate::LinkUse::suggested_partition_bytes)).
//!
//! All ranks feed it the same agreed numbers, so all change at the same step.

use serde::{Deserialize, Serialize};

use crate::median;
use crate::policy::PolicySettings;

/// Steps after which the search has ended, whatever it has found.
pub const TUNING_STEPS: u64 = 40;
/// Steps of a trial. In its first one a policy measures its gradients (see [`GapPlan`](crate::GapPlan)): it does not
/// count.
const TRIAL_STEPS: usize = 4;
/// What a change has to gain, as a share of the step, to be kept: less could be chance.
const LEAST_GAIN: f64 = 0.005;
/// Chunks beyond which nothing is tried: a chunk's overhead is paid four times a layer.
const MOST_CHUNKS: usize = 16;
/// Smallest micro-op that is tried.
const SMALLEST_PARTITION_BYTES: usize = 4096;

/// What one step says of its settings, agreed between the ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TuningSample {
    /// Time of the step, in nanoseconds.
    pub step_ns: f64,
    /// The micro-op size that the measured gaps and rate suggest, where both are known.
    pub suggested_partition_bytes: Option<usize>,
}

/// A change of one setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Change {
    Suggested,
    MoreChunks,
    FewerChunks,
    DeferAttention,
    Hierarchical,
    SmallerPartition,
    LargerPartition,
}

impl Change {
    /// In the order in which they are tried: what gains most comes first.
    const ALL: [Change; 7] = [
        Change::Suggested,
        Change::Hierarchical,
        Change::MoreChunks,
        Change::FewerChunks,
        Change::DeferAttention,
        Change::LargerPartition,
        Change::SmallerPartition,
    ];

    /// `settings` with the change; the same where there is nothing to change.
    fn of(self, settings: PolicySettings, suggested_bytes: Option<usize>) -> PolicySettings {
        let mut changed = settings;
        let PolicySettings { partition_bytes, pipeline_chunks, .. } = settings;
        match self {
            Change::Suggested => changed.partition_bytes = suggested_bytes.unwrap_or(partition_bytes),
            Change::MoreChunks => changed.pipeline_chunks = (2 * pipeline_chunks).min(MOST_CHUNKS.max(pipeline_chunks)),
            Change::FewerChunks => changed.pipeline_chunks = (pipeline_chunks / 2).max(1),
            Change::DeferAttention => changed.defer_attention_gradients = true,
            Change::Hierarchical => changed.hierarchical_all_to_all = true,
            Change::SmallerPartition => {
                changed.partition_bytes = (partition_bytes / 2).max(SMALLEST_PARTITION_BYTES.min(partition_bytes));
            }
            Change::LargerPartition => changed.partition_bytes = partition_bytes.saturating_mul(2),
        }
        changed
    }
}

/// Searches the settings of `lina-auto`. Everything about it is in its fields, so that a run can go on from a
/// checkpoint as if it had never stopped.
///
/// ```
/// use lina_plan::{PolicySettings, Tuner, TuningSample};
/// // A cluster on which steps take longer with more chunks than one.
/// let mut tuner = Tuner::new(PolicySettings::default(), false);
/// for _ in 0..40 {
///     let step_ns = 1e6 * tuner.settings().pipeline_chunks as f64;
///     tuner.step(TuningSample { step_ns, suggested_partition_bytes: None });
/// }
/// assert!(tuner.settled());
/// assert_eq!(tuner.settings().pipeline_chunks, 1);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuner {
    /// On trial now, or, once the search has ended, for good.
    settings: PolicySettings,
    /// The best so far and its median step in nanoseconds.
    best: Option<(PolicySettings, f64)>,
    /// Everything that has been on trial.
    tried: Vec<PolicySettings>,
    /// The place in [`Change::ALL`] of the change on trial.
    change: usize,
    /// The first suggestion.
    suggested_bytes: Option<usize>,
    /// Whether the cluster has nodes with several ranks.
    has_nodes: bool,
    /// Steps of the trial so far, in nanoseconds.
    trial_ns: Vec<f64>,
    /// Steps observed.
    steps: u64,
    settled: bool,
}

impl Tuner {
    /// A search that begins with `start`. `has_nodes` says whether some node has several ranks while there are several
    /// nodes: otherwise all-to-alls have one way only.
    pub fn new(start: PolicySettings, has_nodes: bool) -> Self {
        Tuner {
            settings: start,
            best: None,
            tried: vec![start],
            change: 0,
            suggested_bytes: None,
            has_nodes,
            trial_ns: Vec::new(),
            steps: 0,
            settled: false,
        }
    }

    /// The settings of the next step.
    pub fn settings(&self) -> &PolicySettings {
        &self.settings
    }

    /// Whether the search has ended.
    pub fn settled(&self) -> bool {
        self.settled
    }

    /// Median step with the best settings so far, in nanoseconds; `None` before the first trial has ended.
    pub fn best_step_ns(&self) -> Option<f64> {
        self.best.map(|(_, step_ns)| step_ns)
    }

    /// Steps that the search has taken so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Takes a finished step in. Returns the settings to change to before the next one, if they are others.
    pub fn step(&mut self, sample: TuningSample) -> Option<PolicySettings> {
        if self.settled {
            return None;
        }
        self.steps += 1;
        self.trial_ns.push(sample.step_ns);
        self.suggested_bytes = self.suggested_bytes.or(sample.suggested_partition_bytes);
        if self.trial_ns.len() < TRIAL_STEPS {
            return None;
        }
        let step_ns = median(self.trial_ns.drain(..).skip(1));
        let before = self.settings;
        let (best, best_ns) = match self.best {
            Some((best, best_ns)) if step_ns > best_ns * (1.0 - LEAST_GAIN) => {
                self.change += 1;
                (best, best_ns)
            }
            _ => (before, step_ns),
        };
        self.best = Some((best, best_ns));
        let next = (self.steps + TRIAL_STEPS as u64 <= TUNING_STEPS).then(|| self.next_trial(best)).flatten();
        self.settled = next.is_none();
        self.settings = next.unwrap_or(best);
        self.tried.push(self.settings);
        (self.settings != before).then_some(self.settings)
    }

    /// The next neighbour of `best` that has not been tried.
    fn next_trial(&mut self, best: PolicySettings) -> Option<PolicySettings> {
        while let Some(&change) = Change::ALL.get(self.change) {
            let candidate = change.of(best, self.suggested_bytes);
            let possible = change != Change::Hierarchical || self.has_nodes;
            if possible && !self.tried.contains(&candidate) {
                return Some(candidate);
            }
            self.change += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn start() -> PolicySettings {
        PolicySettings { partition_bytes: 30 << 20, pipeline_chunks: 2, ..PolicySettings::default() }
    }

    /// Runs a search on a cluster that `measure` describes; returns it and how often it changed.
    fn search(mut tuner: Tuner, measure: impl Fn(&PolicySettings) -> f64) -> (Tuner, usize) {
        let mut changes = 0;
        for _ in 0..TUNING_STEPS {
            let sample = TuningSample { step_ns: measure(tuner.settings()), suggested_partition_bytes: Some(1 << 18) };
            let before = *tuner.settings();
            let change = tuner.step(sample);
            assert_eq!(change.is_some(), *tuner.settings() != before);
            changes += usize::from(change.is_some());
        }
        (tuner, changes)
    }

    /// A valley: worse with the distance from `best` on each axis.
    fn valley(best: PolicySettings) -> impl Fn(&PolicySettings) -> f64 {
        move |settings| {
            let octaves = |a: usize, b: usize| (a as f64 / b as f64).log2().abs();
            let same = |a: bool, b: bool| if a == b { 0.0 } else { 1.0 };
            1e6 * (10.0
                + octaves(settings.partition_bytes, best.partition_bytes)
                + octaves(settings.pipeline_chunks, best.pipeline_chunks)
                + same(settings.defer_attention_gradients, best.defer_attention_gradients)
                + same(settings.hierarchical_all_to_all, best.hierarchical_all_to_all))
        }
    }

    #[test]
    fn it_finds_the_valley() {
        for (partition_bytes, pipeline_chunks, flag) in [(1 << 18, 2, false), (1 << 17, 4, true), (1 << 19, 1, true)] {
            let best = PolicySettings {
                partition_bytes,
                pipeline_chunks,
                defer_attention_gradients: flag,
                hierarchical_all_to_all: flag,
                ..start()
            };
            let (tuner, _) = search(Tuner::new(start(), true), valley(best));
            assert!(tuner.settled());
            assert_eq!(*tuner.settings(), best);
        }
    }

    #[test]
    fn where_nothing_gains_it_returns_to_the_start() {
        let (tuner, changes) =
            search(Tuner::new(start(), false), |settings| if *settings == start() { 1e6 } else { 1.004e6 });
        assert_eq!((*tuner.settings(), tuner.settled()), (start(), true));
        assert!(changes > 1);
        let (tuner, _) = search(Tuner::new(start(), false), |_| 1e6);
        assert_eq!(*tuner.settings(), start());
    }

    #[test]
    fn one_node_has_one_way() {
        let way = |has_nodes| {
            let (tuner, _) =
                search(
                    Tuner::new(start(), has_nodes),
                    |settings| {
                        if settings.hierarchical_all_to_all { 1e6 } else { 2e6 }
                    },
                );
            tuner.settings().hierarchical_all_to_all
        };
        assert!(way(true) && !way(false));
    }

    proptest! {
        #[test]
        fn it_settles_in_time_on_the_best_it_has_seen_and_anybody_repeats_it(
            times in prop::collection::vec(1f64..1e9, TUNING_STEPS as usize),
            has_nodes: bool,
            suggested in prop::option::of(4096usize..1 << 26),
        ) {
            let mut tuner = Tuner::new(start(), has_nodes);
            let mut copy = tuner.clone();
            let mut trials: Vec<(PolicySettings, f64)> = Vec::new();
            for trial in times.chunks(TRIAL_STEPS) {
                let settings = *tuner.settings();
                if !tuner.settled() {
                    trials.push((settings, median(trial[1..].iter().copied())));
                }
                for &step_ns in trial {
                    let sample = TuningSample { step_ns, suggested_partition_bytes: suggested };
                    prop_assert_eq!(tuner.step(sample), copy.step(sample));
                    copy = serde_json::from_str(&serde_json::to_string(&copy).unwrap()).unwrap();
                }
            }
            prop_assert!(tuner.settled());
            let fastest = trials.iter().map(|(_, ns)| *ns).fold(f64::INFINITY, f64::min);
            let (_, chosen) = trials.iter().find(|(settings, _)| settings == tuner.settings()).unwrap();
            // A gain below the threshold is passed over, once for each trial at most.
            prop_assert!(*chosen * (1.0 - LEAST_GAIN).powi(trials.len() as i32) <= fastest);
            prop_assert!(*chosen <= trials[0].1);
            for (number, (settings, _)) in trials.iter().enumerate() {
                prop_assert!(!trials[..number].iter().any(|(other, _)| other == settings), "tried twice");
            }
        }
    }
}
