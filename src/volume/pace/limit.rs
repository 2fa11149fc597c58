//! A rate that the store lets through, learned from what it refuses. Plain
//! values: the clock is the caller's.
//!
//! | phase | what may be sent | ends |
//! |---|---|---|
//! | measuring, after the first refusal | one for each that is let through: the store stays as full as it is | when [`MEASURED`] has passed, with the rate that was let through as the cap |
//! | curve | at a rate that rises slowly around the cap | with a cut, or [`WRONG`] above the cap |
//! | search | at a rate that doubles every fifth of a turn | with a cut |
//!
//! The store keeps a bucket that fills at a fixed rate (requests or bytes a
//! second) and refuses when it is empty. It is empty at every refusal, so what
//! was let through between two refusals, divided by the time between them, *is*
//! the rate, however deep the bucket. That is what a cut takes for the cap.
//! (In a search only the last moment counts: the bucket was not empty before.)
//!
//! The curve is a cubic: fast to just below the cap, flat around it, then
//! faster and faster.
//!
//! ```text
//! rate = cap * (1 + CUT * (t / turn - 1)^3)
//! ```
//!
//! `t` is the time since the cut in which somebody waited for this limit, and
//! `turn` how sure we are of the cap: it starts at [`FIRST_TURN`], doubles each
//! time the same cap is met again, up to [`LONGEST_TURN`], and falls back when
//! another one is.
//!
//! A store may let requests wait before it refuses any. What waits there at a
//! cut would make every volume slow, so the cut is followed by a drain: [`DRAIN`]
//! slower, until requests are answered about as fast as ever, for a second at
//! most. (A limit on bytes does without: there the time depends on the size.)
//!
//! A store that lets nothing through at all is away: that says nothing about
//! its rate. It is asked at the floor, and by the first request that it lets
//! through again it is trusted with the rate from before.
//!
//! Refusals of requests sent before a cut say nothing about the rate after it.
//! Of those sent since, few make the next cut a second later, not at once: a
//! store that refuses at random is no reason to stop asking. If a quarter is
//! refused the next cut comes without delay.

use std::time::Duration;

use tokio::time::Instant;

/// How far below the learned cap a cut goes.
const CUT: f64 = 0.02;
const FIRST_TURN: Duration = Duration::from_millis(500);
const LONGEST_TURN: Duration = Duration::from_secs(4);
/// This far above the cap without a refusal, the cap is another one.
const WRONG: f64 = 0.25;
/// For how long to measure at least, over how many requests, and at most.
const MEASURED: Duration = Duration::from_millis(150);
const MEASURED_REQUESTS: u64 = 16;
const MEASURED_AT_MOST: Duration = Duration::from_millis(500);
/// The last moment of a search.
const MOMENT: Duration = Duration::from_millis(100);
/// Caps this close to each other are the same.
const SAME: f64 = 0.1;
/// A measure this many requests off the cap counts for this much: too low a cap
/// costs more than one that is too high.
const CHANCE: f64 = 2.0;
const LEARNED: f64 = 0.25;
/// Cuts for few refusals are at least this far apart.
const BETWEEN_CUTS: Duration = Duration::from_secs(1);
/// A cut for many needs as much to go by.
const LEAST_EVIDENCE: Duration = Duration::from_millis(50);
const MANY: u64 = 4;
/// After a cut nothing is sent for this long: room for what comes unevenly.
const BREATH: Duration = Duration::from_millis(10);
/// By how much slower a drain is, and for how long at most.
const DRAIN: f64 = 0.1;
const DRAINED_FOR: Duration = Duration::from_secs(1);
/// Beside twice the shortest time an answer took.
const USUAL: Duration = Duration::from_millis(5);
/// By how much the shortest time grows in a second, so that it is not for ever.
const AGEING: f64 = 0.005;
/// What a waiting queue may catch up with when its timer is late, and what may
/// follow at once upon a pause of the callers.
const LATE: Duration = Duration::from_millis(50);
const UNUSED: Duration = Duration::from_millis(5);
/// Longer than any rate leaves between two requests: the store said nothing.
const HOLE: Duration = Duration::from_secs(3);
/// Nobody waited for the limit for this long: it is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(30);
/// That of a store that is away is when nobody asked it for this long, which is
/// more than any pause between two attempts: it knows the rate from before.
const GIVEN_UP: Duration = Duration::from_secs(60);

/// One learned limit, in units (requests or bytes) a second.
#[derive(Clone, Debug)]
pub(super) struct Limit {
    cap: f64,
    floor: f64,
    turn: Duration,
    /// When the next unit may be sent.
    next: Instant,
    cut_at: Instant,
    /// Time since the cut in which somebody waited for this limit.
    waited_for: Duration,
    /// Whether somebody does, and since when that is known.
    waited: bool,
    seen: Instant,
    last_waited: Instant,
    /// What was let through in a second before the store let through nothing.
    known: f64,
    /// It does so, since the cut.
    silent: bool,
    /// Units let through since the cut, and those of them while somebody waited.
    passed: f64,
    pressed: f64,
    /// The most that one of them took.
    largest: f64,
    /// When the last were, and for how long none was, in spells of at least
    /// [`HOLE`].
    last_passed: Instant,
    holes: Duration,
    /// The same in the present moment, and in the one before.
    moment: (Instant, f64),
    moment_before: (Duration, f64),
    /// While measuring: units that may be sent, and requests let through.
    measuring: Option<(f64, u64)>,
    /// Of the requests sent since the cut.
    judged: u64,
    refused: u64,
    /// How long answers take, at best and lately, in seconds; for requests.
    best: f64,
    lately: f64,
    drains: bool,
    draining: bool,
}

impl Limit {
    /// A limit for a store that refused at `now` for the first time, having let
    /// `known` through in a second. It never falls below `floor`. With the
    /// shortest time that an answer took, waiting in the store is drained after
    /// a cut.
    pub fn new(now: Instant, floor: f64, known: f64, best: Option<Duration>) -> Self {
        let mut limit = Self {
            cap: floor,
            floor,
            turn: FIRST_TURN,
            next: now,
            cut_at: now,
            waited_for: Duration::ZERO,
            waited: true,
            seen: now,
            last_waited: now,
            known,
            silent: false,
            passed: 0.0,
            pressed: 0.0,
            largest: 0.0,
            last_passed: now,
            holes: Duration::ZERO,
            moment: (now, 0.0),
            moment_before: (Duration::ZERO, 0.0),
            measuring: None,
            judged: 0,
            refused: 0,
            best: best.unwrap_or_default().as_secs_f64(),
            lately: 0.0,
            drains: best.is_some(),
            draining: false,
        };
        limit.cut(now, floor);
        limit.known = known.max(floor);
        limit.measuring = Some((0.0, 0));
        limit
    }

    fn turns(&self) -> f64 {
        self.waited_for.as_secs_f64() / self.turn.as_secs_f64()
    }

    fn is_searching(&self) -> bool {
        CUT * (self.turns() - 1.0).powi(3) > WRONG
    }

    /// Units a second now.
    pub fn rate(&self) -> f64 {
        let turns = self.turns();
        let rise = CUT * (turns - 1.0).powi(3);
        let factor = if rise <= WRONG {
            1.0 + rise
        } else {
            let wrong_at = 1.0 + (WRONG / CUT).cbrt();
            (1.0 + WRONG) * (5.0 * (turns - wrong_at)).min(60.0).exp2()
        };
        let slower = if self.draining { 1.0 - DRAIN } else { 1.0 };
        (self.cap * factor * slower).max(self.floor)
    }

    /// When the next request may be sent.
    pub fn ready_at(&self) -> Instant {
        match self.measuring {
            Some((credit, _)) if credit > 0.0 => self.cut_at,
            _ => self.next,
        }
    }

    /// The next request may be sent when one is let through.
    pub fn is_measuring(&self) -> bool {
        self.measuring.is_some()
    }

    /// Somebody waits for this limit from `now` on, or nobody does.
    pub fn wait(&mut self, now: Instant, waited: bool) {
        self.measured(now);
        if self.draining && self.age(now) > DRAINED_FOR {
            self.draining = false;
        }
        if self.waited && !self.draining {
            self.waited_for += now.saturating_duration_since(self.seen);
        }
        if self.waited {
            self.last_waited = now;
        }
        self.seen = now;
        self.waited = waited;
    }

    /// Takes `cost` units for a request, which waited for them or did not.
    pub fn take(&mut self, now: Instant, cost: f64, waited: bool) {
        if let Some((credit, _)) = &mut self.measuring
            && *credit > 0.0
        {
            *credit -= cost;
            return;
        }
        let credit = if waited { LATE } else { UNUSED };
        let earliest = now.checked_sub(credit).unwrap_or(now);
        self.next = self.next.max(earliest) + self.time_of(cost);
    }

    /// A request for which `cost` units were taken was not sent.
    pub fn give_back(&mut self, cost: f64) {
        if let Some(next) = self.next.checked_sub(self.time_of(cost)) {
            self.next = next;
        }
    }

    /// Seconds that `cost` units take.
    fn time_of(&self, cost: f64) -> Duration {
        Duration::from_secs_f64((cost / self.rate()).min(60.0))
    }

    /// The store let a request of `cost` units through that was sent at `sent`.
    pub fn passed(&mut self, now: Instant, sent: Instant, cost: f64) {
        let took = now.saturating_duration_since(sent).as_secs_f64();
        let since = now.saturating_duration_since(self.seen).as_secs_f64();
        self.best = took.min(self.best * (1.0 + AGEING * since));
        self.lately += (took - self.lately) / 16.0;
        if self.lately <= 2.0 * self.best + USUAL.as_secs_f64() {
            self.draining = false;
        }
        if self.silent {
            self.is_back(now);
        }
        self.holes = self.holes_until(now);
        self.last_passed = now;
        self.passed += cost;
        self.largest = self.largest.max(cost);
        if self.waited && !self.draining {
            self.pressed += cost;
        }
        self.judged += u64::from(sent > self.cut_at);
        let age = now.saturating_duration_since(self.moment.0);
        if age >= MOMENT {
            self.moment_before = (age, self.moment.1);
            self.moment = (now, 0.0);
        }
        self.moment.1 += cost;
        if let Some((credit, requests)) = &mut self.measuring {
            *credit += cost;
            *requests += 1;
        }
        self.measured(now);
    }

    /// Ends the measuring when there is enough to go by.
    fn measured(&mut self, now: Instant) {
        let Some((_, requests)) = self.measuring else {
            return;
        };
        let age = self.age(now);
        if age >= MEASURED_AT_MOST || (age >= MEASURED && requests >= MEASURED_REQUESTS) {
            let cap = self.passed / age.as_secs_f64();
            self.measuring = None;
            if requests == 0 {
                return self.is_away(now);
            }
            self.cut(now, cap);
            // Nothing speaks for less than what was let through, and what was
            // sent at the floor's rate is no debt.
            self.waited_for = self.turn;
            self.next = now + BREATH;
        }
    }

    /// The store refused a request sent at `sent`; says whether that makes a cut.
    pub fn refused(&mut self, now: Instant, sent: Instant) -> bool {
        if sent <= self.cut_at || self.measuring.is_some() {
            return false;
        }
        self.judged += 1;
        self.refused += 1;
        let age = now.saturating_duration_since(self.cut_at);
        let many = self.refused >= MANY && self.refused * 4 > self.judged;
        if age < LEAST_EVIDENCE || (age < BETWEEN_CUTS && !many) {
            return false;
        }
        self.wait(now, self.waited);
        if self.passed == 0.0 {
            self.is_away(now);
            return true;
        }
        let answering = age.saturating_sub(self.holes_until(now));
        let mut cap = self.passed / answering.max(LEAST_EVIDENCE).as_secs_f64();
        if self.is_searching() {
            let time = now.saturating_duration_since(self.moment.0) + self.moment_before.0;
            let lately = self.moment.1 + self.moment_before.1;
            cap = cap.max(lately / time.max(LEAST_EVIDENCE).as_secs_f64());
        }
        // While nobody pressed, what passed is no measure of what may pass; and
        // while somebody did again, it may be what nobody had used before.
        let unpressed = self.waited_for * 2 + DRAINED_FOR < age;
        let measured_for = if unpressed { self.waited_for } else { age };
        let measured_for = measured_for.max(LEAST_EVIDENCE).as_secs_f64();
        if unpressed {
            let pressed = self.pressed / measured_for;
            let pressed = pressed.min(self.cap);
            cap = cap.max(pressed).max(self.cap * (1.0 - SAME));
        }
        // Whether one more was let through or one less is chance.
        if (cap - self.cap).abs() < CHANCE * self.largest / measured_for {
            cap = self.cap + (cap - self.cap) * LEARNED;
        }
        self.turn = if (cap / self.cap - 1.0).abs() < SAME {
            (self.turn * 2).min(LONGEST_TURN)
        } else {
            FIRST_TURN
        };
        self.cut(now, cap);
        true
    }

    /// For how long the store has said nothing since the cut.
    fn holes_until(&self, now: Instant) -> Duration {
        let gap = now.saturating_duration_since(self.last_passed);
        self.holes + if gap >= HOLE { gap } else { Duration::ZERO }
    }

    /// The store lets nothing through.
    fn is_away(&mut self, now: Instant) {
        let known = self.known;
        self.cut(now, self.floor);
        self.known = known;
        self.silent = true;
    }

    /// It does again.
    fn is_back(&mut self, now: Instant) {
        self.turn = FIRST_TURN;
        self.cut(now, self.known);
        self.next = now;
        self.waited_for = self.turn;
        self.draining = false;
    }

    fn cut(&mut self, now: Instant, cap: f64) {
        self.cap = cap.max(self.floor);
        self.known = self.cap;
        self.silent = false;
        self.next = self.next.max(now) + BREATH;
        self.cut_at = now;
        self.waited_for = Duration::ZERO;
        self.seen = now;
        self.passed = 0.0;
        self.pressed = 0.0;
        self.largest = 0.0;
        self.last_passed = now;
        self.holes = Duration::ZERO;
        self.moment = (now, 0.0);
        self.moment_before = (Duration::ZERO, 0.0);
        self.judged = 0;
        self.refused = 0;
        self.draining = self.drains;
    }

    /// For how long it has stood since the last cut.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.cut_at)
    }

    /// Somebody waits for it now.
    pub fn is_waited_for(&self) -> bool {
        self.waited
    }

    /// Nobody has waited for it for long, nor been refused by a store that is
    /// away, which makes a cut: a few callers pause rather than wait here.
    pub fn is_forgotten(&self, now: Instant) -> bool {
        let idle = now.saturating_duration_since(self.last_waited) > FORGOTTEN;
        let asked = self.silent && self.age(now) <= GIVEN_UP;
        !self.waited && idle && !asked
    }
}
