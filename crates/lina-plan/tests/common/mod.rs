//! Synthetic routing: skewed, different for every source and batch, and drifting as batches go by.

/// Numbers that are the same on every machine.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Of [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Mean 0, variance 1, roughly normal.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }
}

/// Batches of one layer.
pub struct Trace {
    devices: usize,
    rows_per_source: usize,
    drift: f64,
    /// Logarithms of the experts' popularities, up to a constant.
    logits: Vec<f64>,
    random: Random,
}

impl Trace {
    /// The logarithm of the popularities has standard deviation `skew`, and changes by `drift` of that every batch.
    pub fn new(experts: usize, devices: usize, rows_per_source: usize, skew: f64, drift: f64, seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let logits = (0..experts).map(|_| skew * random.normal()).collect();
        Trace { devices, rows_per_source, drift: drift * skew, logits, random }
    }

    /// The next batch: `[devices, experts]`.
    pub fn batch(&mut self) -> Vec<u32> {
        let experts = self.logits.len();
        for logit in &mut self.logits {
            // Keeps the variance.
            let keep = (1.0 - self.drift * self.drift).max(0.0).sqrt();
            *logit = *logit * keep + self.drift * self.random.normal();
        }
        let mut assigned = vec![0u32; self.devices * experts];
        for of_source in assigned.chunks_exact_mut(experts) {
            // Sequences of a source have a taste of their own.
            let weights: Vec<f64> =
                self.logits.iter().map(|logit| (logit + 0.3 * self.random.normal()).exp()).collect();
            let total: f64 = weights.iter().sum();
            for _ in 0..self.rows_per_source {
                let mut at = self.random.unit() * total;
                let expert = weights.iter().position(|weight| {
                    at -= weight;
                    at < 0.0
                });
                of_source[expert.unwrap_or(experts - 1)] += 1;
            }
        }
        assigned
    }
}

/// Rows of each expert, from all sources.
pub fn by_expert(assigned: &[u32], devices: usize) -> Vec<f64> {
    let experts = assigned.len() / devices;
    (0..experts).map(|expert| (0..devices).map(|source| f64::from(assigned[source * experts + expert])).sum()).collect()
}
