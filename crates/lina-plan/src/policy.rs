//! The communication policies, as data: what distinguishes one from another is a row of switches that the
//! [`Sequencer`](crate::Sequencer), the cutter and the gap planner read. No other code branches on a policy's name.

use std::fmt;
use std::str::FromStr;

/// A communication policy by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Policy {
    /// The baseline of DeepSpeed and PyTorch DDP: fused buckets, everything launched when it is ready.
    Fair,
    /// Whole gradients; an allreduce starts when no all-to-all runs or waits. Once started it cannot be stopped.
    Priority,
    /// Fused buckets; allreduces start only between pairs of all-to-alls.
    Fixed,
    /// The paper's: partitioned micro-ops that fit between pairs of all-to-alls, and pipelined all-to-alls.
    Lina,
}

impl Policy {
    /// Every policy, in the order in which tables show them.
    pub const ALL: [Policy; 4] = [Policy::Fair, Policy::Priority, Policy::Fixed, Policy::Lina];

    /// The name in configuration files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Fair => "fair",
            Policy::Priority => "priority",
            Policy::Fixed => "fixed",
            Policy::Lina => "lina",
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
        Policy::ALL
            .into_iter()
            .find(|policy| policy.name() == name)
            .ok_or_else(|| format!("policy `{name}` is unknown, expected one of fair, priority, fixed, lina"))
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

/// The sizes a user may set. Bytes are of gradients on one rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicySettings {
    /// Size at which fused gradients are reduced (`fair`, `fixed`); PyTorch DDP's default is 25 MB.
    pub bucket_bytes: usize,
    /// Largest allreduce micro-op (`lina`); the paper's value is 30 MB on 100 Gb/s links.
    pub partition_bytes: usize,
    /// Chunks into which `lina` cuts each exchange of an MoE layer, at least 1.
    pub pipeline_chunks: usize,
}

impl Default for PolicySettings {
    fn default() -> Self {
        PolicySettings { bucket_bytes: 25 << 20, partition_bytes: 30 << 20, pipeline_chunks: 2 }
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
}

/// When an expert's weight gradients are computed, relative to the sending of its input gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightGradients {
    /// First, as an autograd tape does.
    BeforeSend,
    /// After the last chunk is on its way: the product covers the all-to-all.
    AfterSend,
}

/// What the body of an MoE layer is told about its exchanges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoeShape {
    /// Number of pipeline chunks, the same on all ranks.
    pub chunks: usize,
    /// Where the experts' weight gradients stand.
    pub weight_gradients: WeightGradients,
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
        let whole = MoeShape { chunks: 1, weight_gradients: WeightGradients::BeforeSend };
        match policy {
            Policy::Fair => {
                PolicyRules { unit: AllReduceUnit::Bucket(settings.bucket_bytes), gap: GapRule::Eager, moe: whole }
            }
            Policy::Priority => PolicyRules { unit: AllReduceUnit::Tensor, gap: GapRule::StartsInGap, moe: whole },
            Policy::Fixed => PolicyRules {
                unit: AllReduceUnit::Bucket(settings.bucket_bytes),
                gap: GapRule::BetweenPairs,
                moe: whole,
            },
            Policy::Lina => PolicyRules {
                unit: AllReduceUnit::Partition(settings.partition_bytes),
                gap: GapRule::FinishesBetweenPairs,
                moe: MoeShape { chunks: settings.pipeline_chunks.max(1), weight_gradients: WeightGradients::AfterSend },
            },
        }
    }
}
