//! The paper's studies for a terminal: its ablation beside its own figures, partition sizes, pipelining efficiency.

use crate::format::{bytes, percent, significant};
use crate::paper::{EFFICIENCY, EFFICIENCY_PACKED, PARTITION_SIZES};
use crate::policy::{clock_sentence, optional, times};
use crate::{Align, PaperRow, PolicyRow, Table};

/// Policies beside the paper's figures. With `emulated` a sentence says that times are virtual.
pub fn paper_table(rows: &[PaperRow], emulated: bool) -> String {
    use Align::{Left, Right};
    let mut table = Table::new([
        ("\npolicy", Left),
        ("step: gain\nover fair", Right),
        ("the\npaper's", Right),
        ("backward a2a:\ngain over fair", Right),
        ("the\npaper's", Right),
    ]);
    for row in rows {
        table.row([
            row.policy.clone(),
            times(row.step_speedup),
            times(row.paper_step_speedup),
            times(row.backward_a2a_speedup),
            times(row.paper_backward_a2a_speedup),
        ]);
    }
    format!("{}\n{}\n{}", paper_sentence(), clock_sentence(emulated, None), table.render())
}

/// The rows of a sweep of partition sizes. `emulated` as for [`paper_table`].
pub fn partition_table(rows: &[PolicyRow], emulated: bool) -> String {
    use Align::{Left, Right};
    let mut table = Table::new([
        ("\npolicy", Left),
        ("largest\nmicro-op", Right),
        ("\nchunks", Right),
        ("step ms\nmedian", Right),
        ("speed-up\nover fair", Right),
        ("over the\nfastest", Right),
        ("blocked\nms", Right),
        ("backward\na2a ms", Right),
    ]);
    let fastest = fastest_ms(rows);
    for row in rows {
        table.row([
            row.policy.clone(),
            partition(row),
            row.pipeline_chunks.to_string(),
            significant(row.step_ms_median),
            times(row.speedup_vs_fair),
            percent(row.step_ms_median / fastest - 1.0),
            significant(row.blocked_ms_median),
            significant(row.a2a_backward_ms_median),
        ]);
    }
    format!("Partition sizes. {PARTITION_SIZES}\n{}\n{}", clock_sentence(emulated, None), table.render())
}

/// The rows of a study of pipelining. `emulated` as for [`paper_table`].
pub fn pipelining_table(rows: &[PolicyRow], emulated: bool) -> String {
    use Align::{Left, Right};
    let mut table = Table::new([
        ("\npolicy", Left),
        ("experts\na rank", Right),
        ("\nchunks", Right),
        ("pipelining\nefficiency", Right),
        ("waits for\nall-to-all", Right),
        ("step ms\nmedian", Right),
        ("speed-up\nover fair", Right),
    ]);
    for row in rows {
        table.row([
            row.policy.clone(),
            row.experts_per_rank.to_string(),
            row.pipeline_chunks.to_string(),
            optional(row.pipelining_efficiency.map(|share| share * 100.0)),
            percent(row.a2a_share),
            significant(row.step_ms_median),
            times(row.speedup_vs_fair),
        ]);
    }
    format!("{}\n{}\n{}", pipelining_sentence(), clock_sentence(emulated, None), table.render())
}

/// Where the paper's figures come from.
pub(crate) fn paper_sentence() -> &'static str {
    "Gains beside the paper's (USENIX ATC 2023, Figures 10 and 14): its models, devices and network are others."
}

/// What pipelining efficiency is, and the paper's figures.
pub(crate) fn pipelining_sentence() -> String {
    let range = |figures: &[f64]| {
        let percent = |fold: fn(f64, f64) -> f64, start| 100.0 * figures.iter().copied().fold(start, fold);
        format!("{:.0} to {:.0} %", percent(f64::min, f64::INFINITY), percent(f64::max, 0.0))
    };
    format!(
        "Pipelining efficiency is the share of the all-to-alls' time in which a rank computes, in per cent; the paper has {} \
         without packing and {} with it (USENIX ATC 2023, Table 3).",
        range(&EFFICIENCY),
        range(&EFFICIENCY_PACKED)
    )
}

/// Median step of the fastest row.
pub(crate) fn fastest_ms(rows: &[PolicyRow]) -> f64 {
    rows.iter().map(|row| row.step_ms_median).fold(f64::INFINITY, f64::min)
}

/// A row's largest allreduce micro-op in words.
pub(crate) fn partition(row: &PolicyRow) -> String {
    row.partition_bytes.map_or("–".into(), |size| bytes(size as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::tests::row;

    #[test]
    fn a_sweep_says_how_far_each_size_is_from_the_fastest() {
        let sized = |policy, ms, size| PolicyRow { partition_bytes: size, ..row(policy, ms) };
        let text =
            partition_table(&[sized("lina", 20.0, Some(16 << 10)), sized("lina-auto", 16.0, Some(40 << 10))], true);
        let cells: Vec<Vec<&str>> = text.lines().skip(5).map(|line| line.split_whitespace().collect()).collect();
        assert!(text.lines().nth(1).unwrap().starts_with("Times are emulated"));
        assert_eq!(cells[0][..7], ["lina", "16.0", "KiB", "2", "20.0", "1.45x", "25.0"]);
        assert_eq!(cells[1][..7], ["lina-auto", "40.0", "KiB", "2", "16.0", "1.81x", "0.0"]);
    }

    #[test]
    fn studies_name_the_papers_figures() {
        let rows = [row("fair", 29.0), row("lina+packing", 14.5)];
        let paper = paper_table(&PaperRow::beside(&rows, 8), false);
        assert!(paper.contains("Figures 10 and 14") && paper.contains("2.00x    1.73x"), "{paper}");
        let pipelining = pipelining_table(&rows, false);
        assert!(pipelining.contains("33 to 36 % without packing and 79 to 86 % with it"), "{pipelining}");
        let row: Vec<&str> = pipelining.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(row[..4], ["lina+packing", "2", "2", "60.0"]);
    }
}
