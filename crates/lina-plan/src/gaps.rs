//! How many allreduce micro-ops launch in each gap between two all-to-alls.
//!
//! Gap g of a step lies between the submission of its all-to-all g-1 and that of its all-to-all g (gap 0 before the
//! first, the last gap after the last). All ranks hold the same [`GapPlan`] before a step, so all launch in one
//! order; it is made from what earlier steps measured, summed over the ranks ([`GapTimings`]).

use crate::cutter::MicroOp;
use crate::median;
use crate::operation::{GroupId, Nanos};
use crate::policy::{GapRule, PolicyRules};

/// What one step's communication looked like on a rank, and its running mean over steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GapTimings {
    /// For each gap, how long no all-to-all ran or waited before the next was submitted, in nanoseconds.
    pub windows: Vec<f64>,
    /// For each gap, whether it lies between pairs (no all-to-all is imminent).
    pub between_pairs: Vec<bool>,
    /// For each allreduce micro-op, the gap in which it became ready.
    pub ready_gap: Vec<u32>,
    /// For each allreduce micro-op, how long after the opening of that gap it became ready, in nanoseconds.
    pub ready_offset: Vec<f64>,
    /// For each allreduce micro-op, how long it takes while no all-to-all shares the link, in nanoseconds; 0 while
    /// unknown or on a rank outside its group.
    pub alone: Vec<f64>,
    /// The group of each allreduce micro-op.
    pub group: Vec<GroupId>,
    /// The elements of each allreduce micro-op, of 4 bytes.
    pub elements: Vec<usize>,
}

/// Weight of the newest step in the running mean.
const NEWEST: f64 = 0.5;

impl GapTimings {
    /// Takes in a newer step. Where the step's structure differs from before, the past is forgotten.
    pub fn update(&mut self, step: &GapTimings) {
        let same = self.windows.len() == step.windows.len()
            && self.ready_gap == step.ready_gap
            && self.group == step.group
            && self.elements == step.elements
            && self.between_pairs == step.between_pairs;
        if !same {
            *self = step.clone();
            return;
        }
        let blend = |mean: &mut [f64], new: &[f64]| {
            for (mean, new) in mean.iter_mut().zip(new) {
                *mean += NEWEST * (new - *mean);
            }
        };
        blend(&mut self.windows, &step.windows);
        blend(&mut self.ready_offset, &step.ready_offset);
        // A micro-op that shared the link all the time has no new value: the old one stands.
        for (mean, &new) in self.alone.iter_mut().zip(&step.alone) {
            if new > 0.0 {
                *mean = if *mean > 0.0 { *mean + NEWEST * (new - *mean) } else { new };
            }
        }
    }

    /// Appends the measured times to a message that is summed over all ranks.
    pub fn encode(&self, message: &mut Vec<f64>) {
        message.extend(&self.windows);
        message.extend(&self.ready_offset);
        message.extend(&self.alone);
    }

    /// The mean over the ranks of what they encoded, given the sum, and the members of each group.
    /// Structure (gaps, groups) is the same on all ranks and is taken from `self`.
    pub fn decode_sum(&self, sum: &[f64], groups: &[Vec<usize>]) -> GapTimings {
        let ranks = groups[GroupId::WORLD.0 as usize].len() as f64;
        let (windows, rest) = sum.split_at(self.windows.len());
        let (ready_offset, alone) = rest.split_at(self.ready_offset.len());
        GapTimings {
            windows: windows.iter().map(|w| w / ranks).collect(),
            ready_offset: ready_offset.iter().map(|o| o / ranks).collect(),
            alone: alone
                .iter()
                .zip(&self.group)
                .map(|(sum, group)| sum / groups[group.0 as usize].len() as f64)
                .collect(),
            ..self.clone()
        }
    }

    /// What the gaps of the backward pass offer and what reductions take of them; `None` before there is a gap between
    /// pairs and a measured micro-op.
    pub fn link_use(&self) -> Option<LinkUse> {
        let first = *self.ready_gap.first()? as usize;
        let gaps = self.windows.iter().zip(&self.between_pairs).take(self.windows.len() - 1).skip(first);
        let windows: Vec<f64> = gaps.filter(|&(&ns, &between)| between && ns > 0.0).map(|(&ns, _)| ns).collect();
        let known = self.alone.iter().zip(&self.elements).filter(|&(&ns, _)| ns > 0.0);
        let (reducing_ns, elements) = known.fold((0.0, 0), |(sum, count), (ns, elements)| (sum + ns, count + elements));
        if windows.is_empty() || elements == 0 {
            return None;
        }
        Some(LinkUse {
            bytes_per_ns: (elements * size_of::<f32>()) as f64 / reducing_ns,
            spare_ns: (windows.iter().sum::<f64>() - reducing_ns).max(0.0),
            median_gap_ns: median(windows.into_iter()),
        })
    }
}

/// What a step's reductions make of the time between its all-to-alls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkUse {
    /// Bytes of gradients over the time that their reduction takes while no all-to-all shares the link.
    pub bytes_per_ns: f64,
    /// Time of the backward pass's gaps between pairs that reductions leave, in nanoseconds.
    pub spare_ns: f64,
    /// The median of those gaps, in nanoseconds.
    pub median_gap_ns: f64,
}

impl LinkUse {
    /// The size of allreduce micro-op of which two fit into the median gap.
    pub fn suggested_partition_bytes(&self) -> usize {
        ((self.bytes_per_ns * self.median_gap_ns / 2.0) as usize).next_multiple_of(4096)
    }
}

/// How many of a step's allreduce micro-ops have launched by the end of each gap. In the last one, after which no
/// all-to-all comes, each launches when it is ready and the link is free.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GapPlan {
    launched_by_end: Vec<u32>,
}

impl GapPlan {
    /// Fills the gaps of the next step, first micro-op first, under `rules`. A rank reduces one micro-op at a time;
    /// `groups` (the ranks of each) says which of them share no rank and run side by side.
    ///
    /// Rules that need no timings ([`GapRule::Eager`], [`GapRule::BetweenPairs`], [`GapRule::AfterBackward`]) have an
    /// empty plan: the sequencer follows the program's order. An unknown duration counts as one that does not fit, which sends the
    /// micro-op to the tail of the step, where it is measured.
    pub fn new(rules: &PolicyRules, timings: &GapTimings, groups: &[Vec<usize>]) -> Self {
        let (between_pairs_only, must_finish) = match rules.gap {
            GapRule::Eager | GapRule::BetweenPairs | GapRule::AfterBackward => return GapPlan::default(),
            GapRule::StartsInGap => (false, false),
            GapRule::FinishesBetweenPairs => (true, true),
        };
        let mut next = 0;
        // When the last micro-op of the gap ends on each rank.
        let mut free = vec![0.0; groups[GroupId::WORLD.0 as usize].len()];
        let mut launched_by_end = Vec::with_capacity(timings.windows.len());
        for (gap, (&window, &between)) in timings.windows.iter().zip(&timings.between_pairs).enumerate() {
            free.fill(0.0);
            while (between || !between_pairs_only) && next < timings.alone.len() {
                let ready = match timings.ready_gap[next] as usize {
                    ready_gap if ready_gap > gap => break,
                    ready_gap if ready_gap == gap => timings.ready_offset[next],
                    _ => 0.0,
                };
                let members = &groups[timings.group[next].0 as usize];
                let start = members.iter().map(|&rank| free[rank]).fold(ready, f64::max);
                let end = start + timings.alone[next];
                let fits = if must_finish { end <= window } else { start < window };
                if timings.alone[next] <= 0.0 || !fits {
                    break;
                }
                members.iter().for_each(|&rank| free[rank] = end);
                next += 1;
            }
            launched_by_end.push(next as u32);
        }
        // Nothing comes after the last gap: whatever is ready may launch.
        if let Some(last) = launched_by_end.last_mut() {
            *last = timings.alone.len() as u32;
        }
        GapPlan { launched_by_end }
    }

    /// How many micro-ops have launched by the end of `gap`.
    pub fn launched_by_end(&self, gap: usize) -> u32 {
        self.launched_by_end.get(gap).copied().unwrap_or_else(|| self.launched_by_end.last().copied().unwrap_or(0))
    }
}

/// Measures a step on one rank.
#[derive(Clone, Debug, Default)]
pub(crate) struct GapMeasurement {
    timings: GapTimings,
    /// Since when no all-to-all has run or waited.
    open_since: Nanos,
}

impl GapMeasurement {
    pub(crate) fn begin(&mut self, now: Nanos) {
        let GapTimings { windows, between_pairs, ready_gap, ready_offset, alone, group, elements } = &mut self.timings;
        windows.clear();
        between_pairs.clear();
        between_pairs.push(true);
        ready_gap.clear();
        ready_offset.clear();
        alone.clear();
        group.clear();
        elements.clear();
        self.open_since = now;
    }

    /// The gap that is open now.
    pub(crate) fn gap(&self) -> usize {
        self.timings.between_pairs.len() - 1
    }

    pub(crate) fn all_to_all_submitted(&mut self, now: Nanos, outstanding: bool, opens_gap: bool) {
        self.timings.windows.push(if outstanding { 0.0 } else { (now - self.open_since) as f64 });
        self.timings.between_pairs.push(opens_gap);
    }

    pub(crate) fn all_to_alls_done(&mut self, now: Nanos) {
        self.open_since = now;
    }

    /// `outstanding` says whether all-to-alls are: then the gap is yet to open.
    pub(crate) fn all_reduce_ready(&mut self, now: Nanos, op: MicroOp, outstanding: bool) {
        self.timings.ready_gap.push(self.gap() as u32);
        self.timings.ready_offset.push(if outstanding { 0.0 } else { (now - self.open_since) as f64 });
        self.timings.alone.push(0.0);
        self.timings.group.push(op.group);
        self.timings.elements.push(op.elements);
    }

    pub(crate) fn all_reduce_took(&mut self, index: u32, alone: Nanos) {
        // At least a nanosecond: 0 means unknown.
        self.timings.alone[index as usize] = alone.max(1) as f64;
    }

    /// The step's timings. The tail is a gap without a window: it has no end.
    pub(crate) fn timings(&self) -> GapTimings {
        let mut timings = self.timings.clone();
        timings.windows.push(0.0);
        timings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Policy, PolicySettings};

    fn timings() -> GapTimings {
        GapTimings {
            windows: vec![0.0, 50.0, 100.0, 0.0],
            between_pairs: vec![true, false, true, true],
            ready_gap: vec![0, 0, 1, 2],
            ready_offset: vec![0.0, 0.0, 40.0, 90.0],
            alone: vec![30.0, 30.0, 30.0, 30.0],
            group: vec![GroupId::WORLD; 4],
            elements: vec![1000; 4],
        }
    }

    #[test]
    fn two_suggested_micro_ops_fit_the_backward_gaps() {
        let mut timings = GapTimings {
            windows: vec![900.0, 3000.0, 800.0, 2000.0, 0.0],
            between_pairs: vec![true, true, false, true, true],
            ready_gap: vec![1, 1, 2, 3],
            alone: vec![30.0, 50.0, 0.0, 0.0],
            ..timings()
        };
        // 8000 bytes in 80 ns; of the gaps from the first gradient on, 3000 and 2000 lie between pairs.
        let link = timings.link_use().unwrap();
        assert_eq!(link, LinkUse { bytes_per_ns: 100.0, spare_ns: 4920.0, median_gap_ns: 2500.0 });
        assert_eq!(link.suggested_partition_bytes(), 125_000_usize.next_multiple_of(4096));
        timings.alone = vec![0.0; 4];
        assert_eq!(timings.link_use(), None);
        assert_eq!(GapTimings::default().link_use(), None);
    }

    fn plan(policy: Policy, timings: &GapTimings) -> Vec<u32> {
        let groups = [vec![0, 1, 2, 3], vec![0, 1], vec![2, 3]];
        GapPlan::new(&PolicyRules::new(policy, &PolicySettings::default()), timings, &groups).launched_by_end
    }

    #[test]
    fn lina_launches_what_finishes_between_pairs() {
        assert_eq!(plan(Policy::Lina, &timings()), [0, 0, 3, 4]);
    }

    #[test]
    fn micro_ops_of_other_ranks_run_side_by_side() {
        let (together, apart) = ([1, 1, 1, 1], [1, 2, 1, 2]);
        let plan = |groups: [u32; 4]| {
            plan(
                Policy::Lina,
                &GapTimings {
                    windows: vec![0.0, 0.0, 70.0, 0.0],
                    ready_gap: vec![2; 4],
                    ready_offset: vec![0.0; 4],
                    group: groups.map(GroupId).to_vec(),
                    ..timings()
                },
            )
        };
        assert_eq!(plan(together), [0, 0, 2, 4]);
        assert_eq!(plan(apart), [0, 0, 4, 4]);
    }

    #[test]
    fn priority_launches_what_starts_in_any_gap() {
        assert_eq!(plan(Policy::Priority, &timings()), [0, 2, 4, 4]);
    }

    #[test]
    fn unknown_durations_go_to_the_tail() {
        let mut timings = timings();
        timings.alone[1] = 0.0;
        assert_eq!(plan(Policy::Lina, &timings), [0, 0, 1, 4]);
    }

    #[test]
    fn all_ranks_decode_the_same_mean() {
        let mut other = timings();
        other.windows[1] = 150.0;
        let (mut a, mut b) = (Vec::new(), Vec::new());
        timings().encode(&mut a);
        other.encode(&mut b);
        let sum: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
        assert_eq!(timings().decode_sum(&sum, &[vec![0, 1]]), other.decode_sum(&sum, &[vec![0, 1]]));
        assert_eq!(timings().decode_sum(&sum, &[vec![0, 1]]).windows[1], 100.0);
    }
}
