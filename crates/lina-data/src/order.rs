//! The order of sequences: a permutation for each epoch, computed one element at a time.
//!
//! A shuffled list would be state to build, keep and agree on. A format-preserving permutation (a Feistel network over
//! the smallest even number of bits that holds the index, walked along its cycle until the value is in range; Black and
//! Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002) gives element `i` of epoch `e` from the seed alone, in
//! constant time and without memory. Only integer operations are used, so all machines agree.

/// Rounds of the network. Four already look random to every statistical test that matters here; eight also serve tiny
/// domains, whose halves have only a bit or two.
const ROUNDS: usize = 8;

/// A pseudorandom permutation of `0..len`, a function of seed and epoch only.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    len: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The permutation of `0..len` that belongs to a seed and an epoch.
    ///
    /// # Panics
    /// If `len` is 0 or above 2^62.
    pub fn new(len: u64, seed: u64, epoch: u64) -> Self {
        assert!(len > 0 && len <= 1 << 62, "a permutation of {len} elements");
        let bits = u64::BITS - (len - 1).leading_zeros();
        let half_bits = bits.div_ceil(2).max(1);
        let mut state = mix(seed) ^ mix(epoch.wrapping_add(0x6c69_6e61));
        let keys = std::array::from_fn(|_| {
            state = state.wrapping_add(GOLDEN_GAMMA);
            mix(state)
        });
        Self { len, half_bits, keys }
    }

    /// The element at a position.
    ///
    /// # Panics
    /// If `position` is not below the permutation's length.
    pub fn at(&self, position: u64) -> u64 {
        assert!(position < self.len, "position {position} of a permutation of {} elements", self.len);
        // The domain is at most eight times the range (four times above two elements), so the walk is short; it ends
        // because a permutation's cycle through `position` comes back into the range at the latest at `position`.
        let mut value = self.encrypt(position);
        while value >= self.len {
            value = self.encrypt(value);
        }
        value
    }

    fn encrypt(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        (left << self.half_bits) | right
    }
}

/// The endless order of a dataset: epoch after epoch, each in its own permutation, batches running on across the seam.
#[derive(Clone, Copy, Debug)]
pub struct EpochOrder {
    len: u64,
    seed: u64,
}

impl EpochOrder {
    /// The order of `len` elements under a seed.
    ///
    /// # Panics
    /// If `len` is 0 or above 2^62.
    pub fn new(len: u64, seed: u64) -> Self {
        assert!(len > 0 && len <= 1 << 62, "an order of {len} elements");
        Self { len, seed }
    }

    /// The elements at positions `from..from + count` of the endless order.
    pub fn range(&self, from: u64, count: usize) -> impl ExactSizeIterator<Item = u64> + Clone + use<> {
        let Self { len, seed } = *self;
        let mut epoch = from / len;
        let mut permutation = Permutation::new(len, seed, epoch);
        (0..count).map(move |offset| {
            let position = from + offset as u64;
            if position / len != epoch {
                epoch = position / len;
                permutation = Permutation::new(len, seed, epoch);
            }
            permutation.at(position % len)
        })
    }
}

/// The increment of SplitMix64.
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(len: u64, seed: u64, epoch: u64) -> Vec<u64> {
        let permutation = Permutation::new(len, seed, epoch);
        (0..len).map(|position| permutation.at(position)).collect()
    }

    #[test]
    fn every_length_is_permuted() {
        for len in (1..70).chain([255, 256, 257, 1000, 4097]) {
            let mut elements = all(len, 3, 1);
            elements.sort_unstable();
            assert!(elements.iter().copied().eq(0..len), "length {len}");
        }
    }

    #[test]
    fn seed_and_epoch_matter_and_nothing_else() {
        assert_eq!(all(100, 7, 2), all(100, 7, 2));
        assert_ne!(all(100, 7, 2), all(100, 7, 3));
        assert_ne!(all(100, 7, 2), all(100, 8, 2));
        assert_ne!(all(100, 1, 0), all(100, 0, 1));
    }

    #[test]
    fn the_order_never_changes() {
        // A resumed run continues the order of the version that started it, so these numbers are part of the format.
        assert_eq!(all(10, 42, 0), SNAPSHOT_10);
        assert_eq!(all(1_000_000, 42, 0)[..6], SNAPSHOT_MILLION);
    }

    const SNAPSHOT_10: [u64; 10] = [0, 1, 7, 3, 2, 8, 5, 4, 9, 6];
    const SNAPSHOT_MILLION: [u64; 6] = [859_290, 883_897, 782_522, 720_899, 870_221, 69_731];

    #[test]
    fn small_permutations_are_all_reached_about_equally_often() {
        // 24 orders of 4 elements over 24,000 seeds: 1,000 each, give or take six standard deviations.
        let mut counts = std::collections::HashMap::new();
        for seed in 0..24_000 {
            *counts.entry(all(4, seed, 0)).or_insert(0u32) += 1;
        }
        assert!(counts.values().all(|&count| count.abs_diff(1000) < 190), "{counts:?}");
        // An element is as likely at any position, also where the walk skips much of the domain.
        let mut first = [0u32; 5];
        for seed in 0..10_000 {
            first[Permutation::new(5, seed, 0).at(0) as usize] += 1;
        }
        assert!(first.iter().all(|&count| count.abs_diff(2000) < 240), "{first:?}");
    }

    #[test]
    fn ranges_run_on_into_the_next_epoch() {
        let order = EpochOrder::new(5, 9);
        let both: Vec<u64> = order.range(0, 10).collect();
        assert_eq!(both[..5], all(5, 9, 0));
        assert_eq!(both[5..], all(5, 9, 1));
        assert!(order.range(3, 4).eq(both[3..7].iter().copied()));
        assert_eq!(order.range(3, 4).len(), 4);
    }
}
