//! How many experts a rank holds: the controller of expert packing.
//!
//! With one expert a rank, the experts' feed-forward on a chunk of tokens is much shorter than the all-to-all that
//! brings the next chunk, and computation waits. Holding more experts shortens the all-to-alls: fewer tokens leave
//! their rank, or their node. The controller doubles the experts of a rank until a feed-forward micro-op takes longer
//! than an all-to-all micro-op, first after step 10, then every 4 steps ("Accelerating Distributed MoE Training and
//! Inference with Lina", USENIX ATC 2023). The paper does not count what packing costs: gradients of experts with
//! replicas have to be reduced, more parameters have to be updated. So the median step before a change is compared
//! with the one after it; a change that does not pay is undone, and the controller rests.
//!
//! All ranks feed it the same agreed numbers ([`PackingSample::agreed`]), so all come to the same decisions.

use serde::{Deserialize, Serialize};

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
}

/// Values that a rank adds to a step's closing sum for [`PackingSample::agreed`].
pub const PACKING_VALUES: usize = 5;

impl PackingSample {
    /// The sample that all ranks agree on, from the sum over `ranks` of what each measured: time of the step, time
    /// and number of feed-forward micro-ops, time and number of all-to-all micro-ops.
    pub fn agreed(sums: [f64; PACKING_VALUES], ranks: usize) -> Self {
        let [step_ns, ffn_ns, ffn_micro_ops, all_to_all_ns, all_to_all_micro_ops] = sums;
        PackingSample {
            step_ns: step_ns / ranks as f64,
            ffn_micro_op_ns: ffn_ns / ffn_micro_ops.max(1.0),
            all_to_all_micro_op_ns: all_to_all_ns / all_to_all_micro_ops.max(1.0),
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
        if ffn_is_shorter && self.rung + 1 < ladder.layouts.len() {
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
        PackingSample { step_ns, ffn_micro_op_ns, all_to_all_micro_op_ns }
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
        let agreed = PackingSample::agreed([200.0, 60.0, 6.0, 90.0, 3.0], 2);
        assert_eq!(agreed, sample(100.0, 10.0, 30.0));
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
