//! Steps whose launches have been enqueued before, recorded: decoding repeats the same ones, and the host's part of them would be
//! most of a step's time.

use std::collections::HashMap;

use lina_cuda::{Graph, PagedLaunches};

use super::CudaInferenceModel;
use crate::batch::StepError;

/// Steps that are remembered: 64 numbers of tokens, and a few lengths of attention's tables with each.
const MAX_STEPS: usize = 256;

/// What a step's launches depend on; steps that have the same may take each other's recording.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct StepLaunches {
    /// Tokens, and much else.
    pub attention: PagedLaunches,
    /// Rows whose logits are wanted.
    pub rows: usize,
    /// Of buffers that can still grow.
    pub addresses: [u64; 2],
}

/// Recordings by what they depend on; `None` of a step that has been seen once.
#[derive(Debug, Default)]
pub(super) struct Recordings(HashMap<StepLaunches, Option<Graph>>);

impl Recordings {
    /// Enqueues a step: as `enqueue` does the first time, when kernels may be loaded; then it is recorded, if that succeeds.
    pub fn run(
        &mut self,
        step: StepLaunches,
        model: &mut CudaInferenceModel,
        mut enqueue: impl FnMut(&mut CudaInferenceModel) -> Result<(), StepError>,
    ) -> Result<(), StepError> {
        let recording = match self.0.get(&step) {
            Some(Some(graph)) => return Ok(graph.launch()?),
            Some(None) => {
                model.gpu().begin_recording()?;
                let enqueued = enqueue(model);
                // Whatever happened, recording ends.
                let graph = model.gpu().end_recording();
                enqueued?;
                match graph {
                    Ok(graph) => {
                        graph.launch()?;
                        Some(graph)
                    }
                    // Recordings take memory, of which there may be no more. Nothing has run yet.
                    Err(_) => {
                        self.0.clear();
                        enqueue(model)?;
                        None
                    }
                }
            }
            None => {
                enqueue(model)?;
                None
            }
        };
        self.make_room();
        self.0.insert(step, recording);
        Ok(())
    }

    /// Forgets steps that have been seen but once or, if all have been seen more often, all of them.
    fn make_room(&mut self) {
        if self.0.len() >= MAX_STEPS {
            self.0.retain(|_, recording| recording.is_some());
        }
        if self.0.len() >= MAX_STEPS {
            self.0.clear();
        }
    }
}
