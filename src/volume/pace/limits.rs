//! The limits of a volume or an account: on requests, on bytes, or on both.
//!
//! A refusal does not say which of them is the matter: requests when they are
//! small, bytes when they are large, and where no page blob's caps tell
//! ([`SMALL`] to [`LARGE`]) both.

use std::time::Duration;

use tokio::time::Instant;

use super::limit::Limit;
use super::meter::{Flow, float};

/// Requests of this size on average are held back by a cap on requests, and
/// those of that size by one on bytes (P60: 33 KiB at both caps, P4: 213 KiB).
const SMALL: f64 = 32.0 * 1024.0;
const LARGE: f64 = 224.0 * 1024.0;
/// Slower than any cap there is; a store that refuses everything is asked this
/// often.
const FEWEST_REQUESTS: f64 = 20.0;
const FEWEST_BYTES: f64 = 2.0 * 1024.0 * 1024.0;
/// A limit that stood for this long was not taken for another one.
const ESTABLISHED: Duration = Duration::from_secs(2);

/// Limits on requests and bytes a second.
#[derive(Debug, Default)]
pub(super) struct Limits {
    pub requests: Option<Limit>,
    pub bytes: Option<Limit>,
}

impl Limits {
    fn iter_mut(&mut self) -> impl Iterator<Item = (&mut Limit, bool)> {
        let requests = self.requests.iter_mut().map(|limit| (limit, false));
        requests.chain(self.bytes.iter_mut().map(|limit| (limit, true)))
    }

    pub fn is_empty(&self) -> bool {
        self.requests.is_none() && self.bytes.is_none()
    }

    /// When the next request may be sent; `waiting` says whether there is one.
    pub fn ready_at(&mut self, now: Instant, waiting: bool) -> Option<Instant> {
        let ready = self.iter_mut().map(|(limit, _)| limit.ready_at()).max();
        for (limit, _) in self.iter_mut() {
            let next = limit.ready_at();
            limit.wait(now, waiting && next > now && Some(next) == ready);
        }
        ready
    }

    pub fn take(&mut self, now: Instant, bytes: u64) {
        for (limit, by_bytes) in self.iter_mut() {
            limit.take(now, cost(by_bytes, bytes), true);
        }
    }

    pub fn give_back(&mut self, bytes: u64) {
        for (limit, by_bytes) in self.iter_mut() {
            limit.give_back(cost(by_bytes, bytes));
        }
    }

    /// Says whether that lets the next one go.
    pub fn passed(&mut self, now: Instant, sent: Instant, bytes: u64) -> bool {
        let mut next = false;
        for (limit, by_bytes) in self.iter_mut() {
            next |= limit.is_measuring();
            limit.passed(now, sent, cost(by_bytes, bytes));
        }
        next
    }

    /// Cuts the limits that a refusal of requests of `size` on average speaks of.
    /// `flow` is what was let through before the first one.
    pub fn refused(&mut self, now: Instant, sent: Instant, size: f64, flow: Flow, best: Duration) {
        let kinds = [
            (
                &mut self.requests,
                size < LARGE,
                FEWEST_REQUESTS,
                flow.requests,
                Some(best),
            ),
            (
                &mut self.bytes,
                size > SMALL,
                FEWEST_BYTES,
                flow.bytes,
                None,
            ),
        ];
        for (limit, meant, floor, known, best) in kinds {
            match limit {
                _ if !meant => {}
                Some(limit) => {
                    limit.refused(now, sent);
                }
                None => *limit = Some(Limit::new(now, floor, known, best)),
            }
        }
    }

    pub fn forget(&mut self, now: Instant) {
        self.requests.take_if(|limit| limit.is_forgotten(now));
        self.bytes.take_if(|limit| limit.is_forgotten(now));
    }

    /// One of them is what is waited for.
    pub fn is_waited_for(&self) -> bool {
        [&self.requests, &self.bytes]
            .into_iter()
            .flatten()
            .any(Limit::is_waited_for)
    }

    /// Set for the first time, or met again, not long ago.
    pub fn is_young(&self, now: Instant) -> bool {
        [&self.requests, &self.bytes]
            .into_iter()
            .flatten()
            .all(|limit| limit.age(now) < ESTABLISHED)
    }

    /// Seconds that a request takes of what there is.
    pub fn share(&self, bytes: u64) -> f64 {
        let by_requests = self.requests.as_ref().map_or(0.0, |l| 1.0 / l.rate());
        let by_bytes = self.bytes.as_ref();
        by_requests + by_bytes.map_or(0.0, |l| float(bytes) / l.rate())
    }
}

fn cost(by_bytes: bool, bytes: u64) -> f64 {
    if by_bytes { float(bytes) } else { 1.0 }
}

/// A rate as people read it.
pub(super) fn rate(limit: Option<&Limit>) -> Option<u64> {
    // Positive, and capped by the conversion itself.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    limit.map(|limit| limit.rate() as u64)
}
