//! Thread-local buffers that kernels borrow: after the first call of a shape nothing is allocated.

use std::cell::RefCell;

thread_local! {
    /// Buffers at rest. A stack, so that a kernel that calls another gets a second one.
    static FREE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Floats of one cache line: buffers start on one.
const LINE: usize = 16;

/// Calls `with` on `len` floats of any content that start on a cache line.
pub(crate) fn with_f32<R>(len: usize, with: impl FnOnce(&mut [f32]) -> R) -> R {
    let needed = len + LINE;
    let mut buffer = FREE.with_borrow_mut(|free| {
        // The smallest that fits keeps large buffers for large requests; without one, the largest grows.
        let best = (0..free.len()).min_by_key(|&index| {
            let capacity = free[index].len();
            if capacity >= needed { (0, capacity) } else { (1, usize::MAX - capacity) }
        });
        best.map(|index| free.swap_remove(index)).unwrap_or_default()
    });
    if buffer.len() < needed {
        buffer.resize(needed, 0.0);
    }
    let skip = buffer.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
    let result = with(&mut buffer[skip..skip + len]);
    FREE.with_borrow_mut(|free| free.push(buffer));
    result
}
