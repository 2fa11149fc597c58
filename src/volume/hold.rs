//! Keeps changes of the blob back for a moment, while a request is made whose
//! condition (`If-Match`) any of them would break.
//!
//! | state | `inside` | who comes | the holder |
//! |---|---|---|---|
//! | open | n | goes in | none |
//! | closing | n, held | waits | waits for those inside |
//! | held | 0, held | waits | makes its requests |
//!
//! A change is inside from before it draws its bound until its outcome is
//! settled, so when nobody is inside nothing of this volume is on its way but
//! what a raise of the sequence number has yet to end. Holders are short and
//! bounded, and one at a time: their caller sees to both.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

const HELD: u64 = 1 << 63;

/// Open from the start.
#[derive(Debug, Default)]
pub struct Hold {
    /// Changes inside, and [`HELD`].
    inside: AtomicU64,
    /// Told when the last one leaves a held one, and when it is let go.
    changed: Notify,
}

/// A change that is inside until this is dropped.
#[derive(Debug)]
pub struct Inside<'a>(&'a Hold);

/// Nobody comes in until this is dropped.
#[derive(Debug)]
pub struct Held<'a>(&'a Hold);

impl Hold {
    /// Goes in, once nobody holds.
    pub async fn enter(&self) -> Inside<'_> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let entered = self
                .inside
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |inside| {
                    (inside & HELD == 0).then_some(inside + 1)
                });
            if entered.is_ok() {
                return Inside(self);
            }
            changed.await;
        }
    }

    /// Lets nobody in any more and waits until nobody is inside. Dropped
    /// before that, it is open again.
    pub async fn hold(&self) -> Held<'_> {
        let before = self.inside.fetch_or(HELD, Ordering::AcqRel);
        debug_assert_eq!(before & HELD, 0, "one holder at a time");
        let held = Held(self);
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.inside.load(Ordering::Acquire) == HELD {
                return held;
            }
            changed.await;
        }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if self.0.inside.fetch_sub(1, Ordering::AcqRel) == HELD | 1 {
            self.0.changed.notify_waiters();
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_and(!HELD, Ordering::AcqRel);
        self.0.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::Pin;

    use super::*;

    async fn is_ready<F: Future>(future: Pin<&mut F>) -> Option<F::Output> {
        tokio::select! {
            biased;
            output = future => Some(output),
            () = std::future::ready(()) => None,
        }
    }

    #[tokio::test]
    async fn a_holder_waits_for_those_inside_and_keeps_others_out() {
        let hold = Hold::default();
        let one = hold.enter().await;
        let two = hold.enter().await;
        let mut holder = Box::pin(hold.hold());
        assert!(is_ready(holder.as_mut()).await.is_none());
        let mut third = Box::pin(hold.enter());
        assert!(is_ready(third.as_mut()).await.is_none());
        drop(one);
        assert!(is_ready(holder.as_mut()).await.is_none());
        drop(two);
        let held = is_ready(holder.as_mut()).await.expect("nobody is inside");
        assert!(is_ready(third.as_mut()).await.is_none());
        drop(held);
        assert!(is_ready(third.as_mut()).await.is_some());
    }

    #[tokio::test]
    async fn a_holder_that_gives_up_lets_everybody_in() {
        let hold = Hold::default();
        let inside = hold.enter().await;
        let mut holder = Box::pin(hold.hold());
        assert!(is_ready(holder.as_mut()).await.is_none());
        let mut other = Box::pin(hold.enter());
        assert!(is_ready(other.as_mut()).await.is_none());
        drop(holder);
        assert!(is_ready(other.as_mut()).await.is_some());
        drop(inside);
        drop(hold.hold().await);
    }
}
