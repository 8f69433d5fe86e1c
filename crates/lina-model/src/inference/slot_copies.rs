//! Who copies experts into a rank's slots: the lane of an emulated device to its host's memory, or a GPU's copy engine.

use lina_comm::{Comm, CopyDirection, CopyTicket, HostCopy, Nanos};
use lina_plan::SlotCopy;

use crate::batch::StepError;

/// When a copy may overwrite its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Overwrite {
    /// When what has been enqueued has run: the layer has no rows for the slot any more.
    Now,
    /// When the layer's experts have computed the rows of the pass under way.
    AfterUse,
}

/// The copies into this rank's slots. Layers are numbered among those with experts.
pub(crate) trait SlotCopies {
    /// Begins a copy, behind those that are under way.
    ///
    /// # Errors
    /// If the device has failed.
    fn begin(&mut self, comm: &mut Comm, number: usize, copy: SlotCopy, overwrite: Overwrite) -> Result<(), StepError>;

    /// How long from now the copies for a layer still take; 0 exactly when all have arrived.
    ///
    /// # Errors
    /// If the device has failed.
    fn remaining(&mut self, comm: &Comm, number: usize) -> Result<Nanos, StepError>;

    /// What the rank computes from here on finds what was copied into a layer's slots.
    ///
    /// # Errors
    /// If the job or the device has failed.
    fn wait(&mut self, comm: &mut Comm, number: usize) -> Result<(), StepError>;
}

/// On a processor, which computes from host memory: copies take an emulated device's time and move nothing.
#[derive(Debug)]
pub(crate) struct HostCopies {
    /// Layer index of each layer with experts.
    layers: Vec<u32>,
    expert_bytes: u64,
    /// Of a reference whose copies take no time by decree.
    free: bool,
    /// For each layer, the last copy under way.
    last: Vec<Option<CopyTicket>>,
}

impl HostCopies {
    pub fn new(layers: impl Iterator<Item = usize>, expert_bytes: u64, free: bool) -> Self {
        let layers: Vec<u32> = layers.map(|layer| layer as u32).collect();
        HostCopies { last: layers.iter().map(|_| None).collect(), layers, expert_bytes, free }
    }
}

impl SlotCopies for HostCopies {
    fn begin(&mut self, comm: &mut Comm, number: usize, _: SlotCopy, _: Overwrite) -> Result<(), StepError> {
        if !self.free {
            let (direction, layer) = (CopyDirection::ToDevice, self.layers[number]);
            self.last[number] = Some(comm.copy(HostCopy { direction, layer, bytes: self.expert_bytes }));
        }
        Ok(())
    }

    fn remaining(&mut self, comm: &Comm, number: usize) -> Result<Nanos, StepError> {
        Ok(self.last[number].as_ref().map_or(0, |ticket| comm.copy_remaining(ticket)))
    }

    fn wait(&mut self, comm: &mut Comm, number: usize) -> Result<(), StepError> {
        Ok(self.last[number].take().map_or(Ok(()), |ticket| comm.wait_copy(ticket))?)
    }
}
