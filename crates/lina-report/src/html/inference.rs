//! Schedulers of experts side by side: their batches over ideal ones beside the paper's figures, how good their
//! estimates were, what they moved and how evenly devices were loaded.

use std::fmt::Write as _;

use serde::Serialize;

use super::Section;
use super::svg::{self, Plot, Scale, WIDTH, escape};
use crate::format::{bytes, percent, significant};
use crate::paper::{
    NO_ESTIMATION_P50, NO_FINE_TUNING_P95, P50_OVER_STATIC, P95_OVER_STATIC, P95_OVER_STATIC_MEAN, P95_VS_IDEAL,
    PATH_ACCURACY, REPLANS,
};
use crate::policy::{clock_sentence, optional};

/// What `lina bench infer` measured of schedulers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InferenceComparison {
    /// A row per scheduler, in the order to show.
    pub schedulers: Vec<SchedulerResult>,
    /// Layers that a path of the estimator `path` covers, where it was used.
    pub path_length: Option<usize>,
    /// Whether times are virtual.
    pub emulated: bool,
}

/// What was measured of one scheduler. The field names are those of the JSON that `lina bench infer` prints; an absent
/// value is `null` there.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct SchedulerResult {
    /// Its name.
    pub scheduler: String,
    /// What phase one goes by; absent without a phase one.
    pub estimator: Option<String>,
    /// Median time of a batch.
    pub p50_ms: f64,
    /// 95th percentile.
    pub p95_ms: f64,
    /// Over that of `ideal`.
    pub p50_vs_ideal: f64,
    /// Over that of `ideal`.
    pub p95_vs_ideal: f64,
    /// How many times faster than `static`, at the 95th percentile.
    pub p95_speedup_vs_static: f64,
    /// Median over batches of the longest time of a rank in MoE layers.
    pub moe_ms: f64,
    /// Median over batches of the mean time that ranks waited for all-to-alls.
    pub a2a_ms: f64,
    /// Median over batches of the mean time that ranks waited for copies.
    pub copy_wait_ms: f64,
    /// Share of layers whose 2k most popular experts were the estimated ones, 0 to 1; absent without estimates.
    pub accuracy: Option<f64>,
    /// Share of those experts that were estimated, 0 to 1.
    pub overlap: Option<f64>,
    /// Share of tokens whose experts were predicted, 0 to 1; absent where tokens are not.
    pub token_accuracy: Option<f64>,
    /// Plans for which a layer waited, over the layers.
    pub replan_rate: f64,
    /// Median over batches of the mean wall-clock time of a plan; absent where there is nothing to plan.
    pub plan_us_median: Option<f64>,
    /// Median over batches of the wall-clock time in which a rank estimates one layer.
    pub estimate_us_median: Option<f64>,
    /// Bytes of weights copied into slots, a batch.
    pub moved_bytes: f64,
    /// Mean over batches of the largest device's rows over the mean.
    pub imbalance: f64,
    /// Layer by layer, from the second with experts on.
    pub layers: Vec<LayerAccuracyNumbers>,
}

/// One layer's accuracy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct LayerAccuracyNumbers {
    /// Layer index in the model.
    pub layer: usize,
    /// As [`SchedulerResult::accuracy`].
    pub accuracy: Option<f64>,
    /// As [`SchedulerResult::overlap`].
    pub overlap: Option<f64>,
    /// As [`SchedulerResult::token_accuracy`].
    pub token_accuracy: Option<f64>,
}

/// Height of a scheduler's two bars, and of what belongs to it.
const BAR: f64 = 13.0;
const SLOT: f64 = 42.0;
/// Where charts start, so that schedulers' names fit before them.
const LEFT: f64 = 222.0;

impl InferenceComparison {
    pub(super) fn sections(&self) -> [Option<Section>; 4] {
        [self.times_section(), self.paper_section(), self.estimates_section(), self.balance_section()]
    }

    /// The numbers that are looked for first: name, value, note.
    pub(super) fn figures(&self) -> Vec<(&'static str, String, String)> {
        let Some(lina) = self.of("lina") else { return Vec::new() };
        let clock = if self.emulated { ", virtual time" } else { "" };
        let at = format!("95th percentile{clock}");
        let mut figures = vec![
            ("lina, faster than static", gain(lina.p95_speedup_vs_static), at.clone()),
            ("lina, over ideal", gain(lina.p95_vs_ideal), at),
            ("lina plans again", percent(lina.replan_rate), "of layers".into()),
        ];
        if let Some(accuracy) = lina.accuracy {
            figures.push(("lina estimates right", percent(accuracy), "of layers, as the paper counts".into()));
        }
        figures
    }

    fn of(&self, scheduler: &str) -> Option<&SchedulerResult> {
        self.schedulers.iter().find(|row| row.scheduler == scheduler)
    }

    fn clock(&self) -> &'static str {
        if self.emulated { ", emulated" } else { "" }
    }

    fn times_section(&self) -> Option<Section> {
        if self.schedulers.is_empty() {
            return None;
        }
        Some(Section {
            id: "schedulers",
            heading: "Schedulers compared",
            caption: format!(
                "Time of a batch over that of an ideal one, whose gate is forced to balance. {}",
                clock_sentence(self.emulated, None)
            ),
            body: self.bars() + &self.table(),
            shows_time: true,
        })
    }

    fn bars(&self) -> String {
        let bottom = 8.0 + SLOT * self.schedulers.len() as f64;
        let plot = Plot { left: LEFT, right: WIDTH - 360.0, top: 8.0, bottom };
        let ratios = self.schedulers.iter().flat_map(|row| [row.p50_vs_ideal, row.p95_vs_ideal]);
        let x = Scale::new((0.0, longest(ratios).max(1.0)), (plot.left, plot.right));
        let clock = self.clock();
        let mut out = svg::legend(&[
            ("compute", &format!("batch, median{clock}")),
            ("allreduce", &format!("batch, 95th percentile{clock}")),
            ("link-bound", "ideal"),
            ("bound", "the paper's best and worst case"),
        ]);
        out.push_str(&svg::open(bottom + 26.0, "Batch time of each scheduler over that of an ideal batch"));
        plot.bar_axis(&mut out, &x, "x ideal", 20.0);
        vertical(&mut out, "link-bound", x.at(1.0), plot.top, bottom, "ideal");
        for (index, row) in self.schedulers.iter().enumerate() {
            let y = plot.top + SLOT * index as f64 + SLOT / 2.0;
            name(&mut out, y, &row.scheduler);
            let [on_median, on_tail] = paper_notes(&row.scheduler);
            let marks: &[f64] = if row.scheduler == "lina" { &P95_VS_IDEAL } else { &[] };
            for (top, class, ratio, ms, what, note, marks) in [
                (y - BAR - 0.5, "compute", row.p50_vs_ideal, row.p50_ms, "median", on_median, &[][..]),
                (y + 0.5, "allreduce", row.p95_vs_ideal, row.p95_ms, "95th percentile", on_tail, marks),
            ] {
                let tip = format!("{}, {what}: {} ms{clock}, {ratio:.2}x ideal", row.scheduler, significant(ms));
                bar(&mut out, class, (plot.left, x.at(ratio)), top, &tip);
                for &mark in marks {
                    vertical(&mut out, "bound", x.at(mark), top - 2.0, top + BAR + 2.0, "the paper");
                }
                let after = marks.iter().map(|&mark| x.at(mark)).fold(x.at(ratio), f64::max);
                let note = if note.is_empty() { note } else { format!("   the paper: {note}") };
                let text = format!("{ratio:.2}");
                let muted = format!("  {} ms{note}", significant(ms));
                value(&mut out, after, top, &text, &muted);
            }
        }
        out.push_str("</svg>");
        out
    }

    fn table(&self) -> String {
        let ms = if self.emulated { "ms, emulated" } else { "ms" };
        let heads = [
            ("Scheduler", ""),
            ("Batch, median", ms),
            ("Batch, 95\u{a0}%", ms),
            ("Median / ideal", ""),
            ("95\u{a0}% / ideal", ""),
            ("95\u{a0}%, over static", ""),
            ("MoE layers", ms),
            ("All‑to‑all waits", ms),
            ("Copy waits", ms),
            ("Estimates right", "of layers"),
            ("Predicted right", "of tokens"),
            ("Re‑plans", "of layers"),
            ("Plan", "us, wall clock"),
            ("Moved", "a batch"),
            ("Imbalance", "largest / mean"),
        ];
        let rows = self.schedulers.iter().map(|row| {
            vec![
                row.scheduler.clone(),
                significant(row.p50_ms),
                significant(row.p95_ms),
                gain(row.p50_vs_ideal),
                gain(row.p95_vs_ideal),
                gain(row.p95_speedup_vs_static),
                significant(row.moe_ms),
                significant(row.a2a_ms),
                format!("{:.2}", row.copy_wait_ms),
                share(row.accuracy),
                share(row.token_accuracy),
                percent(row.replan_rate),
                optional(row.plan_us_median),
                bytes(row.moved_bytes as u64),
                format!("{:.2}", row.imbalance),
            ]
        });
        table(&heads, rows)
    }

    fn paper_section(&self) -> Option<Section> {
        let rows = self.paper_rows();
        let times = if self.emulated { "here, times emulated" } else { "here" };
        (!rows.is_empty()).then(|| Section {
            id: "inference-paper",
            heading: "Beside the paper's",
            caption:
                "USENIX ATC 2023, a figure for each of its two models, top-1; gains over static with 16 experts on 16 \
                      GPUs. Its models, devices and network are others, so figures compare in kind, not in size."
                    .into(),
            body: table(&[("", ""), ("Measured", times), ("The paper", "")], rows.into_iter().map(Vec::from)),
            shows_time: true,
        })
    }

    /// What the paper claims, of the schedulers that were measured: claim, figure here, figure there.
    fn paper_rows(&self) -> Vec<[String; 3]> {
        let mut rows = Vec::new();
        let Some(lina) = self.of("lina") else { return rows };
        let mut row = |claim: &str, here: String, paper: String| rows.push([claim.to_owned(), here, paper]);
        let pair = |figures: [f64; 2], show: fn(f64) -> String| figures.map(show).join(", ");
        if let Some(fixed) = self.of("static") {
            row(
                "lina, faster than static at the 95th percentile",
                gain(lina.p95_speedup_vs_static),
                format!("{}; mean {}", pair(P95_OVER_STATIC, gain), gain(P95_OVER_STATIC_MEAN)),
            );
            let median = fixed.p50_ms / lina.p50_ms;
            row("lina, faster than static at the median", gain(median), pair(P50_OVER_STATIC, gain));
        }
        if self.of("ideal").is_some() {
            let [best, worst] = P95_VS_IDEAL.map(gain);
            row("lina, over ideal at the 95th percentile", gain(lina.p95_vs_ideal), format!("{best} to {worst}"));
        }
        if lina.accuracy.is_some() {
            let papers = PATH_ACCURACY.map(|(length, figures)| format!("{} at l = {length}", pair(figures, percent)));
            let here = match self.path_length {
                Some(length) => format!("{} at l = {length}", share(lina.accuracy)),
                None => share(lina.accuracy),
            };
            row("estimates of lina with the true 2k most popular experts", here, papers.join("; "));
        }
        row("layers for which lina plans again", percent(lina.replan_rate), percent(REPLANS));
        if let Some(without) = self.of("no-estimation") {
            let slower = signed(without.p50_ms / lina.p50_ms - 1.0);
            row("without estimation, slower than lina at the median", slower, pair(NO_ESTIMATION_P50, signed));
        }
        if let Some(without) = self.of("no-fine-tuning") {
            let slower = signed(without.p95_ms / lina.p95_ms - 1.0);
            row("without phase two, slower than lina at the 95th percentile", slower, pair(NO_FINE_TUNING_P95, signed));
        }
        rows
    }

    fn estimates_section(&self) -> Option<Section> {
        let mut estimators: Vec<(&str, &SchedulerResult)> = Vec::new();
        for row in &self.schedulers {
            let known = row.layers.iter().any(|layer| layer.accuracy.or(layer.token_accuracy).is_some());
            if let Some(estimator) = row.estimator.as_deref().filter(|_| known)
                && !estimators.iter().any(|&(of, _)| of == estimator)
            {
                estimators.push((estimator, row));
            }
        }
        let layers = &estimators.first()?.1.layers;
        const ROW: f64 = 92.0;
        let height = 8.0 + ROW * estimators.len() as f64;
        let (left, right) = (LEFT + 30.0, WIDTH - 120.0);
        let slot = (right - left) / layers.len() as f64;
        let width = (slot * 0.36).min(30.0);
        let mut body = svg::legend(&[
            ("compute", "batches whose 2k most popular experts were the estimated ones (the paper's accuracy)"),
            ("allreduce", "tokens whose experts were predicted"),
        ]);
        body.push_str(&svg::open(height + 26.0, "Accuracy of each estimator by layer"));
        let _ =
            write!(body, "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\">all layers</text>", right + 14.0, height + 18.0);
        for (number, &(estimator, row)) in estimators.iter().enumerate() {
            let (top, base) = (8.0 + ROW * number as f64 + 22.0, 8.0 + ROW * (number + 1) as f64 - 6.0);
            let y = Scale::new((0.0, 1.0), (base, top));
            name(&mut body, (top + base) / 2.0, estimator);
            for (at, mark) in [(0.0, "0"), (0.5, "50"), (1.0, "100 %")] {
                let _ = write!(
                    body,
                    "<line class=\"grid\" x1=\"{left:.1}\" x2=\"{right:.1}\" y1=\"{0:.1}\" y2=\"{0:.1}\"/>\
                     <text class=\"tick\" text-anchor=\"end\" x=\"{1:.1}\" y=\"{2:.1}\">{mark}</text>",
                    y.at(at),
                    left - 6.0,
                    y.at(at) + 4.0
                );
            }
            for (index, layer) in row.layers.iter().enumerate() {
                let middle = left + slot * (index as f64 + 0.5);
                for (x, class, accuracy, of) in [
                    (middle - width - 0.5, "compute", layer.accuracy, "batches"),
                    (middle + 0.5, "allreduce", layer.token_accuracy, "tokens"),
                ] {
                    let Some(accuracy) = accuracy.filter(|share| share.is_finite()) else { continue };
                    let _ = write!(
                        body,
                        "<g><title>{}, layer {}: right for {} of {of}</title>\
                         <rect class=\"fill {class}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{:.1}\"/></g>",
                        escape(estimator),
                        layer.layer,
                        percent(accuracy),
                        y.at(accuracy),
                        base - y.at(accuracy)
                    );
                    if width >= 20.0 {
                        let _ = write!(
                            body,
                            "<text class=\"tick\" text-anchor=\"middle\" x=\"{:.1}\" y=\"{:.1}\">{:.0}</text>",
                            x + width / 2.0,
                            y.at(accuracy) - 4.0,
                            100.0 * accuracy
                        );
                    }
                }
            }
            for (line, class, accuracy) in [(-4.0, "compute", row.accuracy), (14.0, "allreduce", row.token_accuracy)] {
                let middle = (top + base) / 2.0 + line;
                let _ = write!(
                    body,
                    "<rect class=\"fill {class}\" x=\"{:.1}\" y=\"{:.1}\" width=\"9\" height=\"9\" rx=\"2\"/>\
                     <text class=\"label\" x=\"{:.1}\" y=\"{middle:.1}\">{}</text>",
                    right + 14.0,
                    middle - 9.0,
                    right + 30.0,
                    share(accuracy)
                );
            }
        }
        // Every n-th number, so that they stay apart however many layers there are.
        let every = (1usize..).find(|every| slot * *every as f64 >= 26.0).unwrap_or(1);
        for (index, layer) in layers.iter().enumerate().step_by(every) {
            let _ = write!(
                body,
                "<text class=\"tick\" text-anchor=\"middle\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                left + slot * (index as f64 + 0.5),
                height + 18.0,
                layer.layer
            );
        }
        let _ = write!(
            body,
            "<text class=\"tick\" text-anchor=\"end\" x=\"{:.1}\" y=\"{:.1}\">layer</text></svg>",
            left - 6.0,
            height + 18.0
        );
        let length = self.path_length.map_or(String::new(), |length| {
            format!(" Paths are of {length} {}.", if length == 1 { "layer" } else { "layers" })
        });
        Some(Section {
            id: "estimates",
            heading: "Accuracy of the estimates",
            caption: format!(
                "What an estimator said of a layer's experts before its gate did, in per cent, from the second layer with \
                 experts on; a scheduler's estimates do not depend on where it puts experts.{length}"
            ),
            body,
            shows_time: false,
        })
    }

    fn balance_section(&self) -> Option<Section> {
        if self.schedulers.is_empty() {
            return None;
        }
        const ROW: f64 = 28.0;
        let bottom = 8.0 + ROW * self.schedulers.len() as f64;
        let middle = (LEFT + WIDTH) / 2.0;
        let moved = Plot { left: LEFT, right: middle - 110.0, top: 8.0, bottom };
        let loaded = Plot { left: middle + 40.0, right: WIDTH - 60.0, top: 8.0, bottom };
        let mib = |row: &SchedulerResult| row.moved_bytes / f64::from(1 << 20);
        let bytes_at = Scale::new((0.0, longest(self.schedulers.iter().map(mib))), (moved.left, moved.right));
        let most = longest(self.schedulers.iter().map(|row| row.imbalance)).max(1.0);
        let load_at = Scale::new((0.0, most), (loaded.left, loaded.right));
        let mut body = svg::legend(&[
            ("copy", "weights copied into slots, a batch"),
            ("all-to-all", "rows of the largest device over the mean"),
            ("link-bound", "even"),
        ]);
        body.push_str(&svg::open(bottom + 26.0, "Bytes moved and imbalance of each scheduler"));
        moved.bar_axis(&mut body, &bytes_at, "MiB", 12.0);
        loaded.bar_axis(&mut body, &load_at, "", 12.0);
        vertical(&mut body, "link-bound", load_at.at(1.0), loaded.top, bottom, "even");
        for (index, row) in self.schedulers.iter().enumerate() {
            let y = moved.top + ROW * (index as f64 + 0.5);
            let top = y - BAR / 2.0;
            name(&mut body, y, &row.scheduler);
            let text = bytes(row.moved_bytes as u64);
            let end = bytes_at.at(mib(row));
            bar(&mut body, "copy", (moved.left, end), top, &format!("{}: {text} a batch", row.scheduler));
            value(&mut body, end, top, &text, "");
            let text = format!("{:.2}", row.imbalance);
            let end = load_at.at(row.imbalance);
            bar(&mut body, "all-to-all", (loaded.left, end), top, &format!("{}: {text}", row.scheduler));
            value(&mut body, end, top, &text, "");
        }
        body.push_str("</svg>");
        Some(Section {
            id: "balance",
            heading: "Weights moved and balance of the devices",
            caption:
                "Copies of experts from host memory into slots, on all ranks together, and how much more than the mean \
                      the busiest device computes: means over batches and layers."
                    .into(),
            body,
            shows_time: false,
        })
    }
}

/// The paper's figures that belong beside a scheduler's median and its 95th percentile.
fn paper_notes(scheduler: &str) -> [String; 2] {
    let over_lina = |figures: [f64; 2]| format!("{} over lina", figures.map(signed).join(", "));
    match scheduler {
        "static" => {
            [P50_OVER_STATIC, P95_OVER_STATIC].map(|gains| format!("lina {} faster", gains.map(gain).join(", ")))
        }
        "lina" => [String::new(), P95_VS_IDEAL.map(|ratio| format!("{ratio:.2}")).join(" to ")],
        "no-estimation" => [over_lina(NO_ESTIMATION_P50), String::new()],
        "no-fine-tuning" => [String::new(), over_lina(NO_FINE_TUNING_P95)],
        _ => [String::new(), String::new()],
    }
}

fn gain(ratio: f64) -> String {
    if ratio.is_finite() { format!("{ratio:.2}x") } else { "–".into() }
}

fn share(share: Option<f64>) -> String {
    share.map_or("–".into(), percent)
}

fn signed(share: f64) -> String {
    if share.is_finite() { format!("{:+.1} %", 100.0 * share) } else { "–".into() }
}

fn longest(values: impl Iterator<Item = f64>) -> f64 {
    values.filter(|value| value.is_finite()).fold(0.0, f64::max)
}

/// A row's name before its chart, centred on `y`.
fn name(out: &mut String, y: f64, name: &str) {
    let (x, y, name) = (LEFT - 12.0, y + 4.5, escape(name));
    let _ = write!(out, "<text class=\"label\" text-anchor=\"end\" x=\"{x:.1}\" y=\"{y:.1}\">{name}</text>");
}

/// A horizontal bar with a tooltip.
fn bar(out: &mut String, class: &str, (from, to): (f64, f64), top: f64, tip: &str) {
    let (width, tip) = (to - from, escape(tip));
    let _ = write!(
        out,
        "<g><title>{tip}</title><rect class=\"fill {class}\" x=\"{from:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{BAR}\"/></g>"
    );
}

/// What stands behind a bar that ends at `end`.
fn value(out: &mut String, end: f64, top: f64, text: &str, muted: &str) {
    let (x, y, text, muted) = (end + 9.0, top + BAR - 2.0, escape(text), escape(muted));
    let _ = write!(
        out,
        "<text class=\"label\" x=\"{x:.1}\" y=\"{y:.1}\">{text}<tspan class=\"muted\">{muted}</tspan></text>"
    );
}

fn vertical(out: &mut String, class: &str, x: f64, top: f64, bottom: f64, tip: &str) {
    let _ = write!(
        out,
        "<line class=\"{class}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\"><title>{tip}</title></line>"
    );
}

/// A table whose first column names the row.
fn table(heads: &[(&str, &str)], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut html = String::from("<div class=\"scroll\"><table><thead><tr>");
    for (head, unit) in heads {
        let _ = write!(html, "<th>{head}<span class=\"unit\">{unit}</span></th>");
    }
    html.push_str("</tr></thead><tbody>");
    for row in rows {
        html.push_str("<tr>");
        for cell in row {
            let _ = write!(html, "<td>{}</td>", escape(&cell));
        }
        html.push_str("</tr>");
    }
    html.push_str("</tbody></table></div>");
    html
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn row(scheduler: &str, estimator: Option<&str>, p50_ms: f64, p95_ms: f64) -> SchedulerResult {
        let known = estimator.map(|_| 0.604);
        let layer = |layer| LayerAccuracyNumbers { layer, accuracy: known, overlap: known, token_accuracy: Some(0.71) };
        SchedulerResult {
            scheduler: scheduler.into(),
            estimator: estimator.map(Into::into),
            p50_ms,
            p95_ms,
            p50_vs_ideal: p50_ms / 10.0,
            p95_vs_ideal: p95_ms / 11.0,
            p95_speedup_vs_static: 22.0 / p95_ms,
            accuracy: known,
            token_accuracy: estimator.map(|_| 0.71),
            replan_rate: 0.125,
            plan_us_median: Some(42.0),
            moved_bytes: 3.0 * f64::from(1 << 20),
            imbalance: 1.37,
            layers: if estimator.is_some() { vec![layer(3), layer(7)] } else { vec![LayerAccuracyNumbers::default()] },
            ..SchedulerResult::default()
        }
    }

    pub(in crate::html) fn comparison() -> InferenceComparison {
        InferenceComparison {
            schedulers: vec![
                row("static", None, 18.0, 22.0),
                row("ideal", None, 10.0, 11.0),
                row("lina", Some("path"), 12.0, 13.75),
                row("li<na@oracle", Some("ora<cle"), 11.0, 12.0),
                row("no-estimation", None, 15.0, 16.0),
                row("no-fine-tuning", Some("path"), 12.0, 16.5),
            ],
            path_length: Some(3),
            emulated: true,
        }
    }

    #[test]
    fn the_page_holds_what_was_measured_beside_the_papers_figures() {
        let [times, paper, estimates, balance] = comparison().sections().map(Option::unwrap);
        assert!(
            times.body.contains("<td>lina</td><td>12.0</td><td>13.8</td><td>1.20x</td><td>1.25x</td><td>1.60x</td>")
        );
        assert!(
            times
                .body
                .contains("<td>60.4 %</td><td>71.0 %</td><td>12.5 %</td><td>42.0</td><td>3.00 MiB</td><td>1.37</td>")
        );
        assert_eq!(times.body.matches("<line class=\"bound\"").count(), 2, "the paper's best and worst case");
        for line in [
            "lina, faster than static at the 95th percentile</td><td>1.60x</td><td>1.82x, 1.68x; mean 1.63x",
            "lina, faster than static at the median</td><td>1.50x</td><td>1.54x, 1.36x",
            "lina, over ideal at the 95th percentile</td><td>1.25x</td><td>1.04x to 1.11x",
            "<td>60.4 % at l = 3</td><td>31.6 %, 28.3 % at l = 1; 60.4 %, 63.5 % at l = 3; 71.4 %, 66.0 % at l = 6",
            "plans again</td><td>12.5 %</td><td>23.0 %",
            "at the median</td><td>+25.0 %</td><td>+24.0 %, +18.6 %",
            "at the 95th percentile</td><td>+20.0 %</td><td>+26.7 %, +33.1 %",
        ] {
            assert!(paper.body.contains(line), "{line} in {}", paper.body);
        }
        // Two estimators, each once, with two layers and two ways to count.
        assert_eq!(estimates.body.matches("<g><title>").count(), 2 * 2 * 2);
        assert!(estimates.body.contains("path, layer 7: right for 60.4 % of batches"));
        assert!(estimates.caption.contains("Paths are of 3 layers."));
        assert!(balance.body.contains("lina: 3.00 MiB a batch") && balance.body.contains("no-estimation: 1.37<"));
    }

    #[test]
    fn what_was_not_measured_is_not_there() {
        let only = |names: &[&str]| {
            let mut comparison = comparison();
            comparison.schedulers.retain(|row| names.contains(&row.scheduler.as_str()));
            comparison
        };
        let [times, paper, estimates, _] = only(&["static", "ideal"]).sections();
        assert!(times.is_some() && paper.is_none() && estimates.is_none());
        assert!(only(&["static"]).figures().is_empty());
        let [_, paper, ..] = only(&["lina"]).sections();
        assert!(!paper.unwrap().body.contains("static"));
        assert!(InferenceComparison::default().sections().iter().all(Option::is_none));
    }
}
