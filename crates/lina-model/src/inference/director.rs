//! Carries the brain's decisions about experts out: makes this rank's estimates, keeps the copies into slots under way,
//! and counts what came of it.
//!
//! Where to place what is decided by [`ExpertScheduler`], alike on every rank, from what all ranks have told each other.
//! A processor computes from host memory, so a copy takes time only where a device is emulated; the slots are kept all
//! the same, and an expert that is in none is never used.

use std::sync::Arc;
use std::time::Instant;

use lina_comm::{Comm, CommError, CopyDirection, CopyTicket, HostCopy, WorkKind};
use lina_kernels as kernels;
use lina_plan::{Estimator, ExpertScheduler, History, Horizon, PathTables, SlotCopy, TokenShares};

use super::moe::{MoeLayer, gate_logits};
use super::stats::InferenceStats;
use crate::config::ModelConfig;
use crate::norm::Norm;
use crate::pass::{Pass, product_flops};

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
pub(super) struct ExpertDirector {
    scheduler: ExpertScheduler,
    forecast: Forecast,
    /// What a decision that a layer waits for takes, in operations of an emulated device.
    planning_flops: u64,
    expert_bytes: u64,
    experts: usize,
    top_k: usize,
    /// MoE layers.
    layers: usize,
    /// For each layer, the last copy under way into its slots on this rank.
    copies: Vec<Option<CopyTicket>>,
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
    /// Scratch of the next layer's gate: its norm, for [`Forecast::NextGate`], `[tokens, experts]` twice,
    /// `[tokens, top_k]`.
    next_norm: Option<Norm>,
    logits: Vec<f32>,
    probabilities: Vec<f32>,
    gate_weight: Vec<f32>,
    pub stats: InferenceStats,
}

impl ExpertDirector {
    pub fn new(
        config: &ModelConfig,
        scheduler: ExpertScheduler,
        forecast: Forecast,
        planning_flops: u64,
        expert_bytes: u64,
        devices: usize,
        max_tokens: usize,
    ) -> Self {
        let layers = config.moe_layers();
        let next_norm = matches!(forecast, Forecast::NextGate).then(|| Norm::new(config, max_tokens));
        let decay = match forecast {
            Forecast::History(decay) => decay,
            _ => 1.0 - NEWEST,
        };
        ExpertDirector {
            scheduler,
            forecast,
            planning_flops,
            expert_bytes,
            experts: config.experts,
            top_k: config.top_k,
            layers,
            copies: (0..layers).map(|_| None).collect(),
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
            next_norm,
            logits: Vec::new(),
            probabilities: Vec::new(),
            gate_weight: Vec::new(),
            stats: InferenceStats::new(layers, config.experts, devices),
        }
    }

    /// A pass of `tokens` local tokens begins. `truth` is what [`Forecast::Oracle`] goes by.
    pub fn begin(
        &mut self,
        comm: &mut Comm,
        layer_of: impl Fn(usize) -> usize,
        tokens: usize,
        truth: Option<&[Vec<f64>]>,
    ) {
        self.paths.clear();
        self.paths.resize(tokens * self.layers, 0);
        self.predicted.clear();
        self.prepared = None;
        self.truth.clear();
        self.truth.extend_from_slice(truth.unwrap_or_default());
        let planned = Instant::now();
        let changes = self.scheduler.begin_batch();
        self.stats.planned(planned.elapsed());
        for (number, copies) in changes {
            self.begin_copies(comm, number, layer_of(number), &copies);
        }
    }

    /// The gate has spoken: `index` is `[tokens, top_k]`. Looks what had been expected of it, and makes this rank's
    /// estimate of the next layer's popularity. `x` is the residual stream that enters the layer's experts.
    pub fn observe(
        &mut self,
        pass: &mut Pass<'_>,
        layer: &MoeLayer<'_>,
        index: &[u32],
        x: &[f32],
    ) -> Result<(), CommError> {
        let (number, top_k) = (layer.number, self.top_k);
        if !self.predicted.is_empty() {
            self.stats.compare_tokens(number, &self.predicted, index, top_k);
        }
        for (path, choices) in self.paths.chunks_exact_mut(self.layers).zip(index.chunks_exact(top_k)) {
            path[number] = choices[0];
        }
        self.predicted.clear();
        let next = number + 1;
        if next == self.layers || !self.forecast.is_spread() {
            return Ok(());
        }
        let begun = Instant::now();
        self.predicted.resize(index.len(), 0);
        match &self.forecast {
            Forecast::Path(tables) => {
                let paths = self.paths.chunks_exact(self.layers);
                for (path, top) in paths.zip(self.predicted.chunks_exact_mut(top_k)) {
                    tables.predict(next, &path[..next], top);
                }
            }
            Forecast::NextGate => self.ask_next_gate(pass, layer, x)?,
            Forecast::None | Forecast::History(_) | Forecast::Oracle => unreachable!("their estimates are not spread"),
        }
        self.estimate.fill(0.0);
        self.predicted.iter().for_each(|&expert| self.estimate[expert as usize] += 1.0);
        self.stats.estimating += begun.elapsed();
        Ok(())
    }

    fn ask_next_gate(&mut self, pass: &mut Pass<'_>, layer: &MoeLayer<'_>, x: &[f32]) -> Result<(), CommError> {
        let (config, tokens) = (pass.config, pass.tokens());
        let next = (layer.layer + 1..config.layers).find(|&l| config.is_moe(l)).expect("it is not the last such layer");
        pass.work(WorkKind::Router, Some(layer.layer), product_flops(tokens, config.experts, config.hidden))?;
        let norm = self.next_norm.as_mut().expect("the next gate is asked only where it has a norm");
        norm.forward(pass, &pass.layout.layers[next].feed_forward.norm, layer.weights.dense(), x);
        self.logits.resize(tokens * config.experts, 0.0);
        self.probabilities.resize(tokens * config.experts, 0.0);
        self.gate_weight.resize(tokens * config.top_k, 0.0);
        gate_logits(pass, next, layer.weights.dense(), norm, &mut self.logits);
        kernels::router_forward(
            pass.compute,
            &self.logits,
            config.top_k,
            false,
            &mut self.probabilities,
            &mut self.predicted,
            &mut self.gate_weight,
        );
        Ok(())
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
    pub fn write_message(&self, comm: &Comm, number: usize, message: &mut [f32]) {
        let wait = self.copies[number].as_ref().map_or(0, |ticket| comm.copy_remaining(ticket));
        let (times, estimate) = message.split_at_mut(TIMES);
        times.copy_from_slice(&[wait as f32, self.lead_ns as f32]);
        if self.forecast.is_spread() {
            estimate.copy_from_slice(&self.estimate);
        }
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
    pub fn settle(
        &mut self,
        pass: &mut Pass<'_>,
        layer: &MoeLayer<'_>,
        assigned: &[u32],
    ) -> Result<TokenShares, CommError> {
        let number = layer.number;
        if let Some(prepared) = self.prepared.take() {
            let lead = (pass.comm.now() - prepared) as f64;
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
            pass.work(WorkKind::Planning, Some(layer.layer), self.planning_flops)?;
        }
        self.stats.settled(number, assigned, &settlement);
        self.waits = settlement.wait || !settlement.copies.is_empty();
        self.histories[number].add(&truth);
        self.begin_copies(pass.comm, number, layer.layer, &settlement.copies);
        Ok(settlement.shares)
    }

    /// Phase one, while this layer's tokens travel: the placement of what comes next, and its copies.
    pub fn prepare_next(&mut self, pass: &mut Pass<'_>, layer: &MoeLayer<'_>) -> Result<(), CommError> {
        let copy_ns = self.scheduler.settings().costs.copy_ns;
        let (number, budget_ns) = match Horizon::of(copy_ns, self.agreed_lead_ns) {
            Horizon::NextLayer if layer.number + 1 == self.layers => return Ok(()),
            Horizon::NextLayer => (layer.number + 1, self.agreed_lead_ns),
            Horizon::NextStep => (layer.number, self.agreed_lead_ns * self.layers as f64),
        };
        let estimate = match (&self.forecast, number == layer.number) {
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
        self.prepared = Some(pass.comm.now());
        let planned = Instant::now();
        let copies = self.scheduler.prepare(number, &estimate, budget_ns);
        self.stats.planned(planned.elapsed());
        self.estimates[number] = Some(estimate);
        let model_layer = pass.config.moe_layer(number);
        self.begin_copies(pass.comm, number, model_layer, &copies);
        Ok(())
    }

    /// Waits until every expert that this rank is to compute is in its slot.
    pub fn wait_for_experts(&mut self, comm: &mut Comm, layer: &MoeLayer<'_>) -> Result<(), CommError> {
        if self.waits
            && let Some(ticket) = self.copies[layer.number].take()
        {
            comm.wait_copy(ticket)?;
        }
        Ok(())
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

    fn begin_copies(&mut self, comm: &mut Comm, number: usize, layer: usize, copies: &[SlotCopy]) {
        self.stats.moved(number, copies.len(), self.expert_bytes);
        // A reference whose copies are free by decree copies nothing.
        if self.scheduler.settings().costs.copy_ns == 0.0 {
            return;
        }
        let rank = comm.rank();
        for _ in copies.iter().filter(|copy| copy.device == rank) {
            let copy = HostCopy { direction: CopyDirection::ToDevice, layer: layer as u32, bytes: self.expert_bytes };
            self.copies[number] = Some(comm.copy(copy));
        }
    }
}
