//! How tokens spread over the experts of each layer, as a heat map.

use std::fmt::Write as _;

use super::Section;
use super::svg::{self, WIDTH, escape};
use crate::format::thousands;

/// Number of colours, `heat0` to `heat8` in the style sheet.
const COLOURS: usize = 9;

/// Tokens that each expert received.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpertLoad {
    /// Which steps were counted, for instance `steps 900 to 999`.
    pub steps: String,
    /// The MoE layers, in order.
    pub layers: Vec<LayerLoad>,
}

/// Tokens that each expert of one layer received.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerLoad {
    /// The decoder layer's number.
    pub layer: u32,
    /// Routed tokens per expert; a token routed to two experts counts for both.
    pub tokens: Vec<u64>,
}

impl LayerLoad {
    /// Each expert's tokens over the layer's mean: 1 is even.
    fn ratios(&self) -> Vec<f64> {
        let mean = self.tokens.iter().sum::<u64>() as f64 / self.tokens.len().max(1) as f64;
        self.tokens.iter().map(|&tokens| if mean > 0.0 { tokens as f64 / mean } else { 0.0 }).collect()
    }
}

impl ExpertLoad {
    pub(super) fn section(&self) -> Option<Section> {
        let experts = self.layers.iter().map(|layer| layer.tokens.len()).max().filter(|&experts| experts > 0)?;
        let ratios: Vec<Vec<f64>> = self.layers.iter().map(LayerLoad::ratios).collect();
        let hottest = ratios.iter().flatten().copied().fold(0.0, f64::max);
        // A scale of at least twice the even share, in steps of a half, so that a balanced model looks balanced.
        let top = (hottest.max(2.0) * 2.0).ceil() / 2.0;

        let (left, right, head) = (72.0, WIDTH - 92.0, 26.0);
        let cell_width = (right - left) / experts as f64;
        let cell_height = if self.layers.len() > 32 { 14.0 } else { 24.0 };
        let gap = if cell_width > 10.0 { 2.0 } else { 0.5 };
        let height = head + cell_height * self.layers.len() as f64 + 24.0;
        let mut body = legend(top);
        body.push_str(&svg::open(height, "Share of tokens of each expert in each layer, relative to an even share"));
        let _ = write!(body, "<text class=\"tick\" text-anchor=\"end\" x=\"{:.1}\" y=\"16\">layer</text>", left - 10.0);
        let _ = write!(body, "<text class=\"tick\" x=\"{:.1}\" y=\"16\">hottest</text>", right + 12.0);
        let every = (1usize..).find(|every| cell_width * *every as f64 >= 26.0).unwrap_or(1);
        for expert in (0..experts).step_by(every) {
            let x = left + cell_width * (expert as f64 + 0.5);
            let _ = write!(body, "<text class=\"tick\" text-anchor=\"middle\" x=\"{x:.1}\" y=\"16\">{expert}</text>");
        }
        for (index, (layer, ratios)) in self.layers.iter().zip(&ratios).enumerate() {
            let y = head + cell_height * index as f64;
            let baseline = y + cell_height / 2.0 + 4.0;
            let _ = write!(
                body,
                "<text class=\"tick\" text-anchor=\"end\" x=\"{:.1}\" y=\"{baseline:.1}\">{}</text>",
                left - 10.0,
                layer.layer
            );
            for (expert, (&ratio, &tokens)) in ratios.iter().zip(&layer.tokens).enumerate() {
                let x = left + cell_width * expert as f64;
                let colour = colour(ratio, top);
                let _ = write!(
                    body,
                    "<g class=\"heat{colour}\"><title>layer {}, expert {expert}: {} tokens, {ratio:.2}x the even share</title>\
                     <rect x=\"{:.2}\" y=\"{:.2}\" width=\"{:.2}\" height=\"{:.2}\" rx=\"2\"/>",
                    layer.layer,
                    thousands(tokens),
                    x + gap / 2.0,
                    y + gap / 2.0,
                    cell_width - gap,
                    cell_height - gap
                );
                if cell_width >= 40.0 && cell_height >= 20.0 {
                    let _ = write!(
                        body,
                        "<text text-anchor=\"middle\" x=\"{:.1}\" y=\"{baseline:.1}\">{ratio:.2}</text>",
                        x + cell_width / 2.0
                    );
                }
                body.push_str("</g>");
            }
            let highest = ratios.iter().copied().fold(0.0, f64::max);
            let _ =
                write!(body, "<text class=\"tick\" x=\"{:.1}\" y=\"{baseline:.1}\">{highest:.2}x</text>", right + 12.0);
        }
        let _ = write!(
            body,
            "<text class=\"tick\" text-anchor=\"end\" x=\"{right:.1}\" y=\"{:.1}\">expert</text></svg>",
            height - 6.0
        );
        let counted =
            if self.steps.is_empty() { String::new() } else { format!(" Counted over {}.", escape(&self.steps)) };
        Some(Section {
            id: "experts",
            heading: "Load of the experts",
            caption: format!(
                "Tokens routed to each expert, relative to an even share within its layer (1 is even).{counted}"
            ),
            body,
            shows_time: false,
        })
    }
}

/// The colour's number for a ratio on a scale from 0 to `top`.
fn colour(ratio: f64, top: f64) -> usize {
    ((ratio / top * COLOURS as f64) as usize).min(COLOURS - 1)
}

fn legend(top: f64) -> String {
    let mut html = String::from("<div class=\"legend\"><span class=\"entry\">0</span><span class=\"ramp\">");
    for colour in 0..COLOURS {
        let _ = write!(html, "<span class=\"swatch heat{colour}\"></span>");
    }
    let _ = write!(html, "</span><span class=\"entry\">{top}x the even share</span></div>");
    html
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_relative_to_even() {
        assert_eq!(LayerLoad { layer: 0, tokens: vec![10, 30, 0, 0] }.ratios(), [1.0, 3.0, 0.0, 0.0]);
        assert_eq!(LayerLoad { layer: 0, tokens: vec![0, 0] }.ratios(), [0.0, 0.0]);
        assert_eq!([0.0, 1.0, 1.999, 2.0].map(|ratio| colour(ratio, 2.0)), [0, 4, 8, 8]);
    }

    #[test]
    fn many_experts_are_cells_without_numbers() {
        let layers = (0..48).map(|layer| LayerLoad { layer, tokens: vec![5; 128] }).collect();
        let body = ExpertLoad { steps: String::new(), layers }.section().unwrap().body;
        assert_eq!(body.matches("<rect").count(), 48 * 128);
        assert_eq!(body.matches(">1.00</text>").count(), 0);
    }
}
