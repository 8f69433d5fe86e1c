//! The handle of a rank's compute thread.

use std::ops::Range;

use lina_plan::{GapPlan, GapTimings, GroupId, MoeShape, Nanos, PolicyRules};

use crate::{CommError, Exchange, SharedBuffer, Span, Work, buffer::Region, solo::Solo, stats::StepStats};

/// An all-to-all under way; give it to [`Comm::wait`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "an all-to-all must be waited for, or its buffers are lost"]
pub struct Ticket(pub(crate) u32);

/// A finished gradient, to be summed over a group of ranks.
#[derive(Debug)]
pub struct GradientRegion<'a> {
    /// The ranks that hold the parameter.
    pub group: GroupId,
    /// Elements, the same on all ranks, members or not.
    pub elements: usize,
    /// Where this rank holds it; `None` on ranks outside the group, which submit too so that every rank counts the
    /// same operations.
    pub local: Option<(&'a mut SharedBuffer, Range<usize>)>,
}

/// What a compute thread hands to whatever carries out its communication.
#[derive(Debug)]
pub(crate) enum Submission {
    /// A step begins, with the rules and the plan that all ranks agreed on.
    BeginStep { step: u64, rules: PolicyRules, plan: GapPlan },
    /// A micro-batch begins; only the last one of a step reduces its gradients.
    BeginMicroBatch { last: bool },
    /// One all-to-all micro-op.
    AllToAll(Exchange),
    /// A gradient is ready.
    Gradient { group: GroupId, elements: usize, region: Option<Region> },
    /// No more all-to-alls and gradients in this step.
    Flush,
    /// A small blocking sum over all ranks.
    Control(Vec<f64>),
}

/// One rank's side of a body: takes submissions, keeps the clock.
pub(crate) trait Port: Send {
    fn now(&self) -> Nanos;
    fn work(&mut self, work: Work) -> Result<(), CommError>;
    fn submit(&mut self, submission: Submission) -> Result<(), CommError>;
    fn wait_all_to_all(&mut self, index: u32) -> Result<Exchange, CommError>;
    /// Waits for every gradient of the step.
    fn wait_gradients(&mut self) -> Result<(), CommError>;
    fn wait_control(&mut self) -> Result<Vec<f64>, CommError>;
    /// What the brain wants to know of the step.
    fn timings(&self) -> GapTimings;
    /// Ends the step: what it took.
    fn end_step(&mut self) -> StepStats;
    /// Turns recording of spans on or off and takes what was recorded.
    fn record(&mut self, on: bool) -> Vec<Span>;
    /// Tells the other ranks that this one failed.
    fn fail(&mut self, reason: String);
}

/// One rank's access to its job: owned by the rank's compute thread.
///
/// A step is: [`begin_step`](Self::begin_step), for each micro-batch
/// [`begin_micro_batch`](Self::begin_micro_batch) and its all-to-alls and gradients, then
/// [`finish_gradients`](Self::finish_gradients), [`agree`](Self::agree) and [`end_step`](Self::end_step).
pub struct Comm {
    port: Box<dyn Port>,
    rank: usize,
    ranks: usize,
    rules: PolicyRules,
    /// Members of each group.
    groups: Vec<usize>,
    next_plan: GapPlan,
    all_to_alls: u32,
    timings: GapTimings,
}

impl Comm {
    pub(crate) fn new(
        port: Box<dyn Port>,
        rank: usize,
        ranks: usize,
        rules: PolicyRules,
        groups: &[Vec<usize>],
    ) -> Self {
        Comm {
            port,
            rank,
            ranks,
            rules,
            groups: groups.iter().map(Vec::len).collect(),
            next_plan: GapPlan::default(),
            all_to_alls: 0,
            timings: GapTimings::default(),
        }
    }

    /// A job of one rank: nothing is exchanged, gradients are final at once.
    pub fn solo() -> Self {
        let rules = PolicyRules::new(lina_plan::Policy::Fair, &lina_plan::PolicySettings::default());
        Comm::new(Box::new(Solo::new()), 0, 1, rules, &[vec![0]])
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// How MoE layers cut and order their exchanges under the current policy.
    pub fn moe_shape(&self) -> MoeShape {
        self.rules.moe
    }

    /// Time since the start of the run; virtual where emulated.
    pub fn now(&self) -> Nanos {
        self.port.now()
    }

    /// Announces the computation that follows, until the next call on this handle.
    ///
    /// # Errors
    /// If the job has failed elsewhere.
    pub fn work(&mut self, work: Work) -> Result<(), CommError> {
        self.port.work(work)
    }

    /// Hands over one all-to-all micro-op; returns at once. Launches at once under every policy.
    ///
    /// # Errors
    /// If the job has failed elsewhere.
    pub fn all_to_all(&mut self, exchange: Exchange) -> Result<Ticket, CommError> {
        exchange.check(self.ranks);
        self.port.submit(Submission::AllToAll(exchange))?;
        self.all_to_alls += 1;
        Ok(Ticket(self.all_to_alls - 1))
    }

    /// Waits for an all-to-all and returns its buffers, the received part filled.
    ///
    /// # Errors
    /// If a rank fails or falls silent.
    pub fn wait(&mut self, ticket: Ticket) -> Result<Exchange, CommError> {
        self.port.wait_all_to_all(ticket.0)
    }

    /// Hands over a finished gradient to be summed over its group, in rank order; returns at once. Before the last
    /// micro-batch of a step it does nothing, so that the caller need not know which one that is.
    ///
    /// # Errors
    /// If the job has failed elsewhere.
    pub fn reduce_gradient(&mut self, gradient: GradientRegion<'_>) -> Result<(), CommError> {
        let region = gradient.local.map(|(buffer, range)| {
            assert_eq!(range.len(), gradient.elements, "a gradient has the same size on all ranks");
            buffer.lend(range)
        });
        self.port.submit(Submission::Gradient { group: gradient.group, elements: gradient.elements, region })
    }

    /// Begins a step.
    ///
    /// # Errors
    /// If the job has failed elsewhere.
    pub fn begin_step(&mut self, step: u64) -> Result<(), CommError> {
        self.all_to_alls = 0;
        let plan = std::mem::take(&mut self.next_plan);
        self.port.submit(Submission::BeginStep { step, rules: self.rules, plan })
    }

    /// Begins forward passes without gradients, between two steps; end with [`end_step`](Self::end_step). The plan
    /// of the next step stands.
    ///
    /// # Errors
    /// If the job has failed elsewhere.
    pub fn begin_evaluation(&mut self, step: u64) -> Result<(), CommError> {
        self.all_to_alls = 0;
        self.port.submit(Submission::BeginStep { step, rules: self.rules, plan: GapPlan::default() })
    }

    /// Begins a micro-batch; `last` if it is the step's last one, whose gradients are reduced.
    ///
    /// # Errors
    /// If the job has failed elsewhere.
    pub fn begin_micro_batch(&mut self, last: bool) -> Result<(), CommError> {
        self.port.submit(Submission::BeginMicroBatch { last })
    }

    /// Says that backward is over, and waits for every gradient of the step.
    ///
    /// # Errors
    /// If a rank fails or falls silent.
    pub fn finish_gradients(&mut self) -> Result<(), CommError> {
        self.port.submit(Submission::Flush)?;
        self.port.wait_gradients()
    }

    /// Sums `values` over all ranks, in rank order, the same bits on all: norms, losses, flags. The step's timings
    /// travel along, and the next step's plan is made from their sum, so that all ranks hold the same.
    ///
    /// # Errors
    /// If a rank fails or falls silent.
    pub fn agree(&mut self, values: &mut [f64]) -> Result<(), CommError> {
        self.timings.update(&self.port.timings());
        let mut message = values.to_vec();
        self.timings.encode(&mut message);
        self.port.submit(Submission::Control(message))?;
        let sum = self.port.wait_control()?;
        values.copy_from_slice(&sum[..values.len()]);
        let agreed = self.timings.decode_sum(&sum[values.len()..], &self.groups);
        self.next_plan = GapPlan::new(&self.rules, &agreed);
        Ok(())
    }

    /// Sums `values` over all ranks outside of a step (evaluation, checkpoints).
    ///
    /// # Errors
    /// If a rank fails or falls silent.
    pub fn sum(&mut self, values: &mut [f64]) -> Result<(), CommError> {
        self.port.submit(Submission::Control(values.to_vec()))?;
        values.copy_from_slice(&self.port.wait_control()?);
        Ok(())
    }

    /// Ends the step, after the parameter update: what it took.
    pub fn end_step(&mut self) -> StepStats {
        self.port.end_step()
    }

    /// Switches the policy from the next step on; every rank does so before the same step.
    pub fn set_rules(&mut self, rules: PolicyRules) {
        self.rules = rules;
        self.timings = GapTimings::default();
        self.next_plan = GapPlan::default();
    }

    /// Turns recording of spans on or off and takes what was recorded.
    pub fn record(&mut self, on: bool) -> Vec<Span> {
        self.port.record(on)
    }

    /// Tells the other ranks that this one failed, so that their waits return.
    pub fn fail(&mut self, reason: String) {
        self.port.fail(reason);
    }
}
