//! One step as a Gantt chart: a row per rank and lane, a rectangle per span.

use std::fmt::Write as _;

use super::Section;
use super::svg::{self, Scale, WIDTH, escape};
use crate::format::{bytes, significant};
use crate::trace::{RowPacker, in_lane_order};
use crate::{Lane, TraceSpan};

/// Ranks beyond this many are not drawn; the trace has them.
const MOST_RANKS: usize = 16;

const LEFT: f64 = 150.0;
const RIGHT: f64 = WIDTH - 12.0;
const TOP: f64 = 26.0;
const ROW: f64 = 15.0;
const RANK_GAP: f64 = 9.0;

/// The spans of one training step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timeline {
    /// The step.
    pub step: u64,
    /// Its spans, of all ranks and lanes, in any order.
    pub spans: Vec<TraceSpan>,
}

impl Timeline {
    pub(super) fn section(&self) -> Option<Section> {
        let start_ns = self.spans.iter().map(|span| span.start_ns).min()?;
        let end_ns = self.spans.iter().map(|span| span.end_ns).max()?;
        let ms = |ns: u64| ns.saturating_sub(start_ns) as f64 / 1e6;
        let time = Scale::new((0.0, ms(end_ns)), (0.0, RIGHT - LEFT));

        let sorted = in_lane_order(&self.spans);
        let mut chart = Chart { labels: String::new(), rectangles: String::new(), bottom: TOP, ranks: 0 };
        let mut ranks = 0;
        for spans in sorted.chunk_by(|a, b| a.rank == b.rank) {
            ranks += 1;
            if ranks <= MOST_RANKS {
                chart.rank(spans, start_ns, &time);
            }
        }

        let plot_height = chart.bottom - TOP;
        let copies = self.spans.iter().any(|span| span.lane == Lane::Copy);
        let lanes = Lane::ALL.into_iter().filter(|&lane| copies || lane != Lane::Copy);
        let mut body = svg::legend(&lanes.map(|lane| (class(lane), lane.name())).collect::<Vec<_>>());
        body.push_str(
            "<div class=\"zoom\"><button type=\"button\" data-zoom=\"2\" title=\"Zoom in\">+</button>\
             <button type=\"button\" data-zoom=\"0.5\" title=\"Zoom out\">−</button>\
             <button type=\"button\" data-zoom=\"0\">whole step</button></div>",
        );
        body.push_str(&svg::open(chart.bottom + 10.0, "What each rank did in one step"));
        let _ = write!(body, "<g class=\"time-axis\" data-left=\"{LEFT}\" data-height=\"{:.1}\">", chart.bottom);
        let ticks = time.ticks(10);
        for &value in &ticks.values {
            let x = LEFT + time.at(value);
            let _ = write!(
                body,
                "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{:.1}\"/>\
                 <text class=\"tick\" text-anchor=\"middle\" x=\"{x:.1}\" y=\"16\">{}</text>",
                chart.bottom,
                ticks.label(value)
            );
        }
        body.push_str("</g>");
        let _ = write!(
            body,
            "<text class=\"tick\" text-anchor=\"end\" x=\"{:.1}\" y=\"16\">ms</text>{}\
             <svg class=\"spans\" x=\"{LEFT}\" y=\"{TOP}\" width=\"{width}\" height=\"{plot_height}\" \
             viewBox=\"0 0 {width} {plot_height}\" preserveAspectRatio=\"none\" data-ms=\"{}\">{}</svg></svg>",
            LEFT - 24.0,
            chart.labels,
            ms(end_ns),
            chart.rectangles,
            width = RIGHT - LEFT,
        );
        let left_out = if ranks > MOST_RANKS {
            format!(" The first {MOST_RANKS} of {ranks} ranks are drawn; the trace has all.")
        } else {
            String::new()
        };
        Some(Section {
            id: "timeline",
            heading: "One step in detail",
            caption: format!(
                "Step {}, {} ms: a rectangle is a kernel or a micro-op. Drag to move, zoom with the buttons.{left_out}",
                self.step,
                significant(ms(end_ns))
            ),
            body,
            shows_time: true,
        })
    }
}

struct Chart {
    labels: String,
    rectangles: String,
    bottom: f64,
    ranks: usize,
}

impl Chart {
    /// Draws a rank's lanes under what is there. Spans come in lane order.
    fn rank(&mut self, spans: &[&TraceSpan], start_ns: u64, time: &Scale) {
        if self.ranks > 0 {
            self.bottom += RANK_GAP;
        }
        self.ranks += 1;
        let _ = write!(
            self.labels,
            "<text class=\"rank\" x=\"0\" y=\"{:.1}\">rank {}</text>",
            self.bottom + 11.5,
            spans[0].rank
        );
        for lane_spans in spans.chunk_by(|a, b| a.lane == b.lane) {
            let lane = lane_spans[0].lane;
            let _ = write!(
                self.labels,
                "<text class=\"tick\" text-anchor=\"end\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                LEFT - 8.0,
                self.bottom + 11.5,
                lane.name()
            );
            let mut packer = RowPacker::new(lane.nests());
            let _ = write!(self.rectangles, "<g class=\"fill {}\">", class(lane));
            for (index, span) in lane_spans.iter().enumerate() {
                let row = packer.place(span.start_ns, span.end_ns);
                let y = self.bottom - TOP + ROW * row as f64;
                self.span(span, y, index % 2 == 1, start_ns, time);
            }
            self.rectangles.push_str("</g>");
            self.bottom += ROW * packer.rows() as f64;
        }
    }

    fn span(&mut self, span: &TraceSpan, y: f64, odd: bool, start_ns: u64, time: &Scale) {
        let ms = |ns: u64| ns.saturating_sub(start_ns) as f64 / 1e6;
        let (from, to) = (time.at(ms(span.start_ns)), time.at(ms(span.end_ns)));
        // Neighbours of one colour are told apart by their shade, however narrow they are.
        let shade = if odd { " class=\"odd\"" } else { "" };
        let layer = span.layer.map(|layer| format!(", layer {layer}")).unwrap_or_default();
        let size = if span.bytes > 0 { format!(", {}", bytes(span.bytes)) } else { String::new() };
        let _ = write!(
            self.rectangles,
            "<rect{shade} x=\"{from:.3}\" y=\"{:.1}\" width=\"{:.3}\" height=\"{:.1}\"><title>{}{layer}\n\
             rank {}, {}\n{} ms at {} ms{size}</title></rect>",
            y + 1.0,
            (to - from).max(0.05),
            ROW - 2.0,
            escape(&span.name),
            span.rank,
            span.lane.name(),
            significant(ms(span.end_ns) - ms(span.start_ns)),
            significant(ms(span.start_ns)),
        );
    }
}

/// The style sheet's class for a lane's colour.
fn class(lane: Lane) -> &'static str {
    match lane {
        Lane::Compute => "compute",
        Lane::AllToAll => "all-to-all",
        Lane::AllReduce => "allreduce",
        Lane::Copy => "copy",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(rank: u32, lane: Lane, start_ns: u64, end_ns: u64) -> TraceSpan {
        TraceSpan { rank, lane, name: "x".into(), step: 0, layer: None, start_ns, end_ns, bytes: 0 }
    }

    #[test]
    fn times_are_relative_to_the_steps_start() {
        let spans = vec![span(0, Lane::Compute, 5_000_000, 6_500_000), span(0, Lane::AllToAll, 6_000_000, 8_000_000)];
        let section = Timeline { step: 12, spans }.section().unwrap();
        assert!(section.caption.starts_with("Step 12, 3.00 ms:"));
        assert!(section.body.contains("1.50 ms at 0.00 ms") && section.body.contains("2.00 ms at 1.00 ms"));
    }

    #[test]
    fn many_ranks_are_cut_and_that_is_said() {
        let spans = (0..20).map(|rank| span(rank, Lane::Compute, 0, 10)).collect();
        let section = Timeline { step: 0, spans }.section().unwrap();
        assert!(section.caption.ends_with("The first 16 of 20 ranks are drawn; the trace has all."));
        assert_eq!(section.body.matches("<rect").count(), 16);
    }
}
