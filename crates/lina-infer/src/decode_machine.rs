//! What decoding and prefill are measured beside: how fast weights can be read, and how long a prompt's matrix products take
//! alone.

use std::time::Instant;

use lina_kernels::gemm::Shape;
use lina_kernels::{Compute, read_bandwidth};
use lina_train::ProductReplay;

#[cfg(feature = "cuda")]
use lina_cuda::{Addend, Buffer, CudaError, DType, Gpu, Mat, MatMut, matmul};
#[cfg(feature = "cuda")]
use lina_model::ModelConfig;

use crate::InferError;

/// A machine that bounds are measured on.
pub(crate) enum Machine {
    /// Processors, on which the prompt's products are run again.
    Host { compute: Compute, replay: ProductReplay },
    /// A GPU.
    #[cfg(feature = "cuda")]
    Cuda(Box<CudaMachine>),
}

impl Machine {
    /// Processors that run `shapes` on `threads` threads.
    pub fn host(threads: usize, shapes: Vec<Shape>) -> Self {
        Machine::Host { compute: Compute::new(threads), replay: ProductReplay::new(shapes) }
    }

    /// Bytes a second at which weights could be read.
    pub fn read_bytes_per_s(&mut self) -> Result<f64, InferError> {
        match self {
            Machine::Host { compute, .. } => Ok(read_bandwidth(compute)),
            #[cfg(feature = "cuda")]
            Machine::Cuda(machine) => Ok(machine.copy_bytes_per_s()?),
        }
    }

    /// Milliseconds of the prompt's products.
    pub fn products_ms(&mut self) -> Result<f64, InferError> {
        match self {
            Machine::Host { compute, replay } => {
                let begun = Instant::now();
                replay.run(compute);
                Ok(begun.elapsed().as_secs_f64() * 1e3)
            }
            #[cfg(feature = "cuda")]
            Machine::Cuda(machine) => Ok(machine.products_ms()?),
        }
    }

    /// Operations of the prompt's products, in units of 10⁹.
    pub fn products_gflop(&self) -> f64 {
        match self {
            Machine::Host { replay, .. } => replay.gflop(),
            #[cfg(feature = "cuda")]
            Machine::Cuda(machine) => machine.gflop,
        }
    }
}

/// Bytes that are copied to find the memory's rate: beyond what caches hold.
#[cfg(feature = "cuda")]
const COPY_BYTES: usize = 1 << 30;
/// Rows, columns and depth of the product that finds the rate of products.
#[cfg(feature = "cuda")]
const PRODUCT: usize = 8192;

/// A GPU, whose memory is timed as it copies, reading and writing, and whose products as one large one.
#[cfg(feature = "cuda")]
pub(crate) struct CudaMachine {
    gpu: Gpu,
    from: Buffer,
    to: Buffer,
    /// `[PRODUCT, PRODUCT]` each.
    factors: [Buffer; 2],
    product: Buffer,
    gflop: f64,
}

#[cfg(feature = "cuda")]
impl CudaMachine {
    /// The GPU for products of `gflop` · 10⁹ operations on numbers of `dtype`.
    pub fn new(gpu: Gpu, dtype: DType, gflop: f64) -> Result<Self, CudaError> {
        let copied = || gpu.zeros(COPY_BYTES / DType::F32.bytes(), DType::F32);
        let (from, to) = (copied()?, copied()?);
        // What is multiplied matters: zeros take less power, and so less time.
        let numbers: Vec<f32> = (0..PRODUCT * PRODUCT).map(|i| ((i * 7919) % 2039) as f32 / 1019.0 - 1.0).collect();
        let factors = [gpu.buffer_from(&numbers, dtype)?, gpu.buffer_from(&numbers, dtype)?];
        let product = gpu.uninit(PRODUCT * PRODUCT, dtype)?;
        Ok(CudaMachine { gpu, from, to, factors, product, gflop })
    }

    fn copy_bytes_per_s(&mut self) -> Result<f64, CudaError> {
        let Self { gpu, from, to, .. } = self;
        let ms = timed(gpu, || gpu.copy(from.whole(), to.whole_mut()))?;
        Ok(2.0 * COPY_BYTES as f64 / ms * 1e3)
    }

    fn products_ms(&mut self) -> Result<f64, CudaError> {
        let Self { gpu, factors: [a, b], product, gflop, .. } = self;
        let ms = timed(gpu, || {
            let [a, b] = [&*a, &*b].map(|factor| Mat::new(factor.whole(), PRODUCT, PRODUCT));
            matmul(gpu, MatMut::new(product.whole_mut(), PRODUCT, PRODUCT), a, b.t(), Addend::None)
        })?;
        Ok(*gflop * ms / (2.0 * (PRODUCT as f64).powi(3) / 1e9))
    }
}

/// Milliseconds of the second of two runs.
#[cfg(feature = "cuda")]
fn timed(gpu: &Gpu, mut run: impl FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
    let (begun, ended) = (gpu.event()?, gpu.event()?);
    run()?;
    begun.record(gpu.stream())?;
    run()?;
    ended.record(gpu.stream())?;
    ended.synchronize()?;
    ended.elapsed_ms_since(&begun).map(f64::from)
}

/// Operations of the matrix products of a prompt of `tokens` tokens, up to the logits of its last one, in units of 10⁹.
#[cfg(feature = "cuda")]
pub(crate) fn prompt_gflop(config: &ModelConfig, tokens: usize) -> f64 {
    let product = |m: usize, n: usize, k: usize| 2.0 * m as f64 * n as f64 * k as f64;
    let seen = |token: usize| config.sliding_window.map_or(token + 1, |window| window.min(token + 1));
    let pairs: usize = (0..tokens).map(seen).sum();
    let hidden = config.hidden;
    let network = |rows, inner| product(rows, (config.ffn.input_matrices() + 1) * inner, hidden);
    let of_layer = |layer| {
        let attention = product(tokens, config.qkv_width() + config.query_width(), hidden)
            + 2.0 * product(pairs, config.heads, config.head_dim);
        attention
            + if config.is_moe(layer) {
                product(tokens, config.experts, hidden) + network(tokens * config.top_k, config.expert_hidden)
            } else {
                network(tokens, config.dense_hidden)
            }
    };
    ((0..config.layers).map(of_layer).sum::<f64>() + product(1, config.vocab, hidden)) / 1e9
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;
    use lina_model::{ModelKind, Sizes};

    #[test]
    fn a_prompt_counts_every_product() {
        let sizes = Sizes { vocab: 11, hidden: 8, layers: 2, heads: 2, experts: 5, top_k: 3, expert_hidden: 7 };
        let config = ModelConfig::family(ModelKind::Mixtral, sizes);
        // Of each of 3 tokens in a layer: queries, keys, values, output; the gate; three matrices of three experts. Then
        // scores and values of 6 pairs, and one row of the head.
        let layer = 3 * (4 * 8 * 8 + 5 * 8 + 3 * 3 * 8 * 7) + 6 * 2 * 8;
        assert_eq!(prompt_gflop(&config, 3), 2.0 * f64::from(2 * layer + 11 * 8) / 1e9);
    }
}
