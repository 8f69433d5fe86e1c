//! Policies side by side: bars of their steps with what bounds them, and all numbers.

use std::fmt::Write as _;

use super::Section;
use super::svg::{self, Plot, Scale, WIDTH, escape};
use crate::PolicyRow;
use crate::format::{percent, significant};
use crate::policy::{clock_sentence, optional, times};

const BAR: f64 = 22.0;
const SLOT: f64 = 36.0;

/// What `lina bench train` measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PolicyComparison {
    /// A row per policy, in the order to show.
    pub rows: Vec<PolicyRow>,
    /// Whether times are virtual.
    pub emulated: bool,
    /// The busiest link's bytes in a step over its rate.
    pub link_bound_ms: Option<f64>,
}

impl PolicyComparison {
    pub(super) fn section(&self) -> Option<Section> {
        let bounds = self.rows.iter().filter_map(|row| row.bound_ms).chain(self.link_bound_ms);
        let longest = self.rows.iter().map(|row| row.step_ms_median).chain(bounds).fold(0.0, f64::max);
        if self.rows.is_empty() || longest <= 0.0 {
            return None;
        }
        let mut body = self.bars(longest);
        body.push_str(&self.table());
        Some(Section {
            id: "policies",
            heading: "Policies compared",
            caption: clock_sentence(self.emulated, self.link_bound_ms),
            body,
            shows_time: true,
        })
    }

    fn bars(&self, longest_ms: f64) -> String {
        let bottom = 8.0 + SLOT * self.rows.len() as f64;
        let plot = Plot { left: 150.0, right: WIDTH - 130.0, top: 8.0, bottom };
        let x = Scale::new((0.0, longest_ms), (plot.left, plot.right));
        let mut out = svg::legend(&[
            ("compute", "step, median"),
            ("all-to-all", "of it waiting for all-to-all"),
            ("bound", "the policy's bound"),
            ("link-bound", "the busiest link's time"),
        ]);
        out.push_str(&svg::open(bottom + 26.0, "Median step of each policy"));
        plot.bar_axis(&mut out, &x, "ms", 12.0);
        for (index, row) in self.rows.iter().enumerate() {
            let y = plot.top + SLOT * index as f64 + (SLOT - BAR) / 2.0;
            let middle = y + BAR / 2.0 + 4.5;
            let end = x.at(row.step_ms_median);
            let waiting = row.step_ms_median * row.a2a_share.clamp(0.0, 1.0);
            let _ = write!(
                out,
                "<text class=\"label\" text-anchor=\"end\" x=\"{:.1}\" y=\"{middle:.1}\">{}</text><g><title>{}: {} ms, {} of it waiting for all-to-all</title>\
                 <rect class=\"fill compute\" x=\"{:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\"/>\
                 <rect class=\"fill all-to-all\" x=\"{:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\"/></g>",
                plot.left - 12.0,
                escape(&row.policy),
                escape(&row.policy),
                significant(row.step_ms_median),
                percent(row.a2a_share),
                plot.left,
                end - plot.left,
                x.at(row.step_ms_median - waiting),
                end - x.at(row.step_ms_median - waiting),
            );
            if let Some(bound) = row.bound_ms {
                let at = x.at(bound);
                let _ = write!(
                    out,
                    "<line class=\"bound\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"><title>bound of {}: {} ms</title></line>",
                    y - 4.0,
                    y + BAR + 4.0,
                    escape(&row.policy),
                    significant(bound)
                );
            }
            let speedup = match row.speedup_vs_fair {
                Some(_) => format!("  {}", times(row.speedup_vs_fair)),
                None => String::new(),
            };
            let after = row.bound_ms.map_or(end, |bound| end.max(x.at(bound)));
            let _ = write!(
                out,
                "<text class=\"label\" x=\"{:.1}\" y=\"{middle:.1}\">{} ms<tspan class=\"muted\">{speedup}</tspan></text>",
                after + 9.0,
                significant(row.step_ms_median)
            );
        }
        if let Some(bound) = self.link_bound_ms {
            let at = x.at(bound);
            let _ = write!(
                out,
                "<line class=\"link-bound\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{bottom:.1}\"><title>busiest link: {} ms</title></line>",
                plot.top,
                significant(bound)
            );
        }
        out.push_str("</svg>");
        out
    }

    fn table(&self) -> String {
        let heads = [
            ("Policy", ""),
            ("Step, median", "ms"),
            ("Step, 95th percentile", "ms"),
            ("Speed‑up over fair", ""),
            ("Waiting for all‑to‑all", "of the step"),
            ("Allreduce, alone", "of the step"),
            ("Blocked", "ms"),
            ("Backward all‑to‑all", "ms"),
            ("The same alone", "ms"),
            ("Slow‑down", ""),
            ("Bound", "ms"),
            ("Step over bound", ""),
        ];
        let mut html = String::from("<div class=\"scroll\"><table><thead><tr>");
        for (head, unit) in heads {
            let _ = write!(html, "<th>{head}<span class=\"unit\">{unit}</span></th>");
        }
        html.push_str("</tr></thead><tbody>");
        let fastest = self.rows.iter().map(|row| row.step_ms_median).fold(f64::INFINITY, f64::min);
        for row in &self.rows {
            let class = if row.step_ms_median == fastest && self.rows.len() > 1 { " class=\"best\"" } else { "" };
            let _ = write!(html, "<tr{class}><td>{}</td>", escape(&row.policy));
            for cell in [
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
            ] {
                let _ = write!(html, "<td>{cell}</td>");
            }
            html.push_str("</tr>");
        }
        html.push_str("</tbody></table></div>");
        html
    }
}
