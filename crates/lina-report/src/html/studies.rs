//! The paper's studies as pictures: gains beside the paper's, partition sizes, pipelining efficiency.

use std::fmt::Write as _;

use super::Section;
use super::svg::{self, Plot, Scale, WIDTH, escape};
use crate::format::{percent, significant};
use crate::paper::{EFFICIENCY, EFFICIENCY_PACKED, PARTITION_SIZES};
use crate::policy::times;
use crate::studies::{fastest_ms, paper_sentence, partition, pipelining_sentence};
use crate::{PaperRow, PolicyRow};

const BAR: f64 = 20.0;
const SLOT: f64 = 32.0;

/// What `lina bench train` measured beside its comparison of policies.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BenchTables {
    /// Policies beside the paper's figures.
    pub paper: Vec<PaperRow>,
    /// A row a partition size, and `lina-auto`.
    pub partition_sweep: Vec<PolicyRow>,
    /// A row for each number of chunks, without and with packing.
    pub pipelining: Vec<PolicyRow>,
}

/// A horizontal bar.
struct Bar {
    label: String,
    value: f64,
    /// What stands at its end.
    text: String,
    /// The same, fainter.
    note: String,
    class: &'static str,
    /// Where the paper is.
    mark: Option<f64>,
}

impl BenchTables {
    pub(super) fn sections(&self) -> [Option<Section>; 3] {
        [self.paper_section(), self.partition_section(), self.pipelining_section()]
    }

    fn paper_section(&self) -> Option<Section> {
        let bars: Vec<Bar> = self.paper.iter().filter_map(paper_bar).collect();
        (!bars.is_empty()).then(|| Section {
            id: "paper",
            heading: "Gains beside the paper's",
            caption: format!("{} Higher is faster.", paper_sentence()),
            body: svg::legend(&[("allreduce", "step, gain over fair"), ("bound", "the paper's")])
                + &chart(&bars, "x", "Gain of each policy over fair")
                + &self.paper_figures(),
            shows_time: true,
        })
    }

    fn paper_figures(&self) -> String {
        let heads = [
            ("Policy", ""),
            ("Step, gain over fair", "here"),
            ("The same", "in the paper"),
            ("Backward all‑to‑all, gain over fair", "here"),
            ("The same", "in the paper"),
        ];
        let mut html = String::from("<div class=\"scroll\"><table><thead><tr>");
        for (head, unit) in heads {
            let _ = write!(html, "<th>{head}<span class=\"unit\">{unit}</span></th>");
        }
        html.push_str("</tr></thead><tbody>");
        for row in &self.paper {
            let _ = write!(html, "<tr><td>{}</td>", escape(&row.policy));
            for gain in
                [row.step_speedup, row.paper_step_speedup, row.backward_a2a_speedup, row.paper_backward_a2a_speedup]
            {
                let _ = write!(html, "<td>{}</td>", times(gain));
            }
            html.push_str("</tr>");
        }
        html.push_str("</tbody></table></div>");
        html
    }

    fn partition_section(&self) -> Option<Section> {
        let fastest = fastest_ms(&self.partition_sweep);
        let bars: Vec<Bar> = self.partition_sweep.iter().map(|row| partition_bar(row, fastest)).collect();
        (!bars.is_empty()).then(|| Section {
            id: "partition-sweep",
            heading: "Partition sizes",
            caption: format!("The median step by the size of the largest allreduce micro-op. {PARTITION_SIZES}"),
            body: svg::legend(&[("compute", "a fixed size"), ("allreduce", "found by lina-auto")])
                + &chart(&bars, "ms", "Median step of each partition size"),
            shows_time: true,
        })
    }

    fn pipelining_section(&self) -> Option<Section> {
        let bars: Vec<Bar> = self.pipelining.iter().filter_map(pipelining_bar).collect();
        (!bars.is_empty()).then(|| Section {
            id: "pipelining",
            heading: "Pipelining efficiency",
            caption: pipelining_sentence(),
            body: svg::legend(&[("compute", "as configured"), ("allreduce", "packed"), ("bound", "the paper's mean")])
                + &chart(&bars, "%", "Pipelining efficiency by chunks and packing"),
            shows_time: true,
        })
    }
}

fn paper_bar(row: &PaperRow) -> Option<Bar> {
    let value = row.step_speedup.filter(|speedup| speedup.is_finite())?;
    Some(Bar {
        label: row.policy.clone(),
        value,
        text: times(Some(value)),
        note: row.paper_step_speedup.map_or(String::new(), |paper| format!("the paper {paper:.2}x")),
        class: "allreduce",
        mark: row.paper_step_speedup,
    })
}

fn partition_bar(row: &PolicyRow, fastest: f64) -> Bar {
    let tuned = row.policy.starts_with("lina-auto");
    let size = partition(row);
    let chunks = chunks(row.pipeline_chunks);
    let over = row.step_ms_median / fastest - 1.0;
    let over = if over > 0.0 { format!(", {} over the fastest", percent(over)) } else { ", the fastest".into() };
    Bar {
        label: if tuned { row.policy.clone() } else { size.clone() },
        value: row.step_ms_median,
        text: format!("{} ms", significant(row.step_ms_median)),
        note: if tuned { format!("{size}, {chunks}{over}") } else { format!("{chunks}{over}") },
        class: if tuned { "allreduce" } else { "compute" },
        mark: None,
    }
}

fn pipelining_bar(row: &PolicyRow) -> Option<Bar> {
    let packed = row.policy.ends_with("+packing");
    let figures = if packed { EFFICIENCY_PACKED } else { EFFICIENCY };
    let share = row.pipelining_efficiency.filter(|share| share.is_finite())?;
    Some(Bar {
        label: format!("{}, {}", row.policy, chunks(row.pipeline_chunks)),
        value: share * 100.0,
        text: percent(share),
        note: format!("{} a rank, step {} ms", experts(row.experts_per_rank), significant(row.step_ms_median)),
        class: if packed { "allreduce" } else { "compute" },
        mark: Some(100.0 * figures.iter().sum::<f64>() / figures.len() as f64),
    })
}

fn chunks(number: usize) -> String {
    if number == 1 { "1 chunk".into() } else { format!("{number} chunks") }
}

fn experts(number: usize) -> String {
    if number == 1 { "1 expert".into() } else { format!("{number} experts") }
}

/// Bars from zero, each with its label before it, its text behind it and the paper's mark across it.
fn chart(bars: &[Bar], unit: &str, label: &str) -> String {
    let bottom = 8.0 + SLOT * bars.len() as f64;
    let plot = Plot { left: 200.0, right: WIDTH - 320.0, top: 8.0, bottom };
    let longest = bars.iter().flat_map(|bar| [Some(bar.value), bar.mark]).flatten().fold(0.0, f64::max);
    let x = Scale::new((0.0, longest), (plot.left, plot.right));
    let mut out = svg::open(bottom + 26.0, label);
    plot.bar_axis(&mut out, &x, unit, 20.0);
    for (index, bar) in bars.iter().enumerate() {
        let y = plot.top + SLOT * index as f64 + (SLOT - BAR) / 2.0;
        let middle = y + BAR / 2.0 + 4.5;
        let (label, text, note) = (escape(&bar.label), escape(&bar.text), escape(&bar.note));
        let end = x.at(bar.value);
        let _ = write!(
            out,
            "<text class=\"label\" text-anchor=\"end\" x=\"{:.1}\" y=\"{middle:.1}\">{label}</text>\
             <g><title>{label}: {text}\n{note}</title>\
             <rect class=\"fill {}\" x=\"{:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\"/></g>",
            plot.left - 12.0,
            bar.class,
            plot.left,
            end - plot.left
        );
        if let Some(mark) = bar.mark {
            let at = x.at(mark);
            let _ = write!(
                out,
                "<line class=\"bound\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"><title>the paper: {}</title></line>",
                y - 4.0,
                y + BAR + 4.0,
                significant(mark)
            );
        }
        let after = bar.mark.map_or(end, |mark| end.max(x.at(mark)));
        let _ = write!(
            out,
            "<text class=\"label\" x=\"{:.1}\" y=\"{middle:.1}\">{text}<tspan class=\"muted\">  {note}</tspan></text>",
            after + 9.0
        );
    }
    out.push_str("</svg>");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::tests::row;

    #[test]
    fn each_study_has_a_picture_with_the_papers_marks() {
        let rows = vec![row("fair", 29.0), row("lina+packing", 14.5), row("lina-auto", 15.0)];
        let tables = BenchTables {
            paper: PaperRow::beside(&rows, 8),
            partition_sweep: vec![PolicyRow { partition_bytes: Some(16 << 10), ..row("lina", 20.0) }, rows[2].clone()],
            pipelining: vec![row("lina", 20.0), row("lina+packing", 14.5)],
        };
        let [paper, partition, pipelining] = tables.sections().map(Option::unwrap);
        assert_eq!(paper.body.matches("<line class=\"bound\"").count(), 2);
        assert!(paper.body.contains("<td>2.00x</td><td>1.73x</td><td>1.00x</td><td>2.39x</td>"), "{}", paper.body);
        assert!(partition.body.contains(">16.0 KiB<") && partition.body.contains(", the fastest"));
        assert!(partition.body.contains("33.3 % over the fastest"), "{}", partition.body);
        assert_eq!(pipelining.body.matches("<line class=\"bound\"").count(), 2);
        assert!(BenchTables::default().sections().iter().all(Option::is_none));
    }
}
