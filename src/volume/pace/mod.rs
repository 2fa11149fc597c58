//! How fast requests for data go to the store: as fast as the callers like,
//! until the store says that it is too fast.
//!
//! A request asks its volume's [`Pace`] for a [`Permit`], is sent, and tells
//! the permit what the store said. As long as the store never throttled, that
//! costs a few counters. Once it did, requests queue here rather than being
//! refused there: [`limit`] learns the rate that the store lets through, of
//! requests or of bytes ([`limits`]); [`window`] bounds what is under way at a
//! store that times out, [`lanes`] holds the queues and decides who goes next.
//!
//! Volumes of one account share an [`AccountPace`], because an account has a
//! limit too. Of that each volume gets an equal part if it wants it, however
//! many requests the others have waiting. Within a volume requests go in the
//! order in which they came, those that the store refused before them.
//!
//! Before all that comes the volume's own [`cap`], where its owner set one.
//!
//! Lease renewals and raises of the sequence number never come here.

mod cap;
mod lanes;
mod limit;
mod limits;
mod meter;
#[cfg(test)]
mod trial;
mod window;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::blob::retry::MOST_ASKED;
use crate::blob::{Advice, Attempt, Failure, StorageError};
pub use cap::{Cap, Limits};
use lanes::{Lanes, Next, Waiter};
use meter::Meter;

/// What the volumes of one account share; cheap to clone.
#[derive(Clone, Debug)]
pub struct AccountPace(Arc<Account>);

#[derive(Debug)]
struct Account {
    /// Volumes are held back (else every request goes at once).
    on: bool,
    /// The account as a whole is throttled; kept by `lanes`.
    throttled: Arc<AtomicBool>,
    lanes: Mutex<Lanes>,
    /// Something changed that the dispatcher may be waiting for.
    news: Notify,
}

/// One volume's way to the store.
#[derive(Debug)]
pub struct Pace {
    account: Arc<Account>,
    lane: u64,
    shared: Arc<Shared>,
}

/// What is known of a volume without a lock.
#[derive(Debug)]
struct Shared {
    /// The volume by itself is throttled.
    throttled: AtomicBool,
    under_way: AtomicU64,
    refused: AtomicU64,
    meter: Meter,
}

/// The right to send one request, until it is dropped.
#[derive(Debug)]
pub struct Permit {
    account: Arc<Account>,
    lane: u64,
    shared: Arc<Shared>,
    sent: Instant,
    bytes: u64,
}

/// A volume's throttling, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Throttled {
    /// Since when.
    pub since: Timestamp,
    /// The whole account is throttled, not this volume alone; the rates are
    /// the account's.
    pub account: bool,
    /// Requests a second that are sent at most, if that is limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<u64>,
    /// Bytes a second that are moved at most, if that is limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Requests under way at most, if that is limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub under_way: Option<u64>,
    /// Requests that wait here.
    pub waiting: u64,
}

impl std::fmt::Display for Throttled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut limits = Vec::new();
        if let Some(requests) = self.requests {
            limits.push(format!("{requests} requests/s"));
        }
        if let Some(bytes) = self.bytes {
            limits.push(format!("{} KiB/s", bytes / 1024));
        }
        if let Some(under_way) = self.under_way {
            limits.push(format!("{under_way} requests at a time"));
        }
        let whose = if self.account { " for the account" } else { "" };
        let (limits, waiting, since) = (limits.join(", "), self.waiting, self.since);
        write!(
            f,
            "to {limits}{whose}, {waiting} waiting (since {since:.0})"
        )
    }
}

impl Default for AccountPace {
    fn default() -> Self {
        Self::new(true)
    }
}

impl AccountPace {
    /// Holds nobody back whatever the store says: for measuring what the
    /// limits are worth.
    #[must_use]
    pub fn off() -> Self {
        Self::new(false)
    }

    fn new(on: bool) -> Self {
        let lanes = Lanes::default();
        Self(Arc::new(Account {
            on,
            throttled: lanes.flag(),
            lanes: Mutex::new(lanes),
            news: Notify::new(),
        }))
    }

    /// A way for one more volume.
    #[must_use]
    pub fn join(&self) -> Pace {
        let shared = Arc::new(Shared {
            throttled: AtomicBool::new(false),
            under_way: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            meter: Meter::new(),
        });
        Pace {
            lane: self.0.lock().join(Arc::clone(&shared)),
            account: Arc::clone(&self.0),
            shared,
        }
    }
}

impl Account {
    fn lock(&self) -> MutexGuard<'_, Lanes> {
        // Held for look-ups and counting, by nobody who could panic half way.
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pace {
    fn is_throttled(&self) -> bool {
        self.shared.throttled.load(Ordering::Acquire)
            || self.account.throttled.load(Ordering::Acquire)
    }

    /// The permit to send a request that moves `bytes`, if it need not wait.
    #[must_use]
    pub fn at_once(&self, bytes: u64) -> Option<Permit> {
        if self.is_throttled() {
            return None;
        }
        self.shared.under_way.fetch_add(1, Ordering::Relaxed);
        Some(self.permit(Instant::now(), bytes))
    }

    fn permit(&self, now: Instant, bytes: u64) -> Permit {
        Permit {
            account: Arc::clone(&self.account),
            lane: self.lane,
            shared: Arc::clone(&self.shared),
            sent: now,
            bytes,
        }
    }

    /// Waits for the permit to send a request that moves `bytes`. One that was
    /// sent before (`again`) goes before those that were not. Dropped while it
    /// waits, it leaves the queue.
    ///
    /// The queue is as long as there are callers: requests of the kernel and
    /// runs of the write-back, both bounded.
    pub async fn permit_for(&self, bytes: u64, again: bool) -> Permit {
        loop {
            if let Some(permit) = self.at_once(bytes) {
                return permit;
            }
            let (granted, permit) = oneshot::channel();
            let start = self.account.lock().queue(
                self.lane,
                again,
                Waiter {
                    granted,
                    bytes,
                    permit: Arc::downgrade(&self.account),
                },
            );
            if start {
                tokio::spawn(dispatch(Dispatcher(Arc::clone(&self.account))));
            } else {
                self.account.news.notify_one();
            }
            // An error: the dispatcher died with its runtime. Queue again.
            if let Ok(permit) = permit.await {
                return permit;
            }
        }
    }

    /// Requests that the store refused to take at this rate (503, 429).
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// How the volume is throttled now, if it is.
    #[must_use]
    pub fn throttled(&self) -> Option<Throttled> {
        if !self.is_throttled() {
            return None;
        }
        self.account.lock().throttled(self.lane, Instant::now())
    }
}

impl Drop for Pace {
    fn drop(&mut self) {
        self.account.lock().leave(self.lane);
    }
}

/// Sends permits out while anybody waits; there is one at a time.
struct Dispatcher(Arc<Account>);

impl Drop for Dispatcher {
    fn drop(&mut self) {
        // Without effect at its regular end: nobody waits then.
        self.0.lock().abandon();
    }
}

async fn dispatch(dispatcher: Dispatcher) {
    let account = &dispatcher.0;
    loop {
        let news = account.news.notified();
        let next = account.lock().dispatch(Instant::now());
        match next {
            Next::Done => return,
            Next::At(time) => tokio::select! {
                // In a fixed order, so that a simulation can be replayed.
                biased;
                () = tokio::time::sleep_until(time) => {}
                () = news => {}
            },
            Next::WhenSettled => news.await,
        }
    }
}

/// What the store said, as far as it says something about speed.
enum Word {
    Passed,
    Refused(Option<Duration>),
    TimedOut,
    Nothing,
}

fn word(error: &StorageError) -> Word {
    match error.failure {
        Failure::Status { status: 500, .. } if error.advice() == Advice::SlowDown => Word::TimedOut,
        Failure::Deadline { written: true } => Word::TimedOut,
        _ if error.advice() == Advice::SlowDown => Word::Refused(error.retry_after),
        // Refused for another reason: it went through.
        Failure::Status { status, .. } if status < 500 => Word::Passed,
        _ => Word::Nothing,
    }
}

impl Permit {
    /// The attempt is over: what the store said.
    pub fn settle<T>(self, attempt: &Attempt<T>) {
        let word = attempt.as_ref().map_or_else(word, |_| Word::Passed);
        let (now, lane) = (Instant::now(), self.lane);
        match word {
            Word::Passed => {
                self.shared.meter.passed(now, self.sent, self.bytes);
                let throttled = self.shared.throttled.load(Ordering::Acquire)
                    || self.account.throttled.load(Ordering::Acquire);
                if throttled {
                    let mut lanes = self.account.lock();
                    let awaited = lanes.passed(lane, now, self.sent, self.bytes);
                    drop(lanes);
                    if awaited {
                        self.account.news.notify_one();
                    }
                }
            }
            Word::Refused(asked) => {
                self.shared.refused.fetch_add(1, Ordering::Relaxed);
                if self.account.on {
                    let until = asked.map(|asked| now + asked.min(MOST_ASKED));
                    let mut lanes = self.account.lock();
                    lanes.refused(lane, now, self.sent, self.bytes, until);
                }
            }
            Word::TimedOut if self.account.on => {
                self.account.lock().timed_out(lane, now, self.sent);
            }
            Word::TimedOut | Word::Nothing => {}
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.shared.under_way.fetch_sub(1, Ordering::Relaxed);
        // Whoever waits for room under way.
        if self.shared.throttled.load(Ordering::Acquire) {
            self.account.news.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::BlobAddress;

    /// A window that nobody waited for is forgotten, by whoever looks; one that
    /// somebody waits for has to be there when room comes.
    #[tokio::test(start_paused = true)]
    async fn whoever_waits_is_not_forgotten() {
        let pace = Arc::new(AccountPace::default().join());
        let (slow, held) = (pace.at_once(512).unwrap(), pace.at_once(512).unwrap());
        tokio::time::sleep(Duration::from_secs(1)).await;
        let address = BlobAddress::new("acct", "dysks", "vol1");
        let failure = Failure::Deadline { written: true };
        slow.settle::<()>(&Err(StorageError::new("read", &address, failure)));
        let waiting = tokio::spawn({
            let pace = Arc::clone(&pace);
            async move { pace.permit_for(512, true).await }
        });
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(pace.throttled().map(|throttled| throttled.waiting), Some(1));
        assert!(!waiting.is_finished());
        drop(held);
        tokio::time::timeout(Duration::from_secs(1), waiting)
            .await
            .expect("there is room now")
            .unwrap();
    }
}
