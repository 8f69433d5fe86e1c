//! Copies between ordinary host memory and the device, through pinned memory: small uploads return at once.

use std::ops::Range;

use cudarc::driver::sys;

use crate::buffer::{Element, Slice, SliceMut};
use crate::error::{CudaError, check};
use crate::event::Event;
use crate::pinned::PinnedBuffer;
use crate::stream::Stream;

/// Uploads fill slots one after another; a slot is used again when the device has read all of it.
const SLOTS: usize = 4;
const SLOT_BYTES: usize = 4 << 20;

#[derive(Debug)]
struct Slot {
    memory: PinnedBuffer,
    /// When the device has read what was put in last.
    read: Event,
}

#[derive(Debug)]
pub(crate) struct Staging {
    stream: Stream,
    slots: Vec<Slot>,
    current: usize,
    used_bytes: usize,
    downloads: PinnedBuffer,
}

impl Staging {
    pub(crate) fn new(stream: &Stream) -> Result<Self, CudaError> {
        let device = stream.device();
        let slot = || Ok(Slot { memory: PinnedBuffer::zeros(device, SLOT_BYTES)?, read: Event::new(device)? });
        Ok(Staging {
            stream: stream.clone(),
            slots: (0..SLOTS).map(|_| slot()).collect::<Result<_, CudaError>>()?,
            current: 0,
            used_bytes: 0,
            downloads: PinnedBuffer::zeros(device, SLOT_BYTES)?,
        })
    }

    pub(crate) fn upload<E: Element>(&mut self, from: &[E], mut to: SliceMut<'_>) -> Result<(), CudaError> {
        self.stream.device().bind()?;
        let (dtype, piece) = (to.dtype(), SLOT_BYTES / to.dtype().bytes());
        for (number, values) in from.chunks(piece).enumerate() {
            let bytes = values.len() * dtype.bytes();
            if self.used_bytes + bytes > SLOT_BYTES {
                self.slots[self.current].read.record(&self.stream)?;
                self.current = (self.current + 1) % SLOTS;
                self.slots[self.current].read.synchronize()?;
                self.used_bytes = 0;
            }
            let staged = &mut self.slots[self.current].memory[self.used_bytes..self.used_bytes + bytes];
            E::encode(values, dtype, staged);
            self.used_bytes += bytes.next_multiple_of(16);
            let start = number * piece;
            let target = to.slice_mut(start..start + values.len());
            // SAFETY: the staged bytes are pinned and not written again before the slot's event says that they have been
            // read; the target is as many bytes of device memory.
            check("cuMemcpyHtoDAsync", unsafe {
                sys::cuMemcpyHtoDAsync_v2(target.ptr(), staged.as_ptr().cast(), bytes, self.stream.raw())
            })?;
        }
        Ok(())
    }

    pub(crate) fn download<E: Element>(&mut self, from: Slice<'_>, to: &mut [E]) -> Result<(), CudaError> {
        let piece = SLOT_BYTES / from.dtype().bytes();
        for (number, values) in to.chunks_mut(piece).enumerate() {
            let start = number * piece;
            let source = from.slice(start..start + values.len());
            let staged = self.begin_download(source, 0)?;
            self.stream.synchronize()?;
            E::decode(&self.downloads[staged], from.dtype(), values);
        }
        Ok(())
    }

    /// Two downloads that are waited for together, if there is room for both.
    pub(crate) fn download_both<A: Element, B: Element>(
        &mut self,
        (first, to_first): (Slice<'_>, &mut [A]),
        (second, to_second): (Slice<'_>, &mut [B]),
    ) -> Result<(), CudaError> {
        let behind = (first.len() * first.dtype().bytes()).next_multiple_of(16);
        if behind + second.len() * second.dtype().bytes() > SLOT_BYTES {
            self.download(first, to_first)?;
            return self.download(second, to_second);
        }
        let [staged_first, staged_second] = [self.begin_download(first, 0)?, self.begin_download(second, behind)?];
        self.stream.synchronize()?;
        A::decode(&self.downloads[staged_first], first.dtype(), to_first);
        B::decode(&self.downloads[staged_second], second.dtype(), to_second);
        Ok(())
    }

    /// Enqueues the copy of `from` to where the downloads' memory has room from byte `start` on; returns where it will be.
    fn begin_download(&mut self, from: Slice<'_>, start: usize) -> Result<Range<usize>, CudaError> {
        self.stream.device().bind()?;
        let bytes = from.len() * from.dtype().bytes();
        let staged = &mut self.downloads[start..start + bytes];
        if bytes > 0 {
            // SAFETY: both are as many bytes, and callers wait for the copy before they look at it.
            check("cuMemcpyDtoHAsync", unsafe {
                sys::cuMemcpyDtoHAsync_v2(staged.as_mut_ptr().cast(), from.ptr(), bytes, self.stream.raw())
            })?;
        }
        Ok(start..start + bytes)
    }
}
