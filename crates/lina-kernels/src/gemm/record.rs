//! A recorder of the products that a program runs, so that a benchmark can replay exactly those against another library.

use super::RawProduct;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

static RECORDING: AtomicBool = AtomicBool::new(false);
static RECORDED: Mutex<Vec<Shape>> = Mutex::new(Vec::new());

/// Which operands are stored transposed, A's letter first; C is always row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Layout {
    /// Both row-major: an input gradient, dY·W.
    NN,
    /// B stored `[n, k]`: a forward product, X·Wᵀ.
    NT,
    /// A stored `[k, m]`: a weight gradient, dYᵀ·X.
    TN,
    /// Both transposed.
    TT,
}

/// One product: C`[m, n]` = A`[m, k]` · B`[k, n]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shape {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Depth.
    pub k: usize,
    /// How A and B are stored.
    pub layout: Layout,
    /// Whether C was added to.
    pub accumulate: bool,
    /// How many products its [`super::matmul_grouped`] call had. They are recorded one after the other, so that a replay can take this many as one group.
    pub batch: usize,
}

/// Starts or stops recording, in every thread of the process. The products of fused kernels (attention) are part of those kernels and are not recorded.
pub fn record(on: bool) {
    RECORDING.store(on, Ordering::Relaxed);
}

/// Takes the shapes recorded so far, group by group in the order in which the calls began.
pub fn take_recorded() -> Vec<Shape> {
    std::mem::take(&mut *RECORDED.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Records a group while recording is on.
pub(super) fn group(products: &[RawProduct]) {
    if !RECORDING.load(Ordering::Relaxed) {
        return;
    }
    let mut recorded = RECORDED.lock().unwrap_or_else(PoisonError::into_inner);
    recorded.extend(products.iter().map(|product| Shape {
        m: product.m,
        n: product.n,
        k: product.k,
        layout: match (product.a.col_stride == 1, product.b.col_stride == 1) {
            (true, true) => Layout::NN,
            (true, false) => Layout::NT,
            (false, true) => Layout::TN,
            (false, false) => Layout::TT,
        },
        accumulate: product.accumulate,
        batch: products.len(),
    }));
}
