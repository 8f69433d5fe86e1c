//! AdamW with decoupled weight decay (Loshchilov and Hutter, 2019), clipping by the global norm, and the learning
//! rate's schedule.

use std::ops::Range;

use lina_kernels::{AdamWStep, Compute, adamw_step, sum_of_squares};
#[cfg(feature = "cuda")]
use lina_model::Buffer;
use lina_model::{Model, ParameterLayout, Parameters, Place};

use crate::config::TrainConfig;

/// Learning rate of a step, counted from 0: linear warm-up, then a cosine down to `min_learning_rate_ratio`.
pub fn learning_rate(config: &TrainConfig, step: u64) -> f64 {
    let (step, warmup, steps) = (step as f64, config.warmup_steps as f64, config.steps as f64);
    if step < warmup {
        return config.learning_rate * (step + 1.0) / warmup;
    }
    let progress = if steps > warmup { ((step - warmup) / (steps - warmup)).min(1.0) } else { 1.0 };
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
    let floor = config.min_learning_rate_ratio;
    config.learning_rate * (floor + (1.0 - floor) * cosine)
}

/// Neighbouring parameters that decay alike.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    range: Range<usize>,
    decay: bool,
}

/// A tensor whose squares are summed once, on the rank that `owner` names.
#[derive(Clone, Debug)]
struct NormPart {
    owner: usize,
    expert: bool,
    range: Range<usize>,
}

/// What an update of the parameters goes by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Update<'a> {
    pub(crate) config: &'a TrainConfig,
    /// Counts from 0.
    pub(crate) step: u64,
    /// Gradients are multiplied by it first.
    pub(crate) grad_scale: f32,
}

impl Update<'_> {
    /// The numbers for parameters that decay or do not.
    pub(crate) fn adam(&self, decay: bool) -> AdamWStep {
        let (config, count) = (self.config, self.step as i32 + 1);
        AdamWStep {
            learning_rate: learning_rate(config, self.step) as f32,
            beta1: config.beta1,
            beta2: config.beta2,
            epsilon: config.epsilon,
            weight_decay: if decay { config.weight_decay } else { 0.0 },
            bias_correction1: 1.0 - config.beta1.powi(count),
            bias_correction2: 1.0 - config.beta2.powi(count),
            grad_scale: self.grad_scale,
        }
    }
}

/// First and second moments of one flat buffer.
#[derive(Debug)]
pub(crate) struct Moments {
    pub(crate) first: Vec<f32>,
    pub(crate) second: Vec<f32>,
}

impl Moments {
    pub(crate) fn zeros(len: usize) -> Self {
        Moments { first: vec![0.0; len], second: vec![0.0; len] }
    }
}

/// Optimizer state of one rank: moments lie beside its parameters, dense ones and those of the experts it holds.
#[derive(Debug)]
pub(crate) struct AdamW {
    pub(crate) dense: Moments,
    pub(crate) experts: Moments,
    dense_runs: Vec<Run>,
    norm_parts: Vec<NormPart>,
    rank: usize,
}

impl AdamW {
    pub(crate) fn new(model: &Model, rank: usize) -> Self {
        let layout = model.layout();
        let mut dense_runs: Vec<Run> = Vec::new();
        for parameter in layout.parameters() {
            let Place::Dense(range) = &parameter.place else { continue };
            match dense_runs.last_mut() {
                Some(run) if run.decay == parameter.decay && run.range.end == range.start => run.range.end = range.end,
                _ => dense_runs.push(Run { range: range.clone(), decay: parameter.decay }),
            }
        }
        AdamW {
            dense: Moments::zeros(layout.dense_len()),
            experts: Moments::zeros(layout.experts_len()),
            dense_runs,
            norm_parts: norm_parts(model),
            rank,
        }
    }

    /// Takes the moments of the experts that `model` holds now; those of dense parameters stay.
    pub(crate) fn set_experts(&mut self, model: &Model, experts: Moments) {
        self.norm_parts = norm_parts(model);
        self.experts = experts;
    }

    /// Number of values that [`squares`](Self::squares) appends, the same on all ranks.
    pub(crate) fn squares_len(&self) -> usize {
        self.norm_parts.len()
    }

    /// The tensors of `buffer` whose squares this rank sums: their number among all, and where they are.
    #[cfg(feature = "cuda")]
    pub(crate) fn own_parts(&self, buffer: Buffer) -> impl Iterator<Item = (usize, Range<usize>)> {
        let parts = self.norm_parts.iter().enumerate();
        let own = parts.filter(move |(_, part)| part.owner == self.rank && part.expert == (buffer == Buffer::Experts));
        own.map(|(number, part)| (number, part.range.clone()))
    }

    /// Neighbouring dense parameters that decay alike, and whether they do.
    #[cfg(feature = "cuda")]
    pub(crate) fn dense_runs(&self) -> impl Iterator<Item = (Range<usize>, bool)> {
        self.dense_runs.iter().map(|run| (run.range.clone(), run.decay))
    }

    /// Appends each tensor's sum of squared gradients, or 0 where another rank sums it: added over the ranks, the
    /// values do not depend on who held what.
    pub(crate) fn squares(&self, compute: &Compute, parameters: &Parameters, squares: &mut Vec<f64>) {
        squares.extend(self.norm_parts.iter().map(|part| {
            if part.owner != self.rank {
                return 0.0;
            }
            let buffer = if part.expert { &parameters.expert_gradients } else { &parameters.dense_gradients };
            sum_of_squares(compute, buffer.range(part.range.clone()))
        }));
    }

    /// Updates this rank's parameters.
    pub(crate) fn update(
        &mut self,
        (compute, layout, parameters): (&Compute, &ParameterLayout, &mut Parameters),
        update: &Update<'_>,
    ) {
        let Parameters { dense, experts, dense_gradients, expert_gradients } = parameters;
        for Run { range, decay } in &self.dense_runs {
            let Moments { first, second } = &mut self.dense;
            let (first, second) = (&mut first[range.clone()], &mut second[range.clone()]);
            let gradients = dense_gradients.range(range.clone());
            adamw_step(compute, &mut dense[range.clone()], gradients, first, second, &update.adam(*decay));
        }
        let gradients = expert_gradients.range(0..layout.experts_len());
        let Moments { first, second } = &mut self.experts;
        adamw_step(compute, experts, gradients, first, second, &update.adam(true));
    }
}

/// Who sums the squares of which tensor.
fn norm_parts(model: &Model) -> Vec<NormPart> {
    let (layout, experts) = (model.layout(), model.expert_layout());
    let mut parts = Vec::new();
    for parameter in layout.parameters() {
        match &parameter.place {
            Place::Dense(range) => {
                // Every rank holds the reduced gradient; each sums some of the tensors.
                let owner = parts.len() % experts.ranks();
                parts.push(NormPart { owner, expert: false, range: range.clone() });
            }
            // An expert's matrices are one block, whose norm its first holder sums.
            Place::Expert { layer, expert, range } if range.start == 0 => {
                let owner = experts.holders(*expert)[0];
                let range = layout.expert_block(*layer, *expert).unwrap_or(0..0);
                parts.push(NormPart { owner, expert: true, range });
            }
            Place::Expert { .. } => {}
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_warms_up_and_falls_along_a_cosine() {
        let config = TrainConfig {
            steps: 110,
            warmup_steps: 10,
            learning_rate: 1.0,
            min_learning_rate_ratio: 0.1,
            ..TrainConfig::default()
        };
        let rate = |step| learning_rate(&config, step);
        assert_eq!(rate(0), 0.1);
        assert_eq!(rate(9), 1.0);
        assert_eq!(rate(10), 1.0);
        assert!((rate(60) - 0.55).abs() < 1e-12);
        assert!((rate(110) - 0.1).abs() < 1e-12);
        assert!((rate(500) - 0.1).abs() < 1e-12);
    }
}
