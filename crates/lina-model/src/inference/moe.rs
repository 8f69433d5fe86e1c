//! The MoE layer in inference: tokens go wherever the brain has put replicas of their expert.
//!
//! ```text
//! gate | estimate of the next layer | counts | settle | dispatch ... next layer's copies | experts | combine | sum
//! ```
//!
//! Every rank tells every other how many of its tokens chose each expert, which sizes the exchanges that follow. On the
//! same messages travels its estimate of the next layer's popularity: phase one costs no exchange of its own, and since
//! every rank then knows the same, every rank decides the same, without a scheduler that all would wait for.
//!
//! Invariant: where experts are changes no bit of the result. A row's product does not depend on the rows beside it,
//! and a token's results are summed in the order of its choices.

use std::time::Instant;

use lina_comm::{AllToAllKind, Comm, CommError, Direction, Leg, WorkKind};
use lina_kernels::{self as kernels, Mat, MatMut};

use super::Gate;
use super::director::ExpertDirector;
use super::dispatch::DispatchPlan;
use super::slot_copies::{HostCopies, SlotCopies};
use super::verify::{VerificationError, recompute};
use super::weights::InferenceWeights;
use crate::batch::StepError;
use crate::config::ModelConfig;
use crate::exchanges::ExchangePool;
use crate::experts::{ExpertShape, Experts};
use crate::norm::Norm;
use crate::pass::{Pass, grow, product_flops};

/// What all MoE layers of a rank use in turn.
#[derive(Debug)]
pub(super) struct MoeScratch {
    norm: Norm,
    shape: ExpertShape,
    /// `[max_tokens, experts]`.
    logits: Vec<f32>,
    /// `[max_tokens, experts]`.
    probabilities: Vec<f32>,
    /// `[max_tokens, top_k]`: chosen experts, most probable first.
    index: Vec<u32>,
    /// `[max_tokens, top_k]`.
    gate_weight: Vec<f32>,
    plan: DispatchPlan,
    /// `[experts]` of this rank, then `[ranks, experts]` of all.
    counts: Vec<u32>,
    assigned: Vec<u32>,
    /// `[rows, hidden]`, `[rows, input width]`, `[rows, inner]`, `[rows, hidden]`.
    inputs: Vec<f32>,
    projected: Vec<f32>,
    units: Vec<f32>,
    returned: Vec<f32>,
    exchanges: ExchangePool,
    max_tokens: usize,
    next_gate: Option<NextGate>,
}

/// The gate of the layer after, asked ahead of time.
#[derive(Debug)]
struct NextGate {
    norm: Norm,
    /// `[tokens, experts]` twice, `[tokens, top_k]`.
    logits: Vec<f32>,
    probabilities: Vec<f32>,
    gate_weight: Vec<f32>,
    /// `[tokens, top_k]`: what it chooses.
    index: Vec<u32>,
}

/// A layer that is computed, and how.
pub(super) struct MoeLayer<'a> {
    /// Index in the model, and among the layers with experts.
    pub layer: usize,
    pub number: usize,
    pub weights: &'a InferenceWeights,
    pub gate: &'a Gate,
    /// Index of this rank's first token among all ranks' tokens.
    pub token_offset: u64,
    /// Recomputes every n-th token on this rank alone and compares.
    pub verify_every: Option<u64>,
}

impl MoeScratch {
    pub fn new(config: &ModelConfig, max_tokens: usize) -> Self {
        MoeScratch {
            norm: Norm::new(config, max_tokens),
            shape: ExpertShape::new(config),
            logits: vec![0.0; max_tokens * config.experts],
            probabilities: vec![0.0; max_tokens * config.experts],
            index: vec![0; max_tokens * config.top_k],
            gate_weight: vec![0.0; max_tokens * config.top_k],
            plan: DispatchPlan::default(),
            counts: Vec::new(),
            assigned: Vec::new(),
            inputs: Vec::new(),
            projected: Vec::new(),
            units: Vec::new(),
            returned: Vec::new(),
            exchanges: ExchangePool::default(),
            max_tokens,
            next_gate: None,
        }
    }

    /// `y = x + experts(norm(x))`, both `[tokens, hidden]`.
    pub fn forward(
        &mut self,
        pass: &mut Pass<'_>,
        director: &mut ExpertDirector<HostCopies>,
        layer: &MoeLayer<'_>,
        x: &[f32],
        y: &mut [f32],
    ) -> Result<(), StepError> {
        let config = pass.config;
        let (tokens, hidden) = (pass.tokens(), config.hidden);
        let begun = pass.comm.now();
        self.route(pass, layer, x)?;
        if director.asks_next_gate(layer.number) {
            let begun = Instant::now();
            self.next_gate.get_or_insert_with(|| NextGate::new(config, self.max_tokens)).ask(pass, layer, x)?;
            director.stats.estimating += begun.elapsed();
        }
        let index = &self.index[..tokens * config.top_k];
        director.observe(layer.number, index, self.next_gate.as_ref().map_or(&[], |gate| &gate.index));

        self.counts.clear();
        self.counts.resize(config.experts, 0);
        index.iter().for_each(|&expert| self.counts[expert as usize] += 1);
        let place = (layer.layer, layer.number);
        exchange_counts(pass.comm, &mut self.exchanges, director, place, &self.counts, &mut self.assigned)?;
        let shares = director.settle(pass.comm, layer.number, &self.assigned)?;
        self.plan.place(pass.comm.rank(), &shares, index, config.top_k);

        let rows = self.plan.rows();
        grow(&mut self.projected, rows * self.shape.input_width);
        grow(&mut self.units, rows * self.shape.inner);
        grow(&mut self.returned, index.len() * hidden);
        y.copy_from_slice(x);
        let experts =
            Experts { compute: pass.compute, shape: self.shape, weights: layer.weights.layer_experts(layer.layer) };
        if pass.comm.ranks() == 1 {
            self.experts_here(pass, layer.layer, &experts)?;
        } else {
            self.experts_exchanged(pass, director, layer, &experts)?;
        }
        pass.work(WorkKind::Permute, Some(layer.layer), 0)?;
        let gate_weight = &self.gate_weight[..index_len(&self.plan)];
        let returned = &self.returned[..self.plan.chunk.sent.len() * hidden];
        kernels::combine_rows(pass.compute, returned, hidden, &self.plan.position, gate_weight, y);
        director.layer_done(pass.comm.now() - begun);
        match layer.verify_every {
            Some(every) => Ok(self.verify(pass, layer, every, x, y)?),
            None => Ok(()),
        }
    }

    /// The experts that the last forward's layer chose, `[tokens, top_k]`.
    pub fn index(&self) -> &[u32] {
        &self.index[..index_len(&self.plan)]
    }

    /// Norm and gate.
    fn route(&mut self, pass: &mut Pass<'_>, layer: &MoeLayer<'_>, x: &[f32]) -> Result<(), CommError> {
        let (config, tokens) = (pass.config, pass.tokens());
        let places = &pass.layout.layers[layer.layer].feed_forward;
        let dense = layer.weights.dense();
        pass.work(WorkKind::Router, Some(layer.layer), product_flops(tokens, config.experts, config.hidden))?;
        self.norm.forward(pass, &places.norm, dense, x);
        let logits = &mut self.logits[..tokens * config.experts];
        gate_logits(pass, layer.layer, dense, &self.norm, logits);
        let index = &mut self.index[..tokens * config.top_k];
        kernels::router_forward(
            pass.compute,
            logits,
            config.top_k,
            config.renormalise,
            &mut self.probabilities[..tokens * config.experts],
            index,
            &mut self.gate_weight[..tokens * config.top_k],
        );
        layer.gate.force(layer.number, layer.token_offset, config, index);
        Ok(())
    }

    fn experts_here(&mut self, pass: &mut Pass<'_>, layer: usize, experts: &Experts<'_>) -> Result<(), CommError> {
        let hidden = pass.config.hidden;
        let elements = self.plan.rows() * hidden;
        pass.work(WorkKind::Permute, Some(layer), 0)?;
        grow(&mut self.inputs, elements);
        let inputs = &mut self.inputs[..elements];
        kernels::gather_rows(pass.compute, self.norm.output(pass.tokens()), hidden, &self.plan.token_of_row, inputs);
        pass.work(WorkKind::ExpertFfn, Some(layer), self.shape.flops(self.plan.rows()))?;
        experts.forward(&self.plan.chunk, inputs, &mut self.projected, &mut self.units, &mut self.returned);
        Ok(())
    }

    fn experts_exchanged(
        &mut self,
        pass: &mut Pass<'_>,
        director: &mut ExpertDirector<HostCopies>,
        layer: &MoeLayer<'_>,
        experts: &Experts<'_>,
    ) -> Result<(), StepError> {
        let (hidden, rows) = (pass.config.hidden, self.plan.rows());
        let chunk = &self.plan.chunk;
        pass.work(WorkKind::Permute, Some(layer.layer), 0)?;
        let kind = kind(Leg::Dispatch, layer.layer);
        let mut exchange = self.exchanges.take(kind, hidden, &chunk.send_rows, &chunk.recv_rows, None);
        let send = &mut exchange.send[..chunk.sent.len() * hidden];
        kernels::gather_rows(pass.compute, self.norm.output(pass.tokens()), hidden, &self.plan.token_of_row, send);
        let ticket = pass.comm.all_to_all(exchange)?;
        // While the tokens travel: where the next layer's experts will be, and the copies that bring them there.
        director.prepare_next(pass.comm, layer.number)?;

        let exchange = pass.comm.wait(ticket)?;
        pass.work(WorkKind::Permute, Some(layer.layer), 0)?;
        grow(&mut self.inputs, rows * hidden);
        chunk.place_arrived(hidden, &exchange.recv, &mut self.inputs);
        self.exchanges.put(exchange, None);
        director.wait_for_experts(pass.comm, layer.number)?;
        pass.work(WorkKind::ExpertFfn, Some(layer.layer), self.shape.flops(rows))?;
        let kind = self::kind(Leg::Combine, layer.layer);
        let returned = &mut self.returned;
        let mut exchange = self.exchanges.take(kind, hidden, &chunk.recv_rows, &chunk.send_rows, Some(returned));
        experts.forward(chunk, &self.inputs, &mut self.projected, &mut self.units, &mut exchange.send);
        let ticket = pass.comm.all_to_all(exchange)?;
        let exchange = pass.comm.wait(ticket)?;
        self.exchanges.put(exchange, Some(&mut self.returned));
        Ok(())
    }

    /// Computes every `every`-th token of the step again, from this rank's own copy of the experts, and compares with
    /// what came back over the ranks.
    fn verify(
        &self,
        pass: &Pass<'_>,
        layer: &MoeLayer<'_>,
        every: u64,
        x: &[f32],
        y: &[f32],
    ) -> Result<(), VerificationError> {
        let (hidden, top_k) = (pass.config.hidden, pass.config.top_k);
        let experts =
            Experts { compute: pass.compute, shape: self.shape, weights: layer.weights.layer_experts(layer.layer) };
        let normed = self.norm.output(pass.tokens());
        for token in (0..pass.tokens()).filter(|&token| (layer.token_offset + token as u64).is_multiple_of(every)) {
            let row = token * hidden..(token + 1) * hidden;
            let choices = token * top_k..(token + 1) * top_k;
            let (index, weights) = (&self.index[choices.clone()], &self.gate_weight[choices]);
            let alone = recompute(&experts, &normed[row.clone()], &x[row.clone()], index, weights);
            VerificationError::check(layer.layer, token, VerificationError::TOLERANCE, &alone, &y[row])?;
        }
        Ok(())
    }
}

impl NextGate {
    fn new(config: &ModelConfig, max_tokens: usize) -> Self {
        NextGate {
            norm: Norm::new(config, max_tokens),
            logits: Vec::new(),
            probabilities: Vec::new(),
            gate_weight: Vec::new(),
            index: Vec::new(),
        }
    }

    /// Asks the gate of the layer with experts after `layer`, on the residual stream `x` that enters `layer`'s experts.
    fn ask(&mut self, pass: &mut Pass<'_>, layer: &MoeLayer<'_>, x: &[f32]) -> Result<(), CommError> {
        let (config, tokens) = (pass.config, pass.tokens());
        let next = config.moe_layer(layer.number + 1);
        pass.work(WorkKind::Router, Some(layer.layer), product_flops(tokens, config.experts, config.hidden))?;
        self.norm.forward(pass, &pass.layout.layers[next].feed_forward.norm, layer.weights.dense(), x);
        self.logits.resize(tokens * config.experts, 0.0);
        self.probabilities.resize(tokens * config.experts, 0.0);
        self.gate_weight.resize(tokens * config.top_k, 0.0);
        self.index.resize(tokens * config.top_k, 0);
        gate_logits(pass, next, layer.weights.dense(), &self.norm, &mut self.logits);
        kernels::router_forward(
            pass.compute,
            &self.logits,
            config.top_k,
            false,
            &mut self.probabilities,
            &mut self.index,
            &mut self.gate_weight,
        );
        Ok(())
    }
}

fn index_len(plan: &DispatchPlan) -> usize {
    plan.position.len()
}

/// `logits = gate(normed)`, `[tokens, experts]`, of `layer`.
fn gate_logits(pass: &Pass<'_>, layer: usize, dense: &[f32], norm: &Norm, logits: &mut [f32]) {
    let (config, tokens) = (pass.config, pass.tokens());
    let gate = Mat::new(&dense[pass.layout.layers[layer].feed_forward.gate().clone()], config.experts, config.hidden);
    let normed = Mat::new(norm.output(tokens), tokens, config.hidden);
    kernels::matmul(pass.compute, MatMut::new(logits, tokens, config.experts), normed, gate.t(), false);
}

/// A layer's only exchange of that kind.
pub(crate) fn kind(leg: Leg, layer: usize) -> AllToAllKind {
    AllToAllKind { direction: Direction::Forward, leg, layer: layer as u32, chunk: 0, chunks: 1 }
}

/// Tells all ranks this rank's counts and what it knows of the next layer, and learns theirs: `assigned` is
/// `[ranks, experts]`. The layer is given as its index in the model and among those with experts. Counts travel as the bits
/// of floats.
pub(crate) fn exchange_counts<C: SlotCopies>(
    comm: &mut Comm,
    exchanges: &mut ExchangePool,
    director: &mut ExpertDirector<C>,
    (layer, number): (usize, usize),
    counts: &[u32],
    assigned: &mut Vec<u32>,
) -> Result<(), StepError> {
    assigned.clear();
    if comm.ranks() == 1 {
        assigned.extend_from_slice(counts);
        return Ok(());
    }
    let len = counts.len() + director.message_len();
    let messages = vec![1; comm.ranks()];
    let mut exchange = exchanges.take(kind(Leg::Counts, layer), len, &messages, &messages, None);
    let (first, others) = exchange.send[..len * messages.len()].split_at_mut(len);
    let (own_counts, own) = first.split_at_mut(counts.len());
    own_counts.iter_mut().zip(counts).for_each(|(element, &count)| *element = f32::from_bits(count));
    director.write_message(comm, number, own)?;
    others.chunks_exact_mut(len).for_each(|message| message.copy_from_slice(first));
    let ticket = comm.all_to_all(exchange)?;
    let exchange = comm.wait(ticket)?;
    director.clear_messages();
    for message in exchange.recv[..len * messages.len()].chunks_exact(len) {
        let (counts, rest) = message.split_at(counts.len());
        assigned.extend(counts.iter().map(|count| count.to_bits()));
        director.read_message(rest);
    }
    exchanges.put(exchange, None);
    Ok(())
}
