//! Rotary position embedding in Hugging Face's convention: element i of a head is rotated together with element i +
//! head_dim / 2.

use lina_kernels::HeadLayout;

use crate::buffer::{Buffer, DType, Slice, SliceMut};
use crate::compile::Module;
use crate::elementwise::{THREADS, kernel_name, number, pack_len};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::LaunchShape;
use crate::norm::rows;

pub(crate) static ROTARY: Module =
    Module::new("rotary", concat!(include_str!("kernels/pack.cuh"), include_str!("kernels/rotary.cu")));

/// Heads of a row that a thread rotates.
const HEADS: usize = 4;

/// Cosines and sines for every position, on a device.
#[derive(Debug)]
pub struct RotaryTable {
    half: usize,
    /// f32 `[positions, 2, half]`: cosines, then sines.
    table: Buffer,
}

impl RotaryTable {
    /// For heads of `head_dim` (even) elements and positions below `max_positions`; frequency i is theta^(−2i /
    /// head_dim). The numbers are those of the processor's table.
    ///
    /// # Errors
    /// If the device's memory does not suffice.
    ///
    /// # Panics
    /// If `head_dim` is odd.
    pub fn new(gpu: &Gpu, head_dim: usize, max_positions: usize, theta: f32) -> Result<Self, CudaError> {
        assert!(head_dim.is_multiple_of(2), "heads of {head_dim} elements have no two halves to rotate");
        let half = head_dim / 2;
        let frequencies: Vec<f32> = (0..half).map(|i| 1.0 / theta.powf(2.0 * i as f32 / head_dim as f32)).collect();
        let mut table = Vec::with_capacity(max_positions * head_dim);
        for position in 0..max_positions {
            // Angles are rounded to f32, as transformers does.
            let angle = |frequency: &f32| f64::from(position as f32 * frequency);
            table.extend(frequencies.iter().map(|frequency| angle(frequency).cos() as f32));
            table.extend(frequencies.iter().map(|frequency| angle(frequency).sin() as f32));
        }
        Ok(Self { half, table: gpu.buffer_from(&table, DType::F32)? })
    }

    /// Positions that the table has.
    pub fn max_positions(&self) -> usize {
        self.table.len().checked_div(2 * self.half).unwrap_or(usize::MAX)
    }
}

/// Rotates the heads of `layout` in every row of `x` (`[tokens, row_stride]`, in place) by the row's position
/// (`positions`: u32 `[tokens]`, each of which must be in the table). Queries and keys that lie side by side can be
/// rotated as one layout.
///
/// # Errors
/// If the device has failed.
pub fn rotary_forward(
    gpu: &Gpu,
    table: &RotaryTable,
    positions: Slice<'_>,
    layout: HeadLayout,
    x: SliceMut<'_>,
) -> Result<(), CudaError> {
    rotate(gpu, table, positions, layout, x, 1.0)
}

/// Backward of [`rotary_forward`], in place: the gradient of the rotated heads becomes that of the heads.
///
/// # Errors
/// If the device has failed.
pub fn rotary_backward(
    gpu: &Gpu,
    table: &RotaryTable,
    positions: Slice<'_>,
    layout: HeadLayout,
    grad: SliceMut<'_>,
) -> Result<(), CudaError> {
    rotate(gpu, table, positions, layout, grad, -1.0)
}

fn rotate(
    gpu: &Gpu,
    table: &RotaryTable,
    positions: Slice<'_>,
    layout: HeadLayout,
    x: SliceMut<'_>,
    direction: f32,
) -> Result<(), CudaError> {
    let rows = rows(layout, x.len());
    let half = table.half;
    assert!(layout.head_dim == 2 * half && positions.len() == rows, "rotary: shapes");
    assert_eq!(positions.dtype(), DType::U32, "rotary: types");
    let pack = pack_len(x.dtype(), half, &[x.ptr(), table.table.whole().ptr()]);
    let aligned = layout.offset.is_multiple_of(pack) && layout.row_stride.is_multiple_of(pack);
    let pack = if aligned { pack } else { 1 };
    let mut shape = LaunchShape::covering(rows * (half / pack), THREADS);
    shape.grid[1] = layout.heads.div_ceil(HEADS) as u32;
    let [count, heads, half, offset, stride] = [rows, layout.heads, half, layout.offset, layout.row_stride].map(number);
    let args = [
        (&x).into(),
        table.table.whole().into(),
        positions.into(),
        direction.into(),
        count,
        heads,
        half,
        offset,
        stride,
    ];
    gpu.launch(&ROTARY, &kernel_name("rotary", x.dtype(), pack), shape, &args)
}
