//! Pauses between attempts, and repetition for operations that may be
//! repeated without harm. Page writes are not among them: they need the fence
//! that lives above.

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::error::Advice;
use super::page_blob::Attempt;

/// The longest pause that a store can ask for by `Retry-After`.
const LONGEST_REQUEST: Duration = Duration::from_secs(300);

/// Exponential pauses with full jitter: the nth one is uniform between zero
/// and `base` doubled n times, up to `cap`. A plain value; clone it to start over.
#[derive(Clone, Debug)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    attempt: u32,
}

impl Default for Backoff {
    /// From 100 ms up to 10 s.
    fn default() -> Self {
        Self::new(Duration::from_millis(100), Duration::from_secs(10))
    }
}

impl Backoff {
    /// Starts at `base` and never exceeds `cap` of its own accord.
    #[must_use]
    pub const fn new(base: Duration, cap: Duration) -> Self {
        Self {
            base,
            cap,
            attempt: 0,
        }
    }

    /// The pause before the next attempt. At least `retry_after`, when the
    /// store asked for that (at most 5 minutes of it).
    pub fn next(&mut self, retry_after: Option<Duration>) -> Duration {
        let pause = self.ceiling().mul_f64(rand::random::<f64>());
        self.attempt = self.attempt.saturating_add(1);
        match retry_after {
            Some(asked) => pause.max(asked.min(LONGEST_REQUEST)),
            None => pause,
        }
    }

    /// The longest that the next pause can be, `Retry-After` aside.
    #[must_use]
    pub fn ceiling(&self) -> Duration {
        let factor = 1_u32.checked_shl(self.attempt).unwrap_or(u32::MAX);
        self.base.saturating_mul(factor).min(self.cap)
    }

    /// Pauses given out since the start or the last [`Backoff::reset`].
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.attempt
    }

    /// Starts over, after a success.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }
}

/// Repeats `attempt` while the store is in trouble ([`Advice::Retry`] and
/// [`Advice::SlowDown`]) and the next try would begin before `within` has
/// passed. The operation must be one that can be repeated without harm.
///
/// # Errors
/// The last attempt's.
pub async fn repeat<T, F>(
    within: Duration,
    mut backoff: Backoff,
    mut attempt: impl FnMut() -> F,
) -> Attempt<T>
where
    F: Future<Output = Attempt<T>>,
{
    let deadline = Instant::now() + within;
    loop {
        let error = match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if !matches!(error.advice(), Advice::Retry | Advice::SlowDown) {
            return Err(error);
        }
        let pause = backoff.next(error.retry_after);
        if Instant::now() + pause >= deadline {
            return Err(error);
        }
        tracing::debug!("{error}; again in {pause:?}");
        sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::{Failure, StorageError};
    use super::super::types::BlobAddress;
    use super::*;
    use proptest::prelude::*;

    fn refused(status: u16) -> StorageError {
        StorageError::new(
            "list blobs",
            &BlobAddress::new("acct", "dysks", ""),
            Failure::Status {
                status,
                code: String::new(),
            },
        )
    }

    #[test]
    fn doubles_up_to_its_cap() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        for ceiling in [100, 200, 400, 800, 1000, 1000] {
            assert_eq!(backoff.ceiling(), Duration::from_millis(ceiling));
            backoff.next(None);
        }
        assert_eq!(backoff.attempts(), 6);
        backoff.reset();
        assert_eq!(backoff.ceiling(), Duration::from_millis(100));
        let asked = Duration::from_secs(7);
        assert_eq!(backoff.next(Some(asked)), asked);
        assert_eq!(backoff.next(Some(Duration::MAX)), LONGEST_REQUEST);
    }

    #[tokio::test]
    async fn repeats_what_may_pass_and_nothing_else() {
        let quick = Backoff::new(Duration::from_micros(1), Duration::from_micros(1));
        let mut calls = 0;
        let within = Duration::from_secs(60);
        let result = repeat(within, quick.clone(), || {
            calls += 1;
            let answer = if calls < 4 {
                Err(refused(503))
            } else {
                Ok(calls)
            };
            std::future::ready(answer)
        });
        assert_eq!(result.await.expect("the fourth"), 4);
        let mut calls = 0;
        let result: Attempt<()> = repeat(within, quick.clone(), || {
            calls += 1;
            std::future::ready(Err(refused(404)))
        })
        .await;
        assert_eq!((result.expect_err("final").status(), calls), (Some(404), 1));
        let mut calls = 0;
        let result: Attempt<()> = repeat(Duration::ZERO, quick, || {
            calls += 1;
            std::future::ready(Err(refused(503)))
        })
        .await;
        assert_eq!((result.expect_err("late").status(), calls), (Some(503), 1));
    }

    proptest! {
        #[test]
        fn stays_within_its_ceiling(base in 1u64..5_000, cap in 1u64..60_000, count in 0usize..80) {
            let mut backoff = Backoff::new(Duration::from_millis(base), Duration::from_millis(cap));
            for _ in 0..count {
                let ceiling = backoff.ceiling();
                prop_assert!(ceiling <= Duration::from_millis(cap));
                prop_assert!(backoff.next(None) <= ceiling);
            }
        }
    }
}
