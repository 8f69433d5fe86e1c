//! Where each step's time went.

use std::fmt::Write as _;

use super::Section;
use super::svg::{self, Plot, Scale, WIDTH};
use crate::format::significant;

/// Above this many steps a bar is the mean of several.
const MOST_BARS: usize = 240;

/// A step's time on the slowest rank, or averaged over ranks, split by what the compute lane did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTime {
    /// The step.
    pub step: u64,
    /// Computing.
    pub compute_ms: f64,
    /// Waiting for an all-to-all.
    pub a2a_blocked_ms: f64,
    /// Waiting for an allreduce, or for anything else.
    pub other_blocked_ms: f64,
}

impl StepTime {
    fn total_ms(&self) -> f64 {
        self.compute_ms + self.a2a_blocked_ms + self.other_blocked_ms
    }
}

/// A run's step times in two numbers.
pub(super) struct StepSummary {
    pub(super) step_ms_median: f64,
    pub(super) a2a_blocked_share: f64,
}

/// The summary of all steps, if there are any.
pub(super) fn summary(steps: &[StepTime]) -> Option<StepSummary> {
    let totals = sorted_totals(steps);
    let middle = totals.len() / 2;
    let upper = *totals.get(middle)?;
    let step_ms_median = if totals.len() % 2 == 1 { upper } else { (totals[middle - 1] + upper) / 2.0 };
    let blocked: f64 = steps.iter().map(|step| step.a2a_blocked_ms).sum();
    Some(StepSummary { step_ms_median, a2a_blocked_share: blocked / totals.iter().sum::<f64>() })
}

/// The chart, if there are steps.
pub(super) fn section(steps: &[StepTime]) -> Option<Section> {
    let totals = sorted_totals(steps);
    let longest = *totals.last()?;
    // A slow first step would flatten all others: bars far beyond the rest are cut.
    let usual = totals[(totals.len() - 1) * 49 / 50];
    let top_ms = if longest > 2.0 * usual { usual * 1.25 } else { longest * 1.05 };
    let group = steps.len().div_ceil(MOST_BARS).max(1);
    let bars: Vec<(u64, StepTime)> = steps.chunks(group).map(mean).collect();

    let plot = Plot { left: 56.0, right: WIDTH - 12.0, top: 28.0, bottom: 252.0 };
    let slot = (plot.right - plot.left) / bars.len() as f64;
    let width = (slot - (slot * 0.18).min(3.0)).min(64.0);
    let y = Scale::new((0.0, top_ms), (plot.bottom, plot.top));
    let first = steps.first().map_or(0, |step| step.step) as f64;
    let last = steps.last().map_or(0, |step| step.step) as f64;
    // Bars stand in the middle of their slots, steps at the middles of bars.
    let x = Scale::new((first - 0.5, last + 0.5), (plot.left, plot.right));

    let mut body = svg::legend(&[
        ("compute", "computing"),
        ("all-to-all", "blocked on all-to-all"),
        ("allreduce", "blocked on allreduce and other"),
    ]);
    body.push_str(&svg::open(280.0, "Time of each step by what the compute lane did"));
    plot.y_axis(&mut body, &y, "ms");
    for (index, (last_step, bar)) in bars.iter().enumerate() {
        let left = plot.left + slot * index as f64 + (slot - width) / 2.0;
        let name = if *last_step == bar.step {
            format!("step {}", bar.step)
        } else {
            format!("steps {}–{last_step}, mean", bar.step)
        };
        let _ = write!(
            body,
            "<g><title>{name}: {} ms\ncomputing {} ms\nblocked on all-to-all {} ms\nblocked on allreduce and other {} ms</title>",
            significant(bar.total_ms()),
            significant(bar.compute_ms),
            significant(bar.a2a_blocked_ms),
            significant(bar.other_blocked_ms)
        );
        let mut below = 0.0;
        for (class, ms) in
            [("compute", bar.compute_ms), ("all-to-all", bar.a2a_blocked_ms), ("allreduce", bar.other_blocked_ms)]
        {
            let (from, to) = (f64::min(below, top_ms), f64::min(below + ms.max(0.0), top_ms));
            if to > from {
                let _ = write!(
                    body,
                    "<rect class=\"fill {class}\" x=\"{left:.2}\" y=\"{:.2}\" width=\"{width:.2}\" height=\"{:.2}\"/>",
                    y.at(to),
                    y.at(from) - y.at(to)
                );
            }
            below = to;
        }
        if bar.total_ms() > top_ms {
            let _ = write!(
                body,
                "<text class=\"tick\" text-anchor=\"middle\" x=\"{:.1}\" y=\"{:.1}\">▲</text>",
                left + width / 2.0,
                plot.top - 4.0
            );
        }
        body.push_str("</g>");
    }
    plot.x_axis(&mut body, &x, "step");
    body.push_str("</svg>");
    let mut caption = String::from("Each bar is ");
    match group {
        1 => caption.push_str("one step."),
        _ => {
            let _ = write!(caption, "the mean of {group} steps.");
        }
    }
    if longest > top_ms {
        let _ = write!(caption, " Bars with ▲ are cut; the longest step took {} ms.", significant(longest));
    }
    Some(Section { id: "step-time", heading: "Where the steps' time went", caption, body, shows_time: true })
}

fn sorted_totals(steps: &[StepTime]) -> Vec<f64> {
    let mut totals: Vec<f64> = steps.iter().map(StepTime::total_ms).filter(|ms| ms.is_finite()).collect();
    totals.sort_by(f64::total_cmp);
    totals
}

/// The mean of a few steps under the first one's number, and the last one's number.
fn mean(steps: &[StepTime]) -> (u64, StepTime) {
    let part = |part: fn(&StepTime) -> f64| steps.iter().map(part).sum::<f64>() / steps.len() as f64;
    let bar = StepTime {
        step: steps[0].step,
        compute_ms: part(|step| step.compute_ms),
        a2a_blocked_ms: part(|step| step.a2a_blocked_ms),
        other_blocked_ms: part(|step| step.other_blocked_ms),
    };
    (steps[steps.len() - 1].step, bar)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64, compute_ms: f64) -> StepTime {
        StepTime { step, compute_ms, a2a_blocked_ms: 2.0, other_blocked_ms: 1.0 }
    }

    #[test]
    fn the_summary_is_over_whole_steps() {
        let summary = summary(&[step(0, 1.0), step(1, 5.0), step(2, 3.0), step(3, 7.0)]).unwrap();
        assert_eq!(summary.step_ms_median, 7.0);
        assert_eq!(summary.a2a_blocked_share, 8.0 / 28.0);
    }

    #[test]
    fn a_slow_first_step_is_cut_and_many_steps_share_a_bar() {
        let mut steps: Vec<_> = (0..1000).map(|index| step(index, 10.0)).collect();
        steps[0].compute_ms = 900.0;
        let section = section(&steps).unwrap();
        assert!(section.caption.contains("mean of 5 steps") && section.caption.contains("took 903 ms"));
        assert_eq!(section.body.matches("<g>").count(), 200);
        assert_eq!(section.body.matches('▲').count(), 1);
    }
}
