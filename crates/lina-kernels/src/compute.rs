//! The threads and vector instructions that a rank computes with. Every kernel takes a [`Compute`] first, and gives the same bits whatever its thread count:
//! work is cut into blocks by shape alone, a block runs on one thread, and sums across blocks are added in block order.

use crate::isa::Isa;
use crate::pool::Pool;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A rank's compute resources: an instruction set, and helper threads of its own that no other rank shares.
pub struct Compute {
    isa: Isa,
    pool: Option<Pool>,
    threads: usize,
}

impl Compute {
    /// `threads` threads including the caller; 1 (or 0) runs everything on the caller. Uses the widest vector instructions that the machine has.
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::detect())
    }

    /// As [`Compute::new`], with at most the vector instructions `isa` (fewer where the machine lacks them). Results differ between instruction sets in rounding.
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        let threads = threads.max(1);
        Self { isa: isa.min(Isa::detect()), pool: (threads > 1).then(|| Pool::new(threads - 1)), threads }
    }

    /// Threads asked for, the caller included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// The vector instructions in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Runs `task(0)` to `task(count - 1)`, each once, in any order, on all threads; returns when all are done. A task should take microseconds at least.
    /// Nested calls run on their own thread alone. A panic in a task reaches the caller.
    pub fn parallel_for(&self, count: usize, task: impl Fn(usize) + Sync) {
        match &self.pool {
            Some(pool) if count > 1 => {
                let next = AtomicUsize::new(0);
                pool.broadcast(&|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= count {
                            return;
                        }
                        task(index);
                    }
                });
            }
            _ => (0..count).for_each(task),
        }
    }

    /// Cuts `rows` into blocks of `block_rows` (the last may be shorter) and runs `task(rows of the block, the block's part of every output)` for each on all threads.
    ///
    /// # Panics
    /// If `block_rows` is 0 or an output has fewer than `rows` rows.
    pub fn parallel_rows<S: SplitRows>(
        &self,
        rows: usize,
        block_rows: usize,
        outputs: S,
        task: impl Fn(Range<usize>, S::Part) + Sync,
    ) {
        assert!(outputs.rows() >= rows, "an output has {} rows, {rows} are needed", outputs.rows());
        self.parallel_for(rows.div_ceil(block_rows), |block| {
            let range = block * block_rows..rows.min((block + 1) * block_rows);
            // SAFETY: ranges of different blocks do not overlap, each block runs once, and `outputs` has at least `rows` rows.
            let part = unsafe { outputs.part(range.clone()) };
            task(range, part);
        });
    }
}

/// Rows per block such that a block is work enough for a thread to fetch it and small enough to balance; depends on the width alone.
pub(crate) fn block_rows(width: usize) -> usize {
    (16_384 / width.max(1)).max(1)
}

/// Outputs that blocks of rows can be cut from: [`RowsMut`] and tuples of them.
pub trait SplitRows: Sync {
    /// What a block of rows gets.
    type Part;

    /// How many rows can be cut.
    fn rows(&self) -> usize;

    /// The part of a range of rows.
    ///
    /// # Safety
    /// `range` lies within `0..rows()`, and no row is in two parts that live at the same time.
    unsafe fn part(&self, range: Range<usize>) -> Self::Part;
}

/// A mutable row-major matrix, `width` elements a row, that blocks of rows are cut from. The last row may be shorter.
pub struct RowsMut<'a, T> {
    data: *mut T,
    len: usize,
    width: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a shared reference gives access only through `SplitRows::part`, whose callers keep parts disjoint; a part may be used on another thread as `T` is `Send`.
unsafe impl<T: Send> Sync for RowsMut<'_, T> {}

impl<'a, T> RowsMut<'a, T> {
    /// All of `data`, in rows of `width`.
    ///
    /// # Panics
    /// If `width` is 0 while there is data.
    pub fn new(data: &'a mut [T], width: usize) -> Self {
        assert!(width > 0 || data.is_empty(), "{} elements do not fit in rows of none", data.len());
        Self { data: data.as_mut_ptr(), len: data.len(), width, borrow: PhantomData }
    }
}

impl<'a, T: Send> SplitRows for RowsMut<'a, T> {
    type Part = &'a mut [T];

    fn rows(&self) -> usize {
        // Any number of empty rows can be cut from rows without width.
        if self.width == 0 { usize::MAX } else { self.len.div_ceil(self.width) }
    }

    unsafe fn part(&self, range: Range<usize>) -> &'a mut [T] {
        let (start, end) = (self.len.min(range.start * self.width), self.len.min(range.end * self.width));
        // SAFETY: the range lies within the slice that `self` borrows mutably for 'a, and the caller keeps parts disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), end - start) }
    }
}

macro_rules! split_rows_tuple {
    ($($name:ident $index:tt),*) => {
        impl<$($name: SplitRows),*> SplitRows for ($($name,)*) {
            type Part = ($($name::Part,)*);

            fn rows(&self) -> usize {
                usize::MAX $(.min(self.$index.rows()))*
            }

            unsafe fn part(&self, range: Range<usize>) -> Self::Part {
                // SAFETY: the caller's promises hold for each member.
                unsafe { ($(self.$index.part(range.clone()),)*) }
            }
        }
    };
}
split_rows_tuple!(A 0, B 1);
split_rows_tuple!(A 0, B 1, C 2);

/// `None` stands for an output that is not wanted.
impl<S: SplitRows> SplitRows for Option<S> {
    type Part = Option<S::Part>;

    fn rows(&self) -> usize {
        self.as_ref().map_or(usize::MAX, S::rows)
    }

    unsafe fn part(&self, range: Range<usize>) -> Option<S::Part> {
        // SAFETY: the caller's promises hold for the member.
        self.as_ref().map(|rows| unsafe { rows.part(range) })
    }
}
