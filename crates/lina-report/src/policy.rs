//! The comparison of communication policies: one row a policy, as JSON and as a table.

use serde::{Deserialize, Serialize};

use crate::format::{percent, significant};
use crate::{Align, Table};

/// What was measured of one policy. The field names are those of the JSON that `lina bench train` prints; an absent
/// value is `null` there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyRow {
    /// The policy's name.
    pub policy: String,
    /// Most experts of an MoE layer on a rank while it was measured.
    pub experts_per_rank: usize,
    /// Median time of a step.
    pub step_ms_median: f64,
    /// 95th percentile of the steps' times.
    pub step_ms_p95: f64,
    /// Median step of `fair` over this policy's; absent if `fair` did not run.
    pub speedup_vs_fair: Option<f64>,
    /// Share of the step in which the compute lane waits for all-to-all, 0 to 1.
    pub a2a_share: f64,
    /// Median time that a step's backward all-to-alls are on the wire, each from the moment when all ranks had launched
    /// it to its completion.
    pub a2a_backward_ms_median: f64,
    /// The same with the link to themselves: known exactly where emulated, else the median of steps in which allreduces
    /// wait for the end of backward; absent where nothing is exchanged.
    pub a2a_backward_alone_ms: Option<f64>,
    /// The former over the latter.
    pub a2a_slowdown: Option<f64>,
    /// Time that the step's allreduces need with the link to themselves, over the step, 0 to 1; where that is not
    /// known, the time they were on the wire.
    pub allreduce_share: f64,
    /// Median time of a step in which the compute lane waits for any communication.
    pub blocked_ms_median: f64,
    /// Makespan of the policy's dependency graph with every all-to-all at full rate and no overhead; absent where the
    /// rates are not known.
    pub bound_ms: Option<f64>,
    /// Median step over the larger of `bound_ms` and the busiest link's time.
    pub ratio_to_bound: Option<f64>,
    /// Largest allreduce micro-op; absent under policies that do not cut gradients.
    pub partition_bytes: Option<usize>,
    /// Chunks of each exchange of an MoE layer.
    pub pipeline_chunks: usize,
    /// Share of the all-to-alls' time in which the rank computes, 0 to 1, median (the paper's pipelining efficiency);
    /// absent where nothing is exchanged.
    pub pipelining_efficiency: Option<f64>,
}

/// A policy comparison for a terminal: a sentence on what the times are, then a row per policy.
///
/// `link_bound_ms` is the busiest link's bytes in a step over its rate. With `emulated` the sentence says that times
/// are virtual.
pub fn policy_table(rows: &[PolicyRow], emulated: bool, link_bound_ms: Option<f64>) -> String {
    use Align::{Left, Right};
    let mut table = Table::new([
        ("\npolicy", Left),
        ("experts\na rank", Right),
        ("step ms\nmedian", Right),
        ("step ms\np95", Right),
        ("speed-up\nover fair", Right),
        ("waits for\nall-to-all", Right),
        ("allreduce\nof step", Right),
        ("blocked\nms", Right),
        ("backward\na2a ms", Right),
        ("the same\nalone", Right),
        ("slow-\ndown", Right),
        ("bound\nms", Right),
        ("step /\nbound", Right),
    ]);
    for row in rows {
        table.row([
            row.policy.clone(),
            row.experts_per_rank.to_string(),
            significant(row.step_ms_median),
            significant(row.step_ms_p95),
            times(row.speedup_vs_fair),
            percent(row.a2a_share),
            percent(row.allreduce_share),
            significant(row.blocked_ms_median),
            significant(row.a2a_backward_ms_median),
            optional(row.a2a_backward_alone_ms),
            times(row.a2a_slowdown),
            optional(row.bound_ms),
            times(row.ratio_to_bound),
        ]);
    }
    format!("{}\n{}", clock_sentence(emulated, link_bound_ms), table.render())
}

/// What the times of a comparison are, and what no policy can beat.
pub(crate) fn clock_sentence(emulated: bool, link_bound_ms: Option<f64>) -> String {
    let clock = if emulated {
        "Times are emulated (virtual time of an emulated cluster)."
    } else {
        "Times are wall-clock time."
    };
    match link_bound_ms {
        Some(bound) => {
            format!("{clock} The busiest link alone needs {} ms a step.", significant(bound))
        }
        None => clock.into(),
    }
}

pub(crate) fn optional(value: Option<f64>) -> String {
    value.map_or("–".into(), significant)
}

pub(crate) fn times(value: Option<f64>) -> String {
    value.map_or("–".into(), |value| format!("{value:.2}x"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn row(policy: &str, step_ms: f64) -> PolicyRow {
        PolicyRow {
            policy: policy.into(),
            experts_per_rank: 2,
            step_ms_median: step_ms,
            step_ms_p95: step_ms * 1.1,
            speedup_vs_fair: Some(29.0 / step_ms),
            a2a_share: 0.314,
            a2a_backward_ms_median: 4.5,
            a2a_backward_alone_ms: Some(2.46),
            a2a_slowdown: Some(1.83),
            allreduce_share: 0.05,
            blocked_ms_median: 10.0,
            bound_ms: None,
            ratio_to_bound: None,
            partition_bytes: None,
            pipeline_chunks: 2,
            pipelining_efficiency: Some(0.6),
        }
    }

    #[test]
    fn the_table_says_what_its_times_are() {
        let text = policy_table(&[row("fair", 29.0), row("lina", 18.5)], true, Some(12.34));
        assert_eq!(
            text,
            "\
Times are emulated (virtual time of an emulated cluster). The busiest link alone needs 12.3 ms a step.
        experts  step ms  step ms   speed-up   waits for  allreduce  blocked  backward  the same  slow-  bound  step /
policy   a rank   median      p95  over fair  all-to-all    of step       ms    a2a ms     alone   down     ms   bound
──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
fair          2     29.0     31.9      1.00x      31.4 %      5.0 %     10.0      4.50      2.46  1.83x      –       –
lina          2     18.5     20.4      1.57x      31.4 %      5.0 %     10.0      4.50      2.46  1.83x      –       –
"
        );
        assert!(policy_table(&[], false, None).starts_with("Times are wall-clock time.\n"));
    }

    #[test]
    fn json_has_the_promised_names() {
        let json = serde_json::to_value(row("fair", 29.0)).unwrap();
        let names: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "policy",
                "experts_per_rank",
                "step_ms_median",
                "step_ms_p95",
                "speedup_vs_fair",
                "a2a_share",
                "a2a_backward_ms_median",
                "a2a_backward_alone_ms",
                "a2a_slowdown",
                "allreduce_share",
                "blocked_ms_median",
                "bound_ms",
                "ratio_to_bound",
                "partition_bytes",
                "pipeline_chunks",
                "pipelining_efficiency"
            ]
        );
        assert!(json["bound_ms"].is_null());
    }
}
