//! Slots on a device that experts are copied into from pinned host memory while the device computes.
//!
//! Copies have a stream of their own and run one after another, in the order in which they were begun. A copy begins on the
//! device when the last kernels that were announced to read its layer's slots have run; what reads a slot is enqueued when its
//! copy is known to be complete, or behind a wait for it. In between the slot serves nobody.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys;

use crate::buffer::{Buffer, DType, Slice};
use crate::error::{CudaError, check};
use crate::event::Event;
use crate::gpu::Gpu;
use crate::matmul::{Addend, Mat, MatMut, matmul};
use crate::pinned::PinnedBuffer;
use crate::stream::{Priority, Stream};

/// A copy into a slot: its number among all that were begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SlotTicket(u64);

/// As many slots in each of some layers, of an expert each.
#[derive(Debug)]
pub struct ExpertSlots {
    compute: Stream,
    copies: Stream,
    layers: Vec<LayerSlots>,
    slots: usize,
    /// Elements of a slot.
    elements: usize,
    dtype: DType,
    /// Copies begun, and how many of the first are known to be complete.
    begun: u64,
    complete: u64,
    /// The others, oldest first.
    under_way: VecDeque<UnderWay>,
    spare: Vec<Event>,
}

#[derive(Debug)]
struct LayerSlots {
    /// `[slots, elements]`.
    memory: Buffer,
    /// Behind the last kernels that read the slots.
    used: Event,
    /// The last copy into each slot.
    last: Vec<Option<SlotTicket>>,
    /// Copies before this one are complete for what the compute stream gets next.
    awaited: u64,
}

#[derive(Debug)]
struct UnderWay {
    done: Event,
    /// Held for as long as the device reads it.
    _from: Arc<PinnedBuffer>,
}

impl ExpertSlots {
    /// Slots with whatever is in them.
    ///
    /// # Errors
    /// If the device's memory does not suffice.
    pub fn new(
        gpu: &Gpu,
        layers: usize,
        slots: usize,
        elements: usize,
        dtype: DType,
    ) -> Result<ExpertSlots, CudaError> {
        let layer = || {
            let memory = gpu.uninit(slots * elements, dtype)?;
            Ok(LayerSlots { memory, used: gpu.event()?, last: vec![None; slots], awaited: 0 })
        };
        let layers = (0..layers).map(|_| layer()).collect::<Result<Vec<_>, CudaError>>()?;
        // Memory is there when the compute stream has come as far; copies have a stream of their own.
        gpu.synchronize()?;
        Ok(ExpertSlots {
            compute: gpu.stream().clone(),
            copies: Stream::new(gpu.device(), Priority::Low)?,
            layers,
            slots,
            elements,
            dtype,
            begun: 0,
            complete: 0,
            under_way: VecDeque::new(),
            spare: Vec::new(),
        })
    }

    /// Fills a slot from ordinary host memory, in the order of the compute stream.
    ///
    /// # Errors
    /// If the device has failed.
    ///
    /// # Panics
    /// If there is no such slot, or `values` are not an expert's.
    pub fn load(&mut self, gpu: &Gpu, layer: usize, slot: usize, values: &[f32]) -> Result<(), CudaError> {
        let range = self.range(slot);
        gpu.upload(values, self.layers[layer].memory.slice_mut(range))?;
        self.used(layer)
    }

    /// All slots of a layer, one after another.
    pub fn layer(&self, layer: usize) -> Slice<'_> {
        self.layers[layer].memory.whole()
    }

    /// Whether kernels that are enqueued now find all of what was last copied into the slot.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn serves(&self, layer: usize, slot: usize) -> bool {
        let layer = &self.layers[layer];
        layer.last[slot].is_none_or(|ticket| ticket.0 < self.complete.max(layer.awaited))
    }

    /// The kernels that read a layer's slots have been enqueued: later copies wait for them.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn used(&mut self, layer: usize) -> Result<(), CudaError> {
        self.layers[layer].used.record(&self.compute)
    }

    /// Begins to copy an expert, `bytes` of `from` stored as slots are, behind the copies that are under way. Returns at
    /// once.
    ///
    /// # Errors
    /// If the device has failed.
    ///
    /// # Panics
    /// If there is no such slot, or `bytes` are not an expert's.
    pub fn begin_copy(
        &mut self,
        layer: usize,
        slot: usize,
        from: &Arc<PinnedBuffer>,
        bytes: Range<usize>,
    ) -> Result<SlotTicket, CudaError> {
        let range = self.range(slot);
        let source = &from[bytes];
        assert_eq!(source.len(), self.elements * self.dtype.bytes(), "as many bytes as a slot has");
        let ticket = SlotTicket(self.begun);
        let done = self.spare.pop().map_or_else(|| self.copies.event(), Ok)?;
        let layer = &mut self.layers[layer];
        self.copies.wait(&layer.used)?;
        let target = layer.memory.slice_mut(range);
        // SAFETY: both are as many bytes. The source is pinned and held until the copy is complete; the slot's readers before
        // are waited for, and later ones wait for the copy.
        check("cuMemcpyHtoDAsync", unsafe {
            sys::cuMemcpyHtoDAsync_v2(target.ptr(), source.as_ptr().cast(), source.len(), self.copies.raw())
        })?;
        layer.last[slot] = Some(ticket);
        done.record(&self.copies)?;
        self.under_way.push_back(UnderWay { done, _from: Arc::clone(from) });
        self.begun += 1;
        Ok(ticket)
    }

    /// Copies up to and with this one that are not complete; 0 if it is.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn left(&mut self, ticket: SlotTicket) -> Result<u64, CudaError> {
        while let Some(copy) = self.under_way.front()
            && copy.done.query()?
        {
            self.spare.extend(self.under_way.pop_front().map(|copy| copy.done));
            self.complete += 1;
        }
        Ok((ticket.0 + 1).saturating_sub(self.complete))
    }

    /// Whether a copy is complete.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn ready(&mut self, ticket: SlotTicket) -> Result<bool, CudaError> {
        Ok(self.left(ticket)? == 0)
    }

    /// The last copy into a layer's slots that was begun.
    pub fn last_copy(&self, layer: usize) -> Option<SlotTicket> {
        self.layers[layer].last.iter().copied().flatten().max()
    }

    /// What the compute stream gets from here on waits for the copies into a layer's slots that have been begun. Returns at
    /// once.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn wait(&mut self, layer: usize) -> Result<(), CudaError> {
        let Some(ticket) = self.last_copy(layer) else { return Ok(()) };
        if let Some(place) = ticket.0.checked_sub(self.complete) {
            self.compute.wait(&self.under_way[place as usize].done)?;
        }
        self.layers[layer].awaited = ticket.0 + 1;
        Ok(())
    }

    fn range(&self, slot: usize) -> Range<usize> {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        slot * self.elements..(slot + 1) * self.elements
    }
}

impl Drop for ExpertSlots {
    fn drop(&mut self) {
        // Memory goes back in the order of the compute stream, which knows nothing of copies under way.
        let _ = self.copies.synchronize();
    }
}

/// How fast experts are copied into slots.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlotCopyRates {
    /// While the device does nothing else, in bytes a second.
    pub alone_bytes_per_s: f64,
    /// While it computes.
    pub beside_bytes_per_s: f64,
    /// What the computation takes without copies, in milliseconds.
    pub compute_ms: f64,
    /// The same beside them.
    pub compute_beside_ms: f64,
}

/// Rounds of a measurement, of which the middle one counts.
const ROUNDS: usize = 5;
/// Rows, columns and depth of the product that is computed.
const PRODUCT: usize = 4096;

/// Measures copies of experts of `bytes` bytes, alone and beside bf16 products that take about `compute_ms` and a little
/// longer than the copies.
///
/// # Errors
/// If memory does not suffice, or the device has failed.
///
/// # Panics
/// If there is nothing to copy.
pub fn measure_slot_copy(gpu: &Gpu, bytes: usize, compute_ms: f64) -> Result<SlotCopyRates, CudaError> {
    assert!(bytes >= DType::Bf16.bytes(), "an expert has elements");
    let elements = bytes / DType::Bf16.bytes();
    let bytes = elements * DType::Bf16.bytes();
    let mut slots = ExpertSlots::new(gpu, 1, 2, elements, DType::Bf16)?;
    let from = Arc::new(PinnedBuffer::zeros(gpu.device(), 2 * bytes)?);
    let operands = [(); 2].map(|()| gpu.zeros(PRODUCT * PRODUCT, DType::Bf16));
    let [a, b] = operands;
    let (a, b) = (a?, b?);
    let mut product = gpu.zeros(PRODUCT * PRODUCT, DType::Bf16)?;
    let [begun, computed, copying, copied] = [gpu.event()?, gpu.event()?, gpu.event()?, gpu.event()?];
    // Milliseconds of the products, and of the copies.
    let mut run = |products: usize, copies: usize| -> Result<[f64; 2], CudaError> {
        gpu.synchronize()?;
        copying.record(&slots.copies)?;
        for copy in 0..copies {
            let slot = copy % 2;
            slots.begin_copy(0, slot, &from, slot * bytes..(slot + 1) * bytes)?;
        }
        copied.record(&slots.copies)?;
        begun.record(gpu.stream())?;
        for _ in 0..products {
            let [a, b] = [&a, &b].map(|operand| Mat::new(operand.whole(), PRODUCT, PRODUCT));
            matmul(gpu, MatMut::new(product.whole_mut(), PRODUCT, PRODUCT), a, b.t(), Addend::None)?;
        }
        computed.record(gpu.stream())?;
        copied.synchronize()?;
        computed.synchronize()?;
        slots.last_copy(0).map_or(Ok(true), |ticket| slots.ready(ticket))?;
        Ok([computed.elapsed_ms_since(&begun)?, copied.elapsed_ms_since(&copying)?].map(f64::from))
    };
    let mut middle = |products: usize, copies: usize| -> Result<[f64; 2], CudaError> {
        let rounds = (0..ROUNDS).map(|_| run(products, copies)).collect::<Result<Vec<_>, _>>()?;
        Ok([0, 1].map(|which| {
            let mut values: Vec<f64> = rounds.iter().map(|round| round[which]).collect();
            values.sort_by(f64::total_cmp);
            values[ROUNDS / 2]
        }))
    };
    let ([product_ms, _], [_, copy_ms]) = (middle(1, 0)?, middle(0, 1)?);
    let products = (compute_ms / product_ms).ceil().max(1.0) as usize;
    let copies = (0.9 * compute_ms / copy_ms).floor().max(1.0) as usize;
    let ([compute_ms, _], [_, alone_ms]) = (middle(products, 0)?, middle(0, copies)?);
    let [compute_beside_ms, beside_ms] = middle(products, copies)?;
    let bytes_per_s = |ms: f64| (copies * bytes) as f64 / ms * 1e3;
    Ok(SlotCopyRates {
        alone_bytes_per_s: bytes_per_s(alone_ms),
        beside_bytes_per_s: bytes_per_s(beside_ms),
        compute_ms,
        compute_beside_ms,
    })
}
