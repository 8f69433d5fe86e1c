//! What all charts share: escaping, scales, axes and legends.

use std::fmt::Write as _;

/// Width of every chart in user units; the page scales it.
pub(super) const WIDTH: f64 = 1080.0;

/// Text made safe for HTML content and attributes.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// A linear map from data to user units.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    from: f64,
    to: f64,
    start: f64,
    end: f64,
}

impl Scale {
    /// Maps `from..to` to `start..end`. An empty data range is widened, so that a single value has a place.
    pub(super) fn new((from, to): (f64, f64), (start, end): (f64, f64)) -> Self {
        let to = if to > from { to } else { from + from.abs().max(1.0) * 1e-3 };
        Self { from, to, start, end }
    }

    /// The place of a value.
    pub(super) fn at(&self, value: f64) -> f64 {
        self.start + (value - self.from) / (self.to - self.from) * (self.end - self.start)
    }

    /// About `count` round values within the range, evenly spaced by 1, 2 or 5 times a power of ten.
    pub(super) fn ticks(&self, count: usize) -> Ticks {
        let raw = (self.to - self.from) / count.max(1) as f64;
        let power = 10f64.powf(raw.log10().floor());
        let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|&f| f * power >= raw * 0.999).unwrap_or(10.0);
        let step = factor * power;
        let decimals = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
        let first = (self.from / step - 1e-9).ceil() as i64;
        let last = (self.to / step + 1e-9).floor() as i64;
        Ticks { values: (first..=last).map(|index| index as f64 * step).collect(), decimals }
    }
}

/// Where an axis is marked.
pub(super) struct Ticks {
    pub(super) values: Vec<f64>,
    decimals: usize,
}

impl Ticks {
    /// The mark's text.
    pub(super) fn label(&self, value: f64) -> String {
        format!("{value:.0$}", self.decimals)
    }
}

/// The rectangle in which a chart with two axes draws.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plot {
    pub(super) left: f64,
    pub(super) right: f64,
    pub(super) top: f64,
    pub(super) bottom: f64,
}

impl Plot {
    /// The grid of `x` behind horizontal bars, its marks below them, and `unit` so far to the left of the first.
    pub(super) fn bar_axis(&self, out: &mut String, x: &Scale, unit: &str, unit_distance: f64) {
        let (top, bottom, below) = (self.top, self.bottom, self.bottom + 18.0);
        let ticks = x.ticks(8);
        for &value in &ticks.values {
            let _ = write!(
                out,
                "<line class=\"grid\" x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\"/>\
                 <text class=\"tick\" text-anchor=\"middle\" x=\"{0:.1}\" y=\"{below:.1}\">{1}</text>",
                x.at(value),
                ticks.label(value)
            );
        }
        let _ = write!(
            out,
            "<text class=\"tick\" text-anchor=\"end\" x=\"{:.1}\" y=\"{below:.1}\">{unit}</text>",
            self.left - unit_distance
        );
    }

    /// Horizontal grid lines with their values, and a unit above them.
    pub(super) fn y_axis(&self, out: &mut String, scale: &Scale, unit: &str) {
        let ticks = scale.ticks(5);
        for &value in &ticks.values {
            let y = scale.at(value);
            let _ = write!(
                out,
                "<line class=\"grid\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text class=\"tick\" text-anchor=\"end\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                self.left,
                self.right,
                self.left - 8.0,
                y + 4.0,
                ticks.label(value)
            );
        }
        let _ = write!(
            out,
            "<text class=\"tick\" text-anchor=\"end\" x=\"{:.1}\" y=\"{:.1}\">{unit}</text>",
            self.left - 8.0,
            self.top - 10.0
        );
    }

    /// The base line with values under it, and what they count at its end.
    pub(super) fn x_axis(&self, out: &mut String, scale: &Scale, unit: &str) {
        let ticks = scale.ticks(8);
        let base = self.bottom;
        let _ = write!(
            out,
            "<line class=\"base\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{base:.1}\" y2=\"{base:.1}\"/>",
            self.left, self.right
        );
        for value in ticks.values.iter().copied().filter(|value| value.fract() == 0.0) {
            let x = scale.at(value);
            // The unit stands at the right end; a value there would run into it.
            if x < self.right - 40.0 {
                let _ = write!(
                    out,
                    "<text class=\"tick\" text-anchor=\"middle\" x=\"{x:.1}\" y=\"{:.1}\">{value}</text>",
                    base + 18.0
                );
            }
        }
        let _ = write!(
            out,
            "<text class=\"tick\" text-anchor=\"end\" x=\"{:.1}\" y=\"{:.1}\">{unit}</text>",
            self.right,
            base + 18.0
        );
    }
}

/// Opens a chart of the given height; `label` tells screen readers what it shows.
pub(super) fn open(height: f64, label: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{}\">", escape(label))
}

/// A legend of colour classes and their names, as HTML above a chart.
pub(super) fn legend(entries: &[(&str, &str)]) -> String {
    let mut html = String::from("<div class=\"legend\">");
    for (class, name) in entries {
        let _ = write!(html, "<span class=\"entry\"><span class=\"swatch {class}\"></span>{name}</span>");
    }
    html.push_str("</div>");
    html
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within() {
        let ticks = |from, to| {
            let ticks = Scale::new((from, to), (0.0, 1.0)).ticks(5);
            ticks.values.iter().map(|&value| ticks.label(value)).collect::<Vec<_>>()
        };
        assert_eq!(ticks(0.0, 1.0), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(ticks(3.0, 98.0), ["20", "40", "60", "80"]);
        assert_eq!(ticks(0.0, 0.012), ["0.000", "0.005", "0.010"]);
        assert!(!ticks(7.0, 7.0).is_empty());
    }

    #[test]
    fn scales_map_ends_to_ends() {
        let scale = Scale::new((10.0, 20.0), (300.0, 100.0));
        assert_eq!([10.0, 15.0, 20.0].map(|value| scale.at(value)), [300.0, 200.0, 100.0]);
        assert!(Scale::new((5.0, 5.0), (0.0, 10.0)).at(5.0).is_finite());
    }
}
