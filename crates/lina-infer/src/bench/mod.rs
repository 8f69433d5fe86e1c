//! `lina bench infer`: ways to place experts side by side, in one run over the same batches.
//!
//! Every rank holds a model of each scheduler, with the same weights; each batch goes through all of them in turn. The
//! first is always `static`: what its tokens choose is what those of every other choose too, which the oracle is told.

mod config;
mod output;
mod run;
mod scheduler;
mod summary;
mod synthetic;

use std::path::PathBuf;
use std::sync::Arc;

use lina_data::EvalWindows;
use lina_model::{InferenceWeights, ModelConfig};
use lina_plan::{Estimator, ExpertLayout, PathTables, Policy, PolicyRules, PolicySettings};
use lina_train::{Override, load_sections, run_job};

pub use config::{BatchKind, InferBenchConfig, InferConfig};
pub use lina_report::{LayerAccuracyNumbers, SchedulerResult};
pub use scheduler::Scheduler;
pub use summary::InferBenchSummary;

use crate::job::load_weights;
use crate::routing_trace::read_tokens;
use crate::{InferError, load_profile};
use run::{Comparison, run_rank};
use synthetic::SyntheticRouting;

/// Tokens from which tables of synthetic routing are learned, in batches before those that are measured.
const SYNTHETIC_TOKENS: u64 = 1 << 15;
/// Batches that they are from.
const SYNTHETIC_BATCHES: u64 = 64;

/// What `lina bench infer` is asked for.
#[derive(Clone, Debug)]
pub struct InferBenchOptions {
    /// Hugging Face folder.
    pub model: PathBuf,
    /// Text of the batches: a file or a glob.
    pub data: PathBuf,
    /// Configuration of the cluster and the batches.
    pub config: PathBuf,
    /// Changes to it.
    pub overrides: Vec<Override>,
    /// What is compared.
    pub schedulers: Vec<Scheduler>,
    /// Tables of the estimator `path`, as `lina profile` writes them.
    pub profile: Option<PathBuf>,
    /// Hottest over coldest expert of routing that no model chose.
    pub synthetic_skew: Option<f64>,
    /// Folder that gets a report and the summary as JSON.
    pub out: Option<PathBuf>,
    /// No progress on stderr.
    pub quiet: bool,
}

/// Compares schedulers. `None` on a process that does not lead.
///
/// # Errors
/// Bad folder, data, configuration or profile; a folder that cannot be written; a lost rank.
pub fn bench_infer(options: &InferBenchOptions) -> Result<Option<InferBenchSummary>, InferError> {
    let config: InferBenchConfig = load_sections(&options.config, &options.overrides).map_err(InferError::input)?;
    let out = options.out.as_deref().filter(|_| config.cluster.leads());
    out.map(output::prepare).transpose()?;
    let model_config = ModelConfig::from_folder(&options.model).map_err(InferError::input)?;
    if model_config.moe_layers() < 2 {
        return Err(InferError::Input(format!(
            "{} has {} layers with experts, expected at least 2",
            options.model.display(),
            model_config.moe_layers()
        )));
    }
    let sequence_tokens = config.infer.sequence_tokens;
    if sequence_tokens > model_config.max_positions {
        return Err(InferError::Input(format!(
            "infer.sequence_tokens is {sequence_tokens}, expected at most {}, the model's positions",
            model_config.max_positions
        )));
    }
    let mut schedulers = options.schedulers.clone();
    if !schedulers.contains(&Scheduler::Ideal) {
        schedulers.insert(0, Scheduler::Ideal);
    }
    schedulers.retain(|&scheduler| scheduler != Scheduler::STATIC);
    schedulers.insert(0, Scheduler::STATIC);
    let stream = read_tokens(&options.model, &model_config, &options.data)?;
    // A window's last token is what the one before it is to predict.
    let windows = EvalWindows::new(&stream, sequence_tokens + 1).map_err(InferError::input)?;
    let weights = Arc::new(load_weights(Some(&options.model), model_config.clone(), &[], 1)?);
    let tables = tables(options, &config, &schedulers, &weights)?;
    let comparison = Comparison {
        config: &config,
        weights: &weights,
        windows: &windows,
        schedulers: &schedulers,
        tables: tables.as_ref(),
        skew: options.synthetic_skew,
        quiet: options.quiet,
    };
    let cluster = &config.cluster;
    let experts = ExpertLayout::new(model_config.experts, cluster.ranks, None).map_err(InferError::input)?;
    let rules = PolicyRules::new(Policy::Fair, &PolicySettings::default());
    let identity = format!("{}\n{config:?}\n{schedulers:?}", model_config.to_json());
    let outcome = run_job(cluster, &experts, rules, &identity, |comm| run_rank(comm, &comparison))?;
    if !cluster.leads() {
        return Ok(None);
    }
    let leader = outcome.ranks.into_iter().next().expect("rank 0 leads");
    let summary = InferBenchSummary::new(options, &config, &schedulers, &weights, tables.as_deref(), leader);
    out.map(|out| output::write(out, weights.config(), &summary)).transpose()?;
    Ok(Some(summary))
}

/// Tables of paths, if a scheduler goes by them.
fn tables(
    options: &InferBenchOptions,
    config: &InferBenchConfig,
    schedulers: &[Scheduler],
    weights: &InferenceWeights,
) -> Result<Option<Arc<PathTables>>, InferError> {
    if !schedulers.iter().any(|scheduler| scheduler.estimator() == Some(Estimator::Path)) {
        return Ok(None);
    }
    let model = weights.config();
    let Some(skew) = options.synthetic_skew else {
        let profile = options.profile.as_ref().ok_or_else(|| {
            InferError::Input("schedulers that go by `path` need --profile, a file that `lina profile` has made".into())
        })?;
        return load_profile(profile, weights).map(|tables| Some(Arc::new(tables)));
    };
    if !(skew.is_finite() && skew >= 1.0) {
        return Err(InferError::Input(format!("--synthetic-skew is {skew}, expected a number of at least 1")));
    }
    // What is learned comes from other batches than those that are measured.
    const LENGTH: usize = 3;
    let mut builder =
        PathTables::builder(model.moe_layers(), model.experts, model.top_k, LENGTH).map_err(InferError::input)?;
    let mut choices = vec![0; model.moe_layers() * model.top_k];
    for token in 0..SYNTHETIC_TOKENS {
        let batch = u64::MAX / 2 + token % SYNTHETIC_BATCHES;
        let choose = SyntheticRouting { experts: model.experts, skew, seed: config.infer.seed, batch }.chooser();
        for (number, choices) in choices.chunks_exact_mut(model.top_k).enumerate() {
            choose(number, token, choices);
        }
        builder.add(&choices).map_err(InferError::input)?;
    }
    Ok(Some(Arc::new(builder.finish())))
}
