//! The brain of inference: which experts will be popular, and where their weights should be.
//!
//! A batch's tokens are known to prefer few of a layer's experts, others in every layer and batch. Devices keep a
//! bounded number of experts in *slots*, filled by copies from host memory, where every device has all of them. A layer
//! is planned in two phases ("Accelerating Distributed MoE Training and Inference with Lina", USENIX ATC 2023): from an
//! estimate while the layer before computes, and again from the real choices if the estimate was wrong.
//!
//! | question | answered by |
//! |---|---|
//! | which experts will a token choose next? | [`PathTables`], [`History`] |
//! | how good was the estimate? | [`AccuracyMeter`] |
//! | which device serves which expert? | [`ExpertPlacement`], [`PlacementPolicy`] |
//! | which replica computes which rows? | [`TokenShares`] |
//! | what happens when? | [`ExpertScheduler`], [`Horizon`] |

mod accuracy;
mod horizon;
mod paths;
mod placement;
mod popularity;
mod two_phase;

pub use accuracy::{AccuracyMeter, LayerAccuracy, overlap, same_top_experts, token_accuracy, top_experts};
pub use horizon::Horizon;
pub use paths::{Following, PathArrays, PathError, PathTables, PathTablesBuilder};
pub use placement::{
    Adaptation, CopyTerms, ExpertPlacement, LayerLoads, PlacementCosts, PlacementError, PlacementPolicy, Share,
    SlotCopy, TokenShares, adapt, best_placement, eplb, first_fit, makespan_bound_ns,
};
pub use popularity::{Estimator, History};
pub use two_phase::{ExpertScheduler, ExpertSchedulerSettings, Settlement};
