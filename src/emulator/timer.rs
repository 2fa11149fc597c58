//! Sleeps that end when they should. The runtime's own timer counts whole
//! milliseconds and rounds up, which would falsify a simulated latency; this one
//! is a thread that waits on a condition variable, exact to some tens of
//! microseconds.

use std::collections::BinaryHeap;
use std::num::NonZeroU64;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

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

#[derive(Debug, Default)]
struct Queue {
    sleepers: BinaryHeap<Sleeper>,
    stopped: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// The timer thread; it ends when this is dropped, which wakes all sleepers.
#[derive(Debug)]
pub(super) struct Timer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Timer {
    /// Starts the thread.
    pub(super) fn start() -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("emulator-timer".into())
            .spawn(move || run(&own))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Sleeps until `until`.
    pub(super) async fn sleep_until(&self, until: Instant) {
        if until <= Instant::now() {
            return;
        }
        let (wake, woken) = oneshot::channel();
        {
            let mut queue = self.shared.lock();
            let first = queue.sleepers.peek().is_none_or(|next| until < next.until);
            queue.sleepers.push(Sleeper { until, wake });
            if first {
                self.shared.changed.notify_one();
            }
        }
        // An error means that the timer is being stopped: so is everything.
        woken.await.unwrap_or_default();
    }

    /// Sleeps for `duration`.
    pub(super) async fn sleep(&self, duration: Duration) {
        if !duration.is_zero() {
            self.sleep_until(Instant::now() + duration).await;
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the timer thread panicked");
        }
    }
}

fn run(shared: &Shared) {
    // The kernel may let a sleep of this thread run late by 50 us otherwise.
    if let Err(error) = rustix::thread::set_current_timer_slack(NonZeroU64::new(1)) {
        tracing::debug!("timer slack stays as it is: {error}");
    }
    let mut queue = shared.lock();
    let mut due = Vec::new();
    while !queue.stopped {
        let now = Instant::now();
        while queue.sleepers.peek().is_some_and(|next| next.until <= now) {
            due.extend(queue.sleepers.pop());
        }
        if !due.is_empty() {
            // Waking takes a system call at times: not under the lock.
            drop(queue);
            for sleeper in due.drain(..) {
                // The sleeper may have given up.
                sleeper.wake.send(()).unwrap_or_default();
            }
            queue = shared.lock();
            continue;
        }
        queue = match queue.sleepers.peek() {
            Some(next) => {
                let left = next.until - now;
                shared
                    .changed
                    .wait_timeout(queue, left)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
            None => shared
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn never_wakes_early_and_wakes_in_order() {
        let timer = Arc::new(Timer::start().expect("thread"));
        let start = Instant::now();
        let sleeps = (0..100u64).map(|i| {
            let timer = Arc::clone(&timer);
            tokio::spawn(async move {
                let wanted = Duration::from_micros(500 + 37 * ((i * 61) % 100));
                timer.sleep_until(start + wanted).await;
                assert!(start.elapsed() >= wanted);
            })
        });
        for sleep in sleeps.collect::<Vec<_>>() {
            sleep.await.expect("no panic");
        }
    }

    #[tokio::test]
    async fn dropping_it_wakes_sleepers() {
        let timer = Timer::start().expect("thread");
        let shared = Arc::clone(&timer.shared);
        let (wake, woken) = oneshot::channel();
        shared.lock().sleepers.push(Sleeper {
            until: Instant::now() + Duration::from_secs(3600),
            wake,
        });
        drop(timer);
        drop(shared);
        assert!(woken.await.is_err());
    }
}
