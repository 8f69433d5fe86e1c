//! Matrix products of cuBLASLt. Matrices are row-major views; cuBLASLt, which counts columns first, is asked for the
//! transposed product of the transposed operands, which are the same bytes.
//!
//! What cuBLASLt needs to know of a product, and which of its algorithms is best, depends on shapes, types and
//! alignment alone, and is kept. Parts of a depth that is cut are added in f32 and in a fixed order, so a product
//! repeats bit by bit on the same GPU and library; its rows may differ in their last bits from those of a product of
//! more or fewer rows, unless it is asked for alike ones.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t as DescriptionAttribute, cublasLtMatmulHeuristicResult_t,
    cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t as PreferenceAttribute, cublasLtMatrixLayout_t,
    cublasLtReductionScheme_t, cublasStatus_t, cudaDataType_t, libraryPropertyType,
};

use crate::buffer::{Buffer, DType, Slice, SliceMut};
use crate::device::{Device, check_library};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::stream::Stream;

/// What cuBLASLt may use beside the operands; the larger, the more algorithms it has.
const WORKSPACE_BYTES: usize = 64 << 20;
/// Alignment that all algorithms are content with.
const BEST_ALIGNMENT_BYTES: u64 = 16;
/// Rows for which an algorithm is the fastest that is taken for any number of rows.
const USUAL_ROWS: usize = 512;
/// Products that are remembered. Runs need hundreds; experts' rows, which differ in every step, would fill any number.
const MAX_PLANS: usize = 4096;

/// A read-only row-major matrix view in device memory, or the transpose of one.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    data: Slice<'a>,
    shape: Shape,
    transposed: bool,
}

impl<'a> Mat<'a> {
    /// A dense `[rows, columns]` matrix.
    ///
    /// # Panics
    /// If `data` has another length.
    pub fn new(data: Slice<'a>, rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "a dense [{rows}, {columns}] matrix needs as many elements");
        Mat { data, shape: Shape { rows, columns, stride: columns }, transposed: false }
    }

    /// A `[rows, columns]` matrix whose rows start `stride` elements apart.
    ///
    /// # Panics
    /// If rows overlap or `data` ends before the last row does.
    pub fn with_stride(data: Slice<'a>, rows: usize, columns: usize, stride: usize) -> Self {
        let shape = Shape { rows, columns, stride };
        shape.check(data.len());
        Mat { data, shape, transposed: false }
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Mat { transposed: !self.transposed, ..self }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        if self.transposed { self.shape.columns } else { self.shape.rows }
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        if self.transposed { self.shape.rows } else { self.shape.columns }
    }

    fn operand(&self) -> Operand {
        Operand::new(self.shape, self.transposed, self.data)
    }
}

/// A row-major matrix view in device memory, to write.
#[derive(Debug)]
pub struct MatMut<'a> {
    data: SliceMut<'a>,
    shape: Shape,
}

impl<'a> MatMut<'a> {
    /// A dense `[rows, columns]` matrix.
    ///
    /// # Panics
    /// If `data` has another length.
    pub fn new(data: SliceMut<'a>, rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "a dense [{rows}, {columns}] matrix needs as many elements");
        MatMut { data, shape: Shape { rows, columns, stride: columns } }
    }

    /// A `[rows, columns]` matrix whose rows start `stride` elements apart.
    ///
    /// # Panics
    /// If rows overlap or `data` ends before the last row does.
    pub fn with_stride(data: SliceMut<'a>, rows: usize, columns: usize, stride: usize) -> Self {
        let shape = Shape { rows, columns, stride };
        shape.check(data.len());
        MatMut { data, shape }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.shape.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.shape.columns
    }
}

/// What is added to a product.
#[derive(Clone, Copy, Debug)]
pub enum Addend<'a> {
    /// Nothing: D is overwritten.
    None,
    /// What D holds.
    Accumulate,
    /// Another matrix of D's shape and type, which is not transposed.
    Add(Mat<'a>),
}

/// D = A·B plus `c`. A and B are both f32 (as is D, and no product is rounded to TF32) or both bf16 (D bf16 or f32);
/// sums are f32. Without rows, columns or depth, D is `c` or zeros, where there is any.
///
/// # Errors
/// If cuBLASLt cannot be loaded or does not take the product, or the device has failed.
///
/// # Panics
/// If shapes or types do not agree.
pub fn matmul(gpu: &Gpu, d: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, c: Addend<'_>) -> Result<(), CudaError> {
    matmul_of_rows(gpu, d, a, b, c, Rows::Fastest)
}

/// [`matmul`], with a choice of what is to be of its rows; for alike ones A is not transposed.
///
/// # Errors
/// As [`matmul`].
///
/// # Panics
/// As [`matmul`].
pub(crate) fn matmul_of_rows(
    gpu: &Gpu,
    mut d: MatMut<'_>,
    a: Mat<'_>,
    b: Mat<'_>,
    c: Addend<'_>,
    rows: Rows,
) -> Result<(), CudaError> {
    let (m, n, k) = (d.rows(), d.columns(), a.columns());
    assert!(
        a.rows() == m && b.rows() == k && b.columns() == n,
        "[{m}, {n}] = [{}, {k}] x [{}, {}]: the shapes do not agree",
        a.rows(),
        b.rows(),
        b.columns()
    );
    let types = (a.data.dtype(), b.data.dtype(), d.data.dtype());
    assert!(
        matches!(types, (DType::F32, DType::F32, DType::F32) | (DType::Bf16, DType::Bf16, DType::Bf16 | DType::F32)),
        "no product has types {types:?}"
    );
    if let Addend::Add(c) = c {
        assert!(!c.transposed && (c.rows(), c.columns()) == (m, n), "what is added has D's shape");
        assert_eq!(c.data.dtype(), d.data.dtype(), "what is added has D's type");
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    if k == 0 {
        return copy_or_clear(gpu, &mut d, c);
    }
    let blas = gpu.blas()?;
    gpu.timed("product", || blas.multiply(&mut d, a, b, c, rows))
}

/// What a product's rows are to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Rows {
    /// Computed by what is the fastest for their number.
    Fastest,
    /// Of the same bits whatever their number.
    Alike,
}

/// A product without depth.
fn copy_or_clear(gpu: &Gpu, d: &mut MatMut<'_>, c: Addend<'_>) -> Result<(), CudaError> {
    let dense = d.shape.is_dense() && !matches!(c, Addend::Add(c) if !c.shape.is_dense());
    // What follows each other without gaps is one row.
    let rows = if dense { 1 } else { d.rows() };
    let columns = d.rows() / rows * d.columns();
    for row in 0..rows {
        let part = |shape: &Shape| row * shape.stride..row * shape.stride + columns;
        let target = d.data.slice_mut(part(&d.shape));
        match c {
            Addend::None => gpu.fill_zero(target)?,
            Addend::Accumulate => {}
            Addend::Add(c) => gpu.copy(c.data.slice(part(&c.shape)), target)?,
        }
    }
    Ok(())
}

/// A matrix as it is stored: `rows` rows of `columns` elements that start `stride` elements apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    columns: usize,
    stride: usize,
}

impl Shape {
    fn check(&self, len: usize) {
        let Shape { rows, columns, stride } = *self;
        if rows > 0 && columns > 0 {
            assert!(rows == 1 || stride >= columns, "rows of {columns} elements overlap at a stride of {stride}");
            let needed = (rows - 1) * stride + columns;
            assert!(
                len >= needed,
                "a [{rows}, {columns}] matrix with stride {stride} needs {needed} elements, not {len}"
            );
        }
    }

    fn is_dense(&self) -> bool {
        self.stride == self.columns
    }
}

/// What cuBLASLt needs to know of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Operand {
    shape: Shape,
    transposed: bool,
    dtype: DType,
    alignment_bytes: u32,
}

impl Operand {
    fn new(shape: Shape, transposed: bool, data: Slice<'_>) -> Self {
        // The stride of a single row means nothing, but has to be one.
        let stride = if shape.rows == 1 { shape.columns } else { shape.stride };
        let alignment_bytes = alignment_bytes(data.ptr());
        Operand { shape: Shape { stride, ..shape }, transposed, dtype: data.dtype(), alignment_bytes }
    }

    fn layout(&self) -> Result<Layout, CudaError> {
        let Shape { rows, columns, stride } = self.shape;
        let dtype = match self.dtype {
            DType::F32 => cudaDataType_t::CUDA_R_32F,
            DType::Bf16 => cudaDataType_t::CUDA_R_16BF,
            DType::U32 => unreachable!("products are of floats"),
        };
        let layout = result::create_matrix_layout(dtype, columns as u64, rows as u64, stride as i64);
        layout.map(Layout).map_err(|error| failed("cublasLtMatrixLayoutCreate", error))
    }
}

/// What cuBLASLt needs to know of a product; `c` where something is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    a: Operand,
    b: Operand,
    c: Option<Operand>,
    d: Operand,
    rows: Rows,
}

impl Key {
    /// The product of the usual number of rows, which may begin anywhere: one for all that differ in these.
    fn usual(&self) -> Key {
        let usual = |operand: &Operand| {
            let Shape { columns, stride, .. } = operand.shape;
            let row_bytes = (stride * operand.dtype.bytes()) as u64;
            Operand {
                shape: Shape { rows: USUAL_ROWS, columns, stride },
                alignment_bytes: operand.alignment_bytes.min(alignment_bytes(row_bytes)),
                ..*operand
            }
        };
        Key { a: usual(&self.a), d: usual(&self.d), ..*self }
    }
}

/// The alignment of an address, as far as it matters.
fn alignment_bytes(address: u64) -> u32 {
    1 << (address | BEST_ALIGNMENT_BYTES).trailing_zeros()
}

/// Device addresses of a product's operands.
#[derive(Clone, Copy)]
struct Addresses {
    a: u64,
    b: u64,
    c: u64,
    d: u64,
}

/// cuBLASLt on one stream, and what it is known to do best.
pub(crate) struct Blas {
    stream: Stream,
    handle: cublasLtHandle_t,
    workspace: Buffer,
    plans: RefCell<HashMap<Key, Plan>>,
    /// Algorithms of products of [`Rows::Alike`], by the product of the usual number of rows.
    usual: RefCell<HashMap<Key, cublasLtMatmulAlgo_t>>,
}

impl Blas {
    /// # Errors
    /// If the library cannot be loaded or is too new for the driver, or there is no memory for its workspace.
    pub(crate) fn new(stream: &Stream) -> Result<Blas, CudaError> {
        // SAFETY: looks for a file and loads it.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoLibrary {
                library: "libcublasLt.so",
                hint: "CUDA's matrix products on the library path (nvidia-cublas has it in nvidia/cu13/lib)",
            });
        }
        check_library("cuBLASLt", blas_version()?, Device::driver_version()?)?;
        stream.device().bind()?;
        let workspace = Buffer::new(stream, WORKSPACE_BYTES / DType::F32.bytes(), DType::F32)?;
        let handle = result::create_handle().map_err(|error| failed("cublasLtCreate", error))?;
        Ok(Blas { stream: stream.clone(), handle, workspace, plans: RefCell::default(), usual: RefCell::default() })
    }

    fn multiply(&self, d: &mut MatMut<'_>, a: Mat<'_>, b: Mat<'_>, c: Addend<'_>, rows: Rows) -> Result<(), CudaError> {
        self.stream.device().bind()?;
        let target = Operand::new(d.shape, false, d.data.as_slice());
        let (c, c_address) = match c {
            Addend::None => (None, d.data.ptr()),
            Addend::Accumulate => (Some(target), d.data.ptr()),
            Addend::Add(c) => (Some(c.operand()), c.data.ptr()),
        };
        let key = Key { a: a.operand(), b: b.operand(), c, d: target, rows };
        let addresses = Addresses { a: a.data.ptr(), b: b.data.ptr(), c: c_address, d: d.data.ptr() };
        let mut plans = self.plans.borrow_mut();
        if !plans.contains_key(&key) {
            if plans.len() == MAX_PLANS {
                plans.clear();
            }
            plans.insert(key, self.plan(&key)?);
        }
        self.run(&plans[&key], addresses).map_err(|error| failed("cublasLtMatmul", error))
    }

    fn plan(&self, key: &Key) -> Result<Plan, CudaError> {
        let product = Product::new(key)?;
        let algorithm = match key.rows {
            Rows::Fastest => self.fastest(key, &product)?,
            Rows::Alike => {
                let usual = self.usual(&key.usual())?;
                // No number of rows is known for which it would not do.
                if self.takes(&product, &usual) { usual } else { self.fastest(key, &product)? }
            }
        };
        Ok(Plan { product, added: key.c.is_some(), algorithm })
    }

    /// The algorithm for products like `key`, which is of the usual number of rows.
    fn usual(&self, key: &Key) -> Result<cublasLtMatmulAlgo_t, CudaError> {
        let mut algorithms = self.usual.borrow_mut();
        if let Some(&algorithm) = algorithms.get(key) {
            return Ok(algorithm);
        }
        let algorithm = self.fastest(key, &Product::new(key)?)?;
        algorithms.insert(*key, algorithm);
        Ok(algorithm)
    }

    /// The algorithm that cuBLASLt takes for the fastest.
    fn fastest(&self, key: &Key, product: &Product) -> Result<cublasLtMatmulAlgo_t, CudaError> {
        let preference = Preference::new(key)?;
        // SAFETY: plain numbers, for which zeros are a value.
        let mut found: cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        let mut count = 0;
        let Product { description, a, b, c, d } = product;
        // B comes first, as everywhere.
        // SAFETY: all handles live, and there is room for the one result that is asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                description.0,
                b.0,
                a.0,
                c.0,
                d.0,
                preference.0,
                1,
                &mut found,
                &mut count,
            )
        };
        if status != cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED {
            status.result().map_err(|error| failed("cublasLtMatmulAlgoGetHeuristic", error))?;
        }
        if count == 0 || found.state != cublasStatus_t::CUBLAS_STATUS_SUCCESS {
            return Err(CudaError::Unsupported(format!("cuBLASLt has no algorithm for {key:?}")));
        }
        Ok(found.algo)
    }

    /// Whether an algorithm can compute a product.
    fn takes(&self, Product { description, a, b, c, d }: &Product, algorithm: &cublasLtMatmulAlgo_t) -> bool {
        // SAFETY: plain numbers, for which zeros are a value.
        let mut found: cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        // SAFETY: all handles live, and the out-parameter is valid.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(self.handle, description.0, b.0, a.0, c.0, d.0, algorithm, &mut found)
        };
        status == cublasStatus_t::CUBLAS_STATUS_SUCCESS
            && found.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS
            && found.workspaceSize <= WORKSPACE_BYTES
    }

    fn run(&self, plan: &Plan, at: Addresses) -> Result<(), CublasError> {
        let (alpha, beta) = (1.0f32, if plan.added { 1.0f32 } else { 0.0 });
        let pointer = |address: u64| address as *mut c_void;
        let Product { description, a, b, c, d } = &plan.product;
        // SAFETY: the plan's handles live; the operands are views of device memory that the layouts lie within, D is
        // borrowed exclusively, and the workspace is used by this stream alone.
        unsafe {
            result::matmul(
                self.handle,
                description.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                pointer(at.b),
                b.0,
                pointer(at.a),
                a.0,
                pointer(at.c),
                c.0,
                pointer(at.d),
                d.0,
                &plan.algorithm,
                pointer(self.workspace.whole().ptr()),
                WORKSPACE_BYTES,
                self.stream.raw().cast(),
            )
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if self.stream.device().bind().is_ok() {
            // SAFETY: made in `new`, dropped once; cuBLASLt waits for what it has under way.
            let _ = unsafe { result::destroy_handle(self.handle) };
        }
    }
}

/// The library's major and minor version.
fn blas_version() -> Result<(i32, i32), CudaError> {
    let property = |property| {
        let mut value = 0;
        // SAFETY: the out-parameter is valid.
        let status = unsafe { sys::cublasLtGetProperty(property, &mut value) };
        status.result().map(|()| value).map_err(|error| failed("cublasLtGetProperty", error))
    };
    Ok((property(libraryPropertyType::MAJOR_VERSION)?, property(libraryPropertyType::MINOR_VERSION)?))
}

/// A product as cuBLASLt knows it.
struct Product {
    description: Description,
    a: Layout,
    b: Layout,
    c: Layout,
    d: Layout,
}

impl Product {
    fn new(key: &Key) -> Result<Self, CudaError> {
        let (a, b, d) = (key.a.layout()?, key.b.layout()?, key.d.layout()?);
        Ok(Product { description: Description::new(key)?, a, b, c: key.c.unwrap_or(key.d).layout()?, d })
    }
}

/// A product and how it is computed.
struct Plan {
    product: Product,
    added: bool,
    algorithm: cublasLtMatmulAlgo_t,
}

struct Layout(cublasLtMatrixLayout_t);

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made once, dropped once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Description(cublasLtMatmulDesc_t);

impl Description {
    fn new(key: &Key) -> Result<Self, CudaError> {
        let (compute, scale) = (cublasComputeType_t::CUBLAS_COMPUTE_32F, cudaDataType_t::CUDA_R_32F);
        let description = result::create_matmul_desc(compute, scale);
        let description = Description(description.map_err(|error| failed("cublasLtMatmulDescCreate", error))?);
        let operands = [
            (DescriptionAttribute::CUBLASLT_MATMUL_DESC_TRANSA, key.b.transposed),
            (DescriptionAttribute::CUBLASLT_MATMUL_DESC_TRANSB, key.a.transposed),
        ];
        for (attribute, transposed) in operands {
            // `cublasOperation_t`: 0 leaves a matrix as it is, 1 transposes it.
            let value = i32::from(transposed);
            // SAFETY: the description lives, and the attribute is one such value.
            let set = unsafe {
                let size = size_of_val(&value);
                result::set_matmul_desc_attribute(description.0, attribute, (&raw const value).cast(), size)
            };
            set.map_err(|error| failed("cublasLtMatmulDescSetAttribute", error))?;
        }
        Ok(description)
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made once, dropped once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Preference(cublasLtMatmulPreference_t);

impl Preference {
    fn new(key: &Key) -> Result<Self, CudaError> {
        let preference = result::create_matmul_pref();
        let preference = Preference(preference.map_err(|error| failed("cublasLtMatmulPreferenceCreate", error))?);
        let reduction = match key.rows {
            // Without a cut depth, or with sums in f32 that one kernel adds up: the other ways round in between.
            Rows::Fastest => cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE,
            // Parts of a depth would need room that grows with the rows.
            Rows::Alike => cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE,
        } as u32;
        let c = key.c.unwrap_or(key.d);
        preference.set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE_BYTES)?;
        preference.set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction)?;
        preference.set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.b.alignment_bytes)?;
        preference.set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.a.alignment_bytes)?;
        preference.set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c.alignment_bytes)?;
        preference.set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.d.alignment_bytes)?;
        Ok(preference)
    }

    fn set<T: Copy>(&self, attribute: PreferenceAttribute, value: T) -> Result<(), CudaError> {
        // SAFETY: the preference lives, and cuBLASLt refuses values of a wrong size.
        let set =
            unsafe { result::set_matmul_pref_attribute(self.0, attribute, (&raw const value).cast(), size_of::<T>()) };
        set.map_err(|error| failed("cublasLtMatmulPreferenceSetAttribute", error))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made once, dropped once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

fn failed(call: &'static str, error: CublasError) -> CudaError {
    CudaError::Call { call, reason: format!("{:?}", error.0) }
}
