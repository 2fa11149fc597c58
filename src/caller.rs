//! Whether somebody still waits for a request.
//!
//! The kernel shuts a connection on which something was not answered for the
//! replay threshold, and resends on another one. What was asked on that one must
//! not pile up behind the store's outage: each request runs within the
//! [`Caller::scope`] of its connection, and wherever it waits with nothing of
//! it under way at the store, it waits [`unless_gone`].
//!
//! A request that is dropped there was never answered and has no attempt whose
//! outcome is open, so whoever sent it again loses nothing. An attempt under
//! way is not cut off by this: it runs to its settled outcome, or leaves a
//! debt that a raise of the sequence number settles (`volume::standing`).
//!
//! Work outside of a scope (write-back, opening, closing) has no caller and
//! waits for as long as it takes.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;

use tokio::sync::watch;

tokio::task_local! {
    static CALLER: Caller;
}

/// Held by whoever waits for answers; dropped, its requests have no caller.
#[derive(Debug)]
pub struct Presence(watch::Sender<()>);

/// The caller of a request.
#[derive(Clone, Debug)]
pub struct Caller(watch::Receiver<()>);

/// Nobody waits for the answer any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its caller is gone")]
pub struct Gone;

impl Default for Presence {
    fn default() -> Self {
        Self(watch::Sender::new(()))
    }
}

impl Presence {
    /// The caller that is there as long as `self` is.
    #[must_use]
    pub fn caller(&self) -> Caller {
        Caller(self.0.subscribe())
    }
}

impl Caller {
    /// Runs a request of this caller.
    pub fn scope<F: Future>(self, request: F) -> impl Future<Output = F::Output> {
        CALLER.scope(self, request)
    }

    async fn gone(mut self) {
        // Nothing is ever sent: this ends when the sender is dropped.
        while self.0.changed().await.is_ok() {}
    }
}

/// Waits, unless the caller of the request that this is part of goes. What is
/// ready at once costs nothing.
///
/// # Errors
/// The caller has gone, and `wait` was dropped.
pub async fn unless_gone<T>(wait: impl Future<Output = T>) -> Result<T, Gone> {
    let mut wait = pin!(wait);
    if let Poll::Ready(done) = once(wait.as_mut()).await {
        return Ok(done);
    }
    let Ok(caller) = CALLER.try_with(Clone::clone) else {
        return Ok(wait.await);
    };
    tokio::select! {
        biased;
        done = wait => Ok(done),
        () = caller.gone() => Err(Gone),
    }
}

/// Polls once.
async fn once<F: Future>(mut future: Pin<&mut F>) -> Poll<F::Output> {
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test]
    async fn waiting_ends_with_the_caller_and_only_then() {
        let presence = Presence::default();
        let request = presence.caller().scope(unless_gone(pending::<()>()));
        let mut request = pin!(request);
        assert!(once(request.as_mut()).await.is_pending());
        drop(presence);
        assert_eq!(request.await, Err(Gone));
    }

    #[tokio::test]
    async fn what_is_ready_is_done_though_nobody_asks_any_more() {
        let caller = Presence::default().caller();
        assert_eq!(caller.scope(unless_gone(ready(1))).await, Ok(1));
        assert_eq!(unless_gone(ready(2)).await, Ok(2), "without a caller");
    }
}
