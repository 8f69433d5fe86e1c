//! The state machine that says what a rank launches next.
//!
//! **One launch order.** All ranks run the same program, so they submit the same operations in the same order, and
//! hold the same [`GapPlan`]. An all-to-all launches at once, but only after every allreduce that the plan puts
//! before it; an allreduce launches within its gap when the link is free. What differs between ranks is *when*;
//! the order is the same by construction, whatever the delays. Allreduces of a gap that had no time launch right
//! before the all-to-all that ends the gap, and the next plan moves them.

use std::collections::VecDeque;

use crate::cutter::{GradientCutter, MicroOp};
use crate::gaps::{GapMeasurement, GapPlan, GapTimings};
use crate::operation::{AllToAllKind, GroupId, Nanos};
use crate::policy::{GapRule, PolicyRules, Route};

/// A decision: hand this operation to the engine now. Indices count within the step, per class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Launch {
    /// The all-to-all submitted as number `index`.
    AllToAll {
        /// Number within the step.
        index: u32,
    },
    /// The next micro-op of the gradient stream.
    AllReduce {
        /// Number within the step.
        index: u32,
        /// What to reduce.
        op: MicroOp,
    },
}

/// Decides one rank's launches, step by step.
///
/// ```
/// use lina_plan::*;
/// let rules = PolicyRules::new(Policy::Lina, &PolicySettings::default());
/// let mut sequencer = Sequencer::default();
/// sequencer.begin_step(0, rules, GapPlan::default());
/// sequencer.begin_micro_batch(true);
/// sequencer.gradient_ready(10, GroupId::WORLD, 1000);
/// assert_eq!(sequencer.next_launch(), None); // without a measured plan, gradients wait for the step's tail
/// sequencer.flush(20);
/// assert!(matches!(sequencer.next_launch(), Some(Launch::AllReduce { index: 0, .. })));
/// ```
#[derive(Debug)]
pub struct Sequencer {
    rules: PolicyRules,
    plan: GapPlan,
    cutter: GradientCutter,
    /// Whether gradients of the current micro-batch are reduced.
    reduces: bool,
    all_to_alls_submitted: u32,
    all_to_alls_done: u32,
    /// Cut and not yet launched.
    ready: VecDeque<MicroOp>,
    all_reduces_launched: u32,
    all_reduces_done: u32,
    /// How many micro-ops may launch by the end of the open gap, under rules without a plan.
    static_limit: u32,
    flushed: bool,
    decided: VecDeque<Launch>,
    measurement: GapMeasurement,
    /// When the allreduce in flight launched, and whether an all-to-all has shared the link since.
    all_reduce_alone_since: Option<Nanos>,
}

impl Default for Sequencer {
    fn default() -> Self {
        let rules = PolicyRules::new(crate::Policy::Fair, &crate::PolicySettings::default());
        Sequencer {
            rules,
            plan: GapPlan::default(),
            cutter: GradientCutter::new(rules.unit),
            reduces: true,
            all_to_alls_submitted: 0,
            all_to_alls_done: 0,
            ready: VecDeque::new(),
            all_reduces_launched: 0,
            all_reduces_done: 0,
            static_limit: 0,
            flushed: false,
            decided: VecDeque::new(),
            measurement: GapMeasurement::default(),
            all_reduce_alone_since: None,
        }
    }
}

impl Sequencer {
    /// A step begins. Everything of the step before is done.
    pub fn begin_step(&mut self, now: Nanos, rules: PolicyRules, plan: GapPlan) {
        debug_assert!(self.is_idle(), "a step begins before the last one has ended");
        self.rules = rules;
        self.plan = plan;
        self.cutter = GradientCutter::new(rules.unit);
        self.reduces = true;
        self.all_to_alls_submitted = 0;
        self.all_to_alls_done = 0;
        self.all_reduces_launched = 0;
        self.all_reduces_done = 0;
        self.static_limit = 0;
        self.flushed = false;
        self.measurement.begin(now);
        self.all_reduce_alone_since = None;
    }

    /// A micro-batch begins; with gradient accumulation only the `last` one of a step reduces.
    pub fn begin_micro_batch(&mut self, last: bool) {
        self.reduces = last;
    }

    /// Whether gradients of the current micro-batch are reduced (the last one's), so that the body knows what to
    /// keep of those it is handed.
    pub fn reduces(&self) -> bool {
        self.reduces
    }

    /// The way that the step's all-to-alls go.
    pub fn route(&self) -> Route {
        self.rules.moe.route
    }

    /// An all-to-all is handed over. Returns its index.
    pub fn all_to_all_submitted(&mut self, now: Nanos, kind: &AllToAllKind) -> u32 {
        self.end_gap();
        let created = self.created();
        let index = self.all_to_alls_submitted;
        self.measurement.all_to_all_submitted(now, self.all_to_alls_outstanding(), kind.opens_gap());
        self.all_to_alls_submitted += 1;
        self.all_reduce_alone_since = None;
        self.decided.push_back(Launch::AllToAll { index });
        if kind.opens_gap() {
            self.static_limit = created;
        }
        index
    }

    /// A gradient of `elements` elements is ready to be summed over `group`.
    pub fn gradient_ready(&mut self, now: Nanos, group: GroupId, elements: usize) {
        if self.reduces {
            let outstanding = self.all_to_alls_outstanding();
            let Sequencer { cutter, ready, measurement, .. } = self;
            cutter.push(group, elements, &mut |op| {
                measurement.all_reduce_ready(now, op, outstanding);
                ready.push_back(op);
            });
            self.fill_gap(now);
        }
    }

    /// Backward is over; what has not launched launches now.
    pub fn flush(&mut self, now: Nanos) {
        let outstanding = self.all_to_alls_outstanding();
        let Sequencer { cutter, ready, measurement, .. } = self;
        cutter.flush(&mut |op| {
            measurement.all_reduce_ready(now, op, outstanding);
            ready.push_back(op);
        });
        self.flushed = true;
        self.fill_gap(now);
    }

    /// The oldest outstanding all-to-all is complete on this rank.
    pub fn all_to_all_done(&mut self, now: Nanos) {
        self.all_to_alls_done += 1;
        if !self.all_to_alls_outstanding() {
            self.measurement.all_to_alls_done(now);
            self.fill_gap(now);
        }
    }

    /// Allreduce `index` is complete on this rank: the oldest of those outstanding in which the rank takes part, or,
    /// right at its launch, one in which it takes no part (not a `member`).
    pub fn all_reduce_done(&mut self, now: Nanos, index: u32, member: bool) {
        self.all_reduces_done += 1;
        if member {
            if let Some(since) = self.all_reduce_alone_since {
                self.measurement.all_reduce_took(index, now - since);
            }
            self.all_reduce_alone_since =
                (self.all_reduces_outstanding() && !self.all_to_alls_outstanding()).then_some(now);
        }
        self.fill_gap(now);
    }

    /// The next operation to hand to the engine, in order.
    pub fn next_launch(&mut self) -> Option<Launch> {
        self.decided.pop_front()
    }

    /// Whether every gradient that was handed over has been reduced and nothing more is to come.
    pub fn gradients_finished(&self) -> bool {
        self.flushed && self.ready.is_empty() && !self.all_reduces_outstanding()
    }

    /// What the step looked like, for the next plan.
    pub fn timings(&self) -> GapTimings {
        self.measurement.timings()
    }

    fn is_idle(&self) -> bool {
        self.ready.is_empty() && !self.all_reduces_outstanding() && !self.all_to_alls_outstanding()
    }

    fn all_to_alls_outstanding(&self) -> bool {
        self.all_to_alls_done < self.all_to_alls_submitted
    }

    fn all_reduces_outstanding(&self) -> bool {
        self.all_reduces_done < self.all_reduces_launched
    }

    /// Micro-ops cut so far.
    fn created(&self) -> u32 {
        self.all_reduces_launched + self.ready.len() as u32
    }

    /// How many micro-ops may have launched by the end of the open gap.
    fn limit(&self) -> u32 {
        if self.flushed {
            return self.created();
        }
        match self.rules.gap {
            GapRule::Eager => self.created(),
            GapRule::BetweenPairs => self.static_limit,
            GapRule::AfterBackward => 0,
            GapRule::StartsInGap | GapRule::FinishesBetweenPairs => self.plan.launched_by_end(self.measurement.gap()),
        }
    }

    /// Launches what the open gap still owes, since its end has come.
    fn end_gap(&mut self) {
        while self.all_reduces_launched < self.limit() && !self.ready.is_empty() {
            self.launch_all_reduce();
        }
    }

    /// Launches what may launch now: one allreduce at a time while no all-to-all runs or waits, or everything at
    /// once if the rules do not care.
    fn fill_gap(&mut self, now: Nanos) {
        while self.all_reduces_launched < self.limit() && !self.ready.is_empty() {
            let free = !self.all_to_alls_outstanding() && !self.all_reduces_outstanding();
            if !free && self.rules.gap != GapRule::Eager && !self.flushed {
                return;
            }
            if free {
                self.all_reduce_alone_since = Some(now);
            }
            self.launch_all_reduce();
        }
    }

    fn launch_all_reduce(&mut self) {
        if let Some(op) = self.ready.pop_front() {
            self.decided.push_back(Launch::AllReduce { index: self.all_reduces_launched, op });
            self.all_reduces_launched += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Direction, Leg, Policy, PolicySettings};

    #[test]
    fn after_backward_no_allreduce_launches_before_the_flush() {
        for policy in Policy::ALL {
            let rules = PolicyRules {
                gap: GapRule::AfterBackward,
                ..PolicyRules::new(policy, &PolicySettings { bucket_bytes: 4, ..PolicySettings::default() })
            };
            let mut sequencer = Sequencer::default();
            sequencer.begin_step(0, rules, GapPlan::new(&rules, &sequencer.timings(), &[vec![0, 1]]));
            let (mut now, mut launched) = (0, Vec::new());
            for leg in [Leg::Combine, Leg::Dispatch] {
                sequencer.gradient_ready(now, GroupId::WORLD, 10);
                let kind = AllToAllKind { direction: Direction::Backward, leg, layer: 0, chunk: 0, chunks: 1 };
                sequencer.all_to_all_submitted(now, &kind);
                now += 10;
                sequencer.all_to_all_done(now);
                launched.extend(std::iter::from_fn(|| sequencer.next_launch()));
            }
            assert_eq!(launched, [Launch::AllToAll { index: 0 }, Launch::AllToAll { index: 1 }], "{policy}");
            sequencer.flush(now);
            let reduced: Vec<_> = std::iter::from_fn(|| sequencer.next_launch()).collect();
            assert_eq!(reduced.len(), 2, "{policy}: {reduced:?}");
        }
    }

    #[test]
    fn an_allreduce_of_others_leaves_the_measured_one_alone() {
        let rules = PolicyRules::new(Policy::Lina, &PolicySettings::default());
        let mut sequencer = Sequencer::default();
        sequencer.begin_step(0, rules, GapPlan::default());
        for group in [0, 1, 0] {
            sequencer.gradient_ready(0, GroupId(group), 10);
        }
        sequencer.flush(100);
        while let Some(Launch::AllReduce { index, op }) = sequencer.next_launch() {
            if op.group != GroupId::WORLD {
                sequencer.all_reduce_done(100, index, false);
            }
        }
        sequencer.all_reduce_done(130, 0, true);
        sequencer.all_reduce_done(200, 2, true);
        assert_eq!(sequencer.timings().alone, [30.0, 0.0, 70.0]);
        assert!(sequencer.gradients_finished());
    }
}
