//! CUDA arithmetic of Mixture-of-Experts transformers, forward and backward: what `lina-kernels` is on a processor.
//!
//! Operations take a [`Gpu`] (a rank's device, compute stream and compiled kernels) and views of device memory, and are
//! enqueued: they have happened once the stream has come as far. Activations are stored as [`DType::F32`] or
//! [`DType::Bf16`]; sums, statistics and weight gradients are always f32. Every operation is deterministic: the same inputs
//! give the same bits.
//!
//! | question | answered by |
//! |---|---|
//! | what is a GPU here, and is there one? | [`Gpu`], [`Device`], [`testing::gpu`] |
//! | where is data? | [`Buffer`], [`Slice`], [`SliceMut`], [`PinnedBuffer`] |
//! | what runs after what? | [`Stream`], [`Event`] |
//! | who copies experts while the device computes? | [`ExpertSlots`] |
//! | how are many small launches enqueued at once? | [`Graph`] |
//! | how does source become a kernel? | [`Module`], [`compile`] |
//! | which sizes do kernels take? | [`check_routing`], [`check_norm_width`], [`AttentionPlan::new`] |
//!
//! CUDA's libraries are loaded when they are first needed, and kernels are compiled by NVRTC on the machine that runs them: a
//! build needs no CUDA, and one binary serves machines with and without a GPU.
//!
//! Operations check the shapes of their arguments and panic when they disagree: that is a bug in the caller, never bad input.
// Kernels are called with all of their operands; bundling them into structs would hide which are read and which are written.
#![allow(clippy::too_many_arguments)]

mod activation;
mod attention;
mod buffer;
pub mod compile;
mod device;
mod elementwise;
mod embedding;
mod error;
mod event;
mod few;
mod gpu;
mod graph;
mod grouped;
pub mod jitter;
mod kernel;
mod launch;
mod limits;
mod loss;
mod matmul;
mod norm;
mod optimizer;
pub mod pace;
mod paged;
mod part_sum;
mod permute;
mod pinned;
mod rotary;
mod router;
mod slots;
mod staging;
mod stream;
pub mod testing;
mod timeline;

pub use activation::*;
pub use attention::*;
pub use buffer::{Buffer, DType, Element, Slice, SliceMut};
pub use compile::Module;
pub use cudarc;
pub use device::{Device, DeviceFacts};
pub use elementwise::*;
pub use embedding::*;
pub use error::CudaError;
pub use event::Event;
pub use few::*;
pub use gpu::Gpu;
pub use graph::Graph;
pub use grouped::*;
pub use kernel::Kernel;
pub use launch::{Arg, LaunchShape};
pub use limits::{check_norm_width, check_routing};
pub use loss::*;
pub use matmul::*;
pub use norm::*;
pub use optimizer::*;
pub use paged::*;
pub use part_sum::PartSum;
pub use permute::*;
pub use pinned::PinnedBuffer;
pub use rotary::*;
pub use router::*;
pub use slots::*;
pub use stream::{Priority, Stream};
pub use timeline::Launch;

/// Every module of kernels: all of them compile for every GPU that is supported.
pub fn modules() -> Vec<&'static Module> {
    let single = [
        &activation::ACTIVATION,
        &elementwise::ELEMENTWISE,
        &embedding::EMBEDDING,
        &few::FEW,
        &grouped::GROUPED_HOPPER,
        &jitter::JITTER,
        &loss::LOSS,
        &norm::NORM,
        &optimizer::OPTIMIZER,
        &pace::PACE,
        &part_sum::PART_SUM,
        &permute::PERMUTE,
        &rotary::ROTARY,
        &router::ROUTER,
    ];
    single.into_iter().chain(&attention::ATTENTION_MODULES).chain(&paged::PAGED_MODULES).collect()
}
