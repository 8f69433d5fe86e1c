//! What stands for a rank's GPU in a build without the feature `cuda`: there is none.

use lina_comm::Comm;
use lina_model::{Batch, ForwardOutput, LayerRouting, Model, StepContext};
use lina_plan::ExpertLayout;

use crate::TrainError;
use crate::config::RunConfig;
use crate::optimizer::{AdamW, Update};

/// Never made.
pub(crate) enum Replica {}

impl Replica {
    /// `None`: configurations that ask for a GPU have been refused.
    pub(crate) fn new(
        _config: &RunConfig,
        _experts: &ExpertLayout,
        _comm: &mut Comm,
    ) -> Result<Option<Self>, TrainError> {
        Ok(None)
    }

    pub(crate) fn fits(&self, _config: &RunConfig, _layout: &ExpertLayout, _rank: usize) -> Result<bool, TrainError> {
        match *self {}
    }

    pub(crate) fn load(&mut self, _model: &Model, _optimizer: &AdamW) -> Result<(), TrainError> {
        match *self {}
    }

    pub(crate) fn store(&self, _model: &mut Model, _optimizer: &mut AdamW) -> Result<(), TrainError> {
        match *self {}
    }

    pub(crate) fn set_experts(&mut self, _model: &Model, _optimizer: &AdamW) -> Result<(), TrainError> {
        match *self {}
    }

    pub(crate) fn forward(
        &mut self,
        _comm: &mut Comm,
        _batch: Batch<'_>,
        _context: StepContext,
    ) -> Result<ForwardOutput, TrainError> {
        match *self {}
    }

    pub(crate) fn backward(&mut self, _comm: &mut Comm, _accumulate: bool) -> Result<(), TrainError> {
        match *self {}
    }

    pub(crate) fn routing(&self, _layer: usize) -> Option<LayerRouting<'_>> {
        match *self {}
    }

    pub(crate) fn squares(&self, _optimizer: &AdamW, _squares: &mut Vec<f64>) -> Result<(), TrainError> {
        match *self {}
    }

    pub(crate) fn update(&mut self, _optimizer: &AdamW, _update: &Update<'_>) -> Result<(), TrainError> {
        match *self {}
    }
}
