//! When an attach may begin to open its volume.
//!
//! The kernel makes devices one at a time. When many attaches come at once, and
//! all are opened together, the last is open hardly later than the first, and
//! the kernel has nothing to do until then. So a few are opened at a time, in the
//! order in which they came, and the kernel begins with the first of them.

use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

/// How many are opened at a time.
const PLACES: usize = 4;
/// How long the next waits at most for one of them. Those whose store does not
/// answer, or that wait for another node's lease, keep nobody out.
const PATIENCE: Duration = Duration::from_millis(20);

/// The queue of attaches that have not begun.
#[derive(Debug)]
pub(super) struct Turns {
    /// Held by the first in the queue.
    first: Semaphore,
    places: Semaphore,
}

impl Default for Turns {
    fn default() -> Self {
        Self {
            first: Semaphore::new(1),
            places: Semaphore::new(PLACES),
        }
    }
}

impl Turns {
    /// Waits for its turn: no longer than 20 ms for each that came before. What
    /// it returns is dropped once the volume is open.
    pub async fn next(&self) -> Option<SemaphorePermit<'_>> {
        // Neither is ever closed.
        let _first = self.first.acquire().await;
        let place = timeout(PATIENCE, self.places.acquire()).await;
        place.ok()?.ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_few_begin_at_a_time_in_the_order_in_which_they_came() {
        let turns = Arc::new(Turns::default());
        let (began, mut order) = tokio::sync::mpsc::unbounded_channel();
        for number in 0..12 {
            let (turns, began) = (Arc::clone(&turns), began.clone());
            tokio::spawn(async move {
                let place = turns.next().await;
                began.send((number, place.is_some())).unwrap();
                tokio::time::sleep(PATIENCE / 2).await;
            });
        }
        tokio::time::sleep(PATIENCE / 4).await;
        assert_eq!(order.len(), PLACES);
        tokio::time::sleep(PATIENCE / 2).await;
        assert_eq!(order.len(), 2 * PLACES);
        for number in 0..12 {
            assert_eq!(order.recv().await, Some((number, true)));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_gets_nowhere_keeps_nobody_out() {
        let turns = Turns::default();
        let mut stuck = Vec::new();
        for _ in 0..PLACES {
            stuck.push(turns.next().await.unwrap());
        }
        let begun = Instant::now();
        for _ in 0..10 {
            assert!(turns.next().await.is_none());
        }
        assert_eq!(begun.elapsed(), 10 * PATIENCE);
        stuck.pop();
        assert!(turns.next().await.is_some());
    }
}
