//! Sleeps that end when they should. The runtime's own timer counts whole
//! milliseconds and rounds up, which would falsify a simulated latency; this one
//! is a timer of the kernel that the runtime's workers wait for with everything
//! else. What still passes between a sleep's end and its sleeper going on, some
//! tens of microseconds on an idle machine, is learned, and sleeps end earlier
//! by that: single ones end a little early or late, their mean is as asked.

use std::collections::BinaryHeap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

/// The most that sleeps end earlier, in nanoseconds: a machine that is too busy
/// is slow, and shall look slow.
const MOST_EARLY: i64 = 300_000;
/// Each sleep moves what was learned by this part of its own error.
const WEIGHT: i64 = 32;

/// A sleeper; the heap gives the earliest first.
#[derive(Debug)]
struct Sleeper {
    until: Instant,
    wake: oneshot::Sender<()>,
}

impl PartialEq for Sleeper {
    fn eq(&self, other: &Self) -> bool {
        self.until == other.until
    }
}
impl Eq for Sleeper {}
impl PartialOrd for Sleeper {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Sleeper {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.until.cmp(&self.until)
    }
}

/// The timer; its sleepers wake as long as the runtime lives in which it was
/// started.
#[derive(Debug)]
pub(super) struct Timer(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    sleepers: Mutex<BinaryHeap<Sleeper>>,
    clock: AsyncFd<OwnedFd>,
    /// Nanoseconds by which sleeps end earlier.
    early: AtomicI64,
}

impl Timer {
    /// Starts it in the runtime that is current.
    pub(super) fn start() -> std::io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let clock = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        // SAFETY: an `OwnedFd` has one descriptor, which stays open until it is
        // dropped; nothing here duplicates or replaces it.
        let clock = unsafe { AsyncFd::register(clock) }?;
        let shared = Arc::new(Shared {
            sleepers: Mutex::default(),
            clock,
            early: AtomicI64::new(0),
        });
        tokio::spawn(run(Arc::clone(&shared)));
        Ok(Self(shared))
    }

    /// Sleeps until `until`, on average.
    pub(super) async fn sleep_until(&self, until: Instant) {
        if until <= Instant::now() {
            return;
        }
        let (wake, woken) = oneshot::channel();
        {
            let mut sleepers = self.0.sleepers();
            let first = sleepers.peek().is_none_or(|next| until < next.until);
            sleepers.push(Sleeper { until, wake });
            if first {
                self.0.set(until);
            }
        }
        // An error means that the runtime is being stopped: so is everything.
        woken.await.unwrap_or_default();
        self.0.learn(until, Instant::now());
    }

    /// Sleeps for `duration`.
    pub(super) async fn sleep(&self, duration: Duration) {
        if !duration.is_zero() {
            self.sleep_until(Instant::now() + duration).await;
        }
    }
}

impl Shared {
    fn sleepers(&self) -> MutexGuard<'_, BinaryHeap<Sleeper>> {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn early(&self) -> Duration {
        Duration::from_nanos(self.early.load(Ordering::Relaxed).unsigned_abs())
    }

    /// A sleep until `until` ended at `now`.
    fn learn(&self, until: Instant, now: Instant) {
        let late = now.saturating_duration_since(until).as_nanos();
        let early = until.saturating_duration_since(now).as_nanos();
        let clamp = |nanos: u128| i64::try_from(nanos).map_or(MOST_EARLY, |n| n.min(MOST_EARLY));
        let error = clamp(late) - clamp(early);
        let learned = self.early.load(Ordering::Relaxed) + error / WEIGHT;
        // Of two at a time one may be lost: others follow.
        self.early
            .store(learned.clamp(0, MOST_EARLY), Ordering::Relaxed);
    }

    /// Has the clock ring for what shall end at `until`.
    fn set(&self, until: Instant) {
        let left = until.saturating_duration_since(Instant::now());
        // Zero would switch it off.
        let left = left
            .saturating_sub(self.early())
            .max(Duration::from_nanos(1));
        let zero = Timespec::try_from(Duration::ZERO);
        let (Ok(it_value), Ok(it_interval)) = (Timespec::try_from(left), zero) else {
            return tracing::error!("the timer cannot wait for {left:?}");
        };
        let when = Itimerspec {
            it_interval,
            it_value,
        };
        let flags = TimerfdTimerFlags::empty();
        if let Err(error) = timerfd_settime(self.clock.get_ref(), flags, &when) {
            tracing::error!("the timer cannot be set: {error}");
        }
    }

    /// Wakes whoever is due and sets the clock for the next.
    fn wake(&self) {
        let mut due = Vec::new();
        {
            let mut sleepers = self.sleepers();
            let now = Instant::now() + self.early();
            while sleepers.peek().is_some_and(|next| next.until <= now) {
                due.extend(sleepers.pop());
            }
            if let Some(next) = sleepers.peek() {
                self.set(next.until);
            }
        }
        // Waking takes a system call at times: not under the lock.
        for sleeper in due {
            // The sleeper may have given up.
            sleeper.wake.send(()).unwrap_or_default();
        }
    }
}

/// Wakes sleepers until the runtime ends.
async fn run(shared: Arc<Shared>) {
    loop {
        match shared.clock.readable().await {
            Ok(mut ready) => {
                let mut count = [0; 8];
                match rustix::io::read(shared.clock.get_ref(), &mut count) {
                    Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                    Err(error) => return tracing::error!("the timer cannot be read: {error}"),
                    // It is asked again before anybody waits: a timer that was
                    // set meanwhile rings on its own.
                    Ok(_) => ready.clear_ready(),
                }
            }
            Err(error) => return tracing::error!("the timer cannot be waited for: {error}"),
        }
        shared.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn sleeps_end_in_order_and_hardly_early() {
        let timer = Arc::new(Timer::start().expect("a timer"));
        let start = Instant::now();
        let sleeps = (0..100u64).map(|i| {
            let timer = Arc::clone(&timer);
            tokio::spawn(async move {
                let wanted = Duration::from_micros(500 + 37 * ((i * 61) % 100));
                timer.sleep_until(start + wanted).await;
                let most = Duration::from_nanos(MOST_EARLY.unsigned_abs());
                assert!(start.elapsed() + most >= wanted);
            })
        });
        for sleep in sleeps.collect::<Vec<_>>() {
            sleep.await.expect("no panic");
        }
    }

    #[tokio::test]
    async fn learns_to_end_earlier_by_what_comes_late_and_no_more_than_that() {
        let timer = Timer::start().expect("a timer");
        let (until, late) = (Instant::now(), Duration::from_micros(100));
        // What was learned ends the sleep earlier: the error shrinks.
        for _ in 0..1000 {
            timer.0.learn(until, until + late - timer.0.early());
        }
        assert!(timer.0.early() <= late, "{:?}", timer.0.early());
        assert!(timer.0.early() > late * 9 / 10, "{:?}", timer.0.early());
        for _ in 0..1000 {
            timer.0.learn(until, until + Duration::from_secs(1));
        }
        let most = Duration::from_nanos(MOST_EARLY.unsigned_abs());
        assert_eq!(timer.0.early(), most);
        for _ in 0..1000 {
            timer.0.learn(until + Duration::from_secs(1), until);
        }
        assert_eq!(timer.0.early(), Duration::ZERO);
    }
}
