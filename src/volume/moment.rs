//! Moments on a clock that goes on while the machine sleeps, as a lease does.
//!
//! The timers of the runtime stand still meanwhile (`CLOCK_MONOTONIC`), and
//! tests move them; so a moment is one of theirs, and how long the machine had
//! slept by then.

use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime};
use tokio::time::Instant;

/// Less sleep than this is taken for the time between two looks at clocks.
const NO_SLEEP: Duration = Duration::from_secs(1);

/// A moment of the past.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// By the runtime's clock.
    pub at: Instant,
    /// How long the machine had slept since it started.
    slept: Duration,
}

impl Moment {
    /// This moment.
    #[must_use]
    pub fn now() -> Self {
        let at = Instant::now();
        // In this order it is rather too little than too much, so that the time
        // since then is rather too much than too little.
        let (awake_and_asleep, awake) = (boottime(), monotonic());
        Self {
            at,
            slept: awake_and_asleep.saturating_sub(awake),
        }
    }

    /// The time since then, sleep included.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        let awake = monotonic();
        let slept = boottime().saturating_sub(awake);
        self.elapsed_with(slept)
    }

    fn elapsed_with(&self, slept: Duration) -> Duration {
        let since = slept.saturating_sub(self.slept);
        let since = if since < NO_SLEEP {
            Duration::ZERO
        } else {
            since
        };
        self.at.elapsed() + since
    }
}

fn boottime() -> Duration {
    duration(clock_gettime(ClockId::Boottime))
}

fn monotonic() -> Duration {
    duration(clock_gettime(ClockId::Monotonic))
}

/// Both clocks count from the machine's start, so neither is negative.
fn duration(time: Timespec) -> Duration {
    Duration::try_from(time).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_goes_on_while_the_machine_sleeps() {
        let then = Moment::now();
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!(then.elapsed(), Duration::from_secs(3), "nobody slept");
        let night = then.slept + Duration::from_secs(3600);
        assert_eq!(then.elapsed_with(night), Duration::from_secs(3603));
    }

    #[test]
    fn the_clock_with_sleep_is_never_behind_the_one_without() {
        let awake = monotonic();
        assert!(!awake.is_zero() && boottime() >= awake);
    }
}
