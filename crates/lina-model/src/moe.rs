//! The MoE layer over ranks: gate, dispatch, experts, combine, and the way back.
//!
//! ```text
//! forward   gate counts | send 0 send 1 | wait 0 experts 0 return 0 | wait 1 experts 1 return 1 | sum 0 sum 1
//! backward  send 0 send 1 gate | wait 0 experts 0 return 0 | wait 1 experts 1 return 1 | weights | sum 0 sum 1
//! ```
//!
//! Tokens are cut into pipeline chunks by their place on the source rank; the number of chunks is the policy's, the
//! same on all ranks, and every chunk is exchanged even where it is empty. While the experts work on one chunk, the
//! others are on the wire. Where weight gradients stand is the policy's choice too: before the last chunk returns, or
//! after, as cover. Those of the attention above may wait until the combine's chunks are sent.
//!
//! Invariant: no sum depends on chunks, policy or the moment at which something arrives. A token's result is added up
//! by slot, its gradient by router first, then slot; an expert's weight gradient runs over its rows in (source rank,
//! token) order. Whatever way leads there, results are the same bits.
//!
//! On one rank nothing is exchanged: rows are gathered straight into the experts' order and summed straight out of it.

mod backward;
mod forward;

use lina_comm::{AllToAllKind, Comm, CommError, Direction, Leg, Ticket, WorkKind};
use lina_plan::{ExpertLayout, GroupId};

use crate::config::{ModelConfig, RouterConfig};
use crate::exchanges::ExchangePool;
use crate::experts::ExpertShape;
use crate::ffn::FfnScratch;
use crate::jitter;
use crate::norm::Norm;
use crate::pass::Pass;
use crate::routing::{ChunkPlan, Routes, RoutingPlan};
use crate::waiting::WaitingExperts;

/// One MoE layer: what its forward leaves for its backward.
#[derive(Debug)]
pub(crate) struct Moe {
    layer: usize,
    norm: Norm,
    /// `[max_tokens, experts]`.
    logits: Vec<f32>,
    /// `[max_tokens, experts]`.
    probabilities: Vec<f32>,
    /// `[max_tokens, top_k]`: chosen experts, most probable first.
    expert_index: Vec<u32>,
    /// `[max_tokens, top_k]`.
    gate_weight: Vec<f32>,
    plan: RoutingPlan,
    /// Expert-major `[rows, hidden]`: the experts' inputs.
    inputs: Vec<f32>,
    /// Expert-major `[rows, input width]`: their input projections.
    projected: Vec<f32>,
    /// For each chunk, `[rows sent, hidden]`: the experts' results for this rank's tokens.
    returned: Vec<Vec<f32>>,
    /// `[experts]`: what the load-balancing loss adds to the gradient of each token's probability.
    balance_gradient: Vec<f32>,
    /// `[experts]`: sums of local probabilities.
    probability_sums: Vec<f32>,
    losses: RouterLosses,
}

/// This rank's share of a layer's router losses, without coefficients; shares add up over ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RouterLosses {
    /// Load-balancing loss; 1 (times `top_k` for the `switch` form) when experts are used evenly.
    pub balance: f64,
    /// Mean squared log-sum-exp of the logits; 0 when its coefficient is 0.
    pub z: f64,
}

impl RouterLosses {
    /// Their sum with the coefficients of `router`.
    pub(crate) fn weighted(&self, router: &RouterConfig) -> f64 {
        f64::from(router.aux_loss_coefficient) * self.balance + f64::from(router.z_loss_coefficient) * self.z
    }
}

/// How a layer routed the tokens of the last forward.
#[derive(Clone, Copy, Debug)]
pub struct LayerRouting<'a> {
    pub(crate) plan: &'a RoutingPlan,
    pub(crate) routes: &'a Routes,
    pub(crate) losses: RouterLosses,
    pub(crate) expert_index: Option<&'a [u32]>,
}

impl<'a> LayerRouting<'a> {
    /// This rank's assignments to `expert`, before capacity.
    pub fn local_assignments(&self, expert: usize) -> u64 {
        self.plan.local_assignments(self.routes, expert)
    }

    /// All ranks' assignments to `expert`, before capacity: the same number on all ranks.
    pub fn global_assignments(&self, expert: usize) -> u64 {
        self.plan.global_assignments(self.routes, expert)
    }

    /// This rank's assignments that exceeded their expert's capacity.
    pub fn dropped(&self) -> u64 {
        self.plan.dropped
    }

    /// Rows that this rank's experts worked on.
    pub fn expert_rows(&self) -> usize {
        self.plan.rows()
    }

    /// This rank's share of the router losses.
    pub fn losses(&self) -> RouterLosses {
        self.losses
    }

    /// Experts chosen for each local token, `[tokens, top_k]`, most probable first; `None` where they are on a device.
    pub fn expert_index(&self) -> Option<&'a [u32]> {
        self.expert_index
    }
}

/// What all MoE layers of a rank share.
#[derive(Debug)]
pub(crate) struct MoeShared {
    pub routes: Routes,
    shape: ExpertShape,
    /// Most expert-major rows that a layer may hold.
    rows_limit: usize,
    /// Reduction group of each expert's gradients.
    groups: Vec<Option<GroupId>>,
    /// Experts that are not on the device all the time.
    pub waiting: WaitingExperts,
    pub ffn: FfnScratch,
    pub exchanges: ExchangePool,
    /// `[tokens, hidden]`: the gate's input with jitter.
    gate_input: Vec<f32>,
    /// `[max_tokens, experts]`.
    grad_logits: Vec<f32>,
    /// `[max_tokens, top_k]`.
    grad_gate_weight: Vec<f32>,
    /// Expert-major `[rows, hidden]`: gradients of the experts' outputs.
    grad_outputs: Vec<f32>,
    /// The same of their inputs; used on one rank only, elsewhere they go straight into an exchange.
    grad_inputs: Vec<f32>,
}

impl MoeShared {
    pub fn new(config: &ModelConfig, layout: &ExpertLayout, rank: usize, max_tokens: usize, rows_limit: usize) -> Self {
        let gate_input = if config.router.jitter > 0.0 { max_tokens * config.hidden } else { 0 };
        MoeShared {
            routes: Routes::new(layout, rank, config.top_k),
            shape: ExpertShape::new(config),
            rows_limit,
            groups: (0..config.experts).map(|expert| layout.group(expert)).collect(),
            waiting: WaitingExperts::default(),
            ffn: FfnScratch::default(),
            exchanges: ExchangePool::default(),
            gate_input: vec![0.0; gate_input],
            grad_logits: vec![0.0; max_tokens * config.experts],
            grad_gate_weight: vec![0.0; max_tokens * config.top_k],
            grad_outputs: Vec::new(),
            grad_inputs: Vec::new(),
        }
    }

    /// The rank that this is for.
    pub fn rank(&self) -> usize {
        self.routes.rank()
    }

    /// Other ways for tokens and gradients, between two passes.
    pub fn set_layout(&mut self, layout: &ExpertLayout) {
        self.routes = Routes::new(layout, self.routes.rank(), self.routes.top_k());
        self.groups = (0..layout.experts()).map(|expert| layout.group(expert)).collect();
    }
}

impl Moe {
    pub fn new(config: &ModelConfig, layer: usize, max_tokens: usize) -> Self {
        Moe {
            layer,
            norm: Norm::new(config, max_tokens),
            logits: vec![0.0; max_tokens * config.experts],
            probabilities: vec![0.0; max_tokens * config.experts],
            expert_index: vec![0; max_tokens * config.top_k],
            gate_weight: vec![0.0; max_tokens * config.top_k],
            plan: RoutingPlan::default(),
            inputs: Vec::new(),
            projected: Vec::new(),
            returned: Vec::new(),
            balance_gradient: vec![0.0; config.experts],
            probability_sums: vec![0.0; config.experts],
            losses: RouterLosses::default(),
        }
    }

    /// Works for this layer from here on. If it is another one, what a forward left for its backward is lost.
    pub fn set_layer(&mut self, layer: usize) {
        self.layer = layer;
    }

    /// How the last forward routed.
    pub fn routing<'a>(&'a self, routes: &'a Routes) -> LayerRouting<'a> {
        let expert_index = Some(&self.expert_index[..self.plan.position.len()]);
        LayerRouting { plan: &self.plan, routes, losses: self.losses, expert_index }
    }

    /// Elements held whatever the routing.
    pub fn elements(config: &ModelConfig, max_tokens: usize) -> usize {
        Norm::elements(config, max_tokens) + max_tokens * 2 * (config.experts + config.top_k)
    }

    /// Assignments dropped and the router losses with their coefficients, of the last forward.
    pub fn outcome(&self, config: &ModelConfig) -> (u64, f64) {
        (self.plan.dropped, self.losses.weighted(&config.router))
    }
}

/// The exchanges of one layer in one direction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Steps {
    pub direction: Direction,
    pub layer: usize,
    pub chunks: usize,
}

impl Steps {
    pub fn kind(&self, leg: Leg, chunk: usize) -> AllToAllKind {
        AllToAllKind {
            direction: self.direction,
            leg,
            layer: self.layer as u32,
            chunk: chunk as u32,
            chunks: self.chunks as u32,
        }
    }
}

/// Tells all ranks this rank's counts, and learns theirs.
pub(crate) fn exchange_counts(
    comm: &mut Comm,
    exchanges: &mut ExchangePool,
    routes: &Routes,
    plan: &mut RoutingPlan,
    layer: usize,
) -> Result<(), CommError> {
    let len = RoutingPlan::message_len(routes, plan.chunks.len());
    let messages = vec![1; comm.ranks()];
    let kind = Steps { direction: Direction::Forward, layer, chunks: 1 }.kind(Leg::Counts, 0);
    let mut exchange = exchanges.take(kind, len, &messages, &messages, None);
    for message in exchange.send.chunks_exact_mut(len).take(messages.len()) {
        plan.write_message(routes, message);
    }
    let ticket = comm.all_to_all(exchange)?;
    let exchange = comm.wait(ticket)?;
    for (source, message) in exchange.recv.chunks_exact(len).take(messages.len()).enumerate() {
        plan.read_message(routes, source, message);
    }
    exchanges.put(exchange, None);
    Ok(())
}

/// Waits for a chunk's rows and puts them into expert-major `rows`.
fn receive(
    pass: &mut Pass<'_>,
    exchanges: &mut ExchangePool,
    ticket: Ticket,
    layer: usize,
    chunk: &ChunkPlan,
    rows: &mut [f32],
) -> Result<(), CommError> {
    let width = pass.config.hidden;
    let exchange = pass.comm.wait(ticket)?;
    pass.work(WorkKind::Permute, Some(layer), 0)?;
    chunk.place_arrived(width, &exchange.recv, rows);
    exchanges.put(exchange, None);
    Ok(())
}

/// What the gate multiplies: the normed input, in training with jitter, which is put into `buffer`.
fn gate_input<'a>(pass: &Pass<'_>, layer: usize, normed: &'a [f32], buffer: &'a mut [f32]) -> &'a [f32] {
    if !has_jitter(pass) {
        return normed;
    }
    let input = &mut buffer[..normed.len()];
    input.copy_from_slice(normed);
    jitter::apply(pass.compute, input, pass.config.hidden, pass.config.router.jitter, &pass.step, layer);
    input
}

fn has_jitter(pass: &Pass<'_>) -> bool {
    pass.step.training && pass.config.router.jitter > 0.0
}
