//! How gradients become allreduce micro-ops: fused into buckets, kept whole, or cut into equal parts.

use crate::operation::GroupId;
use crate::policy::AllReduceUnit;
use crate::split::share_range;

const ELEMENT_BYTES: usize = size_of::<f32>();

/// One allreduce operation: the next `elements` of the stream of gradients handed over for `group`.
///
/// Gradients are a stream per group, so a micro-op is a range of it: the body neither copies nor decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MicroOp {
    /// The ranks that reduce.
    pub group: GroupId,
    /// Elements of 4 bytes.
    pub elements: usize,
}

/// Cuts the gradients of a step, in the order in which backward finishes them.
///
/// ```
/// use lina_plan::{AllReduceUnit, GradientCutter, GroupId};
/// let mut cutter = GradientCutter::new(AllReduceUnit::Partition(400));
/// let mut sizes = Vec::new();
/// cutter.push(GroupId::WORLD, 250, &mut |op| sizes.push(op.elements));
/// assert_eq!(sizes, [83, 83, 84]);
/// ```
#[derive(Clone, Debug)]
pub struct GradientCutter {
    unit: AllReduceUnit,
    /// Elements that wait for their bucket to fill, per group.
    pending: Vec<usize>,
}

impl GradientCutter {
    /// A cutter with empty buckets.
    pub fn new(unit: AllReduceUnit) -> Self {
        GradientCutter { unit, pending: Vec::new() }
    }

    /// A gradient of `elements` elements is ready; `emit` gets the micro-ops that are complete with it.
    pub fn push(&mut self, group: GroupId, elements: usize, emit: &mut impl FnMut(MicroOp)) {
        if elements == 0 {
            return;
        }
        match self.unit {
            AllReduceUnit::Tensor => emit(MicroOp { group, elements }),
            AllReduceUnit::Partition(bytes) => {
                let parts = (elements * ELEMENT_BYTES).div_ceil(bytes.max(ELEMENT_BYTES));
                for part in 0..parts {
                    emit(MicroOp { group, elements: share_range(elements, parts, part).len() });
                }
            }
            AllReduceUnit::Bucket(bytes) => {
                let slot = group.0 as usize;
                if self.pending.len() <= slot {
                    self.pending.resize(slot + 1, 0);
                }
                self.pending[slot] += elements;
                if self.pending[slot] * ELEMENT_BYTES >= bytes {
                    emit(MicroOp { group, elements: std::mem::take(&mut self.pending[slot]) });
                }
            }
        }
    }

    /// Backward is over: the buckets that did not fill are emitted, by group.
    pub fn flush(&mut self, emit: &mut impl FnMut(MicroOp)) {
        for (slot, pending) in self.pending.iter_mut().enumerate() {
            if *pending > 0 {
                emit(MicroOp { group: GroupId(slot as u32), elements: std::mem::take(pending) });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut(unit: AllReduceUnit, gradients: &[(u32, usize)]) -> Vec<(u32, usize)> {
        let mut cutter = GradientCutter::new(unit);
        let mut ops = Vec::new();
        let mut emit = |op: MicroOp| ops.push((op.group.0, op.elements));
        for &(group, elements) in gradients {
            cutter.push(GroupId(group), elements, &mut emit);
        }
        cutter.flush(&mut emit);
        ops
    }

    #[test]
    fn buckets_fuse_within_a_group_and_never_split() {
        let ops = cut(AllReduceUnit::Bucket(400), &[(0, 60), (1, 10), (0, 60), (0, 300), (1, 5), (0, 1)]);
        assert_eq!(ops, [(0, 120), (0, 300), (0, 1), (1, 15)]);
    }

    #[test]
    fn partitions_are_equal_and_keep_gradients_apart() {
        let ops = cut(AllReduceUnit::Partition(400), &[(0, 60), (0, 301), (1, 100)]);
        assert_eq!(ops, [(0, 60), (0, 75), (0, 75), (0, 75), (0, 76), (1, 100)]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_reduced_twice(
            gradients in prop::collection::vec((0u32..3, 0usize..5000), 0..40),
            bytes in 1usize..9000,
        ) {
            for unit in [AllReduceUnit::Tensor, AllReduceUnit::Partition(bytes), AllReduceUnit::Bucket(bytes)] {
                let ops = cut(unit, &gradients);
                for group in 0..3 {
                    let sum = |of: &[(u32, usize)]| -> usize {
                        of.iter().filter(|(g, _)| *g == group).map(|(_, n)| n).sum()
                    };
                    prop_assert_eq!(sum(&ops), sum(&gradients));
                }
                prop_assert!(ops.iter().all(|&(_, n)| n > 0));
            }
        }
    }
}
