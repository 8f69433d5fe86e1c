//! The communication policies, as data: what distinguishes one from another is a row of switches that the
//! [`Sequencer`](crate::Sequencer), the cutter and the gap planner read. No other code branches on a policy's name.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A communication policy by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Policy {
    /// The baseline of DeepSpeed and PyTorch DDP: fused buckets, everything launched when it is ready.
    Fair,
    /// Whole gradients; an allreduce starts when no all-to-all runs or waits. Once started it cannot be stopped.
    Priority,
    /// Fused buckets; allreduces start only between pairs of all-to-alls.
    Fixed,
    /// Half of the paper's: partitioned micro-ops that fit between pairs of all-to-alls.
    Partition,
    /// The paper's: `partition`, and pipelined all-to-alls.
    Lina,
    /// Ours: `lina` with sizes that it finds by itself ([`Tuner`](crate::Tuner)).
    LinaAuto,
}

impl Policy {
    /// Every policy, in the order in which tables show them.
    pub const ALL: [Policy; 6] =
        [Policy::Fair, Policy::Priority, Policy::Fixed, Policy::Partition, Policy::Lina, Policy::LinaAuto];

    /// The name in configuration files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Fair => "fair",
            Policy::Priority => "priority",
            Policy::Fixed => "fixed",
            Policy::Partition => "partition",
            Policy::Lina => "lina",
            Policy::LinaAuto => "lina-auto",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Policy::ALL.into_iter().find(|policy| policy.name() == name).ok_or_else(|| {
            let names = Policy::ALL.map(Policy::name).join(", ");
            format!("policy `{name}` is unknown, expected one of {names}")
        })
    }
}

/// A policy with or without expert packing: what a comparison has a row of.
///
/// ```
/// use lina_plan::{Policy, Schedule};
/// let schedule: Schedule = "lina+packing".parse().unwrap();
/// assert_eq!(schedule, Schedule { policy: Policy::Lina, packing: true });
/// assert_eq!(schedule.to_string(), "lina+packing");
/// assert_eq!("fair".parse(), Ok(Schedule::from(Policy::Fair)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Schedule {
    /// How gradients and all-to-alls share the network.
    pub policy: Policy,
    /// Whether the experts of a rank are decided as the run goes on.
    pub packing: bool,
}

/// What follows a policy's name where experts are packed.
const PACKING_SUFFIX: &str = "+packing";

impl Schedule {
    /// Every policy without, then every policy with packing.
    pub fn all() -> impl Iterator<Item = Schedule> {
        [false, true].into_iter().flat_map(|packing| Policy::ALL.map(|policy| Schedule { policy, packing }))
    }
}

impl From<Policy> for Schedule {
    fn from(policy: Policy) -> Self {
        Schedule { policy, packing: false }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.policy, if self.packing { PACKING_SUFFIX } else { "" })
    }
}

impl FromStr for Schedule {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let (policy, packing) = match name.strip_suffix(PACKING_SUFFIX) {
            Some(policy) => (policy, true),
            None => (name, false),
        };
        Ok(Schedule { policy: policy.parse()?, packing })
    }
}

/// What a user may set. Bytes are of gradients on one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicySettings {
    /// Size at which fused gradients are reduced (`fair`, `fixed`); PyTorch DDP's default is 25 MB.
    pub bucket_bytes: usize,
    /// Largest allreduce micro-op (`lina`); the paper's value is 30 MB on 100 Gb/s links.
    pub partition_bytes: usize,
    /// Chunks into which `lina` cuts each exchange of an MoE layer, at least 1.
    pub pipeline_chunks: usize,
    /// Whether `lina` computes the weight gradients of an attention layer while the all-to-all of the next MoE layer's
    /// combine is on the wire, instead of before it.
    pub defer_attention_gradients: bool,
    /// Whether `lina`'s all-to-alls go inside a node first, then between nodes; of no effect without nodes.
    pub hierarchical_all_to_all: bool,
}

impl Default for PolicySettings {
    fn default() -> Self {
        PolicySettings {
            bucket_bytes: 25 << 20,
            partition_bytes: 30 << 20,
            pipeline_chunks: 2,
            defer_attention_gradients: false,
            hierarchical_all_to_all: false,
        }
    }
}

/// How gradients become allreduce operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllReduceUnit {
    /// Neighbouring gradients fused until they reach this many bytes.
    Bucket(usize),
    /// Each gradient whole.
    Tensor,
    /// Each gradient cut into equal parts of at most this many bytes; parts of different gradients stay apart.
    Partition(usize),
}

/// When an allreduce may launch, relative to the all-to-alls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GapRule {
    /// As soon as it is ready.
    Eager,
    /// After a pair's second all-to-all, everything that was ready when that all-to-all was submitted.
    BetweenPairs,
    /// In any gap between all-to-alls, as long as the gap is predicted to be still open when it starts.
    StartsInGap,
    /// Only between pairs, and only if it is predicted to finish before the next all-to-all.
    FinishesBetweenPairs,
    /// After backward: all-to-alls and allreduces have the link to themselves, which measures both alone.
    AfterBackward,
}

/// When weight gradients are computed, relative to the next sending of input gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightGradients {
    /// First, as an autograd tape does.
    BeforeSend,
    /// After the last chunk is on its way: the product covers the all-to-all.
    AfterSend,
}

/// The way of an all-to-all's pieces between nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// From every rank to every rank.
    Direct,
    /// To the rank of the own node that has the receiver's place in its node, and from there to the receiver: between
    /// nodes, fewer and larger messages.
    ThroughNode,
}

/// What the body of an MoE layer is told about its exchanges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoeShape {
    /// Number of pipeline chunks, the same on all ranks.
    pub chunks: usize,
    /// Where the experts' weight gradients stand.
    pub weight_gradients: WeightGradients,
    /// Where the attention's weight gradients stand, relative to the combine of the MoE layer that is next in backward.
    pub attention_gradients: WeightGradients,
    /// The way of the pieces.
    pub route: Route,
}

/// A policy spelled out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyRules {
    /// How gradients are cut or fused.
    pub unit: AllReduceUnit,
    /// When an allreduce launches.
    pub gap: GapRule,
    /// How MoE exchanges are cut.
    pub moe: MoeShape,
}

impl PolicyRules {
    /// The switches of `policy` under `settings`.
    pub fn new(policy: Policy, settings: &PolicySettings) -> Self {
        let whole = MoeShape {
            chunks: 1,
            weight_gradients: WeightGradients::BeforeSend,
            attention_gradients: WeightGradients::BeforeSend,
            route: Route::Direct,
        };
        let bucket = AllReduceUnit::Bucket(settings.bucket_bytes);
        let partition = AllReduceUnit::Partition(settings.partition_bytes);
        let (unit, gap, moe) = match policy {
            Policy::Fair => (bucket, GapRule::Eager, whole),
            Policy::Priority => (AllReduceUnit::Tensor, GapRule::StartsInGap, whole),
            Policy::Fixed => (bucket, GapRule::BetweenPairs, whole),
            Policy::Partition => (partition, GapRule::FinishesBetweenPairs, whole),
            Policy::Lina | Policy::LinaAuto => {
                let deferred = settings.defer_attention_gradients;
                let moe = MoeShape {
                    chunks: settings.pipeline_chunks.max(1),
                    weight_gradients: WeightGradients::AfterSend,
                    attention_gradients: if deferred {
                        WeightGradients::AfterSend
                    } else {
                        WeightGradients::BeforeSend
                    },
                    route: if settings.hierarchical_all_to_all { Route::ThroughNode } else { Route::Direct },
                };
                (partition, GapRule::FinishesBetweenPairs, moe)
            }
        };
        PolicyRules { unit, gap, moe }
    }
}
