//! Initial values, drawn by key: the same on every rank and in every layout.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Initial {
    /// Norms and biases.
    Constant(f32),
    /// Matrices: normal around 0.
    Normal { deviation: f32 },
}

impl Initial {
    /// Fills `values` with the numbers of `seed` and `key`.
    pub fn fill(self, values: &mut [f32], seed: u64, key: &str) {
        match self {
            Initial::Constant(value) => values.fill(value),
            Initial::Normal { deviation } => {
                let mut random = generator(seed, key);
                // Box and Muller (1958): two uniforms give two normals.
                for pair in values.chunks_mut(2) {
                    let radius = (-2.0 * open_unit(random.next_u64()).ln()).sqrt() * f64::from(deviation);
                    let (sine, cosine) = (std::f64::consts::TAU * open_unit(random.next_u64())).sin_cos();
                    pair[0] = (radius * cosine) as f32;
                    if let Some(second) = pair.get_mut(1) {
                        *second = (radius * sine) as f32;
                    }
                }
            }
        }
    }
}

/// ChaCha's stream does not change between versions of the crate.
fn generator(seed: u64, key: &str) -> ChaCha8Rng {
    let mut bytes = [0u8; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&fnv1a(key).to_le_bytes());
    bytes[16..24].copy_from_slice(&(key.len() as u64).to_le_bytes());
    ChaCha8Rng::from_seed(bytes)
}

/// Fowler, Noll and Vo's hash.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A number in (0, 1] from 53 random bits.
fn open_unit(bits: u64) -> f64 {
    ((bits >> 11) + 1) as f64 / (1u64 << 53) as f64
}
