//! RMSNorm, over rows or over the heads inside them, and LayerNorm. Weights, biases and statistics are f32.
//!
//! Weight gradients are summed by blocks, a row of partial sums each, whose columns are then added in order: the same
//! bits on every GPU, as the number of blocks depends on shapes alone.

use lina_kernels::HeadLayout;

use crate::buffer::{DType, Slice, SliceMut};
use crate::compile::Module;
use crate::elementwise::{THREADS, flag, kernel_name, number, pack_len};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Arg, LaunchShape};
use crate::limits::{MAX_NORM_WIDTH, check_norm_width};

pub(crate) static NORM: Module =
    Module::new("norm", concat!(include_str!("kernels/pack.cuh"), include_str!("kernels/norm.cu")));

/// Packs of a unit that a thread of a forward pass holds.
const FORWARD_PACKS: usize = 8;
/// Most threads of a block that computes one unit.
const MAX_TEAM: usize = 512;
/// Threads of the blocks of a backward pass together: four such blocks on each multiprocessor of an H100.
const BACKWARD_THREADS: usize = 132 * 4 * 256;
/// Columns of a block of `column_sums`, and the rows that it reads at a time.
const TILE: usize = 32;
/// Rows that one block of `column_sums` adds up.
const SUM_ROWS: usize = 1024;

/// y = x · weight / rms(x) per row, rms(x) = √(mean(x²) + eps).
///
/// `x`, `y`: `[rows, width]`; `weight`: f32 `[width]`; `inv_rms`: f32 `[rows]`, 1 / rms(x), for the backward pass.
///
/// # Errors
/// If the device has failed.
pub fn rms_norm_forward(
    gpu: &Gpu,
    x: Slice<'_>,
    weight: Slice<'_>,
    eps: f32,
    y: SliceMut<'_>,
    inv_rms: SliceMut<'_>,
) -> Result<(), CudaError> {
    head_rms_norm_forward(gpu, whole_rows(weight.len()), x, weight, eps, y, inv_rms)
}

/// Backward of [`rms_norm_forward`]: `grad_x` (`[rows, width]`) and `grad_weight` (f32 `[width]`) are added to.
///
/// # Errors
/// If rows are wider than the kernels take, or the device has failed.
pub fn rms_norm_backward(
    gpu: &Gpu,
    x: Slice<'_>,
    weight: Slice<'_>,
    inv_rms: Slice<'_>,
    grad_y: Slice<'_>,
    grad_x: SliceMut<'_>,
    grad_weight: SliceMut<'_>,
) -> Result<(), CudaError> {
    assert!(grad_y.len() == x.len() && grad_y.dtype() == x.dtype(), "rms_norm_backward: shapes");
    rms_backward(gpu, whole_rows(weight.len()), x, weight, inv_rms, grad_y.ptr(), grad_x, true, grad_weight)
}

/// RMSNorm of every head of every row: the query and key norms of Qwen3 (`layout.head_dim` is the head size) and of
/// OLMoE (one "head" as wide as the projection).
///
/// `x`, `y`: `[rows, row_stride]`, of which only the heads are read and written; `weight`: f32 `[head_dim]`; `inv_rms`:
/// f32 `[rows, heads]`.
///
/// # Errors
/// If the device has failed.
pub fn head_rms_norm_forward(
    gpu: &Gpu,
    layout: HeadLayout,
    x: Slice<'_>,
    weight: Slice<'_>,
    eps: f32,
    y: SliceMut<'_>,
    inv_rms: SliceMut<'_>,
) -> Result<(), CudaError> {
    let units = rows(layout, x.len()) * layout.heads;
    assert!(
        weight.len() == layout.head_dim && (y.len(), y.dtype()) == (x.len(), x.dtype()) && inv_rms.len() == units,
        "rms_norm_forward: shapes"
    );
    assert!(weight.dtype() == DType::F32 && inv_rms.dtype() == DType::F32, "rms_norm_forward: types");
    let pack = unit_pack(layout, x.dtype(), &[x.ptr(), weight.ptr(), y.ptr()]);
    let (team, shape) = forward_teams(units, layout.head_dim / pack, 8);
    let kernel = format!("{}_{team}", kernel_name("rms_norm_forward", x.dtype(), pack));
    let [count, heads, width, offset, stride] = unit_args(layout, units);
    let args =
        [x.into(), weight.into(), eps.into(), (&y).into(), (&inv_rms).into(), count, heads, width, offset, stride];
    gpu.launch(&NORM, &kernel, shape, &args)
}

/// Backward of [`head_rms_norm_forward`], in place: the heads of `grad` (`[rows, row_stride]`) hold the gradient of y
/// and receive that of x (overwritten). `grad_weight` (f32 `[head_dim]`) is added to.
///
/// # Errors
/// If heads are wider than the kernels take, or the device has failed.
pub fn head_rms_norm_backward(
    gpu: &Gpu,
    layout: HeadLayout,
    x: Slice<'_>,
    weight: Slice<'_>,
    inv_rms: Slice<'_>,
    grad: SliceMut<'_>,
    grad_weight: SliceMut<'_>,
) -> Result<(), CudaError> {
    let grad_y = grad.ptr();
    rms_backward(gpu, layout, x, weight, inv_rms, grad_y, grad, false, grad_weight)
}

/// y = (x − mean(x)) / √(var(x) + eps) · weight + bias per row, with the biased variance.
///
/// `x`, `y`: `[rows, width]`; `weight`, `bias`: f32 `[width]`; `mean`, `inv_std`: f32 `[rows]`, for the backward pass.
///
/// # Errors
/// If the device has failed.
pub fn layer_norm_forward(
    gpu: &Gpu,
    x: Slice<'_>,
    weight: Slice<'_>,
    bias: Slice<'_>,
    eps: f32,
    y: SliceMut<'_>,
    mean: SliceMut<'_>,
    inv_std: SliceMut<'_>,
) -> Result<(), CudaError> {
    let layout = whole_rows(weight.len());
    let (width, rows) = (layout.head_dim, rows(layout, x.len()));
    let shapes = bias.len() == width && (y.len(), y.dtype()) == (x.len(), x.dtype());
    assert!(shapes && mean.len() == rows && inv_std.len() == rows, "layer_norm_forward: shapes");
    let types = [weight.dtype(), bias.dtype(), mean.dtype(), inv_std.dtype()];
    assert!(types.iter().all(|&dtype| dtype == DType::F32), "layer_norm_forward: types");
    let pack = unit_pack(layout, x.dtype(), &[x.ptr(), weight.ptr(), bias.ptr(), y.ptr()]);
    let (team, shape) = forward_teams(rows, width / pack, 32);
    let kernel = format!("{}_{team}", kernel_name("layer_norm_forward", x.dtype(), pack));
    let [count, _, width, ..] = unit_args(layout, rows);
    let statistics = [(&mean).into(), (&inv_std).into()];
    let [mean, inv_std] = statistics;
    let args = [x.into(), weight.into(), bias.into(), eps.into(), (&y).into(), mean, inv_std, count, width];
    gpu.launch(&NORM, &kernel, shape, &args)
}

/// Backward of [`layer_norm_forward`]: `grad_x` (`[rows, width]`), `grad_weight` and `grad_bias` (f32 `[width]`) are
/// added to.
///
/// # Errors
/// If rows are wider than the kernels take, or the device has failed.
pub fn layer_norm_backward(
    gpu: &Gpu,
    x: Slice<'_>,
    weight: Slice<'_>,
    mean: Slice<'_>,
    inv_std: Slice<'_>,
    grad_y: Slice<'_>,
    grad_x: SliceMut<'_>,
    grad_weight: SliceMut<'_>,
    grad_bias: SliceMut<'_>,
) -> Result<(), CudaError> {
    let layout = whole_rows(weight.len());
    let (width, rows) = (layout.head_dim, rows(layout, x.len()));
    let vectors = grad_weight.len() == width && grad_bias.len() == width && mean.len() == rows && inv_std.len() == rows;
    let like_x = |len, dtype| (len, dtype) == (x.len(), x.dtype());
    assert!(
        vectors && like_x(grad_y.len(), grad_y.dtype()) && like_x(grad_x.len(), grad_x.dtype()),
        "layer_norm_backward: shapes"
    );
    let types = [weight.dtype(), mean.dtype(), inv_std.dtype(), grad_weight.dtype(), grad_bias.dtype()];
    assert!(types.iter().all(|&dtype| dtype == DType::F32), "layer_norm_backward: types");
    if rows == 0 {
        return Ok(());
    }
    let pack = unit_pack(layout, x.dtype(), &[x.ptr(), weight.ptr(), grad_y.ptr(), grad_x.ptr()]);
    let teams = BackwardTeams::of_blocks(pack, width, rows)?;
    let mut partials = gpu.uninit(2 * teams.blocks * width, DType::F32)?;
    let (of_weight, of_bias) = (0..teams.blocks * width, teams.blocks * width..partials.len());
    let [count, _, columns, ..] = unit_args(layout, rows);
    let args = [
        x.into(),
        weight.into(),
        mean.into(),
        inv_std.into(),
        grad_y.into(),
        (&grad_x).into(),
        (&partials.slice_mut(of_weight.clone())).into(),
        (&partials.slice_mut(of_bias.clone())).into(),
        count,
        columns,
    ];
    gpu.launch(&NORM, &teams.kernel("layer_norm_backward", x.dtype(), pack), teams.shape(pack), &args)?;
    add_columns(gpu, partials.slice(of_weight), grad_weight)?;
    add_columns(gpu, partials.slice(of_bias), grad_bias)
}

/// `total[j] += sum over rows of values[i][j]`: the gradient of a bias, or the sum of all tokens' probabilities.
/// `values`: f32 or bf16 `[rows, width]`; `total`: f32 `[width]`.
///
/// # Errors
/// If the device has failed.
pub fn column_sums(gpu: &Gpu, values: Slice<'_>, total: SliceMut<'_>) -> Result<(), CudaError> {
    let width = total.len();
    let rows = rows(whole_rows(width), values.len());
    assert_eq!(total.dtype(), DType::F32, "column_sums: types");
    let blocks = rows.div_ceil(SUM_ROWS);
    if blocks <= 1 {
        return sum_tiles(gpu, values, width, SUM_ROWS, total, true);
    }
    let mut partials = gpu.uninit(blocks * width, DType::F32)?;
    sum_tiles(gpu, values, width, SUM_ROWS, partials.whole_mut(), false)?;
    add_columns(gpu, partials.whole(), total)
}

/// `total[j] += sum over rows of partials[i][j]`, by one block per tile of columns.
fn add_columns(gpu: &Gpu, partials: Slice<'_>, total: SliceMut<'_>) -> Result<(), CudaError> {
    let width = total.len();
    sum_tiles(gpu, partials, width, partials.len() / width, total, true)
}

/// Sums of each `block_rows` rows of `values` (`[rows, width]`), as rows of `out`.
fn sum_tiles(
    gpu: &Gpu,
    values: Slice<'_>,
    width: usize,
    block_rows: usize,
    out: SliceMut<'_>,
    accumulate: bool,
) -> Result<(), CudaError> {
    let rows = values.len() / width;
    let grid = [width.div_ceil(TILE) as u32, rows.div_ceil(block_rows) as u32, 1];
    let shape = LaunchShape { grid, block: (TILE * TILE) as u32, shared_bytes: 0 };
    let args = [values.into(), number(rows), number(width), number(block_rows), (&out).into(), flag(accumulate)];
    gpu.launch(&NORM, &format!("column_sums_{}", values.dtype().suffix()), shape, &args)
}

/// `grad_y` is an address, as it may be that of `grad_x`.
fn rms_backward(
    gpu: &Gpu,
    layout: HeadLayout,
    x: Slice<'_>,
    weight: Slice<'_>,
    inv_rms: Slice<'_>,
    grad_y: u64,
    grad_x: SliceMut<'_>,
    accumulate: bool,
    grad_weight: SliceMut<'_>,
) -> Result<(), CudaError> {
    let units = rows(layout, x.len()) * layout.heads;
    let width = layout.head_dim;
    let vectors = weight.len() == width && grad_weight.len() == width && inv_rms.len() == units;
    assert!(vectors && (grad_x.len(), grad_x.dtype()) == (x.len(), x.dtype()), "rms_norm_backward: shapes");
    let types = [weight.dtype(), inv_rms.dtype(), grad_weight.dtype()];
    assert!(types.iter().all(|&dtype| dtype == DType::F32), "rms_norm_backward: types");
    if units == 0 {
        return Ok(());
    }
    let pack = unit_pack(layout, x.dtype(), &[x.ptr(), weight.ptr(), grad_y, grad_x.ptr()]);
    let teams = BackwardTeams::of_warps_or_blocks(pack, width, units)?;
    let mut partials = gpu.uninit(teams.blocks * width, DType::F32)?;
    let [count, heads, columns, offset, stride] = unit_args(layout, units);
    let args = [
        x.into(),
        weight.into(),
        inv_rms.into(),
        Arg::Pointer(grad_y),
        (&grad_x).into(),
        flag(accumulate),
        (&partials.whole_mut()).into(),
        count,
        heads,
        columns,
        offset,
        stride,
    ];
    gpu.launch(&NORM, &teams.kernel("rms_norm_backward", x.dtype(), pack), teams.shape(pack), &args)?;
    add_columns(gpu, partials.whole(), grad_weight)
}

fn whole_rows(width: usize) -> HeadLayout {
    HeadLayout { offset: 0, heads: 1, head_dim: width, row_stride: width }
}

/// Rows in a buffer of `len` elements.
///
/// # Panics
/// If the heads do not fit into a row, or these are no rows.
pub(crate) fn rows(layout: HeadLayout, len: usize) -> usize {
    let HeadLayout { offset, heads, head_dim, row_stride } = layout;
    assert!(offset + heads * head_dim <= row_stride && row_stride > 0, "{layout:?}: the heads do not fit in a row");
    assert!(len.is_multiple_of(row_stride), "{len} elements are not rows of {row_stride}");
    len / row_stride
}

/// Elements that a thread moves at once, where units, and what belongs to their columns, start at these addresses.
fn unit_pack(layout: HeadLayout, dtype: DType, addresses: &[u64]) -> usize {
    let pack = pack_len(dtype, layout.head_dim, addresses);
    if layout.offset.is_multiple_of(pack) && layout.row_stride.is_multiple_of(pack) { pack } else { 1 }
}

/// The kernels' arguments that say where units lie.
fn unit_args(layout: HeadLayout, units: usize) -> [Arg<'static>; 5] {
    [units, layout.heads, layout.head_dim, layout.offset, layout.row_stride].map(number)
}

/// The lanes of a warp that have at least one of `packs` packs each, `least` or more.
fn lanes(packs: usize, least: usize) -> usize {
    packs.next_power_of_two().clamp(least, 32)
}

/// Threads that compute a unit of `packs` packs in a forward pass (0: a block), and the launch. Lanes of a warp need no
/// barrier, so they are preferred while each can hold its packs.
fn forward_teams(units: usize, packs: usize, least: usize) -> (usize, LaunchShape) {
    if packs <= 32 * FORWARD_PACKS {
        let team = lanes(packs, least);
        return (team, LaunchShape::covering(units * team, THREADS));
    }
    let threads = packs.div_ceil(FORWARD_PACKS).next_multiple_of(32).min(MAX_TEAM);
    (0, LaunchShape::linear(u32::try_from(units).expect("a grid has less than 2^31 blocks"), threads as u32))
}

/// How a backward pass is cut.
struct BackwardTeams {
    /// Lanes of a warp that compute a unit, or 0 for a block.
    team: usize,
    /// Packs of a thread.
    packs: usize,
    threads: usize,
    blocks: usize,
}

impl BackwardTeams {
    /// For `units` units of `width` elements in packs of `pack`; small ones by parts of a warp.
    fn of_warps_or_blocks(pack: usize, width: usize, units: usize) -> Result<Self, CudaError> {
        if width / pack > 32 {
            return Self::of_blocks(pack, width, units);
        }
        let team = lanes(width / pack, 8);
        let threads = THREADS as usize;
        Ok(Self::new(team, 1, threads, units, threads / team * Self::rows(pack)))
    }

    /// All of them by blocks.
    fn of_blocks(pack: usize, width: usize, units: usize) -> Result<Self, CudaError> {
        let packs = width / pack;
        if packs <= MAX_TEAM {
            return Ok(Self::new(0, 1, packs.next_multiple_of(32), units, Self::rows(pack)));
        }
        check_norm_width(width)?;
        let held = MAX_NORM_WIDTH / (MAX_TEAM * pack);
        Ok(Self::new(0, held, packs.div_ceil(held).next_multiple_of(32), units, 1))
    }

    /// Units that a thread which has one pack of each computes at once.
    fn rows(pack: usize) -> usize {
        if pack == 8 { 2 } else { 4 }
    }

    fn new(team: usize, packs: usize, threads: usize, units: usize, units_at_once: usize) -> Self {
        let blocks = units.div_ceil(units_at_once).min(BACKWARD_THREADS / threads);
        BackwardTeams { team, packs, threads, blocks }
    }

    fn kernel(&self, operation: &str, dtype: DType, pack: usize) -> String {
        format!("{}_{}_{}", kernel_name(operation, dtype, pack), self.team, self.packs)
    }

    fn shape(&self, pack: usize) -> LaunchShape {
        let sums = if self.team > 0 { self.threads * pack } else { 0 };
        LaunchShape::linear(self.blocks as u32, self.threads as u32).with_shared(sums * size_of::<f32>())
    }
}
