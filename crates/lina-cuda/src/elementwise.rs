//! Operations on whole buffers, one pass each; and how all kernels of this kind cut their data for 16-byte accesses.

use crate::buffer::{DType, Slice, SliceMut};
use crate::compile::Module;
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Arg, LaunchShape};

pub(crate) static ELEMENTWISE: Module =
    Module::new("elementwise", concat!(include_str!("kernels/pack.cuh"), include_str!("kernels/elementwise.cu")));

/// Threads of a block of most kernels.
pub(crate) const THREADS: u32 = 256;

/// What a 16-byte access needs of an address.
const ALIGNMENT: u64 = 16;

/// Elements that a thread moves at once, where rows of `width` elements of type `dtype` start at these addresses and
/// those of other operands too: what 16 bytes hold, or 1 where something is not aligned for that.
pub(crate) fn pack_len(dtype: DType, width: usize, addresses: &[u64]) -> usize {
    let len = ALIGNMENT as usize / dtype.bytes();
    let aligned = addresses.iter().all(|address| address.is_multiple_of(ALIGNMENT)) && width.is_multiple_of(len);
    if aligned { len } else { 1 }
}

/// The kernel of an operation for a storage type and packs of `pack` elements.
pub(crate) fn kernel_name(operation: &str, dtype: DType, pack: usize) -> String {
    format!("{operation}_{}_{pack}", dtype.suffix())
}

/// A number of elements, as kernels count them.
///
/// # Panics
/// If it does not fit into 32 bits.
pub(crate) fn number(value: usize) -> Arg<'static> {
    Arg::U32(u32::try_from(value).expect("a kernel's operands have less than 2^32 elements"))
}

/// A flag, as kernels take it.
pub(crate) fn flag(value: bool) -> Arg<'static> {
    Arg::U32(u32::from(value))
}

/// How a flat array is cut into aligned packs.
pub(crate) struct FlatPacks {
    pub(crate) pack: usize,
    /// Elements missing before the first one in its pack.
    pub(crate) shift: usize,
    len: usize,
}

impl FlatPacks {
    /// Packs of `pack` elements in arrays of `len` elements with these addresses and bytes per element; single elements
    /// where no cut suits all of them.
    pub(crate) fn new(pack: usize, len: usize, arrays: &[(u64, usize)]) -> Self {
        let aligned = |shift: &usize| {
            arrays
                .iter()
                .all(|&(address, bytes)| address.wrapping_sub((shift * bytes) as u64).is_multiple_of(ALIGNMENT))
        };
        match (0..pack).find(aligned) {
            Some(shift) => FlatPacks { pack, shift, len },
            None => FlatPacks { pack: 1, shift: 0, len },
        }
    }

    /// A thread for each pack.
    pub(crate) fn shape(&self) -> LaunchShape {
        let packs = if self.len == 0 { 0 } else { (self.shift + self.len).div_ceil(self.pack) };
        LaunchShape::covering(packs, THREADS)
    }

    /// The kernels' arguments `len` and `shift`.
    pub(crate) fn args(&self) -> [Arg<'static>; 2] {
        [Arg::U64(self.len as u64), number(self.shift)]
    }
}

/// Runs an operation on arrays of one storage type.
fn launch_flat(
    gpu: &Gpu,
    operation: &str,
    dtype: DType,
    len: usize,
    addresses: &[u64],
    args: impl FnOnce([Arg<'static>; 2]) -> Vec<Arg<'static>>,
) -> Result<(), CudaError> {
    let arrays: Vec<(u64, usize)> = addresses.iter().map(|&address| (address, dtype.bytes())).collect();
    let packs = FlatPacks::new(ALIGNMENT as usize / dtype.bytes(), len, &arrays);
    gpu.launch(&ELEMENTWISE, &kernel_name(operation, dtype, packs.pack), packs.shape(), &args(packs.args()))
}

/// dst += src. `dst`: f32; `src`: f32 or bf16.
///
/// # Errors
/// If the device has failed.
pub fn accumulate_f32(gpu: &Gpu, dst: SliceMut<'_>, src: Slice<'_>) -> Result<(), CudaError> {
    assert!(dst.len() == src.len() && dst.dtype() == DType::F32, "accumulate_f32: shapes");
    let arrays = [(dst.ptr(), dst.dtype().bytes()), (src.ptr(), src.dtype().bytes())];
    let packs = FlatPacks::new(ALIGNMENT as usize / src.dtype().bytes(), dst.len(), &arrays);
    let [len, shift] = packs.args();
    let kernel = kernel_name("accumulate", src.dtype(), packs.pack);
    gpu.launch(&ELEMENTWISE, &kernel, packs.shape(), &[(&dst).into(), src.into(), len, shift])
}

/// Limits every element to −limit..=limit (`clip_qkv`).
///
/// # Errors
/// If the device has failed.
pub fn clamp(gpu: &Gpu, x: SliceMut<'_>, limit: f32) -> Result<(), CudaError> {
    launch_flat(gpu, "clamp", x.dtype(), x.len(), &[x.ptr()], |[len, shift]| {
        vec![Arg::Pointer(x.ptr()), limit.into(), len, shift]
    })
}

/// Backward of [`clamp`], in place: `grad` becomes 0 where the clamp changed the element. `x` is the input of
/// [`clamp`].
///
/// # Errors
/// If the device has failed.
pub fn clamp_backward(gpu: &Gpu, x: Slice<'_>, limit: f32, grad: SliceMut<'_>) -> Result<(), CudaError> {
    assert_eq!((grad.len(), grad.dtype()), (x.len(), x.dtype()), "clamp_backward: shapes");
    launch_flat(gpu, "clamp_backward", x.dtype(), x.len(), &[x.ptr(), grad.ptr()], |[len, shift]| {
        vec![Arg::Pointer(x.ptr()), limit.into(), Arg::Pointer(grad.ptr()), len, shift]
    })
}

/// `to` = `from`, from f32 to bf16 (rounded to nearest, ties to even) or back.
///
/// # Errors
/// If the device has failed.
pub fn cast(gpu: &Gpu, from: Slice<'_>, to: SliceMut<'_>) -> Result<(), CudaError> {
    let types = matches!((from.dtype(), to.dtype()), (DType::F32, DType::Bf16) | (DType::Bf16, DType::F32));
    assert!(types && from.len() == to.len(), "cast: shapes");
    let arrays = [(from.ptr(), from.dtype().bytes()), (to.ptr(), to.dtype().bytes())];
    let packs = FlatPacks::new(ALIGNMENT as usize / DType::Bf16.bytes(), from.len(), &arrays);
    let [len, shift] = packs.args();
    let kernel = kernel_name("cast", from.dtype(), packs.pack);
    gpu.launch(&ELEMENTWISE, &kernel, packs.shape(), &[from.into(), (&to).into(), len, shift])
}
