//! How many requests may be under way at a store that does not keep up: it
//! times requests out (500 `OperationTimedOut`), or does not answer at all.
//! Halved when that happens, one more for each round that goes well.
//!
//! A store that answers some requests and times others out has too much to do.
//! One that answers none is away, however little it is asked: that is no reason
//! to trust it with less once it is back. So what was under way before an
//! outage is reached again by doubling each round.

use std::time::Duration;

use tokio::time::Instant;

/// Nobody has waited for it for this long: it is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(30);

#[derive(Clone, Debug)]
pub(super) struct Window {
    most: f64,
    /// So much went well before: up to here it doubles.
    trusted: f64,
    /// Something went well since the cut.
    answered: bool,
    cut_at: Instant,
    last_waited: Instant,
}

impl Window {
    /// For a store that timed a request out with `under_way` beside it, and
    /// that has `answered` others lately.
    pub fn new(now: Instant, under_way: u64, answered: bool) -> Self {
        let most = half(under_way);
        Self {
            most,
            trusted: if answered { most } else { 2.0 * most },
            answered: false,
            cut_at: now,
            last_waited: now,
        }
    }

    /// Requests that may be under way.
    pub fn most(&self) -> u64 {
        // At least 1, and far below what a float holds exactly.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let most = self.most as u64;
        most
    }

    /// Is there room for one more? Asked when somebody wants to send.
    pub fn has_room(&mut self, now: Instant, under_way: u64) -> bool {
        let room = under_way < self.most();
        if !room {
            self.last_waited = now;
        }
        room
    }

    /// A request went well.
    pub fn passed(&mut self, under_way: u64) {
        self.answered = true;
        // An unused window proves nothing.
        if under_way + 1 >= self.most() {
            let doubles = self.most < self.trusted;
            self.most += if doubles { 1.0 } else { 1.0 / self.most };
        }
    }

    /// A request sent at `sent` timed out, with `under_way` beside it.
    pub fn timed_out(&mut self, now: Instant, sent: Instant, under_way: u64) {
        self.last_waited = now;
        if sent > self.cut_at {
            self.cut_at = now;
            self.most = half(under_way.min(self.most()));
            if self.answered {
                self.trusted = self.most;
            }
            self.answered = false;
        }
    }

    /// Nobody has waited for it for long.
    pub fn is_forgotten(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last_waited) > FORGOTTEN
    }
}

fn half(under_way: u64) -> f64 {
    u32::try_from((under_way / 2).max(1)).map_or(f64::from(u32::MAX), f64::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_once_a_round_and_grows_by_one_a_round() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut window = Window::new(at(100), 64, true);
        assert_eq!(window.most(), 32);
        window.timed_out(at(101), at(99), 40);
        assert_eq!(window.most(), 32, "sent before the cut");
        window.timed_out(at(200), at(150), 32);
        assert_eq!(window.most(), 16);
        assert!(!window.has_room(at(200), 16) && window.has_room(at(200), 15));
        for _ in 0..16 {
            window.passed(31);
        }
        assert_eq!(
            window.most(),
            32,
            "so much was let through before the second"
        );
        for _ in 0..33 {
            window.passed(31);
        }
        assert_eq!(window.most(), 33);
        window.passed(2);
        window.timed_out(at(300), at(250), 0);
        assert_eq!(window.most(), 1, "never shut");
        assert!(!window.is_forgotten(at(30_000)) && window.is_forgotten(at(31_000)));
    }

    #[test]
    fn a_store_that_was_away_is_trusted_as_before() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut window = Window::new(at(10), 64, false);
        for generation in 1..20 {
            window.timed_out(at(10 + 10 * generation), at(1 + 10 * generation), 1);
        }
        assert_eq!(window.most(), 1);
        for round in 1..=6 {
            for _ in 0..window.most() {
                window.passed(63);
            }
            assert_eq!(window.most(), 1 << round, "doubles");
        }
        // But not beyond, and not when others are answered meanwhile.
        window.passed(63);
        assert_eq!(window.most(), 64);
        window.timed_out(at(300), at(299), 64);
        for _ in 0..33 {
            window.passed(63);
        }
        assert_eq!(window.most(), 33);
    }
}
