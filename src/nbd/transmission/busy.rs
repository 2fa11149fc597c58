//! Looking again before sleeping (busy polling), for a client that asks one
//! thing after the other, as a database's log does.
//!
//! Its next request comes some microseconds after its answer; to sleep in
//! between and be woken takes both sides longer than that. So the task of an
//! idle connection looks again for a moment. Between two looks it yields: other
//! tasks run, and the runtime asks the kernel about all its sockets.
//!
//! Only where it pays: a client that usually takes longer than [`MOST`] is slept
//! for at once, so a disk that is idle, or waits for its store, costs nothing.
//! Where the cores are all taken the client itself takes longer, and the looking
//! ends by itself.

use std::pin::pin;
use std::task::Context;
use std::time::{Duration, Instant};

/// For how long to look again at most, and how soon a client has to ask on
/// average.
const MOST: Duration = Duration::from_micros(50);
/// What a client that took longer counts for: some tens of quick requests make
/// up for it.
const LONG: Duration = Duration::from_millis(1);
/// Each request moves the average by this part of the difference.
const WEIGHT: u32 = 8;

/// How soon one client asks again. Plain values: the clock is the caller's.
#[derive(Debug)]
pub(super) struct Busy {
    /// How long it takes from its last answer to its next request.
    usual: Duration,
    /// Since when nothing is there to be done.
    idle: Option<Instant>,
}

impl Default for Busy {
    /// Of a client of which nothing is known: it is slept for.
    fn default() -> Self {
        Self {
            usual: LONG,
            idle: None,
        }
    }
}

impl Busy {
    /// Everything is answered and nothing has come by `now`: whether to look
    /// again rather than sleep.
    pub(super) fn looks_again(&mut self, now: Instant) -> bool {
        let idle = *self.idle.get_or_insert(now);
        self.usual < MOST && now.saturating_duration_since(idle) < MOST
    }

    /// Nothing was there to be done until now.
    pub(super) fn is_idle(&self) -> bool {
        self.idle.is_some()
    }

    /// Something came at `now`.
    pub(super) fn heard(&mut self, now: Instant) {
        if let Some(idle) = self.idle.take() {
            let took = now.saturating_duration_since(idle).min(LONG);
            self.usual = (self.usual * (WEIGHT - 1) + took) / WEIGHT;
        }
    }
}

/// Has the task run again after the others and a look at all sockets.
pub(super) fn yield_to_others(cx: &mut Context<'_>) {
    // Its first poll says so to the runtime, which is all that it is for.
    let polled = pin!(tokio::task::yield_now()).poll(cx);
    debug_assert!(polled.is_pending());
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// One request after the other, each `gap` after the last answer; for how
    /// long was looked again before the last of them.
    fn looked(busy: &mut Busy, gaps: impl IntoIterator<Item = Duration>) -> Duration {
        let mut now = Instant::now();
        let mut looked = Duration::ZERO;
        for gap in gaps {
            let answered = now;
            looked = Duration::ZERO;
            while now < answered + gap && busy.looks_again(now) {
                now += US;
                looked += US;
            }
            now = answered + gap;
            busy.heard(now);
        }
        looked
    }

    #[test]
    fn looks_again_for_a_client_that_asks_at_once() {
        let mut busy = Busy::default();
        assert_eq!(looked(&mut busy, [20 * US]), Duration::ZERO, "unknown");
        assert_eq!(looked(&mut busy, [20 * US; 50]), 20 * US);
        // Not for ever when it stops asking.
        let second = Duration::from_secs(1);
        assert_eq!(looked(&mut busy, [second]), MOST);
        assert_eq!(looked(&mut busy, [20 * US]), Duration::ZERO, "it paused");
    }

    #[test]
    fn sleeps_for_a_client_that_takes_its_time() {
        let mut busy = Busy::default();
        for gap in [60 * US, 5000 * US] {
            assert_eq!(looked(&mut busy, [gap; 100]), Duration::ZERO, "{gap:?}");
        }
    }
}
