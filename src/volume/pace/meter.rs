//! What the store let through lately, counted without a lock: what is known
//! when it refuses for the first time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// Two windows of this length at most are looked at.
const WINDOW: Duration = Duration::from_secs(1);
/// A rate over less than this is none.
const SHORTEST: Duration = Duration::from_millis(5);

#[derive(Debug, Default)]
struct Counts {
    requests: AtomicU64,
    bytes: AtomicU64,
    /// Nanoseconds; of the present window its beginning.
    time: AtomicU64,
}

/// Counts of the present window and the one before. Two threads that turn the
/// page at once may lose a few counts, which an estimate can bear.
#[derive(Debug)]
pub(super) struct Meter {
    base: Instant,
    /// The shortest time that an answer took, in nanoseconds.
    best: AtomicU64,
    now: Counts,
    before: Counts,
}

/// Requests and bytes a second.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Flow {
    pub requests: f64,
    pub bytes: f64,
}

impl Meter {
    pub fn new() -> Self {
        Self {
            base: Instant::now(),
            best: AtomicU64::new(u64::MAX),
            now: Counts::default(),
            before: Counts::default(),
        }
    }

    fn nanos(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.base);
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    }

    /// A request of `bytes` that was sent at `sent` went through.
    pub fn passed(&self, now: Instant, sent: Instant, bytes: u64) {
        let at = self.nanos(now);
        let took = at.saturating_sub(self.nanos(sent));
        if took < self.best.load(Ordering::Relaxed) {
            self.best.fetch_min(took, Ordering::Relaxed);
        }
        let began = self.now.time.load(Ordering::Relaxed);
        let age = at.saturating_sub(began);
        if u128::from(age) >= WINDOW.as_nanos() || began == 0 {
            // After a pause of the callers the past says nothing.
            let fresh = u128::from(age) < 2 * WINDOW.as_nanos() && began != 0;
            let start = if fresh { at } else { self.nanos(sent).max(1) };
            let turned =
                self.now
                    .time
                    .compare_exchange(began, start, Ordering::Relaxed, Ordering::Relaxed);
            if turned.is_ok() {
                let requests = self.now.requests.swap(0, Ordering::Relaxed);
                let bytes = self.now.bytes.swap(0, Ordering::Relaxed);
                let keep = u64::from(fresh);
                self.before
                    .requests
                    .store(requests * keep, Ordering::Relaxed);
                self.before.bytes.store(bytes * keep, Ordering::Relaxed);
                self.before.time.store(age * keep, Ordering::Relaxed);
            }
        }
        self.now.requests.fetch_add(1, Ordering::Relaxed);
        self.now.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The shortest time that an answer took; long, when there was none.
    pub fn best(&self) -> Duration {
        Duration::from_nanos(self.best.load(Ordering::Relaxed)).min(WINDOW)
    }

    /// What went through lately, and over how many requests that is known.
    pub fn flow(&self, now: Instant) -> (Flow, u64) {
        let read = |counts: &Counts| {
            (
                counts.requests.load(Ordering::Relaxed),
                counts.bytes.load(Ordering::Relaxed),
                counts.time.load(Ordering::Relaxed),
            )
        };
        let ((requests, bytes, began), before) = (read(&self.now), read(&self.before));
        let age = self.nanos(now).saturating_sub(began);
        if began == 0 || u128::from(age) >= 2 * WINDOW.as_nanos() {
            return (Flow::default(), 0);
        }
        let time = Duration::from_nanos(age.saturating_add(before.2)).max(SHORTEST);
        let (requests, bytes) = (requests + before.0, bytes + before.1);
        let flow = Flow {
            requests: float(requests) / time.as_secs_f64(),
            bytes: float(bytes) / time.as_secs_f64(),
        };
        (flow, requests)
    }
}

/// Counts of a few seconds, which a float holds exactly.
#[allow(clippy::cast_precision_loss)]
pub(super) fn float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn tells_the_rate_of_the_last_seconds() {
        let meter = Meter::new();
        assert_eq!(meter.flow(Instant::now()).1, 0);
        tokio::time::advance(Duration::from_secs(60)).await;
        for _ in 0..250 {
            let sent = Instant::now();
            tokio::time::advance(Duration::from_millis(10)).await;
            meter.passed(Instant::now(), sent, 4096);
        }
        let (flow, known) = meter.flow(Instant::now());
        assert!((flow.requests - 100.0).abs() < 2.0, "{flow:?}");
        assert!(
            (flow.bytes / flow.requests - 4096.0).abs() < 1.0,
            "{flow:?}"
        );
        assert!(known >= 100, "{known}");
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!(meter.flow(Instant::now()).1, 0, "long ago");
    }
}
