//! What a rank tells about the computation it is about to do, so that time can be emulated, traced and explained.

/// The part of a training step that a piece of computation belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WorkKind {
    /// Token (and position) embedding.
    Embedding,
    /// Attention with its projections, norms and rotary positions, except the projections' weight gradients.
    Attention,
    /// Weight gradients of attention's projections.
    AttentionWeightGradient,
    /// A dense feed-forward layer.
    DenseFfn,
    /// Router: gate product, softmax, top-k.
    Router,
    /// Sorting tokens by expert, packing and unpacking messages, weighted sums.
    Permute,
    /// Expert feed-forward products, except weight gradients.
    ExpertFfn,
    /// Weight gradients of experts.
    ExpertWeightGradient,
    /// Final norm, output projection and loss.
    Head,
    /// Gradient norm and parameter update.
    Optimizer,
    /// A layer waits for another placement of its experts to be planned.
    Planning,
}

impl WorkKind {
    /// Name in traces.
    pub fn name(self) -> &'static str {
        match self {
            WorkKind::Embedding => "embedding",
            WorkKind::Attention => "attention",
            WorkKind::AttentionWeightGradient => "attention weight gradient",
            WorkKind::DenseFfn => "dense ffn",
            WorkKind::Router => "router",
            WorkKind::Permute => "permute",
            WorkKind::ExpertFfn => "expert ffn",
            WorkKind::ExpertWeightGradient => "expert weight gradient",
            WorkKind::Head => "head",
            WorkKind::Optimizer => "optimizer",
            WorkKind::Planning => "planning",
        }
    }

    /// Whether it belongs to the experts' feed-forward network.
    pub fn is_expert(self) -> bool {
        matches!(self, WorkKind::ExpertFfn | WorkKind::ExpertWeightGradient)
    }
}

/// A piece of computation, announced before it runs.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// What part of the step it is.
    pub kind: WorkKind,
    /// Layer index, where it has one.
    pub layer: Option<u32>,
    /// Floating-point operations of its matrix products (a multiply-add counts as two). An emulated device takes
    /// this many over its rate; the cheaper element-wise operations around them count as free.
    pub flops: u64,
}
