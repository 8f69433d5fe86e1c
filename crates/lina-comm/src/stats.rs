//! What a step took on one rank.

use crate::{Direction, Nanos, WorkKind};

/// Times of one step on one rank, in nanoseconds of the body's clock (virtual where emulated).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepStats {
    /// From the beginning of the step to its end.
    pub step: Nanos,
    /// Computation that was announced.
    pub compute: Nanos,
    /// Of which experts' feed-forward.
    pub expert: Nanos,
    /// The compute thread waited for all-to-alls.
    pub all_to_all_blocked: Nanos,
    /// The compute thread waited for gradients and for the step's closing sum.
    pub all_reduce_blocked: Nanos,
    /// All-to-alls were on the wire, each counted from the moment when all ranks had launched it and the channel
    /// was free to its completion.
    pub all_to_all: Nanos,
    /// Of which in the backward pass.
    pub all_to_all_backward: Nanos,
    /// What the backward pass's all-to-alls take while nothing else is on the wire; 0 where it is not known.
    pub all_to_all_backward_alone: Nanos,
    /// Allreduces were on the wire, counted alike.
    pub all_reduce: Nanos,
    /// What the allreduces take while nothing else is on the wire; 0 where it is not known.
    pub all_reduce_alone: Nanos,
    /// Bytes this rank sent in all-to-alls.
    pub all_to_all_bytes: u64,
    /// Time the brain took to decide, on the wall clock.
    pub deciding_wall: Nanos,
}

impl StepStats {
    pub(crate) fn computed(&mut self, kind: WorkKind, duration: Nanos) {
        self.compute += duration;
        if kind.is_expert() {
            self.expert += duration;
        }
    }

    pub(crate) fn exchanged(&mut self, direction: Direction, duration: Nanos, alone: Nanos, sent_bytes: u64) {
        self.all_to_all += duration;
        self.all_to_all_bytes += sent_bytes;
        if direction == Direction::Backward {
            self.all_to_all_backward += duration;
            self.all_to_all_backward_alone += alone;
        }
    }
}
