//! What a model is for, and which buffers that takes: backward reads what forward left in every layer, forward alone can use
//! the same buffers in one layer after another.

use crate::config::ModelConfig;

/// What a model is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Forward and backward passes, and updates of the parameters.
    Training,
    /// Forward passes alone, without gradients, and with the activations of one layer at a time.
    Evaluation,
}

impl Purpose {
    /// The layers that have buffers: all, or of each kind the first, whose buffers the others of that kind use after it.
    pub(crate) fn buffered_layers(self, config: &ModelConfig) -> Vec<usize> {
        let own = |layer: &usize| {
            self == Purpose::Training
                || (0..*layer).all(|below| self.buffers_of(config, below) != self.buffers_of(config, *layer))
        };
        (0..config.layers).filter(own).collect()
    }

    /// Which of [`buffered_layers`](Self::buffered_layers) has the buffers that `layer` uses.
    pub(crate) fn buffers_of(self, config: &ModelConfig, layer: usize) -> usize {
        match self {
            Purpose::Training => layer,
            Purpose::Evaluation => usize::from(config.is_moe(layer) != config.is_moe(0)),
        }
    }

    /// Buffers of the residual stream: before each sub-layer and at the end.
    pub(crate) fn streams(self, config: &ModelConfig) -> usize {
        match self {
            Purpose::Training => 2 * config.layers + 1,
            Purpose::Evaluation => 3,
        }
    }

    /// Which of [`streams`](Self::streams) `layer` begins with, and after the last layer, which is the end of the stream.
    /// In an evaluation the third one has become the first by then.
    pub(crate) fn stream_of(self, layer: usize) -> usize {
        match self {
            Purpose::Training => 2 * layer,
            Purpose::Evaluation => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ModelKind, Sizes};

    #[test]
    fn layers_of_a_kind_share_buffers_in_an_evaluation() {
        let sizes = Sizes { vocab: 8, hidden: 8, layers: 5, heads: 1, experts: 2, top_k: 1, expert_hidden: 8 };
        let mut config = ModelConfig::family(ModelKind::Qwen3Moe, sizes);
        for (dense_layers, buffered, used) in [
            (vec![], vec![0], [0, 0, 0, 0, 0]),
            (vec![0, 1], vec![0, 2], [0, 0, 1, 1, 1]),
            (vec![1, 3], vec![0, 1], [0, 1, 0, 1, 0]),
        ] {
            config.dense_layers = dense_layers;
            assert_eq!(Purpose::Evaluation.buffered_layers(&config), buffered);
            assert_eq!([0, 1, 2, 3, 4].map(|layer| Purpose::Evaluation.buffers_of(&config, layer)), used);
            assert_eq!(Purpose::Training.buffered_layers(&config), [0, 1, 2, 3, 4]);
            assert_eq!([0, 1, 2, 3, 4].map(|layer| Purpose::Training.buffers_of(&config, layer)), [0, 1, 2, 3, 4]);
        }
    }
}
