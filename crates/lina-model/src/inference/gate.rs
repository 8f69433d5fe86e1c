//! Gates that do not choose for themselves: for measurements of what routing costs.

use std::fmt;
use std::sync::Arc;

use crate::config::ModelConfig;

/// Chooses the experts of a token: (number among the layers with experts, index of the token among all ranks' tokens of
/// the step, its `[top_k]` choices to fill, all different).
pub type Chooser = dyn Fn(usize, u64, &mut [u32]) + Send + Sync;

/// Who chooses the experts.
#[derive(Clone, Default)]
pub enum Gate {
    /// The model.
    #[default]
    Own,
    /// Tokens take turns with the experts: the load is even, whatever the model would say. (The paper's Ideal.)
    Even,
    /// Somebody else.
    Given(Arc<Chooser>),
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Gate::Own => "Own",
            Gate::Even => "Even",
            Gate::Given(_) => "Given",
        })
    }
}

impl Gate {
    /// Replaces the choices `index` `[tokens, top_k]`, whose first token is number `token_offset`, if the gate is
    /// not the model's own. Weights stay those of the model's choices.
    pub(crate) fn force(&self, number: usize, token_offset: u64, config: &ModelConfig, index: &mut [u32]) {
        let top_k = config.top_k as u64;
        for (token, choices) in index.chunks_exact_mut(config.top_k).enumerate() {
            let token = token_offset + token as u64;
            match self {
                Gate::Own => return,
                Gate::Even => {
                    for (choice, expert) in choices.iter_mut().enumerate() {
                        *expert = ((token * top_k + choice as u64) % config.experts as u64) as u32;
                    }
                }
                Gate::Given(choose) => choose(number, token, choices),
            }
        }
    }
}
