//! The MoE layer over ranks, on devices: what [`moe`](crate::moe) does on processors, in the same order. Routing stays on the
//! device but for the counts, which the host needs to size the exchanges and the products.

mod backward;
mod forward;

use lina_comm::{GroupId, Ticket, WorkKind};
use lina_cuda::{self as cuda, Buffer as DeviceBuffer, CudaError, DType, Gpu, Slice, SliceMut};
use lina_plan::ExpertLayout;

use super::exchanges::DeviceExchangePool;
use super::ffn::FfnScratch;
use super::norm::Norm;
use super::pass::Pass;
use crate::batch::StepError;
use crate::config::ModelConfig;
use crate::exchanges::ExchangePool;
use crate::experts::ExpertShape;
use crate::jitter;
use crate::moe::{LayerRouting, RouterLosses};
use crate::routing::{Block, Routes, RoutingPlan};

/// One MoE layer: what its forward leaves for its backward.
#[derive(Debug)]
pub(crate) struct Moe {
    layer: usize,
    /// Its place among the model's MoE layers.
    number: usize,
    norm: Norm,
    /// `[max_tokens, experts]`, f32.
    logits: DeviceBuffer,
    /// `[max_tokens, experts]`, f32.
    probabilities: DeviceBuffer,
    /// `[max_tokens, top_k]`: chosen experts, most probable first.
    expert_index: DeviceBuffer,
    /// `[max_tokens, top_k]`, f32.
    gate_weight: DeviceBuffer,
    plan: RoutingPlan,
    /// `[max_tokens, top_k]`: row of each assignment within its chunk's rows.
    position: DeviceBuffer,
    /// Local token of each row sent, chunk after chunk.
    token_of_row: DeviceBuffer,
    /// Expert-major `[rows, hidden]`: the experts' inputs.
    inputs: DeviceBuffer,
    /// Expert-major `[rows, input width]`: their input projections.
    projected: DeviceBuffer,
    /// For each chunk, `[rows sent, hidden]`: the experts' results for this rank's tokens.
    returned: Vec<DeviceBuffer>,
    /// `[experts]`: what the load-balancing loss adds to the gradient of each token's probability.
    balance_gradient: DeviceBuffer,
    /// The same before the coefficient: what the losses are computed from.
    balance_slopes: Vec<f64>,
    losses: RouterLosses,
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
    pub ffn: FfnScratch,
    exchanges: DeviceExchangePool,
    /// For counts.
    host_exchanges: ExchangePool,
    /// `[chunks + 1, experts]`: assignments.
    counts: DeviceBuffer,
    counts_on_host: Vec<u32>,
    /// `[2, chunks, experts]`: first and end of each expert's rows within a chunk's.
    row_bounds: DeviceBuffer,
    bounds_on_host: Vec<u32>,
    /// Blocks of rows to be moved, three numbers each.
    blocks: DeviceBuffer,
    blocks_on_host: Vec<u32>,
    /// `[tokens, hidden]`: the gate's input with jitter.
    gate_input: DeviceBuffer,
    /// `[tokens]`, f32.
    z: DeviceBuffer,
    /// `[moe layers, experts + 1]`, f32: sums of local probabilities, and of z losses.
    sums: DeviceBuffer,
    sums_on_host: Vec<f32>,
    /// `[max_tokens, experts]`, f32.
    grad_logits: DeviceBuffer,
    /// The same as products read it.
    grad_logits_copy: DeviceBuffer,
    /// `[max_tokens, top_k]`, f32.
    grad_gate_weight: DeviceBuffer,
    /// Expert-major `[rows, hidden]`: gradients of the experts' outputs.
    grad_outputs: DeviceBuffer,
    /// The same of their inputs; used on one rank only, elsewhere they go straight into an exchange.
    grad_inputs: DeviceBuffer,
}

impl MoeShared {
    pub fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        layout: &ExpertLayout,
        rank: usize,
        dtype: DType,
        max_tokens: usize,
        rows_limit: usize,
    ) -> Result<Self, CudaError> {
        let gate_input = if config.router.jitter > 0.0 { max_tokens * config.hidden } else { 0 };
        let empty = |dtype| gpu.uninit(0, dtype);
        let copy = if dtype == DType::F32 { 0 } else { max_tokens * config.experts };
        let sums = config.moe_layers() * (config.experts + 1);
        Ok(MoeShared {
            routes: Routes::new(layout, rank, config.top_k),
            shape: ExpertShape::new(config),
            rows_limit,
            groups: (0..config.experts).map(|expert| layout.group(expert)).collect(),
            ffn: FfnScratch::new(gpu, dtype)?,
            exchanges: DeviceExchangePool::new(dtype),
            host_exchanges: ExchangePool::default(),
            counts: empty(DType::U32)?,
            counts_on_host: Vec::new(),
            row_bounds: empty(DType::U32)?,
            bounds_on_host: Vec::new(),
            blocks: empty(DType::U32)?,
            blocks_on_host: Vec::new(),
            gate_input: gpu.uninit(gate_input, dtype)?,
            z: gpu.uninit(max_tokens, DType::F32)?,
            sums: gpu.zeros(sums, DType::F32)?,
            sums_on_host: vec![0.0; sums],
            grad_logits: gpu.uninit(max_tokens * config.experts, DType::F32)?,
            grad_logits_copy: gpu.uninit(copy, dtype)?,
            grad_gate_weight: gpu.uninit(max_tokens * config.top_k, DType::F32)?,
            grad_outputs: empty(dtype)?,
            grad_inputs: empty(dtype)?,
        })
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

    /// A forward pass begins.
    pub fn begin(&mut self, gpu: &Gpu) -> Result<(), CudaError> {
        gpu.fill_zero(self.sums.whole_mut())
    }

    /// Fetches what [`Moe::finish`] needs of every layer so far.
    pub fn fetch_sums(&mut self, gpu: &Gpu) -> Result<(), CudaError> {
        gpu.download(self.sums.whole(), &mut self.sums_on_host)
    }
}

impl Moe {
    pub fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        layer: usize,
        dtype: DType,
        max_tokens: usize,
    ) -> Result<Self, CudaError> {
        let (experts, top_k) = (config.experts, config.top_k);
        Ok(Moe {
            layer,
            number: moe_layers_below(config, layer),
            norm: Norm::new(gpu, config, dtype, max_tokens)?,
            logits: gpu.uninit(max_tokens * experts, DType::F32)?,
            probabilities: gpu.uninit(max_tokens * experts, DType::F32)?,
            expert_index: gpu.uninit(max_tokens * top_k, DType::U32)?,
            gate_weight: gpu.uninit(max_tokens * top_k, DType::F32)?,
            plan: RoutingPlan::default(),
            position: gpu.uninit(max_tokens * top_k, DType::U32)?,
            token_of_row: gpu.uninit(max_tokens * top_k, DType::U32)?,
            inputs: gpu.uninit(0, dtype)?,
            projected: gpu.uninit(0, dtype)?,
            returned: Vec::new(),
            balance_gradient: gpu.uninit(experts, DType::F32)?,
            balance_slopes: Vec::with_capacity(experts),
            losses: RouterLosses::default(),
        })
    }

    /// Works for this layer from here on. If it is another one, what a forward left for its backward is lost.
    pub fn set_layer(&mut self, config: &ModelConfig, layer: usize) {
        (self.layer, self.number) = (layer, moe_layers_below(config, layer));
    }

    /// How the last forward routed.
    pub fn routing<'a>(&'a self, routes: &'a Routes) -> LayerRouting<'a> {
        LayerRouting { plan: &self.plan, routes, losses: self.losses, expert_index: None }
    }

    /// This rank's share of the router losses, once the sums are there: assignments dropped, and the losses with their
    /// coefficients.
    pub fn finish(&mut self, shared: &MoeShared, config: &ModelConfig) -> (u64, f64) {
        let sums = &shared.sums_on_host[self.number * (config.experts + 1)..][..config.experts + 1];
        let (z, probabilities) = sums.split_last().expect("experts and one more");
        let balance = self.balance_slopes.iter().zip(probabilities).map(|(slope, sum)| slope * f64::from(*sum)).sum();
        let z = f64::from(*z) / self.plan.global_tokens().max(1) as f64;
        self.losses = RouterLosses { balance, z };
        (self.plan.dropped, self.losses.weighted(&config.router))
    }
}

fn moe_layers_below(config: &ModelConfig, layer: usize) -> usize {
    (0..layer).filter(|&layer| config.is_moe(layer)).count()
}

/// What the gate multiplies: the normed input, in training with jitter, which is put into `buffer`.
fn gate_input<'a>(
    pass: &Pass<'_>,
    layer: usize,
    normed: Slice<'a>,
    buffer: &'a mut DeviceBuffer,
) -> Result<Slice<'a>, CudaError> {
    if !has_jitter(pass) {
        return Ok(normed);
    }
    pass.gpu.copy(normed, buffer.slice_mut(0..normed.len()))?;
    apply_jitter(pass, layer, buffer.slice_mut(0..normed.len()))?;
    Ok(buffer.slice(0..normed.len()))
}

fn has_jitter(pass: &Pass<'_>) -> bool {
    pass.step.training && pass.config.router.jitter > 0.0
}

fn apply_jitter(pass: &Pass<'_>, layer: usize, values: SliceMut<'_>) -> Result<(), CudaError> {
    let (config, stream) = (pass.config, jitter::stream(&pass.step, layer));
    cuda::jitter::apply(pass.gpu, values, config.hidden, config.router.jitter, stream, pass.step.token_offset)
}

/// Waits for a chunk's rows and puts them into expert-major `rows`.
fn receive(
    pass: &mut Pass<'_>,
    shared: &mut MoeShared,
    ticket: Ticket,
    layer: usize,
    blocks: &[Block],
    rows: SliceMut<'_>,
) -> Result<(), StepError> {
    let width = pass.config.hidden;
    let exchange = pass.comm.wait_on_device(ticket)?;
    pass.work(WorkKind::Permute, Some(layer), 0)?;
    shared.blocks_on_host.clear();
    let mut arrived = 0;
    for block in blocks {
        let count = block.rows.len() as u32;
        shared.blocks_on_host.extend([arrived, block.rows.start as u32, count]);
        arrived += count;
    }
    pass.gpu.grow(&mut shared.blocks, shared.blocks_on_host.len())?;
    let numbers = 0..shared.blocks_on_host.len();
    pass.gpu.upload(&shared.blocks_on_host, shared.blocks.slice_mut(numbers.clone()))?;
    let source = exchange.recv.slice(0..arrived as usize * width);
    cuda::copy_blocks(pass.gpu, shared.blocks.slice(numbers), arrived as usize, width, source, rows)?;
    shared.exchanges.put(exchange, None);
    Ok(())
}
