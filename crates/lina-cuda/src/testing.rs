//! What tests of GPU code share.

use half::bf16;

use crate::{CudaError, Gpu};

/// The first GPU; without one, prints why and returns `None`, so that a test can be skipped.
///
/// # Panics
/// If there is a GPU that does not work, or none while the variable `LINA_REQUIRE_GPU` is set.
pub fn gpu() -> Option<Gpu> {
    match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(reason @ (CudaError::NoLibrary { .. } | CudaError::NoDevice { .. } | CudaError::DriverTooOld { .. }))
            if std::env::var_os("LINA_REQUIRE_GPU").is_none() =>
        {
            eprintln!("skipped: {reason}");
            None
        }
        Err(reason) => panic!("{reason}"),
    }
}

/// `len` numbers in -1..1 that follow from `seed`.
pub fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let next = || {
        // SplitMix64 (Steele et al., 2014).
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// The values that bf16 can hold nearest to these.
pub fn round_bf16(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&value| bf16::from_f32(value).to_f32()).collect()
}

/// Norm of the difference over the norm of what is expected; infinite where something is not a number.
///
/// # Panics
/// If lengths differ.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len(), "as many values as expected");
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let difference = square(&mut found.iter().zip(expected).map(|(f, e)| f64::from(*f) - f64::from(*e)));
    let norm = square(&mut expected.iter().map(|e| f64::from(*e)));
    let error = (difference / norm.max(f64::MIN_POSITIVE)).sqrt();
    if error.is_nan() { f64::INFINITY } else { error }
}
