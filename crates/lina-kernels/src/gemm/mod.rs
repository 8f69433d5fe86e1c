//! Matrix products. One element of C is a chain of multiply-adds over k in ascending order, cut at
//! fixed multiples of 512, so its bits depend on its row of A, its column of B and the depth alone:
//! not on how many rows or columns the product has, nor on threads. Callers rely on that to cut a
//! product into pieces that arrive at different times.
//!
//! Structure after Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008)
//! and BLIS, simplified for the small depths of transformer layers: a block of B is packed to stay in
//! L2, and strips of A's rows are packed just before they sweep over that block. Products of a few
//! rows read B where it is.
//!
//! The sketch behind the sizes: two 512-bit multiply-add units do 64 floating-point operations a cycle
//! (the roof is cores x GHz x 64 GFLOP/s). A 14 x 32 tile takes 28 multiply-adds, 14 cycles, per step of
//! k and loads 2 vectors and 14 scalars meanwhile, 8 cycles at two loads a cycle, so arithmetic bounds
//! it. A tile reads 128 bytes of B per step from L2, 9 bytes a cycle of the 64 that L2 gives. Packing
//! an element costs about a quarter of a cycle and multiplying it by 256 columns costs 8: 3 %.

#[cfg(target_arch = "x86_64")]
mod direct;
mod kernel;
mod pack;
mod record;

pub use record::{Layout, Shape, record, take_recorded};

use crate::compute::Compute;
use crate::isa::Isa;
use kernel::{Avx2, Avx512, Kernel, Portable, TileRows};
use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU64, Ordering};

/// Depth (k) of a packed block. Part of the arithmetic: C is rounded to f32 in memory between blocks.
const DEPTH: usize = 512;
/// Floats of B that one packed block holds: half of a 1 MiB L2 cache.
const BLOCK_FLOATS: usize = 128 * 1024;
/// Floating-point operations that a unit of parallel work should have at least, so that fetching it costs nothing.
const UNIT_FLOP: usize = 1_000_000;
/// Fewest rows that are worth packing B for on another thread, and the same for products that pack B block by block of their depth for every chunk of rows.
const LEAST_ROWS: usize = 56;
const LEAST_ROWS_DEEP: usize = 126;
/// Rows whose multiplication takes as long as packing B.
const PACKING_ROWS: usize = 16;
/// Units a thread should get, so that a late thread leaves work to others.
const UNITS_PER_THREAD: usize = 4;

/// Floats of B that a unit of a product of few rows should read at least, and how many times [`UNITS_PER_THREAD`] of them a thread should get.
const PANEL_UNIT_FLOATS: usize = 32 * 1024;
const PANEL_UNITS: usize = 4;

/// A read-only matrix view: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A dense row-major `[rows, cols]` matrix.
    ///
    /// # Panics
    /// If `data` has another length than `rows * cols`.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a dense [{rows}, {cols}] matrix needs as many elements");
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// A row-major `[rows, cols]` matrix whose rows start `row_stride` elements apart.
    ///
    /// # Panics
    /// If rows overlap or `data` ends before the last row does.
    pub fn with_stride(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check_extent(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
}

/// A mutable row-major matrix view whose rows start `row_stride` elements apart.
#[derive(Debug)]
pub struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// A dense row-major `[rows, cols]` matrix.
    ///
    /// # Panics
    /// If `data` has another length than `rows * cols`.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a dense [{rows}, {cols}] matrix needs as many elements");
        Self { data, rows, cols, row_stride: cols }
    }

    /// A row-major `[rows, cols]` matrix whose rows start `row_stride` elements apart.
    ///
    /// # Panics
    /// If rows overlap or `data` ends before the last row does.
    pub fn with_stride(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check_extent(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride }
    }
}

fn check_extent(len: usize, rows: usize, cols: usize, row_stride: usize) {
    if rows > 0 && cols > 0 {
        assert!(rows == 1 || row_stride >= cols, "rows of {cols} elements overlap at a stride of {row_stride}");
        let needed = (rows - 1) * row_stride + cols;
        assert!(len >= needed, "a [{rows}, {cols}] matrix with stride {row_stride} needs {needed} elements, not {len}");
    }
}

/// One product of a group: C = A·B, or C += A·B.
#[derive(Debug)]
pub struct Product<'a> {
    /// `[m, n]`, written.
    pub c: MatMut<'a>,
    /// `[m, k]`.
    pub a: Mat<'a>,
    /// `[k, n]`.
    pub b: Mat<'a>,
    /// Adds to C instead of overwriting it.
    pub accumulate: bool,
}

/// C = A·B, or C += A·B with `accumulate`. Give a weight stored `[out, in]` as `Mat::new(w, out, in).t()` for the forward product.
///
/// # Panics
/// If the shapes do not agree.
pub fn matmul(ctx: &Compute, c: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, accumulate: bool) {
    matmul_grouped(ctx, [Product { c, a, b, accumulate }]);
}

/// Independent products of any shapes as one parallel job: the experts of a layer. The iterator is read once, before any product starts.
/// Products may have zero rows, columns or depth.
///
/// # Panics
/// If the shapes of a product do not agree.
pub fn matmul_grouped<'a>(ctx: &Compute, products: impl IntoIterator<Item = Product<'a>>) {
    // The list is kept between calls; it is taken out while in use, so that an iterator that computes products itself gets another.
    let mut list = PRODUCTS.take();
    list.clear();
    list.extend(products.into_iter().map(RawProduct::new));
    record::group(&list);
    // SAFETY: each view was checked against its slice and its borrow lasts for 'a, which outlives this call; the C of different products are disjoint `&mut` slices.
    unsafe { run(ctx, &mut list) };
    PRODUCTS.set(list);
}

thread_local! {
    static PRODUCTS: RefCell<Vec<RawProduct>> = const { RefCell::new(Vec::new()) };
}

/// A product without lifetimes, as the loops use it.
#[derive(Clone, Copy)]
pub(crate) struct RawProduct {
    pub(crate) c: *mut f32,
    pub(crate) c_stride: usize,
    pub(crate) a: Strided,
    pub(crate) b: Strided,
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) accumulate: bool,
    pub(crate) units: Units,
}

/// Where a matrix starts and how far apart its rows and columns are.
#[derive(Clone, Copy)]
pub(crate) struct Strided {
    pub(crate) data: *const f32,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl Strided {
    /// Row-major.
    pub(crate) fn rows(data: *const f32, row_stride: usize) -> Self {
        Self { data, row_stride, col_stride: 1 }
    }

    /// The view from an element on.
    ///
    /// # Safety
    /// The element lies within the matrix.
    unsafe fn offset(self, row: usize, col: usize) -> Self {
        // SAFETY: the caller's promise.
        let data = unsafe { self.data.add(row * self.row_stride + col * self.col_stride) };
        Self { data, ..self }
    }

    /// The transpose of a row-major matrix.
    pub(crate) fn transposed(data: *const f32, row_stride: usize) -> Self {
        Self { data, row_stride: 1, col_stride: row_stride }
    }
}

// SAFETY: the pointers are used only inside `run`, whose units write disjoint parts of C and only read A and B.
unsafe impl Send for RawProduct {}
// SAFETY: as above.
unsafe impl Sync for RawProduct {}

impl RawProduct {
    /// Floating-point operations, packing counted as if it were some.
    fn flop(&self) -> usize {
        2 * (self.m + PACKING_ROWS) * self.n * self.k
    }

    /// A product for [`run_tile`].
    pub(crate) fn tile(
        c: *mut f32,
        c_stride: usize,
        a: Strided,
        b: Strided,
        m: usize,
        n: usize,
        k: usize,
        accumulate: bool,
    ) -> Self {
        Self { c, c_stride, a, b, m, n, k, accumulate, units: Units::default() }
    }

    fn new(product: Product<'_>) -> Self {
        let Product { c, a, b, accumulate } = product;
        let (m, n, k) = (c.rows, c.cols, a.cols);
        assert!(
            a.rows == m && b.rows == k && b.cols == n,
            "[{m}, {n}] = [{}, {k}] x [{}, {}]: the shapes do not agree",
            a.rows,
            b.rows,
            b.cols
        );
        Self {
            c: c.data.as_mut_ptr(),
            c_stride: c.row_stride,
            a: Strided { data: a.data.as_ptr(), row_stride: a.row_stride, col_stride: a.col_stride },
            b: Strided { data: b.data.as_ptr(), row_stride: b.row_stride, col_stride: b.col_stride },
            m,
            n,
            k,
            accumulate,
            units: Units::default(),
        }
    }
}

/// How a product is cut into units of parallel work: blocks of columns, each cut into chunks of rows.
#[derive(Clone, Copy, Default)]
pub(crate) struct Units {
    /// Units of the products before this one in its group.
    before: usize,
    row_chunks: usize,
    chunk_rows: usize,
    block_cols: usize,
}

impl Units {
    fn plan<K: Kernel>(product: &RawProduct, before: usize, threads: usize, unit_flop: usize) -> Self {
        let RawProduct { m, n, k, .. } = *product;
        if m * n == 0 {
            return Self { before, ..Self::default() };
        }
        if K::PANEL_ROWS > 0 && product.b.row_stride == 1 && m <= K::PANEL_ROWS {
            // Memory is the bound: units must be long enough to be read in a stream, but the last ones should not keep one thread waiting for another.
            let most = (n * k / PANEL_UNIT_FLOATS).clamp(1, n.div_ceil(K::PANEL_COLS));
            let wanted = (product.flop() * PANEL_UNITS).div_ceil(unit_flop);
            let blocks = if threads > 1 { wanted.clamp(1, most) } else { 1 };
            let block_cols = n.div_ceil(blocks).next_multiple_of(K::PANEL_COLS);
            return Self { before, row_chunks: 1, chunk_rows: m, block_cols };
        }
        let most_cols = BLOCK_FLOATS / k.clamp(1, DEPTH) / K::COLS * K::COLS;
        let mut blocks = n.div_ceil(most_cols);
        let mut row_chunks = 1;
        if threads > 1 {
            // Rows share the packed B, so they are cut first; where there are few, each thread gets columns of its own.
            let wanted = product.flop().div_ceil(unit_flop);
            let least_rows = if k <= DEPTH { LEAST_ROWS } else { LEAST_ROWS_DEEP };
            row_chunks = wanted.div_ceil(blocks).clamp(1, (m / least_rows).max(1));
            let short = wanted.min(threads).div_ceil(row_chunks);
            blocks = blocks.max(short.min(n.div_ceil(2 * K::COLS)));
        }
        let block_cols = n.div_ceil(blocks).next_multiple_of(K::COLS);
        let chunk_rows = m.div_ceil(row_chunks).next_multiple_of(K::ROWS);
        Self { before, row_chunks: m.div_ceil(chunk_rows), chunk_rows, block_cols }
    }

    fn count(&self, n: usize) -> usize {
        self.row_chunks * n.div_ceil(self.block_cols.max(1))
    }
}

/// Runs all products.
///
/// # Safety
/// The pointers of every product are valid for its shape, no C overlaps anything else that the group touches, and the machine has `ctx`'s instructions.
unsafe fn run(ctx: &Compute, products: &mut [RawProduct]) {
    // SAFETY: the caller's promises.
    unsafe {
        match ctx.isa() {
            Isa::Avx512 => run_with::<Avx512>(ctx, products),
            Isa::Avx2 => run_with::<Avx2>(ctx, products),
            Isa::Portable => run_with::<Portable>(ctx, products),
        }
    }
}

/// As [`run`].
unsafe fn run_with<K: Kernel>(ctx: &Compute, products: &mut [RawProduct]) {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let flop: usize = products.iter().map(RawProduct::flop).sum();
    let unit_flop = (flop / (ctx.threads() * UNITS_PER_THREAD)).max(UNIT_FLOP);
    let mut units = 0;
    for product in products.iter_mut() {
        product.units = Units::plan::<K>(product, units, ctx.threads(), unit_flop);
        units += product.units.count(product.n);
    }
    let products = &*products;
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    ctx.parallel_for(units, |unit| {
        let index = products.partition_point(|product| product.units.before <= unit) - 1;
        let product = &products[index];
        let Units { before, row_chunks, chunk_rows, block_cols } = product.units;
        let (block, chunk) = ((unit - before) / row_chunks, (unit - before) % row_chunks);
        let rows = (chunk * chunk_rows, product.m.min((chunk + 1) * chunk_rows));
        let cols = (block * block_cols, product.n.min((block + 1) * block_cols));
        // SAFETY: units of one product cover disjoint parts of its C; the rest are the caller's promises.
        unsafe { run_unit::<K>(product, rows, cols, Some((call, index, block))) };
    });
}

/// Which block of B a thread's packed copy holds: call, product, column block.
type PackedKey = (u64, usize, usize);

thread_local! {
    static PACKED: RefCell<Packed> = const { RefCell::new(Packed { a: Vec::new(), b: Vec::new() }) };
    static PACKED_KEY: Cell<Option<PackedKey>> = const { Cell::new(None) };
    static PACKED_ROWS: RefCell<PackedRows> = const { RefCell::new(PackedRows { rows: Vec::new(), of: None }) };
}

/// The rows of A that [`run_panels`] packed.
struct PackedRows {
    rows: Vec<f32>,
    /// The call and the product that they belong to.
    of: Option<(u64, usize)>,
}

struct Packed {
    a: Vec<f32>,
    b: Vec<f32>,
}

/// Computes C's part at `rows` and `cols` (ranges as start and end). A `key` says that the same block of B may be asked for again on this thread.
///
/// # Safety
/// As [`run`], for this part of one product.
unsafe fn run_unit<K: Kernel>(
    product: &RawProduct,
    rows: (usize, usize),
    cols: (usize, usize),
    key: Option<PackedKey>,
) {
    let RawProduct { c, c_stride, a, b, k, accumulate, .. } = *product;
    let (width, panels) = (cols.1 - cols.0, (cols.1 - cols.0).div_ceil(K::COLS));
    if k == 0 {
        if !accumulate {
            for row in rows.0..rows.1 {
                // SAFETY: row and columns lie within C.
                unsafe { c.add(row * c_stride + cols.0).write_bytes(0, width) };
            }
        }
        return;
    }
    if K::PANEL_ROWS > 0 && b.row_stride == 1 && product.m <= K::PANEL_ROWS {
        // SAFETY: the caller's promises.
        unsafe { run_panels::<K>(product, cols, key) };
        return;
    }
    if rows.1 - rows.0 <= K::DIRECT_ROWS && b.col_stride == 1 {
        for start in (0..k).step_by(DEPTH) {
            let (depth, load_c) = (DEPTH.min(k - start), accumulate || start > 0);
            for col in (cols.0..cols.1).step_by(K::DIRECT_COLS) {
                let lanes = K::DIRECT_COLS.min(cols.1 - col);
                // SAFETY: all offsets lie within the views.
                unsafe {
                    let a = a.offset(rows.0, start);
                    let b = b.offset(start, col);
                    let c = c.add(rows.0 * c_stride + col);
                    K::direct_tile(rows.1 - rows.0, lanes, depth, a, b, c, c_stride, load_c);
                }
            }
        }
        return;
    }
    PACKED.with_borrow_mut(|packed| {
        let depth = k.min(DEPTH);
        grow(&mut packed.a, K::STRIPS * pack::strip_floats(K::ROWS, depth));
        grow(&mut packed.b, panels * pack::strip_floats(K::COLS, depth));
        let (packed_a, packed_b) = (packed.a.as_mut_ptr(), packed.b.as_mut_ptr());
        let reusable = key.filter(|_| k <= DEPTH);
        let strips = if a.row_stride == 1 { K::STRIPS } else { 1 };
        let in_place = a.col_stride == 1 && width <= K::IN_PLACE_COLS;
        for start in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - start);
            let load_c = accumulate || start > 0;
            // SAFETY: all offsets lie within the views, and the packed buffers have room for the block (grown above).
            unsafe {
                if reusable.is_none() || PACKED_KEY.get() != reusable {
                    let source = b.data.add(start * b.row_stride + cols.0 * b.col_stride);
                    for panel in 0..panels {
                        let lanes = K::COLS.min(width - panel * K::COLS);
                        let source = source.add(panel * K::COLS * b.col_stride);
                        K::pack_b(
                            source,
                            b.col_stride,
                            b.row_stride,
                            lanes,
                            depth,
                            packed_b.add(panel * K::COLS * depth),
                        );
                    }
                    PACKED_KEY.set(reusable);
                }
                for (strip, row) in (rows.0..rows.1).step_by(K::ROWS).enumerate() {
                    let height = K::ROWS.min(rows.1 - row);
                    let source = a.data.add(row * a.row_stride + start * a.col_stride);
                    let tile_rows = if in_place {
                        TileRows::InPlace(source, a.row_stride)
                    } else {
                        let strip = strip % strips;
                        if strip == 0 {
                            K::pack_a(
                                source,
                                a.row_stride,
                                a.col_stride,
                                (strips * K::ROWS).min(rows.1 - row),
                                depth,
                                packed_a,
                            );
                        }
                        TileRows::Packed(packed_a.add(strip * pack::strip_floats(K::ROWS, depth)))
                    };
                    for panel in 0..panels {
                        let lanes = K::COLS.min(width - panel * K::COLS);
                        let target = c.add(row * c_stride + cols.0 + panel * K::COLS);
                        K::tile(
                            height,
                            lanes,
                            depth,
                            tile_rows,
                            packed_b.add(panel * K::COLS * depth),
                            target,
                            c_stride,
                            load_c,
                        );
                    }
                }
            }
        }
    });
}

/// Computes all rows of C at `cols`, for a few rows and a B that is contiguous along its columns. The rows of A are packed once a call and thread.
///
/// # Safety
/// As [`run_unit`].
unsafe fn run_panels<K: Kernel>(product: &RawProduct, cols: (usize, usize), key: Option<PackedKey>) {
    let RawProduct { c, c_stride, a, b, m, k, accumulate, .. } = *product;
    PACKED_ROWS.with_borrow_mut(|packed| {
        let rows = if m == 1 && a.col_stride == 1 {
            a.data
        } else {
            let of = key.map(|(call, index, _)| (call, index));
            if of.is_none() || of != packed.of {
                grow(&mut packed.rows, pack::strip_floats(m.next_power_of_two(), k));
                // SAFETY: the buffer has room for rows of this width; the rest are the caller's promises.
                unsafe { K::pack_rows(a, m, k, packed.rows.as_mut_ptr()) };
                packed.of = of;
            }
            packed.rows.as_ptr()
        };
        for col in (cols.0..cols.1).step_by(K::PANEL_COLS) {
            let lanes = K::PANEL_COLS.min(cols.1 - col);
            // The unit's last panel has nothing after it that this thread is known to read.
            let ahead = if col + K::PANEL_COLS < cols.1 { K::PANEL_COLS } else { 0 };
            // SAFETY: all offsets lie within the views.
            unsafe {
                let b_panel = b.data.add(col * b.col_stride);
                let next = b_panel.wrapping_add(ahead * b.col_stride);
                K::direct_panel(m, lanes, k, rows, b_panel, b.col_stride, next, c.add(col), c_stride, accumulate);
            }
        }
    });
}

fn grow(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}

/// One product on the calling thread alone, for the tiles of fused kernels. Not recorded.
///
/// # Safety
/// As [`run`].
pub(crate) unsafe fn run_tile(isa: Isa, product: &RawProduct) {
    let (rows, cols) = ((0, product.m), (0, product.n));
    // SAFETY: the caller's promises.
    unsafe {
        match isa {
            Isa::Avx512 => run_unit::<Avx512>(product, rows, cols, None),
            Isa::Avx2 => run_unit::<Avx2>(product, rows, cols, None),
            Isa::Portable => run_unit::<Portable>(product, rows, cols, None),
        }
    }
}
