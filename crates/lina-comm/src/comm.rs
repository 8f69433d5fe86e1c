//! The handle of a rank's compute thread.

use std::ops::Range;
use std::sync::Arc;

use lina_plan::{GapPlan, GapTimings, GroupId, LinkUse, MoeShape, Nanos, PolicyRules};

use crate::buffer::Region;
use crate::copies::{CopyDirection, CopyLanes, CopyTicket, CopyTimes, HostCopy};
#[cfg(feature = "nccl")]
use crate::device::DeviceClock;
use crate::exchange::AnyExchange;
#[cfg(feature = "nccl")]
use crate::exchange::DeviceExchange;
use crate::solo::Solo;
use crate::stats::StepStats;
use crate::{CommError, Exchange, SharedBuffer, Span, Work};

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
    AllToAll(AnyExchange),
    /// A gradient is ready.
    Gradient { group: GroupId, elements: usize, region: Option<Region> },
    /// No more all-to-alls and gradients in this step.
    Flush,
    /// A small blocking sum over all ranks.
    Control(Vec<f64>),
    /// Other reduction groups from here on, between two steps: for the body, the brain need not know.
    Groups(Arc<Vec<Vec<usize>>>),
}

/// One rank's side of a body: takes submissions, keeps the clock.
pub(crate) trait Port: Send {
    fn now(&self) -> Nanos;
    fn work(&mut self, work: Work) -> Result<(), CommError>;
    /// Ends the announced computation; when that was.
    fn end_work(&mut self) -> Nanos;
    /// From now on computation is a GPU's: it has happened when its stream has come as far.
    #[cfg(feature = "nccl")]
    fn set_device(&mut self, clock: DeviceClock);
    /// Notes a copy that runs beside everything else.
    fn copied(&mut self, copy: &HostCopy, times: CopyTimes);
    /// Waits for the moment at which copies end.
    fn wait_copies(&mut self, end: Nanos) -> Result<(), CommError>;
    fn submit(&mut self, submission: Submission) -> Result<(), CommError>;
    fn wait_all_to_all(&mut self, index: u32) -> Result<AnyExchange, CommError>;
    /// Whether the job goes on.
    fn check(&self) -> Result<(), CommError> {
        Ok(())
    }
    /// Waits for every gradient of the step.
    fn wait_gradients(&mut self) -> Result<(), CommError>;
    fn wait_control(&mut self) -> Result<Vec<f64>, CommError>;
    /// What the brain wants to know of the step.
    fn timings(&self) -> GapTimings;
    /// What the step has taken so far.
    fn stats(&self) -> StepStats;
    /// Ends the step: what it took.
    fn end_step(&mut self) -> StepStats;
    /// Turns recording of spans on or off and takes what was recorded.
    fn record(&mut self, on: bool) -> Vec<Span>;
    /// Says whether this rank has long work on the host, for which the others wait as long as it takes; returns what it said
    /// before.
    fn set_busy(&mut self, busy: bool) -> bool;
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
    groups: Arc<Vec<Vec<usize>>>,
    next_plan: GapPlan,
    /// All-to-alls submitted in this step.
    all_to_alls: u32,
    /// Of which not yet waited for.
    unclaimed: u32,
    /// Whether this micro-batch's gradients are reduced.
    reduces: bool,
    timings: GapTimings,
    /// From the timings that all ranks agreed on last.
    link_use: Option<LinkUse>,
    /// Where the device is an emulated one with memory of its own.
    copies: Option<CopyLanes>,
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
            groups: Arc::new(groups.to_vec()),
            next_plan: GapPlan::default(),
            all_to_alls: 0,
            unclaimed: 0,
            reduces: true,
            timings: GapTimings::default(),
            link_use: None,
            copies: None,
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

    /// From now on computation is what the stream of `clock` is given: it is timed there, and exchanges and gradients of
    /// device memory are handed over while they are still being computed. Comes before the first step.
    ///
    /// # Panics
    /// On the emulated cluster, whose time is not a device's.
    #[cfg(feature = "nccl")]
    pub fn set_device(&mut self, clock: DeviceClock) {
        self.port.set_device(clock);
    }

    /// Announces the computation that follows, until the next call on this handle.
    ///
    /// # Errors
    /// If the job has failed elsewhere.
    pub fn work(&mut self, work: Work) -> Result<(), CommError> {
        self.port.work(work)
    }

    /// From now on, copies between the device's memory and its host's take their bytes over `gbps` Gbit/s each way.
    /// Before, they take no time: a processor computes from its host's memory.
    pub fn emulate_copies(&mut self, gbps: f64) {
        self.copies = Some(CopyLanes::new(gbps));
    }

    /// Begins a copy as soon as those before it in its direction are done; returns at once. The computation that was
    /// announced last is over then.
    pub fn copy(&mut self, copy: HostCopy) -> CopyTicket {
        let Some(lanes) = &mut self.copies else { return CopyTicket(0) };
        let times = lanes.begin(self.port.end_work(), &copy);
        self.port.copied(&copy, times);
        CopyTicket(times.end)
    }

    /// How long from now a copy still takes.
    pub fn copy_remaining(&self, ticket: &CopyTicket) -> Nanos {
        if self.copies.is_some() { ticket.0.saturating_sub(self.port.now()) } else { 0 }
    }

    /// Waits for a copy.
    ///
    /// # Errors
    /// If the job has failed elsewhere.
    pub fn wait_copy(&mut self, ticket: CopyTicket) -> Result<(), CommError> {
        if self.copies.is_some() { self.port.wait_copies(ticket.0) } else { Ok(()) }
    }

    /// Hands over one all-to-all micro-op; returns at once. Launches at once under every policy. Every ticket is waited
    /// for before the next step begins, in any order.
    ///
    /// # Errors
    /// If the job has failed elsewhere.
    ///
    /// # Panics
    /// If the exchange's counts and buffers contradict each other.
    pub fn all_to_all(&mut self, exchange: Exchange) -> Result<Ticket, CommError> {
        self.exchange(AnyExchange::Host(exchange))
    }

    /// As [`all_to_all`](Self::all_to_all), on device memory; give the ticket to
    /// [`wait_on_device`](Self::wait_on_device). What is sent may still be being computed.
    ///
    /// # Errors
    /// If the job has failed elsewhere.
    ///
    /// # Panics
    /// If the exchange's counts and buffers contradict each other.
    #[cfg(feature = "nccl")]
    pub fn all_to_all_on_device(&mut self, exchange: DeviceExchange) -> Result<Ticket, CommError> {
        self.exchange(AnyExchange::Device(exchange))
    }

    fn exchange(&mut self, exchange: AnyExchange) -> Result<Ticket, CommError> {
        exchange.check(self.ranks);
        self.port.submit(Submission::AllToAll(exchange))?;
        self.all_to_alls += 1;
        self.unclaimed += 1;
        Ok(Ticket(self.all_to_alls - 1))
    }

    /// Waits for an all-to-all and returns its buffers, the received part filled.
    ///
    /// # Errors
    /// If a rank fails or falls silent.
    pub fn wait(&mut self, ticket: Ticket) -> Result<Exchange, CommError> {
        let exchange = self.port.wait_all_to_all(ticket.0)?;
        self.unclaimed -= 1;
        Ok(exchange.into_host())
    }

    /// Waits until an all-to-all of device memory is under way and returns its buffers. What is enqueued on the compute stream
    /// from here on sees the received part complete: the device waits for it, not the host.
    ///
    /// # Errors
    /// If a rank has failed or fallen silent. Where that happens before the all-to-all is complete, it is given up, and what is
    /// read from the device may be anything: [`check`](Self::check) says so.
    ///
    /// # Panics
    /// If the ticket is of an all-to-all of host memory.
    #[cfg(feature = "nccl")]
    pub fn wait_on_device(&mut self, ticket: Ticket) -> Result<DeviceExchange, CommError> {
        let exchange = self.port.wait_all_to_all(ticket.0)?;
        self.unclaimed -= 1;
        match exchange {
            AnyExchange::Device(exchange) => Ok(exchange),
            AnyExchange::Host(exchange) => panic!("{} is of host memory", exchange.kind),
        }
    }

    /// Whether the job goes on: to be asked before anything is made of what was read from a device behind an all-to-all.
    ///
    /// # Errors
    /// Why it does not.
    pub fn check(&self) -> Result<(), CommError> {
        self.port.check()
    }

    /// Hands over a finished gradient to be summed over its group, in rank order (on engine `nccl` in an order of NCCL's,
    /// unless asked otherwise); returns at once. Before the last micro-batch of a step the gradient stays with the caller,
    /// who need not know which one that is.
    ///
    /// # Errors
    /// If the job has failed elsewhere.
    ///
    /// # Panics
    /// If there is no such group, if `local` is given on a rank outside the group or missing on one inside, if its
    /// length is not `elements`, or if a part of it is being reduced already.
    pub fn reduce_gradient(&mut self, gradient: GradientRegion<'_>) -> Result<(), CommError> {
        let (rank, group) = (self.rank, gradient.group.0);
        let member = self.groups.get(group as usize).map(|members| members.contains(&rank));
        assert_eq!(Some(gradient.local.is_some()), member, "rank {rank} reduces memory of its own in group {group}");
        let region = gradient.local.and_then(|(buffer, range)| {
            assert_eq!(range.len(), gradient.elements, "a gradient has the same size on all ranks");
            // What is not reduced is not lent either: the next micro-batch adds to it, perhaps before the
            // communication thread has looked at this one.
            self.reduces.then(|| buffer.lend(range))
        });
        self.port.submit(Submission::Gradient { group: gradient.group, elements: gradient.elements, region })
    }

    /// Begins a step.
    ///
    /// # Errors
    /// If the job has failed elsewhere.
    ///
    /// # Panics
    /// If an all-to-all of the last step has not been waited for.
    pub fn begin_step(&mut self, step: u64) -> Result<(), CommError> {
        let plan = std::mem::take(&mut self.next_plan);
        self.begin(step, plan)
    }

    /// Begins forward passes without gradients, between two steps; end with [`end_step`](Self::end_step). The plan
    /// of the next step stands.
    ///
    /// # Errors
    /// If the job has failed elsewhere.
    ///
    /// # Panics
    /// If an all-to-all of the last step has not been waited for.
    pub fn begin_evaluation(&mut self, step: u64) -> Result<(), CommError> {
        self.begin(step, GapPlan::default())
    }

    fn begin(&mut self, step: u64, plan: GapPlan) -> Result<(), CommError> {
        // Tickets count within a step: one left over would be taken for the next step's.
        assert_eq!(self.unclaimed, 0, "rank {} begins step {step} with all-to-alls that nobody waited for", self.rank);
        self.all_to_alls = 0;
        self.reduces = true;
        self.port.submit(Submission::BeginStep { step, rules: self.rules, plan })
    }

    /// Begins a micro-batch; `last` if it is the step's last one, whose gradients are reduced.
    ///
    /// # Errors
    /// If the job has failed elsewhere.
    pub fn begin_micro_batch(&mut self, last: bool) -> Result<(), CommError> {
        self.reduces = last;
        self.port.submit(Submission::BeginMicroBatch { last })
    }

    /// Says that backward is over, and waits for every gradient of the step, those on their way to host memory
    /// included.
    ///
    /// # Errors
    /// If a rank fails or falls silent.
    pub fn finish_gradients(&mut self) -> Result<(), CommError> {
        self.port.submit(Submission::Flush)?;
        self.port.wait_gradients()?;
        match &self.copies {
            Some(lanes) => self.port.wait_copies(lanes.free(CopyDirection::ToHost)),
            None => Ok(()),
        }
    }

    /// Sums `values` over all ranks, in rank order, the same bits on all: norms, losses, flags. The step's timings
    /// travel along, and the next step's plan is made from their sum, so that all ranks hold the same. Comes after
    /// [`finish_gradients`](Self::finish_gradients), which completes those timings.
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
        self.next_plan = GapPlan::new(&self.rules, &agreed, &self.groups);
        self.link_use = agreed.link_use();
        Ok(())
    }

    /// What the last step's agreed timings say of the link; the same on all ranks. `None` before they say enough.
    pub fn link_use(&self) -> Option<LinkUse> {
        self.link_use
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

    /// What the step has taken so far. After [`finish_gradients`](Self::finish_gradients) its all-to-alls, gradients
    /// and experts' work are complete.
    pub fn stats(&self) -> StepStats {
        self.port.stats()
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

    /// Changes the reduction groups from the next step on, because experts have other holders; every rank does so
    /// between the same two steps, with the same `groups` (members ascending, group 0 all ranks). What was measured of
    /// gradients is forgotten: there are others now.
    ///
    /// # Errors
    /// If the job has failed elsewhere.
    ///
    /// # Panics
    /// If group 0 is not all ranks, or an all-to-all has not been waited for.
    pub fn set_groups(&mut self, groups: &[Vec<usize>]) -> Result<(), CommError> {
        assert!(groups.first().is_some_and(|all| all.iter().copied().eq(0..self.ranks)), "group 0 is all ranks");
        assert_eq!(self.unclaimed, 0, "groups change between steps");
        self.groups = Arc::new(groups.to_vec());
        self.port.submit(Submission::Groups(Arc::clone(&self.groups)))?;
        self.timings = GapTimings::default();
        self.next_plan = GapPlan::default();
        Ok(())
    }

    /// Turns recording of spans on or off and takes what was recorded.
    pub fn record(&mut self, on: bool) -> Vec<Span> {
        self.port.record(on)
    }

    /// Runs `work` on the host, which may take long, such as reading or writing a checkpoint. Ranks that wait for this one
    /// meanwhile do not take it for silent as long as its process lives; where `work` waits for them, time counts as usual.
    pub fn busy<R>(&mut self, work: impl FnOnce(&mut Comm) -> R) -> R {
        let before = self.port.set_busy(true);
        let result = work(self);
        self.port.set_busy(before);
        result
    }

    /// Tells the other ranks that this one failed, so that their waits return.
    pub fn fail(&mut self, reason: String) {
        self.port.fail(reason);
    }
}
