//! Counts the requests under way, refuses new ones once closed, and lets a
//! closer wait for the last to leave.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

const CLOSED: u64 = 1 << 63;

/// Open from the start; closing is final.
#[derive(Debug, Default)]
pub struct Gate {
    /// Requests inside, and [`CLOSED`].
    inside: AtomicU64,
    empty: Notify,
    shut: Notify,
}

/// A request that is inside until this is dropped.
#[derive(Debug)]
pub struct Inside<'a>(&'a Gate);

impl Gate {
    /// Lets a request in, unless the gate is closed.
    pub fn enter(&self) -> Option<Inside<'_>> {
        let inside = Inside(self);
        if self.inside.fetch_add(1, Ordering::AcqRel) & CLOSED != 0 {
            // Dropping `inside` takes the count back.
            return None;
        }
        Some(inside)
    }

    /// Requests inside now.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.inside.load(Ordering::Acquire) & !CLOSED
    }

    /// Refuses new requests from now on.
    pub fn close(&self) {
        self.inside.fetch_or(CLOSED, Ordering::AcqRel);
        self.shut.notify_waiters();
    }

    /// Waits until nothing new is let in.
    pub async fn closed(&self) {
        loop {
            let shut = self.shut.notified();
            if self.inside.load(Ordering::Acquire) & CLOSED != 0 {
                return;
            }
            shut.await;
        }
    }

    /// Waits until nobody is inside.
    pub async fn empty(&self) {
        loop {
            let left = self.empty.notified();
            if self.count() == 0 {
                return;
            }
            left.await;
        }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let before = self.0.inside.fetch_sub(1, Ordering::AcqRel);
        if before & !CLOSED == 1 {
            self.0.empty.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn closing_waits_for_those_inside() {
        let gate = Gate::default();
        let one = gate.enter().unwrap();
        let two = gate.enter().unwrap();
        let mut closed = Box::pin(gate.closed());
        tokio::select! {
            biased;
            () = &mut closed => panic!("it is open"),
            () = std::future::ready(()) => gate.close(),
        }
        closed.await;
        assert!(gate.enter().is_none());
        assert_eq!(gate.count(), 2);
        let mut empty = Box::pin(gate.empty());
        for inside in [one, two] {
            tokio::select! {
                biased;
                () = &mut empty => panic!("{} inside", gate.count()),
                () = std::future::ready(()) => {}
            }
            drop(inside);
        }
        empty.await;
    }
}
