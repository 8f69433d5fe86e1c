//! Random delays from a seed, for stress tests: ranks that are early and late in turn.

use lina_plan::Nanos;

/// Delays that are a function of the seed, the rank and the number of the piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delays {
    /// Seed.
    pub seed: u64,
    /// Largest delay of a piece of work, in microseconds.
    pub max_us: u64,
}

impl Delays {
    /// Delay of `rank`'s piece of work number `count`. One in eight is long, the others are a tenth of it.
    pub(crate) fn of(&self, rank: usize, count: u64) -> Nanos {
        // SplitMix64 (Steele, Lea and Flood, 2014): a bijective mixer is all that is needed here.
        let mut x = self.seed ^ (rank as u64) << 48 ^ count;
        x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        let longest = self.max_us * 1000 / if x & 7 == 0 { 1 } else { 10 };
        (x >> 3) % (longest + 1)
    }
}
