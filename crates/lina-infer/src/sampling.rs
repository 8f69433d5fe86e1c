//! How the next token is chosen.
//!
//! Penalties, temperature, top-k and top-p are applied in this order, as Hugging Face transformers does, so that settings
//! mean the same here and there. A draw depends on the request's seed and on the number of the token in the answer, and
//! on nothing else: neither what else is in the batch nor the rank changes it.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::InferError;

/// What a request asks of the choice of its tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only the likeliest tokens whose probabilities sum to this are drawn; 1 is all.
    pub top_p: f32,
    /// Only this many of the likeliest tokens are drawn, and others as likely as the last of them; 0 is all.
    pub top_k: usize,
    /// Logits of tokens that the sequence holds are divided by this if positive, else multiplied (Keskar et al., 2019).
    pub repetition_penalty: f32,
    /// Draws repeat with the same seed, whatever else is in the batch.
    pub seed: u64,
    /// How many of the likeliest tokens are reported.
    pub top_logprobs: usize,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0, seed: 0, top_logprobs: 0 }
    }
}

impl Sampling {
    /// Whether the parameters mean anything.
    ///
    /// # Errors
    /// A sentence that names the parameter, what was found and what is expected.
    pub fn check(&self) -> Result<(), String> {
        let Sampling { temperature, top_p, repetition_penalty, .. } = *self;
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(format!("temperature is {temperature}, expected a finite number that is not negative"));
        }
        if !(0.0..=1.0).contains(&top_p) {
            return Err(format!("top_p is {top_p}, expected a number from 0 to 1"));
        }
        if !(repetition_penalty.is_finite() && repetition_penalty > 0.0) {
            return Err(format!("repetition_penalty is {repetition_penalty}, expected a finite number above 0"));
        }
        Ok(())
    }

    /// Whether the likeliest token is always taken. A temperature too small to divide by is as good as 0.
    fn is_greedy(&self) -> bool {
        self.top_k == 1 || !self.temperature.recip().is_finite()
    }
}

/// A token that a [`Sampler`] has chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability under the model, before penalties, temperature and truncation.
    pub logprob: f32,
    /// The likeliest tokens with theirs, likeliest first; as many as [`Sampling::top_logprobs`].
    pub top: Vec<(u32, f32)>,
}

/// Chooses the tokens of one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    /// Tokens that the sequence holds; empty where nothing is penalised.
    seen: BTreeSet<u32>,
    chosen_tokens: u64,
}

impl Sampler {
    /// A sampler for a sequence that is empty yet.
    pub fn new(sampling: Sampling) -> Self {
        Sampler { sampling, seen: BTreeSet::new(), chosen_tokens: 0 }
    }

    /// The sequence holds these tokens. Those that [`Sampler::sample`] chooses are noted by itself; it does no harm to
    /// mention them again.
    pub fn see(&mut self, tokens: &[u32]) {
        if self.sampling.repetition_penalty != 1.0 {
            self.seen.extend(tokens);
        }
    }

    /// Chooses the next token. `logits`, one for each token of the vocabulary, are as before afterwards.
    ///
    /// # Errors
    /// If the logits make no distribution: one of them is NaN or infinite, or all are minus infinity.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<Choice, InferError> {
        let likeliest = maximum(logits);
        let log_total = likeliest + exp_sum(logits, likeliest, 1.0).ln() as f32;
        if !log_total.is_finite() {
            return Err(no_distribution(logits));
        }
        let top = largest(logits, self.sampling.top_logprobs).into_iter();
        let top = top.map(|(token, logit)| (token, logit - log_total)).collect();
        let originals = self.penalise(logits);
        let token = self.choose(logits);
        for (token, logit) in originals {
            logits[token as usize] = logit;
        }
        self.chosen_tokens += 1;
        self.see(&[token]);
        Ok(Choice { token, logprob: logits[token as usize] - log_total, top })
    }

    /// Makes tokens that the sequence holds less likely; returns the logits that they had.
    fn penalise(&self, logits: &mut [f32]) -> Vec<(u32, f32)> {
        let penalty = self.sampling.repetition_penalty;
        let mut originals = Vec::with_capacity(self.seen.len());
        for &token in &self.seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                originals.push((token, *logit));
                *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
            }
        }
        originals
    }

    fn choose(&self, logits: &[f32]) -> u32 {
        let likeliest = maximum(logits);
        let scale = self.sampling.temperature.recip();
        // A penalty close to 0 makes logits infinite, which leaves nothing to draw from.
        if self.sampling.is_greedy() || !likeliest.is_finite() {
            return position(logits, likeliest);
        }
        if (1..logits.len()).contains(&self.sampling.top_k) {
            let candidates = Candidates::at_least(logits, kth_largest(logits, self.sampling.top_k), scale);
            let total = candidates.total();
            return candidates.within(total * f64::from(self.sampling.top_p)).draw(self.uniform());
        }
        let total = exp_sum(logits, likeliest, scale);
        if self.sampling.top_p < 1.0 {
            return nucleus(logits, likeliest, scale, total * f64::from(self.sampling.top_p)).draw(self.uniform());
        }
        draw_from_all(logits, likeliest, scale, self.uniform() * total)
    }

    /// A number from 0 to below 1 that depends on the seed and the number of the token.
    fn uniform(&self) -> f64 {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.sampling.seed.to_le_bytes());
        let mut generator = ChaCha8Rng::from_seed(key);
        generator.set_stream(self.chosen_tokens);
        (generator.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Why [`Sampler::sample`] has nothing to choose from.
fn no_distribution(logits: &[f32]) -> InferError {
    let found = match logits.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
        Some(token) => format!("the logit of token {token} is {}", logits[token]),
        None => "no token has a finite logit".into(),
    };
    InferError::Input(format!("the model's output is unusable: {found}, expected finite numbers; are its weights?"))
}

/// Tokens to draw from, likeliest first, with weights in proportion to their probabilities.
#[derive(Debug)]
struct Candidates {
    tokens: Vec<(u32, f64)>,
}

impl Candidates {
    /// Tokens whose logits are at least `least`. Of equal ones, the lower id comes first.
    fn at_least(logits: &[f32], least: f32, scale: f32) -> Self {
        let mut tokens: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).filter(|&(_, it)| it >= least).collect();
        tokens.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let likeliest = tokens.first().map_or(0.0, |&(_, logit)| logit);
        let weight = |logit: f32| f64::from((logit - likeliest) * scale).exp();
        Candidates { tokens: tokens.into_iter().map(|(token, logit)| (token, weight(logit))).collect() }
    }

    fn total(&self) -> f64 {
        self.tokens.iter().map(|&(_, weight)| weight).sum()
    }

    /// The fewest of the likeliest whose weights sum to `weight`, at least one.
    fn within(mut self, weight: f64) -> Self {
        let mut before = 0.0;
        let kept = self.tokens.iter().take_while(|&&(_, it)| {
            let keep = before < weight;
            before += it;
            keep
        });
        let kept = kept.count().max(1);
        self.tokens.truncate(kept);
        self
    }

    /// The token at `uniform`, of 0 to below 1, of the weights.
    fn draw(&self, uniform: f64) -> u32 {
        let mut left = uniform * self.total();
        let drawn = self.tokens.iter().find(|&&(_, weight)| {
            left -= weight;
            left < 0.0
        });
        drawn.or(self.tokens.last()).expect("the likeliest token is a candidate").0
    }
}

/// The fewest of the likeliest tokens whose weights e^((logit - `likeliest`) * `scale`) sum to `weight`. Most of the
/// vocabulary is far less likely than they are and is not sorted.
fn nucleus(logits: &[f32], likeliest: f32, scale: f32, weight: f64) -> Candidates {
    const FIRST_DISTANCE: f32 = 6.0;
    const LAST_DISTANCE: f32 = 100.0;
    let mut distance = FIRST_DISTANCE;
    loop {
        let least = if distance < LAST_DISTANCE { likeliest - distance / scale } else { f32::NEG_INFINITY };
        let candidates = Candidates::at_least(logits, least, scale);
        if candidates.total() >= weight || least == f32::NEG_INFINITY {
            return candidates.within(weight);
        }
        distance *= 2.0;
    }
}

/// The token at `left` of the weights e^((logit - `likeliest`) * `scale`), in order of ids.
fn draw_from_all(logits: &[f32], likeliest: f32, scale: f32, mut left: f64) -> u32 {
    for (number, block) in logits.chunks(BLOCK).enumerate() {
        let weight = exp_sum(block, likeliest, scale);
        if left < weight {
            for (&logit, token) in block.iter().zip((number * BLOCK) as u32..) {
                left -= f64::from(exp((logit - likeliest) * scale));
                if left < 0.0 {
                    return token;
                }
            }
        }
        left = (left - weight).max(0.0);
    }
    position(logits, likeliest)
}

/// Smallest of the `k` largest logits; `k` is at least 1 and at most their number.
fn kth_largest(logits: &[f32], k: usize) -> f32 {
    let mut largest: BinaryHeap<Reverse<Ordered>> = logits[..k].iter().map(|&logit| Reverse(Ordered(logit))).collect();
    let mut least = largest.peek().map_or(f32::NEG_INFINITY, |it| it.0.0);
    for &logit in &logits[k..] {
        if logit > least {
            largest.pop();
            largest.push(Reverse(Ordered(logit)));
            least = largest.peek().map_or(logit, |it| it.0.0);
        }
    }
    least
}

/// The `n` largest logits with their tokens, largest first; of equal ones, the lower id comes first.
fn largest(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let n = n.min(logits.len());
    if n == 0 {
        return Vec::new();
    }
    let least = kth_largest(logits, n);
    let mut largest: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).filter(|&(_, it)| it >= least).collect();
    largest.sort_by(|a, b| b.1.total_cmp(&a.1));
    largest.truncate(n);
    largest
}

/// A logit in the total order of floating-point numbers.
#[derive(Clone, Copy, Debug)]
struct Ordered(f32);

impl Ord for Ordered {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for Ordered {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Ordered {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Ordered {}

/// Logits that are looked at together, in lanes that the compiler turns into vectors.
const BLOCK: usize = 1024;
const LANES: usize = 16;

/// Largest logit; NaN is passed over.
pub(crate) fn maximum(logits: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = logits.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, logit);
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}

/// The first token with this logit.
pub(crate) fn position(logits: &[f32], logit: f32) -> u32 {
    let block = logits.chunks(BLOCK).position(|block| block.iter().fold(false, |any, &it| any | (it == logit)));
    let first = block.unwrap_or(0) * BLOCK;
    let offset = logits[first..].iter().position(|&it| it == logit);
    (first + offset.unwrap_or(0)) as u32
}

/// Sum of e^((logit - `shift`) * `scale`), in one order on every machine; NaN if a logit is.
fn exp_sum(logits: &[f32], shift: f32, scale: f32) -> f64 {
    let sum = |block: &[f32]| {
        let mut lanes = [0.0_f32; LANES];
        let (whole, rest) = block.as_chunks::<LANES>();
        for chunk in whole {
            for (lane, &logit) in lanes.iter_mut().zip(chunk) {
                *lane += exp((logit - shift) * scale);
            }
        }
        let rest: f32 = rest.iter().map(|&logit| exp((logit - shift) * scale)).sum();
        f64::from(lanes.iter().sum::<f32>() + rest)
    };
    logits.chunks(BLOCK).map(sum).sum()
}

/// e^x for x up to 0 with a relative error near 2e-7, without branches or calls, so that loops over it become vectors; 0
/// below -87, NaN for NaN. Cody and Waite's reduction, and the polynomial of Cephes' `expf`.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LOW: f32 = -87.0;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < LOW { LOW } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let power = shifted - ROUND;
    let rest = clamped - power * 0.693_359_4 + power * 2.121_944_4e-4;
    let coefficients = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let polynomial = coefficients.into_iter().fold(0.0, |value, coefficient| value * rest + coefficient);
    let value = polynomial * rest * rest + rest + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < LOW { 0.0 } else { value * scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Draws often and compares with probabilities.
    fn frequencies(sampling: &Sampling, logits: &[f32]) -> Vec<f64> {
        const DRAWS: u64 = 20_000;
        let mut counts = vec![0.0; logits.len()];
        for seed in 0..DRAWS {
            let mut sampler = Sampler::new(Sampling { seed, ..sampling.clone() });
            let choice = sampler.sample(&mut logits.to_vec()).unwrap();
            counts[choice.token as usize] += 1.0 / DRAWS as f64;
        }
        counts
    }

    fn probabilities(logits: &[f64]) -> Vec<f64> {
        let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
        logits.iter().map(|logit| logit.exp() / total).collect()
    }

    fn assert_close(found: &[f64], expected: &[f64]) {
        for (found, expected) in found.iter().zip(expected) {
            // Four standard deviations of 20,000 draws.
            let tolerance = 4.0 * (expected * (1.0 - expected) / 20_000.0).sqrt();
            assert!((found - expected).abs() <= tolerance, "{found} is not {expected}");
        }
    }

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, -1.0, 2.5];

    #[test]
    fn exp_is_close() {
        for step in 0..870_000 {
            let x = -(step as f32) * 1e-4;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) / exact - 1.0).abs() < 3e-7, "e^{x}");
        }
        assert_eq!((exp(0.0), exp(-90.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn the_likeliest_token_with_its_probability() {
        let mut sampler = Sampler::new(Sampling { top_logprobs: 3, ..Sampling::default() });
        let mut logits = LOGITS;
        let choice = sampler.sample(&mut logits).unwrap();
        assert_eq!(logits, LOGITS);
        assert_eq!(choice.token, 1);
        let expected = probabilities(&LOGITS.map(f64::from));
        assert!((f64::from(choice.logprob) - expected[1].ln()).abs() < 1e-6);
        assert_eq!(choice.top.iter().map(|it| it.0).collect::<Vec<_>>(), [1, 4, 2]);
        for (token, logprob) in choice.top {
            assert!((f64::from(logprob) - expected[token as usize].ln()).abs() < 1e-6);
        }
        // Of equal ones the first, in long rows too.
        let mut long = vec![0.0; 5000];
        (long[3000], long[4000]) = (7.0, 7.0);
        let choice = sampler.sample(&mut long).unwrap();
        assert_eq!(choice.token, 3000);
        assert_eq!(choice.top.iter().map(|it| it.0).collect::<Vec<_>>(), [3000, 4000, 0]);
    }

    #[test]
    fn draws_follow_the_temperature() {
        for temperature in [0.7, 1.0, 1.5] {
            let sampling = Sampling { temperature, ..Sampling::default() };
            let expected = probabilities(&LOGITS.map(|logit| f64::from(logit / temperature)));
            assert_close(&frequencies(&sampling, &LOGITS), &expected);
            // A vocabulary longer than a block, in which all else is unlikely.
            let mut long = vec![-200.0; 3 * BLOCK];
            let places = [5, BLOCK - 1, BLOCK, 2 * BLOCK + 7, 3 * BLOCK - 1];
            places.iter().zip(LOGITS).for_each(|(&place, logit)| long[place] = logit);
            let found = frequencies(&sampling, &long);
            assert_close(&places.map(|place| found[place]), &expected);
        }
    }

    #[test]
    fn truncation_keeps_the_likeliest() {
        let unlikely = f64::NEG_INFINITY;
        let sampling = Sampling { temperature: 1.0, top_k: 3, ..Sampling::default() };
        let three = probabilities(&[unlikely, 3.0, 2.0, unlikely, 2.5]);
        assert_close(&frequencies(&sampling, &LOGITS), &three);
        // 0.506 and 0.307 of the three: two of them reach 0.8, one does not reach 0.6 of them all.
        let two = probabilities(&[unlikely, 3.0, unlikely, unlikely, 2.5]);
        assert_close(&frequencies(&Sampling { top_p: 0.8, ..sampling.clone() }, &LOGITS), &two);
        let sampling = Sampling { temperature: 1.0, top_p: 0.6, ..Sampling::default() };
        assert_close(&frequencies(&sampling, &LOGITS), &two);
        // As likely as the last of the k is likely enough.
        let sampling = Sampling { temperature: 1.0, top_k: 2, ..Sampling::default() };
        assert_close(&frequencies(&sampling, &[1.0, 2.0, 1.0, 0.0]), &probabilities(&[1.0, 2.0, 1.0, unlikely]));
        // Top-p of the whole vocabulary's probability, however flat it is.
        let flat = vec![0.5; 400];
        let sampling = Sampling { temperature: 1.0, top_p: 0.25, ..Sampling::default() };
        let found = frequencies(&sampling, &flat);
        assert!(found[..100].iter().all(|&share| share > 0.0) && found[100..].iter().all(|&share| share == 0.0));
        let none = Sampling { temperature: 1.0, top_p: 0.0, ..Sampling::default() };
        assert!(frequencies(&none, &LOGITS)[1] > 0.999_999);
    }

    #[test]
    fn what_was_seen_is_penalised() {
        let mut sampler = Sampler::new(Sampling { repetition_penalty: 2.0, ..Sampling::default() });
        sampler.see(&[1, 3, 1, 900]);
        // 3.0 counts as 1.5, then 2.5 as 1.25, then 2.0 as 1.0; 3.0 is the largest again.
        let tokens: Vec<u32> = (0..4).map(|_| sampler.sample(&mut LOGITS.to_vec()).unwrap().token).collect();
        assert_eq!(tokens, [4, 2, 1, 1]);
        let expected = probabilities(&LOGITS.map(f64::from));
        let choice = sampler.sample(&mut LOGITS.to_vec()).unwrap();
        assert!((f64::from(choice.logprob) - expected[1].ln()).abs() < 1e-6, "of the model, without the penalty");
        let mut sampler = Sampler::new(Sampling { repetition_penalty: 1e-38, temperature: 1.0, ..Sampling::default() });
        sampler.see(&[2]);
        assert_eq!(sampler.sample(&mut LOGITS.map(|logit| logit * 100.0)).unwrap().token, 2);
    }

    #[test]
    fn draws_depend_on_the_seed_and_the_number_of_the_token() {
        let sampling = |seed| Sampling { temperature: 1.0, seed, ..Sampling::default() };
        let flat = vec![0.0; 1000];
        let draws = |seed| {
            let mut sampler = Sampler::new(sampling(seed));
            (0..20).map(|_| sampler.sample(&mut flat.clone()).unwrap().token).collect::<Vec<_>>()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
        let distinct: BTreeSet<u32> = draws(1).into_iter().collect();
        assert!(distinct.len() > 15);
        // What has been drawn before does not matter, only how many.
        let mut sampler = Sampler::new(sampling(1));
        sampler.sample(&mut [0.0, 1.0]).unwrap();
        assert_eq!(sampler.sample(&mut flat.clone()).unwrap().token, draws(1)[1]);
    }

    #[test]
    fn numbers_that_are_no_logits_are_named() {
        let message = |mut logits: Vec<f32>| {
            let sampling = Sampling { temperature: 0.5, top_p: 0.5, top_logprobs: 2, ..Sampling::default() };
            Sampler::new(sampling).sample(&mut logits).unwrap_err().to_string()
        };
        let end = ", expected finite numbers; are its weights?";
        assert_eq!(
            message(vec![0.0, f32::NAN]),
            format!("the model's output is unusable: the logit of token 1 is NaN{end}")
        );
        assert!(message(vec![f32::INFINITY, 1.0]).contains("the logit of token 0 is inf"));
        assert!(message(vec![f32::NEG_INFINITY; 40]).contains("no token has a finite logit"));
        assert!(message(vec![]).contains("no token"));
        let mut long = vec![0.0; 100_000];
        long[99_999] = f32::NAN;
        assert!(message(long).contains("token 99999"));
        // A token that is ruled out is none.
        let mut sampler = Sampler::new(Sampling { temperature: 1.0, ..Sampling::default() });
        assert_eq!(sampler.sample(&mut [f32::NEG_INFINITY, 0.0]).unwrap().token, 1);
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        let message = |sampling: Sampling| sampling.check().unwrap_err();
        let good = Sampling::default();
        assert_eq!(good.check(), Ok(()));
        let found = message(Sampling { temperature: -1.0, ..good.clone() });
        assert_eq!(found, "temperature is -1, expected a finite number that is not negative");
        let found = message(Sampling { top_p: f32::NAN, ..good.clone() });
        assert_eq!(found, "top_p is NaN, expected a number from 0 to 1");
        let found = message(Sampling { repetition_penalty: 0.0, ..good });
        assert_eq!(found, "repetition_penalty is 0, expected a finite number above 0");
        // Too small to divide by, and no less good for that.
        let cold = Sampling { temperature: 1e-40, ..Sampling::default() };
        assert_eq!(Sampler::new(cold).sample(&mut LOGITS.to_vec()).unwrap().token, 1);
    }
}
