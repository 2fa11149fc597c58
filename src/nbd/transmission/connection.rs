//! The loop of one connection.
//!
//! | phase | requests | ends when |
//! |---|---|---|
//! | serving | taken | never by itself |
//! | pausing | left unread | all taken are answered |
//! | closing | refused with `ESHUTDOWN` while any is running | all taken are answered |
//! | leaving | none come | all taken are answered |
//!
//! Invariants: `running + replies queued = taken <= max_requests`; a request
//! is taken only when a slot is free; the channel of finished requests has a
//! place for every slot, so no request waits to hand in its outcome.

use std::future::poll_fn;
use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::time::{Instant, Sleep};

use super::busy::{Busy, yield_to_others};
use super::execute::{self, Failure, Outcome, Terms};
use super::inbox::{Body, Inbox, Incoming, Next};
use super::outbox::Outbox;
use super::running::{Finished, Running, Work};
use super::{Ended, Limits, Session, SessionError, Stop};
use crate::caller::Presence;
use crate::device::BlockDevice;
use crate::nbd::wire::reply::Errno;
use crate::nbd::wire::request::{Command, RequestHeader};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Serving,
    Pausing,
    Closing,
    /// The client said goodbye, or closed its sending side.
    Leaving,
}

/// Why the loop ended, before the stream is given away or dropped.
enum End {
    Settled,
    Vanished,
}

pub(super) struct Connection<S, D> {
    stream: S,
    device: Arc<D>,
    terms: Terms,
    limits: Limits,
    inbox: Inbox,
    outbox: Outbox,
    phase: Phase,
    /// Ends with the connection, and with it what its requests wait for.
    presence: Presence,
    /// Requests taken and not yet answered.
    taken: usize,
    /// Those of them that are in the device's hands: `waiting`, or in a task.
    running: usize,
    waiting: Running,
    finish: mpsc::Sender<Finished>,
    finished: mpsc::Receiver<Finished>,
    /// Runs while nothing is left but to write.
    linger: Option<Pin<Box<Sleep>>>,
    /// Runs while nothing is read, so that a hang-up would not be heard.
    look: Option<Pin<Box<Sleep>>>,
    busy: Busy,
}

/// A request that moves at least this much runs in a task of its own: copying
/// it takes longer than a switch, and another core may do it.
const LARGE: usize = 64 << 10;

/// Between two looks at a peer from which nothing is read.
const LOOK_EVERY: Duration = Duration::from_secs(1);

impl<S, D> Connection<S, D>
where
    S: AsyncRead + AsyncWrite + AsFd + Unpin + Send,
    D: BlockDevice,
{
    pub(super) fn new(stream: S, device: Arc<D>, session: Session) -> Self {
        let mut limits = session.limits;
        limits.max_requests = limits.max_requests.max(1);
        let (finish, finished) = mpsc::channel(limits.max_requests);
        let max_payload = device.geometry().max_payload;
        Self {
            stream,
            device,
            terms: Terms {
                structured: session.structured,
                base_allocation: session.base_allocation,
            },
            inbox: Inbox::new(&session.unread, limits.budget.clone(), max_payload),
            outbox: Outbox::default(),
            phase: Phase::Serving,
            presence: Presence::default(),
            taken: 0,
            running: 0,
            waiting: Running::new(limits.max_requests),
            finish,
            finished,
            linger: None,
            look: None,
            busy: Busy::default(),
            limits,
        }
    }

    pub(super) async fn run(
        mut self,
        stop: watch::Receiver<Stop>,
    ) -> Result<Ended<S>, SessionError> {
        let mut heard = Box::pin(raised(stop.clone(), Stop::Run));
        let end = poll_fn(|cx| {
            while let Poll::Ready(word) = heard.as_mut().poll(cx) {
                self.obey(word);
                heard.set(raised(stop.clone(), word));
            }
            self.poll(cx)
        })
        .await?;
        drop(heard);
        match (end, self.phase) {
            (End::Vanished, _) => Ok(Ended::Vanished),
            (End::Settled, Phase::Pausing) => Ok(Ended::Paused {
                stream: self.stream,
                unread: self.inbox.into_unread(),
            }),
            (End::Settled, phase) => {
                // Every reply was written: a failing shutdown changes nothing
                // for anybody.
                if let Err(error) = self.stream.shutdown().await {
                    tracing::debug!(%error, "cannot shut an nbd connection down");
                }
                Ok(match phase {
                    Phase::Leaving => Ended::Disconnected,
                    _ => Ended::Closed,
                })
            }
        }
    }

    fn obey(&mut self, word: Stop) {
        self.phase = match (self.phase, word) {
            (Phase::Leaving, _) => Phase::Leaving,
            (_, Stop::Close) => Phase::Closing,
            (Phase::Serving, Stop::Pause) => Phase::Pausing,
            (phase, _) => phase,
        };
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<End, SessionError>> {
        loop {
            self.take_outcomes(cx);
            if let Some(end) = self.take_requests(cx)? {
                return Poll::Ready(Ok(end));
            }
            let mut advanced = self.write_replies(cx)?;
            if self.is_settled() {
                return Poll::Ready(Ok(End::Settled));
            }
            if self.reads() {
                match self.inbox.poll_fill(cx, &mut self.stream) {
                    Poll::Ready(Ok(0)) => {
                        if let Some(end) = self.at_end_of_stream()? {
                            return Poll::Ready(Ok(end));
                        }
                        advanced = true;
                    }
                    Poll::Ready(Ok(_)) => {
                        if self.busy.is_idle() {
                            self.busy.heard(std::time::Instant::now());
                        }
                        advanced = true;
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => {}
                }
            }
            if !advanced {
                self.look_again(cx);
                if self.poll_look(cx).is_ready() {
                    return Poll::Ready(Ok(End::Vanished));
                }
                return self.poll_linger(cx).map(Err);
            }
        }
    }

    /// Comes back soon where a client has all its answers and usually asks on.
    fn look_again(&mut self, cx: &mut Context<'_>) {
        let idle = self.taken == 0 && self.phase == Phase::Serving;
        if idle && self.busy.looks_again(std::time::Instant::now()) {
            yield_to_others(cx);
        }
    }

    /// Whether anything is still to be read.
    fn reads(&self) -> bool {
        match self.phase {
            Phase::Serving => true,
            Phase::Closing => self.running > 0,
            Phase::Pausing | Phase::Leaving => false,
        }
    }

    fn is_settled(&self) -> bool {
        debug_assert!(self.running <= self.taken);
        self.phase != Phase::Serving && self.taken == 0
    }

    /// Queues the replies to what is over.
    fn take_outcomes(&mut self, cx: &mut Context<'_>) {
        let (terms, outbox, running) = (self.terms, &mut self.outbox, &mut self.running);
        let mut answer = |done: Finished| {
            *running -= 1;
            execute::put_reply(outbox, &done.header, terms, done.outcome);
            outbox.end_reply(done.hold);
        };
        self.waiting.poll(cx, &mut answer);
        while let Poll::Ready(Some(done)) = self.finished.poll_recv(cx) {
            answer(done);
        }
    }

    /// Takes every request that is whole, as far as slots go.
    fn take_requests(&mut self, cx: &mut Context<'_>) -> Result<Option<End>, SessionError> {
        let mut present = false;
        while self.reads() && self.taken < self.limits.max_requests {
            let Next::Request(request) = self.inbox.next(cx)? else {
                break;
            };
            if request.header.command == Command::Disconnect.code() {
                self.phase = Phase::Leaving;
                break;
            }
            self.taken += 1;
            if self.phase == Phase::Closing {
                let failure = Failure::new(Errno::Shutdown, "shutting down");
                self.answer(&request.header, Outcome::Failed(failure), request.hold);
                continue;
            }
            let geometry = self.device.geometry();
            match execute::check(&request.header, &request.body, self.terms, &geometry) {
                Err(failure) => {
                    self.answer(&request.header, Outcome::Failed(failure), request.hold);
                }
                Ok(operation) => {
                    if operation.changes() && !present {
                        // A peer that hung up may have sent this write again
                        // elsewhere, and newer data after it.
                        if closed(&self.stream, GONE | PollFlags::RDHUP) {
                            return Ok(Some(End::Vanished));
                        }
                        present = true;
                    }
                    self.start(cx, operation, request);
                }
            }
        }
        Ok(None)
    }

    /// Asks the device here, once. What is not ready then goes on here when
    /// it is small, in a task when it is large.
    fn start(&mut self, cx: &mut Context<'_>, operation: execute::Operation, request: Incoming) {
        let Incoming { header, body, hold } = request;
        let payload = match body {
            Body::Payload(payload) => payload,
            Body::Dropped => unreachable!("refused by the check"),
        };
        let large = operation.moves(&payload) >= LARGE;
        let work = execute::execute(Arc::clone(&self.device), operation, payload);
        let mut work: Work = Box::pin(self.presence.caller().scope(work));
        if !large {
            match self.waiting.start(header, hold, work) {
                Some(done) => self.answer(&done.header, done.outcome, done.hold),
                None => self.running += 1,
            }
            return;
        }
        if let Poll::Ready(outcome) = work.as_mut().poll(cx) {
            return self.answer(&header, outcome, hold);
        }
        self.running += 1;
        let finish = self.finish.clone();
        tokio::spawn(async move {
            let done = Finished {
                header,
                outcome: work.await,
                hold,
            };
            if finish.send(done).await.is_err() {
                tracing::debug!(?operation, "finished after its client had gone");
            }
        });
    }

    fn answer(
        &mut self,
        header: &RequestHeader,
        outcome: Outcome,
        hold: Option<OwnedSemaphorePermit>,
    ) {
        execute::put_reply(&mut self.outbox, header, self.terms, outcome);
        self.outbox.end_reply(hold);
    }

    /// Writes until nothing is left or the socket is full; true when a slot
    /// became free.
    fn write_replies(&mut self, cx: &mut Context<'_>) -> Result<bool, SessionError> {
        let mut freed = false;
        while !self.outbox.is_empty() {
            match self.outbox.poll_write(cx, &mut self.stream) {
                Poll::Ready(Ok(replies)) => {
                    self.linger = None;
                    self.taken -= replies;
                    freed |= replies > 0;
                }
                Poll::Ready(Err(error)) => return Err(SessionError::Write(error)),
                Poll::Pending => break,
            }
        }
        Ok(freed)
    }

    /// The peer sends no more. One that closed only its sending side still
    /// gets its replies.
    fn at_end_of_stream(&mut self) -> Result<Option<End>, SessionError> {
        if !self.inbox.between_requests() {
            return Err(SessionError::Truncated);
        }
        if closed(&self.stream, GONE) {
            return Ok(Some(End::Vanished));
        }
        self.phase = Phase::Leaving;
        Ok(None)
    }

    /// Ready when a peer whose requests wait unread, because those before them
    /// use up the bounds or are to be parked, has hung up.
    fn poll_look(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let deaf = match self.phase {
            Phase::Serving => self.inbox.is_full(),
            Phase::Pausing => true,
            Phase::Closing | Phase::Leaving => false,
        };
        if !deaf {
            self.look = None;
            return Poll::Pending;
        }
        loop {
            let look = self
                .look
                .get_or_insert_with(|| Box::pin(tokio::time::sleep(LOOK_EVERY)));
            ready!(look.as_mut().poll(cx));
            self.look = None;
            if closed(&self.stream, GONE) {
                return Poll::Ready(());
            }
        }
    }

    /// Bounds the wait for a peer that reads nothing, once there is nothing
    /// else to wait for and the connection is not to be kept.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<SessionError> {
        let ending = matches!(self.phase, Phase::Closing | Phase::Leaving);
        if !ending || self.running > 0 {
            return Poll::Pending;
        }
        let deadline = Instant::now() + self.limits.linger;
        self.linger
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)))
            .as_mut()
            .poll(cx)
            .map(|()| SessionError::Stalled)
    }
}

/// Waits until `stop` says more than `before`; for ever once nobody can.
async fn raised(mut stop: watch::Receiver<Stop>, before: Stop) -> Stop {
    let word = stop.wait_for(|word| *word > before).await.map(|word| *word);
    match word {
        Ok(word) => word,
        Err(_) => std::future::pending().await,
    }
}

/// The peer has closed both ways: nobody will take a reply.
const GONE: PollFlags = PollFlags::HUP.union(PollFlags::ERR).union(PollFlags::NVAL);

/// True when the socket is in one of these states.
fn closed(stream: &impl AsFd, states: PollFlags) -> bool {
    let mut fds = [PollFd::new(stream, states)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    match rustix::event::poll(&mut fds, Some(&now)) {
        Ok(_) => fds[0].revents().intersects(states),
        // Nothing was learned; the next read or write will tell.
        Err(error) => {
            tracing::debug!(error = %io::Error::from(error), "cannot poll an nbd connection");
            false
        }
    }
}
