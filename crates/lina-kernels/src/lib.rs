//! CPU arithmetic of Mixture-of-Experts transformers in f32, forward and backward.
//!
//! Every kernel takes a [`Compute`] (a rank's threads and vector instructions) and slices of row-major matrices. None knows about ranks, none allocates once its
//! scratch buffers have reached their size, and all give the same bits whatever the number of threads. Gradients of weights and of residual inputs are
//! added to what is there (`+=`); other outputs are overwritten. Each function says which.
//!
//! Kernels check the shapes of their arguments and panic when they disagree: that is a bug in the caller, never bad input.
// Kernels are called with all of their operands; bundling them into structs would hide which are read and which are written.
#![allow(clippy::too_many_arguments)]

mod activation;
mod attention;
mod bandwidth;
mod compute;
mod elementwise;
mod embedding;
pub mod gemm;
mod huge_pages;
mod isa;
mod layout;
mod loss;
mod norm;
#[cfg(feature = "openblas")]
pub mod openblas;
mod optimizer;
mod paged;
mod permute;
mod pool;
mod prefetch;
mod rotary;
mod router;
mod scratch;
mod vector;

pub use activation::{Activation, activation_backward, activation_forward, add_bias, swiglu_backward, swiglu_forward};
pub use attention::{AttentionShape, Sequence, attention_backward, attention_forward};
pub use bandwidth::read_bandwidth;
pub use compute::{Compute, RowsMut, SplitRows};
pub use elementwise::{add, clamp, clamp_backward, scale, sum_into, sum_of_squares};
pub use embedding::{embedding_backward, embedding_forward};
pub use gemm::{Mat, MatMut, Product, matmul, matmul_grouped};
pub use huge_pages::advise_huge_pages;
pub use isa::Isa;
pub use layout::HeadLayout;
pub use loss::{IGNORED, cross_entropy_forward, cross_entropy_forward_backward};
pub use norm::{
    bias_grad, head_rms_norm_backward, head_rms_norm_forward, layer_norm_backward, layer_norm_forward,
    rms_norm_backward, rms_norm_forward,
};
pub use optimizer::{AdamWStep, adamw_step};
pub use paged::{PAGE_TOKENS, PagedSequence, PagedShape, page_elements, paged_append, paged_attention};
pub use permute::{DROPPED, combine_backward, combine_rows, gather_backward, gather_rows};
pub use rotary::{RotaryTable, rotary_backward, rotary_forward};
pub use router::{router_backward, router_forward};
