//! Device memory: who owns it, and views of it that borrow like slices.

use std::marker::PhantomData;
use std::ops::Range;

use cudarc::driver::sys::{self, CUresult};
use half::bf16;

use crate::error::{CudaError, check};
use crate::stream::Stream;

/// How elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit floating point.
    F32,
    /// The upper half of an `F32`.
    Bf16,
    /// 32-bit numbers: tokens, experts, rows.
    U32,
}

impl DType {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::Bf16 => 2,
        }
    }

    /// What kernels' names for this type end in.
    pub fn suffix(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::U32 => "u32",
        }
    }
}

/// A host type that device memory is filled from and read into.
pub trait Element: Copy + Default {
    /// Fills `bytes` with `values` as they are stored.
    ///
    /// # Panics
    /// If the type cannot be stored as `dtype`, or there are more or fewer bytes than the values take.
    fn encode(values: &[Self], dtype: DType, bytes: &mut [u8]);
    /// Fills `values` from what is stored.
    ///
    /// # Panics
    /// If the type is not stored as `dtype`, or there are more or fewer bytes than the values take.
    fn decode(bytes: &[u8], dtype: DType, values: &mut [Self]);
}

impl Element for f32 {
    fn encode(values: &[f32], dtype: DType, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), values.len() * dtype.bytes(), "bytes for all values");
        match dtype {
            DType::F32 => {
                let (words, _) = bytes.as_chunks_mut::<4>();
                words.iter_mut().zip(values).for_each(|(word, value)| *word = value.to_le_bytes());
            }
            DType::Bf16 => {
                let (words, _) = bytes.as_chunks_mut::<2>();
                words.iter_mut().zip(values).for_each(|(word, &value)| *word = bf16::from_f32(value).to_le_bytes());
            }
            DType::U32 => panic!("numbers are not stored as floats"),
        }
    }

    fn decode(bytes: &[u8], dtype: DType, values: &mut [f32]) {
        assert_eq!(bytes.len(), values.len() * dtype.bytes(), "bytes of all values");
        match dtype {
            DType::F32 => {
                let (words, _) = bytes.as_chunks::<4>();
                values.iter_mut().zip(words).for_each(|(value, word)| *value = f32::from_le_bytes(*word));
            }
            DType::Bf16 => {
                let (words, _) = bytes.as_chunks::<2>();
                values.iter_mut().zip(words).for_each(|(value, word)| *value = bf16::from_le_bytes(*word).to_f32());
            }
            DType::U32 => panic!("numbers are not stored as floats"),
        }
    }
}

impl Element for u32 {
    fn encode(values: &[u32], dtype: DType, bytes: &mut [u8]) {
        assert_eq!((dtype, bytes.len()), (DType::U32, values.len() * 4), "numbers are stored as such");
        let (words, _) = bytes.as_chunks_mut::<4>();
        words.iter_mut().zip(values).for_each(|(word, value)| *word = value.to_le_bytes());
    }

    fn decode(bytes: &[u8], dtype: DType, values: &mut [u32]) {
        assert_eq!((dtype, bytes.len()), (DType::U32, values.len() * 4), "numbers are stored as such");
        let (words, _) = bytes.as_chunks::<4>();
        values.iter_mut().zip(words).for_each(|(value, word)| *value = u32::from_le_bytes(*word));
    }
}

/// Device memory of a fixed number of elements. Dropped, it goes back to the device's pool once the stream that it was made
/// on has come as far.
#[derive(Debug)]
pub struct Buffer {
    ptr: u64,
    len: usize,
    dtype: DType,
    stream: Stream,
}

impl Buffer {
    /// Memory with whatever is in it, from what `stream` does next on.
    ///
    /// # Errors
    /// If the device's memory does not suffice.
    pub fn new(stream: &Stream, len: usize, dtype: DType) -> Result<Buffer, CudaError> {
        let device = stream.device();
        device.bind()?;
        let bytes = len * dtype.bytes();
        let mut ptr = 0;
        if bytes > 0 {
            let allocate = |ptr: &mut u64| {
                // SAFETY: the out-parameter is valid, pool and stream live.
                unsafe { sys::cuMemAllocFromPoolAsync(ptr, bytes, device.pool(), stream.raw()) }
            };
            match allocate(&mut ptr) {
                CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    let (free, total) = device.memory()?;
                    return Err(CudaError::OutOfMemory { ordinal: device.facts().ordinal, needed: bytes, free, total });
                }
                code => check("cuMemAllocFromPoolAsync", code)?,
            }
        }
        Ok(Buffer { ptr, len, dtype, stream: stream.clone() })
    }

    /// Makes it at least `len` long, after which anything may be in it; it grows by a quarter at least, so that a slowly
    /// rising demand rarely allocates.
    ///
    /// # Errors
    /// If the device's memory does not suffice.
    pub fn grow(&mut self, len: usize) -> Result<(), CudaError> {
        if self.len < len {
            let (target, stream) = (len.max(self.len + self.len / 4), self.stream.clone());
            // The old memory first: both may not fit.
            *self = Buffer::new(&stream, 0, self.dtype)?;
            *self = Buffer::new(&stream, target, self.dtype)?;
        }
        Ok(())
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How elements are stored.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// All elements.
    pub fn whole(&self) -> Slice<'_> {
        Slice { ptr: self.ptr, len: self.len, dtype: self.dtype, owner: PhantomData }
    }

    /// All elements, to write.
    pub fn whole_mut(&mut self) -> SliceMut<'_> {
        SliceMut(Slice { ptr: self.ptr, len: self.len, dtype: self.dtype, owner: PhantomData }, PhantomData)
    }

    /// Elements of `range`.
    ///
    /// # Panics
    /// If it is out of bounds.
    pub fn slice(&self, range: Range<usize>) -> Slice<'_> {
        self.whole().slice(range)
    }

    /// Elements of `range`, to write.
    ///
    /// # Panics
    /// If it is out of bounds.
    pub fn slice_mut(&mut self, range: Range<usize>) -> SliceMut<'_> {
        SliceMut(self.whole().slice(range).detached(), PhantomData)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.ptr != 0 && self.stream.device().bind().is_ok() {
            // SAFETY: allocated in `new` and freed once, behind all work that the stream was given.
            let _ = unsafe { sys::cuMemFreeAsync(self.ptr, self.stream.raw()) };
        }
    }
}

/// A view of device memory.
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a> {
    ptr: u64,
    len: usize,
    dtype: DType,
    owner: PhantomData<&'a ()>,
}

impl<'a> Slice<'a> {
    /// The `len` elements at the device address `ptr`, which somebody else owns.
    ///
    /// # Safety
    /// The memory must be on the device whose streams use the view, for as long as they do.
    pub unsafe fn from_raw(ptr: u64, len: usize, dtype: DType) -> Slice<'a> {
        Slice { ptr, len, dtype, owner: PhantomData }
    }

    /// Device address of the first element.
    pub fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How elements are stored.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Elements of `range`.
    ///
    /// # Panics
    /// If it is out of bounds.
    pub fn slice(&self, range: Range<usize>) -> Slice<'a> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} elements", self.len);
        Slice { ptr: self.ptr + (range.start * self.dtype.bytes()) as u64, len: range.len(), ..*self }
    }

    fn detached<'b>(self) -> Slice<'b> {
        Slice { ptr: self.ptr, len: self.len, dtype: self.dtype, owner: PhantomData }
    }
}

/// A view of device memory that may be written.
#[derive(Debug)]
pub struct SliceMut<'a>(Slice<'a>, PhantomData<&'a mut ()>);

impl<'a> SliceMut<'a> {
    /// The `len` elements at the device address `ptr`, which somebody else owns.
    ///
    /// # Safety
    /// The memory must be on the device whose streams use the view, for as long as they do, and nobody else may use it
    /// meanwhile.
    pub unsafe fn from_raw(ptr: u64, len: usize, dtype: DType) -> SliceMut<'a> {
        // SAFETY: the caller's promise.
        SliceMut(unsafe { Slice::from_raw(ptr, len, dtype) }, PhantomData)
    }

    /// Device address of the first element.
    pub fn ptr(&self) -> u64 {
        self.0.ptr
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// How elements are stored.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// Elements of `range`, to write.
    ///
    /// # Panics
    /// If it is out of bounds.
    pub fn slice_mut(&mut self, range: Range<usize>) -> SliceMut<'_> {
        SliceMut(self.0.slice(range), PhantomData)
    }

    /// The first `middle` elements and the others.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn split_at_mut(&mut self, middle: usize) -> (SliceMut<'_>, SliceMut<'_>) {
        let (first, rest) = (self.0.slice(0..middle), self.0.slice(middle..self.0.len));
        (SliceMut(first, PhantomData), SliceMut(rest, PhantomData))
    }

    /// The same, for a shorter time.
    pub fn reborrow(&mut self) -> SliceMut<'_> {
        SliceMut(self.0, PhantomData)
    }

    /// The same, to read.
    pub fn as_slice(&self) -> Slice<'_> {
        self.0
    }
}
