//! The operands of a kernel launch.

use crate::buffer::{Slice, SliceMut};

/// Blocks and threads of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchShape {
    /// Blocks in each dimension.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

impl LaunchShape {
    /// `blocks` blocks of `block` threads.
    pub fn linear(blocks: u32, block: u32) -> Self {
        LaunchShape { grid: [blocks, 1, 1], block, shared_bytes: 0 }
    }

    /// Enough blocks of `block` threads for `items` items.
    ///
    /// # Panics
    /// If there would be more blocks than CUDA allows.
    pub fn covering(items: usize, block: u32) -> Self {
        let blocks = items.div_ceil(block as usize);
        LaunchShape::linear(u32::try_from(blocks).expect("a grid has less than 2^31 blocks"), block)
    }

    /// The same with dynamic shared memory.
    pub fn with_shared(self, shared_bytes: usize) -> Self {
        LaunchShape { shared_bytes: u32::try_from(shared_bytes).expect("shared memory is small"), ..self }
    }
}

/// An argument of a kernel, which must have the type that the kernel declares.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    /// A device address.
    Pointer(u64),
    /// `unsigned int`.
    U32(u32),
    /// `int`.
    I32(i32),
    /// `unsigned long long`.
    U64(u64),
    /// `float`.
    F32(f32),
    /// `double`.
    F64(f64),
    /// A struct by value, aligned as these bytes are.
    Bytes(&'a [u8]),
}

impl Arg<'_> {
    /// Where the argument's bytes are; `word` is a place for those of a number.
    pub(crate) fn address(&self, word: &mut u64) -> *mut std::ffi::c_void {
        *word = match *self {
            Arg::Pointer(value) | Arg::U64(value) => value,
            Arg::U32(value) => u64::from(value),
            Arg::I32(value) => u64::from(value as u32),
            Arg::F32(value) => u64::from(value.to_bits()),
            Arg::F64(value) => value.to_bits(),
            Arg::Bytes(bytes) => return bytes.as_ptr().cast_mut().cast(),
        };
        std::ptr::from_mut(word).cast()
    }
}

impl From<Slice<'_>> for Arg<'_> {
    fn from(slice: Slice<'_>) -> Self {
        Arg::Pointer(slice.ptr())
    }
}

impl From<&Slice<'_>> for Arg<'_> {
    fn from(slice: &Slice<'_>) -> Self {
        Arg::Pointer(slice.ptr())
    }
}

impl From<&SliceMut<'_>> for Arg<'_> {
    fn from(slice: &SliceMut<'_>) -> Self {
        Arg::Pointer(slice.ptr())
    }
}

impl From<&mut SliceMut<'_>> for Arg<'_> {
    fn from(slice: &mut SliceMut<'_>) -> Self {
        Arg::Pointer(slice.ptr())
    }
}

impl From<u32> for Arg<'_> {
    fn from(value: u32) -> Self {
        Arg::U32(value)
    }
}

impl From<u64> for Arg<'_> {
    fn from(value: u64) -> Self {
        Arg::U64(value)
    }
}

impl From<f32> for Arg<'_> {
    fn from(value: f32) -> Self {
        Arg::F32(value)
    }
}
