//! `lina bench layer`: one MoE layer on a GPU, forward and backward, beside what grouped products of the same shapes in any
//! other formulation take.

use std::str::FromStr;

use lina_cuda::Gpu;
use lina_model::{CudaMoeLayer, ModelConfig, ModelKind, Sizes};
use lina_report::{Align, Table};
use serde::Serialize;

use crate::bench::median;
use crate::{Scalar, TrainError};

/// Sizes of a layer and its batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LayerShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Hidden width of an expert.
    pub expert_hidden: usize,
    /// Experts.
    pub experts: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Tokens.
    pub tokens: usize,
}

impl LayerShape {
    /// Mixtral's layer, and three with smaller experts.
    pub const DEFAULTS: [LayerShape; 4] = [
        LayerShape { hidden: 4096, expert_hidden: 14336, experts: 8, top_k: 2, tokens: 8192 },
        LayerShape { hidden: 2048, expert_hidden: 1024, experts: 64, top_k: 8, tokens: 16384 },
        LayerShape { hidden: 2048, expert_hidden: 768, experts: 128, top_k: 8, tokens: 16384 },
        LayerShape { hidden: 768, expert_hidden: 3072, experts: 16, top_k: 2, tokens: 16384 },
    ];
}

impl FromStr for LayerShape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let sizes: Option<Vec<usize>> = text.split(',').map(|size| size.trim().parse().ok()).collect();
        let Some(&[hidden, expert_hidden, experts, top_k, tokens]) = sizes.as_deref() else {
            return Err("expected HIDDEN,EXPERT_HIDDEN,EXPERTS,TOP_K,TOKENS".to_owned());
        };
        if tokens == 0 || tokens > 1 << 20 {
            return Err(format!("{tokens} tokens, expected 1 to {}", 1 << 20));
        }
        Ok(LayerShape { hidden, expert_hidden, experts, top_k, tokens })
    }
}

/// What a layer took.
#[derive(Clone, Debug, Serialize)]
pub struct LayerRow {
    /// The layer.
    #[serde(flatten)]
    pub shape: LayerShape,
    /// Forward pass, median.
    pub forward_ms: f64,
    /// Rate of the experts' products in it.
    pub forward_tflops: f64,
    /// Forward and backward pass, median.
    pub step_ms: f64,
    /// Rate of the experts' products in them.
    pub step_tflops: f64,
}

/// The layers.
#[derive(Clone, Debug, Serialize)]
pub struct LayerSummary {
    /// Name of the GPU.
    pub gpu: String,
    /// How activations and weights are stored.
    pub dtype: Scalar,
    /// A row a shape.
    pub layers: Vec<LayerRow>,
}

impl LayerSummary {
    /// The rows as a table for a terminal.
    pub fn table(&self) -> String {
        let sizes = ["hidden", "expert", "experts", "top-k", "tokens"].map(|name| (name, Align::Right));
        let times = ["forward ms", "TFLOP/s", "with backward ms", "TFLOP/s"].map(|name| (name, Align::Right));
        let mut table = Table::new(sizes.into_iter().chain(times));
        for row in &self.layers {
            let LayerShape { hidden, expert_hidden, experts, top_k, tokens } = row.shape;
            let sizes = [hidden, expert_hidden, experts, top_k, tokens].map(|size| size.to_string());
            let times = [
                format!("{:.3}", row.forward_ms),
                format!("{:.0}", row.forward_tflops),
                format!("{:.3}", row.step_ms),
                format!("{:.0}", row.step_tflops),
            ];
            table.row(sizes.into_iter().chain(times));
        }
        format!("{}, {}\n\n{}", self.gpu, self.dtype.name(), table.render())
    }
}

/// Runs before those that count.
const WARM_UP: usize = 5;

/// Measures each layer `runs` times on GPU `ordinal`.
///
/// # Errors
/// If there is no such GPU, or it does not suffice for a shape.
pub fn bench_layer(
    ordinal: usize,
    shapes: &[LayerShape],
    dtype: Scalar,
    runs: usize,
) -> Result<LayerSummary, TrainError> {
    let mut name = String::new();
    let mut layers = Vec::new();
    for shape in shapes {
        let gpu = Gpu::open(ordinal)?;
        name.clone_from(&gpu.device().facts().name);
        let LayerShape { hidden, expert_hidden, experts, top_k, tokens } = *shape;
        let sizes = Sizes { vocab: 1, hidden, layers: 1, heads: 1, experts, top_k, expert_hidden };
        let mut config = ModelConfig::family(ModelKind::Mixtral, sizes);
        // Attention is not computed, but a plan is made for its heads.
        (config.head_dim, config.max_positions) = (64, tokens);
        let mut layer = CudaMoeLayer::new(gpu, config, dtype.into(), tokens)?;
        let forward_ms = median_ms(&mut layer, false, runs)?;
        let step_ms = median_ms(&mut layer, true, runs)?;
        let tflop = layer.forward_flops() as f64 / 1e12;
        layers.push(LayerRow {
            shape: *shape,
            forward_ms,
            forward_tflops: tflop * 1e3 / forward_ms,
            step_ms,
            step_tflops: 3.0 * tflop * 1e3 / step_ms,
        });
    }
    Ok(LayerSummary { gpu: name, dtype, layers })
}

fn median_ms(layer: &mut CudaMoeLayer, backward: bool, runs: usize) -> Result<f64, TrainError> {
    let mut times = Vec::with_capacity(runs);
    for run in 0..WARM_UP + runs.max(1) {
        let (start, end) = (layer.gpu().event()?, layer.gpu().event()?);
        start.record(layer.gpu().stream())?;
        layer.run(backward)?;
        end.record(layer.gpu().stream())?;
        end.synchronize()?;
        if run >= WARM_UP {
            times.push(f64::from(end.elapsed_ms_since(&start)?));
        }
    }
    Ok(median(&times))
}
