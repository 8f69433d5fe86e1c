//! Checkpoints: a Hugging Face folder, with what the trainer needs to go on beside the weights.
//!
//! ```text
//! checkpoint-N/
//!   config.json, model.safetensors     loads in transformers, `lina eval`, ...
//!   exp_avg.safetensors                AdamW's first moments, under the parameters' keys
//!   exp_avg_sq.safetensors             second moments
//!   trainer_state.json                 step, and what must not change for the run to go on exactly
//!   tokenizer.json                     where the data was tokenized with one
//! ```
//!
//! Nothing in it depends on ranks or on who holds which expert, so a run resumes on any number of either. Rank 0
//! writes; the others send it the experts that it does not hold, one at a time.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use lina_comm::{AllToAllKind, Comm, CommError, Direction, Exchange, Leg};
use lina_model::{Checkpoint, FolderWriter, ModelConfig, Parameter, Place};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::adaptation::TuningState;
use crate::config::RunConfig;
use crate::packing::PackingState;
use crate::worker::Worker;

/// `trainer_state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TrainerState {
    /// Steps that are done.
    pub(crate) step: u64,
    /// Seed of the run.
    pub(crate) seed: u64,
    /// Sequences of the global batch.
    pub(crate) batch_sequences: usize,
    /// Tokens of a sequence.
    pub(crate) sequence_tokens: usize,
    /// Sequences of the training data.
    pub(crate) train_sequences: usize,
    /// What expert packing has come to, in a run that packs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) packing: Option<PackingState>,
    /// What the search of `lina-auto` has come to, in a run that tunes itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tuning: Option<TuningState>,
}

impl TrainerState {
    pub(crate) fn new(config: &RunConfig, train_sequences: usize, step: u64) -> Self {
        TrainerState {
            step,
            seed: config.train.seed,
            batch_sequences: config.train.batch_sequences,
            sequence_tokens: config.train.sequence_tokens,
            train_sequences,
            packing: None,
            tuning: None,
        }
    }

    /// Reads the state of a checkpoint and checks that the run can go on from it exactly.
    pub(crate) fn read(folder: &Path, config: &RunConfig, train_sequences: usize) -> Result<Self, TrainError> {
        let path = folder.join("trainer_state.json");
        let error = |message: String| TrainError::Input(format!("{}: {message}", path.display()));
        let text = fs::read_to_string(&path).map_err(|e| error(format!("cannot be read: {e}")))?;
        let state: TrainerState =
            serde_json::from_str(&text).map_err(|e| error(format!("is no trainer state: {e}")))?;
        let model = ModelConfig::from_folder(folder).map_err(TrainError::input)?;
        if model.to_json() != config.model.to_json() {
            return Err(TrainError::Input(format!(
                "{}: is a checkpoint of another model than [model] describes: {}",
                folder.display(),
                first_difference(&model, &config.model)
            )));
        }
        let now = TrainerState::new(config, train_sequences, state.step);
        let pairs = [
            ("train.seed", state.seed, now.seed),
            ("train.batch_sequences", state.batch_sequences as u64, now.batch_sequences as u64),
            ("train.sequence_tokens", state.sequence_tokens as u64, now.sequence_tokens as u64),
            ("the number of training sequences", state.train_sequences as u64, now.train_sequences as u64),
        ];
        if let Some((key, was, is)) = pairs.into_iter().find(|(_, was, is)| was != is) {
            return Err(error(format!("{key} was {was} and is {is} now, expected the same for the run to go on")));
        }
        if state.step >= config.train.steps {
            return Err(error(format!(
                "{} steps are done, expected fewer than train.steps = {}",
                state.step, config.train.steps
            )));
        }
        Ok(state)
    }
}

/// The first key in which two models' `config.json` differ.
fn first_difference(found: &ModelConfig, expected: &ModelConfig) -> String {
    let parse = |config: &ModelConfig| serde_json::from_str::<serde_json::Value>(&config.to_json()).unwrap_or_default();
    let (found, expected) = (parse(found), parse(expected));
    let keys = expected.as_object().into_iter().flatten();
    keys.map(|(key, value)| (key, value, &found[key]))
        .find(|(_, value, found)| value != found)
        .map_or("other keys".to_owned(), |(key, value, found)| format!("`{key}` is {found}, expected {value}"))
}

/// What a checkpoint keeps of each parameter.
#[derive(Clone, Copy, Debug)]
enum Kept {
    Weights,
    FirstMoments,
    SecondMoments,
}

impl Kept {
    const ALL: [Kept; 3] = [Kept::Weights, Kept::FirstMoments, Kept::SecondMoments];

    fn dense<'w>(self, worker: &'w Worker<'_>) -> &'w [f32] {
        match self {
            Kept::Weights => &worker.model.parameters().dense,
            Kept::FirstMoments => &worker.optimizer.dense.first,
            Kept::SecondMoments => &worker.optimizer.dense.second,
        }
    }

    fn experts<'w>(self, worker: &'w Worker<'_>) -> &'w [f32] {
        match self {
            Kept::Weights => &worker.model.parameters().experts,
            Kept::FirstMoments => &worker.optimizer.experts.first,
            Kept::SecondMoments => &worker.optimizer.experts.second,
        }
    }
}

/// Writes `OUT/checkpoint-STEP`. All ranks call it together; returns where it is, on every rank.
pub(crate) fn save(
    worker: &Worker<'_>,
    comm: &mut Comm,
    out: &Path,
    state: &TrainerState,
    tokenizer: Option<&Path>,
) -> Result<PathBuf, TrainError> {
    let target = out.join(format!("checkpoint-{}", state.step));
    comm.begin_evaluation(state.step)?;
    if comm.rank() == 0 {
        comm.busy(|comm| write(worker, comm, &target, state, tokenizer))?;
    } else {
        for kept in Kept::ALL {
            for parameter in worker.model.layout().parameters() {
                if let Place::Expert { layer, expert, range } = &parameter.place
                    && range.start == 0
                {
                    fetch_expert(worker, comm, kept, *layer, *expert, &mut Vec::new())?;
                }
            }
        }
    }
    // Nobody goes on before the checkpoint is in place.
    comm.sum(&mut [0.0])?;
    comm.end_step();
    Ok(target)
}

fn write(
    worker: &Worker<'_>,
    comm: &mut Comm,
    target: &Path,
    state: &TrainerState,
    tokenizer: Option<&Path>,
) -> Result<(), TrainError> {
    let layout = worker.model.layout();
    let folder = FolderWriter::create(target)?;
    for kept in Kept::ALL {
        let mut block = Vec::new();
        let tensor = |parameter: &Parameter| -> Result<Cow<'_, [f32]>, TrainError> {
            match &parameter.place {
                Place::Dense(range) => Ok(Cow::Borrowed(&kept.dense(worker)[range.clone()])),
                Place::Expert { layer, expert, range } => {
                    // An expert's tensors follow each other; its block comes with the first.
                    if range.start == 0 {
                        fetch_expert(worker, comm, kept, *layer, *expert, &mut block)?;
                    }
                    Ok(Cow::Owned(block[range.clone()].to_vec()))
                }
            }
        };
        match kept {
            Kept::Weights => folder.write_model(worker.model.config(), layout, tensor)?,
            Kept::FirstMoments => folder.write_tensors("exp_avg.safetensors", layout, tensor)?,
            Kept::SecondMoments => folder.write_tensors("exp_avg_sq.safetensors", layout, tensor)?,
        }
    }
    let mut json = serde_json::to_vec_pretty(state).map_err(TrainError::input)?;
    json.push(b'\n');
    folder.write_file("trainer_state.json", |write| write(&json).map_err(TrainError::from))?;
    if let Some(path) = tokenizer {
        let text = fs::read(path).map_err(|e| TrainError::Input(format!("{}: cannot be read: {e}", path.display())))?;
        folder.write_file("tokenizer.json", |write| write(&text).map_err(TrainError::from))?;
    }
    Ok(folder.commit()?)
}

/// Brings one expert's block to rank 0, from the first rank that holds it. All ranks call it alike.
fn fetch_expert(
    worker: &Worker<'_>,
    comm: &mut Comm,
    kept: Kept,
    layer: usize,
    expert: usize,
    block: &mut Vec<f32>,
) -> Result<(), CommError> {
    let layout = worker.model.layout();
    let holder = worker.model.expert_layout().holders(expert)[0];
    let (rank, ranks) = (comm.rank(), comm.ranks());
    let mine = layout.expert_block(layer, expert).map(|range| &kept.experts(worker)[range]).unwrap_or_default();
    block.clear();
    if holder == 0 {
        block.extend(mine);
        return Ok(());
    }
    let elements = layout.expert_elements();
    let only = |peer: usize, here: bool| -> Vec<usize> {
        (0..ranks).map(|rank| if here && rank == peer { elements } else { 0 }).collect()
    };
    let kind =
        AllToAllKind { direction: Direction::Forward, leg: Leg::Parameters, layer: layer as u32, chunk: 0, chunks: 1 };
    let exchange = Exchange {
        kind,
        send: if rank == holder { mine.to_vec() } else { Vec::new() },
        send_elements: only(0, rank == holder),
        recv: vec![0.0; if rank == 0 { elements } else { 0 }],
        recv_elements: only(holder, rank == 0),
    };
    let ticket = comm.all_to_all(exchange)?;
    *block = comm.wait(ticket)?.recv;
    Ok(())
}

/// Fills weights and, with `moments`, the optimizer's moments from a checkpoint: what this rank holds of them.
pub(crate) fn load(worker: &mut Worker<'_>, folder: &Path, moments: bool) -> Result<(), TrainError> {
    let weights = Checkpoint::open(folder)?;
    let (_, layout, parameters) = worker.model.for_update();
    weights.load(layout, parameters)?;
    if moments {
        let (dense, experts) = (&mut worker.optimizer.dense, &mut worker.optimizer.experts);
        let first = Checkpoint::open_file(&folder.join("exp_avg.safetensors"))?;
        first.load_into(layout, &mut dense.first, &mut experts.first)?;
        let second = Checkpoint::open_file(&folder.join("exp_avg_sq.safetensors"))?;
        second.load_into(layout, &mut dense.second, &mut experts.second)?;
    }
    Ok(())
}
