//! The sum of several ranks' parts in one order, whatever the order in which they came. It is a kernel of its own, for
//! streams that no [`Gpu`](crate::Gpu) has.

use std::sync::Arc;

use crate::buffer::Slice;
use crate::compile::Module;
use crate::device::Device;
use crate::elementwise::{THREADS, number};
use crate::error::CudaError;
use crate::kernel::{Kernel, LoadedModule};
use crate::launch::{Arg, LaunchShape};
use crate::stream::Stream;

pub(crate) static PART_SUM: Module = Module::new("part_sum", include_str!("kernels/part_sum.cu"));

/// The kernel.
#[derive(Clone, Debug)]
pub struct PartSum(Kernel);

impl PartSum {
    /// For any stream of `device`.
    ///
    /// # Errors
    /// If the kernel does not compile, or the device has failed.
    pub fn new(device: &Device) -> Result<PartSum, CudaError> {
        let module = LoadedModule::new(device, &PART_SUM, &device.architecture())?;
        Kernel::new(&Arc::new(module), "part_sum").map(PartSum)
    }

    /// Enqueues `sum[i] = parts[0][i] + parts[1][i] + ...`, added from left to right.
    ///
    /// - `parts`: `[count, len]`, f32, with `count` at least 1
    /// - `sum`: device address of `[len]`, f32, beside `parts`
    ///
    /// # Errors
    /// If the device has failed.
    ///
    /// # Panics
    /// If `parts` is no such matrix.
    ///
    /// # Safety
    /// Nobody else may use the memory at `sum` until the kernel has run.
    pub unsafe fn enqueue(&self, stream: &Stream, parts: Slice<'_>, count: usize, sum: u64) -> Result<(), CudaError> {
        assert!(count > 0 && parts.len().is_multiple_of(count), "{} elements are not {count} parts", parts.len());
        let len = parts.len() / count;
        let args = [parts.into(), number(count), Arg::U64(len as u64), Arg::Pointer(sum)];
        self.0.launch(stream, LaunchShape::covering(len, THREADS), &args)
    }
}
