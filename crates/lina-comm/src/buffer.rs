//! A flat gradient buffer that the compute thread fills range by range while finished ranges are being reduced in
//! place by the communication thread.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

#[cfg(feature = "nccl")]
use lina_cuda::{Buffer, DType, Slice, SliceMut};

/// Memory of a [`SharedBuffer`], also held by every operation in flight on it.
#[derive(Debug)]
pub(crate) struct Storage {
    /// Where the elements are in the host's memory; null if they are in a device's.
    elements: *mut f32,
    len: usize,
    /// Elements handed to communication and not yet given back.
    in_flight: AtomicUsize,
    memory: Memory,
}

/// Whose memory it is.
#[derive(Debug)]
enum Memory {
    /// The storage's own: a boxed slice that was taken apart.
    Own,
    /// Somebody else's, whom this keeps.
    Foreign(#[expect(dead_code, reason = "it is only kept")] Box<dyn Any + Send + Sync>),
    /// A device's.
    #[cfg(feature = "nccl")]
    Device(Buffer),
}

impl Storage {
    /// Where element `index` is in the host's memory.
    ///
    /// # Panics
    /// If the memory is a device's.
    fn on_host(&self, index: usize) -> *mut f32 {
        assert!(!self.elements.is_null(), "the buffer is in a device's memory");
        assert!(index <= self.len);
        // SAFETY: within the buffer, or one past its end.
        unsafe { self.elements.add(index) }
    }

    /// Where element `index` is in the device's memory; `None` if the memory is the host's.
    #[cfg(feature = "nccl")]
    fn on_device(&self, index: usize) -> Option<u64> {
        let Memory::Device(buffer) = &self.memory else { return None };
        Some(buffer.whole().ptr() + (index * size_of::<f32>()) as u64)
    }
}

// SAFETY: the pointer is to memory that this value owns or keeps alive; who may touch which range at what time is kept by
// `SharedBuffer` (ranges not in flight) and `Region` (ranges in flight), which never overlap.
unsafe impl Send for Storage {}
// SAFETY: as above; shared references give no access to elements except through those two.
unsafe impl Sync for Storage {}

impl Drop for Storage {
    fn drop(&mut self) {
        if !matches!(self.memory, Memory::Own) {
            return;
        }
        // SAFETY: `elements` and `len` are those of the boxed slice that `SharedBuffer::zeros` took apart, and the
        // last owner drops it once.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(self.elements, self.len)) });
    }
}

/// A buffer of `f32` whose ranges can be lent to communication.
///
/// The owner reads and writes ranges through [`range`](Self::range) and [`range_mut`](Self::range_mut), which panic
/// on a range that is in flight: to touch it would be a data race.
#[derive(Debug)]
pub struct SharedBuffer {
    storage: Arc<Storage>,
    lent: Vec<Range<usize>>,
}

impl SharedBuffer {
    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let elements = Box::into_raw(vec![0.0f32; len].into_boxed_slice()).cast::<f32>();
        SharedBuffer {
            storage: Arc::new(Storage { elements, len, in_flight: AtomicUsize::new(0), memory: Memory::Own }),
            lent: Vec::with_capacity(64),
        }
    }

    /// The elements of `buffer`, which [`device_range`](Self::device_range) and
    /// [`device_range_mut`](Self::device_range_mut) give access to.
    ///
    /// # Panics
    /// If it is not of f32.
    #[cfg(feature = "nccl")]
    pub fn on_device(buffer: Buffer) -> Self {
        assert_eq!(buffer.dtype(), DType::F32, "gradients are summed as f32");
        let (elements, len) = (std::ptr::null_mut(), buffer.len());
        let storage = Storage { elements, len, in_flight: AtomicUsize::new(0), memory: Memory::Device(buffer) };
        SharedBuffer { storage: Arc::new(storage), lent: Vec::with_capacity(64) }
    }

    /// The `len` elements at `elements`, which belong to somebody else: a framework's gradient buffer, say. `owner`
    /// is dropped when neither this handle nor communication needs the memory any more.
    ///
    /// # Safety
    /// The memory must be valid for reads and writes of `len` initialised `f32` for as long as `owner` lives, and
    /// must not be touched from elsewhere while this handle borrows it or a range of it is in flight.
    pub unsafe fn from_foreign(elements: *mut f32, len: usize, owner: Box<dyn Any + Send + Sync>) -> Self {
        let storage = Storage { elements, len, in_flight: AtomicUsize::new(0), memory: Memory::Foreign(owner) };
        SharedBuffer { storage: Arc::new(storage), lent: Vec::with_capacity(64) }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.storage.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.storage.len == 0
    }

    /// Elements of `range`.
    ///
    /// # Panics
    /// If the range is out of bounds or in flight, or the memory a device's.
    pub fn range(&self, range: Range<usize>) -> &[f32] {
        self.check(&range);
        // SAFETY: in bounds and not in flight, so that only this owner can reach it, and `&self` keeps it shared.
        unsafe { std::slice::from_raw_parts(self.storage.on_host(range.start), range.len()) }
    }

    /// Elements of `range`, to write.
    ///
    /// # Panics
    /// If the range is out of bounds or in flight, or the memory a device's.
    pub fn range_mut(&mut self, range: Range<usize>) -> &mut [f32] {
        self.check(&range);
        // SAFETY: in bounds and not in flight, so that only this owner can reach it, and `&mut self` keeps it unique.
        unsafe { std::slice::from_raw_parts_mut(self.storage.on_host(range.start), range.len()) }
    }

    /// Elements of `range`, on the device.
    ///
    /// # Panics
    /// If the range is out of bounds or in flight, or the memory the host's.
    #[cfg(feature = "nccl")]
    pub fn device_range(&self, range: Range<usize>) -> Slice<'_> {
        self.check(&range);
        let address = self.storage.on_device(range.start).expect("the buffer is in the host's memory");
        // SAFETY: in bounds and not in flight, so that only this owner can reach it, and `&self` keeps it shared.
        unsafe { Slice::from_raw(address, range.len(), DType::F32) }
    }

    /// Elements of `range`, to write, on the device.
    ///
    /// # Panics
    /// If the range is out of bounds or in flight, or the memory the host's.
    #[cfg(feature = "nccl")]
    pub fn device_range_mut(&mut self, range: Range<usize>) -> SliceMut<'_> {
        self.check(&range);
        let address = self.storage.on_device(range.start).expect("the buffer is in the host's memory");
        // SAFETY: in bounds and not in flight, so that only this owner can reach it, and `&mut self` keeps it unique.
        unsafe { SliceMut::from_raw(address, range.len(), DType::F32) }
    }

    /// Lends `range` to communication.
    pub(crate) fn lend(&mut self, range: Range<usize>) -> Region {
        self.check(&range);
        if self.storage.in_flight.fetch_add(range.len(), Ordering::AcqRel) == 0 {
            self.lent.clear();
        }
        match self.lent.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.lent.push(range.clone()),
        }
        Region { storage: Arc::clone(&self.storage), range }
    }

    fn check(&self, range: &Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.storage.len, "range {range:?} of {}", self.storage.len);
        if self.storage.in_flight.load(Ordering::Acquire) != 0 {
            let overlap = self.lent.iter().find(|lent| lent.start < range.end && range.start < lent.end);
            assert!(overlap.is_none(), "range {range:?} overlaps {overlap:?}, which is being reduced");
        }
    }
}

/// A range of a [`SharedBuffer`] that communication may touch until it gives it back.
#[derive(Debug)]
pub(crate) struct Region {
    storage: Arc<Storage>,
    range: Range<usize>,
}

impl Region {
    pub(crate) fn len(&self) -> usize {
        self.range.len()
    }

    /// Elements of the region.
    pub(crate) fn as_slice(&self) -> &[f32] {
        // SAFETY: the range is in flight, so the owner keeps off it, and this region is its only other handle.
        unsafe { std::slice::from_raw_parts(self.storage.on_host(self.range.start), self.range.len()) }
    }

    /// Elements of the region, to write.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: as in `as_slice`, and `&mut self` keeps it unique.
        unsafe { std::slice::from_raw_parts_mut(self.storage.on_host(self.range.start), self.range.len()) }
    }

    /// Address of element `index`, for engines that hand parts of the region to somebody else.
    #[cfg(feature = "mpi")]
    pub(crate) fn address(&mut self, index: usize) -> *mut f32 {
        assert!(index <= self.range.len());
        self.storage.on_host(self.range.start + index)
    }

    /// Address of the first element in the device's memory; `None` if the memory is the host's.
    #[cfg(feature = "nccl")]
    pub(crate) fn device_address(&self) -> Option<u64> {
        self.storage.on_device(self.range.start)
    }

    /// Appends the region that follows this one in the same buffer. Returns it if it does not follow, or if it is a
    /// device's: NCCL sums region by region, and what follows what in memory may differ between ranks.
    pub(crate) fn join(&mut self, mut next: Region) -> Result<(), Region> {
        if self.storage.elements.is_null() {
            return Err(next);
        }
        if !Arc::ptr_eq(&self.storage, &next.storage) || self.range.end != next.range.start {
            return Err(next);
        }
        self.range.end = next.range.end;
        next.range.start = next.range.end;
        Ok(())
    }

    /// Cuts the first `len` elements off.
    pub(crate) fn split_front(&mut self, len: usize) -> Region {
        assert!(len <= self.range.len());
        let front = self.range.start..self.range.start + len;
        self.range.start = front.end;
        Region { storage: Arc::clone(&self.storage), range: front }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.storage.in_flight.fetch_sub(self.range.len(), Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_writes_beside_what_is_in_flight() {
        let mut buffer = SharedBuffer::zeros(8);
        let mut region = buffer.lend(2..6);
        region.as_mut_slice().fill(1.0);
        buffer.range_mut(6..8).fill(2.0);
        let front = region.split_front(1);
        assert_eq!((front.len(), region.len()), (1, 3));
        drop((front, region));
        assert_eq!(buffer.range(0..8), [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0]);
    }

    #[test]
    #[should_panic(expected = "which is being reduced")]
    fn a_range_in_flight_cannot_be_touched() {
        let mut buffer = SharedBuffer::zeros(8);
        let _region = buffer.lend(2..6);
        buffer.range_mut(0..3);
    }

    #[test]
    fn foreign_memory_is_kept_until_it_is_back() {
        let owner = Arc::new(());
        let mut memory = vec![1.0f32; 4];
        // SAFETY: `memory` outlives the buffer and the region, and is not touched before they are gone.
        let mut buffer = unsafe { SharedBuffer::from_foreign(memory.as_mut_ptr(), 4, Box::new(Arc::clone(&owner))) };
        let mut region = buffer.lend(1..3);
        drop(buffer);
        region.as_mut_slice().fill(2.0);
        assert_eq!(Arc::strong_count(&owner), 2);
        drop(region);
        assert_eq!(Arc::strong_count(&owner), 1);
        assert_eq!(memory, [1.0, 2.0, 2.0, 1.0]);
    }

    #[test]
    fn neighbours_join_and_strangers_do_not() {
        let mut buffer = SharedBuffer::zeros(8);
        let mut first = buffer.lend(0..2);
        let second = buffer.lend(2..5);
        let third = buffer.lend(6..7);
        assert!(first.join(second).is_ok());
        assert_eq!(first.len(), 5);
        assert!(first.join(third).is_err());
    }
}
