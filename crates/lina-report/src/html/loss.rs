//! The loss curve: training loss, smoothed over its noise, and held-out loss.

use std::fmt::Write as _;

use super::Section;
use super::svg::{self, Plot, Scale, WIDTH};

/// Above this many points a curve is drawn through means of neighbours.
const MOST_POINTS: usize = 540;

/// Loss over the steps, in nats per token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LossCurve {
    /// Training loss as (step, loss), steps ascending. Values that are not finite leave a gap.
    pub train: Vec<(u64, f64)>,
    /// Held-out loss as (step, loss), steps ascending.
    pub held_out: Vec<(u64, f64)>,
}

impl LossCurve {
    pub(super) fn section(&self) -> Option<Section> {
        let finite = |points: &[(u64, f64)]| -> Vec<(f64, f64)> {
            let finite = points.iter().filter(|(_, loss)| loss.is_finite());
            finite.map(|&(step, loss)| (step as f64, loss)).collect()
        };
        let (train, held_out) = (thin(&finite(&self.train)), finite(&self.held_out));
        let all = || train.iter().chain(&held_out);
        all().next()?;
        let range = |value: fn(&(f64, f64)) -> f64| {
            all().map(value).fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
        };
        let (steps, losses) = (range(|point| point.0), range(|point| point.1));
        let margin = ((losses.1 - losses.0) * 0.06).max(1e-3);

        let plot = Plot { left: 56.0, right: WIDTH - 12.0, top: 28.0, bottom: 292.0 };
        let x = Scale::new(steps, (plot.left + 4.0, plot.right - 4.0));
        let y = Scale::new((losses.0 - margin, losses.1 + margin), (plot.bottom, plot.top));
        let mut body = svg::legend(&[("train", "training"), ("held-out", "held out")]);
        body.push_str(&svg::open(320.0, "Loss over the steps"));
        plot.y_axis(&mut body, &y, "nats");
        plot.x_axis(&mut body, &x, "step");
        let smooth = smoothed(&train);
        if smooth.len() > 8 {
            path(&mut body, "line train faint", &train, &x, &y);
            path(&mut body, "line train", &smooth, &x, &y);
        } else {
            path(&mut body, "line train", &train, &x, &y);
        }
        path(&mut body, "line held-out", &held_out, &x, &y);
        for (class, points, radius) in [("hit", &train, 5.0), ("dot held-out", &held_out, 3.5)] {
            for &(step, loss) in points {
                let _ = write!(
                    body,
                    "<circle class=\"{class}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"{radius}\"><title>step {step:.0}: {loss:.4}</title></circle>",
                    x.at(step),
                    y.at(loss)
                );
            }
        }
        body.push_str("</svg>");
        Some(Section {
            id: "loss",
            heading: "Loss",
            caption: "Mean cross-entropy of the next token; the bold line is the training loss smoothed.".into(),
            body,
            shows_time: false,
        })
    }
}

/// Means of as many neighbours as bring the number of points under the limit.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let group = points.len().div_ceil(MOST_POINTS).max(1);
    let mean = |points: &[(f64, f64)]| {
        let (steps, losses) = points.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (steps / points.len() as f64, losses / points.len() as f64)
    };
    points.chunks(group).map(mean).collect()
}

/// Means over a window centred on each point, a twenty-fifth of the curve wide and narrower towards its ends.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = points.len() / 50;
    let mean = |index: usize| {
        let reach = reach.min(index).min(points.len() - 1 - index);
        let window = &points[index - reach..=index + reach];
        window.iter().map(|point| point.1).sum::<f64>() / window.len() as f64
    };
    points.iter().enumerate().map(|(index, point)| (point.0, mean(index))).collect()
}

fn path(out: &mut String, class: &str, points: &[(f64, f64)], x: &Scale, y: &Scale) {
    if points.len() < 2 {
        return;
    }
    let _ = write!(out, "<polyline class=\"{class}\" points=\"");
    for &(step, loss) in points {
        let _ = write!(out, "{:.1},{:.1} ", x.at(step), y.at(loss));
    }
    out.push_str("\"/>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_curves_are_thinned_without_bias() {
        let points: Vec<_> = (0..5400).map(|step| (step as f64, (step % 2) as f64)).collect();
        let thinned = thin(&points);
        assert_eq!(thinned.len(), 540);
        assert!(thinned.iter().all(|point| point.1 == 0.5));
        assert_eq!(thin(&points[..10]), points[..10]);
    }

    #[test]
    fn smoothing_keeps_straight_lines() {
        let line: Vec<_> = (0..200).map(|step| (step as f64, 2.0 * step as f64)).collect();
        assert_eq!(smoothed(&line), line);
    }
}
