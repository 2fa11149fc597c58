//! What the data path knows of the volume's right to write: the sequence
//! number that fences late writes, and whether the lease is still ours.
//!
//! One task, the [`super::keeper`], changes it; everybody else reads it and
//! posts wishes.
//!
//! ## Invariants
//! - `number` is a sequence number that the blob is known to have reached; it
//!   only grows.
//! - Writes carry `x-ms-if-sequence-number-lt: bound + 1`, and `bound` is
//!   `wanted`, but at least `number`: a write may run ahead of a raise that is under way,
//!   because its bound holds before and after it. It runs ahead of `number` by
//!   at most [`RUN_AHEAD`], so that whoever resumes the lease knows how far to
//!   raise to be past every write that is still on its way.
//! - A write under bound `b` whose outcome is unknown is dead for certain once
//!   `number > b`. Nothing that overlaps it starts before that: its own retry
//!   holds the range lock and waits for the raise; if its caller gave up
//!   instead, `owed > b` makes *every* later write wait, from before it reads
//!   what it will merge with.
//! - `fenced` is final.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::blockage::Blockage;
use super::keeper::LEASE_SECONDS;
use super::moment::Moment;
use super::progress::Progress;
use crate::blob::StorageError;

/// By how much a write's bound may exceed the number that the blob is known to
/// have.
pub const RUN_AHEAD: u64 = 64;

/// How long after it was asked for a renewal is relied upon: a lease lasts
/// longer than that, by more than two clocks can differ in the meantime.
const CERTAIN: Duration = Duration::from_secs(LEASE_SECONDS as u64 - 10);

/// Why and since when a volume is fenced.
#[derive(Clone, Debug)]
pub struct Fenced {
    /// In words, with the store's own code.
    pub reason: String,
    /// When it was noticed.
    pub since: jiff::Timestamp,
    /// What the store said of the blob and its lease right after that.
    pub found: Option<&'static str>,
}

impl fmt::Display for Fenced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "since {:.0}: ", self.since)?;
        if let Some(found) = self.found {
            write!(f, "{found}: ")?;
        }
        f.write_str(&self.reason)
    }
}

#[derive(Clone, Debug)]
struct State {
    number: u64,
    wanted: u64,
    owed: u64,
    /// When the store was last asked and said that the lease is ours.
    confirmed: Moment,
    /// Somebody waits for a confirmation newer than this.
    confirm_after: Option<Instant>,
    fenced: Option<Arc<Fenced>>,
}

/// Shared between the data path and the keeper.
#[derive(Debug)]
pub struct Standing {
    state: watch::Sender<State>,
    /// The store refuses access, for now.
    pub blockage: Blockage,
    /// Whether the data path gets anything done.
    pub progress: Progress,
}

/// What the keeper has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wishes {
    /// Raise the blob's sequence number to at least this.
    pub raise_to: Option<u64>,
    /// Renew the lease now.
    pub confirm: bool,
}

/// A promise to say what became of a write; see [`Standing::begin`].
#[derive(Debug)]
pub struct Unsettled<'a> {
    standing: &'a Standing,
    bound: u64,
    settled: bool,
}

impl Standing {
    /// A standing after an attach that raised the number to `number` and
    /// acquired the lease at `confirmed`.
    #[must_use]
    pub fn new(number: u64, confirmed: Moment) -> Self {
        let state = State {
            number,
            wanted: number,
            owed: 0,
            confirmed,
            confirm_after: None,
            fenced: None,
        };
        Self {
            state: watch::Sender::new(state),
            blockage: Blockage::default(),
            progress: Progress::default(),
        }
    }

    /// Waits while an earlier write's fate is owed: until then what is read may
    /// be changed by a write that comes late.
    ///
    /// # Errors
    /// The volume is fenced.
    pub async fn nothing_owed(&self) -> Result<(), Arc<Fenced>> {
        {
            let state = self.state.borrow();
            if state.fenced.is_none() && state.number >= state.owed {
                return Ok(());
            }
        }
        self.wait(|state| state.number >= state.owed).await
    }

    /// Starts a write: waits while an earlier write's fate is owed, then gives
    /// the bound to send it under. If the guard is dropped before
    /// [`Unsettled::settle`], the write's outcome counts as unknown.
    ///
    /// # Errors
    /// The volume is fenced.
    pub async fn begin(&self) -> Result<Unsettled<'_>, Arc<Fenced>> {
        loop {
            let owed = {
                let state = self.state.borrow();
                if let Some(fenced) = &state.fenced {
                    return Err(fenced.clone());
                }
                if state.number >= state.owed {
                    let bound = state.wanted.clamp(state.number, state.number + RUN_AHEAD);
                    return Ok(Unsettled {
                        standing: self,
                        bound,
                        settled: false,
                    });
                }
                state.owed
            };
            self.wait(|state| state.number >= owed).await?;
        }
    }

    /// Waits until the blob's number is known to be past `bound`, so that
    /// nothing sent under it can happen any more.
    ///
    /// # Errors
    /// The volume is fenced.
    pub async fn raise_past(&self, bound: u64) -> Result<(), Arc<Fenced>> {
        self.want(bound + 1);
        self.wait(|state| state.number > bound).await
    }

    /// Waits until the store has said, after this call began, that the lease
    /// is ours.
    ///
    /// # Errors
    /// The volume is fenced.
    pub async fn confirm_lease(&self) -> Result<(), Arc<Fenced>> {
        let asked = Instant::now();
        self.state.send_if_modified(|state| {
            let post = state.confirm_after.is_none_or(|after| after < asked);
            if post {
                state.confirm_after = Some(asked);
            }
            post
        });
        self.wait(|state| state.confirmed.at > asked).await
    }

    /// The lease has not run out: nobody else can have taken it since it was
    /// confirmed, unless it was broken or released for us.
    #[must_use]
    pub fn certain(&self) -> bool {
        let state = self.state.borrow();
        state.fenced.is_none() && state.confirmed.elapsed() < CERTAIN
    }

    /// The number that the blob is known to have reached.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.state.borrow().number
    }

    /// Waits until the blob is known to be past `number`, whoever wanted that;
    /// returns how far it is.
    ///
    /// # Errors
    /// The volume is fenced.
    pub async fn news(&self, number: u64) -> Result<u64, Arc<Fenced>> {
        self.wait(|state| state.number > number).await?;
        Ok(self.number())
    }

    /// The fence, if it has fallen.
    #[must_use]
    pub fn fenced(&self) -> Option<Arc<Fenced>> {
        self.state.borrow().fenced.clone()
    }

    /// Waits for the fence to fall.
    pub async fn fence_fallen(&self) -> Arc<Fenced> {
        loop {
            if let Err(fenced) = self.wait(|_| false).await {
                return fenced;
            }
        }
    }

    /// Ends all writing for good. The first reason stays.
    pub fn fence(&self, reason: String) {
        self.state.send_if_modified(|state| {
            let first = state.fenced.is_none();
            if first {
                let since = jiff::Timestamp::now();
                state.fenced = Some(Arc::new(Fenced {
                    reason,
                    since,
                    found: None,
                }));
            }
            first
        });
    }

    /// Adds to the fence what the store said of the blob after it had fallen.
    pub(super) fn found(&self, found: &'static str) {
        self.state.send_if_modified(|state| {
            let Some(fenced) = &state.fenced else {
                return false;
            };
            let mut fenced = Fenced::clone(fenced);
            fenced.found = Some(found);
            state.fenced = Some(Arc::new(fenced));
            true
        });
    }

    /// Ends all writing because of what the store answered.
    pub fn fence_because(&self, error: &StorageError) {
        self.fence(error.to_string());
    }

    fn want(&self, number: u64) {
        self.state.send_if_modified(|state| {
            let more = state.wanted < number;
            state.wanted = state.wanted.max(number);
            more
        });
    }

    async fn wait(&self, done: impl Fn(&State) -> bool) -> Result<(), Arc<Fenced>> {
        let mut watch = self.state.subscribe();
        let state = watch
            .wait_for(|state| state.fenced.is_some() || done(state))
            .await
            .expect("the sender is self, which is borrowed");
        match &state.fenced {
            Some(fenced) => Err(fenced.clone()),
            None => Ok(()),
        }
    }

    // The keeper's side.

    /// What is wished for now.
    pub(super) fn wishes(&self) -> Wishes {
        let state = self.state.borrow();
        Wishes {
            raise_to: (state.wanted > state.number).then_some(state.wanted),
            confirm: state
                .confirm_after
                .is_some_and(|after| after >= state.confirmed.at),
        }
    }

    /// Waits until something is wished for, or the volume is fenced.
    pub(super) async fn wished(&self) {
        let mut watch = self.state.subscribe();
        watch
            .wait_for(|state| {
                state.fenced.is_some()
                    || state.wanted > state.number
                    || state
                        .confirm_after
                        .is_some_and(|after| after >= state.confirmed.at)
            })
            .await
            .expect("the sender is self, which is borrowed");
    }

    /// The store said that the blob's number is `number`.
    pub(super) fn raised(&self, number: u64) {
        self.state.send_if_modified(|state| {
            let more = state.number < number;
            state.number = state.number.max(number);
            more
        });
    }

    /// The store said, in answer to a request begun at `asked`, that the lease
    /// is ours.
    pub(super) fn confirmed(&self, asked: Moment) {
        self.state.send_modify(|state| {
            if state.confirmed.at < asked.at {
                state.confirmed = asked;
            }
        });
    }
}

impl Unsettled<'_> {
    /// The value for `x-ms-if-sequence-number-lt`.
    #[must_use]
    pub fn less_than(&self) -> u64 {
        self.bound + 1
    }

    /// The bound to raise past, should the outcome be unknown.
    #[must_use]
    pub fn bound(&self) -> u64 {
        self.bound
    }

    /// The outcome is known: applied, or never to be.
    pub fn settle(mut self) {
        self.settled = true;
    }
}

impl Drop for Unsettled<'_> {
    fn drop(&mut self) {
        if !self.settled {
            let dead_at = self.bound + 1;
            self.standing.state.send_modify(|state| {
                state.owed = state.owed.max(dead_at);
                state.wanted = state.wanted.max(dead_at);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn writes_run_ahead_of_a_raise_but_not_of_a_debt() {
        let standing = Standing::new(7, Moment::now());
        let first = standing.begin().await.unwrap();
        assert_eq!(first.less_than(), 8);
        standing.want(8);
        let ahead = standing.begin().await.unwrap();
        assert_eq!(ahead.less_than(), 9, "holds before and after the raise");
        ahead.settle();
        assert_eq!(standing.wishes().raise_to, Some(8));
        standing.raised(8);
        assert_eq!(standing.wishes().raise_to, None);

        // The first write's caller gives up: under 7, and the number is past it.
        drop(first);
        standing.begin().await.unwrap().settle();

        // One under the present bound is dropped: nothing may start before the raise.
        drop(standing.begin().await.unwrap());
        let mut next = Box::pin(standing.begin());
        tokio::select! {
            biased;
            _ = &mut next => panic!("began over a write that may still happen"),
            () = std::future::ready(()) => {}
        }
        assert_eq!(standing.wishes().raise_to, Some(9));
        standing.raised(9);
        assert_eq!(next.await.unwrap().less_than(), 10);
    }

    #[tokio::test]
    async fn no_bound_runs_ahead_further_than_a_successor_raises() {
        let standing = Standing::new(7, Moment::now());
        standing.want(7 + 10 * RUN_AHEAD);
        let write = standing.begin().await.unwrap();
        assert_eq!(write.bound(), 7 + RUN_AHEAD);
        write.settle();
    }

    #[tokio::test]
    async fn a_fence_wakes_and_refuses_everybody() {
        let standing = Standing::new(1, Moment::now());
        let waits = standing.raise_past(1);
        standing.fence("412 LeaseIdMismatchWithBlobOperation".into());
        standing.fence("another".into());
        assert_eq!(
            waits.await.unwrap_err().reason,
            "412 LeaseIdMismatchWithBlobOperation"
        );
        assert!(standing.begin().await.is_err() && standing.confirm_lease().await.is_err());
    }

    #[tokio::test]
    async fn a_confirmation_begun_earlier_does_not_count() {
        let standing = Standing::new(1, Moment::now());
        let before = Moment::now();
        let mut waits = Box::pin(standing.confirm_lease());
        tokio::select! {
            biased;
            _ = &mut waits => panic!("nothing was confirmed"),
            () = std::future::ready(()) => {}
        }
        assert!(standing.wishes().confirm);
        standing.confirmed(before);
        assert!(standing.wishes().confirm, "asked before the wish");
        let mut later = Moment::now();
        later.at += Duration::from_nanos(1);
        standing.confirmed(later);
        assert!(!standing.wishes().confirm);
        waits.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_certain_for_less_than_it_lasts() {
        let second = Duration::from_secs(1);
        let standing = Standing::new(1, Moment::now());
        tokio::time::advance(30 * second).await;
        let asked = Moment::now();
        tokio::time::advance(15 * second).await;
        standing.confirmed(asked);
        tokio::time::advance(30 * second).await;
        assert!(standing.certain());
        tokio::time::advance(10 * second).await;
        assert!(!standing.certain(), "55 s after the question");
        standing.confirmed(Moment::now());
        assert!(standing.certain());
        standing.fence("412 LeaseIdMismatchWithBlobOperation".into());
        assert!(!standing.certain());
    }
}
