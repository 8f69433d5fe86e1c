//! A request to stop at the end of the step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Set by ctrl-C or a caller, read by rank 0, which tells the others in the step's closing sum.
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Not requested.
    pub fn new() -> Self {
        Self::default()
    }

    /// Requests the stop.
    pub fn request(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether it was requested.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
