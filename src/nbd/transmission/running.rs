//! Requests that had to wait, and run in the connection's own task.
//!
//! What they wait for wakes that task once for all answers that came together,
//! and their replies leave in one system call; a task for each would cost a
//! switch, and often another thread's wake-up, per request.
//!
//! Invariants: a slot's bit is set only by its own waker, and from then on the
//! task is woken or being woken; a slot is free or holds one request.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;
use tokio::sync::OwnedSemaphorePermit;

use super::execute::Outcome;
use crate::nbd::wire::request::RequestHeader;

/// A request in the device's hands.
pub(super) type Work = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// A request that is over.
pub(super) struct Finished {
    pub(super) header: RequestHeader,
    pub(super) outcome: Outcome,
    pub(super) hold: Option<OwnedSemaphorePermit>,
}

struct Request {
    header: RequestHeader,
    hold: Option<OwnedSemaphorePermit>,
    work: Work,
}

/// Which slots have been woken since they were last polled.
struct Woken {
    slots: Box<[AtomicU64]>,
    task: AtomicWaker,
}

/// The waker of one slot.
struct Bell {
    woken: Arc<Woken>,
    slot: usize,
}

struct Slot {
    waker: Waker,
    request: Option<Request>,
}

struct Slots {
    woken: Arc<Woken>,
    slots: Vec<Slot>,
    free: Vec<usize>,
}

/// See the module.
pub(super) struct Running(Option<Slots>);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let bit = 1 << (self.slot % 64);
        let before = self.woken.slots[self.slot / 64].fetch_or(bit, Ordering::AcqRel);
        // Whoever had set it wakes the task.
        if before & bit == 0 {
            self.woken.task.wake();
        }
    }
}

impl Slots {
    fn new(most: usize) -> Self {
        let words = most.div_ceil(64);
        Self {
            woken: Arc::new(Woken {
                slots: (0..words).map(|_| AtomicU64::new(0)).collect(),
                task: AtomicWaker::new(),
            }),
            slots: Vec::new(),
            free: Vec::new(),
        }
    }

    fn start(
        &mut self,
        header: RequestHeader,
        hold: Option<OwnedSemaphorePermit>,
        mut work: Work,
    ) -> Option<Finished> {
        let slot = self.free.pop().unwrap_or_else(|| self.add_slot());
        let entry = &mut self.slots[slot];
        match work.as_mut().poll(&mut Context::from_waker(&entry.waker)) {
            Poll::Ready(outcome) => {
                self.free.push(slot);
                Some(Finished {
                    header,
                    outcome,
                    hold,
                })
            }
            Poll::Pending => {
                entry.request = Some(Request { header, hold, work });
                None
            }
        }
    }

    fn add_slot(&mut self) -> usize {
        let slot = self.slots.len();
        let woken = Arc::clone(&self.woken);
        self.slots.push(Slot {
            waker: Arc::new(Bell { woken, slot }).into(),
            request: None,
        });
        slot
    }

    fn poll(&mut self, cx: &mut Context<'_>, mut done: impl FnMut(Finished)) {
        // Before the bits are looked at: one that is set later finds the task.
        self.woken.task.register(cx.waker());
        for word in 0..self.woken.slots.len() {
            let mut bits = self.woken.slots[word].swap(0, Ordering::AcqRel);
            while bits != 0 {
                let slot = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                if let Some(finished) = self.poll_slot(slot) {
                    done(finished);
                }
            }
        }
    }

    fn poll_slot(&mut self, slot: usize) -> Option<Finished> {
        let entry = &mut self.slots[slot];
        // A waker may outlive the request that it was given to.
        let request = entry.request.as_mut()?;
        let mut cx = Context::from_waker(&entry.waker);
        let Poll::Ready(outcome) = request.work.as_mut().poll(&mut cx) else {
            return None;
        };
        let Request { header, hold, .. } = entry.request.take()?;
        self.free.push(slot);
        Some(Finished {
            header,
            outcome,
            hold,
        })
    }

    fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }
}

impl Running {
    /// For at most `most` requests at a time.
    pub(super) fn new(most: usize) -> Self {
        Self(Some(Slots::new(most)))
    }

    fn slots(&mut self) -> &mut Slots {
        self.0.as_mut().expect("only the drop takes them")
    }

    /// Polls `work` once. One that has to wait stays and is polled by
    /// [`Running::poll`], which the caller has to call before it waits itself.
    pub(super) fn start(
        &mut self,
        header: RequestHeader,
        hold: Option<OwnedSemaphorePermit>,
        work: Work,
    ) -> Option<Finished> {
        self.slots().start(header, hold, work)
    }

    /// Polls what was woken, hands what is over to `done`, and has the task
    /// woken for the rest.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, done: impl FnMut(Finished)) {
        self.slots().poll(cx, done);
    }
}

impl Drop for Running {
    /// Nothing that happens to the connection stops a request half way: what
    /// is left goes on in a task, unless the runtime itself ends.
    fn drop(&mut self) {
        let Some(mut left) = self.0.take().filter(|slots| !slots.is_empty()) else {
            return;
        };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        runtime.spawn(std::future::poll_fn(move |cx| {
            left.poll(cx, |finished| {
                let command = finished.header.command;
                tracing::debug!(command, "finished after its client had gone");
            });
            if left.is_empty() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        }));
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    fn header() -> RequestHeader {
        RequestHeader {
            flags: 0,
            command: 0,
            cookie: 0,
            offset: 0,
            length: 0,
        }
    }

    /// `count` requests, each of which ends when its sender sends.
    fn started(count: usize) -> (Running, Vec<oneshot::Sender<()>>) {
        let mut running = Running::new(count);
        let senders = (0..count).map(|_| {
            let (sender, receiver) = oneshot::channel::<()>();
            let work = Box::pin(async {
                receiver.await.ok();
                Outcome::Done
            });
            assert!(running.start(header(), None, work).is_none());
            sender
        });
        let senders = senders.collect();
        (running, senders)
    }

    #[tokio::test]
    async fn every_wake_is_heard_whichever_thread_it_comes_from() {
        let (mut running, senders) = started(200);
        let thread = std::thread::spawn(move || {
            for sender in senders {
                sender.send(()).expect("somebody waits");
            }
        });
        let mut over = 0;
        std::future::poll_fn(|cx| {
            running.poll(cx, |_| over += 1);
            if running.slots().is_empty() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
        assert_eq!(over, 200);
        thread.join().expect("it sends");
    }

    #[tokio::test]
    async fn what_is_left_goes_on_when_the_connection_goes() {
        let mut running = Running::new(1);
        let (go, wait) = oneshot::channel::<()>();
        let (tell, told) = oneshot::channel();
        let work = Box::pin(async {
            wait.await.ok();
            tell.send(()).ok();
            Outcome::Done
        });
        assert!(running.start(header(), None, work).is_none());
        drop(running);
        go.send(()).expect("it still waits");
        told.await.expect("it went on");
    }

    #[test]
    fn a_runtime_may_end_while_requests_wait() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("a runtime");
        let (running, _senders) = started(1);
        runtime.block_on(async {
            tokio::spawn(async move {
                let _running = running;
                std::future::pending::<()>().await;
            });
            tokio::task::yield_now().await;
        });
        drop(runtime);
    }

    #[tokio::test]
    async fn a_late_wake_of_a_slot_that_is_free_does_nothing() {
        let (mut running, senders) = started(1);
        let stale = running.slots().slots[0].waker.clone();
        for sender in senders {
            sender.send(()).expect("somebody waits");
        }
        let mut over = 0;
        std::future::poll_fn(|cx| {
            running.poll(cx, |_| over += 1);
            Poll::Ready(())
        })
        .await;
        assert_eq!((over, running.slots().is_empty()), (1, true));
        stale.wake();
        std::future::poll_fn(|cx| {
            running.poll(cx, |_| over += 1);
            Poll::Ready(())
        })
        .await;
        assert_eq!(over, 1);
    }
}
