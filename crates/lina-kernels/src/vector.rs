//! Building blocks of the row kernels, written so that the compiler vectorises them once inlined into a [`crate::isa::multiversion`] function:
//! sums and maxima run in a fixed number of lanes, added up in a fixed order.

/// Independent lanes of a reduction: four 512-bit vectors hide the latency of an add in long rows, one makes short rows cheap to finish.
const LONG_LANES: usize = 64;
const SHORT_LANES: usize = 16;
/// Rows from this length on are long.
const LONG: usize = 256;

/// `a * b + c`, fused where that is one instruction.
#[inline(always)]
pub(crate) fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// e^x with a relative error near 1e-7; 0 below -87.33, infinite above 88.37, NaN for NaN. Cody-Waite reduction and the polynomial of Cephes' `expf`.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    const LOW: f32 = -87.33;
    const HIGH: f32 = 88.37;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < LOW { LOW } else { x };
    let clamped = if clamped > HIGH { HIGH } else { clamped };
    let shifted = fma::<FMA>(clamped, std::f32::consts::LOG2_E, ROUND);
    let power = shifted - ROUND;
    let rest = fma::<FMA>(power, -0.693_359_4, clamped);
    let rest = fma::<FMA>(power, 2.121_944_4e-4, rest);
    let mut polynomial = 1.987_569_1e-4;
    polynomial = fma::<FMA>(polynomial, rest, 1.398_199_9e-3);
    polynomial = fma::<FMA>(polynomial, rest, 8.333_452e-3);
    polynomial = fma::<FMA>(polynomial, rest, 4.166_579_6e-2);
    polynomial = fma::<FMA>(polynomial, rest, 1.666_666_5e-1);
    polynomial = fma::<FMA>(polynomial, rest, 0.5);
    let value = fma::<FMA>(polynomial * rest, rest, rest) + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    let result = value * scale;
    let result = if x < LOW { 0.0 } else { result };
    if x > HIGH { f32::INFINITY } else { result }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// Hyperbolic tangent, absolute error near 1e-7.
#[inline(always)]
pub(crate) fn tanh<const FMA: bool>(x: f32) -> f32 {
    1.0 - 2.0 / (exp::<FMA>(2.0 * x) + 1.0)
}

/// Error function, by the rational approximation that Eigen uses; a few units in the last place.
#[inline(always)]
pub(crate) fn erf<const FMA: bool>(x: f32) -> f32 {
    // Beyond 4 the function is 1 in f32.
    let x = if x > 4.0 { 4.0 } else { x };
    let x = if x < -4.0 { -4.0 } else { x };
    let square = x * x;
    let mut numerator = -2.726_142_3e-10;
    for coefficient in [2.770_681_4e-8, -2.101_024e-6, -5.692_506_4e-5, -7.349_906_3e-4, -2.954_6e-3, -1.609_603_3e-2] {
        numerator = fma::<FMA>(numerator, square, coefficient);
    }
    let mut denominator = -1.456_607_2e-5;
    for coefficient in [-2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2] {
        denominator = fma::<FMA>(denominator, square, coefficient);
    }
    x * numerator / denominator
}

/// Folds `update` over `0..len` in a number of lanes that depends on `len` alone, then the lanes by `combine`.
#[inline(always)]
fn reduce(len: usize, identity: f32, combine: impl Fn(f32, f32) -> f32, update: impl Fn(f32, usize) -> f32) -> f32 {
    if len >= LONG {
        reduce_in::<LONG_LANES>(len, identity, combine, update)
    } else {
        reduce_in::<SHORT_LANES>(len, identity, combine, update)
    }
}

#[inline(always)]
fn reduce_in<const LANES: usize>(
    len: usize,
    identity: f32,
    combine: impl Fn(f32, f32) -> f32,
    update: impl Fn(f32, usize) -> f32,
) -> f32 {
    let mut lanes = [identity; LANES];
    let whole = len / LANES * LANES;
    let mut base = 0;
    while base < whole {
        for (lane, value) in lanes.iter_mut().enumerate() {
            *value = update(*value, base + lane);
        }
        base += LANES;
    }
    for (value, index) in lanes.iter_mut().zip(whole..len) {
        *value = update(*value, index);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = combine(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Sum of `x`.
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    reduce(x.len(), 0.0, |a, b| a + b, |acc, i| acc + x[i])
}

/// Sum of the products of `a` and `b`, which have one length.
#[inline(always)]
pub(crate) fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let b = &b[..a.len()];
    reduce(a.len(), 0.0, |x, y| x + y, |acc, i| fma::<FMA>(a[i], b[i], acc))
}

/// Sum of the products of `a`, `b` and `c`, which have one length.
#[inline(always)]
pub(crate) fn dot3<const FMA: bool>(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let (b, c) = (&b[..a.len()], &c[..a.len()]);
    reduce(a.len(), 0.0, |x, y| x + y, |acc, i| fma::<FMA>(a[i] * b[i], c[i], acc))
}

/// Largest element, -infinity for none; a NaN is passed over.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    reduce(x.len(), f32::NEG_INFINITY, larger, |acc, i| larger(acc, x[i]))
}

/// Replaces each element by e^(x - shift). A remainder goes through a padded vector: softmax rows are often shorter than one.
#[inline(always)]
pub(crate) fn exp_all<const FMA: bool>(x: &mut [f32], shift: f32) {
    let mut chunks = x.chunks_exact_mut(SHORT_LANES);
    for chunk in &mut chunks {
        for value in chunk {
            *value = exp::<FMA>(*value - shift);
        }
    }
    let rest = chunks.into_remainder();
    if !rest.is_empty() {
        let mut padded = [0.0; SHORT_LANES];
        padded[..rest.len()].copy_from_slice(rest);
        for value in &mut padded {
            *value = exp::<FMA>(*value - shift);
        }
        rest.copy_from_slice(&padded[..rest.len()]);
    }
}

/// As [`exp_all`]; returns the sum of the results.
#[inline(always)]
pub(crate) fn exp_sum<const FMA: bool>(x: &mut [f32], shift: f32) -> f32 {
    exp_all::<FMA>(x, shift);
    sum(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0_f64;
        for step in -870_000..883_000 {
            let x = step as f32 * 1e-4;
            let exact = f64::from(x).exp();
            for value in [exp::<true>(x), exp::<false>(x)] {
                worst = worst.max((f64::from(value) / exact - 1.0).abs());
            }
        }
        assert!(worst < 2e-7, "relative error {worst:e}");
        assert_eq!(exp::<true>(0.0), 1.0);
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<true>(-100.0), 0.0);
        assert_eq!(exp::<true>(f32::INFINITY), f32::INFINITY);
        assert!(exp::<true>(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_take_any_length() {
        for len in 0..600 {
            let x: Vec<f32> = (0..len).map(|i| ((i * 37) % 101) as f32).collect();
            assert_eq!(sum(&x), x.iter().sum::<f32>());
            assert_eq!(dot::<true>(&x, &x), x.iter().map(|x| x * x).sum::<f32>());
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
