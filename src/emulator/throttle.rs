//! Caps on requests and bytes a second, per blob and for the account, as token
//! buckets: a request waits its turn, or is refused when the wait is too long.

use std::time::{Duration, Instant};

/// Limits of one bucket; 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Caps {
    /// Requests a second.
    pub iops: u64,
    /// Bytes a second.
    pub bandwidth: u64,
}

/// One bucket: when the next request may start, by either limit.
#[derive(Debug, Default)]
pub(super) struct Bucket {
    next_request: Option<Instant>,
    next_byte: Option<Instant>,
}

impl Bucket {
    /// The wait of a request of `bytes` that comes at `now`; none when it would
    /// be longer than `longest`. Takes nothing out yet.
    pub(super) fn wait(&self, caps: Caps, now: Instant, longest: Duration) -> Option<Duration> {
        let mut wait = Duration::ZERO;
        for (limit, next) in [
            (caps.iops, self.next_request),
            (caps.bandwidth, self.next_byte),
        ] {
            if let (true, Some(next)) = (limit > 0, next) {
                wait = wait.max(next.saturating_duration_since(now));
            }
        }
        (wait <= longest).then_some(wait)
    }

    /// Takes a request of `bytes` out.
    pub(super) fn take(&mut self, caps: Caps, now: Instant, bytes: u64) {
        for (limit, cost, next) in [
            (caps.iops, 1, &mut self.next_request),
            (caps.bandwidth, bytes, &mut self.next_byte),
        ] {
            *next = (limit > 0).then(|| {
                let nanos = u128::from(cost) * 1_000_000_000 / u128::from(limit);
                let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
                next.map_or(now, |next| next.max(now)) + cost
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lets_through_at_the_rate_and_refuses_what_waits_too_long() {
        let caps = Caps {
            iops: 100,
            bandwidth: 1 << 20,
        };
        let longest = Duration::from_millis(100);
        let mut bucket = Bucket::default();
        let start = Instant::now();
        let mut waits = Vec::new();
        while let Some(wait) = bucket.wait(caps, start, longest) {
            bucket.take(caps, start, 512);
            waits.push(wait.as_millis());
        }
        assert_eq!(waits, [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]);
        let later = start + Duration::from_millis(10);
        assert!(bucket.wait(caps, later, longest).is_some());

        let mut bucket = Bucket::default();
        bucket.take(caps, start, 1 << 19);
        assert_eq!(bucket.wait(caps, start, longest), None);
        assert_eq!(
            bucket.wait(Caps::default(), start, longest),
            Some(Duration::ZERO)
        );
    }
}
