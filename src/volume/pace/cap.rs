//! A cap that a volume's owner sets: requests and bytes a second, whatever the
//! store would bear.
//!
//! A token bucket each for requests and bytes, both of which hold what comes in
//! [`DEPTH`]. A request is admitted when there is a token and as many bytes as
//! it moves, or as the bucket holds; one that moves more leaves a debt, which
//! those after it wait for. They are admitted in the order in which they came.
//! What was admitted once is not counted again when it has to be repeated.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use super::meter::float;

/// What a bucket holds is what comes in this time.
const DEPTH: f64 = 0.1;
/// The least that a clock can be waited for.
const SHORTEST: Duration = Duration::from_micros(1);
/// Below this a filesystem cannot be used.
const FEWEST_REQUESTS: u32 = 10;
/// Below this a single request (of 4 MiB) takes longer than people wait.
const FEWEST_BYTES: u64 = 1 << 20;

/// Requests and bytes a second that a volume sends to the store at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Limits {
    /// Requests a second, at least 10; no limit when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<u32>,
    /// Bytes a second, at least 1 MiB; no limit when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
}

impl Limits {
    /// Nothing is limited.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// What is wrong with them, if anything.
    ///
    /// # Errors
    /// The reason, with the remedy.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.iops.is_some_and(|iops| iops < FEWEST_REQUESTS) {
            return Err("fewer than 10 requests a second serve no disk: limit iops to 10 or more");
        }
        if self.bandwidth.is_some_and(|bytes| bytes < FEWEST_BYTES) {
            return Err("less than 1MiB a second serves no disk: limit bandwidth to 1MiB or more");
        }
        Ok(())
    }
}

/// One bucket.
#[derive(Debug)]
struct Bucket {
    /// A second.
    rate: f64,
    /// Below zero: a debt.
    tokens: f64,
}

impl Bucket {
    fn new(rate: f64) -> Self {
        let mut bucket = Self { rate, tokens: 0.0 };
        bucket.tokens = bucket.depth();
        bucket
    }

    fn depth(&self) -> f64 {
        (self.rate * DEPTH).max(1.0)
    }

    fn fill(&mut self, time: Duration) {
        self.tokens = self
            .rate
            .mul_add(time.as_secs_f64(), self.tokens)
            .min(self.depth());
    }

    /// Seconds until `cost` can be taken.
    fn wait(&self, cost: f64) -> f64 {
        (cost.min(self.depth()) - self.tokens) / self.rate
    }
}

#[derive(Debug)]
struct Buckets {
    limits: Limits,
    requests: Option<Bucket>,
    bytes: Option<Bucket>,
    filled: Instant,
}

impl Buckets {
    fn new(limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            requests: limits.iops.map(|iops| Bucket::new(f64::from(iops))),
            bytes: limits.bandwidth.map(|bytes| Bucket::new(float(bytes))),
            filled: now,
        }
    }

    /// Takes a request of `bytes`, or says when to try again.
    fn take(&mut self, now: Instant, bytes: u64) -> Option<Instant> {
        let time = now.saturating_duration_since(self.filled);
        self.filled = now;
        let costs = [(&mut self.requests, 1.0), (&mut self.bytes, float(bytes))];
        let mut wait = 0.0_f64;
        let mut taken = Vec::with_capacity(2);
        for (bucket, cost) in costs {
            if let Some(bucket) = bucket {
                bucket.fill(time);
                wait = wait.max(bucket.wait(cost));
                taken.push((bucket, cost));
            }
        }
        if wait > 0.0 {
            return Some(now + Duration::from_secs_f64(wait).max(SHORTEST));
        }
        for (bucket, cost) in taken {
            bucket.tokens -= cost;
        }
        None
    }
}

/// A volume's cap.
#[derive(Debug)]
pub struct Cap {
    /// Something is limited; kept by [`Cap::set`].
    on: AtomicBool,
    /// Held by the one who waits for tokens; the others queue for it.
    turn: Semaphore,
    buckets: Mutex<Buckets>,
    /// Told when the limits change.
    changed: Notify,
}

impl Cap {
    /// A cap of `limits`.
    pub fn new(limits: Limits) -> Self {
        Self {
            on: AtomicBool::new(!limits.is_none()),
            turn: Semaphore::new(1),
            buckets: Mutex::new(Buckets::new(limits, Instant::now())),
            changed: Notify::new(),
        }
    }

    fn buckets(&self) -> MutexGuard<'_, Buckets> {
        // Held for a few sums, by nobody who could panic half way.
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The limits now.
    pub fn limits(&self) -> Limits {
        self.buckets().limits
    }

    /// Has other limits hold from now on, also for those who wait already.
    pub fn set(&self, limits: Limits) {
        let mut buckets = self.buckets();
        if buckets.limits == limits {
            return;
        }
        *buckets = Buckets::new(limits, Instant::now());
        self.on.store(!limits.is_none(), Ordering::Release);
        drop(buckets);
        self.changed.notify_waiters();
    }

    /// Whether nobody has to wait.
    pub fn is_open(&self) -> bool {
        !self.on.load(Ordering::Acquire)
    }

    /// Waits until a request that moves `bytes` is admitted. Dropped while it
    /// waits, it has taken nothing.
    pub async fn admit(&self, bytes: u64) {
        if self.is_open() {
            return;
        }
        // Never closed: an error cannot be.
        let _turn = self.turn.acquire().await;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let Some(time) = self.buckets().take(Instant::now(), bytes) else {
                return;
            };
            tokio::select! {
                // In a fixed order, so that a simulation can be replayed.
                biased;
                () = changed => {}
                () = tokio::time::sleep_until(time) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    use tokio::task::JoinSet;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn limits(iops: Option<u32>, bandwidth: Option<u64>) -> Limits {
        Limits { iops, bandwidth }
    }

    /// `depth` callers that are admitted over and over with `bytes` each.
    struct Load {
        admitted: Arc<AtomicU64>,
        _callers: JoinSet<()>,
    }

    impl Load {
        fn start(cap: &Arc<Cap>, depth: usize, bytes: u64) -> Self {
            let admitted = Arc::new(AtomicU64::new(0));
            let mut callers = JoinSet::new();
            for _ in 0..depth {
                let (cap, admitted) = (Arc::clone(cap), Arc::clone(&admitted));
                callers.spawn(async move {
                    loop {
                        cap.admit(bytes).await;
                        admitted.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                });
            }
            Self {
                admitted,
                _callers: callers,
            }
        }

        /// Admitted in the next `seconds`.
        async fn run(&self, seconds: u64) -> u64 {
            let before = self.admitted.load(Ordering::Relaxed);
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            self.admitted.load(Ordering::Relaxed) - before
        }
    }

    /// At least 99% of a cap is used, and no more than it in any ten seconds
    /// but for what the bucket holds.
    fn is_near(admitted: u64, cap: u64) {
        let (least, most) = (cap * 99 / 100, cap + cap / 100 + 1);
        assert!((least..=most).contains(&admitted), "{admitted} of {cap}");
    }

    #[tokio::test(start_paused = true)]
    async fn requests_and_bytes_are_capped_and_the_cap_is_used() {
        for (iops, bandwidth, bytes, cap) in [
            (Some(500), None, 4096, 5000),
            (Some(10), None, 4 * MIB, 100),
            (None, Some(60 * MIB), 4 * MIB, 150),
            (None, Some(MIB), 4 * MIB, 2),
            (Some(500), Some(MIB), 4096, 2560),
            (Some(100), Some(60 * MIB), 4096, 1000),
        ] {
            let cap_of = Arc::new(Cap::new(limits(iops, bandwidth)));
            let load = Load::start(&cap_of, 64, bytes);
            load.run(1).await;
            is_near(load.run(10).await, cap);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_cap_nobody_waits() {
        let cap = Cap::new(Limits::default());
        let begun = Instant::now();
        for _ in 0..1000 {
            cap.admit(4 * MIB).await;
        }
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn other_limits_hold_at_once_for_those_who_wait() {
        let cap = Arc::new(Cap::new(limits(Some(10), None)));
        let load = Load::start(&cap, 64, 4096);
        is_near(load.run(10).await, 100);
        cap.set(limits(Some(1000), None));
        load.run(1).await;
        is_near(load.run(10).await, 10_000);
        cap.set(limits(Some(10), None));
        load.run(1).await;
        is_near(load.run(10).await, 100);
        cap.set(Limits::default());
        assert!(load.run(1).await > 5_000, "still capped");
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_the_queue_takes_nothing() {
        let cap = Arc::new(Cap::new(limits(Some(10), None)));
        cap.admit(0).await;
        for _ in 0..1000 {
            let waited = tokio::time::timeout(Duration::ZERO, cap.admit(0)).await;
            assert!(waited.is_err(), "there is one token in 100 ms");
        }
        let begun = Instant::now();
        cap.admit(0).await;
        assert!(
            begun.elapsed() <= Duration::from_millis(101),
            "{:?}",
            begun.elapsed()
        );
    }

    #[test]
    fn limits_that_serve_no_disk_are_refused() {
        assert_eq!(limits(Some(10), Some(MIB)).check(), Ok(()));
        assert!(limits(Some(9), None).check().is_err());
        assert!(limits(None, Some(MIB - 1)).check().is_err());
    }
}
