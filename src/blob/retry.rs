//! Pauses between attempts: exponential, with jitter. A plain value; whether
//! an attempt may be repeated at all is its caller's business.

use std::cell::RefCell;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

thread_local! {
    static JITTER: RefCell<SmallRng> = RefCell::new(rand::make_rng());
}

/// Makes every pause drawn by this thread from now on follow from `seed`: what
/// a simulation needs to be replayed.
pub fn seed(seed: u64) {
    JITTER.set(SmallRng::seed_from_u64(seed));
}

/// The pauses of one operation.
///
/// The n-th pause is drawn evenly from the upper half of `first * 2^n`, capped
/// at `longest`; a `Retry-After` that is longer wins, up to [`MOST_ASKED`].
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

/// The longest `Retry-After` that is honoured.
pub const MOST_ASKED: Duration = Duration::from_secs(30);

impl Backoff {
    /// Pauses from about `first` up to `longest`.
    #[must_use]
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            next: first,
        }
    }

    /// The next pause, at least what the store asked for.
    pub fn pause(&mut self, retry_after: Option<Duration>) -> Duration {
        let drawn = self
            .next
            .mul_f64(JITTER.with_borrow_mut(|jitter| jitter.random_range(0.5..=1.0)));
        self.next = self.next.saturating_mul(2).min(self.longest);
        drawn.max(retry_after.unwrap_or_default().min(MOST_ASKED))
    }

    /// An attempt succeeded: the next pause is a short one again.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn pauses_grow_to_the_cap_and_start_over() {
        let mut backoff = Backoff::new(10 * MS, 100 * MS);
        for most in [10, 20, 40, 80, 100, 100] {
            let pause = backoff.pause(None);
            assert!(
                pause >= most * MS / 2 && pause <= most * MS,
                "{pause:?} of {most} ms"
            );
        }
        backoff.reset();
        assert!(backoff.pause(None) <= 10 * MS);
    }

    #[test]
    fn a_seed_fixes_the_pauses() {
        let draw = || {
            seed(7);
            let mut backoff = Backoff::new(10 * MS, 100 * MS);
            [(); 5].map(|()| backoff.pause(None))
        };
        assert_eq!(draw(), draw());
        let mut other = Backoff::new(10 * MS, 100 * MS);
        assert_ne!([(); 5].map(|()| other.pause(None)), draw());
    }

    #[test]
    fn the_stores_wish_is_honoured_within_reason() {
        let mut backoff = Backoff::new(10 * MS, 100 * MS);
        assert_eq!(backoff.pause(Some(2000 * MS)), 2000 * MS);
        assert_eq!(backoff.pause(Some(Duration::from_secs(86_400))), MOST_ASKED);
    }
}
