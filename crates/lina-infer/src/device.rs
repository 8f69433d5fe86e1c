//! What a rank computes on, and its model there.

use std::fmt;
use std::sync::Arc;

use lina_comm::Comm;
#[cfg(feature = "cuda")]
use lina_comm::{DeviceClock, nccl::launched};
#[cfg(feature = "cuda")]
use lina_cuda::{CudaError, DType, Gpu};
use lina_kernels::Compute;
#[cfg(feature = "cuda")]
use lina_model::{CudaInferenceModel, CudaModelError, DeviceRank, RowRoute, SharedExperts, measure_device_costs};
use lina_model::{
    ExpertOptions, InferenceBatch, InferenceLimits, InferenceModel, InferenceStats, InferenceWeights, KvCache,
    ModelConfig, StepError, measure_placement_costs,
};
use lina_train::{Engine, Scalar, TrainError};

/// What ranks compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// The host's processors.
    Cpu,
    /// An NVIDIA GPU for each rank.
    Cuda,
}

impl Device {
    /// The devices that this build knows.
    pub const BUILT: &[Device] = if cfg!(feature = "cuda") { &[Device::Cpu, Device::Cuda] } else { &[Device::Cpu] };

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
        }
    }

    /// What ranks of `engine` compute on where nobody says.
    pub fn of_engine(engine: Engine) -> Self {
        if engine.has_gpus() { Device::Cuda } else { Device::Cpu }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What ranks compute on, and in which numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arithmetic {
    /// The device.
    pub device: Device,
    /// How it stores weights, activations, keys and values, and multiplies; processors know float32 alone.
    pub dtype: Scalar,
}

impl Arithmetic {
    /// On processors.
    pub const CPU: Arithmetic = Arithmetic { device: Device::Cpu, dtype: Scalar::Float32 };

    /// Bytes of a number.
    pub fn element_bytes(self) -> usize {
        match self.dtype {
            Scalar::Float32 => 4,
            Scalar::Bfloat16 => 2,
        }
    }

    /// Whether ranks of `engine` can compute so.
    ///
    /// # Errors
    /// Why not, in a sentence.
    pub fn check(self, engine: Engine) -> Result<(), String> {
        let (device, engine_name) = (self.device, engine.name());
        if !Device::BUILT.contains(&device) {
            return Err(format!("--device is {device}, which this build does not have, expected cpu"));
        }
        if engine.has_gpus() && device == Device::Cpu {
            return Err(format!("--device is cpu, expected cuda: ranks of engine `{engine_name}` compute on GPUs"));
        }
        if engine == Engine::Mpi && device == Device::Cuda {
            return Err(format!("--device is cuda, expected cpu on engine `{engine_name}`; GPUs have engine nccl"));
        }
        if device == Device::Cpu && self.dtype != Scalar::Float32 {
            return Err("--dtype is bfloat16, expected float32: processors compute in nothing else".to_owned());
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn storage(self) -> DType {
        self.dtype.into()
    }
}

/// What the ranks of a process have together.
#[derive(Debug, Default)]
pub(crate) struct ProcessShared {
    #[cfg(feature = "cuda")]
    experts: SharedExperts,
}

/// What a rank's model is made of.
pub(crate) struct ModelParts<'a> {
    pub arithmetic: Arithmetic,
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "processors exchange rows alike on every engine"))]
    pub engine: Engine,
    /// Compute threads, on a processor.
    pub threads: usize,
    pub limits: InferenceLimits,
    /// Costs are measured where there are several ranks.
    pub experts: ExpertOptions,
    pub weights: &'a Arc<InferenceWeights>,
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "processors read the weights themselves"))]
    pub shared: &'a ProcessShared,
}

/// One rank's model, on a processor or a GPU.
pub(crate) enum StepModel {
    Host(Box<InferenceModel>),
    #[cfg(feature = "cuda")]
    Cuda(Box<CudaInferenceModel>),
}

/// The same expression of whichever model there is.
macro_rules! of_either {
    ($model:expr, $it:ident => $of_it:expr) => {
        match $model {
            StepModel::Host($it) => $of_it,
            #[cfg(feature = "cuda")]
            StepModel::Cuda($it) => $of_it,
        }
    };
}

impl StepModel {
    /// The model of `comm`'s rank, once all ranks have measured what work costs.
    pub fn start(comm: &mut Comm, parts: ModelParts<'_>) -> Result<Self, TrainError> {
        match parts.arithmetic.device {
            Device::Cpu => StepModel::start_host(comm, parts),
            #[cfg(feature = "cuda")]
            Device::Cuda => StepModel::start_cuda(comm, parts),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda => unreachable!("options have been checked"),
        }
    }

    fn start_host(comm: &mut Comm, mut parts: ModelParts<'_>) -> Result<Self, TrainError> {
        let (ranks, compute) = (comm.ranks(), Compute::new(parts.threads));
        if measures_costs(comm, parts.weights.config()) {
            parts.experts.scheduler.costs = measure_placement_costs(comm, &compute, parts.weights)?;
        }
        let model = InferenceModel::new(parts.weights.clone(), ranks, compute, parts.limits, parts.experts);
        Ok(StepModel::Host(Box::new(model.map_err(|error| TrainError::Input(error.to_string()))?)))
    }

    #[cfg(feature = "cuda")]
    fn start_cuda(comm: &mut Comm, mut parts: ModelParts<'_>) -> Result<Self, TrainError> {
        let (rank, ranks, dtype) = (comm.rank(), comm.ranks(), parts.arithmetic.storage());
        // A process of its own has what its launcher counts on this host; threads of one process are the host's ranks.
        let local_rank =
            launched().filter(|_| parts.engine.has_processes()).map_or(rank, |launched| launched.local_rank);
        let gpus = lina_cuda::Device::count()?;
        let gpu = Gpu::open(local_rank % gpus.max(1))?;
        let route = if parts.engine.has_gpus() { RowRoute::Devices } else { RowRoute::Hosts };
        // Elsewhere nobody reads the device's times, and events have their price.
        if route == RowRoute::Devices && ranks > 1 {
            comm.set_device(DeviceClock::new(&gpu)?);
        }
        if measures_costs(comm, parts.weights.config()) {
            let costs = measure_device_costs(comm, &gpu, parts.weights, dtype, route).map_err(device_step_error)?;
            parts.experts.scheduler.costs = costs;
        }
        let place = DeviceRank { rank, ranks, route, dtype };
        let ModelParts { limits, experts, weights, shared, .. } = parts;
        // Others wait while experts are copied into pinned memory and to the GPU.
        let model =
            comm.busy(|_| CudaInferenceModel::new(gpu, place, weights.clone(), limits, experts, &shared.experts));
        let model = model.map_err(|error| match error {
            CudaModelError::Placement(error) => TrainError::Input(error.to_string()),
            CudaModelError::Cuda(error) => device_error(error),
        })?;
        Ok(StepModel::Cuda(Box::new(model)))
    }

    /// Has a GPU load, compile and allocate what steps need, before anybody waits for one. All ranks call it together.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "processors are ready as they are"))]
    pub fn warm_up(&mut self, comm: &mut Comm) -> Result<(), TrainError> {
        match self {
            StepModel::Host(_) => Ok(()),
            #[cfg(feature = "cuda")]
            // Kernels may have to be compiled.
            StepModel::Cuda(model) => comm.busy(|comm| model.warm_up(comm)).map_err(device_step_error),
        }
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        of_either!(self, model => model.config())
    }

    /// Sequences, and where their keys and values are.
    pub fn cache(&mut self) -> &mut KvCache {
        of_either!(self, model => model.cache())
    }

    /// Runs a step. All ranks call it together.
    pub fn forward(&mut self, comm: &mut Comm, batch: InferenceBatch<'_>) -> Result<(), StepError> {
        of_either!(self, model => model.forward(comm, batch))
    }

    /// Logits of the last step, `[tokens whose logits were wanted, vocab]`, in the order of the feeds.
    pub fn logits(&self) -> &[f32] {
        of_either!(self, model => model.logits())
    }

    /// As [`logits`](Self::logits), to change.
    pub fn logits_mut(&mut self) -> &mut [f32] {
        of_either!(self, model => model.logits_mut())
    }

    /// What placements came to since the last call.
    pub fn take_stats(&mut self) -> InferenceStats {
        of_either!(self, model => model.take_stats())
    }

    /// For each layer with experts, for each device, the experts in its slots.
    pub fn resident(&self) -> Vec<Vec<Vec<usize>>> {
        of_either!(self, model => model.resident())
    }
}

fn measures_costs(comm: &Comm, config: &ModelConfig) -> bool {
    comm.ranks() > 1 && config.moe_layers() > 0
}

/// A device's failure before the first step; what does not fit is told with what helps inference.
#[cfg(feature = "cuda")]
pub(crate) fn device_error(error: CudaError) -> TrainError {
    match error {
        CudaError::OutOfMemory { ordinal, needed, free, total } => TrainError::Input(format!(
            "GPU {ordinal} is out of memory: {} MiB more were needed, {} of {} MiB are free; lower --cache-gib or \
             --step-tokens, or take --dtype bfloat16, more ranks or a smaller model",
            needed >> 20,
            free >> 20,
            total >> 20
        )),
        error => error.into(),
    }
}

#[cfg(feature = "cuda")]
fn device_step_error(error: StepError) -> TrainError {
    match error {
        StepError::Cuda(error) => device_error(error),
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_together_is_refused() {
        let check = |device, dtype, engine| Arithmetic { device, dtype }.check(engine);
        assert_eq!(Arithmetic::CPU.check(Engine::Local), Ok(()));
        assert_eq!(Arithmetic::CPU.check(Engine::Mpi), Ok(()));
        let refused = check(Device::Cpu, Scalar::Bfloat16, Engine::Local).unwrap_err();
        assert_eq!(refused, "--dtype is bfloat16, expected float32: processors compute in nothing else");
        let refused = check(Device::Cpu, Scalar::Float32, Engine::Nccl).unwrap_err();
        assert_eq!(refused, "--device is cpu, expected cuda: ranks of engine `nccl` compute on GPUs");
        let cuda = check(Device::Cuda, Scalar::Bfloat16, Engine::Local);
        assert_eq!(cuda.is_ok(), cfg!(feature = "cuda"), "{cuda:?}");
        assert!(check(Device::Cuda, Scalar::Float32, Engine::Mpi).is_err());
    }
}
