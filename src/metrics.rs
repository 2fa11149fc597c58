//! What is counted on the data path: latency histograms that cost a few
//! nanoseconds, and the snapshots that are made of them elsewhere.
//!
//! A histogram is log-linear: each doubling of the latency is cut into eight
//! buckets of equal width, so a quantile is known to within 12.5 %. Recording
//! is two relaxed additions; nothing is locked, nothing is allocated. Numbers
//! only grow; whoever wants a rate looks twice and subtracts.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

const STEPS_LOG2: u32 = 3;
const STEPS: usize = 1 << STEPS_LOG2;
/// Latencies from here on, in microseconds (134 s), share the last bucket.
const END: u64 = 1 << 27;
const BUCKETS: usize = STEPS * (27 - STEPS_LOG2 as usize + 1);

/// A latency histogram, from a microsecond to two minutes.
#[derive(Debug)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    nanoseconds: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            nanoseconds: AtomicU64::new(0),
        }
    }
}

/// The bucket of a latency in whole microseconds, rounded down.
fn index(microseconds: u64) -> usize {
    let value = microseconds.min(END - 1);
    let index = if value < STEPS as u64 {
        value
    } else {
        let octave = u64::from(value.ilog2() - STEPS_LOG2);
        let step = (value >> octave) & (STEPS as u64 - 1);
        (octave + 1) * STEPS as u64 + step
    };
    usize::try_from(index).unwrap_or(BUCKETS - 1)
}

/// The first microsecond that is above the bucket.
fn end(index: usize) -> u64 {
    let next = index + 1;
    if next < STEPS {
        return next as u64;
    }
    ((STEPS + next % STEPS) as u64) << (next / STEPS - 1)
}

impl Histogram {
    /// Counts one that took `latency`.
    pub fn record(&self, latency: Duration) {
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        // Bounds are inclusive, as Prometheus has them: 64 us is in "at most 64 us".
        let at = index(nanoseconds.saturating_sub(1) / 1000);
        self.buckets[at].fetch_add(1, Relaxed);
        self.nanoseconds.fetch_add(nanoseconds, Relaxed);
    }

    /// What was counted so far.
    #[must_use]
    pub fn snapshot(&self) -> Latencies {
        let counts = self.buckets.iter().map(|bucket| bucket.load(Relaxed));
        let filled = counts.enumerate().filter(|(_, count)| *count > 0);
        Latencies {
            buckets: filled.map(|(at, count)| (end(at), count)).collect(),
            microseconds: self.nanoseconds.load(Relaxed) / 1000,
        }
    }
}

/// A histogram as it was at one moment, or between two.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Latencies {
    /// Upper bounds in microseconds, ascending, and how many took at most that
    /// and more than the bound before. Empty buckets are left out.
    pub buckets: Vec<(u64, u64)>,
    /// All latencies together.
    pub microseconds: u64,
}

impl Latencies {
    /// How many were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, count)| count).sum()
    }

    /// What a share of `quantile` (0 to 1) took at most, rounded up to the end
    /// of a bucket; `None` when nothing was counted.
    #[must_use]
    pub fn quantile(&self, quantile: f64) -> Option<Duration> {
        let count = self.count();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        // A share of a count is one too, and not negative.
        let rank = ((count as f64 * quantile).ceil() as u64).clamp(1, count.max(1));
        let mut below = 0;
        self.buckets.iter().find_map(|(end, count)| {
            below += count;
            (below >= rank).then(|| Duration::from_micros(*end))
        })
    }

    /// How many took at most `bound`, which must be a power of two of
    /// microseconds to be exact.
    #[must_use]
    pub fn at_most(&self, bound: Duration) -> u64 {
        let bound = u64::try_from(bound.as_micros()).unwrap_or(u64::MAX);
        let within = self.buckets.iter().take_while(|(end, _)| *end <= bound);
        within.map(|(_, count)| count).sum()
    }

    /// What was counted since `earlier`, of the same histogram.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |end: u64| {
            let found = earlier.buckets.binary_search_by_key(&end, |(end, _)| *end);
            found.map_or(0, |at| earlier.buckets[at].1)
        };
        let grown = self.buckets.iter().map(|(end, count)| {
            // Read bucket by bucket: none is ever smaller than it was.
            (*end, count.saturating_sub(before(*end)))
        });
        Self {
            buckets: grown.filter(|(_, count)| *count > 0).collect(),
            microseconds: self.microseconds.saturating_sub(earlier.microseconds),
        }
    }
}

/// One kind of request: how many, how long, how many bytes, how many failed.
#[derive(Debug, Default)]
pub struct Meter {
    latency: Histogram,
    bytes: AtomicU64,
    errors: AtomicU64,
}

impl Meter {
    /// Counts a request of `bytes` that began at `begun` and ends now.
    pub fn ended(&self, begun: Instant, bytes: u64, failed: bool) {
        self.latency.record(begun.elapsed());
        if failed {
            self.errors.fetch_add(1, Relaxed);
        } else if bytes > 0 {
            self.bytes.fetch_add(bytes, Relaxed);
        }
    }

    /// What was counted so far.
    #[must_use]
    pub fn snapshot(&self) -> Metered {
        Metered {
            bytes: self.bytes.load(Relaxed),
            errors: self.errors.load(Relaxed),
            latency: self.latency.snapshot(),
        }
    }
}

/// A [`Meter`] as it was at one moment, or between two.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metered {
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Those that failed.
    pub errors: u64,
    /// How long all of them took.
    pub latency: Latencies,
}

impl Metered {
    /// What was counted since `earlier`, of the same meter.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            bytes: self.bytes.saturating_sub(earlier.bytes),
            errors: self.errors.saturating_sub(earlier.errors),
            latency: self.latency.since(&earlier.latency),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn buckets_follow_each_other_without_a_gap() {
        for at in 0..BUCKETS {
            let first = if at == 0 { 0 } else { end(at - 1) };
            assert!(first < end(at), "{at}");
            assert_eq!(index(first), at);
            assert_eq!(index(end(at) - 1), at);
        }
        assert_eq!(end(BUCKETS - 1), END);
        assert_eq!(index(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn powers_of_two_are_bounds_and_inclusive() {
        let histogram = Histogram::default();
        histogram.record(Duration::from_micros(64));
        histogram.record(Duration::from_nanos(64_001));
        let seen = histogram.snapshot();
        assert_eq!(seen.at_most(Duration::from_micros(64)), 1);
        assert_eq!(seen.at_most(Duration::from_micros(128)), 2);
        assert_eq!(seen.microseconds, 128);
    }

    #[test]
    fn nothing_has_no_quantile() {
        assert_eq!(Histogram::default().snapshot().quantile(0.5), None);
    }

    #[test]
    fn what_came_since_is_the_difference() {
        let meter = Meter::default();
        let begun = Instant::now();
        meter.ended(begun, 4096, false);
        let before = meter.snapshot();
        meter.ended(begun, 512, false);
        meter.ended(begun, 512, true);
        let since = meter.snapshot().since(&before);
        assert_eq!((since.bytes, since.errors), (512, 1));
        assert_eq!(since.latency.count(), 2);
        assert_eq!(before.since(&before), Metered::default());
    }

    proptest! {
        #[test]
        fn quantiles_are_an_eighth_off_at_most(
            mut latencies in proptest::collection::vec(1u64..10_000_000, 1..200),
            quantile in 0.0f64..=1.0,
        ) {
            let histogram = Histogram::default();
            for latency in &latencies {
                histogram.record(Duration::from_micros(*latency));
            }
            latencies.sort_unstable();
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let rank = ((latencies.len() as f64 * quantile).ceil() as usize).max(1);
            let exact = latencies[rank - 1];
            let seen = histogram.snapshot();
            let told = u64::try_from(seen.quantile(quantile).expect("counted").as_micros()).unwrap();
            prop_assert!(told >= exact && told - exact <= exact / 8 + 1, "{told} for {exact}");
            prop_assert_eq!(seen.count(), latencies.len() as u64);
        }
    }
}
