//! Time of a choice from a large vocabulary: `cargo bench -p lina-infer --bench sampling`.

use std::hint::black_box;
use std::time::Instant;

use lina_infer::{Sampler, Sampling};

const VOCABULARY: usize = 150_000;
const CHOICES: usize = 200;

fn main() {
    // As peaked as a language model's: most tokens are far less likely than the first.
    let mut logits: Vec<f32> =
        (0..VOCABULARY).map(|token| 12.0 - 4.0 * (1.0 + (token * 7919 % VOCABULARY) as f32).ln()).collect();
    let draw = Sampling { temperature: 0.8, ..Sampling::default() };
    for (name, sampling) in [
        ("greedy", Sampling::default()),
        ("greedy, 5 log-probabilities", Sampling { top_logprobs: 5, ..Sampling::default() }),
        ("temperature", draw.clone()),
        ("temperature, top-k 50, top-p 0.95", Sampling { top_k: 50, top_p: 0.95, ..draw.clone() }),
        ("temperature, top-p 0.95", Sampling { top_p: 0.95, ..draw }),
    ] {
        let mut sampler = Sampler::new(sampling);
        let mut times: Vec<f64> = (0..CHOICES)
            .map(|_| {
                let begin = Instant::now();
                black_box(sampler.sample(black_box(&mut logits))).expect("the logits are finite");
                begin.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        times.sort_by(f64::total_cmp);
        println!("{name:<36} {:>6.0} us, median of {CHOICES}, vocabulary of {VOCABULARY}", times[CHOICES / 2]);
    }
}
