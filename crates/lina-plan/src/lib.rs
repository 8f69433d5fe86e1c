//! The brain of Lina: every decision about communication, as pure state machines.
//!
//! Nothing here does I/O, reads a clock, starts a thread or knows an engine. Time and events come in as
//! arguments ([`Nanos`], submissions, completions), decisions go out as values ([`Launch`], [`GapPlan`],
//! [`ExpertLayout`]). The runtime and the emulated cluster carry out the same decisions, so a schedule can be
//! unit-tested, replayed from a seed and run for real with one piece of code.
//!
//! | question | answered by |
//! |---|---|
//! | which micro-op launches now? | [`Sequencer`] |
//! | how is a gradient cut or fused? | [`GradientCutter`] |
//! | how many micro-ops fit between two all-to-alls? | [`GapPlan`] |
//! | what distinguishes the policies? | [`PolicyRules`] |
//! | which rank holds which expert? | [`ExpertLayout`] |
//! | how many experts does a rank hold? | [`PackingController`] |
//! | who passes on what in an all-to-all through nodes? | [`Relays`] |
//! | whose experts wait in host memory? | [`Residency`] |
//! | which sizes suit this job? | [`Tuner`] |
//! | which rank, host or link is slow? | [`diagnose`] |
//! | which tokens are in which pipeline chunk? | [`chunk_range`] |
//! | which experts will a token choose next? | [`PathTables`], [`History`] |
//! | which device serves which expert, and which rows? | [`ExpertPlacement`], [`TokenShares`] |
//! | which expert is copied when? | [`ExpertScheduler`] |
//! | which sequences does a step of generation feed? | [`Batcher`] |

mod batching;
mod cutter;
mod diagnosis;
mod gaps;
mod inference;
mod layout;
mod operation;
mod packing;
mod policy;
mod relay;
mod residency;
mod sequencer;
mod split;
mod tuning;

pub use batching::{AdmittedSequence, BatchLimits, BatchStep, Batcher, DoesNotFit, SequenceFeed};
pub use cutter::{GradientCutter, MicroOp};
pub use diagnosis::{Aspect, Finding, PairMeasurements, Place, diagnose, pair_rounds};
pub use gaps::{GapPlan, GapTimings, LinkUse};
pub use inference::{
    AccuracyMeter, Adaptation, CopyTerms, Estimator, ExpertPlacement, ExpertScheduler, ExpertSchedulerSettings,
    Following, History, Horizon, LayerAccuracy, LayerLoads, PathArrays, PathError, PathTables, PathTablesBuilder,
    PlacementCosts, PlacementError, PlacementPolicy, Settlement, Share, SlotCopy, TokenShares, adapt, best_placement,
    eplb, first_fit, makespan_bound_ns, overlap, same_top_experts, token_accuracy, top_experts,
};
pub use layout::{ExpertLayout, LayoutError};
pub use operation::{AllToAllKind, Direction, GroupId, Leg, Nanos};
pub use packing::{PACKING_VALUES, PackingController, PackingForecast, PackingLadder, PackingSample, ReplicaCosts};
pub use policy::{
    AllReduceUnit, GapRule, MoeShape, Policy, PolicyRules, PolicySettings, Route, Schedule, WeightGradients,
};
pub use relay::Relays;
pub use residency::{DeviceMemory, Residency};
pub use sequencer::{Launch, Sequencer};
pub use split::{chunk_range, share_range};
pub use tuning::{TUNING_STEPS, Tuner, TuningSample};

/// The middle value, or the mean of the middle two.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}
