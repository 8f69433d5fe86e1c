//! Routing that no model chose: with the skew and the pattern that the paper measures.

use lina_model::Chooser;

/// Share of the tokens of one expert that go on to the group's most popular next expert, and to its second (the paper's
/// 41.94 % follow the first, 54.59 % one of both).
const FIRST: f64 = 0.4194;
const SECOND: f64 = 0.5459 - FIRST;

/// Tokens whose experts form chains from layer to layer. Popularities of a layer's experts go geometrically from the
/// hottest to the coldest; which expert is how popular differs from layer to layer and changes from batch to batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SyntheticRouting {
    pub experts: usize,
    /// Hottest over coldest expert of a layer.
    pub skew: f64,
    pub seed: u64,
    /// Which batch this is.
    pub batch: u64,
}

impl SyntheticRouting {
    /// The choices of one token of `layers` layers: ranks in popularity along the chain, then the experts there.
    fn expert(&self, number: usize, token: u64) -> usize {
        let mut place = self.draw(0, token);
        for layer in 1..=number {
            let next = self.uniform(&[3, layer as u64, token, self.batch]);
            place = if next < FIRST {
                place
            } else if next < FIRST + SECOND {
                (place + 1) % self.experts
            } else {
                self.draw(layer, token)
            };
        }
        // A place in the order of popularity is an expert by a rotation that is the layer's and moves on with batches.
        let shift = self.hash(&[1, number as u64]) + self.batch / 4;
        (place + (shift % self.experts as u64) as usize) % self.experts
    }

    /// A place in the order of popularity, hottest first.
    fn draw(&self, layer: usize, token: u64) -> usize {
        let weights = (0..self.experts).map(|place| self.weight(place));
        let total: f64 = weights.clone().sum();
        let mut left = self.uniform(&[2, layer as u64, token, self.batch]) * total;
        for (place, weight) in weights.enumerate() {
            left -= weight;
            if left < 0.0 {
                return place;
            }
        }
        self.experts - 1
    }

    fn weight(&self, place: usize) -> f64 {
        self.skew.powf(-(place as f64) / (self.experts.max(2) - 1) as f64)
    }

    fn uniform(&self, words: &[u64]) -> f64 {
        (self.hash(words) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// SplitMix64's finaliser (Steele et al., 2014) over the words.
    fn hash(&self, words: &[u64]) -> u64 {
        words.iter().fold(self.seed, |state, &word| {
            let mut z = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        })
    }

    /// The gate.
    pub fn chooser(self) -> Box<Chooser> {
        Box::new(move |number, token, choices: &mut [u32]| {
            let first = self.expert(number, token);
            for (choice, expert) in choices.iter_mut().enumerate() {
                *expert = ((first + choice) % self.experts) as u32;
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_skew_is_what_was_asked_for() {
        let routing = SyntheticRouting { experts: 16, skew: 5.56, seed: 3, batch: 0 };
        for number in [0, 5, 11] {
            let mut counts = [0u32; 16];
            (0..20_000).for_each(|token| counts[routing.expert(number, token)] += 1);
            let (hottest, coldest) = (*counts.iter().max().unwrap(), *counts.iter().min().unwrap());
            let skew = f64::from(hottest) / f64::from(coldest);
            assert!((4.5..7.0).contains(&skew), "layer {number}: {skew}");
        }
    }
}
