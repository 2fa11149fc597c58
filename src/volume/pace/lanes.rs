//! The queues of an account's volumes, and who goes next.
//!
//! ## Invariants
//! - While anybody is in a queue, there is a dispatcher (`dispatching`).
//! - A volume's flag `throttled` stands exactly while it has a limit of its
//!   own or was asked to hold; the account's while `requests` or `bytes` is.
//!   Nobody queues while neither stands, so limits are forgotten only when the
//!   dispatcher or a refusal looks at them, with the queues empty or served.
//! - `under_way` of a volume counts its permits.
//!
//! ## Whose limit it is
//! A refusal does not say whether the volume or the account has had too much.
//! It is the account's if other volumes that send now are refused as much, and
//! the volume's if it is alone, or if the others are let through so often that
//! it cannot be chance.
//!
//! ## Who goes next
//! Of the volumes that wait and that no limit of their own holds back, the one
//! that has had least of the account (start-time fair queueing: a volume's
//! clock runs on by the cost of each request, and one that comes back after a
//! pause starts at the clock of those that were served).

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{info, warn};

use super::limits::{Limits, rate};
use super::meter::{Flow, float};
use super::window::Window;
use super::{Account, Permit, Shared, Throttled};

/// Refusals of different volumes within this time are compared.
const COMPARED: Duration = Duration::from_secs(1);
/// Of so many refusals to be expected, none is no chance.
const NO_CHANCE: f64 = 3.0;
/// How many requests make up their average size. What went before they were
/// refused says nothing: a stream may have ended just then.
const OF_THE_LAST: f64 = 4.0;

/// Somebody in a queue.
#[derive(Debug)]
pub(super) struct Waiter {
    pub granted: oneshot::Sender<Permit>,
    pub bytes: u64,
    /// What the permit goes back to.
    pub permit: Weak<Account>,
}

/// One volume.
#[derive(Debug)]
struct Lane {
    shared: Arc<Shared>,
    limits: Limits,
    window: Option<Window>,
    /// The store asked for silence until then.
    hold: Option<Instant>,
    since: Timestamp,
    again: VecDeque<Waiter>,
    fresh: VecDeque<Waiter>,
    /// Seconds of the account that it has had.
    clock: f64,
    /// Let through and refused lately.
    passed: u64,
    refused: u64,
    /// Bytes of a request, on average of the last few since it was throttled.
    size: Option<f64>,
}

/// All volumes of an account.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    lanes: BTreeMap<u64, Lane>,
    next_lane: u64,
    /// The account's.
    limits: Limits,
    since: Timestamp,
    clock: f64,
    dispatching: bool,
    compared_since: Option<Instant>,
    /// The account as a whole is throttled.
    throttled: Arc<AtomicBool>,
}

/// When to look again.
pub(super) enum Next {
    /// Nobody waits.
    Done,
    /// At this time, or at news.
    At(Instant),
    /// At news.
    WhenSettled,
}

impl Lane {
    fn waiting(&self) -> usize {
        self.again.len() + self.fresh.len()
    }

    fn under_way(&self) -> u64 {
        self.shared.under_way.load(Ordering::Relaxed)
    }

    fn flag(&self) {
        let throttled = !self.limits.is_empty() || self.window.is_some() || self.hold.is_some();
        self.shared.throttled.store(throttled, Ordering::Release);
    }

    /// Takes a request's bytes into the average; answers with that.
    fn sized(&mut self, bytes: u64) -> f64 {
        let bytes = float(bytes);
        let size = self.size.get_or_insert(bytes);
        *size += (bytes - *size) / OF_THE_LAST;
        *size
    }

    /// When the next request of the queue may be sent as far as the volume's
    /// own limits go; `None`: when one under way is over.
    fn ready_at(&mut self, now: Instant) -> Option<Instant> {
        let under_way = self.under_way();
        let waiting = self.waiting() > 0;
        let room = |window: &mut Window| window.has_room(now, under_way);
        if waiting && !self.window.as_mut().is_none_or(room) {
            self.limits.ready_at(now, false);
            return None;
        }
        let limits = self.limits.ready_at(now, waiting);
        Some(limits.max(self.hold).unwrap_or(now))
    }

    /// The next that still waits.
    fn next(&mut self) -> Option<Waiter> {
        loop {
            let queue = if self.again.is_empty() {
                &mut self.fresh
            } else {
                &mut self.again
            };
            let waiter = queue.pop_front()?;
            if !waiter.granted.is_closed() {
                return Some(waiter);
            }
        }
    }

    fn forget(&mut self, now: Instant) {
        if self.waiting() > 0 {
            // What it waits for may be old; who ends it looks at the flag.
            return;
        }
        let before = self.limits.is_empty() && self.window.is_none();
        self.limits.forget(now);
        self.window.take_if(|window| window.is_forgotten(now));
        self.hold.take_if(|until| *until <= now);
        if !before && self.limits.is_empty() && self.window.is_none() {
            info!("a volume is not throttled any more");
        }
        if self.limits.is_empty() {
            self.size = None;
        }
        self.flag();
    }
}

impl Lanes {
    pub fn join(&mut self, shared: Arc<Shared>) -> u64 {
        let number = self.next_lane;
        self.next_lane += 1;
        self.lanes.insert(
            number,
            Lane {
                shared,
                limits: Limits::default(),
                window: None,
                hold: None,
                since: Timestamp::UNIX_EPOCH,
                again: VecDeque::new(),
                fresh: VecDeque::new(),
                clock: 0.0,
                passed: 0,
                refused: 0,
                size: None,
            },
        );
        number
    }

    pub fn leave(&mut self, lane: u64) {
        self.lanes.remove(&lane);
    }

    /// Puts somebody into a queue; says whether a dispatcher is to be started.
    pub fn queue(&mut self, lane: u64, again: bool, waiter: Waiter) -> bool {
        let Some(lane) = self.lanes.get_mut(&lane) else {
            return false; // Unreachable: whoever asks holds the lane.
        };
        if lane.waiting() == 0 {
            lane.clock = lane.clock.max(self.clock);
        }
        let queue = if again {
            &mut lane.again
        } else {
            &mut lane.fresh
        };
        queue.push_back(waiter);
        !std::mem::replace(&mut self.dispatching, true)
    }

    /// The dispatcher is gone: who still waits queues again.
    pub fn abandon(&mut self) {
        self.dispatching = false;
        for lane in self.lanes.values_mut() {
            lane.again.clear();
            lane.fresh.clear();
        }
    }

    /// Sends out the permits that are due.
    pub fn dispatch(&mut self, now: Instant) -> Next {
        self.forget(now);
        loop {
            let waiting = self.lanes.values().any(|lane| lane.waiting() > 0);
            let account_at = self.limits.ready_at(now, waiting).unwrap_or(now);
            let mut soonest: Option<Instant> = None;
            let mut best: Option<(f64, u64)> = None;
            for (number, lane) in &mut self.lanes {
                let ready = lane.ready_at(now);
                if lane.waiting() == 0 {
                    continue;
                }
                match ready {
                    None => {}
                    Some(ready) if ready > now => {
                        soonest = Some(soonest.map_or(ready, |at| at.min(ready)));
                    }
                    Some(_) if best.is_none_or(|(clock, _)| lane.clock < clock) => {
                        best = Some((lane.clock, *number));
                    }
                    Some(_) => {}
                }
            }
            if !waiting {
                self.dispatching = false;
                return Next::Done;
            }
            let Some((_, number)) = best else {
                return soonest.map_or(Next::WhenSettled, Next::At);
            };
            if account_at > now {
                return Next::At(account_at);
            }
            self.send(number, now);
        }
    }

    fn send(&mut self, number: u64, now: Instant) {
        let Some(lane) = self.lanes.get_mut(&number) else {
            return;
        };
        let Some(waiter) = lane.next() else {
            return;
        };
        let Some(account) = waiter.permit.upgrade() else {
            return;
        };
        let bytes = waiter.bytes;
        lane.limits.take(now, bytes);
        self.limits.take(now, bytes);
        self.clock = self.clock.max(lane.clock);
        lane.clock += self.limits.share(bytes);
        lane.shared.under_way.fetch_add(1, Ordering::Relaxed);
        let permit = Permit {
            account,
            lane: number,
            shared: Arc::clone(&lane.shared),
            sent: now,
            bytes,
        };
        if let Err(permit) = waiter.granted.send(permit) {
            // Its caller went away just now.
            lane.limits.give_back(bytes);
            self.limits.give_back(bytes);
            // The drop takes no lock that is held here.
            drop(permit);
        }
    }

    fn forget(&mut self, now: Instant) {
        let before = self.limits.is_empty();
        self.limits.forget(now);
        if !before && self.limits.is_empty() {
            info!("an account is not throttled any more");
            self.throttled.store(false, Ordering::Release);
        }
        self.lanes.values_mut().for_each(|lane| lane.forget(now));
    }

    /// Stands while the account as a whole is throttled.
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.throttled)
    }

    /// A request was let through; says whether the dispatcher waits for that.
    pub fn passed(&mut self, lane: u64, now: Instant, sent: Instant, bytes: u64) -> bool {
        let mut next = self.limits.passed(now, sent, bytes);
        if let Some(lane) = self.lanes.get_mut(&lane) {
            lane.passed += 1;
            lane.sized(bytes);
            next |= lane.limits.passed(now, sent, bytes);
            let under_way = lane.under_way();
            if let Some(window) = &mut lane.window {
                window.passed(under_way);
            }
        }
        next && self.dispatching
    }

    /// A request was refused, and silence asked for `until` then.
    pub fn refused(
        &mut self,
        number: u64,
        now: Instant,
        sent: Instant,
        bytes: u64,
        until: Option<Instant>,
    ) {
        self.forget(now);
        self.compare(now);
        let Some(lane) = self.lanes.get_mut(&number) else {
            return;
        };
        lane.refused += 1;
        lane.hold = lane.hold.max(until);
        let (flow, _) = lane.shared.meter.flow(now);
        let best = lane.shared.meter.best();
        let size = lane.sized(bytes);
        let news = if self.is_the_accounts(number, now) {
            let first = self.limits.is_empty();
            let flow = self.flow(now);
            self.limits.refused(now, sent, size, flow, best);
            if first {
                self.since = Timestamp::now();
                self.throttled.store(true, Ordering::Release);
                // What volumes were just taken for being throttled by themselves.
                for lane in self.lanes.values_mut() {
                    if lane.limits.is_young(now) {
                        lane.limits = Limits::default();
                    }
                    lane.flag();
                }
            }
            first
        } else if let Some(lane) = self.lanes.get_mut(&number) {
            let first = lane.limits.is_empty();
            lane.limits.refused(now, sent, size, flow, best);
            if first && lane.window.is_none() {
                lane.since = Timestamp::now();
            }
            lane.flag();
            first
        } else {
            false
        };
        if news && let Some(throttled) = self.throttled(number, now) {
            warn!("the store is throttling: slowing down {throttled}");
        }
    }

    /// What the account's volumes got through lately.
    fn flow(&self, now: Instant) -> Flow {
        let lanes = self.lanes.values();
        lanes.fold(Flow::default(), |sum, lane| {
            let (flow, _) = lane.shared.meter.flow(now);
            Flow {
                requests: sum.requests + flow.requests,
                bytes: sum.bytes + flow.bytes,
            }
        })
    }

    /// A request timed out.
    pub fn timed_out(&mut self, lane: u64, now: Instant, sent: Instant) {
        let Some(lane) = self.lanes.get_mut(&lane) else {
            return;
        };
        let under_way = lane.under_way();
        match &mut lane.window {
            Some(window) => window.timed_out(now, sent, under_way),
            None => {
                if lane.limits.is_empty() {
                    lane.since = Timestamp::now();
                }
                let (_, answered) = lane.shared.meter.flow(now);
                let window = Window::new(now, under_way, answered > 0);
                let most = window.most();
                warn!("the store times requests out: {most} at a time from now on");
                lane.window = Some(window);
            }
        }
        lane.flag();
    }

    /// Turns to a new second of comparison.
    fn compare(&mut self, now: Instant) {
        let over = |since: Instant| now.saturating_duration_since(since) >= COMPARED;
        if self.compared_since.is_none_or(over) {
            self.compared_since = Some(now);
            for lane in self.lanes.values_mut() {
                (lane.passed, lane.refused) = (lane.passed / 2, lane.refused / 2);
            }
        }
    }

    /// Is a refusal of lane `number` the account's doing?
    fn is_the_accounts(&self, number: u64, now: Instant) -> bool {
        let Some(lane) = self.lanes.get(&number) else {
            return false;
        };
        let (mut passed, mut refused) = (0.0, 0.0);
        for (other, lane) in &self.lanes {
            if *other != number {
                // What went by before anybody counted.
                let (_, known) = lane.shared.meter.flow(now);
                passed += float(lane.passed.max(known));
                refused += float(lane.refused);
            }
        }
        let (_, known) = lane.shared.meter.flow(now);
        let own = float(lane.refused) / (float(lane.passed.max(known) + lane.refused));
        let expected = own * (passed + refused);
        if refused == 0.0 {
            // Nobody else, or nobody else is refused.
            return expected > 0.0 && expected < NO_CHANCE && !self.limits.is_empty();
        }
        let proven = lane.limits.is_waited_for() && !lane.limits.is_young(now);
        !proven && refused * 4.0 >= expected
    }

    /// How a volume is throttled.
    pub fn throttled(&mut self, lane: u64, now: Instant) -> Option<Throttled> {
        self.forget(now);
        let lane = self.lanes.get(&lane)?;
        let own = !lane.limits.is_empty() || lane.window.is_some();
        let account = !self.limits.is_empty() && (!own || self.limits.is_waited_for());
        if !own && !account {
            return None;
        }
        let limits = if account { &self.limits } else { &lane.limits };
        Some(Throttled {
            since: if account { self.since } else { lane.since },
            account,
            requests: rate(limits.requests.as_ref()),
            bytes: rate(limits.bytes.as_ref()),
            under_way: lane.window.as_ref().map(Window::most),
            waiting: lane.waiting() as u64,
        })
    }
}
