//! Inputs for the tests of kernels.

/// `len` numbers in −1..1 from a seed (a 64-bit linear congruential generator, Knuth's constants).
pub fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5DEE_CE66_D1CE_4E5B;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(next).collect()
}

/// Compares `gradient` with central differences of `loss` around `x`, for every element.
#[allow(dead_code)]
pub fn check_gradient(name: &str, x: &[f32], gradient: &[f32], mut loss: impl FnMut(&[f32]) -> f64) {
    assert_eq!(x.len(), gradient.len());
    const STEP: f32 = 1e-2;
    let mut moved = x.to_vec();
    for index in 0..x.len() {
        moved[index] = x[index] + STEP;
        let above = loss(&moved);
        let high = moved[index];
        moved[index] = x[index] - STEP;
        let below = loss(&moved);
        let expected = (above - below) / f64::from(high - moved[index]);
        moved[index] = x[index];
        let error = (f64::from(gradient[index]) - expected).abs();
        assert!(
            error < 3e-3 * expected.abs().max(1.0),
            "{name}: gradient {index} is {} instead of {expected}",
            gradient[index]
        );
    }
}

/// Σ y · weights in f64: a loss whose gradient by y is `weights`.
#[allow(dead_code)]
pub fn weighted(y: &[f32], weights: &[f32]) -> f64 {
    y.iter().zip(weights).map(|(y, weight)| f64::from(*y) * f64::from(*weight)).sum()
}

/// Runs `run` with every instruction set on one and two threads, and checks that threads do not change a bit.
#[allow(dead_code)]
pub fn with_every_compute(run: impl Fn(&lina_kernels::Compute) -> Vec<Vec<f32>>) {
    use lina_kernels::{Compute, Isa};
    for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
        let one = run(&Compute::with_isa(1, isa));
        for threads in [2, 3] {
            let bits = |outputs: &[Vec<f32>]| -> Vec<Vec<u32>> {
                outputs.iter().map(|output| output.iter().map(|x| x.to_bits()).collect()).collect()
            };
            assert!(
                bits(&run(&Compute::with_isa(threads, isa))) == bits(&one),
                "{isa:?}: {threads} threads give other bits than one"
            );
        }
    }
}
