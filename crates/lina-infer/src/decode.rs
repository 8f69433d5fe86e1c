//! `lina bench decode`: a token of one sequence beside reading its weights once, and a prompt beside its matrix products.
//!
//! One token multiplies every weight that it needs once, so that memory bounds it: the bound is the bytes of those
//! weights over the rate at which this machine's memory is read, measured in the same run. A prompt has rows enough for
//! arithmetic to bound it: its matrix products run again, or on a GPU its operations at the rate of one large product.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use lina_comm::Comm;
use lina_kernels::PAGE_TOKENS;
use lina_kernels::gemm::{self, Layout, Shape};
use lina_model::{
    ExpertOptions, InferenceBatch, InferenceLimits, InferenceWeights, KvCache, LogitsOf, ModelConfig, SequenceFeed,
};
use lina_report::{Align, Progress, Table};
#[cfg(feature = "cuda")]
use lina_train::KernelTime;
use lina_train::{Engine, RunConfig, Scalar, median};
use serde::Serialize;

use crate::decode_machine::Machine;
use crate::device::{ModelParts, ProcessShared, StepModel};
use crate::job::load_weights;
use crate::ranks::step_error;
use crate::sampling::{maximum, position};
use crate::{Arithmetic, InferError};

/// Tokens before those that are decoded and measured.
const DECODE_PROMPT_TOKENS: usize = 64;
/// Beyond these a number is a slip of the keyboard.
const MOST_ROUNDS: usize = 10_000;
const MOST_THREADS: usize = 1024;
/// The only sequence.
const SEQUENCE: u32 = 0;

/// What `lina bench decode` is asked for.
#[derive(Clone, Debug)]
pub struct DecodeOptions {
    /// Hugging Face folder, or a training configuration whose `[model]` gives sizes.
    pub model: PathBuf,
    /// What computes.
    pub arithmetic: Arithmetic,
    /// Compute threads of a processor; 0 is all cores.
    pub threads: usize,
    /// Tokens decoded in a round.
    pub tokens: usize,
    /// Tokens of the prompt that is measured.
    pub prompt_tokens: usize,
    /// Measured rounds.
    pub rounds: usize,
    /// No progress on stderr.
    pub quiet: bool,
}

/// Decoding and prefill on one rank beside what bounds them; medians over rounds.
#[derive(Clone, Debug, Serialize)]
pub struct DecodeSummary {
    /// Name of the device.
    pub device: &'static str,
    /// How it stores weights and multiplies.
    pub dtype: Scalar,
    /// Compute threads of a processor.
    pub threads: usize,
    /// Measured rounds.
    pub rounds: usize,
    /// Whether the weights are a training run's initial ones, since no folder gave any: speed does not depend on them.
    pub initial_weights: bool,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// Bytes of the weights that one token reads.
    pub active_bytes: u64,
    /// Rate at which memory is read, in units of 10⁹ bytes a second.
    pub read_gb_per_s: f64,
    /// The active weights read once at that rate.
    pub bound_ms: f64,
    /// Tokens that were before those decoded.
    pub context_tokens: usize,
    /// Tokens decoded in a round.
    pub tokens: usize,
    /// One token, greedy, of one sequence.
    pub decode_ms: f64,
    /// Decoding over its bound.
    pub decode_over_bound: f64,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// The prompt, up to the logits of its last token.
    pub prefill_ms: f64,
    /// Its matrix products alone.
    pub products_ms: f64,
    /// Floating-point operations of the products, in units of 10⁹.
    pub products_gflop: f64,
    /// Prefill over its products.
    pub prefill_over_products: f64,
    /// On a GPU: what kernels take of a token, longest first, each launched and timed by itself.
    #[cfg(feature = "cuda")]
    pub kernels: Vec<KernelTime>,
}

/// What the rounds measured.
#[derive(Default)]
struct Samples {
    bytes_per_s: Vec<f64>,
    /// Of every token.
    decode_ms: Vec<f64>,
    prefill_ms: Vec<f64>,
    products_ms: Vec<f64>,
}

impl DecodeSummary {
    fn new(
        options: &DecodeOptions,
        weights: &InferenceWeights,
        initial_weights: bool,
        threads: usize,
        products_gflop: f64,
        samples: &Samples,
    ) -> Self {
        let Arithmetic { device, dtype } = options.arithmetic;
        // The host's weights are f32.
        let stored_bytes = |bytes: u64| bytes / 4 * options.arithmetic.element_bytes() as u64;
        let active_bytes = stored_bytes(weights.active_bytes());
        let bytes_per_s = median(&samples.bytes_per_s);
        let bound_ms = active_bytes as f64 / bytes_per_s * 1e3;
        let decode_ms = median(&samples.decode_ms);
        let (prefill_ms, products_ms) = (median(&samples.prefill_ms), median(&samples.products_ms));
        DecodeSummary {
            device: device.name(),
            dtype,
            threads,
            rounds: options.rounds,
            initial_weights,
            weight_bytes: stored_bytes(weights.bytes()),
            active_bytes,
            read_gb_per_s: bytes_per_s / 1e9,
            bound_ms,
            context_tokens: DECODE_PROMPT_TOKENS,
            tokens: options.tokens,
            decode_ms,
            decode_over_bound: decode_ms / bound_ms,
            prompt_tokens: options.prompt_tokens,
            prefill_ms,
            products_ms,
            products_gflop,
            prefill_over_products: prefill_ms / products_ms,
            #[cfg(feature = "cuda")]
            kernels: Vec::new(),
        }
    }

    /// As a person reads it.
    pub fn table(&self) -> String {
        let mut table =
            Table::new([("", Align::Left), ("ms", Align::Right), ("bound ms", Align::Right), ("ratio", Align::Right)]);
        let mut row = |what: &str, ms: f64, bound_ms: f64, ratio: f64| {
            table.row([what.to_owned(), format!("{ms:.2}"), format!("{bound_ms:.2}"), format!("{ratio:.2}x")]);
        };
        row("decode, a token", self.decode_ms, self.bound_ms, self.decode_over_bound);
        row("prefill", self.prefill_ms, self.products_ms, self.prefill_over_products);
        let device = match self.device {
            "cpu" => format!("{} threads", self.threads),
            device => format!("{device}, {}", self.dtype.name()),
        };
        #[cfg(feature = "cuda")]
        let kernels = kernel_table(&self.kernels);
        #[cfg(not(feature = "cuda"))]
        let kernels = "";
        format!(
            "{}\n{device}, medians of {} rounds; weights: {}\ndecode: batch 1, {} tokens after {}; the bound reads {:.0} MB \
             of active weights (of {:.0} MB) once at the measured {:.1} GB/s\nprefill: {} tokens; the bound is its matrix \
             products alone, {:.0} GFLOP/s{kernels}",
            table.render(),
            self.rounds,
            if self.initial_weights { "initial ones, on which speed does not depend" } else { "the folder's" },
            self.tokens,
            self.context_tokens,
            self.active_bytes as f64 / 1e6,
            self.weight_bytes as f64 / 1e6,
            self.read_gb_per_s,
            self.prompt_tokens,
            self.products_gflop * 1e3 / self.products_ms,
        )
    }
}

/// What a token's kernels take, as a person reads it.
#[cfg(feature = "cuda")]
fn kernel_table(kernels: &[KernelTime]) -> String {
    if kernels.is_empty() {
        return String::new();
    }
    let mut table = Table::new([("kernel", Align::Left), ("launches", Align::Right), ("us", Align::Right)]);
    for kernel in kernels {
        table.row([kernel.name.clone(), kernel.launches.to_string(), format!("{:.1}", 1e3 * kernel.ms)]);
    }
    let launches: usize = kernels.iter().map(|kernel| kernel.launches).sum();
    let ms: f64 = kernels.iter().map(|kernel| kernel.ms).sum();
    format!(
        "\n\na token's {launches} launches take {:.0} us when each is timed, which adds some to every one:\n\n{}",
        1e3 * ms,
        table.render()
    )
}

/// Measures decoding and prefill on one rank, in rounds: memory, a sequence's tokens, a prompt, its products.
///
/// # Errors
/// Bad folder, configuration or sizes.
pub fn bench_decode(options: &DecodeOptions) -> Result<DecodeSummary, InferError> {
    let (weights, initial_weights) = weights(options)?;
    let threads = match options.threads {
        0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        threads => threads,
    };
    let mut decoder = Decoder::new(&weights, threads, options)?;
    // What depends on the prompt's length reaches its size.
    decoder.prefill(options.prompt_tokens)?;
    let mut machine = machine(&mut decoder, threads, options)?;

    let mut samples = Samples::default();
    let mut progress = if options.quiet { Progress::silent() } else { Progress::new(0, options.rounds as u64) };
    // The first round warms up.
    for round in 0..=options.rounds {
        let bytes_per_s = machine.read_bytes_per_s()?;
        let decode_ms = decoder.decode(options.tokens)?;
        let prefill_ms = decoder.prefill(options.prompt_tokens)?;
        let products_ms = machine.products_ms()?;
        if round > 0 {
            samples.bytes_per_s.push(bytes_per_s);
            samples.decode_ms.extend(decode_ms);
            samples.prefill_ms.push(prefill_ms);
            samples.products_ms.push(products_ms);
            progress.reached("round", round as u64);
        }
    }
    progress.finish();
    let summary = DecodeSummary::new(options, &weights, initial_weights, threads, machine.products_gflop(), &samples);
    #[cfg(feature = "cuda")]
    let summary = DecodeSummary { kernels: decoder.kernels()?, ..summary };
    Ok(summary)
}

/// What bounds the decoder's model.
fn machine(decoder: &mut Decoder, threads: usize, options: &DecodeOptions) -> Result<Machine, InferError> {
    let tokens = options.prompt_tokens;
    match &decoder.model {
        StepModel::Host(_) => {
            gemm::record(true);
            let recorded = decoder.prefill(tokens);
            gemm::record(false);
            let mut shapes = gemm::take_recorded();
            recorded?;
            shapes.extend(attention_shapes(decoder.model.config(), tokens));
            Ok(Machine::host(threads, shapes))
        }
        #[cfg(feature = "cuda")]
        StepModel::Cuda(model) => {
            use crate::decode_machine::{CudaMachine, prompt_gflop};
            let gflop = prompt_gflop(model.config(), tokens);
            // A stream of its own, which nothing else is on while it is measured.
            let gpu = lina_cuda::Gpu::open(model.gpu().ordinal())?;
            Ok(Machine::Cuda(Box::new(CudaMachine::new(gpu, model.dtype(), gflop)?)))
        }
    }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// The weights of a folder, or initial ones of a configuration's sizes, and whether it is the latter.
fn weights(options: &DecodeOptions) -> Result<(Arc<InferenceWeights>, bool), InferError> {
    let (config, folder) = if options.model.is_dir() {
        let config = ModelConfig::from_folder(&options.model).map_err(InferError::input)?;
        (config, Some(options.model.clone()))
    } else {
        let run = RunConfig::load(&options.model, &[]).map_err(InferError::input)?;
        let folder = run.model_folder();
        (run.model, folder)
    };
    check(options, &config)?;
    let weights = load_weights(folder.as_deref(), config, &[], 1)?;
    Ok((Arc::new(weights), folder.is_none()))
}

/// Refuses sizes that cannot be.
fn check(options: &DecodeOptions, config: &ModelConfig) -> Result<(), InferError> {
    options.arithmetic.check(Engine::Local).map_err(InferError::Input)?;
    let positions = config.max_positions;
    let most_tokens = positions.saturating_sub(DECODE_PROMPT_TOKENS);
    if most_tokens == 0 {
        return Err(InferError::Input(format!(
            "{}: the model has {positions} positions, expected more than {DECODE_PROMPT_TOKENS}, the tokens before those \
             that are measured",
            options.model.display()
        )));
    }
    let model = "the model's positions";
    for (option, value, least, most, why) in [
        ("--threads", options.threads, 0, MOST_THREADS, String::new()),
        ("--rounds", options.rounds, 1, MOST_ROUNDS, String::new()),
        ("--prompt-tokens", options.prompt_tokens, 1, positions, format!(", {model}")),
        ("--tokens", options.tokens, 1, most_tokens, format!(", {model} less the {DECODE_PROMPT_TOKENS} before")),
    ] {
        if !(least..=most).contains(&value) {
            return Err(InferError::Input(format!(
                "{option} is {value}, expected a number from {least} to {most}{why}"
            )));
        }
    }
    Ok(())
}

/// A model on one rank that reads a text of its own making.
struct Decoder {
    model: StepModel,
    comm: Comm,
    /// As many as the longest sequence.
    text: Vec<u32>,
}

impl Decoder {
    fn new(weights: &Arc<InferenceWeights>, threads: usize, options: &DecodeOptions) -> Result<Self, InferError> {
        let config = weights.config();
        let max_tokens = options.prompt_tokens.max(DECODE_PROMPT_TOKENS);
        let max_sequence_tokens = max_tokens.max(DECODE_PROMPT_TOKENS + options.tokens);
        let limits =
            InferenceLimits { max_tokens, max_sequence_tokens, pages: KvCache::pages_for(max_sequence_tokens) };
        let (mut comm, shared) = (Comm::solo(), ProcessShared::default());
        let parts = ModelParts {
            arithmetic: options.arithmetic,
            engine: Engine::Local,
            threads,
            limits,
            experts: ExpertOptions::fixed(config),
            weights,
            shared: &shared,
        };
        let model = StepModel::start(&mut comm, parts)?;
        // Any tokens will do; a stride that shares no factor with usual sizes of vocabularies visits many of them.
        let text = (0..max_tokens).map(|token| (token * 7919 % config.vocab) as u32).collect();
        Ok(Decoder { model, comm, text })
    }

    /// A new sequence takes the place of the last one: milliseconds that its first `tokens` tokens take.
    fn prefill(&mut self, tokens: usize) -> Result<f64, InferError> {
        let cache = self.model.cache();
        if cache.holds(SEQUENCE) {
            cache.release(SEQUENCE);
        }
        cache.admit(SEQUENCE, cache.free_pages());
        let prompt = self.text[..tokens].to_vec();
        self.step(&prompt)
    }

    /// Milliseconds of each of `tokens` greedy tokens of a new sequence.
    fn decode(&mut self, tokens: usize) -> Result<Vec<f64>, InferError> {
        self.prefill(DECODE_PROMPT_TOKENS)?;
        (0..tokens)
            .map(|_| {
                let begun = Instant::now();
                let logits = self.model.logits();
                let token = position(logits, maximum(logits));
                self.step(&[token])?;
                Ok(milliseconds(begun))
            })
            .collect()
    }

    /// What kernels take of a token on a GPU.
    #[cfg(feature = "cuda")]
    fn kernels(&mut self) -> Result<Vec<KernelTime>, InferError> {
        if let StepModel::Host(_) = self.model {
            return Ok(Vec::new());
        }
        self.prefill(DECODE_PROMPT_TOKENS)?;
        if let StepModel::Cuda(model) = &self.model {
            model.gpu().begin_timeline()?;
        }
        let outcome = self.step(&[1]);
        let launches = match &self.model {
            StepModel::Cuda(model) => model.gpu().end_timeline()?,
            StepModel::Host(_) => Vec::new(),
        };
        outcome.map(|_| KernelTime::of_step(&launches))
    }

    /// Milliseconds of one pass.
    fn step(&mut self, tokens: &[u32]) -> Result<f64, InferError> {
        let begun = Instant::now();
        self.comm.begin_evaluation(0)?;
        let feeds = [SequenceFeed { id: SEQUENCE, tokens, logits: LogitsOf::Last }];
        let batch = InferenceBatch { feeds: &feeds, token_offset: 0, truth: None };
        self.model.forward(&mut self.comm, batch).map_err(|error| step_error(0, error))?;
        self.comm.end_step();
        Ok(milliseconds(begun))
    }
}

/// The products inside the attention kernel, which are not recorded one by one: of each tile of `PAGE_TOKENS` queries,
/// scores and values of the keys that it sees, all heads of a layer as one group.
fn attention_shapes(config: &ModelConfig, tokens: usize) -> Vec<Shape> {
    let tiles: Vec<(usize, usize)> = (0..tokens)
        .step_by(PAGE_TOKENS)
        .map(|start| {
            let end = tokens.min(start + PAGE_TOKENS);
            let first_seen = config.sliding_window.map_or(0, |window| (start + 1).saturating_sub(window));
            (end - start, end - first_seen)
        })
        .collect();
    let batch = config.heads * tiles.len();
    let all_heads = |shape: &dyn Fn(usize, usize) -> Shape| -> Vec<Shape> {
        (0..config.heads).flat_map(|_| tiles.iter().map(|&(rows, keys)| shape(rows, keys))).collect()
    };
    let dim = config.head_dim;
    let scores = all_heads(&|m, n| Shape { m, n, k: dim, layout: Layout::NT, accumulate: false, batch });
    let values = all_heads(&|m, k| Shape { m, n: dim, k, layout: Layout::NN, accumulate: false, batch });
    (0..config.layers).flat_map(|_| scores.iter().chain(&values)).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lina_model::{ModelKind, Sizes};

    fn options(prompt_tokens: usize) -> DecodeOptions {
        DecodeOptions {
            model: PathBuf::new(),
            arithmetic: Arithmetic::CPU,
            threads: 1,
            tokens: 3,
            prompt_tokens,
            rounds: 2,
            quiet: true,
        }
    }

    #[test]
    fn figures_follow_from_samples() {
        let sizes = Sizes { vocab: 11, hidden: 8, layers: 2, heads: 2, experts: 5, top_k: 3, expert_hidden: 7 };
        let weights = InferenceWeights::initial(ModelConfig::family(ModelKind::Mixtral, sizes), 1);
        let samples = Samples {
            bytes_per_s: vec![3e6, 1e6, 2e6],
            decode_ms: vec![9.0, 7.0, 8.0],
            prefill_ms: vec![30.0, 50.0],
            products_ms: vec![20.0, 10.0, 90.0],
        };
        let summary = DecodeSummary::new(&options(5), &weights, true, 1, 0.5, &samples);
        // Of a layer: queries, keys, values, output; two norms; the gate; three matrices of each of three experts.
        let layer = 4 * 8 * 8 + 2 * 8 + 5 * 8 + 3 * 3 * 8 * 7;
        // One row of the embedding, the last norm, the head.
        let floats = 2 * layer + 8 + 8 + 11 * 8;
        assert_eq!(summary.active_bytes, 4 * floats);
        assert_eq!(summary.weight_bytes, 4 * (floats + 10 * 8 + 2 * 2 * 3 * 8 * 7));
        assert_eq!(summary.read_gb_per_s, 2e-3);
        assert_eq!(summary.bound_ms, (4 * floats) as f64 / 2e6 * 1e3);
        assert_eq!(summary.decode_over_bound, 8.0 / summary.bound_ms);
        assert_eq!((summary.prefill_ms, summary.prefill_over_products), (40.0, 2.0));
        assert!(summary.table().contains("initial ones") && summary.table().contains("25 GFLOP/s"));
    }

    #[test]
    fn attention_counts_the_tiles_that_are_seen() {
        let sizes = Sizes { vocab: 11, hidden: 8, layers: 2, heads: 2, experts: 2, top_k: 1, expert_hidden: 4 };
        let config = ModelConfig::family(ModelKind::Mixtral, sizes);
        let shapes = attention_shapes(&config, PAGE_TOKENS + 6);
        let flop: usize = shapes.iter().map(|shape| 2 * shape.m * shape.n * shape.k).sum();
        let seen = PAGE_TOKENS * PAGE_TOKENS + 6 * (PAGE_TOKENS + 6);
        assert_eq!(flop, 2 * 2 * 2 * 2 * 4 * seen);
        assert!(shapes.iter().all(|shape| shape.batch == 4) && shapes.len() == 16);
    }
}
