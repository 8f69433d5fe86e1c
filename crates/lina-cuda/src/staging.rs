//! Copies between ordinary host memory and the device, through pinned memory: small uploads return at once.

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
        self.stream.device().bind()?;
        let (dtype, piece) = (from.dtype(), SLOT_BYTES / from.dtype().bytes());
        for (number, values) in to.chunks_mut(piece).enumerate() {
            let start = number * piece;
            let source = from.slice(start..start + values.len());
            let bytes = values.len() * dtype.bytes();
            let staged = &mut self.downloads[..bytes];
            // SAFETY: both are as many bytes, and the host waits for the copy.
            check("cuMemcpyDtoHAsync", unsafe {
                sys::cuMemcpyDtoHAsync_v2(staged.as_mut_ptr().cast(), source.ptr(), bytes, self.stream.raw())
            })?;
            self.stream.synchronize()?;
            E::decode(staged, dtype, values);
        }
        Ok(())
    }
}
