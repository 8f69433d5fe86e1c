//! The vocabulary of a step's communication: what an all-to-all carries and whom an allreduce joins.

use std::fmt;

/// Time since the start of a run, in nanoseconds: the wall clock's or the emulated cluster's, the brain cannot tell.
pub type Nanos = u64;

/// A set of ranks that reduce together. Group 0 is always all ranks; the others are an [`ExpertLayout`]'s replica sets.
///
/// [`ExpertLayout`]: crate::ExpertLayout
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupId(pub u32);

impl GroupId {
    /// All ranks.
    pub const WORLD: GroupId = GroupId(0);
}

/// Whether an operation belongs to a step's forward or backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Activations travel.
    Forward,
    /// Their gradients travel.
    Backward,
}

/// Which of an MoE layer's exchanges an all-to-all is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Leg {
    /// How many tokens each rank will send to each expert: the small exchange that sizes the others.
    Counts,
    /// Tokens to the ranks that hold their experts, or gradients back along the same way.
    Dispatch,
    /// Expert outputs back to their tokens, or gradients out along the same way.
    Combine,
    /// Experts' parameters to the rank that writes a checkpoint, between steps.
    Parameters,
    /// What rank 0 asks of the others in a step of inference, and their answers.
    Requests,
}

/// What one all-to-all micro-op carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AllToAllKind {
    /// Pass of the step.
    pub direction: Direction,
    /// Which exchange of the layer.
    pub leg: Leg,
    /// Layer index in the model.
    pub layer: u32,
    /// Which pipeline chunk, from 0.
    pub chunk: u32,
    /// How many pipeline chunks the exchange is cut into; all ranks agree on it.
    pub chunks: u32,
}

impl AllToAllKind {
    /// Whether no further all-to-all is imminent once this one is done: it is the last chunk of a pair's second
    /// exchange (combine in the forward pass, dispatch in the backward pass), and the next layer's dense
    /// computation follows. Between the two exchanges of a pair another is always about to come.
    pub fn opens_gap(&self) -> bool {
        let second = match self.direction {
            Direction::Forward => Leg::Combine,
            Direction::Backward => Leg::Dispatch,
        };
        self.leg == second && self.chunk + 1 == self.chunks
    }

    /// A short name for traces and launch logs.
    pub fn name(&self) -> &'static str {
        match (self.direction, self.leg) {
            (_, Leg::Counts) => "token counts",
            (_, Leg::Parameters) => "parameters",
            (_, Leg::Requests) => "requests",
            (Direction::Forward, Leg::Dispatch) => "dispatch",
            (Direction::Forward, Leg::Combine) => "combine",
            (Direction::Backward, Leg::Combine) => "combine backward",
            (Direction::Backward, Leg::Dispatch) => "dispatch backward",
        }
    }
}

impl fmt::Display for AllToAllKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} layer {} chunk {}/{}", self.name(), self.layer, self.chunk + 1, self.chunks)
    }
}
