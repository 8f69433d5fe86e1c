//! Products of a decoding step's few tokens, with a matrix or with the experts that they chose, which the device alone
//! knows: nothing waits for the host, and a step's launches are the same whatever was chosen.
//!
//! Such products are bound by reading the matrices, each once. In bf16 tensor cores multiply
//! (`kernels/few.cu`); an element's bits depend on its row, its column of the matrix and the depth alone, not on what
//! else is computed. In F32, and where rows are not aligned for 16-byte accesses, warps sum up simply.

use lina_kernels::Activation;

use crate::activation::kind;
use crate::buffer::{DType, Slice, SliceMut};
use crate::compile::Module;
use crate::elementwise::{kernel_name, pack_len};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::grouped::{BLayout, GroupedB};
use crate::launch::{Arg, LaunchShape};

pub(crate) static FEW: Module = Module::new(
    "few",
    concat!(include_str!("kernels/pack.cuh"), include_str!("kernels/nonlinearity.cuh"), include_str!("kernels/few.cu")),
);

/// Most tokens of a step that these kernels take.
pub const MAX_FEW_TOKENS: usize = 64;

/// Warps of a block, and their threads.
const WARPS: usize = 4;
const THREADS: u32 = 32 * WARPS as u32;
/// Elements of the depth that a warp takes at once.
const SPAN: usize = 64;
/// Time of a block of half the height, where the other takes 1: more than half, as it reads as many rows of x.
const NARROW_TIME: f64 = 0.55;

/// Which experts a step's tokens go to.
#[derive(Clone, Copy, Debug)]
pub struct ChosenExperts<'a> {
    /// u32 `[tokens, top_k]`: the choices' experts; those of a token differ.
    pub index: Slice<'a>,
    /// Choices of a token.
    pub top_k: usize,
    /// u32 `[experts]`: which of the matrices is an expert's.
    pub slots: Slice<'a>,
}

/// Rows of a step, and where they go: to experts by an index, or all to the only matrix.
#[derive(Clone, Copy, Debug)]
struct Rows {
    index: u64,
    slots: u64,
    choices: usize,
    tokens: usize,
    top_k: usize,
    experts: usize,
}

impl Rows {
    fn of(chosen: &ChosenExperts<'_>) -> Rows {
        let &ChosenExperts { index, top_k, slots } = chosen;
        let (choices, experts) = (index.len(), slots.len());
        let tokens = choices / top_k.max(1);
        let numbers = index.dtype() == DType::U32 && slots.dtype() == DType::U32;
        let different = choices == 0 || top_k <= experts;
        assert!(numbers && tokens * top_k == choices && tokens <= MAX_FEW_TOKENS && different, "{chosen:?}");
        Rows { index: index.ptr(), slots: slots.ptr(), choices, tokens, top_k, experts }
    }

    fn all(rows: usize) -> Rows {
        assert!(rows <= MAX_FEW_TOKENS, "{rows} rows, at most {MAX_FEW_TOKENS}");
        Rows { index: 0, slots: 0, choices: rows, tokens: rows, top_k: 1, experts: 1 }
    }

    /// Blocks' groups: a group for each choice, of which the first ones of experts compute, or for each expert.
    fn groups(&self) -> usize {
        self.choices.min(self.experts)
    }
}

/// What becomes of the products of an expert's first matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FewActivation {
    /// silu(gate) · up, of gates and ups.
    Swiglu,
    /// The activation.
    Plain(Activation),
}

/// What a launch computes, as the kernels' names begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Swiglu,
    Activated(Activation),
    Rows,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Operation::Swiglu => "few_swiglu",
            Operation::Activated(_) => "few_activated",
            Operation::Rows => "few_rows",
        }
    }

    /// Rows of a matrix for each element of the result.
    fn parts(self) -> usize {
        if self == Operation::Swiglu { 2 } else { 1 }
    }

    /// What the kernels call its activation.
    fn kind(self) -> u32 {
        match self {
            Operation::Activated(activation) => kind(activation),
            Operation::Swiglu | Operation::Rows => 0,
        }
    }
}

/// Hidden units of each choice: the activation of its token's row of `x` times its expert's matrix, transposed. Products
/// are rounded to the storage type before the activation.
///
/// - `x`: `[tokens, hidden]`
/// - `b`: the experts' first matrices, `[n, k]` with k = hidden; n = inner, or with SwiGLU 2 · inner, gates first
/// - `units`: `[tokens * top_k, inner]`, overwritten
///
/// # Errors
/// If the device has failed.
///
/// # Panics
/// If shapes or types do not agree, or there are more than [`MAX_FEW_TOKENS`] tokens.
pub fn few_projected(
    gpu: &Gpu,
    chosen: &ChosenExperts<'_>,
    activation: FewActivation,
    x: Slice<'_>,
    b: GroupedB<'_>,
    units: SliceMut<'_>,
) -> Result<(), CudaError> {
    let operation = match activation {
        FewActivation::Swiglu => Operation::Swiglu,
        FewActivation::Plain(activation) => Operation::Activated(activation),
    };
    let rows = Rows::of(chosen);
    multiply(gpu, operation, rows, x, rows.tokens, b, None, units)
}

/// Outputs of each choice's expert: the choice's hidden units times the expert's matrix, transposed.
///
/// - `units`: `[tokens * top_k, inner]`
/// - `b`: the experts' last matrices, `[n, k]` with n = hidden and k = inner
/// - `rows`: `[tokens * top_k, hidden]`, overwritten
///
/// # Errors
/// If the device has failed.
///
/// # Panics
/// As [`few_projected`].
pub fn few_rows(
    gpu: &Gpu,
    chosen: &ChosenExperts<'_>,
    units: Slice<'_>,
    b: GroupedB<'_>,
    rows: SliceMut<'_>,
) -> Result<(), CudaError> {
    let of_step = Rows::of(chosen);
    multiply(gpu, Operation::Rows, of_step, units, of_step.choices, b, None, rows)
}

/// Up to [`MAX_FEW_TOKENS`] rows times a matrix, transposed, plus `addend` if there is one: what
/// [`matmul`](crate::matmul()) computes too, but a row's bits do not depend on how many there are. Rows and matrices in bf16
/// that are not aligned for 16-byte accesses are computed much slower.
///
/// - `x`: `[rows, k]`, `b`: `[n, k]`, `addend`: `[rows, n]`
/// - `y`: `[rows, n]`, of their type or f32; overwritten
///
/// # Errors
/// If the device has failed.
///
/// # Panics
/// If shapes or types do not agree, or there are more than [`MAX_FEW_TOKENS`] rows.
pub fn few_matmul(
    gpu: &Gpu,
    x: Slice<'_>,
    b: Slice<'_>,
    [n, k]: [usize; 2],
    addend: Option<Slice<'_>>,
    y: SliceMut<'_>,
) -> Result<(), CudaError> {
    let rows = Rows::all(x.len() / k.max(1));
    assert_eq!(b.len(), n * k, "a [{n}, {k}] matrix needs as many elements");
    let matrix = GroupedB { data: b, offset: 0, stride: 0, n, k, layout: BLayout::Nk };
    multiply(gpu, Operation::Rows, rows, x, rows.choices, matrix, addend, y)
}

/// An operation on `x`, which has `x_rows` rows.
fn multiply(
    gpu: &Gpu,
    operation: Operation,
    rows: Rows,
    x: Slice<'_>,
    x_rows: usize,
    b: GroupedB<'_>,
    addend: Option<Slice<'_>>,
    out: SliceMut<'_>,
) -> Result<(), CudaError> {
    let dtype = x.dtype();
    let wide = out.dtype() != dtype;
    assert!(dtype == b.data.dtype() && (!wide || out.dtype() == DType::F32), "x and matrices are of one type");
    assert!(operation == Operation::Rows || !wide, "hidden units have the type of x");
    let is_like_out = |addend: Slice<'_>| (addend.len(), addend.dtype()) == (out.len(), dtype);
    assert!(addend.is_none_or(is_like_out), "what is added is like the result");
    assert!(b.layout == BLayout::Nk && b.n.is_multiple_of(operation.parts()), "matrices of {operation:?}");
    assert!(b.offset + b.n * b.k <= b.data.len(), "the first matrix is beyond its data");
    let outputs = b.n / operation.parts();
    assert!(x.len() == x_rows * b.k && out.len() == rows.choices * outputs, "{operation:?}: shapes");
    assert!(u32::try_from(x.len()).is_ok(), "kernels count the elements of x in 32 bits");

    let matrices = b.data.ptr() + (b.offset * dtype.bytes()) as u64;
    let stride_bytes = (b.stride * dtype.bytes()) as u64;
    let pack = pack_len(dtype, b.k, &[x.ptr(), matrices, stride_bytes]);
    let (kernel, shape) = if dtype == DType::Bf16 && pack > 1 {
        let tiles = Tiles::choose(&rows, b.n, gpu.multiprocessors() as usize);
        let name = format!("{}_bf16_{}x{}", operation.name(), tiles.choices, tiles.matrix_rows);
        (name, tiles.shape(&rows, b.n, b.k))
    } else {
        (kernel_name(operation.name(), dtype, pack), grid(outputs.div_ceil(WARPS), &rows))
    };
    let addend = addend.map_or(0, |addend| addend.ptr());
    let longs = [rows.index, rows.slots, x.ptr(), matrices, out.ptr(), addend, b.stride as u64];
    let sizes = [rows.choices, rows.top_k, rows.experts, outputs, b.k];
    gpu.launch(&FEW, &kernel, shape, &[Arg::Bytes(&step(longs, sizes, [operation.kind(), wide.into()]))])
}

/// The struct that kernels take: addresses with the stride, then sizes with what else there is to know.
fn step(longs: [u64; 7], sizes: [usize; 5], others: [u32; 2]) -> [u8; 88] {
    let word = |size: usize| u32::try_from(size).expect("a step has less than 2^32 elements");
    let mut bytes = [0; 88];
    let (first, rest) = bytes.split_at_mut(56);
    first.chunks_exact_mut(8).zip(longs).for_each(|(to, long)| to.copy_from_slice(&long.to_ne_bytes()));
    let words = sizes.map(word).into_iter().chain(others);
    rest.chunks_exact_mut(4).zip(words).for_each(|(to, word)| to.copy_from_slice(&word.to_ne_bytes()));
    bytes
}

/// Blocks side by side for each group.
fn grid(blocks: usize, rows: &Rows) -> LaunchShape {
    let [blocks, groups] = [blocks, rows.groups()].map(|count| u32::try_from(count).expect("grids are small"));
    LaunchShape { grid: [blocks, groups, 1], block: THREADS, shared_bytes: 0 }
}

/// What a block of the tensor cores' kernels computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tiles {
    /// Most choices of an expert.
    choices: usize,
    /// Rows of the matrix.
    matrix_rows: usize,
}

impl Tiles {
    /// Room for every token, and the height with which multiprocessors are done first. With more tokens blocks are
    /// higher, as each of them reads its experts' rows of x.
    fn choose(of_step: &Rows, matrix_rows: usize, multiprocessors: usize) -> Tiles {
        let choices = of_step.tokens.next_power_of_two().max(8);
        let (narrow, wide) = if choices < MAX_FEW_TOKENS { (16, 32) } else { (32, 64) };
        let rounds = |rows| (matrix_rows.div_ceil(rows) * of_step.groups()).div_ceil(multiprocessors) as f64;
        let matrix_rows = if NARROW_TIME * rounds(narrow) < rounds(wide) { narrow } else { wide };
        Tiles { choices, matrix_rows }
    }

    /// For matrices `[n, k]`.
    fn shape(self, of_step: &Rows, n: usize, k: usize) -> LaunchShape {
        // As in the kernels.
        let stages = match self.matrix_rows {
            16 => 8,
            32 => 4,
            _ => 3,
        };
        // Stages that no warp would fill leave room for other blocks.
        let filled = k.div_ceil(SPAN * WARPS).clamp(1, stages);
        let ring = filled * WARPS * SPAN * self.matrix_rows * DType::Bf16.bytes();
        let sums = WARPS * self.choices * (self.matrix_rows + 4) * DType::F32.bytes();
        grid(n.div_ceil(self.matrix_rows), of_step).with_shared(ring.max(sums))
    }
}
