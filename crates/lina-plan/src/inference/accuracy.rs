//! How good estimates are: over a batch, as the paper counts it, and per token.

/// The `n` experts with the largest numbers in `popularity` `[experts]`, ascending; of equal ones the first.
pub fn top_experts(popularity: &[f64], n: usize) -> Vec<u32> {
    let n = n.min(popularity.len());
    let mut order: Vec<u32> = (0..popularity.len() as u32).collect();
    if n < order.len() && n > 0 {
        let before = |a: &u32, b: &u32| popularity[*b as usize].total_cmp(&popularity[*a as usize]).then(a.cmp(b));
        order.select_nth_unstable_by(n - 1, before);
    }
    order.truncate(n);
    order.sort_unstable();
    order
}

/// Whether the `n` most popular experts by estimate and by truth are the same: the paper's accuracy is the share of
/// batches for which they are, with n twice the gate's k.
pub fn same_top_experts(estimate: &[f64], truth: &[f64], n: usize) -> bool {
    top_experts(estimate, n) == top_experts(truth, n)
}

/// The share of the `n` most popular experts that are also among those of the estimate; 1 if n is 0.
pub fn overlap(estimate: &[f64], truth: &[f64], n: usize) -> f64 {
    let (estimate, truth) = (top_experts(estimate, n), top_experts(truth, n));
    if truth.is_empty() {
        return 1.0;
    }
    let common = truth.iter().filter(|expert| estimate.binary_search(expert).is_ok()).count();
    common as f64 / truth.len() as f64
}

/// Of tokens whose `top_k` experts were predicted: (share for which all are right in any order, share of single choices
/// that are right). Both slices are `[tokens, top_k]`; 1 and 1 without tokens.
///
/// # Panics
/// If the slices differ in length or are not a multiple of `top_k` long.
pub fn token_accuracy(predicted: &[u32], actual: &[u32], top_k: usize) -> (f64, f64) {
    let (sets, choices) = right_tokens(predicted, actual, top_k);
    let tokens = actual.len() / top_k;
    if tokens == 0 {
        return (1.0, 1.0);
    }
    (sets as f64 / tokens as f64, choices as f64 / actual.len() as f64)
}

/// Numbers of tokens and of choices that are right.
fn right_tokens(predicted: &[u32], actual: &[u32], top_k: usize) -> (u64, u64) {
    assert!(top_k > 0 && actual.len().is_multiple_of(top_k) && predicted.len() == actual.len(), "[tokens, top_k] each");
    let (mut sets, mut choices) = (0, 0);
    for (predicted, actual) in predicted.chunks_exact(top_k).zip(actual.chunks_exact(top_k)) {
        let right = actual.iter().filter(|expert| predicted.contains(expert)).count();
        sets += u64::from(right == top_k);
        choices += right as u64;
    }
    (sets, choices)
}

/// Accuracy of one layer, or of all.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayerAccuracy {
    /// Batches that were compared.
    pub batches: u64,
    /// Of these, those whose top-2k experts were all right.
    pub same: u64,
    /// Sum over batches of the [`overlap`].
    overlap_sum: f64,
    /// Tokens that were compared.
    pub tokens: u64,
    /// Of these, those whose experts were all right.
    pub right_tokens: u64,
    /// Choices of these tokens.
    pub choices: u64,
    /// Of these, those that were right.
    pub right_choices: u64,
}

impl LayerAccuracy {
    /// Share of batches whose top-2k experts were all right (the paper's accuracy); `None` without batches.
    pub fn same_share(&self) -> Option<f64> {
        (self.batches > 0).then(|| self.same as f64 / self.batches as f64)
    }

    /// Mean share of the top-2k experts that were right.
    pub fn mean_overlap(&self) -> Option<f64> {
        (self.batches > 0).then(|| self.overlap_sum / self.batches as f64)
    }

    /// Share of tokens whose top-k experts were all right.
    pub fn token_share(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.right_tokens as f64 / self.tokens as f64)
    }

    /// Share of tokens' choices that were right.
    pub fn choice_share(&self) -> Option<f64> {
        (self.choices > 0).then(|| self.right_choices as f64 / self.choices as f64)
    }

    /// A batch's popularities, `[experts]` each, of a layer whose gate chooses `top_k` experts.
    pub fn add_batch(&mut self, estimate: &[f64], truth: &[f64], top_k: usize) {
        self.batches += 1;
        self.same += u64::from(same_top_experts(estimate, truth, 2 * top_k));
        self.overlap_sum += overlap(estimate, truth, 2 * top_k);
    }

    /// Tokens' predicted and actual experts, `[tokens, top_k]` each.
    pub fn add_tokens(&mut self, predicted: &[u32], actual: &[u32], top_k: usize) {
        let (sets, choices) = right_tokens(predicted, actual, top_k);
        self.tokens += (actual.len() / top_k) as u64;
        self.right_tokens += sets;
        self.choices += actual.len() as u64;
        self.right_choices += choices;
    }

    /// Both together.
    pub fn merge(&mut self, other: &LayerAccuracy) {
        self.batches += other.batches;
        self.same += other.same;
        self.overlap_sum += other.overlap_sum;
        self.tokens += other.tokens;
        self.right_tokens += other.right_tokens;
        self.choices += other.choices;
        self.right_choices += other.right_choices;
    }
}

/// Gathers the accuracy of every MoE layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AccuracyMeter {
    top_k: usize,
    layers: Vec<LayerAccuracy>,
}

impl AccuracyMeter {
    /// For `layers` MoE layers whose gate chooses `top_k` experts, at least 1.
    pub fn new(layers: usize, top_k: usize) -> Self {
        AccuracyMeter { top_k: top_k.max(1), layers: vec![LayerAccuracy::default(); layers] }
    }

    /// A batch's popularities of `layer`, `[experts]` each.
    pub fn add_batch(&mut self, layer: usize, estimate: &[f64], truth: &[f64]) {
        self.layers[layer].add_batch(estimate, truth, self.top_k);
    }

    /// Tokens' predicted and actual experts of `layer`, `[tokens, top_k]` each.
    pub fn add_tokens(&mut self, layer: usize, predicted: &[u32], actual: &[u32]) {
        self.layers[layer].add_tokens(predicted, actual, self.top_k);
    }

    /// Accuracy of every layer.
    pub fn layers(&self) -> &[LayerAccuracy] {
        &self.layers
    }

    /// Accuracy over the batches and tokens of all layers.
    pub fn total(&self) -> LayerAccuracy {
        let mut total = LayerAccuracy::default();
        self.layers.iter().for_each(|layer| total.merge(layer));
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_equal_experts_counts_and_order_does_not() {
        assert_eq!(top_experts(&[1.0, 3.0, 1.0, 2.0], 3), [0, 1, 3]);
        assert_eq!(top_experts(&[1.0, 1.0], 5), [0, 1]);
        assert!(same_top_experts(&[5.0, 4.0, 0.0, 0.0], &[7.0, 9.0, 1.0, 0.0], 2));
        assert!(!same_top_experts(&[5.0, 4.0, 0.0, 0.0], &[7.0, 0.0, 1.0, 0.0], 2));
        assert_eq!(overlap(&[5.0, 4.0, 0.0, 0.0], &[7.0, 0.0, 1.0, 0.0], 2), 0.5);
    }

    #[test]
    fn layers_are_counted_apart_and_together() {
        let mut meter = AccuracyMeter::new(2, 2);
        meter.add_tokens(0, &[1, 2, 3, 4], &[2, 1, 3, 5]);
        meter.add_tokens(1, &[1, 2], &[1, 2]);
        assert_eq!(meter.layers()[0].token_share(), Some(0.5));
        assert_eq!(meter.layers()[0].choice_share(), Some(0.75));
        assert_eq!(meter.total().token_share(), Some(2.0 / 3.0));
        assert_eq!(meter.layers()[0].same_share(), None);
        meter.add_batch(1, &[4.0, 3.0, 2.0, 1.0, 0.0], &[1.0, 2.0, 3.0, 0.0, 9.0]);
        assert_eq!((meter.total().same_share(), meter.total().mean_overlap()), (Some(0.0), Some(0.75)));
        assert_eq!(token_accuracy(&[1, 2, 3, 4], &[2, 1, 3, 5], 2), (0.5, 0.75));
    }
}
