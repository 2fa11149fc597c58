//! Whether a volume gets anything done at the store: what tells a slow one
//! from a stuck one, for those who would rather not wait for the latter, and
//! what tells those who pause that the store is back.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// Who has done nothing for this long was away. Longer than a store that is
/// there leaves all of a volume's requests unanswered or fails them, so that
/// single errors never cut the pauses short that follow upon them.
const AWAY: Duration = Duration::from_secs(1);

/// What is asked of the store, and when it last did any of it.
#[derive(Debug)]
pub struct Progress {
    base: Instant,
    under_way: AtomicU64,
    /// When something was last done, or first asked for after a time without:
    /// nanoseconds since `base`.
    since: AtomicU64,
    /// The store was away and is back.
    back: Notify,
}

/// Something that is asked of the store until this is dropped, attempts,
/// pauses and waiting for a turn included.
#[derive(Debug)]
pub struct UnderWay<'a>(&'a Progress);

impl Default for Progress {
    fn default() -> Self {
        Self {
            base: Instant::now(),
            under_way: AtomicU64::new(0),
            since: AtomicU64::new(0),
            back: Notify::new(),
        }
    }
}

impl Progress {
    fn mark(&self) {
        let nanos = self.base.elapsed().as_nanos();
        // Centuries fit.
        let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
        self.since.store(nanos, Ordering::Release);
    }

    /// Something is asked of the store.
    pub fn begin(&self) -> UnderWay<'_> {
        if self.under_way.load(Ordering::Acquire) == 0 {
            self.mark();
        }
        self.under_way.fetch_add(1, Ordering::AcqRel);
        UnderWay(self)
    }

    /// Pauses for `time`, but not when the store comes back meanwhile. Else an
    /// outage would last as long again for whoever has just begun its longest
    /// pause.
    pub async fn pause(&self, time: Duration) {
        tokio::select! {
            // In a fixed order, so that a simulation can be replayed.
            biased;
            () = self.back.notified() => {}
            () = tokio::time::sleep(time) => {}
        }
    }

    /// For how long something has been asked of the store and nothing was
    /// done; `None` while nothing is asked.
    pub fn stands_still(&self) -> Option<Duration> {
        if self.under_way.load(Ordering::Acquire) == 0 {
            return None;
        }
        let since = Duration::from_nanos(self.since.load(Ordering::Acquire));
        Some(self.base.elapsed().saturating_sub(since))
    }
}

impl UnderWay<'_> {
    /// The store did it.
    pub fn done(self) {
        let away = self.0.stands_still().is_some_and(|still| still >= AWAY);
        self.0.mark();
        if away {
            self.0.back.notify_waiters();
        }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn stands_still_while_something_is_asked_and_nothing_done() {
        let progress = Progress::default();
        tokio::time::advance(10 * SECOND).await;
        assert_eq!(progress.stands_still(), None, "idle");
        let first = progress.begin();
        assert_eq!(progress.stands_still(), Some(Duration::ZERO));
        tokio::time::advance(3 * SECOND).await;
        let second = progress.begin();
        assert_eq!(progress.stands_still(), Some(3 * SECOND));
        second.done();
        assert_eq!(progress.stands_still(), Some(Duration::ZERO), "it moves");
        tokio::time::advance(2 * SECOND).await;
        assert_eq!(progress.stands_still(), Some(2 * SECOND));
        drop(first);
        assert_eq!(progress.stands_still(), None, "given up");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_ends_when_the_store_is_back_and_not_for_any_success() {
        let progress = Progress::default();
        let under_way = progress.begin();
        let began = Instant::now();
        let ended = async {
            progress.pause(5 * SECOND).await;
            began.elapsed()
        };
        let done = async {
            tokio::time::sleep(SECOND / 2).await;
            progress.begin().done();
            tokio::time::sleep(2 * SECOND).await;
            under_way.done();
        };
        let (ended, ()) = tokio::join!(ended, done);
        assert_eq!(ended, SECOND * 5 / 2);
    }
}
