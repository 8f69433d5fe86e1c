//! Experts that wait in host memory: fetched ahead of use, their gradients copied back.
//!
//! Which layers' they are, and when a slot is free for the next, is the brain's [`Residency`]; here its fetches and
//! stores are asked for and waited for. What is copied where changes no number: a device with memory of its own is
//! emulated, and computes from the same buffers.

use lina_comm::{Comm, CommError, CopyDirection, CopyTicket, HostCopy};
use lina_plan::{Direction, Residency};

use crate::params::ParameterLayout;

/// The slots of a rank's device, and what is on its way there and back.
#[derive(Debug, Default)]
pub(crate) struct WaitingExperts {
    residency: Residency,
    /// Weights on their way to the device, by slot.
    fetches: [Option<CopyTicket>; Residency::SLOTS],
    /// Gradients on their way to the host, by slot.
    stores: [Option<CopyTicket>; Residency::SLOTS],
}

impl WaitingExperts {
    pub fn new(residency: Residency) -> Self {
        WaitingExperts { residency, ..WaitingExperts::default() }
    }

    /// A forward pass begins.
    pub fn begin(&mut self, comm: &mut Comm, layout: &ParameterLayout) {
        for &layer in self.residency.first_fetches() {
            fetch(&self.residency, &mut self.fetches, comm, layout, layer);
        }
    }

    /// Waits until `layer`'s experts are on the device.
    pub fn before_use(&mut self, comm: &mut Comm, layer: usize) -> Result<(), CommError> {
        let fetch = self.residency.slot(layer).and_then(|slot| self.fetches[slot].take());
        fetch.map_or(Ok(()), |ticket| comm.wait_copy(ticket))
    }

    /// `layer`'s experts have multiplied by their weights in `direction`: their slot is free.
    pub fn after_use(&mut self, comm: &mut Comm, layout: &ParameterLayout, layer: usize, direction: Direction) {
        if let Some(next) = self.residency.fetch_after(layer, direction) {
            fetch(&self.residency, &mut self.fetches, comm, layout, next);
        }
    }

    /// Waits until the gradients of an earlier layer have left the slot that `layer`'s will use.
    pub fn before_gradients(&mut self, comm: &mut Comm, layer: usize) -> Result<(), CommError> {
        let store = self.residency.slot(layer).and_then(|slot| self.stores[slot].take());
        store.map_or(Ok(()), |ticket| comm.wait_copy(ticket))
    }

    /// `layer`'s gradients are there: to host memory with them, where they are added up over micro-batches, and reduced
    /// as they arrive.
    pub fn after_gradients(&mut self, comm: &mut Comm, layout: &ParameterLayout, layer: usize) {
        if let Some(slot) = self.residency.slot(layer) {
            self.stores[slot] = Some(comm.copy(copy(CopyDirection::ToHost, layout, layer)));
        }
    }
}

fn fetch(
    residency: &Residency,
    fetches: &mut [Option<CopyTicket>; Residency::SLOTS],
    comm: &mut Comm,
    layout: &ParameterLayout,
    layer: usize,
) {
    if let Some(slot) = residency.slot(layer) {
        fetches[slot] = Some(comm.copy(copy(CopyDirection::ToDevice, layout, layer)));
    }
}

/// A copy of as much as a layer's experts on this rank have weights.
fn copy(direction: CopyDirection, layout: &ParameterLayout, layer: usize) -> HostCopy {
    let bytes = (layout.layer_experts(layer).len() * size_of::<f32>()) as u64;
    HostCopy { direction, layer: layer as u32, bytes }
}
