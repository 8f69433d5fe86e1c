//! How many experts a rank holds: the controller of expert packing.
//!
//! With one expert a rank, the experts' feed-forward on a chunk of tokens is much shorter than the all-to-all that
//! brings the next chunk, and computation waits. Holding more experts shortens the all-to-alls: fewer tokens leave
//! their rank, or their node. The controller doubles the experts of a rank until a feed-forward micro-op takes longer
//! than an all-to-all micro-op, first after step 10, then every 4 steps ("Accelerating Distributed MoE Training and
//! Inference with Lina", USENIX ATC 2023). The paper does not count what packing costs: gradients of experts with
//! replicas have to be reduced, more parameters have to be updated. So the median step before a change is compared
//! with the one after it; a change that does not pay is undone, and the controller rests. `lina-auto` counts before it
//! tries, too ([`PackingForecast`]).
//!
//! All ranks feed it the same agreed numbers ([`PackingSample::agreed`]), so all come to the same decisions.

use serde::{Deserialize, Serialize};

use crate::gaps::LinkUse;
use crate::layout::{ExpertLayout, LayoutError};
use crate::median;

/// Steps before the first decision.
const FIRST_DECISION_STEPS: u64 = 10;
/// Steps between two decisions, and the steps that a decision looks back on.
const DECISION_STEPS: u64 = 4;

/// What one step says of packing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PackingSample {
    /// Time of the step, in nanoseconds.
    pub step_ns: f64,
    /// Mean time of an expert feed-forward micro-op (one layer's work on one chunk, in one direction), in nanoseconds.
    pub ffn_micro_op_ns: f64,
    /// Mean time of a dispatch or combine micro-op, in nanoseconds.
    pub all_to_all_micro_op_ns: f64,
    /// Mean time for which computation waited for all-to-alls, in nanoseconds.
    pub all_to_all_wait_ns: f64,
    /// What the next rung would bring, where that is to be counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forecast: Option<PackingForecast>,
}

/// What going up one rung is expected to change in a step, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PackingForecast {
    /// Less waiting for all-to-alls, since a smaller share of the tokens leaves its rank, or its node.
    pub gain_ns: f64,
    /// Reduction of the replicas' gradients that does not fit into the gaps any more.
    pub cost_ns: f64,
}

/// What a forecast has to know of the model and the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaCosts {
    /// Gradients of one expert of every MoE layer, in bytes.
    pub expert_bytes: usize,
    /// Number of nodes, which ranks fill in order, evenly.
    pub nodes: usize,
}

/// Values that a rank adds to a step's closing sum for [`PackingSample::agreed`].
pub const PACKING_VALUES: usize = 6;

impl PackingSample {
    /// The sample that all ranks agree on, from the sum over `ranks` of what each measured: time of the step, time
    /// and number of feed-forward micro-ops, time and number of all-to-all micro-ops, time waited for all-to-alls.
    pub fn agreed(sums: [f64; PACKING_VALUES], ranks: usize) -> Self {
        let [step_ns, ffn_ns, ffn_micro_ops, all_to_all_ns, all_to_all_micro_ops, wait_ns] = sums;
        PackingSample {
            step_ns: step_ns / ranks as f64,
            ffn_micro_op_ns: ffn_ns / ffn_micro_ops.max(1.0),
            all_to_all_micro_op_ns: all_to_all_ns / all_to_all_micro_ops.max(1.0),
            all_to_all_wait_ns: wait_ns / ranks as f64,
            forecast: None,
        }
    }
}

/// The layouts between which packing chooses: the one that a run starts with, then the experts of a rank doubled and
/// doubled again, up to all experts of a layer or a given limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackingLadder {
    layouts: Vec<ExpertLayout>,
}

impl PackingLadder {
    /// The ladder that begins with the layout of `experts`, `ranks` and `per_rank` (as [`ExpertLayout::new`] takes
    /// them) and goes up to `most` experts a rank. The first layout is on it whatever the limit.
    ///
    /// # Errors
    /// If the first layout cannot be.
    pub fn new(experts: usize, ranks: usize, per_rank: Option<usize>, most: usize) -> Result<Self, LayoutError> {
        let mut layouts = vec![ExpertLayout::new(experts, ranks, per_rank)?];
        let most = most.min(experts);
        let mut per_rank = layouts[0].most_per_rank();
        while per_rank < most {
            per_rank = (2 * per_rank).min(most);
            layouts.push(ExpertLayout::new(experts, ranks, Some(per_rank))?);
        }
        Ok(PackingLadder { layouts })
    }

    /// The layouts, fewest experts a rank first.
    pub fn layouts(&self) -> &[ExpertLayout] {
        &self.layouts
    }

    /// The ladder without the layouts above its first `rungs`, at least one: those that do not fit in memory, say.
    #[must_use]
    pub fn truncated(mut self, rungs: usize) -> Self {
        self.layouts.truncate(rungs.max(1));
        self
    }

    /// What the rung above `rung` would change in a step in which computation waits `wait_ns` for all-to-alls; `None`
    /// on the last rung. Waiting shrinks with the share of (rank, expert) pairs that lie apart: on different nodes, or
    /// on different ranks where every rank is a node. The replicas' reduction is counted on the rank that holds most,
    /// at the measured rate, and costs what the gaps do not have room for.
    pub fn forecast(&self, rung: usize, costs: ReplicaCosts, link: &LinkUse, wait_ns: f64) -> Option<PackingForecast> {
        let (old, new) = (self.layouts.get(rung)?, self.layouts.get(rung + 1)?);
        let ranks = old.ranks();
        let node_of = |rank: usize| rank * costs.nodes / ranks;
        let apart = |layout: &ExpertLayout| {
            let pairs = (0..ranks).flat_map(|rank| (0..layout.experts()).map(move |expert| (rank, expert)));
            pairs.filter(|&(rank, expert)| node_of(rank) != node_of(layout.destination(rank, expert))).count() as f64
        };
        // Of each byte, a reduction over n ranks sends and receives (n - 1) / n twice; the rate is one of all ranks.
        let volume = |n: usize| (n - 1) as f64 / n as f64;
        let whole = volume(ranks).max(f64::MIN_POSITIVE);
        let reduced_bytes = |layout: &ExpertLayout| {
            let of_rank = |rank: usize| -> f64 {
                layout.held_by(rank).iter().map(|&expert| volume(layout.holders(expert).len()) / whole).sum()
            };
            (0..ranks).map(of_rank).fold(0.0, f64::max) * costs.expert_bytes as f64
        };
        let before = apart(old);
        let gain_ns = if before > 0.0 { wait_ns * (1.0 - apart(new) / before).max(0.0) } else { 0.0 };
        let reducing_ns = (reduced_bytes(new) - reduced_bytes(old)) / link.bytes_per_ns;
        Some(PackingForecast { gain_ns, cost_ns: (reducing_ns - link.spare_ns).max(0.0) })
    }

    /// Steps after which a controller has surely come to the top, or to rest.
    pub fn longest_climb_steps(&self) -> u64 {
        FIRST_DECISION_STEPS + DECISION_STEPS * self.layouts.len() as u64
    }
}

/// Decides how many experts a rank holds. Everything about it is in its fields, so that a run can go on from a
/// checkpoint as if it had never stopped.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackingController {
    /// Where on the ladder it is: 0 is the layout that the run started with.
    rung: usize,
    /// Steps observed.
    steps: u64,
    /// The last steps in the present layout, oldest first, at most [`DECISION_STEPS`].
    window: Vec<PackingSample>,
    /// The median step before the last change, in nanoseconds, while that change is on trial.
    before_ns: Option<f64>,
    /// A change did not pay: no more of them.
    rests: bool,
    /// Whether the last decision was to stay, so that nothing is on trial.
    stays: bool,
}

impl PackingController {
    /// The rung that is in force.
    pub fn rung(&self) -> usize {
        self.rung
    }

    /// Whether a change did not pay and was undone, after which no other follows.
    pub fn rests(&self) -> bool {
        self.rests
    }

    /// Whether nothing is on trial and no change was due at the last decision. A later one may still come.
    pub fn settled(&self) -> bool {
        self.rests || self.stays
    }

    /// Whether the controller's rung is on `ladder`; one of another run's checkpoint may not be.
    pub fn fits(&self, ladder: &PackingLadder) -> bool {
        self.rung < ladder.layouts.len()
    }

    /// Takes a finished step in. Returns the rung to change to before the next one, if it is another.
    pub fn step(&mut self, ladder: &PackingLadder, sample: PackingSample) -> Option<usize> {
        if self.window.len() as u64 >= DECISION_STEPS {
            self.window.remove(0);
        }
        self.window.push(sample);
        self.steps += 1;
        let due = self.steps >= FIRST_DECISION_STEPS
            && (self.steps - FIRST_DECISION_STEPS).is_multiple_of(DECISION_STEPS)
            && self.window.len() as u64 == DECISION_STEPS;
        if !due || self.rests {
            return None;
        }
        let step_ns = median(self.window.iter().map(|sample| sample.step_ns));
        if self.before_ns.take().is_some_and(|before_ns| step_ns > before_ns) {
            self.rests = true;
            return Some(self.change_to(self.rung.saturating_sub(1)));
        }
        let mean = |of: fn(&PackingSample) -> f64| self.window.iter().map(of).sum::<f64>() / DECISION_STEPS as f64;
        let ffn_is_shorter = mean(|sample| sample.ffn_micro_op_ns) < mean(|sample| sample.all_to_all_micro_op_ns);
        let pays = |forecast: PackingForecast| forecast.gain_ns > forecast.cost_ns;
        let promises = sample.forecast.is_none_or(pays);
        if ffn_is_shorter && promises && self.rung + 1 < ladder.layouts.len() {
            self.before_ns = Some(step_ns);
            self.stays = false;
            return Some(self.change_to(self.rung + 1));
        }
        self.stays = true;
        None
    }

    fn change_to(&mut self, rung: usize) -> usize {
        self.rung = rung;
        self.window.clear();
        rung
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(step_ns: f64, ffn_micro_op_ns: f64, all_to_all_micro_op_ns: f64) -> PackingSample {
        PackingSample { step_ns, ffn_micro_op_ns, all_to_all_micro_op_ns, ..PackingSample::default() }
    }

    /// The changes over 60 steps, as (steps done, experts a rank), on a cluster that `measure` describes.
    fn changes(ladder: &PackingLadder, measure: impl Fn(usize) -> PackingSample) -> Vec<(u64, usize)> {
        let mut controller = PackingController::default();
        let per_rank = |rung: usize| ladder.layouts()[rung].most_per_rank();
        (1..=60)
            .filter_map(|steps| {
                let sample = measure(per_rank(controller.rung()));
                controller.step(ladder, sample).map(|rung| (steps, per_rank(rung)))
            })
            .collect()
    }

    #[test]
    fn experts_double_until_the_feed_forward_takes_longer() {
        let ladder = PackingLadder::new(8, 8, None, 8).unwrap();
        let measure = |per_rank: usize| sample(100.0 / per_rank as f64, 10.0, 35.0 / per_rank as f64);
        assert_eq!(changes(&ladder, measure), [(10, 2), (14, 4)]);
        assert_eq!(changes(&ladder, |_| sample(100.0, 10.0, 9.0)), []);
    }

    #[test]
    fn what_does_not_pay_is_undone_for_good() {
        let ladder = PackingLadder::new(8, 8, None, 8).unwrap();
        // The replicas' reduction costs more than their all-to-alls.
        let measure = |per_rank: usize| sample([0.0, 100.0, 90.0, 0.0, 95.0][per_rank], 1.0, 9.0);
        assert_eq!(changes(&ladder, measure), [(10, 2), (14, 4), (18, 2)]);
    }

    #[test]
    fn what_promises_nothing_is_not_tried() {
        let ladder = PackingLadder::new(8, 8, None, 8).unwrap();
        let with = |forecast: PackingForecast| {
            changes(&ladder, |_| PackingSample { forecast: Some(forecast), ..sample(100.0, 1.0, 9.0) })
        };
        assert_eq!(with(PackingForecast { gain_ns: 5.0, cost_ns: 6.0 }), []);
        assert_eq!(with(PackingForecast { gain_ns: 7.0, cost_ns: 6.0 })[0], (10, 2));
    }

    #[test]
    fn a_forecast_weighs_tokens_that_stay_against_replicas_that_are_reduced() {
        let ladder = PackingLadder::new(8, 8, None, 8).unwrap();
        let link = LinkUse { bytes_per_ns: 2.0, spare_ns: 100.0, median_gap_ns: 10.0 };
        let forecast =
            |rung, nodes, wait_ns| ladder.forecast(rung, ReplicaCosts { expert_bytes: 7000, nodes }, &link, wait_ns);
        // Two experts a rank: with nodes of four, every expert is in every node. Each of the two is reduced over two
        // ranks: half of its bytes against 7/8 over all ranks, 2 * 7000 * 4/7 bytes at 2 bytes/ns, 100 ns of them hidden.
        assert_eq!(forecast(0, 2, 1000.0), Some(PackingForecast { gain_ns: 1000.0, cost_ns: 3900.0 }));
        // Without nodes, 6 of 8 experts are elsewhere instead of 7.
        let PackingForecast { gain_ns, .. } = forecast(0, 8, 1000.0).unwrap();
        assert!((gain_ns - 1000.0 / 7.0).abs() < 1e-9, "{gain_ns}");
        assert_eq!(forecast(1, 2, 1000.0).unwrap().gain_ns, 0.0);
        assert_eq!(forecast(3, 2, 1000.0), None);
    }

    #[test]
    fn the_first_step_of_a_layout_may_be_slow() {
        let ladder = PackingLadder::new(8, 8, None, 2).unwrap();
        let mut controller = PackingController::default();
        for steps in 1..=14 {
            let step_ns = if steps == 11 { 500.0 } else { 100.0 - steps as f64 };
            let change = controller.step(&ladder, sample(step_ns, 1.0, 9.0));
            assert_eq!(change, (steps == 10).then_some(1), "after {steps} steps");
        }
    }

    #[test]
    fn ladders_end_at_the_limit() {
        let per_rank = |ladder: PackingLadder| -> Vec<usize> {
            ladder.layouts().iter().map(ExpertLayout::most_per_rank).collect()
        };
        assert_eq!(per_rank(PackingLadder::new(8, 8, None, 8).unwrap()), [1, 2, 4, 8]);
        assert_eq!(per_rank(PackingLadder::new(6, 4, None, 6).unwrap()), [2, 4, 6]);
        assert_eq!(per_rank(PackingLadder::new(8, 8, Some(2), 5).unwrap()), [2, 4, 5]);
        assert_eq!(per_rank(PackingLadder::new(8, 8, Some(2), 1).unwrap()), [2]);
        assert_eq!(per_rank(PackingLadder::new(8, 8, None, 8).unwrap().truncated(2)), [1, 2]);
        assert_eq!(per_rank(PackingLadder::new(4, 1, None, 4).unwrap().truncated(0)), [4]);
        assert!(PackingLadder::new(8, 2, Some(1), 8).is_err());
    }

    #[test]
    fn means_are_over_all_ranks_micro_ops() {
        let agreed = PackingSample::agreed([200.0, 60.0, 6.0, 90.0, 3.0, 14.0], 2);
        assert_eq!(agreed, PackingSample { all_to_all_wait_ns: 7.0, ..sample(100.0, 10.0, 30.0) });
        assert_eq!(PackingSample::agreed([0.0; PACKING_VALUES], 2), PackingSample::default());
    }

    proptest! {
        #[test]
        fn it_comes_to_rest_within_its_ladder_and_anybody_repeats_it(
            experts in 1usize..40,
            ranks in 1usize..20,
            most in 1usize..40,
            times in prop::collection::vec((1f64..1e9, 0f64..1e6, 0f64..1e6), 200),
        ) {
            let ladder = PackingLadder::new(experts, ranks, None, most).unwrap();
            let (mut one, mut other) = (PackingController::default(), PackingController::default());
            let mut changes = 0;
            for (number, &(step_ns, ffn, all_to_all)) in times.iter().enumerate() {
                let sample = sample(step_ns, ffn, all_to_all);
                let before = one.rung();
                let change = one.step(&ladder, sample);
                prop_assert_eq!(change, other.step(&ladder, sample));
                // A controller that is written down and read again goes on as if nothing had been.
                if number % 7 == 0 {
                    other = serde_json::from_str(&serde_json::to_string(&one).unwrap()).unwrap();
                }
                prop_assert!(one.fits(&ladder));
                if let Some(rung) = change {
                    changes += 1;
                    prop_assert!(rung == before + 1 || (rung + 1 == before && one.rests()));
                    prop_assert!(number >= 9 && (number - 9) % 4 == 0);
                }
            }
            prop_assert!(changes <= ladder.layouts().len());
        }
    }
}
