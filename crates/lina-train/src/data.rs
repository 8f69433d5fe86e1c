//! The data of a run, tokenized.

use std::path::{Path, PathBuf};

use lina_data::TrainingData;

use crate::TrainError;
use crate::config::RunConfig;

/// Training data in memory.
pub(crate) struct LoadedData {
    pub(crate) data: TrainingData,
    /// The tokenizer's file, to go with checkpoints.
    pub(crate) tokenizer_file: Option<PathBuf>,
    /// What the tokens take in memory.
    pub(crate) bytes: u64,
}

/// Reads and tokenizes the files that `config` names.
pub(crate) fn load_data(config: &RunConfig) -> Result<LoadedData, TrainError> {
    let tokenizer = config.tokenizer()?;
    let data = TrainingData::load(&config.data, &tokenizer, config.train.sequence_tokens, config.train.seed)?;
    data.train.stream().check_vocabulary(config.model.vocab, &tokenizer)?;
    if let Some(held_out) = &data.held_out {
        held_out.stream().check_vocabulary(config.model.vocab, &tokenizer)?;
    }
    let bytes = (data.train.stream().len() * size_of::<u32>()) as u64;
    Ok(LoadedData { data, tokenizer_file: tokenizer.file().map(Path::to_path_buf), bytes })
}
