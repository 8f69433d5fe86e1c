//! How long the communication thread sleeps between two looks at a library that calls nobody back.
//!
//! MPI even moves data over TCP only while somebody calls into it. A thread that never sleeps takes a core from the
//! computation; one that sleeps long leaves the network idle. So it looks again at once a few times, for the answer
//! that is about to come, and then sleeps longer and longer up to a bound. A submission wakes it in any case.

use std::time::Duration;

/// The first sleep; each further one is longer by half.
const SHORTEST: Duration = Duration::from_micros(20);

/// The state of one wait.
#[derive(Debug)]
pub(crate) struct Patience {
    /// Looks with only a yield in between, after something has happened.
    yields: u32,
    /// No sleep is longer while operations are under way.
    longest: Duration,
    looks: u32,
}

impl Patience {
    pub(crate) fn new(yields: u32, longest: Duration) -> Self {
        Patience { yields, longest, looks: 0 }
    }

    /// Something has happened.
    pub(crate) fn reset(&mut self) {
        self.looks = 0;
    }

    /// Nothing has happened: how long to sleep now, zero for a yield.
    pub(crate) fn next(&mut self) -> Duration {
        self.looks = self.looks.saturating_add(1);
        let Some(sleeps) = self.looks.checked_sub(self.yields + 1) else { return Duration::ZERO };
        SHORTEST.mul_f64(1.5f64.powi(sleeps.min(16) as i32)).min(self.longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeps_grow_to_their_bound_and_start_again() {
        let longest = Duration::from_micros(200);
        let mut patience = Patience::new(4, longest);
        let sleeps: Vec<Duration> = (0..40).map(|_| patience.next()).collect();
        assert!(sleeps[..4].iter().all(Duration::is_zero));
        assert_eq!(sleeps[4], SHORTEST);
        assert!(sleeps.is_sorted() && sleeps[39] == longest);
        patience.reset();
        assert!(patience.next().is_zero());
    }
}
