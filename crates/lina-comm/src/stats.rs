//! What a step took on one rank.

use crate::{AllToAllKind, Direction, Leg, Nanos, WorkKind};

/// Times of one step on one rank, in nanoseconds of the body's clock (virtual where emulated).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepStats {
    /// From the beginning of the step to its end.
    pub step: Nanos,
    /// Computation that was announced.
    pub compute: Nanos,
    /// Of which experts' feed-forward.
    pub expert: Nanos,
    /// Of which on tokens, weight gradients excluded.
    pub ffn: Nanos,
    /// Number of the latter's micro-ops: one for each layer, direction and chunk.
    pub ffn_micro_ops: u64,
    /// The compute thread waited for all-to-alls.
    pub all_to_all_blocked: Nanos,
    /// The compute thread waited for gradients and for the step's closing sum.
    pub all_reduce_blocked: Nanos,
    /// All-to-alls were on the wire, each counted from the moment when all ranks had launched it and the channel
    /// was free to its completion.
    pub all_to_all: Nanos,
    /// Of which dispatches and combines.
    pub token_exchange: Nanos,
    /// Number of the latter's micro-ops.
    pub token_exchange_micro_ops: u64,
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
    /// Copies between the device's memory and its host's ran, each direction counted by itself; 0 where no device with
    /// memory of its own is emulated.
    pub copy: Nanos,
    /// The compute thread waited for copies.
    pub copy_blocked: Nanos,
    /// Bytes of those copies.
    pub copy_bytes: u64,
    /// Time the brain took to decide, on the wall clock.
    pub deciding_wall: Nanos,
}

impl StepStats {
    /// The times as words, to send them to another process; [`from_words`](Self::from_words) is the way back.
    pub fn to_words(&self) -> Vec<u64> {
        let mut stats = *self;
        stats.fields().into_iter().map(|field| *field).collect()
    }

    /// The times that [`to_words`](Self::to_words) made words of; what is missing is 0.
    pub fn from_words(words: &[u64]) -> Self {
        let mut stats = StepStats::default();
        stats.fields().into_iter().zip(words).for_each(|(field, word)| *field = *word);
        stats
    }

    /// With what somebody else knows of the same step, in other fields.
    pub(crate) fn joined(mut self, mut others: StepStats) -> Self {
        self.fields().into_iter().zip(others.fields()).for_each(|(field, other)| *field += *other);
        self
    }

    /// Every field, of which the compiler sees that none is forgotten.
    fn fields(&mut self) -> [&mut u64; 19] {
        macro_rules! each {
            ($($field:ident),* $(,)?) => {{
                let StepStats { $($field),* } = self;
                [$($field),*]
            }};
        }
        each![
            step,
            compute,
            expert,
            ffn,
            ffn_micro_ops,
            all_to_all_blocked,
            all_reduce_blocked,
            all_to_all,
            token_exchange,
            token_exchange_micro_ops,
            all_to_all_backward,
            all_to_all_backward_alone,
            all_reduce,
            all_reduce_alone,
            all_to_all_bytes,
            copy,
            copy_blocked,
            copy_bytes,
            deciding_wall,
        ]
    }

    pub(crate) fn computed(&mut self, kind: WorkKind, duration: Nanos) {
        self.compute += duration;
        if kind.is_expert() {
            self.expert += duration;
        }
        if kind == WorkKind::ExpertFfn {
            self.ffn += duration;
            self.ffn_micro_ops += 1;
        }
    }

    pub(crate) fn copied(&mut self, duration: Nanos, bytes: u64) {
        self.copy += duration;
        self.copy_bytes += bytes;
    }

    pub(crate) fn exchanged(&mut self, kind: &AllToAllKind, duration: Nanos, alone: Nanos, sent_bytes: u64) {
        self.all_to_all += duration;
        self.all_to_all_bytes += sent_bytes;
        if matches!(kind.leg, Leg::Dispatch | Leg::Combine) {
            self.token_exchange += duration;
            self.token_exchange_micro_ops += 1;
        }
        if kind.direction == Direction::Backward {
            self.all_to_all_backward += duration;
            self.all_to_all_backward_alone += alone;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_know_of_a_step_is_joined() {
        let computation = StepStats { step: 9, compute: 5, copy_bytes: 7, ..StepStats::default() };
        let communication = StepStats { all_to_all: 4, deciding_wall: 2, ..StepStats::default() };
        let both = computation.joined(communication);
        assert_eq!(both, StepStats { all_to_all: 4, deciding_wall: 2, ..computation });
        assert_eq!(StepStats::from_words(&both.to_words()), both);
    }
}
