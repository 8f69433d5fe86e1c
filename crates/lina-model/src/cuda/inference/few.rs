//! The experts of few rows, which reading their weights bounds. In a step of few tokens on a job's only rank, where rows go need not
//! be settled with anybody, so the choices stay on the device: the host waits in no layer, and the launches of a step are those of
//! the step before.

use lina_comm::WorkKind;
use lina_cuda::{
    self as cuda, Buffer as DeviceBuffer, ChosenExperts, CudaError, DType, FewActivation, Gpu, Slice, SliceMut,
};

use super::gate::GateScratch;
use super::step::Step;
use crate::batch::StepError;
use crate::config::ModelConfig;
use crate::cuda::experts::Experts;
use crate::experts::ExpertShape;
use crate::ffn::two_matrix;
use crate::pass::product_flops;

/// Runs rows of `x` through the experts that they have chosen: `units` (`[choices, inner]`) is in between, `rows`
/// (`[choices, hidden]`) gets the results, in the order of the choices.
pub(super) fn run(
    experts: &Experts<'_>,
    chosen: &ChosenExperts<'_>,
    x: Slice<'_>,
    mut units: SliceMut<'_>,
    rows: SliceMut<'_>,
) -> Result<(), CudaError> {
    let (gpu, choices) = (experts.gpu, chosen.index.len());
    let activation = two_matrix(experts.shape.kind).map_or(FewActivation::Swiglu, FewActivation::Plain);
    let mut units = units.slice_mut(0..choices * experts.shape.inner);
    cuda::few_projected(gpu, chosen, activation, x, experts.input_rows(), units.reborrow())?;
    cuda::few_rows(gpu, chosen, units.as_slice(), experts.down_rows(), rows)
}

/// What all layers use in turn; these buffers never move.
#[derive(Debug)]
pub(super) struct FewExperts {
    shape: ExpertShape,
    max_tokens: usize,
    /// `[layers, experts]`, u32: the slot of each expert.
    slots: DeviceBuffer,
    /// `[layers, tokens, top_k]` of the last step, u32.
    choices: DeviceBuffer,
    /// 0, 1, 2 ...: rows are in the order of the choices.
    positions: DeviceBuffer,
    /// `[choices, inner]`.
    units: DeviceBuffer,
    /// `[choices, hidden]`.
    rows: DeviceBuffer,
}

impl FewExperts {
    /// For steps of up to `max_tokens` tokens, if kernels take as many; `slot_of` is where an expert of a layer is.
    pub fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        dtype: DType,
        max_tokens: usize,
        slot_of: impl Fn(usize, usize) -> usize,
    ) -> Result<Self, CudaError> {
        let (layers, max_tokens) = (config.moe_layers(), max_tokens.min(cuda::MAX_FEW_TOKENS));
        let slots = (0..layers).flat_map(|number| (0..config.experts).map(move |expert| (number, expert)));
        let slots: Vec<u32> = slots.map(|(number, expert)| slot_of(number, expert) as u32).collect();
        let shape = ExpertShape::new(config);
        let choices = max_tokens * config.top_k;
        Ok(FewExperts {
            max_tokens,
            slots: gpu.buffer_from(&slots, DType::U32)?,
            choices: gpu.uninit(layers * choices, DType::U32)?,
            positions: gpu.buffer_from(&(0..choices as u32).collect::<Vec<_>>(), DType::U32)?,
            units: gpu.uninit(choices * shape.inner, dtype)?,
            rows: gpu.uninit(choices * shape.hidden, dtype)?,
            shape,
        })
    }

    /// Whether a step has so few tokens.
    pub fn takes(&self, tokens: usize) -> bool {
        tokens <= self.max_tokens
    }

    /// What the layers of the last step chose: `[layers, choices]`.
    pub fn choices(&self, layers: usize, choices: usize) -> Slice<'_> {
        self.choices.slice(0..layers * choices)
    }

    /// What the `number`-th layer of the last step chose, as soon as it has.
    pub fn choices_of(&self, number: usize, choices: usize) -> Slice<'_> {
        self.choices.slice(number * choices..(number + 1) * choices)
    }

    /// `y = x + experts(norm(x))`, both `[tokens, hidden]`, of `layer`, the `number`-th with experts, whose `weights` are its
    /// slots, one after another.
    pub fn forward(
        &mut self,
        step: &mut Step<'_>,
        gate: &mut GateScratch,
        (layer, number): (usize, usize),
        weights: Slice<'_>,
        x: Slice<'_>,
        y: SliceMut<'_>,
    ) -> Result<(), StepError> {
        let (config, gpu, hidden) = (step.config, step.gpu, self.shape.hidden);
        let choices = step.tokens * config.top_k;
        let places = number * choices..(number + 1) * choices;
        step.work(WorkKind::Router, Some(layer), product_flops(step.tokens, config.experts, hidden))?;
        gate.choose(step, layer, x, self.choices.slice_mut(places.clone()))?;
        step.work(WorkKind::ExpertFfn, Some(layer), self.shape.flops(choices))?;
        let chosen = ChosenExperts {
            index: self.choices.slice(places),
            top_k: config.top_k,
            slots: self.slots.slice(number * config.experts..(number + 1) * config.experts),
        };
        let experts = Experts { gpu, shape: self.shape, weights };
        let rows = 0..choices * hidden;
        let outputs = self.rows.slice_mut(rows.clone());
        run(&experts, &chosen, gate.normed(step.tokens), self.units.whole_mut(), outputs)?;
        step.work(WorkKind::Permute, Some(layer), 0)?;
        let positions = self.positions.slice(0..choices);
        cuda::combine_rows(gpu, self.rows.slice(rows), hidden, positions, gate.weights(choices), x, y)?;
        Ok(())
    }
}
