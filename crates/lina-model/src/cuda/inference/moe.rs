//! The MoE layer of a step on a device, in the order of [`inference::moe`](crate::inference::moe): the gate's choices come to
//! the host, which decides with the brain where rows go, and tells the device.

use lina_comm::{Comm, Leg, WorkKind};
use lina_cuda::{self as cuda, Buffer as DeviceBuffer, ChosenExperts, CudaError, DType, Gpu, Slice, SliceMut};
use lina_kernels::Compute;
use lina_plan::TokenShares;

use super::exchange::{RowExchanges, RowRoute};
use super::experts::DeviceExperts;
use super::few;
use super::gate::GateScratch;
use super::step::Step;
use crate::batch::StepError;
use crate::config::ModelConfig;
use crate::cuda::experts::Experts;
use crate::experts::{self, ExpertShape};
use crate::inference::director::ExpertDirector;
use crate::inference::dispatch::DispatchPlan;
use crate::inference::moe::{exchange_counts, kind};
use crate::inference::verify::{VerificationError, recompute};
use crate::inference::{Gate, InferenceWeights};
use crate::pass::product_flops;
use crate::routing::ChunkPlan;

/// Largest difference of a verified token from what the host computes, whose sums have another order.
const F32_TOLERANCE: f32 = 1e-4;
/// The same in bf16, whose numbers have 8 bits.
const BF16_TOLERANCE: f32 = 0.05;

/// What all MoE layers of a rank use in turn.
#[derive(Debug)]
pub(super) struct Moe {
    shape: ExpertShape,
    /// Of the layer, and of the one after it where its gate is asked ahead of time.
    gate: GateScratch,
    next_gate: Option<GateScratch>,
    /// `[max_tokens, top_k]`: what a gate chose.
    chosen: DeviceBuffer,
    plan: DispatchPlan,
    /// `[tokens, top_k]`: chosen experts, most probable first.
    index: Vec<u32>,
    /// The same that the next layer's gate says; empty if it was not asked.
    next_index: Vec<u32>,
    /// `[experts]` of this rank, then `[ranks, experts]` of all.
    counts: Vec<u32>,
    assigned: Vec<u32>,
    /// Where rows go: positions, tokens of the rows sent, and blocks of what arrives or, of few rows, their slots.
    places: Vec<u32>,
    places_on_device: DeviceBuffer,
    /// 0, 1, 2 ...: rows name slots, not experts.
    slots: DeviceBuffer,
    /// `[rows, hidden]`, `[rows, input width]`, `[rows, inner]`, `[rows sent, hidden]`.
    inputs: DeviceBuffer,
    projected: DeviceBuffer,
    units: DeviceBuffer,
    returned: DeviceBuffer,
    exchanges: RowExchanges,
}

/// A layer that is computed, and how.
pub(super) struct MoeLayer<'a> {
    /// Index in the model, and among the layers with experts.
    pub layer: usize,
    pub number: usize,
    pub gate: &'a Gate,
    /// Index of this rank's first token among all ranks' tokens.
    pub token_offset: u64,
    /// Recomputes every n-th token on the host, from its weights, and compares.
    pub verify: Option<(u64, &'a Compute, &'a InferenceWeights)>,
}

impl Moe {
    /// For layers with `slots` slots on this rank; with room for the next layer's gate if it will be asked.
    pub fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        dtype: DType,
        max_tokens: usize,
        slots: usize,
        route: RowRoute,
        asks_next_gate: bool,
    ) -> Result<Self, CudaError> {
        let gate = || GateScratch::new(gpu, config, dtype, max_tokens);
        let rows = || gpu.uninit(0, dtype);
        Ok(Moe {
            shape: ExpertShape::new(config),
            gate: gate()?,
            next_gate: asks_next_gate.then(gate).transpose()?,
            chosen: gpu.uninit(max_tokens * config.top_k, DType::U32)?,
            plan: DispatchPlan::default(),
            index: Vec::new(),
            next_index: Vec::new(),
            counts: Vec::new(),
            assigned: Vec::new(),
            places: Vec::new(),
            places_on_device: gpu.uninit(0, DType::U32)?,
            slots: gpu.buffer_from(&(0..slots as u32).collect::<Vec<_>>(), DType::U32)?,
            inputs: rows()?,
            projected: rows()?,
            units: rows()?,
            returned: rows()?,
            exchanges: RowExchanges::new(route, dtype),
        })
    }

    /// `y = x + experts(norm(x))`, both `[tokens, hidden]`.
    pub fn forward(
        &mut self,
        step: &mut Step<'_>,
        director: &mut ExpertDirector<DeviceExperts>,
        layer: &MoeLayer<'_>,
        x: Slice<'_>,
        mut y: SliceMut<'_>,
    ) -> Result<(), StepError> {
        let (config, gpu, hidden) = (step.config, step.gpu, step.config.hidden);
        self.route(step, director, layer, x)?;
        let shares = self.settle(step.comm, config, director, (layer.layer, layer.number))?;
        let rank = step.comm.rank();
        self.plan.place(rank, &shares, &self.index, config.top_k);
        self.plan.name_slots(|expert| director.slot_of(layer.number, rank, expert));
        self.tell_places(step)?;

        let rows = self.plan.rows();
        gpu.grow(&mut self.inputs, rows * hidden)?;
        gpu.grow(&mut self.projected, rows * self.shape.input_width)?;
        gpu.grow(&mut self.units, rows * self.shape.inner)?;
        if step.comm.ranks() == 1 {
            self.experts_here(step, director, layer)?;
        } else {
            self.experts_exchanged(step, director, layer)?;
        }
        step.work(WorkKind::Permute, Some(layer.layer), 0)?;
        let (choices, sent) = (self.index.len(), self.plan.chunk.sent.len());
        let position = self.places_on_device.slice(0..choices);
        let returned = self.returned.slice(0..sent * hidden);
        cuda::combine_rows(gpu, returned, hidden, position, self.gate.weights(choices), x, y.reborrow())?;
        self.verify(step, layer, &self.index, x, y.as_slice())
    }

    /// The gate of the layer, for experts that others compute.
    pub fn gate(&mut self) -> &mut GateScratch {
        &mut self.gate
    }

    /// A layer of a step that this rank has computed alone chose `index`, `[tokens, top_k]`: what there is to learn from it.
    pub fn report(
        &mut self,
        comm: &mut Comm,
        config: &ModelConfig,
        director: &mut ExpertDirector<DeviceExperts>,
        (layer, number): (usize, usize),
        index: &[u32],
    ) -> Result<(), StepError> {
        self.index.clear();
        self.index.extend_from_slice(index);
        director.observe(number, index, &[]);
        self.settle(comm, config, director, (layer, number)).map(drop)
    }

    /// Where the rows of the layer's choices go, of this rank and of all.
    fn settle(
        &mut self,
        comm: &mut Comm,
        config: &ModelConfig,
        director: &mut ExpertDirector<DeviceExperts>,
        (layer, number): (usize, usize),
    ) -> Result<TokenShares, StepError> {
        self.counts.clear();
        self.counts.resize(config.experts, 0);
        self.index.iter().for_each(|&expert| self.counts[expert as usize] += 1);
        let (counts, assigned) = (&self.counts, &mut self.assigned);
        exchange_counts(comm, self.exchanges.hosts(), director, (layer, number), counts, assigned)?;
        director.settle(comm, number, &self.assigned)
    }

    /// The experts that the last forward's layer chose, `[tokens, top_k]`.
    pub fn index(&self) -> &[u32] {
        &self.index
    }

    /// Norm and gate, and that of the next layer if it is asked; waits for the choices.
    fn route(
        &mut self,
        step: &mut Step<'_>,
        director: &mut ExpertDirector<DeviceExperts>,
        layer: &MoeLayer<'_>,
        x: Slice<'_>,
    ) -> Result<(), StepError> {
        let (config, gpu, choices) = (step.config, step.gpu, step.tokens * step.config.top_k);
        let flops = product_flops(step.tokens, config.experts, config.hidden);
        step.work(WorkKind::Router, Some(layer.layer), flops)?;
        let chosen = 0..choices;
        self.next_index.clear();
        if let Some(next_gate) = &mut self.next_gate
            && director.asks_next_gate(layer.number)
        {
            step.work(WorkKind::Router, Some(layer.layer), flops)?;
            let next = config.moe_layer(layer.number + 1);
            next_gate.choose(step, next, x, self.chosen.slice_mut(chosen.clone()))?;
            self.next_index.resize(choices, 0);
            gpu.download(self.chosen.slice(chosen.clone()), &mut self.next_index)?;
        }
        self.gate.choose(step, layer.layer, x, self.chosen.slice_mut(chosen.clone()))?;
        self.index.resize(choices, 0);
        gpu.download(self.chosen.slice(chosen), &mut self.index)?;
        layer.gate.force(layer.number, layer.token_offset, config, &mut self.index);
        director.observe(layer.number, &self.index, &self.next_index);
        Ok(())
    }

    /// Tells the device where rows go.
    fn tell_places(&mut self, step: &Step<'_>) -> Result<(), CudaError> {
        self.places.clear();
        self.places.extend_from_slice(&self.plan.position);
        self.places.extend_from_slice(&self.plan.token_of_row);
        let blocks = &self.plan.chunk.blocks;
        if self.few_arrive() {
            self.places
                .extend(blocks.iter().flat_map(|block| std::iter::repeat_n(block.slot as u32, block.rows.len())));
        } else if step.comm.ranks() > 1 {
            let mut arrived = 0;
            for block in blocks {
                let rows = block.rows.len() as u32;
                self.places.extend([arrived, block.rows.start as u32, rows]);
                arrived += rows;
            }
        }
        step.gpu.grow(&mut self.places_on_device, self.places.len())?;
        step.gpu.upload(&self.places, self.places_on_device.slice_mut(0..self.places.len()))
    }

    /// Whether the rows that arrive from all ranks are few.
    fn few_arrive(&self) -> bool {
        self.plan.rows() <= cuda::MAX_FEW_TOKENS
    }

    fn experts_here(
        &mut self,
        step: &mut Step<'_>,
        director: &mut ExpertDirector<DeviceExperts>,
        layer: &MoeLayer<'_>,
    ) -> Result<(), StepError> {
        let (gpu, hidden, rows) = (step.gpu, step.config.hidden, self.plan.rows());
        step.work(WorkKind::Permute, Some(layer.layer), 0)?;
        let choices = self.index.len();
        let token_of_row = self.places_on_device.slice(choices..choices + rows);
        let inputs = self.inputs.slice_mut(0..rows * hidden);
        cuda::gather_rows(gpu, self.gate.normed(step.tokens), hidden, token_of_row, inputs)?;
        step.work(WorkKind::ExpertFfn, Some(layer.layer), self.shape.flops(rows))?;
        gpu.grow(&mut self.returned, rows * hidden)?;
        let few = self.few_arrive();
        let Moe { shape, plan, places, places_on_device, slots, inputs, projected, units, returned, .. } = self;
        let chosen = few.then(|| in_slots(places_on_device.slice(choices + rows..places.len()), slots));
        let network = Network { gpu, shape: *shape, chunk: &plan.chunk, chosen };
        let scratch = [projected.whole_mut(), units.whole_mut()];
        let inputs = inputs.slice(0..rows * hidden);
        network.run(director, layer.number, inputs, scratch, returned.slice_mut(0..rows * hidden))
    }

    fn experts_exchanged(
        &mut self,
        step: &mut Step<'_>,
        director: &mut ExpertDirector<DeviceExperts>,
        layer: &MoeLayer<'_>,
    ) -> Result<(), StepError> {
        let (gpu, hidden) = (step.gpu, step.config.hidden);
        let (choices, rows, sent) = (self.index.len(), self.plan.rows(), self.plan.chunk.sent.len());
        step.work(WorkKind::Permute, Some(layer.layer), 0)?;
        let chunk = &self.plan.chunk;
        let dispatch = kind(Leg::Dispatch, layer.layer);
        let mut exchange = self.exchanges.take(gpu, dispatch, hidden, &chunk.send_rows, &chunk.recv_rows)?;
        let token_of_row = self.places_on_device.slice(choices..choices + sent);
        let send = exchange.send.slice_mut(0..sent * hidden);
        cuda::gather_rows(gpu, self.gate.normed(step.tokens), hidden, token_of_row, send)?;
        let travelling = self.exchanges.begin(step.comm, gpu, exchange)?;
        // While the tokens travel: where the next layer's experts will be, and the copies that bring them there.
        director.prepare_next(step.comm, layer.number)?;

        let dispatched = self.exchanges.finish(step.comm, gpu, travelling)?;
        let (places, arrived) = (choices + sent..self.places.len(), dispatched.recv.slice(0..rows * hidden));
        let few = self.few_arrive();
        if !few {
            step.work(WorkKind::Permute, Some(layer.layer), 0)?;
            let (blocks, inputs) =
                (self.places_on_device.slice(places.clone()), self.inputs.slice_mut(0..rows * hidden));
            cuda::copy_blocks(gpu, blocks, rows, hidden, arrived, inputs)?;
        }
        director.wait_for_experts(step.comm, layer.number)?;
        step.work(WorkKind::ExpertFfn, Some(layer.layer), self.shape.flops(rows))?;
        let chunk = &self.plan.chunk;
        let combine = kind(Leg::Combine, layer.layer);
        let mut exchange = self.exchanges.take(gpu, combine, hidden, &chunk.recv_rows, &chunk.send_rows)?;
        let chosen = few.then(|| in_slots(self.places_on_device.slice(places), &self.slots));
        let network = Network { gpu, shape: self.shape, chunk, chosen };
        let inputs = if few { arrived } else { self.inputs.slice(0..rows * hidden) };
        let scratch = [self.projected.whole_mut(), self.units.whole_mut()];
        network.run(director, layer.number, inputs, scratch, exchange.send.slice_mut(0..rows * hidden))?;
        self.exchanges.put(dispatched);
        let travelling = self.exchanges.begin(step.comm, gpu, exchange)?;
        let mut exchange = self.exchanges.finish(step.comm, gpu, travelling)?;
        std::mem::swap(&mut exchange.recv, &mut self.returned);
        self.exchanges.put(exchange);
        Ok(())
    }

    /// Computes every n-th token of the step again on the host, from its own copy of the experts, if the layer says so, and
    /// compares with what the experts that `index` (`[tokens, top_k]`) names have made of it.
    pub fn verify(
        &self,
        step: &Step<'_>,
        layer: &MoeLayer<'_>,
        index: &[u32],
        x: Slice<'_>,
        y: Slice<'_>,
    ) -> Result<(), StepError> {
        let Some((every, compute, weights)) = layer.verify else { return Ok(()) };
        let (gpu, hidden, top_k) = (step.gpu, step.config.hidden, step.config.top_k);
        let experts = experts::Experts { compute, shape: self.shape, weights: weights.layer_experts(layer.layer) };
        let tolerance = if step.dtype == DType::F32 { F32_TOLERANCE } else { BF16_TOLERANCE };
        for token in (0..step.tokens).filter(|&token| (layer.token_offset + token as u64).is_multiple_of(every)) {
            let (row, choices) = (token * hidden..(token + 1) * hidden, token * top_k..(token + 1) * top_k);
            let normed = gpu.to_host::<f32>(self.gate.normed(step.tokens).slice(row.clone()))?;
            let [x, found] = [gpu.to_host::<f32>(x.slice(row.clone()))?, gpu.to_host::<f32>(y.slice(row))?];
            let weights = gpu.to_host::<f32>(self.gate.weights(step.tokens * top_k).slice(choices.clone()))?;
            step.comm.check()?;
            let alone = recompute(&experts, &normed, &x, &index[choices], &weights);
            VerificationError::check(layer.layer, token, tolerance, &alone, &found)?;
        }
        Ok(())
    }
}

/// Rows that go to the slots that `index` names; `slots` is 0, 1, 2 ...
fn in_slots<'a>(index: Slice<'a>, slots: &'a DeviceBuffer) -> ChosenExperts<'a> {
    ChosenExperts { index, top_k: 1, slots: slots.whole() }
}

/// What the experts of a layer are to compute.
struct Network<'a> {
    gpu: &'a Gpu,
    shape: ExpertShape,
    chunk: &'a ChunkPlan,
    /// The rows' slots, where rows are few.
    chosen: Option<ChosenExperts<'a>>,
}

impl Network<'_> {
    /// Runs the rows through the experts in their slots; `inputs` are in the order of experts or, if they are few, of the
    /// chunk's blocks, in which `outputs` gets the results. In between are `[projected, units]`.
    fn run(
        &self,
        director: &mut ExpertDirector<DeviceExperts>,
        number: usize,
        inputs: Slice<'_>,
        [projected, units]: [SliceMut<'_>; 2],
        outputs: SliceMut<'_>,
    ) -> Result<(), StepError> {
        let &Network { gpu, shape, chunk, .. } = self;
        let complete = chunk.runs.iter().all(|run| director.copies.serves(number, run.slot));
        assert!(complete, "rows go to experts whose slots are complete");
        let experts = Experts { gpu, shape, weights: director.copies.layer(number) };
        match &self.chosen {
            Some(chosen) => few::run(&experts, chosen, inputs, units, outputs)?,
            None => experts.forward(chunk, inputs, projected, units, outputs)?,
        }
        Ok(director.copies.used(number)?)
    }
}
