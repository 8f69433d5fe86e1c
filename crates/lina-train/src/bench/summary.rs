//! From what ranks measured to the rows of tables.

use lina_comm::{StepBound, StepStats};
use lina_plan::Policy;
use lina_report::{
    BenchTables, PaperRow, PolicyComparison, PolicyRow, paper_table, partition_table, pipelining_table, policy_table,
};
use serde::Serialize;

use super::sample::Sample;
use super::turns::BenchPlan;
use super::{median, percentile};
use crate::config::RunConfig;

/// The comparison.
#[derive(Clone, Debug, Serialize)]
pub struct BenchSummary {
    /// Engine of the configuration.
    pub engine: String,
    /// Number of ranks.
    pub ranks: usize,
    /// Whether times are virtual.
    pub emulated: bool,
    /// Bytes over rate of the busiest link, median step; `None` where links have no given rate.
    pub link_bound_ms: Option<f64>,
    /// Times that every policy had its turn.
    pub rounds: usize,
    /// Measured steps of a policy's turn.
    pub steps: u64,
    /// Share of the first policy's compute that is the experts' feed-forward, of its step.
    pub expert_share: f64,
    /// A row a policy.
    pub policies: Vec<PolicyRow>,
    /// The policies beside the paper's figures, if that was asked for.
    pub paper: Vec<PaperRow>,
    /// `lina` with several partition sizes, and `lina-auto`, if that was asked for.
    pub partition_sweep: Vec<PolicyRow>,
    /// `lina` with several numbers of chunks, without and with packing, if that was asked for.
    pub pipelining: Vec<PolicyRow>,
    /// Share of a step that the brain's decisions take on a rank's communication thread, of the policy that decides
    /// most; `None` where times are virtual.
    pub deciding_share: Option<f64>,
    /// What is emulated of the ranks' devices, where their messages are real.
    pub emulated_device: Option<String>,
    /// What ranks measured of each other after the comparison, where they are processes.
    pub network: Option<String>,
}

impl BenchSummary {
    /// The rows as tables for a terminal.
    pub fn table(&self) -> String {
        let mut text = policy_table(&self.policies, self.emulated, self.link_bound_ms);
        let studies = [
            (!self.paper.is_empty()).then(|| paper_table(&self.paper, self.emulated)),
            (!self.partition_sweep.is_empty()).then(|| partition_table(&self.partition_sweep, self.emulated)),
            (!self.pipelining.is_empty()).then(|| pipelining_table(&self.pipelining, self.emulated)),
        ];
        for table in studies.into_iter().flatten() {
            text = text + "\n" + &table;
        }
        for sentence in self.emulated_device.iter().chain(&self.deciding_sentence()).chain(&self.network) {
            text = text + "\n" + sentence;
        }
        text
    }

    /// What the brain takes of a step.
    pub(super) fn deciding_sentence(&self) -> Option<String> {
        self.deciding_share.map(|share| format!("The brain's decisions take at most {:.2} % of a step.", 100.0 * share))
    }

    /// The policies for a report.
    pub(crate) fn comparison(&self) -> PolicyComparison {
        PolicyComparison { rows: self.policies.clone(), emulated: self.emulated, link_bound_ms: self.link_bound_ms }
    }

    /// The studies for a report.
    pub(crate) fn tables(&self) -> BenchTables {
        BenchTables {
            paper: self.paper.clone(),
            partition_sweep: self.partition_sweep.clone(),
            pipelining: self.pipelining.clone(),
        }
    }
}

impl BenchPlan {
    /// The tables' rows from every rank's samples and the steps' bounds.
    pub(crate) fn summarise(&self, config: &RunConfig, ranks: &[Vec<Sample>], bounds: &[StepBound]) -> BenchSummary {
        let measured = Measured { emulated: config.is_emulated(), ranks, bounds };
        let candidates = self.candidates.all.iter().enumerate();
        let mut rows: Vec<PolicyRow> =
            candidates.map(|(number, candidate)| measured.row(number, candidate.schedule.to_string())).collect();
        let compared = self.candidates.compared;
        let fair = rows[..compared].iter().find(|row| row.policy == Policy::Fair.name()).map(|row| row.step_ms_median);
        rows.iter_mut().for_each(|row| row.speedup_vs_fair = fair.map(|fair| fair / row.step_ms_median));
        let link_bounds: Vec<f64> = (0..compared).filter_map(|number| measured.bound(number, |b| b.link)).collect();
        let of = |numbers: &[usize]| numbers.iter().map(|&number| rows[number].clone()).collect();
        let (partition_sweep, pipelining) = (of(&self.candidates.partition_sweep), of(&self.candidates.pipelining));
        rows.truncate(compared);
        BenchSummary {
            engine: config.cluster.engine.name().to_owned(),
            ranks: ranks.len(),
            emulated: measured.emulated,
            link_bound_ms: (!link_bounds.is_empty()).then(|| median(&link_bounds)),
            rounds: self.rounds,
            steps: self.steps,
            expert_share: measured.share_of_step(&measured.steps(0, false), |stats| stats.expert),
            paper: if self.paper { PaperRow::beside(&rows, config.model.experts) } else { Vec::new() },
            policies: rows,
            partition_sweep,
            pipelining,
            deciding_share: (!measured.emulated).then(|| {
                let share = |candidate| measured.share_of_step(&measured.steps(candidate, false), |s| s.deciding_wall);
                (0..compared).map(share).fold(0.0, f64::max)
            }),
            emulated_device: config.cluster.emulated_device_sentence(),
            network: None,
        }
    }
}

/// Every rank's samples, which are of the same steps, and the steps' bounds.
struct Measured<'a> {
    emulated: bool,
    ranks: &'a [Vec<Sample>],
    bounds: &'a [StepBound],
}

impl Measured<'_> {
    /// The places of a candidate's samples.
    fn steps(&self, candidate: usize, alone: bool) -> Vec<usize> {
        let samples = self.ranks[0].iter().enumerate();
        samples.filter(|(_, sample)| sample.candidate == candidate && sample.alone == alone).map(|(i, _)| i).collect()
    }

    /// Mean over the ranks, of the sample at place `i`.
    fn mean(&self, i: usize, of: impl Fn(&StepStats) -> u64) -> f64 {
        self.ranks.iter().map(|samples| of(&samples[i].stats) as f64).sum::<f64>() / self.ranks.len() as f64
    }

    /// Median over steps of the mean over ranks, in milliseconds.
    fn median_ms(&self, steps: &[usize], of: impl Fn(&StepStats) -> u64) -> f64 {
        median(&steps.iter().map(|&i| self.mean(i, &of)).collect::<Vec<f64>>()) / 1e6
    }

    /// The slowest rank's step, in nanoseconds.
    fn step(&self, i: usize) -> f64 {
        self.ranks.iter().map(|samples| samples[i].stats.step).max().unwrap_or(0) as f64
    }

    /// Median over steps of the mean over ranks, of the step.
    fn share_of_step(&self, steps: &[usize], of: impl Fn(&StepStats) -> u64) -> f64 {
        median(&steps.iter().map(|&i| self.mean(i, &of) / self.step(i).max(1.0)).collect::<Vec<f64>>())
    }

    /// Median bound of a candidate's steps in milliseconds, if they have one.
    fn bound(&self, candidate: usize, of: impl Fn(&StepBound) -> f64) -> Option<f64> {
        let steps = self.steps(candidate, false);
        let bounds = steps.iter().filter_map(|&i| self.bounds.iter().find(|b| b.step == self.ranks[0][i].step));
        let found: Vec<f64> = bounds.map(of).collect();
        (!found.is_empty()).then(|| median(&found) / 1e6)
    }

    /// Share of the all-to-alls' time in which ranks compute, median.
    fn pipelining_efficiency(&self, steps: &[usize]) -> Option<f64> {
        let share = |i: usize| {
            let overlaps = || self.ranks.iter().map(|samples| samples[i].overlap);
            let all_to_all: u64 = overlaps().map(|overlap| overlap.all_to_all).sum();
            (all_to_all > 0)
                .then(|| overlaps().map(|overlap| overlap.computing).sum::<u64>() as f64 / all_to_all as f64)
        };
        let shares: Vec<f64> = steps.iter().filter_map(|&i| share(i)).collect();
        (!shares.is_empty()).then(|| median(&shares))
    }

    /// A candidate's row, without what it is compared with.
    fn row(&self, candidate: usize, policy: String) -> PolicyRow {
        let (steps, alone) = (self.steps(candidate, false), self.steps(candidate, true));
        let times: Vec<f64> = steps.iter().map(|&i| self.step(i) / 1e6).collect();
        let step_ms_median = median(&times);
        let backward_ms = self.median_ms(&steps, |s| s.all_to_all_backward);
        let (backward_alone_ms, allreduce_share) = if alone.is_empty() {
            let known = |s: &StepStats| if s.all_reduce_alone > 0 { s.all_reduce_alone } else { s.all_reduce };
            let backward = self.emulated.then(|| self.median_ms(&steps, |s| s.all_to_all_backward_alone));
            (backward, self.share_of_step(&steps, known))
        } else {
            let backward = self.median_ms(&alone, |s| s.all_to_all_backward);
            (Some(backward), self.median_ms(&alone, |s| s.all_reduce) / step_ms_median)
        };
        let (bound_ms, link_bound_ms) = (self.bound(candidate, |b| b.graph), self.bound(candidate, |b| b.link));
        // What a policy that adapts itself has come to is the same in all its measured steps.
        let last = steps.last().map(|&i| self.ranks[0][i]);
        PolicyRow {
            policy,
            experts_per_rank: last.map_or(0, |sample| sample.experts_per_rank),
            step_ms_median,
            step_ms_p95: percentile(&times, 0.95),
            speedup_vs_fair: None,
            a2a_share: self.share_of_step(&steps, |s| s.all_to_all_blocked),
            a2a_backward_ms_median: backward_ms,
            a2a_backward_alone_ms: backward_alone_ms,
            a2a_slowdown: backward_alone_ms.filter(|&alone_ms| alone_ms > 0.0).map(|alone_ms| backward_ms / alone_ms),
            allreduce_share,
            blocked_ms_median: self.median_ms(&steps, |s| s.all_to_all_blocked + s.all_reduce_blocked),
            bound_ms,
            ratio_to_bound: bound_ms.map(|bound| step_ms_median / bound.max(link_bound_ms.unwrap_or(0.0))),
            partition_bytes: last.map(|sample| sample.partition_bytes).filter(|&bytes| bytes > 0),
            pipeline_chunks: last.map_or(1, |sample| sample.pipeline_chunks),
            pipelining_efficiency: self.pipelining_efficiency(&steps),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::Overlap;
    use super::*;

    fn sample(candidate: usize, step: u64, alone: bool, backward_ms: u64, step_ms: u64) -> Sample {
        let stats = StepStats {
            step: step_ms * 1_000_000,
            all_to_all_backward: backward_ms * 1_000_000,
            all_reduce: 20_000_000,
            ..StepStats::default()
        };
        let overlap = Overlap { all_to_all: 100, computing: 25 * step };
        Sample { candidate, step, alone, experts_per_rank: 2, partition_bytes: 0, pipeline_chunks: 1, overlap, stats }
    }

    #[test]
    fn what_was_measured_alone_is_what_the_rest_is_compared_with() {
        let rank = |ms: u64| {
            vec![sample(1, 1, false, 30 + ms, 100), sample(1, 2, false, 30 + ms, 100 + ms), sample(1, 3, true, 20, 400)]
        };
        let ranks = [rank(0), rank(20)];
        let measured = Measured { emulated: false, ranks: &ranks, bounds: &[] };
        let row = measured.row(1, "fair".into());
        assert_eq!((row.step_ms_median, row.a2a_backward_ms_median), (110.0, 40.0));
        assert_eq!((row.a2a_backward_alone_ms, row.a2a_slowdown), (Some(20.0), Some(2.0)));
        assert_eq!(row.allreduce_share, 20.0 / 110.0);
        assert_eq!(row.pipelining_efficiency, Some(0.375));
        assert_eq!((row.partition_bytes, row.bound_ms), (None, None));
        let other = measured.row(0, "lina".into());
        assert_eq!((other.step_ms_median, other.a2a_backward_alone_ms), (0.0, None));
    }
}
