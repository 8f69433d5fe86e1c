//! Carries the brain's decisions about experts out: makes this rank's estimates, keeps the copies into slots under way,
//! and counts what came of it.
//!
//! Where to place what is decided by [`ExpertScheduler`], alike on every rank, from what all ranks have told each other.
//! A processor computes from host memory, so a copy takes time only where a device is emulated; the slots are kept all
//! the same, and an expert that is in none is never used. On a GPU copies are real ([`SlotCopies`]).

use std::sync::Arc;
use std::time::Instant;

use lina_comm::{Comm, Work, WorkKind};
use lina_plan::{Estimator, ExpertScheduler, History, Horizon, PathTables, SlotCopy, TokenShares};

use super::slot_copies::{Overwrite, SlotCopies};
use super::stats::InferenceStats;
use crate::batch::StepError;
use crate::config::ModelConfig;

/// Where a layer's popularity is known from before its gate has spoken.
#[derive(Clone, Debug, Default)]
pub enum Forecast {
    /// It is not.
    #[default]
    None,
    /// From the experts that a token chose before (the paper's).
    Path(Arc<PathTables>),
    /// From the next layer's gate on the hidden state that enters this layer's experts.
    NextGate,
    /// From the batches before: what one counts beside the next in the moving average.
    History(f64),
    /// Told with each batch, for every layer with experts: `[experts]` each.
    Oracle,
}

impl Forecast {
    /// Which estimator this is.
    pub fn estimator(&self) -> Option<Estimator> {
        match self {
            Forecast::None => None,
            Forecast::Path(_) => Some(Estimator::Path),
            Forecast::NextGate => Some(Estimator::NextGate),
            Forecast::History(_) => Some(Estimator::History),
            Forecast::Oracle => Some(Estimator::Oracle),
        }
    }

    /// Whether every rank has a part of the estimate, to be summed.
    fn is_spread(&self) -> bool {
        matches!(self, Forecast::Path(_) | Forecast::NextGate)
    }
}

/// Numbers beside the estimate in a rank's message: how long it still waits for copies, and how long before a layer
/// its placement was last known.
const TIMES: usize = 2;
/// Weight of the newest measurement in running means.
const NEWEST: f64 = 0.3;

#[derive(Debug)]
pub(crate) struct ExpertDirector<C> {
    scheduler: ExpertScheduler,
    /// Into this rank's slots.
    pub copies: C,
    forecast: Forecast,
    /// What a decision that a layer waits for takes, in operations of an emulated device.
    planning_flops: u64,
    expert_bytes: u64,
    experts: usize,
    top_k: usize,
    /// Layer index of each MoE layer.
    layers: Vec<usize>,
    /// Whether the layer that was settled last waits for copies into its slots.
    waits: bool,
    /// When the last placement was prepared in this pass.
    prepared: Option<u64>,
    /// How long before a layer its placement is known, on this rank, a running mean in nanoseconds; then the longest
    /// of all ranks.
    lead_ns: f64,
    agreed_lead_ns: f64,
    /// The longest that a rank waits for copies under way, in nanoseconds.
    wait_ns: f64,
    /// Moving averages, for each layer.
    histories: Vec<History>,
    /// True popularity of the batch, for [`Forecast::Oracle`].
    truth: Vec<Vec<f64>>,
    /// `[tokens, layers]`: first choices so far.
    paths: Vec<u32>,
    /// `[tokens, top_k]`: choices expected of the next layer; empty if there is no such forecast.
    predicted: Vec<u32>,
    /// `[experts]`: this rank's estimate of the next layer, then the sum of all ranks'.
    estimate: Vec<f32>,
    /// For each layer, the estimate that it was prepared with and has not been compared yet.
    estimates: Vec<Option<Vec<f64>>>,
    /// Assignments of all ranks in the layer that was settled last.
    rows: f64,
    pub stats: InferenceStats,
}

impl<C: SlotCopies> ExpertDirector<C> {
    pub fn new(
        config: &ModelConfig,
        scheduler: ExpertScheduler,
        forecast: Forecast,
        planning_flops: u64,
        expert_bytes: u64,
        devices: usize,
        copies: C,
    ) -> Self {
        let layers = config.moe_layers();
        let decay = match forecast {
            Forecast::History(decay) => decay,
            _ => 1.0 - NEWEST,
        };
        ExpertDirector {
            scheduler,
            copies,
            forecast,
            planning_flops,
            expert_bytes,
            experts: config.experts,
            top_k: config.top_k,
            layers: (0..layers).map(|number| config.moe_layer(number)).collect(),
            waits: false,
            prepared: None,
            lead_ns: 0.0,
            agreed_lead_ns: 0.0,
            wait_ns: 0.0,
            histories: (0..layers).map(|_| History::new(config.experts, decay)).collect(),
            truth: Vec::new(),
            paths: Vec::new(),
            predicted: Vec::new(),
            estimate: vec![0.0; config.experts],
            estimates: vec![None; layers],
            rows: 0.0,
            stats: InferenceStats::new(layers, config.experts, devices),
        }
    }

    /// A pass of `tokens` local tokens begins. `truth` is what [`Forecast::Oracle`] goes by.
    pub fn begin(&mut self, comm: &mut Comm, tokens: usize, truth: Option<&[Vec<f64>]>) -> Result<(), StepError> {
        self.paths.clear();
        self.paths.resize(tokens * self.layers.len(), 0);
        self.predicted.clear();
        self.prepared = None;
        self.truth.clear();
        self.truth.extend_from_slice(truth.unwrap_or_default());
        let planned = Instant::now();
        let changes = self.scheduler.begin_batch();
        self.stats.planned(planned.elapsed());
        for (number, copies) in changes {
            self.begin_copies(comm, number, &copies, Overwrite::Now)?;
        }
        Ok(())
    }

    /// Whether [`observe`](Self::observe) is to be told what the gate of the next layer chooses on the hidden state that
    /// enters the experts of layer `number`.
    pub fn asks_next_gate(&self, number: usize) -> bool {
        matches!(self.forecast, Forecast::NextGate) && number + 1 < self.layers.len()
    }

    /// The gate has spoken: `index` is `[tokens, top_k]`. Looks what had been expected of it, and makes this rank's
    /// estimate of the next layer's popularity; `next_gate` is what that layer's gate says, if it was asked.
    pub fn observe(&mut self, number: usize, index: &[u32], next_gate: &[u32]) {
        let top_k = self.top_k;
        if !self.predicted.is_empty() {
            self.stats.compare_tokens(number, &self.predicted, index, top_k);
        }
        for (path, choices) in self.paths.chunks_exact_mut(self.layers.len()).zip(index.chunks_exact(top_k)) {
            path[number] = choices[0];
        }
        self.predicted.clear();
        let next = number + 1;
        if next == self.layers.len() || !self.forecast.is_spread() {
            return;
        }
        let begun = Instant::now();
        match &self.forecast {
            Forecast::Path(tables) => {
                self.predicted.resize(index.len(), 0);
                let paths = self.paths.chunks_exact(self.layers.len());
                for (path, top) in paths.zip(self.predicted.chunks_exact_mut(top_k)) {
                    tables.predict(next, &path[..next], top);
                }
            }
            Forecast::NextGate => self.predicted.extend_from_slice(next_gate),
            Forecast::None | Forecast::History(_) | Forecast::Oracle => unreachable!("their estimates are not spread"),
        }
        self.estimate.fill(0.0);
        self.predicted.iter().for_each(|&expert| self.estimate[expert as usize] += 1.0);
        self.stats.estimating += begun.elapsed();
    }

    /// `[tokens, top_k]`: what the layer after the last observed one is expected to be asked for; empty without such a
    /// forecast, or after the last layer.
    pub fn forecasts(&self) -> &[u32] {
        &self.predicted
    }

    /// Elements of the message that goes with a layer's counts.
    pub fn message_len(&self) -> usize {
        if self.forecast.is_spread() { self.experts + TIMES } else { TIMES }
    }

    /// Writes this rank's message for the layer's other ranks.
    pub fn write_message(&mut self, comm: &Comm, number: usize, message: &mut [f32]) -> Result<(), StepError> {
        let wait = self.copies.remaining(comm, number)?;
        let (times, estimate) = message.split_at_mut(TIMES);
        times.copy_from_slice(&[wait as f32, self.lead_ns as f32]);
        if self.forecast.is_spread() {
            estimate.copy_from_slice(&self.estimate);
        }
        Ok(())
    }

    /// Forgets what ranks said before.
    pub fn clear_messages(&mut self) {
        (self.wait_ns, self.agreed_lead_ns) = (0.0, 0.0);
        self.estimate.fill(0.0);
    }

    /// Takes one rank's message in; estimates are whole numbers, so that their sum has no order.
    pub fn read_message(&mut self, message: &[f32]) {
        let (times, estimate) = message.split_at(TIMES);
        self.wait_ns = self.wait_ns.max(f64::from(times[0]));
        self.agreed_lead_ns = self.agreed_lead_ns.max(f64::from(times[1]));
        self.estimate.iter_mut().zip(estimate).for_each(|(sum, value)| *sum += value);
    }

    /// Phase two: every rank's choices are known. Where each row goes; copies that the layer has to wait for begin.
    pub fn settle(&mut self, comm: &mut Comm, number: usize, assigned: &[u32]) -> Result<TokenShares, StepError> {
        if let Some(prepared) = self.prepared.take() {
            let lead = (comm.now() - prepared) as f64;
            self.lead_ns += if self.lead_ns == 0.0 { lead } else { NEWEST * (lead - self.lead_ns) };
        }
        let planned = Instant::now();
        let settlement = self.scheduler.settle(number, assigned, self.wait_ns);
        self.stats.planned(planned.elapsed());
        let truth: Vec<f64> = (0..self.experts)
            .map(|expert| assigned.iter().skip(expert).step_by(self.experts).map(|&rows| f64::from(rows)).sum())
            .collect();
        self.rows = truth.iter().sum();
        if let Some(estimate) = self.estimates[number].take() {
            self.stats.compare_batch(number, &estimate, &truth, self.top_k);
        }
        if settlement.replanned {
            let layer = Some(self.layers[number] as u32);
            comm.work(Work { kind: WorkKind::Planning, layer, flops: self.planning_flops })?;
        }
        self.stats.settled(number, assigned, &settlement);
        self.waits = settlement.wait || !settlement.copies.is_empty();
        self.histories[number].add(&truth);
        self.begin_copies(comm, number, &settlement.copies, Overwrite::Now)?;
        Ok(settlement.shares)
    }

    /// Phase one, while the tokens of layer `current` travel: the placement of what comes next, and its copies.
    pub fn prepare_next(&mut self, comm: &mut Comm, current: usize) -> Result<(), StepError> {
        let (layers, copy_ns) = (self.layers.len(), self.scheduler.settings().costs.copy_ns);
        let (number, budget_ns) = match Horizon::of(copy_ns, self.agreed_lead_ns) {
            Horizon::NextLayer if current + 1 == layers => return Ok(()),
            Horizon::NextLayer => (current + 1, self.agreed_lead_ns),
            Horizon::NextStep => (current, self.agreed_lead_ns * layers as f64),
        };
        let estimate = match (&self.forecast, number == current) {
            (Forecast::None, _) => None,
            // What a layer's next step will be like, its own past says.
            (_, true) | (Forecast::History(_), false) => self.histories[number]
                .popularity()
                .map(|shares| shares.into_iter().map(|share| share * self.rows).collect::<Vec<f64>>()),
            (Forecast::Oracle, false) => self.truth.get(number).cloned(),
            (Forecast::Path(_) | Forecast::NextGate, false) => {
                Some(self.estimate.iter().map(|&rows| f64::from(rows)).collect())
            }
        };
        let Some(estimate) = estimate else { return Ok(()) };
        self.prepared = Some(comm.now());
        let planned = Instant::now();
        let copies = self.scheduler.prepare(number, &estimate, budget_ns);
        self.stats.planned(planned.elapsed());
        self.estimates[number] = Some(estimate);
        // The slots of the layer itself have this pass's rows to compute first.
        let overwrite = if number == current { Overwrite::AfterUse } else { Overwrite::Now };
        self.begin_copies(comm, number, &copies, overwrite)
    }

    /// Waits until every expert that this rank is to compute is in its slot.
    pub fn wait_for_experts(&mut self, comm: &mut Comm, number: usize) -> Result<(), StepError> {
        if self.waits { self.copies.wait(comm, number) } else { Ok(()) }
    }

    /// The layer took `ns` on this rank.
    pub fn layer_done(&mut self, ns: u64) {
        self.stats.layer_took(ns);
    }

    /// Where the experts of a layer are.
    pub fn resident(&self, number: usize) -> Vec<Vec<usize>> {
        let placement = self.scheduler.placement(number);
        (0..placement.devices()).map(|device| placement.held_by(device).collect()).collect()
    }

    /// The slot that serves an expert of a layer on device `rank`, since the layer was settled.
    ///
    /// # Panics
    /// If there is none: rows go to complete experts only.
    #[cfg(any(test, feature = "cuda"))]
    pub fn slot_of(&self, number: usize, rank: usize, expert: usize) -> usize {
        let slot = self.scheduler.placement(number).slot_of(rank, expert);
        slot.unwrap_or_else(|| panic!("expert {expert} of layer {} has no slot here", self.layers[number]))
    }

    fn begin_copies(
        &mut self,
        comm: &mut Comm,
        number: usize,
        copies: &[SlotCopy],
        overwrite: Overwrite,
    ) -> Result<(), StepError> {
        self.stats.moved(number, copies.len(), self.expert_bytes);
        let rank = comm.rank();
        for copy in copies.iter().filter(|copy| copy.device == rank) {
            self.copies.begin(comm, number, *copy, overwrite)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::time::Duration;

    use lina_comm::Nanos;
    use lina_comm::local::{LocalConfig, LocalJob};
    use lina_plan::{
        ExpertSchedulerSettings, PlacementCosts, PlacementPolicy, Policy, PolicyRules, PolicySettings, TokenShares,
    };

    use super::*;
    use crate::config::{ModelKind, Sizes};

    const RANKS: usize = 3;
    const SLOTS: usize = 4;
    const SIZES: Sizes = Sizes { vocab: 9, hidden: 4, layers: 2, heads: 1, experts: 8, top_k: 2, expert_hidden: 4 };

    fn random(state: &mut u64) -> u64 {
        // SplitMix64 (Steele et al., 2014).
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Slots whose copies end when chance says so, one after another.
    struct ChanceCopies {
        /// For each layer and slot, the expert that is complete there.
        contents: Vec<Vec<Option<usize>>>,
        under_way: VecDeque<(usize, SlotCopy)>,
        after_use: Vec<(usize, SlotCopy)>,
        state: u64,
    }

    impl ChanceCopies {
        fn complete_one(&mut self) {
            let Some((number, copy)) = self.under_way.pop_front() else { return };
            self.contents[number][copy.slot] = Some(copy.expert);
        }

        fn used(&mut self) {
            for (number, copy) in std::mem::take(&mut self.after_use) {
                self.overwrite(number, copy);
            }
        }

        fn overwrite(&mut self, number: usize, copy: SlotCopy) {
            self.contents[number][copy.slot] = None;
            self.under_way.push_back((number, copy));
        }
    }

    impl SlotCopies for ChanceCopies {
        fn begin(
            &mut self,
            _: &mut Comm,
            number: usize,
            copy: SlotCopy,
            overwrite: Overwrite,
        ) -> Result<(), StepError> {
            match overwrite {
                Overwrite::Now => self.overwrite(number, copy),
                Overwrite::AfterUse => self.after_use.push((number, copy)),
            }
            Ok(())
        }

        fn remaining(&mut self, _: &Comm, number: usize) -> Result<Nanos, StepError> {
            for _ in 0..random(&mut self.state) % 3 {
                self.complete_one();
            }
            Ok(self.under_way.iter().filter(|(other, _)| *other == number).count() as Nanos)
        }

        fn wait(&mut self, _: &mut Comm, number: usize) -> Result<(), StepError> {
            while self.under_way.iter().any(|(other, _)| *other == number) {
                self.complete_one();
            }
            Ok(())
        }
    }

    fn director(settings: ExpertSchedulerSettings, rank: usize, seed: u64) -> ExpertDirector<ChanceCopies> {
        let config = ModelConfig::family(ModelKind::Mixtral, SIZES);
        let scheduler = ExpertScheduler::new(settings, SIZES.layers, SIZES.experts, RANKS).unwrap();
        let held = |number: usize| {
            let slots = scheduler.placement(number).slots_of(rank);
            slots.iter().map(|expert| expert.map(|expert| expert as usize)).collect()
        };
        let copies = ChanceCopies {
            contents: (0..SIZES.layers).map(held).collect(),
            under_way: VecDeque::new(),
            after_use: Vec::new(),
            state: seed ^ rank as u64,
        };
        ExpertDirector::new(&config, scheduler, Forecast::History(0.5), 0, 1, RANKS, copies)
    }

    /// Rows of every rank for every expert, a few of them popular for some passes.
    fn assigned(state: &mut u64, pass: u64) -> Vec<u32> {
        let popular = pass / 4 * 3 % SIZES.experts as u64;
        let of = |expert: u64, chance: u64| {
            let many = expert == popular || expert == (popular + 5) % SIZES.experts as u64;
            (chance % if many { 200 } else { 8 }) as u32
        };
        (0..RANKS).flat_map(|_| 0..SIZES.experts as u64).map(|expert| of(expert, random(state))).collect()
    }

    /// Tells all ranks what each has to say of a layer.
    fn exchange(directors: &mut [ExpertDirector<ChanceCopies>], comms: &[Comm], number: usize) {
        let mut messages = Vec::new();
        for (director, comm) in directors.iter_mut().zip(comms) {
            let mut message = vec![0.0; director.message_len()];
            director.write_message(comm, number, &mut message).unwrap();
            messages.push(message);
        }
        for director in directors {
            director.clear_messages();
            messages.iter().for_each(|message| director.read_message(message));
        }
    }

    #[test]
    fn rows_find_their_experts_whenever_copies_end() {
        let local = LocalConfig {
            ranks: RANKS,
            groups: vec![(0..RANKS).collect()],
            timeout: Duration::from_secs(60),
            delays: None,
            log_launches: false,
        };
        let rules = PolicyRules::new(Policy::Fair, &PolicySettings::default());
        let (_job, mut comms) = LocalJob::start(local, rules).unwrap();
        let mut moved = 0;
        for seed in 0..40 {
            let placement =
                [PlacementPolicy::Lina, PlacementPolicy::LinaAuto, PlacementPolicy::Eplb][seed as usize % 3];
            // Long copies are begun for a layer's next step, short ones for the next layer.
            let copy_ns = if seed % 2 == 0 { 1e12 } else { 1.0 };
            let settings = ExpertSchedulerSettings {
                placement,
                estimation: seed % 5 != 0,
                fine_tuning: seed % 7 != 0,
                slots: SLOTS,
                top_k: SIZES.top_k,
                costs: PlacementCosts { row_ns: copy_ns / 50.0, wire_row_ns: 0.0, copy_ns },
                plan_every: 3,
                seed,
            };
            let mut state = seed;
            let mut directors: Vec<_> = (0..RANKS).map(|rank| director(settings, rank, seed)).collect();
            for pass in 0..40 {
                for (director, comm) in directors.iter_mut().zip(&mut comms) {
                    director.begin(comm, 0, None).unwrap();
                }
                for number in 0..SIZES.layers {
                    let assigned = assigned(&mut state, pass);
                    exchange(&mut directors, &comms, number);
                    let mut agreed: Option<TokenShares> = None;
                    for (rank, (director, comm)) in directors.iter_mut().zip(&mut comms).enumerate() {
                        let shares = director.settle(comm, number, &assigned).unwrap();
                        assert_eq!(&shares, agreed.get_or_insert_with(|| shares.clone()), "all ranks decide alike");
                        director.prepare_next(comm, number).unwrap();
                        director.wait_for_experts(comm, number).unwrap();
                        for expert in 0..SIZES.experts {
                            let rows: u32 = (0..RANKS).map(|source| shares.rows(source, expert, rank)).sum();
                            if rows > 0 {
                                let slot = director.slot_of(number, rank, expert);
                                let held = director.copies.contents[number][slot];
                                assert_eq!(held, Some(expert), "{placement}, seed {seed}, pass {pass}");
                            }
                        }
                        director.copies.used();
                    }
                }
            }
            moved += directors[0].stats.total(|layer| layer.moved_bytes);
        }
        assert!(moved > 1000, "{moved} experts moved");
    }
}
