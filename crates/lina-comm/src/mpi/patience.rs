//! How long the communication thread sleeps between two looks at MPI.
//!
//! MPI moves data over TCP only while somebody calls into it. A thread that never sleeps takes a core from the
//! computation; one that sleeps long leaves the network idle. So it looks again at once a few times, for the answer
//! that is about to come, and then sleeps longer and longer up to a bound. A submission wakes it in any case.

use std::time::Duration;

/// Looks with only a yield in between, after something has happened.
const YIELDS: u32 = 4;
/// The first sleep; each further one is longer by half.
const SHORTEST: Duration = Duration::from_micros(20);
/// No sleep is longer while operations are under way: at 1 Gbit/s, 25 KB.
const LONGEST: Duration = Duration::from_micros(200);

/// The state of one wait.
#[derive(Debug, Default)]
pub(super) struct Patience {
    looks: u32,
}

impl Patience {
    /// Something has happened.
    pub(super) fn reset(&mut self) {
        self.looks = 0;
    }

    /// Nothing has happened: how long to sleep now, zero for a yield.
    pub(super) fn next(&mut self) -> Duration {
        self.looks = self.looks.saturating_add(1);
        let Some(sleeps) = self.looks.checked_sub(YIELDS + 1) else { return Duration::ZERO };
        SHORTEST.mul_f64(1.5f64.powi(sleeps.min(16) as i32)).min(LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeps_grow_to_their_bound_and_start_again() {
        let mut patience = Patience::default();
        let sleeps: Vec<Duration> = (0..40).map(|_| patience.next()).collect();
        assert!(sleeps[..YIELDS as usize].iter().all(Duration::is_zero));
        assert_eq!(sleeps[YIELDS as usize], SHORTEST);
        assert!(sleeps.is_sorted() && sleeps[39] == LONGEST);
        patience.reset();
        assert!(patience.next().is_zero());
    }
}
