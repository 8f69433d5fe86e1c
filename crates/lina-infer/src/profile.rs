//! `lina profile`: what tokens choose next, by what they chose before, learned from a text and kept in a file.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lina_data::TokenStream;
use lina_model::{InferenceWeights, ModelConfig};
use lina_plan::{AccuracyMeter, Following, History, LayerAccuracy, PathArrays, PathTables};
use lina_report::{Align, Progress, Table};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Serialize;

use crate::InferError;
use crate::job::{HISTORY_DECAY, load_weights};
use crate::routing_trace::{BatchRouting, RoutingTracer, read_tokens};

/// Says in a profile what it is.
const FORMAT: &str = "lina-profile-1";
/// Tokens of a window by default.
const DEFAULT_WINDOW_TOKENS: usize = 256;
/// Tokens of a batch by default: accuracy is of batches.
const DEFAULT_BATCH_TOKENS: usize = 4096;

/// What `lina profile` is asked for.
#[derive(Clone, Debug)]
pub struct ProfileOptions {
    /// Hugging Face folder.
    pub model: PathBuf,
    /// Text that is learned from: a file or a glob.
    pub data: PathBuf,
    /// The file to write.
    pub out: PathBuf,
    /// Layers of a path: how many choices a token's next one is predicted from.
    pub length: usize,
    /// Text on which estimators are compared.
    pub held_out: Option<PathBuf>,
    /// Tokens of a window; by default 256, or the model's positions if those are fewer.
    pub sequence_tokens: Option<usize>,
    /// Tokens of a batch.
    pub batch_tokens: Option<usize>,
    /// Compute threads; 0 for all cores.
    pub threads: usize,
    /// No progress on stderr.
    pub quiet: bool,
}

/// What was learned.
#[derive(Clone, Debug, Serialize)]
pub struct ProfileSummary {
    /// The file.
    pub file: PathBuf,
    /// Its size.
    pub file_bytes: u64,
    /// Tokens that were profiled.
    pub tokens: u64,
    /// Layers of a path.
    pub length: usize,
    /// Different paths.
    pub paths: usize,
    /// Of each layer but the first: the share of tokens that follow their group's most frequent next expert, and one of
    /// its two most frequent.
    pub following: Vec<LayerFollowing>,
    /// Estimators on the held-out text.
    pub estimators: Vec<EstimatorAccuracy>,
}

impl ProfileSummary {
    /// As a person reads it.
    pub fn table(&self) -> String {
        let right = Align::Right;
        let share = |share: Option<f64>| share.map_or_else(|| "-".to_owned(), percent);
        let mut following =
            Table::new([("layer", right), ("follow the first", right), ("one of the first two", right)]);
        for layer in &self.following {
            following.row([layer.layer.to_string(), percent(layer.top_1), percent(layer.top_2)]);
        }
        let mean = |of: fn(&LayerFollowing) -> f64| {
            percent(self.following.iter().map(of).sum::<f64>() / self.following.len().max(1) as f64)
        };
        following.row(["mean".to_owned(), mean(|layer| layer.top_1), mean(|layer| layer.top_2)]);
        let mut text = format!(
            "of the tokens that chose one expert together, so many go on together (the paper: 41.9 %, 54.6 %)\n{}",
            following.render()
        );
        if !self.estimators.is_empty() {
            let mut accuracy = Table::new([
                ("estimator", Align::Left),
                ("same 2k experts", right),
                ("overlap", right),
                ("tokens", right),
            ]);
            for EstimatorAccuracy { estimator, mean, .. } in &self.estimators {
                let [same_experts, overlap, tokens] = [mean.same_experts, mean.overlap, mean.tokens].map(share);
                accuracy.row([estimator.clone(), same_experts, overlap, tokens]);
            }
            text.push_str(&format!(
                "\non held-out text: batches whose 2k most popular experts were the estimated ones, the share of these \
                 experts that was, and tokens whose experts were all predicted\n{}",
                accuracy.render()
            ));
        }
        format!(
            "{text}\n{} tokens, paths of {} layers, {} different ones; {} KiB in {}",
            self.tokens,
            self.length,
            self.paths,
            self.file_bytes.div_ceil(1 << 10),
            self.file.display()
        )
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// A layer's part of the pattern.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LayerFollowing {
    /// Layer index in the model.
    pub layer: usize,
    /// Share that follows the first.
    pub top_1: f64,
    /// Share that follows one of the first two.
    pub top_2: f64,
}

/// How good an estimator is on text that it has not learned from.
#[derive(Clone, Debug, Serialize)]
pub struct EstimatorAccuracy {
    /// Its name, with the length of its paths.
    pub estimator: String,
    /// All layers together.
    pub mean: AccuracyNumbers,
    /// Layer by layer, from the second with experts on.
    pub layers: Vec<AccuracyNumbers>,
}

/// Shares between 0 and 1; `None` where an estimator says nothing of the kind.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct AccuracyNumbers {
    /// Batches whose 2k most popular experts were the estimated ones (the paper's accuracy).
    pub same_experts: Option<f64>,
    /// Of the 2k most popular experts, those that were estimated.
    pub overlap: Option<f64>,
    /// Tokens whose top-k experts were all predicted.
    pub tokens: Option<f64>,
}

impl From<LayerAccuracy> for AccuracyNumbers {
    fn from(accuracy: LayerAccuracy) -> Self {
        AccuracyNumbers {
            same_experts: accuracy.same_share(),
            overlap: accuracy.mean_overlap(),
            tokens: accuracy.token_share(),
        }
    }
}

/// Profiles a model.
///
/// # Errors
/// Bad folder, data or sizes, a model without experts, a file that cannot be written.
pub fn profile(options: &ProfileOptions) -> Result<ProfileSummary, InferError> {
    let config = ModelConfig::from_folder(&options.model).map_err(InferError::input)?;
    let layers = config.moe_layers();
    if layers < 2 {
        return Err(InferError::Input(format!(
            "{} has {layers} layers with experts, expected at least 2: a profile says what follows what",
            options.model.display()
        )));
    }
    let window = options.sequence_tokens.unwrap_or(config.max_positions.min(DEFAULT_WINDOW_TOKENS));
    if window < 2 || window > config.max_positions {
        return Err(InferError::Input(format!(
            "--seq-tokens is {window}, expected 2 to {}, the model's positions",
            config.max_positions
        )));
    }
    if options.length == 0 {
        return Err(InferError::Input("--path-length is 0, expected at least 1".to_owned()));
    }
    // Before the work, not after it.
    let folder = options.out.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
        return Err(InferError::Input(format!(
            "{} cannot be written: {} is no folder",
            options.out.display(),
            folder.display()
        )));
    }
    let mut builder = PathTables::builder(layers, config.experts, config.top_k, options.length)
        .map_err(|error| InferError::Input(format!("--path-length is {}: {}", options.length, error.message)))?;
    let stream = read_tokens(&options.model, &config, &options.data)?;
    let held_out = options.held_out.as_ref().map(|data| read_tokens(&options.model, &config, data)).transpose()?;
    let weights = Arc::new(load_weights(Some(&options.model), config.clone(), &[], 1)?);
    let threads = if options.threads > 0 {
        options.threads
    } else {
        std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
    };
    let batch_tokens = options.batch_tokens.unwrap_or(DEFAULT_BATCH_TOKENS);
    let mut tracer = RoutingTracer::new(&weights, threads, window, batch_tokens)?;
    let per_token = layers * config.top_k;
    let mut tokens = 0;
    trace(&mut tracer, &stream, "profiling", options.quiet, |batch| {
        for choices in batch.choices.chunks_exact(per_token) {
            builder.add(choices).map_err(InferError::input)?;
            tokens += 1;
        }
        Ok(())
    })?;
    let tables = builder.finish();
    let file_bytes = write_profile(&options.out, &tables, &weights.fingerprint(), tokens)?;
    let estimators = match held_out {
        Some(held_out) => compare_estimators(&mut tracer, &stream, &held_out, &config, options)?,
        None => Vec::new(),
    };
    let following = (1..layers).filter_map(|number| {
        let Following { top_1, top_2 } = tables.following(number)?;
        Some(LayerFollowing { layer: config.moe_layer(number), top_1, top_2 })
    });
    Ok(ProfileSummary {
        file: options.out.clone(),
        file_bytes,
        tokens,
        length: options.length,
        paths: tables.paths(),
        following: following.collect(),
        estimators,
    })
}

/// Traces `stream` with a progress bar.
fn trace(
    tracer: &mut RoutingTracer,
    stream: &TokenStream,
    what: &str,
    quiet: bool,
    mut each: impl FnMut(BatchRouting) -> Result<(), InferError>,
) -> Result<(), InferError> {
    let mut progress = None;
    tracer.run(stream, |batch, batches, routing| {
        let start = || if quiet { Progress::silent() } else { Progress::new(0, batches as u64) };
        let progress: &mut Progress = progress.get_or_insert_with(start);
        each(routing)?;
        progress.reached(what, batch as u64 + 1);
        Ok(())
    })?;
    if let Some(progress) = progress {
        progress.finish();
    }
    Ok(())
}

/// Lengths of paths that are compared, the profile's own among them.
const LENGTHS: [usize; 3] = [1, 3, 6];

/// Compares estimators batch by batch on `held_out`; tables are made of `stream`, and, for what any table of a length
/// could reach, of `held_out` itself.
fn compare_estimators(
    tracer: &mut RoutingTracer,
    stream: &TokenStream,
    held_out: &TokenStream,
    config: &ModelConfig,
    options: &ProfileOptions,
) -> Result<Vec<EstimatorAccuracy>, InferError> {
    let (layers, experts, top_k) = (config.moe_layers(), config.experts, config.top_k);
    let mut lengths: Vec<usize> = LENGTHS.into_iter().chain([options.length]).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let builder = |length: &usize| PathTables::builder(layers, experts, top_k, *length).map_err(InferError::input);
    let mut learned = lengths.iter().map(builder).collect::<Result<Vec<_>, _>>()?;
    let mut best = lengths.iter().map(builder).collect::<Result<Vec<_>, _>>()?;
    trace(tracer, stream, "learning paths", options.quiet, |batch| {
        for choices in batch.choices.chunks_exact(layers * top_k) {
            for builder in &mut learned {
                builder.add(choices).map_err(InferError::input)?;
            }
        }
        Ok(())
    })?;
    let mut batches = Vec::new();
    trace(tracer, held_out, "held-out text", options.quiet, |batch| {
        for choices in batch.choices.chunks_exact(layers * top_k) {
            for builder in &mut best {
                builder.add(choices).map_err(InferError::input)?;
            }
        }
        batches.push(batch);
        Ok(())
    })?;
    let mut rows = Vec::new();
    let named = |prefix: &str, length: usize| format!("{prefix}, l = {length}");
    for (length, builder) in lengths.iter().zip(learned) {
        rows.push((named("path", *length), table_accuracy(&builder.finish(), &batches, config)));
    }
    for (length, builder) in lengths.iter().zip(best) {
        rows.push((named("best table", *length), table_accuracy(&builder.finish(), &batches, config)));
    }
    rows.push(("next-gate".to_owned(), next_gate_accuracy(&batches, config)));
    rows.push(("history".to_owned(), history_accuracy(&batches, config)));
    Ok(rows
        .into_iter()
        .map(|(estimator, meter)| EstimatorAccuracy {
            estimator,
            mean: meter.total().into(),
            layers: meter.layers()[1..].iter().map(|&layer| layer.into()).collect(),
        })
        .collect())
}

fn table_accuracy(tables: &PathTables, batches: &[BatchRouting], config: &ModelConfig) -> AccuracyMeter {
    let (layers, top_k) = (config.moe_layers(), config.top_k);
    token_estimates(batches, config, |batch, number, predicted| {
        let mut path = vec![0; layers];
        for (choices, top) in batch.choices.chunks_exact(layers * top_k).zip(predicted.chunks_exact_mut(top_k)) {
            path.iter_mut().zip(choices.chunks_exact(top_k)).for_each(|(first, choices)| *first = choices[0]);
            tables.predict(number, &path[..number], top);
        }
    })
}

fn next_gate_accuracy(batches: &[BatchRouting], config: &ModelConfig) -> AccuracyMeter {
    let (layers, top_k) = (config.moe_layers(), config.top_k);
    token_estimates(batches, config, |batch, number, predicted| {
        let forecasts = batch.next_gate.chunks_exact((layers - 1) * top_k);
        for (forecast, top) in forecasts.zip(predicted.chunks_exact_mut(top_k)) {
            top.copy_from_slice(&forecast[(number - 1) * top_k..][..top_k]);
        }
    })
}

/// Accuracy of an estimator that says something of every token: `predict` fills `[tokens, top_k]` for a layer.
fn token_estimates(
    batches: &[BatchRouting],
    config: &ModelConfig,
    predict: impl Fn(&BatchRouting, usize, &mut [u32]),
) -> AccuracyMeter {
    let (layers, top_k) = (config.moe_layers(), config.top_k);
    let mut meter = AccuracyMeter::new(layers, top_k);
    for batch in batches {
        let tokens = batch.choices.len() / (layers * top_k);
        let mut predicted = vec![0; tokens * top_k];
        for number in 1..layers {
            predict(batch, number, &mut predicted);
            let actual = layer_choices(batch, number, config);
            meter.add_tokens(number, &predicted, &actual);
            meter.add_batch(number, &popularity(&predicted, config.experts), &popularity(&actual, config.experts));
        }
    }
    meter
}

fn history_accuracy(batches: &[BatchRouting], config: &ModelConfig) -> AccuracyMeter {
    let layers = config.moe_layers();
    let mut meter = AccuracyMeter::new(layers, config.top_k);
    let mut histories = vec![History::new(config.experts, HISTORY_DECAY); layers];
    for batch in batches {
        for (number, history) in histories.iter_mut().enumerate().skip(1) {
            let truth = popularity(&layer_choices(batch, number, config), config.experts);
            if let Some(estimate) = history.popularity() {
                meter.add_batch(number, &estimate, &truth);
            }
            history.add(&truth);
        }
    }
    meter
}

/// `[tokens, top_k]` of one layer.
fn layer_choices(batch: &BatchRouting, number: usize, config: &ModelConfig) -> Vec<u32> {
    let (layers, top_k) = (config.moe_layers(), config.top_k);
    batch
        .choices
        .chunks_exact(layers * top_k)
        .flat_map(|choices| &choices[number * top_k..][..top_k])
        .copied()
        .collect()
}

/// Rows of each expert.
fn popularity(choices: &[u32], experts: usize) -> Vec<f64> {
    let mut rows = vec![0.0; experts];
    choices.iter().for_each(|&expert| rows[expert as usize] += 1.0);
    rows
}

/// Writes a profile; its size in bytes. It is whole or not there.
fn write_profile(file: &Path, tables: &PathTables, fingerprint: &str, tokens: u64) -> Result<u64, InferError> {
    let arrays = tables.to_arrays();
    let bytes_of = |values: &[u64]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let data = [
        ("shape", Dtype::U64, bytes_of(&arrays.shape)),
        ("tables", Dtype::U64, bytes_of(&arrays.tables)),
        ("keys", Dtype::U64, bytes_of(&arrays.keys)),
        ("entries", Dtype::U64, bytes_of(&arrays.entries)),
        ("next", Dtype::U16, arrays.next.iter().flat_map(|value| value.to_le_bytes()).collect()),
        ("counts", Dtype::U32, arrays.counts.iter().flat_map(|value| value.to_le_bytes()).collect()),
        ("following", Dtype::F64, arrays.following.iter().flat_map(|value| value.to_le_bytes()).collect()),
    ];
    let views = data.iter().map(|(name, dtype, bytes)| {
        let elements = bytes.len() / (dtype.bitsize() / 8);
        (*name, TensorView::new(*dtype, vec![elements], bytes).expect("as many bytes as elements take"))
    });
    let metadata = HashMap::from([
        ("format".to_owned(), FORMAT.to_owned()),
        ("model".to_owned(), fingerprint.to_owned()),
        ("tokens".to_owned(), tokens.to_string()),
    ]);
    let error = |e: &dyn std::fmt::Display| InferError::Input(format!("{} cannot be written: {e}", file.display()));
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| error(&e))?;
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = file.file_name().ok_or_else(|| error(&"it names no file"))?;
    let temporary = folder.join(format!(".{}.{}", name.to_string_lossy(), std::process::id()));
    let written = File::create(&temporary)
        .and_then(|mut out| out.write_all(&bytes).and_then(|()| out.sync_all()))
        .and_then(|()| std::fs::rename(&temporary, file));
    if let Err(e) = written {
        // What is there of it is of no use; that it cannot be removed either changes nothing.
        let _ = std::fs::remove_file(&temporary);
        return Err(error(&e));
    }
    Ok(bytes.len() as u64)
}

/// Reads a profile that was made of the model `weights`.
///
/// # Errors
/// If the file cannot be read, is no profile, is damaged, or was made of another model.
pub fn load_profile(file: &Path, weights: &InferenceWeights) -> Result<PathTables, InferError> {
    let error = |what: String| InferError::Input(format!("{}: {what}", file.display()));
    let bytes = std::fs::read(file).map_err(|e| error(format!("cannot be read: {e}")))?;
    let (_, header) = SafeTensors::read_metadata(&bytes)
        .map_err(|e| error(format!("is no profile, expected a safetensors file that `lina profile` has made: {e}")))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    if metadata.get("format").map(String::as_str) != Some(FORMAT) {
        return Err(error("is no profile, expected a file that `lina profile` has made".to_owned()));
    }
    let (found, expected) = (metadata.get("model").cloned().unwrap_or_default(), weights.fingerprint());
    if found != expected {
        return Err(error(format!(
            "is the profile of another model ({found}), expected that of this one ({expected}): run `lina profile` again"
        )));
    }
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| error(format!("is damaged: {e}")))?;
    let read = |name: &str, dtype: Dtype| {
        let tensor = tensors.tensor(name).map_err(|_| error(format!("has no tensor `{name}`")))?;
        if tensor.dtype() != dtype {
            return Err(error(format!("has `{name}` of type {:?}, expected {dtype:?}", tensor.dtype())));
        }
        Ok(tensor.data().to_vec())
    };
    let words =
        |name: &str| -> Result<Vec<u64>, InferError> { Ok(elements(&read(name, Dtype::U64)?, u64::from_le_bytes)) };
    let shape = words("shape")?;
    let arrays = PathArrays {
        shape: shape.try_into().map_err(|_| error("has a `shape` of another length than 4".to_owned()))?,
        tables: words("tables")?,
        keys: words("keys")?,
        entries: words("entries")?,
        next: elements(&read("next", Dtype::U16)?, u16::from_le_bytes),
        counts: elements(&read("counts", Dtype::U32)?, u32::from_le_bytes),
        following: elements(&read("following", Dtype::F64)?, f64::from_le_bytes),
    };
    let tables = PathTables::from_arrays(arrays).map_err(|e| error(format!("is damaged: {e}")))?;
    let config = weights.config();
    if (tables.layers(), tables.experts(), tables.top_k()) != (config.moe_layers(), config.experts, config.top_k) {
        return Err(error("has tables of another shape than the model".to_owned()));
    }
    Ok(tables)
}

fn elements<const N: usize, T>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.chunks_exact(N).map(|chunk| read(chunk.try_into().expect("a chunk of N bytes"))).collect()
}
