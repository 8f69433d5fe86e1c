//! The decoder on a GPU: the same passes as [`Model`](crate::Model), over device memory.
//!
//! Where a parameter lies, where a token's row goes and what is handed to the communication library when is decided by the
//! same code as on a processor (`params`, `routing`); here are the kernels' launches. Activations are stored as the model's
//! [`DType`](lina_cuda::DType), sums are f32, parameters and gradients are f32 in flat buffers, with a copy of the parameters
//! in bf16 beside them where products read that.
//!
//! The host runs ahead of the device. It waits for it once in each MoE layer of a forward pass, for the counts that routing
//! needs, once at the end of the pass, for the losses, and where an all-to-all has to be complete.

mod attention;
mod exchanges;
mod experts;
mod ffn;
mod inference;
mod layer;
mod model;
mod moe;
mod norm;
mod parameters;
mod pass;

pub use inference::{CudaInferenceModel, CudaModelError, DeviceRank, RowRoute, SharedExperts, measure_device_costs};
pub use layer::CudaMoeLayer;
pub use model::CudaModel;
pub use parameters::{DeviceGradients, DeviceWeights};
