//! Orders overlapping writes: the store executes concurrent writes to one page
//! in any order, so two that overlap must never be under way together.
//!
//! First come, first served: a request waits for every earlier one that it
//! overlaps, running or waiting, so nothing starves. Everything else runs
//! concurrently.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::blob::Range;

#[derive(Debug, Default)]
struct Queue {
    next_id: u64,
    /// In order of arrival. Invariant: `blockers` of an entry counts the
    /// entries before it that overlap it; an entry with none is running.
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    range: Range,
    blockers: usize,
    go: Option<oneshot::Sender<()>>,
}

/// The ranges of one volume that are being changed.
#[derive(Debug, Default)]
pub struct RangeLock {
    queue: Mutex<Queue>,
}

/// The right to change a range, until dropped.
#[derive(Debug)]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    id: u64,
}

fn overlap(a: &Range, b: &Range) -> bool {
    a.start < b.end && b.start < a.end
}

impl RangeLock {
    /// Waits until no earlier request overlaps `range`. Dropping the future
    /// gives up the place in the queue.
    pub async fn lock(&self, range: Range) -> RangeGuard<'_> {
        let (guard, wait) = self.enqueue(range);
        if let Some(wait) = wait {
            // The sender is dropped only with its entry, which `guard` keeps.
            wait.await.expect("the entry lives as long as its guard");
        }
        guard
    }

    fn enqueue(&self, range: Range) -> (RangeGuard<'_>, Option<oneshot::Receiver<()>>) {
        let mut queue = self.queue();
        let id = queue.next_id;
        queue.next_id += 1;
        let blockers = queue
            .entries
            .iter()
            .filter(|earlier| overlap(&earlier.range, &range))
            .count();
        let (go, wait) = if blockers == 0 {
            (None, None)
        } else {
            let (go, wait) = oneshot::channel();
            (Some(go), Some(wait))
        };
        queue.entries.push(Entry {
            id,
            range,
            blockers,
            go,
        });
        (RangeGuard { lock: self, id }, wait)
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // A panic elsewhere cannot leave the queue half changed.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut queue = self.lock.queue();
        let Some(at) = queue.entries.iter().position(|entry| entry.id == self.id) else {
            debug_assert!(
                false,
                "a guard's entry is in the queue until the guard is dropped"
            );
            return;
        };
        let gone = queue.entries.remove(at);
        for later in &mut queue.entries[at..] {
            if overlap(&later.range, &gone.range) {
                debug_assert!(later.blockers > 0);
                later.blockers -= 1;
                if later.blockers == 0
                    && let Some(go) = later.go.take()
                {
                    // A waiter that gave up drops its guard next.
                    go.send(()).ok();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: u64, len: u64) -> Range {
        Range::at(start, len)
    }

    #[tokio::test]
    async fn disjoint_ranges_run_together() {
        let lock = RangeLock::default();
        let _a = lock.lock(at(0, 512)).await;
        let _b = lock.lock(at(512, 512)).await;
    }

    #[tokio::test]
    async fn overlapping_ranges_run_in_order_of_arrival() {
        let lock = RangeLock::default();
        let (a, none) = lock.enqueue(at(0, 1024));
        assert!(none.is_none());
        let (b, b_wait) = lock.enqueue(at(512, 1024));
        let (c, c_wait) = lock.enqueue(at(1024, 1024));
        let (mut b_wait, mut c_wait) = (b_wait.expect("behind a"), c_wait.expect("behind b"));
        assert!(b_wait.try_recv().is_err() && c_wait.try_recv().is_err());
        drop(a);
        assert!(b_wait.try_recv().is_ok());
        assert!(c_wait.try_recv().is_err(), "c still waits for b");
        drop(b);
        assert!(c_wait.try_recv().is_ok());
        drop(c);
        assert!(lock.queue().entries.is_empty());
    }

    #[tokio::test]
    async fn a_waiter_that_gives_up_frees_those_behind_it() {
        let lock = RangeLock::default();
        let a = lock.lock(at(0, 512)).await;
        let (b, _) = lock.enqueue(at(0, 1024));
        let (_c, c_wait) = lock.enqueue(at(512, 512));
        drop(b);
        assert!(
            c_wait.expect("behind b").try_recv().is_ok(),
            "c never overlapped a"
        );
        drop(a);
    }
}
