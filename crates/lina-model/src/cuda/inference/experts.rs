//! Experts where the brain puts them: in a device's slots, from a copy of all of them in pinned host memory.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use lina_comm::{Comm, Nanos};
use lina_cuda::{CudaError, DType, Element, ExpertSlots, Gpu, PinnedBuffer, Slice};
use lina_plan::{ExpertScheduler, SlotCopy};

use crate::batch::StepError;
use crate::inference::InferenceWeights;
use crate::inference::slot_copies::{Overwrite, SlotCopies};

/// All experts of a model in pinned host memory, stored as slots are.
#[derive(Debug)]
pub(super) struct PinnedExperts {
    memory: Arc<PinnedBuffer>,
    /// Experts of a layer.
    experts: usize,
    expert_bytes: usize,
}

impl PinnedExperts {
    fn new(gpu: &Gpu, weights: &InferenceWeights, dtype: DType) -> Result<Self, CudaError> {
        let config = weights.config();
        let expert_bytes = weights.layout().expert_elements() * dtype.bytes();
        let layer_bytes = config.experts * expert_bytes;
        let mut memory = PinnedBuffer::zeros(gpu.device(), config.moe_layers() * layer_bytes)?;
        for number in 0..config.moe_layers() {
            let values = weights.layer_experts(config.moe_layer(number));
            f32::encode(values, dtype, &mut memory[number * layer_bytes..(number + 1) * layer_bytes]);
        }
        Ok(PinnedExperts { memory: Arc::new(memory), experts: config.experts, expert_bytes })
    }

    /// Where an expert of the `number`-th layer with experts is.
    fn bytes(&self, number: usize, expert: usize) -> Range<usize> {
        let start = (number * self.experts + expert) * self.expert_bytes;
        start..start + self.expert_bytes
    }
}

/// The pinned copy of a model's experts: made by the rank that first needs it, for all ranks of the process.
#[derive(Debug, Default)]
pub struct SharedExperts(Mutex<Option<Arc<PinnedExperts>>>);

impl SharedExperts {
    fn get(&self, gpu: &Gpu, weights: &InferenceWeights, dtype: DType) -> Result<Arc<PinnedExperts>, CudaError> {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(experts) = &*shared {
            return Ok(Arc::clone(experts));
        }
        let experts = Arc::new(PinnedExperts::new(gpu, weights, dtype)?);
        *shared = Some(Arc::clone(&experts));
        Ok(experts)
    }
}

/// A rank's slots, and the copies into them.
#[derive(Debug)]
pub(super) struct DeviceExperts {
    slots: ExpertSlots,
    /// Where experts come from; `None` where all of them have a slot, so that nothing ever moves.
    pinned: Option<Arc<PinnedExperts>>,
    /// What one copy takes.
    copy_ns: f64,
    /// Copies into slots that are still to be used in the pass under way: layer number and copy.
    later: VecDeque<(usize, SlotCopy)>,
}

impl DeviceExperts {
    /// Fills the slots of device `rank` with the experts that `scheduler` begins with.
    pub fn new(
        gpu: &Gpu,
        weights: &InferenceWeights,
        scheduler: &ExpertScheduler,
        rank: usize,
        dtype: DType,
        shared: &SharedExperts,
    ) -> Result<Self, CudaError> {
        let config = weights.config();
        let settings = scheduler.settings();
        let elements = weights.layout().expert_elements();
        let mut slots = ExpertSlots::new(gpu, config.moe_layers(), settings.slots, elements, dtype)?;
        for number in 0..config.moe_layers() {
            let experts = weights.layer_experts(config.moe_layer(number));
            let held = scheduler.placement(number).slots_of(rank).iter().enumerate();
            for (slot, expert) in held.filter_map(|(slot, expert)| Some((slot, (*expert)? as usize))) {
                slots.load(gpu, number, slot, &experts[expert * elements..(expert + 1) * elements])?;
            }
        }
        let moves = settings.slots < config.experts;
        let pinned = moves.then(|| shared.get(gpu, weights, dtype)).transpose()?;
        Ok(DeviceExperts { slots, pinned, copy_ns: settings.costs.copy_ns, later: VecDeque::new() })
    }

    /// The slots of the `number`-th layer with experts, one after another.
    pub fn layer(&self, number: usize) -> Slice<'_> {
        self.slots.layer(number)
    }

    /// Whether every expert is where it was at first.
    pub fn stay(&self) -> bool {
        self.pinned.is_none()
    }

    /// Whether rows can go to a slot.
    pub fn serves(&self, number: usize, slot: usize) -> bool {
        self.slots.serves(number, slot)
    }

    /// The layer's experts have been given all of their rows of this pass: what is to overwrite them can begin.
    pub fn used(&mut self, number: usize) -> Result<(), CudaError> {
        if self.pinned.is_none() {
            return Ok(());
        }
        self.slots.used(number)?;
        while let Some((number, copy)) = self.later.pop_front() {
            self.copy(number, copy)?;
        }
        Ok(())
    }

    fn copy(&mut self, number: usize, copy: SlotCopy) -> Result<(), CudaError> {
        let pinned = self.pinned.as_ref().expect("where slots are as many as experts, none moves");
        let bytes = pinned.bytes(number, copy.expert);
        self.slots.begin_copy(number, copy.slot, &pinned.memory, bytes).map(drop)
    }
}

impl SlotCopies for DeviceExperts {
    fn begin(&mut self, _: &mut Comm, number: usize, copy: SlotCopy, overwrite: Overwrite) -> Result<(), StepError> {
        match overwrite {
            Overwrite::Now => self.copy(number, copy)?,
            Overwrite::AfterUse => self.later.push_back((number, copy)),
        }
        Ok(())
    }

    fn remaining(&mut self, _: &Comm, number: usize) -> Result<Nanos, StepError> {
        let Some(ticket) = self.slots.last_copy(number) else { return Ok(0) };
        let left = self.slots.left(ticket)?;
        Ok(left * (self.copy_ns.ceil() as Nanos).max(1))
    }

    fn wait(&mut self, _: &mut Comm, number: usize) -> Result<(), StepError> {
        Ok(self.slots.wait(number)?)
    }
}
