//! The rank's model and optimizer on its GPU, where it has one: the host's weights and moments are what checkpoints and packing
//! read and write, and are brought up to date when those need them.

use lina_comm::{Comm, DeviceClock};
use lina_cuda::{self as cuda, Buffer as DeviceBuffer, CudaError, DType, Gpu};
use lina_model::{
    Batch, Buffer, CudaModel, DeviceWeights, ForwardOutput, LayerRouting, Model, ModelConfig, ModelLimits,
    ParameterLayout, Purpose, StepContext, memory_plan,
};
use lina_plan::ExpertLayout;

use crate::TrainError;
use crate::config::RunConfig;
use crate::nccl_job::rank_device;
use crate::optimizer::{AdamW, Moments, Update};
use crate::worker::model_limits;

/// A rank's model and moments on its GPU.
pub(crate) struct Replica {
    model: CudaModel,
    dense: DeviceMoments,
    experts: DeviceMoments,
}

/// First and second moments of one flat buffer, f32.
struct DeviceMoments {
    first: DeviceBuffer,
    second: DeviceBuffer,
}

impl DeviceMoments {
    fn zeros(gpu: &Gpu, len: usize) -> Result<Self, CudaError> {
        Ok(DeviceMoments { first: gpu.zeros(len, DType::F32)?, second: gpu.zeros(len, DType::F32)? })
    }

    fn load(&mut self, gpu: &Gpu, moments: &Moments) -> Result<(), CudaError> {
        gpu.upload(&moments.first, self.first.whole_mut())?;
        gpu.upload(&moments.second, self.second.whole_mut())
    }

    fn store(&self, gpu: &Gpu, moments: &mut Moments) -> Result<(), CudaError> {
        gpu.download(self.first.whole(), &mut moments.first)?;
        gpu.download(self.second.whole(), &mut moments.second)
    }
}

impl Replica {
    /// What the rank trains on; `None` if that is the processor. Tells `comm` which device it is.
    ///
    /// # Errors
    /// If there is no GPU, or it does not suffice.
    pub(crate) fn new(config: &RunConfig, experts: &ExpertLayout, comm: &mut Comm) -> Result<Option<Self>, TrainError> {
        if !config.cluster.engine.has_gpus() {
            return Ok(None);
        }
        let gpu = Gpu::open(rank_device()?)?;
        let mut clock = DeviceClock::new(&gpu)?;
        if let Some(device) = config.cluster.device {
            clock.emulate_rate(&gpu, device.gflops)?;
        }
        comm.set_device(clock);
        let dtype = DType::from(config.train.dtype);
        let limits = model_limits(config, comm.ranks());
        check_memory(&gpu, needed_bytes(&config.model, experts, comm.rank(), dtype, Purpose::Training, limits))?;
        let model =
            CudaModel::new(Purpose::Training, gpu, config.model.clone(), experts.clone(), comm.rank(), dtype, limits)?;
        let (gpu, layout) = (model.gpu(), model.layout());
        Ok(Some(Replica {
            dense: DeviceMoments::zeros(gpu, layout.dense_len())?,
            experts: DeviceMoments::zeros(gpu, layout.experts_len())?,
            model,
        }))
    }

    /// The GPU.
    pub(crate) fn gpu(&self) -> &Gpu {
        self.model.gpu()
    }

    /// Takes weights and moments from the host.
    pub(crate) fn load(&mut self, model: &Model, optimizer: &AdamW) -> Result<(), TrainError> {
        self.model.load(model.parameters())?;
        self.dense.load(self.model.gpu(), &optimizer.dense)?;
        self.experts.load(self.model.gpu(), &optimizer.experts)?;
        Ok(())
    }

    /// Brings the host's weights and moments up to date.
    pub(crate) fn store(&self, model: &mut Model, optimizer: &mut AdamW) -> Result<(), TrainError> {
        self.model.store(model.parameters_mut())?;
        self.dense.store(self.model.gpu(), &mut optimizer.dense)?;
        self.experts.store(self.model.gpu(), &mut optimizer.experts)?;
        Ok(())
    }

    /// Whether the GPU has the memory for the experts of `layout`, beside what other programs take.
    pub(crate) fn fits(&self, config: &RunConfig, layout: &ExpertLayout, rank: usize) -> Result<bool, TrainError> {
        let (free, _) = self.model.gpu().device().memory()?;
        let (dtype, limits) = (self.model.dtype(), model_limits(config, layout.ranks()));
        let needed = |layout| needed_bytes(&config.model, layout, rank, dtype, Purpose::Training, limits);
        Ok(needed(layout) <= free + needed(self.model.expert_layout()))
    }

    /// Takes the experts that `model` holds now.
    pub(crate) fn set_experts(&mut self, model: &Model, optimizer: &AdamW) -> Result<(), TrainError> {
        // The old ones first: both may not fit.
        self.experts = DeviceMoments::zeros(self.model.gpu(), 0)?;
        self.model.set_experts(model.expert_layout().clone())?;
        self.experts = DeviceMoments::zeros(self.model.gpu(), self.model.layout().experts_len())?;
        self.load(model, optimizer)
    }

    pub(crate) fn forward(
        &mut self,
        comm: &mut Comm,
        batch: Batch<'_>,
        context: StepContext,
    ) -> Result<ForwardOutput, TrainError> {
        Ok(self.model.forward(comm, batch, context)?)
    }

    pub(crate) fn backward(&mut self, comm: &mut Comm, accumulate: bool) -> Result<(), TrainError> {
        Ok(self.model.backward(comm, accumulate)?)
    }

    /// As [`Model::routing`].
    pub(crate) fn routing(&self, layer: usize) -> Option<LayerRouting<'_>> {
        self.model.routing(layer)
    }

    /// As [`AdamW::squares`]. Waits for the device.
    pub(crate) fn squares(&self, optimizer: &AdamW, squares: &mut Vec<f64>) -> Result<(), TrainError> {
        let gradients = self.model.gradients();
        let first = squares.len();
        squares.resize(first + optimizer.squares_len(), 0.0);
        for (buffer, gradients) in [(Buffer::Dense, &gradients.dense), (Buffer::Experts, &gradients.experts)] {
            let (places, ranges): (Vec<usize>, Vec<_>) = optimizer.own_parts(buffer).unzip();
            let mut sums = vec![0.0; ranges.len()];
            let all = gradients.device_range(0..gradients.len());
            cuda::sum_of_squares(self.model.gpu(), all, &ranges, &mut sums)?;
            places.iter().zip(sums).for_each(|(place, sum)| squares[first + place] = sum);
        }
        Ok(())
    }

    /// As [`AdamW::update`], enqueued.
    pub(crate) fn update(&mut self, optimizer: &AdamW, update: &Update<'_>) -> Result<(), TrainError> {
        let (gpu, layout, weights, gradients) = self.model.for_update();
        for (range, decay) in optimizer.dense_runs() {
            let (parameters, copy) = weights.update(Buffer::Dense, range.clone());
            cuda::adamw_step(
                gpu,
                parameters,
                gradients.dense.device_range(range.clone()),
                self.dense.first.slice_mut(range.clone()),
                self.dense.second.slice_mut(range.clone()),
                copy,
                &update.adam(decay),
            )?;
        }
        let all = 0..layout.experts_len();
        let (parameters, copy) = weights.update(Buffer::Experts, all.clone());
        let gradients = gradients.experts.device_range(all);
        let (first, second) = (self.experts.first.whole_mut(), self.experts.second.whole_mut());
        cuda::adamw_step(gpu, parameters, gradients, first, second, copy, &update.adam(true))?;
        Ok(())
    }
}

/// Refuses what will not fit before anything is allocated.
pub(crate) fn check_memory(gpu: &Gpu, needed: usize) -> Result<(), CudaError> {
    let (free, total) = gpu.device().memory()?;
    if needed > free {
        return Err(CudaError::OutOfMemory { ordinal: gpu.ordinal(), needed, free, total });
    }
    Ok(())
}

/// Bytes that a rank takes on its GPU: parameters, and activations as they are stored; in training gradients and moments too.
pub(crate) fn needed_bytes(
    config: &ModelConfig,
    experts: &ExpertLayout,
    rank: usize,
    dtype: DType,
    purpose: Purpose,
    limits: ModelLimits,
) -> usize {
    let layout = ParameterLayout::new(config, experts.held_by(rank));
    let on_device = |name: &str, bytes: usize| match (name, purpose) {
        // Two moments beside them.
        ("parameters", Purpose::Training) => DeviceWeights::bytes(&layout, dtype, purpose) + 2 * bytes,
        ("parameters", Purpose::Evaluation) => DeviceWeights::bytes(&layout, dtype, purpose),
        ("gradients", _) => bytes,
        _ => bytes / DType::F32.bytes() * dtype.bytes(),
    };
    memory_plan(config, experts, rank, limits, purpose).iter().map(|part| on_device(part.name, part.bytes)).sum()
}
