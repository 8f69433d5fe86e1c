//! How a layer's popularity can be known before its gate has run.

use std::fmt;
use std::str::FromStr;

/// Where an estimate comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Estimator {
    /// The paper's: tokens that took the same path choose alike ([`PathTables`](crate::PathTables)).
    Path,
    /// The next layer's gate on the hidden state that enters this layer's experts (Libra).
    NextGate,
    /// The layer's popularity in batches before ([`History`]), as production balancers do.
    History,
    /// The truth.
    Oracle,
}

impl Estimator {
    /// Every estimator, in the order in which tables show them.
    pub const ALL: [Estimator; 4] = [Estimator::Path, Estimator::NextGate, Estimator::History, Estimator::Oracle];

    /// The name in configuration files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Estimator::Path => "path",
            Estimator::NextGate => "next-gate",
            Estimator::History => "history",
            Estimator::Oracle => "oracle",
        }
    }
}

impl fmt::Display for Estimator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Estimator {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Estimator::ALL.into_iter().find(|estimator| estimator.name() == name).ok_or_else(|| {
            let names = Estimator::ALL.map(Estimator::name).join(", ");
            format!("estimator `{name}` is unknown, expected one of {names}")
        })
    }
}

/// Exponential moving average of a layer's popularity over batches.
#[derive(Clone, Debug, PartialEq)]
pub struct History {
    decay: f64,
    /// `[experts]`: weighted sums of popularity.
    sums: Vec<f64>,
    /// Sum of the weights.
    weight: f64,
}

impl History {
    /// Nothing seen yet. A batch counts `decay` times what the next one counts; out of [0, 1] it is brought there.
    pub fn new(experts: usize, decay: f64) -> Self {
        let decay = if decay.is_nan() { 0.0 } else { decay.clamp(0.0, 1.0) };
        History { decay, sums: vec![0.0; experts], weight: 0.0 }
    }

    /// A batch in which expert e was chosen by `rows[e]` tokens. A batch without rows changes nothing.
    ///
    /// # Panics
    /// If there are not as many numbers as experts.
    pub fn add(&mut self, rows: &[f64]) {
        assert_eq!(rows.len(), self.sums.len(), "one number for every expert");
        let total: f64 = rows.iter().sum();
        if !(total.is_finite() && total > 0.0) {
            return;
        }
        for (sum, rows) in self.sums.iter_mut().zip(rows) {
            *sum = *sum * self.decay + rows / total;
        }
        self.weight = self.weight * self.decay + 1.0;
    }

    /// Share of each expert in the choices, summing to 1; `None` before the first batch.
    pub fn popularity(&self) -> Option<Vec<f64>> {
        (self.weight > 0.0).then(|| self.sums.iter().map(|sum| sum / self.weight).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for estimator in Estimator::ALL {
            assert_eq!(estimator.to_string().parse(), Ok(estimator));
        }
        let error = "gate".parse::<Estimator>().unwrap_err();
        assert_eq!(error, "estimator `gate` is unknown, expected one of path, next-gate, history, oracle");
    }

    #[test]
    fn history_forgets_at_its_rate_and_weighs_batches_alike() {
        let mut history = History::new(2, 0.5);
        assert_eq!(history.popularity(), None);
        history.add(&[10.0, 0.0]);
        assert_eq!(history.popularity(), Some(vec![1.0, 0.0]));
        // A larger batch has no larger weight; weights are now 0.5 and 1.
        history.add(&[0.0, 1000.0]);
        let popularity = history.popularity().unwrap();
        assert!((popularity[0] - 1.0 / 3.0).abs() < 1e-12 && (popularity[1] - 2.0 / 3.0).abs() < 1e-12);
        history.add(&[0.0, 0.0]);
        assert_eq!(history.popularity().unwrap(), popularity);
    }
}
