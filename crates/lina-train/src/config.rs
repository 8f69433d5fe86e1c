//! The configuration of a run: one TOML file, changed by the command line, checked as a whole before anything starts.
//!
//! Relative paths and globs in it are relative to the folder in which the command runs, not to the file, so that a
//! resolved copy in a run's folder means the same as the original.

pub(crate) mod check;
mod document;
mod error;
mod reader;
mod sections;

use std::path::{Path, PathBuf};

use lina_comm::launched_ranks;
use lina_data::{DataConfig, DataError, Tokenizer};
use lina_model::{ModelConfig, ModelSection};
use lina_plan::{ExpertLayout, LayoutError, PackingLadder, PolicyRules};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use document::Override;
pub use error::ConfigError;
pub use sections::{BenchConfig, ClusterConfig, DeviceConfig, Engine, LinkConfig, PolicyConfig, Scalar, TrainConfig};

use document::Document;
use sections::{BYTES, DataSection};

/// Everything that a run is told. [`RunConfig::load`] is the way to one; the fields are public to be read.
#[derive(Clone, Debug, PartialEq)]
pub struct RunConfig {
    /// The model that `[model]` describes.
    pub model: ModelConfig,
    /// `[model]` as written.
    pub model_section: ModelSection,
    /// `[data]`: the text.
    pub data: DataConfig,
    /// `data.tokenizer`: a `tokenizer.json`, or `None` where every byte is a token.
    pub tokenizer_file: Option<PathBuf>,
    /// `[train]`.
    pub train: TrainConfig,
    /// `[cluster]`.
    pub cluster: ClusterConfig,
    /// `[policy]`.
    pub policy: PolicyConfig,
    /// `[bench]`, if there is one.
    pub bench: Option<BenchConfig>,
}

/// A configuration file, section by section.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Sections {
    model: ModelSection,
    data: DataSection,
    train: TrainConfig,
    cluster: ClusterConfig,
    policy: PolicyConfig,
    #[serde(skip_serializing_if = "Option::is_none")]
    bench: Option<BenchConfig>,
}

impl RunConfig {
    /// Reads `file`, applies `overrides` in order and checks the whole. Reads nothing else, but the `config.json` of
    /// the folder that `model.path` names, if it does.
    ///
    /// # Errors
    /// The first thing that is wrong, with its line or option.
    pub fn load(file: &Path, overrides: &[Override]) -> Result<Self, ConfigError> {
        Self::from_document(Document::read(file)?, file, overrides)
    }

    /// The same for a text, which errors call `file`.
    ///
    /// # Errors
    /// As [`RunConfig::load`].
    pub fn parse(file: &Path, text: &str, overrides: &[Override]) -> Result<Self, ConfigError> {
        Self::from_document(Document::parse(file, text)?, file, overrides)
    }

    fn from_document(mut document: Document, file: &Path, overrides: &[Override]) -> Result<Self, ConfigError> {
        for change in overrides {
            document.apply(change);
        }
        let sections: Sections = reader::read(document.table.clone())
            .map_err(|error| ConfigError::invalid(document.place(error.origin.as_ref()), error.to_string()))?;
        let Sections { model: model_section, data, train, mut cluster, policy, bench } = sections;
        take_launched_ranks(&document, &mut cluster);
        let DataSection { files, eval_files, eval_fraction, text_key, tokenizer } = data;
        let model = model_section
            .resolve(Path::new(""), &format!("{}: [model]", file.display()))
            .map_err(|error| model_error(&document, error))?;
        let config = RunConfig {
            model,
            model_section,
            data: DataConfig { files, eval_files, eval_fraction, text_key },
            tokenizer_file: Some(tokenizer).filter(|tokenizer| tokenizer.as_os_str() != BYTES),
            train,
            cluster,
            policy,
            bench,
        };
        match check::check(&config) {
            Ok(()) => Ok(config),
            Err(problem) => Err(ConfigError::invalid(document.place(document.origin(problem.key)), problem.message)),
        }
    }

    /// Refuses impossible sizes and combinations; a loaded configuration has none, one that was changed since may.
    ///
    /// # Errors
    /// The first one found.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.model.validate("the configuration: [model]")?;
        check::check(self).map_err(|problem| ConfigError::invalid("the configuration", problem.message))
    }

    /// The configuration as a file that loads to the same again, with every default written out.
    ///
    /// # Errors
    /// If a value has no place in TOML: a path that is not UTF-8, a seed beyond 63 bits.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        let DataConfig { files, eval_files, eval_fraction, text_key } = self.data.clone();
        let tokenizer = self.tokenizer_file.clone().unwrap_or_else(|| BYTES.into());
        let sections = Sections {
            model: self.model_section.clone(),
            data: DataSection { files, eval_files, eval_fraction, text_key, tokenizer },
            train: self.train.clone(),
            cluster: self.cluster.clone(),
            policy: self.policy,
            bench: self.bench.clone(),
        };
        toml::to_string(&sections)
            .map_err(|error| ConfigError::invalid("the configuration", format!("it cannot be written: {error}")))
    }

    /// The folder with the weights to start from, if `[model]` names one.
    pub fn model_folder(&self) -> Option<PathBuf> {
        self.model_section.folder(Path::new(""))
    }

    /// The tokenizer that `[data]` asks for.
    ///
    /// # Errors
    /// If its file does not load.
    pub fn tokenizer(&self) -> Result<Tokenizer, DataError> {
        self.tokenizer_file.as_ref().map_or_else(|| Ok(Tokenizer::bytes()), Tokenizer::from_file)
    }

    /// The switches that `[policy]` comes to.
    pub fn policy_rules(&self) -> PolicyRules {
        PolicyRules::new(self.policy.name, &self.policy.settings())
    }

    /// Whether times of this run are virtual.
    pub fn is_emulated(&self) -> bool {
        self.cluster.is_emulated()
    }

    /// Which rank holds which experts, before any packing.
    ///
    /// # Errors
    /// If `cluster.experts_per_rank` does not fit the model and the ranks, which [`RunConfig::load`] has ruled out.
    pub fn expert_layout(&self) -> Result<ExpertLayout, LayoutError> {
        ExpertLayout::new(self.model.experts, self.cluster.ranks, self.cluster.experts_per_rank)
    }

    /// The layouts between which packing chooses, if it is on.
    ///
    /// # Errors
    /// As [`expert_layout`](Self::expert_layout).
    pub fn packing_ladder(&self) -> Result<PackingLadder, LayoutError> {
        let experts = self.model.experts;
        let most = self.policy.max_experts_per_rank.unwrap_or(experts);
        PackingLadder::new(experts, self.cluster.ranks, self.cluster.experts_per_rank, most)
    }

    /// `[bench]`, or its defaults.
    pub fn bench_or_default(&self) -> BenchConfig {
        self.bench.clone().unwrap_or_default()
    }
}

/// Sections of another program's configuration, with a `[cluster]` among them.
pub trait ClusterSections: DeserializeOwned {
    /// `[cluster]`.
    fn cluster(&mut self) -> &mut ClusterConfig;

    /// The first thing that cannot be in the other sections: its key, and a sentence about it.
    ///
    /// # Errors
    /// If there is one.
    fn check(&self) -> Result<(), (&'static str, String)>;
}

/// Reads `file` as `T`, with `overrides`, as [`RunConfig::load`] reads a run's configuration.
///
/// # Errors
/// The first thing that is wrong, with its line or option.
pub fn load_sections<T: ClusterSections>(file: &Path, overrides: &[Override]) -> Result<T, ConfigError> {
    let mut document = Document::read(file)?;
    overrides.iter().for_each(|change| document.apply(change));
    let mut sections: T = reader::read(document.table.clone())
        .map_err(|error| ConfigError::invalid(document.place(error.origin.as_ref()), error.to_string()))?;
    let cluster = sections.cluster();
    take_launched_ranks(&document, cluster);
    let ranks = check::check_ranks(cluster).map_err(|problem| (problem.key, problem.message));
    ranks
        .and_then(|()| sections.check())
        .map_err(|(key, message)| ConfigError::invalid(document.place(document.origin(key)), message))?;
    Ok(sections)
}

/// Where ranks are processes, their number need not be written.
fn take_launched_ranks(document: &Document, cluster: &mut ClusterConfig) {
    if cluster.engine.has_processes() && document.origin("cluster.ranks").is_none() {
        cluster.ranks = launched_ranks().unwrap_or(cluster.ranks);
    }
}

/// The error with the place of the key that it begins with, where somebody wrote that key.
fn model_error(document: &Document, error: lina_model::ConfigError) -> ConfigError {
    let key = error.message.strip_prefix('`').and_then(|rest| rest.split('`').next());
    match key.and_then(|key| document.origin(&format!("model.{key}"))) {
        Some(origin) => ConfigError::invalid(document.place(Some(origin)), format!("[model] {}", error.message)),
        None => error.into(),
    }
}

#[cfg(test)]
mod tests;
