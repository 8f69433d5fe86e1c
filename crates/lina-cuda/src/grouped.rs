//! Products of many experts, whose rows lie in one buffer: forward, gradients of inputs, gradients of weights.
//!
//! In bf16 on Hopper one kernel computes all experts (`grouped/hopper.rs`). Otherwise cuBLASLt computes one expert after
//! another, by the algorithm for their number of rows in bf16 and by one for any number in f32, which is there for the sake of
//! exactness. So in f32, and in bf16 on Hopper, an element's bits depend on its row of A, its column of B and the depth alone,
//! not on what else is computed.

mod hopper;

pub use hopper::GROUPED_HOPPER;

use crate::buffer::{DType, Slice, SliceMut};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::matmul::{Addend, Mat, MatMut, Rows, matmul, matmul_of_rows};

/// Rows of one expert: `C[c_row..c_row + rows] = A[a_row..a_row + rows] · op(B[slot])`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupedRows {
    /// Which of B's matrices.
    pub slot: u32,
    /// First row of A.
    pub a_row: u32,
    /// First row of C.
    pub c_row: u32,
    /// How many; none is ordinary.
    pub rows: u32,
}

/// Rows whose outer products are summed: `C[slot] = A[row..row + rows]ᵀ · B[row..row + rows]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupedReduction {
    /// Which of C's matrices.
    pub slot: u32,
    /// First row of A and B.
    pub row: u32,
    /// How many; none is ordinary.
    pub rows: u32,
}

/// How experts' matrices are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BLayout {
    /// `[n, k]`, as weights are for the forward pass: C = A · Bᵀ.
    Nk,
    /// `[k, n]`, as the same weights are for gradients of inputs: C = A · B.
    Kn,
}

/// Experts' matrices.
#[derive(Clone, Copy, Debug)]
pub struct GroupedB<'a> {
    /// Where they are.
    pub data: Slice<'a>,
    /// Elements of `data` before the first matrix.
    pub offset: usize,
    /// Elements from the start of one matrix to the start of the next.
    pub stride: usize,
    /// Columns of C.
    pub n: usize,
    /// Depth: columns of A.
    pub k: usize,
    /// Order of a matrix's elements.
    pub layout: BLayout,
}

impl<'a> GroupedB<'a> {
    fn matrix(&self, slot: u32) -> Mat<'a> {
        let start = self.offset + slot as usize * self.stride;
        let data = self.data.slice(start..start + self.n * self.k);
        match self.layout {
            BLayout::Nk => Mat::new(data, self.n, self.k).t(),
            BLayout::Kn => Mat::new(data, self.k, self.n),
        }
    }
}

/// What computes grouped products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupedKernel {
    /// cuBLASLt, one expert after another.
    Blas,
    /// The kernel for Hopper.
    Hopper(TileWidth),
}

/// Columns of the tiles that the kernel for Hopper cuts products into; their rows are 128.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TileWidth {
    /// 128, where larger tiles are too few for the GPU.
    Narrow,
    /// 256.
    Wide,
}

impl TileWidth {
    /// As a number.
    pub fn columns(self) -> u32 {
        match self {
            TileWidth::Narrow => 128,
            TileWidth::Wide => 256,
        }
    }
}

/// Products of groups of rows with their experts' matrices; several groups may name one slot, and rows of C that no
/// group names stay as they are.
///
/// - `a`: `[rows, k]`
/// - `c`: `[rows, n]`, of the same type as `a` and `b`
///
/// # Errors
/// As [`matmul`].
///
/// # Panics
/// If shapes or types do not agree.
pub fn grouped_matmul(
    gpu: &Gpu,
    groups: &[GroupedRows],
    a: Slice<'_>,
    b: GroupedB<'_>,
    c: SliceMut<'_>,
) -> Result<(), CudaError> {
    let kernel = hopper::choose_for_rows(gpu, groups, a, &b, c.as_slice());
    grouped_matmul_with(gpu, kernel, groups, a, b, c)
}

/// [`grouped_matmul`] by a kernel of one's choice.
///
/// # Errors
/// As [`matmul`].
///
/// # Panics
/// As [`grouped_matmul`], and if the kernel does not take the operands.
pub fn grouped_matmul_with(
    gpu: &Gpu,
    kernel: GroupedKernel,
    groups: &[GroupedRows],
    a: Slice<'_>,
    b: GroupedB<'_>,
    mut c: SliceMut<'_>,
) -> Result<(), CudaError> {
    let (n, k) = (b.n, b.k);
    assert!(a.dtype() == b.data.dtype() && a.dtype() == c.dtype(), "A, B and C are of one type");
    for group in groups.iter().filter(|group| group.rows > 0) {
        assert!(end(group.a_row, group.rows) * k <= a.len(), "{group:?} is beyond A");
        assert!(end(group.c_row, group.rows) * n <= c.len(), "{group:?} is beyond C");
        let matrix = b.offset + group.slot as usize * b.stride;
        assert!(matrix + n * k <= b.data.len(), "{group:?} is beyond B");
    }
    if let (GroupedKernel::Hopper(width), true) = (kernel, n > 0 && k > 0) {
        return hopper::multiply(gpu, width, groups, a, &b, c);
    }
    let alike = if a.dtype() == DType::F32 { Rows::Alike } else { Rows::Fastest };
    for group in groups {
        let rows = group.rows as usize;
        let (from, to) = (group.a_row as usize, group.c_row as usize);
        let a = Mat::new(a.slice(from * k..(from + rows) * k), rows, k);
        let c = MatMut::new(c.slice_mut(to * n..(to + rows) * n), rows, n);
        if rows > 0 {
            matmul_of_rows(gpu, c, a, b.matrix(group.slot), Addend::None, alike)?;
        }
    }
    Ok(())
}

/// Gradients of experts' matrices: for each group the sum of its rows' outer products, or that added to what is there
/// with `accumulate`. A group without rows has zeros for a gradient. Groups name different slots; the others stay as
/// they are.
///
/// - `a`: `[rows, m]` and `b`: `[rows, n]`, of one type
/// - `c`: f32, a matrix `[m, n]` for each slot, the first after `offset` elements and each `stride` elements after the
///   one before
///
/// # Errors
/// As [`matmul`].
///
/// # Panics
/// If shapes or types do not agree, or two groups name one slot.
pub fn grouped_weight_gradient(
    gpu: &Gpu,
    groups: &[GroupedReduction],
    a: Slice<'_>,
    m: usize,
    b: Slice<'_>,
    n: usize,
    c: SliceMut<'_>,
    offset: usize,
    stride: usize,
    accumulate: bool,
) -> Result<(), CudaError> {
    let kernel = hopper::choose_for_gradient(gpu, groups, a, m, b, n, c.as_slice(), offset, stride);
    grouped_weight_gradient_with(gpu, kernel, groups, a, m, b, n, c, offset, stride, accumulate)
}

/// [`grouped_weight_gradient`] by a kernel of one's choice.
///
/// # Errors
/// As [`matmul`].
///
/// # Panics
/// As [`grouped_weight_gradient`], and if the kernel does not take the operands.
pub fn grouped_weight_gradient_with(
    gpu: &Gpu,
    kernel: GroupedKernel,
    groups: &[GroupedReduction],
    a: Slice<'_>,
    m: usize,
    b: Slice<'_>,
    n: usize,
    mut c: SliceMut<'_>,
    offset: usize,
    stride: usize,
    accumulate: bool,
) -> Result<(), CudaError> {
    assert!(a.dtype() == b.dtype() && c.dtype() == DType::F32, "A and B are of one type, and C is f32");
    let mut slots: Vec<u32> = groups.iter().map(|group| group.slot).collect();
    slots.sort_unstable();
    assert!(slots.is_sorted_by(|one, next| one < next), "two groups name one slot");
    for group in groups {
        assert!(end(group.row, group.rows) * m <= a.len(), "{group:?} is beyond A");
        assert!(end(group.row, group.rows) * n <= b.len(), "{group:?} is beyond B");
        assert!(offset + group.slot as usize * stride + m * n <= c.len(), "{group:?} is beyond C");
    }
    let hopper = match kernel {
        GroupedKernel::Hopper(width) if m > 0 && n > 0 => Some(width),
        _ => None,
    };
    for group in groups {
        let rows = group.rows as usize;
        if rows > 0 && hopper.is_some() {
            continue;
        }
        let (start, row) = (offset + group.slot as usize * stride, group.row as usize);
        let a = Mat::new(a.slice(row * m..(row + rows) * m), rows, m);
        let b = Mat::new(b.slice(row * n..(row + rows) * n), rows, n);
        let gradient = MatMut::new(c.slice_mut(start..start + m * n), m, n);
        matmul(gpu, gradient, a.t(), b, if accumulate { Addend::Accumulate } else { Addend::None })?;
    }
    match hopper {
        Some(width) => hopper::weight_gradient(gpu, width, groups, a, m, b, n, c, offset, stride, accumulate),
        None => Ok(()),
    }
}

fn end(first: u32, rows: u32) -> usize {
    first as usize + rows as usize
}
